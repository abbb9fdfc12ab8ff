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
from video_mae.training.collapse import RankWatch
from video_mae.training.loop import Training, is_due
from video_mae.training.picture import draw_reconstruction, reconstruction_frames
from video_mae.training.starting_weights import starting_weights
from video_mae.training.teacher import MovingTeacher, Teacher, load_teacher


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

    watch: RankWatch | None = None
    """Of the features of a teacher that follows."""

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
        super().__init__(config, read_sources(config.data, model.in_channels), weights)
        if width is not None:
            self.introduction.append(
                f"targets are {width} features of {objective.teacher}; no pictures are drawn"
            )

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
        mask, targets = self._mask(batch.seeds_B, skipped), []
        if self._teacher is not None:
            targets = [None, self._teacher(batch.clip_BTHWC)]
            if self.watch is not None:
                self.watch.see(targets[1])
        output = self.engine(batch.clip_BTHWC, mask, *targets)
        return {name: getattr(output, name) for name in Losses._fields}

    def begin(self) -> None:
        super().begin()
        if isinstance(self.teacher, MovingTeacher):
            self.teacher.start(self.engine, self.model.encoder)
            min_rank = self.config.objective.min_rank
            self.watch = RankWatch(self.engine, min_rank) if min_rank > 0 else None

    def tensors(self) -> dict[str, torch.Tensor]:
        tensors = super().tensors()
        if isinstance(self.teacher, MovingTeacher):
            tensors = {**tensors, **self.teacher.averages}
        return tensors

    def measure(self, done: int) -> dict[str, float]:
        if self.watch is None:
            return {}
        return {"feature_rank": self.watch.rank(done, self.memory)}

    def reason_to_stop(self, done: int, is_logged: bool) -> str:
        reason = super().reason_to_stop(done, is_logged)
        if not reason and self.watch is not None:
            reason = self.watch.reason
        return reason

    def after(self, done: int, *, ending: bool) -> None:
        if isinstance(self.teacher, MovingTeacher):
            progress = (done - 1) / self.schedule.total_steps
            self.teacher.follow(self.engine, self.model.encoder, progress)
        if self.teacher is not None:
            return
        if ending or is_due(done, self.config.journal.picture_interval):
            self._draw(self.folder / "reconstructions" / f"step_{done:08d}.png")

    def _mask(self, seeds_B: torch.Tensor, skipped: float) -> AnyMask:
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
    def _teacher(self) -> Teacher | None:
        """The teacher, on the device."""
        return self.teacher and self.teacher.to(self.engine.device)

    @cached_property
    def _examples(self) -> Batch:
        """A clip of some videos, spread evenly over the list: the same in every picture."""
        clips = self._clips(replace(self.config.data, clips_per_video=1))
        num = min(self.config.journal.picture_clips, len(clips))
        batch = collate([clips[0, i * len(clips) // num] for i in range(num)])
        return batch.to(self.engine.device)

    def _draw(self, picture: Path) -> None:
        clip_BTHWC, model = self._examples.clip_BTHWC, self.config.model
        mask = self._mask(self._examples.seeds_B, skipped=0.0)
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
