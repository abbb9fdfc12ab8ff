"""Stages of a pretraining run: what a clip is from a step on. Small clips first make a run cheaper
(DailyMAE, Wu et al., 2024), larger ones while it cools down better (V-JEPA 2, Assran et al., 2025).

The weights are the same in all: positions serve any grid. The learning rate is that of the
configuration itself, also where a stage has another micro-batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch.utils.data import Dataset

from video_mae.config import PretrainConfig
from video_mae.config.schema import require
from video_mae.config.training import ClipStageConfig
from video_mae.config.world import World
from video_mae.data.dataset import ClipDataset, Sample
from video_mae.data.sampling import StepSampler
from video_mae.data.sources import Sources
from video_mae.model.masking import AnyMask, mask_counts, token_mask
from video_mae.model.vit import pretraining_macs


class ClipStage:
    """The steps from `first_step` on, where `config` is the whole configuration: the encoder sees
    num_visible of the tokens of a clip, num_masked are predicted, num_context are in the decoder
    besides.

    macs: multiply-accumulates of a clip's forward pass. step_videos: of all ranks. shift: how many
    more videos the steps before it take than if they took as many as its own. The configuration
    itself begins at -1, so that another may begin with the first step, 0.
    """

    def __init__(self, config: PretrainConfig, first_step: int = -1) -> None:
        """Raises: ValueError for a mask that hides nothing, or too little."""
        self.config, self.first_step, self.shift = config, first_step, 0
        mask, model, optim = config.mask, config.model, config.optim
        self.step_videos = optim.micro_batch * optim.accumulation * World.from_environment().size
        self.num_visible, self.num_masked = mask_counts(
            model.grid, mask.kind, mask.ratio, mask.decoder_mask_ratio
        )
        self.num_context = 0
        if model.decoder_context != "scored" and mask.decoder_mask_ratio > 0:
            skipped = int(mask.decoder_mask_ratio * self.num_visible)
            self.num_context = self.num_visible - skipped
        objective = config.objective
        has_contrast = objective.contrastive_weight > 0 and objective.negatives == "clip"
        if has_contrast and self.num_masked < 2:
            raise ValueError(
                "mask.ratio: hides 1 tubelet of a clip, and objective.contrastive_weight has "
                "nothing to contrast it with; raise it"
            )
        counts = self.num_visible, self.num_masked, self.num_context
        self.macs = pretraining_macs(model, *counts)

    def mask(self, seeds_B: torch.Tensor, skipped: float) -> AnyMask:
        """The masks of clips, the decoder leaving out `skipped` of the masked tokens."""
        mask, model = self.config.mask, self.config.model
        return token_mask(
            seeds_B, model.grid, mask.kind, mask.ratio, skipped, model.decoder_context
        )

    def describe(self) -> str:
        """A few words on its clips."""
        model = self.config.model
        line = (
            f"clips of {model.num_frames} x {model.height} x {model.width}, {self.num_visible} of "
            f"{model.num_tokens} tokens visible, {self.num_masked} predicted"
        )
        return line + (f", {self.num_context} more in the decoder" if self.num_context else "")


def clip_stages(config: PretrainConfig, num_steps: float = math.inf) -> list[ClipStage]:
    """The stages of a run of num_steps in their order; the first is the configuration itself, which
    holds until another begins. Raises: ValueError naming the key of a stage that cannot be.
    """
    stages = [ClipStage(config)]
    for name, stage in sorted(config.stages.items(), key=lambda item: item[1].from_step):
        try:
            is_own = stages[-1].first_step < stage.from_step < num_steps
            remedy = "must be below the number of steps of the run, and no other stage's"
            require(is_own, "from_step", stage.from_step, remedy)
            stages.append(ClipStage(_configured(config, stage), stage.from_step))
        except ValueError as error:
            said = str(error).replace("mask.ratio", "mask_ratio", 1)
            raise ValueError(f"stages.{name}.{said}") from None
    for before, stage in pairwise(stages):
        more = before.step_videos - stage.step_videos
        stage.shift = before.shift + more * stage.first_step
    return stages


def _configured(config: PretrainConfig, stage: ClipStageConfig) -> PretrainConfig:
    """The configuration as it holds in a stage. Raises: ValueError naming a key of the stage."""
    data, model, optim = config.data, config.model, config.optim
    is_used = stage.stride is None or not data.sources
    require(is_used, "stride", stage.stride, "does not reach data.sources; leave it out")
    # With another number of videos a step, epochs are no number of steps.
    is_counted = optim.steps is not None and not optim.drop_last_batch and not optim.global_batch
    require(
        is_counted or stage.micro_batch in (None, optim.micro_batch),
        "micro_batch",
        stage.micro_batch,
        "needs optim.steps, optim.drop_last_batch = false and no optim.global_batch",
    )
    num_frames, predicted = stage.num_frames or model.num_frames, model.predicted_frames
    if predicted is not None:  # of a tubelet as many as ever: the decoder's head is the same
        predicted = num_frames // model.tubelet_size * model.predicted_tubelet[0]
    return replace(
        config,
        data=replace(data, stride=stage.stride or data.stride),
        mask=replace(config.mask, ratio=stage.mask_ratio or config.mask.ratio),
        optim=replace(optim, micro_batch=stage.micro_batch or optim.micro_batch),
        model=replace(
            model,
            num_frames=num_frames,
            height=stage.height or model.height,
            width=stage.width or model.width,
            predicted_frames=predicted,
        ),
        stages={},
    )


@dataclass
class StageSampler:
    """The micro-batches of `plain`, each of the size of its stage, as lists of (number of the
    stage, epoch, index): the same endless stream of videos, each taken once and in its order.
    """

    plain: StepSampler
    stages: Sequence[ClipStage]

    def __iter__(self) -> Iterator[list[Any]]:
        ends = [*(stage.first_step for stage in self.stages[1:]), self.plain.last_step]
        for number, stage in enumerate(self.stages):
            first_step = max(self.plain.first_step, stage.first_step)
            yield from replace(
                self.plain,
                micro_batch=stage.config.optim.micro_batch,
                first_step=first_step,
                last_step=max(first_step, ends[number]),
                key_at=partial(_staged, self.plain.key_at, number, stage.shift),
            )


def _staged(key_at: Any, number: int, shift: int, position: int) -> Any:
    return number, *key_at(position + shift)


class StagedClips(Dataset[Sample]):
    """Clips of all stages: dataset[number of the stage, epoch, index]."""

    def __init__(self, stages: Sequence[ClipStage], videos: Sources) -> None:
        self.clips = [make_clips(stage.config, videos) for stage in stages]

    def __getitem__(self, key: tuple[int, int, int]) -> Sample:
        return self.clips[key[0]][key[1:]]


def make_clips(config: PretrainConfig, videos: Sources) -> ClipDataset:
    """Clips of the configured size."""
    model, data = config.model, config.data
    # One source is read at the stride that `data` has here.
    of = videos if data.sources else videos.parts[0].videos
    size = model.num_frames, model.height, model.width
    return ClipDataset(of, data, *size, config.seed, model.in_channels)
