"""The fine-tuning stage: a pretrained encoder learns to name actions, validated while it trains."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange

from video_mae.config import FinetuneConfig, ModelConfig
from video_mae.convert.model_folder import find_model_folder, load_pretrained
from video_mae.data.augment import mix_batch, strengthen_clip
from video_mae.data.dataset import Batch, LabelledClips, ValidationClips, share_batches
from video_mae.data.loader import DevicePrefetcher, make_loader
from video_mae.data.sampling import sample_seed
from video_mae.data.sources import Sources
from video_mae.data.videos import VideoList, read_training_videos, read_validation_videos
from video_mae.model.inflation import resized
from video_mae.model.vit import VideoClassifier, encoder_macs
from video_mae.training.loop import Training

# Fields of a model that fine-tuning may change, or that its encoder does not have.
FREE_FIELDS = (
    "num_frames",
    "height",
    "width",
    "drop_path",
    "resize_positions",
    "position_grid",
    "head_norm_eps",
    "encoder_norm",
    "predicted_frames",
)


def start(config: FinetuneConfig) -> Callable[[], int]:
    """The stage as the command line starts it: a mistake is raised here, the training is what is
    returned.
    """
    return prepare(config).run_and_leave


def prepare(config: FinetuneConfig) -> "Finetuning":
    """Checks configuration, lists, labels, checkpoint and run folder without starting anything.

    Raises: ValueError or FileNotFoundError with one line that names the file or key and the remedy.
    """
    videos, classifier = read_training_videos(config)
    config = replace(config, classifier=classifier)
    validation = read_validation_videos(config) if config.validation.source else None
    config, weights, weights_line = starting_weights(config)
    sources = Sources([("data", config.data, videos)])
    return Finetuning(config, sources, validation, weights, weights_line)


def run(training: "Finetuning") -> int:
    """Trains from the newest checkpoint of the run folder to the last step; returns the exit
    status, as `Training.run` says.
    """
    return training.run()


def starting_weights(config: FinetuneConfig) -> tuple[FinetuneConfig, dict[str, torch.Tensor], str]:
    """What the checkpoint gives to the classifier of a run, one line about it, and the
    configuration that knows its positions.

    A VideoMAE gives its encoder, without its last norm where tokens are averaged: fc_norm starts
    anew, as published. A VideoClassifier gives its fc_norm too, and its head where the classes are
    as many and, where both are named, the same.
    Raises: FileNotFoundError; ValueError where the architectures differ, with the overrides that
    would make them agree.
    """
    if not config.checkpoint:
        return config, {}, "from random weights"
    try:
        folder = find_model_folder(config.checkpoint)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"checkpoint: {error}") from None
    source, model = load_pretrained(folder), config.model
    if source.config.grid != model.grid:
        size = {"num_frames": model.num_frames, "height": model.height, "width": model.width}
        source = resized(source, **size)  # pyright: ignore[reportArgumentType]
    _check_architecture(folder, source.config, model)
    model = replace(model, position_grid=source.config.position_grid)
    wanted, head = ["encoder."], "new head"
    if isinstance(source, VideoClassifier):
        ours, theirs = config.classifier, source.classifier_config
        wanted.append("fc_norm.")
        is_named = ours.class_names and theirs.class_names
        if ours.num_classes != theirs.num_classes or (
            is_named and ours.class_names != theirs.class_names
        ):
            head = f"new head (its {theirs.num_classes} classes are others)"
        else:
            wanted.append("head.")
            head = "its head"
    # Tokens are averaged before a norm, or one token is taken after one.
    unwanted = "fc_norm." if config.classifier.pooling == "first" else "encoder.norm."
    weights = {
        name: tensor
        for name, tensor in source.state_dict().items()
        if name.startswith(tuple(wanted)) and not name.startswith(unwanted)
    }
    return replace(config, model=model), weights, f"encoder from {folder}, {head}"


def _check_architecture(folder: Path, theirs: ModelConfig, ours: ModelConfig) -> None:
    remedies: list[str] = []
    for field in fields(ModelConfig):
        value = getattr(theirs, field.name)
        is_free = field.name.startswith("decoder_") or field.name in FREE_FIELDS
        if not is_free and value != getattr(ours, field.name):
            shown = list(value) if isinstance(value, tuple) else value
            remedies.append(f"model.{field.name}={shown}")
    if remedies:
        raise ValueError(
            f"checkpoint: {folder} has another architecture than model of this run; "
            f"{' '.join(remedies)} would be the same"
        )


class Finetuning(Training[FinetuneConfig]):
    """A fine-tuning run: augmented clips, soft targets, validation. weights: what it starts from,
    and weights_line: which these are.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        videos: Sources,
        validation: VideoList | None,
        weights: dict[str, torch.Tensor],
        weights_line: str,
    ) -> None:
        super().__init__(config, videos, validation)
        self.weights, self.weights_line = weights, weights_line
        augment = config.augment
        self.augments_in_workers = augment.changes_pixels and augment.where == "worker"

    def make_model(self) -> tuple[VideoClassifier, float]:
        config = self.config
        model = VideoClassifier(
            config.model,
            config.classifier,
            impl=config.engine.kernels,
            checkpointing=config.engine.activation_checkpointing,
        )
        missing, unexpected = model.load_state_dict(self.weights, strict=False)
        assert not unexpected
        if self.weights:
            assert all(name.startswith(("fc_norm.", "head.", "encoder.norm.")) for name in missing)
        return model, encoder_macs(config.model, config.model.num_tokens)

    def make_dataset(self) -> LabelledClips:
        return LabelledClips(self.videos, self.config)

    def introduce(self) -> str:
        classifier = self.config.classifier
        frames = "frames spread over each video"
        if classifier.sampling == "dense":
            frames = f"dense clips of stride {classifier.stride}"
        return (
            f"{classifier.num_classes} classes, {frames}, {len(self.validation or ()) or 'no'} "
            f"validation videos; {self.weights_line}"
        )

    def losses(self, batch: Batch, step: int, micro: int) -> Mapping[str, torch.Tensor]:
        config, augment = self.config, self.config.augment
        clip_BTHWC, label_B, smoothing = batch.clip_BTHWC, batch.label_B, augment.label_smoothing
        if augment.where == "device":
            clips = [
                strengthen_clip(clip_THWC, augment, config.model.mean, config.model.std, seed)
                for clip_THWC, seed in zip(clip_BTHWC, batch.host_seeds_B.tolist(), strict=True)
            ]
            clip_BTHWC = torch.stack(clips)
        target = label_B
        if augment.mixes:
            # Neighbours are mixed: the clips of one video come apart first.
            clip_BTHWC, label_B = (
                rearrange(x, "(videos r) ... -> (r videos) ...", r=config.data.clips_per_video)
                for x in (clip_BTHWC, label_B)
            )
            target = F.one_hot(label_B, config.classifier.num_classes).float()
            seed = sample_seed(config.seed, step, self.engine.rank, 1 + micro)
            clip_BTHWC, target = mix_batch(clip_BTHWC, target, augment, seed)
        logits_BK = self.engine(clip_BTHWC).float()
        values = {"loss": F.cross_entropy(logits_BK, target, label_smoothing=smoothing)}
        if not augment.mixes:
            values["accuracy"] = (logits_BK.argmax(dim=1) == label_B).float().mean()
        return values

    def after(self, done: int, *, ending: bool) -> None:
        if self.validation is None:
            return
        if self.is_measured(done, self.config.validation.interval):
            with self.journal.aside():
                self._keep_best(done, self._validate(self.validation))

    def _validate(self, videos: VideoList) -> dict[str, float]:
        """Scores of the model as it is over all validation videos, the same on every rank."""
        engine, device = self.engine, self.engine.device
        batch_size = self.config.validation.batch
        batches = share_batches(len(videos), batch_size, engine.rank, engine.world_size)
        loader = make_loader(ValidationClips(videos, self.config), batches, self.config.data)
        sums, failures = torch.zeros(4, dtype=torch.float64, device=device), []
        for batch in DevicePrefetcher(loader, device):
            failures += batch.failures
            logits_BK, label_B = engine.evaluate(batch.clip_BTHWC).float(), batch.label_B
            hits_BR = logits_BK.topk(min(5, logits_BK.shape[1])).indices == label_B[:, None]
            loss_B = F.cross_entropy(logits_BK, label_B, reduction="none")
            counts_B = (batch.index_B >= 0).to(device)
            scores = torch.stack([loss_B, hits_BR[:, 0], hits_BR.any(dim=1), counts_B]).double()
            sums += scores.where(counts_B, 0.0).sum(dim=1)
        loss, top1, top5, count = engine.sum(sums).tolist()
        for failure in itertools.chain(*engine.gather(failures)):
            self.journal.say(
                f"validation: {failure.path} does not count: {failure.decoder}: {failure.reason}"
            )
        divisor = count or math.nan  # none could be decoded
        return {
            "val_loss": loss / divisor,
            "val_top1": top1 / divisor,
            "val_top5": top5 / divisor,
            "val_videos": int(count),
        }

    def _keep_best(self, done: int, scores: dict[str, float]) -> None:
        self.journal.record(done, self.epoch(done), scores)
        best = self.memory.get("best", {"val_top1": -1.0, "val_loss": 0.0})
        if (scores["val_top1"], -scores["val_loss"]) > (best["val_top1"], -best["val_loss"]):
            self.memory["best"] = {"step": done, **scores}
            self.save_model("best")
