"""The pretraining stage: masks, both losses, and pictures of what the model makes of hidden
tubelets.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch

from video_mae.config import DataConfig, PretrainConfig
from video_mae.data.dataset import Batch, ClipDataset, collate
from video_mae.data.sources import read_sources
from video_mae.files import draw_or_tell
from video_mae.model.masking import AnyMask, mask_counts, token_mask
from video_mae.model.objective import Losses, pixel_scale, predicted_clip
from video_mae.model.vit import VideoMAE, pretraining_macs
from video_mae.training.feature_probe import FeatureProbe
from video_mae.training.loop import Training, is_due
from video_mae.training.picture import draw_reconstruction, reconstruction_frames


def start(config: PretrainConfig) -> Callable[[], int]:
    """The stage as the command line starts it: a mistake is raised here, the training is what is
    returned.
    """
    return prepare(config).run_and_leave


def prepare(config: PretrainConfig) -> "Pretraining":
    """Checks configuration, mask, lists and run folder without starting anything.

    Raises: ValueError or FileNotFoundError with one line that names the file or key and the remedy.
    """
    return Pretraining(config)


def run(training: "Pretraining") -> int:
    """Trains from the newest checkpoint of the run folder to the last step; returns the exit
    status, as `Training.run` says.
    """
    return training.run()


class Pretraining(Training[PretrainConfig]):
    """A pretraining run: the encoder sees num_visible of the tokens of a clip, num_masked are
    predicted, num_context are in the decoder besides.
    """

    def __init__(self, config: PretrainConfig) -> None:
        mask, model = config.mask, config.model
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
                "objective.contrastive_weight: a clip has 1 masked tubelet, so nothing to "
                "contrast; raise mask.ratio"
            )
        super().__init__(config, read_sources(config.data, model.in_channels))
        self.probe: FeatureProbe | None = None
        if config.probe.train or config.probe.validation:
            self.probe = FeatureProbe(self.config)

    def make_model(self) -> tuple[VideoMAE, float]:
        config = self.config
        model = VideoMAE(
            config.model,
            config.objective,
            impl=config.engine.kernels,
            checkpointing=config.engine.activation_checkpointing,
        )
        counts = self.num_visible, self.num_masked, self.num_context
        return model, pretraining_macs(config.model, *counts)

    def make_dataset(self) -> ClipDataset:
        return self._clips(self.config.data)

    def introduce(self) -> str:
        line = (
            f"{self.num_visible} of {self.config.model.num_tokens} tokens visible, "
            f"{self.num_masked} predicted"
        )
        if self.num_context:
            line += f", {self.num_context} more in the decoder"
        sources = self.videos.describe()
        return f"{line}, {sources}" if sources else line

    def losses(self, batch: Batch, step: int, micro: int) -> Mapping[str, torch.Tensor]:
        skipped = self.config.mask.decoder_mask_ratio
        output = self.engine(batch.clip_BTHWC, self._mask(batch.seeds_B, skipped))
        return {name: getattr(output, name) for name in Losses._fields}

    def after(self, done: int, *, ending: bool) -> None:
        if ending or is_due(done, self.config.journal.picture_interval):
            self._draw(self.folder / "reconstructions" / f"step_{done:08d}.png")
        # a run that is told to end has no time for it
        if self.probe and not self.signal and self.is_measured(done, self.config.probe.interval):
            self.probe.follow(done, self.epoch(done), self.journal, self._mask)

    def _mask(self, seeds_B: torch.Tensor, skipped: float = 0.0) -> AnyMask:
        """The masks of clips, the decoder leaving out `skipped` of the masked tokens."""
        mask, model = self.config.mask, self.config.model
        return token_mask(
            seeds_B, model.grid, mask.kind, mask.ratio, skipped, model.decoder_context
        )

    def _clips(self, data: DataConfig) -> ClipDataset:
        model, seed = self.config.model, self.config.seed
        size = model.num_frames, model.height, model.width
        return ClipDataset(self.videos, data, *size, seed, model.in_channels)

    @cached_property
    def _examples(self) -> Batch:
        """A clip of some videos, spread evenly over the list: the same in every picture."""
        clips = self._clips(replace(self.config.data, clips_per_video=1))
        num = min(self.config.journal.picture_clips, len(clips))
        batch = collate([clips[0, i * len(clips) // num] for i in range(num)])
        return batch.to(self.engine.device)

    def _draw(self, picture: Path) -> None:
        clip_BTHWC, model = self._examples.clip_BTHWC, self.config.model
        mask = self._mask(self._examples.seeds_B)
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
