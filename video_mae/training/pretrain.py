"""The pretraining stage: masks, both losses, and pictures of what the model makes of hidden
tubelets.
"""

from bisect import bisect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from video_mae.config import ClipsConfig, PretrainConfig
from video_mae.data.dataset import Batch, collate
from video_mae.data.sampling import StepSampler
from video_mae.data.sources import read_sources
from video_mae.files import draw_or_tell
from video_mae.model.objective import Losses, pixel_scale, predicted_clip
from video_mae.model.vit import VideoMAE
from video_mae.training.collapse import RankWatch
from video_mae.training.feature_probe import FeatureProbe
from video_mae.training.loop import Training, is_due
from video_mae.training.picture import (
    animate_reconstruction,
    draw_reconstruction,
    reconstruction_frames,
)
from video_mae.training.stages import (
    ClipStage,
    StagedClips,
    StageSampler,
    clip_stages,
    make_clips,
)
from video_mae.training.starting_weights import starting_weights
from video_mae.training.teacher import MovingTeacher, Teacher, load_teacher


def start(config: PretrainConfig) -> int | Callable[[], int]:
    """The stage as the command line starts it: a mistake is raised here, the training is what is
    returned.
    """
    return prepare(config).start()


def prepare(config: PretrainConfig) -> "Pretraining":
    """Checks configuration, mask, lists and run folder without starting anything.

    Raises: ValueError or FileNotFoundError with one line that names the file or key and the remedy.
    """
    return Pretraining(config.cut())


def run(training: "Pretraining") -> int:
    """Trains from the newest checkpoint of the run folder to the last step; returns the exit
    status, as `Training.run` says.
    """
    return training.run()


def make_autoencoder(config: PretrainConfig) -> VideoMAE:
    """The network of a configuration, with new weights."""
    return VideoMAE(
        config.model,
        config.objective,
        impl=config.engine.kernels,
        checkpointing=config.engine.activation_checkpointing,
    )


class Pretraining(Training[PretrainConfig]):
    """A pretraining run, in one stage or several; `base` is the one of the configuration itself."""

    watch: RankWatch | None = None
    """Of the features of a teacher that follows."""

    def __init__(self, config: PretrainConfig) -> None:
        clip_stages(config)  # what cannot be is told before lists are read
        objective, model = config.objective, config.model
        # It stands outside of the engine, which would partition and save it.
        self.teacher = load_teacher(config) if objective.target == "features" else None
        width = None if self.teacher is None else self.teacher.width
        if model.target_width not in (None, width):
            raise ValueError(
                f"model.target_width: {model.target_width} is not that of the targets; leave it "
                "out, objective.teacher sets it"
            )
        config = replace(config, model=replace(model, target_width=width))
        config, weights = starting_weights(config)
        if objective.teacher == "ema":
            self.teacher = load_teacher(config)  # has positions as the student, of a checkpoint too
        videos = read_sources(config.data, model.in_channels, resumed=config.has_begun)
        super().__init__(config, videos, weights)
        self.stages = clip_stages(self.config, self.schedule.total_steps)
        self.base, *others = self.stages
        self.introduction += [
            f"after step {stage.first_step}: {stage.step_videos} videos a step, {stage.describe()}"
            for stage in others
        ]
        if width is not None:
            self.introduction.append(
                f"targets are {width} features of {objective.teacher}; no pictures are drawn"
            )
        self.probe: FeatureProbe | None = None
        if config.probe.train or config.probe.validation:
            self.probe = FeatureProbe(self.config)

    def make_model(self) -> tuple[VideoMAE, float]:
        model = make_autoencoder(self.config)
        model.clips_config = ClipsConfig.of(self.config)
        return model, self.base.macs

    def make_dataset(self) -> StagedClips:
        return StagedClips(self.stages, self.videos)

    def arranged(self, sampler: StepSampler) -> StageSampler:
        return StageSampler(sampler, self.stages)

    def videos_before(self, step: int) -> int:
        stage = self._stage_of(step)
        return stage.shift + step * stage.step_videos

    def introduce(self) -> str:
        line, sources = self.base.describe(), self.videos.describe()
        return f"{line}, {sources}" if sources else line

    def losses(self, batch: Batch, step: int, micro: int) -> Mapping[str, torch.Tensor]:
        stage, config = self._stage_of(step), self.config
        # what a step takes, for those who count
        clips_per_video = config.data.clips_per_video
        self.engine.set_micro_batch(stage.config.optim.micro_batch * clips_per_video)
        self.journal.clips_per_step = stage.step_videos * clips_per_video
        self.journal.flops_per_clip = 6 * stage.macs
        inputs = self._inputs(stage, batch, config.mask.decoder_mask_ratio)
        if self.watch is not None:
            self.watch.see(inputs[-1])
        output = self.engine(*inputs)
        return {name: getattr(output, name) for name in Losses._fields}

    def begin(self) -> None:
        super().begin()
        if isinstance(self.teacher, MovingTeacher):
            self.teacher.start(self.engine, self.model.encoder)
            min_rank = self.config.objective.min_rank
            self.watch = RankWatch(self.engine, min_rank) if min_rank > 0 else None

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.teacher.averages if isinstance(self.teacher, MovingTeacher) else {}

    def measure(self, done: int) -> dict[str, float]:
        if self.watch is None:
            return {}
        return {"feature_rank": self.watch.rank(done, self.memory)}

    def reason_to_stop(self, done: int, is_logged: bool) -> str:
        reason = super().reason_to_stop(done, is_logged)
        if not reason and self.watch is not None:
            reason = self.watch.reason
        return reason

    def _stage_of(self, step: int) -> ClipStage:
        number = bisect(self.stages, step, key=lambda stage: stage.first_step)
        return self.stages[number - 1]

    def after(self, done: int) -> None:
        if isinstance(self.teacher, MovingTeacher):
            progress = (done - 1) / self.schedule.total_steps
            self.teacher.follow(self.engine, self.model.encoder, progress)
        is_drawn = is_due(done, self.config.journal.picture_interval)
        if self.teacher is None and (is_drawn or done == self.schedule.total_steps):
            with self.journal.aside():
                self._draw(self.folder / "reconstructions" / f"step_{done:08d}.png")
        # a run that is told to end has no time for it
        if self.probe and not self.signal and self.is_measured(done, self.config.probe.interval):
            inputs_of = partial(self._inputs, self.base, skipped=0.0)
            self.probe.follow(done, self.epoch(done), self.journal, inputs_of)

    def _inputs(self, stage: ClipStage, batch: Batch, skipped: float) -> tuple[Any, ...]:
        """What the model takes: clips, their masks, whose decoder leaves out `skipped` of the
        masked tokens, their grid, and the features that are their targets or None.
        """
        target_BNF, grid = None, stage.config.model.grid
        if self._teacher is not None:
            target_BNF = self._teacher(batch.clip_BTHWC, grid)
        return batch.clip_BTHWC, stage.mask(batch.seeds_B, skipped), grid, target_BNF

    @cached_property
    def _teacher(self) -> Teacher | None:
        """The teacher, on the device."""
        return self.teacher and self.teacher.to(self.engine.device)

    @cached_property
    def _examples(self) -> Batch:
        """A clip of some videos, spread evenly over the list: the same in every picture."""
        data = replace(self.config.data, clips_per_video=1)
        clips = make_clips(replace(self.config, data=data), self.videos)
        num = min(self.config.journal.picture_clips, len(clips))
        batch = collate([clips[0, i * len(clips) // num] for i in range(num)])
        return batch.to(self.engine.device)

    def _draw(self, picture: Path) -> None:
        clip_BTHWC, model = self._examples.clip_BTHWC, self.config.model
        mask = self.base.mask(self._examples.seeds_B, skipped=0.0)
        predicted_BMP = self.engine.evaluate(clip_BTHWC, mask).predicted_BMP
        if self.engine.rank != 0:
            return
        videos = [self.videos[index] for index in self._examples.index_B.tolist()]
        frames = reconstruction_frames(
            predicted_clip(clip_BTHWC, model),
            mask.visible_BV,
            mask.masked_BM,
            predicted_BMP,
            model.predicted_tubelet,
            self.config.objective.normalize,
            pixel_scale=pixel_scale(model, self.config.objective),
        )
        titles = [Path(str(place)).name for place, _ in videos]
        draw = partial(draw_reconstruction, frames=frames, titles=titles)
        draw_or_tell(picture, draw, self.journal.say)
        draw = partial(animate_reconstruction, frames=frames)
        draw_or_tell(picture.with_suffix(".webp"), draw, self.journal.say)
