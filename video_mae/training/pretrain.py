"""The pretraining stage: everything that can be wrong is checked in `prepare`, before any process
group starts; `run` trains.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from video_mae.config import DataConfig, PretrainConfig
from video_mae.data.dataset import Batch, ClipDataset, collate
from video_mae.data.sources import read_sources
from video_mae.files import draw_or_tell
from video_mae.model.masking import AnyMask, mask_counts, token_mask
from video_mae.model.objective import pixel_scale, predicted_clip
from video_mae.model.vit import VideoMAE, pretraining_macs
from video_mae.training.loop import Run, Stage, check_run, is_due, run_and_leave, train
from video_mae.training.picture import draw_reconstruction


@dataclass(frozen=True)
class Plan:
    """A checked pretraining run."""

    run: Run
    config: PretrainConfig
    num_visible: int
    num_masked: int
    num_context: int


def start(config: PretrainConfig) -> Callable[[], int]:
    """The stage as the command line starts it: a mistake is raised here, the training is what is
    returned.
    """
    return run_and_leave(partial(run, prepare(config)))


def prepare(config: PretrainConfig) -> Plan:
    """Checks configuration, mask, lists and run folder without starting anything.

    Raises: ValueError or FileNotFoundError with one line that names the file or key and the remedy.
    """
    mask = config.mask
    num_visible, num_masked = mask_counts(
        config.model.grid, mask.kind, mask.ratio, mask.decoder_mask_ratio
    )
    num_context = num_visible - int(mask.decoder_mask_ratio * num_visible)
    if config.model.decoder_context == "scored" or mask.decoder_mask_ratio == 0:
        num_context = 0
    if (
        config.objective.contrastive_weight > 0
        and num_masked < 2
        and config.objective.negatives == "clip"
    ):
        raise ValueError(
            "objective.contrastive_weight: a clip has 1 masked tubelet, so nothing to contrast; raise mask.ratio"
        )
    checked = check_run(config, partial(read_sources, config.data, config.model.in_channels))
    return Plan(
        checked, replace(config, data=checked.config.data), num_visible, num_masked, num_context
    )


def run(plan: Plan) -> int:
    """Trains from the newest checkpoint of the run folder to the last step; returns the exit
    status, as `train` says.
    """
    config = plan.config
    torch.manual_seed(config.seed)
    model = VideoMAE(
        config.model,
        config.objective,
        impl=config.engine.kernels,
        checkpointing=config.engine.activation_checkpointing,
    )
    macs = pretraining_macs(config.model, plan.num_visible, plan.num_masked, plan.num_context)
    return train(plan.run, model, macs, partial(_Pretraining, plan))


class _Pretraining(Stage):
    """Masks, both losses, pictures."""

    def __init__(self, plan: Plan, *loop: Any) -> None:
        super().__init__(*loop)
        self.plan, self.config = plan, plan.config
        self.examples: Batch | None = None

    def dataset(self) -> ClipDataset:
        return self._dataset(self.config.data)

    def introduce(self) -> str:
        tokens = f"{self.plan.num_visible} of {self.config.model.num_tokens} tokens visible, {self.plan.num_masked} predicted"
        if self.plan.num_context:
            tokens += f", {self.plan.num_context} more in the decoder"
        return ", ".join(filter(None, (tokens, self.dataset().paths.describe())))

    def losses(self, batch: Batch, step: int, micro: int) -> Mapping[str, torch.Tensor]:
        output = self.engine(batch.clip_BTHWC, self._mask(batch.seeds_B))
        return {
            "loss": output.loss,
            "reconstruction_loss": output.reconstruction_loss,
            "contrastive_loss": output.contrastive_loss,
        }

    def after(self, done: int, *, ending: bool) -> None:
        if ending or is_due(done, self.config.journal.picture_interval):
            self._draw(done)

    def results(self) -> list[tuple[str, Path]]:
        return [("pictures", self.run.folder / "reconstructions")]

    def _mask(self, seeds_B: torch.Tensor, *, whole: bool = False) -> AnyMask:
        mask, model = self.config.mask, self.config.model
        skipped = 0.0 if whole else mask.decoder_mask_ratio
        return token_mask(
            seeds_B, model.grid, mask.kind, mask.ratio, skipped, model.decoder_context
        )

    def _dataset(self, data: DataConfig) -> ClipDataset:
        model = self.config.model
        return ClipDataset(
            self.run.videos,
            data,
            model.num_frames,
            model.height,
            model.width,
            self.config.seed,
            model.in_channels,
        )

    def _draw(self, done: int) -> None:
        if self.examples is None:
            videos, num = (
                len(self.run.videos),
                min(self.config.journal.picture_clips, len(self.run.videos)),
            )
            dataset = self._dataset(replace(self.config.data, clips_per_video=1))
            self.examples = collate([dataset[(0, i * videos // num)] for i in range(num)]).to(
                self.engine.device
            )
        clip_BTHWC, mask = self.examples.clip_BTHWC, self._mask(self.examples.seeds_B, whole=True)
        predicted_BMP = self.engine.evaluate(clip_BTHWC, mask).predicted_BMP
        if self.engine.rank == 0:
            names = [
                Path(str(self.run.videos[int(index)][0])).name for index in self.examples.index_B
            ]
            picture, model = (
                self.run.folder / "reconstructions" / f"step_{done:08d}.png",
                self.config.model,
            )
            draw = partial(
                draw_reconstruction,
                clip_BTHWC=predicted_clip(clip_BTHWC, model).cpu(),
                visible_BV=mask.visible_BV.cpu(),
                masked_BM=mask.masked_BM.cpu(),
                predicted_BMP=predicted_BMP.float().cpu(),
                tubelet=model.predicted_tubelet,
                normalize=self.config.objective.normalize,
                titles=names,
                pixel_scale=pixel_scale(model, self.config.objective),
            )
            draw_or_tell(picture, draw, self.journal.say)
