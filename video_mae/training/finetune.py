"""The fine-tuning stage: a pretrained encoder learns to name actions, validated while it trains."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange

from video_mae.config import FinetuneConfig, ModelConfig
from video_mae.convert.model_folder import find_model_folder, load_pretrained
from video_mae.data.augment import mix_batch, strengthen_clip
from video_mae.data.dataset import Batch, LabelledClips, ValidationClips, share_batches
from video_mae.data.loader import DevicePrefetcher, make_loader
from video_mae.data.sampling import sample_seed
from video_mae.data.videos import VideoList, read_training_videos, read_validation_videos
from video_mae.model.inflation import resized
from video_mae.model.vit import VideoClassifier, encoder_macs
from video_mae.training.loop import Run, Stage, check_run, is_due, run_and_leave, train

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


@dataclass(frozen=True)
class Plan:
    """A checked fine-tuning run; the weights that it starts from, and one line that says which."""

    run: Run
    config: FinetuneConfig
    validation: VideoList | None
    weights: dict[str, torch.Tensor]
    weights_line: str


def start(config: FinetuneConfig) -> Callable[[], int]:
    """The stage as the command line starts it: a mistake is raised here, the training is what is
    returned.
    """
    return run_and_leave(partial(run, prepare(config)))


def prepare(config: FinetuneConfig) -> Plan:
    """Checks configuration, lists, labels, checkpoint and run folder without starting anything.

    Raises: ValueError or FileNotFoundError with one line that names the file or key and the remedy.
    """
    videos, classifier = read_training_videos(config)
    config = replace(config, classifier=classifier)
    validation = read_validation_videos(config) if config.validation.source else None
    config, weights, line = starting_weights(config)
    checked = check_run(
        config, lambda: videos, {"validation.source": validation} if validation else {}
    )
    return Plan(checked, replace(config, data=checked.config.data), validation, weights, line)


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
    c = config.model
    source = load_pretrained(folder)
    if source.config.grid != c.grid:
        source = resized(source, num_frames=c.num_frames, height=c.height, width=c.width)  # pyright: ignore[reportArgumentType]
    _check_architecture(folder, source.config, c)
    config = replace(config, model=replace(c, position_grid=source.config.position_grid))
    is_mean = config.classifier.pooling != "first"
    wanted, head = ["encoder."], "new head"
    if isinstance(source, VideoClassifier):
        ours, theirs = config.classifier, source.classifier_config
        is_named = bool(ours.class_names and theirs.class_names)
        is_same = ours.num_classes == theirs.num_classes and (
            not is_named or ours.class_names == theirs.class_names
        )
        wanted += ["fc_norm.", "head."] if is_same else ["fc_norm."]
        head = "its head" if is_same else f"new head (its {theirs.num_classes} classes are others)"
    weights = {
        name: tensor
        for name, tensor in source.state_dict().items()
        if name.startswith(tuple(wanted))
        and not (is_mean and name.startswith("encoder.norm."))
        and (is_mean or not name.startswith("fc_norm."))
    }
    return config, weights, f"encoder from {folder}, {head}"


def _check_architecture(folder: Path, theirs: ModelConfig, ours: ModelConfig) -> None:
    names = [
        f.name
        for f in fields(ModelConfig)
        if not f.name.startswith("decoder_") and f.name not in FREE_FIELDS
    ]
    differing = [name for name in names if getattr(theirs, name) != getattr(ours, name)]
    if differing:
        wanted = " ".join(
            f"model.{name}={list(value) if isinstance(value, tuple) else value}"
            for name in differing
            for value in [getattr(theirs, name)]
        )
        raise ValueError(
            f"checkpoint: {folder} has another architecture than model of this run; {wanted} would be the same"
        )


def run(plan: Plan) -> int:
    """Trains from the newest checkpoint of the run folder to the last step; returns the exit
    status, as `train` says.
    """
    config = plan.config
    torch.manual_seed(config.seed)
    model = VideoClassifier(
        config.model,
        config.classifier,
        impl=config.engine.kernels,
        checkpointing=config.engine.activation_checkpointing,
    )
    missing, unexpected = model.load_state_dict(plan.weights, strict=False)
    assert not unexpected
    assert not plan.weights or all(
        name.startswith(("fc_norm.", "head.", "encoder.norm.")) for name in missing
    )
    return train(
        plan.run,
        model,
        encoder_macs(config.model, config.model.num_tokens),
        partial(_Finetuning, plan),
    )


class _Finetuning(Stage):
    """Augmented clips, soft targets, validation."""

    def __init__(self, plan: Plan, *loop: Any) -> None:
        super().__init__(*loop)
        self.plan, self.config = plan, plan.config
        self.augments_in_workers = (
            plan.config.augment.changes_pixels and plan.config.augment.where == "worker"
        )

    def dataset(self) -> LabelledClips:
        return LabelledClips(self.run.videos, self.config)

    def introduce(self) -> str:
        classifier, validation = self.config.classifier, self.plan.validation
        frames = (
            f"dense clips of stride {classifier.stride}"
            if classifier.sampling == "dense"
            else "frames spread over each video"
        )
        return (
            f"{classifier.num_classes} classes, {frames}, {len(validation) if validation else 'no'} validation videos; "
            f"{self.plan.weights_line}"
        )

    def losses(self, batch: Batch, step: int, micro: int) -> Mapping[str, torch.Tensor]:
        augment, seeds = self.config.augment, batch.host_seeds_B.tolist()
        clip_BTHWC, label_B, model = batch.clip_BTHWC, batch.label_B, self.config.model
        if augment.where == "device":
            clip_BTHWC = torch.stack(
                [
                    strengthen_clip(clip_THWC, augment, model.mean, model.std, seed)
                    for clip_THWC, seed in zip(clip_BTHWC, seeds, strict=True)
                ]
            )
        if not augment.mixes:
            logits_BK = self.engine(clip_BTHWC).float()
            loss = F.cross_entropy(logits_BK, label_B, label_smoothing=augment.label_smoothing)
            return {"loss": loss, "accuracy": (logits_BK.argmax(dim=1) == label_B).float().mean()}
        # Neighbours are mixed: the clips of one video come apart first.
        clip_BTHWC, label_B = (
            rearrange(x, "(videos r) ... -> (r videos) ...", r=self.config.data.clips_per_video)
            for x in (clip_BTHWC, label_B)
        )
        target_BK = F.one_hot(label_B, self.config.classifier.num_classes).float()
        seed = sample_seed(self.config.seed, step, self.engine.rank, 1 + micro)
        clip_BTHWC, target_BK = mix_batch(clip_BTHWC, target_BK, augment, seed)
        return {
            "loss": F.cross_entropy(
                self.engine(clip_BTHWC).float(), target_BK, label_smoothing=augment.label_smoothing
            )
        }

    def after(self, done: int, *, ending: bool) -> None:
        if self.plan.validation is None:
            return
        interval, per_step, per_epoch = (
            self.config.validation.interval,
            self.videos_per_step,
            self.videos_per_epoch,
        )
        is_epoch_over = (
            interval == 0 and done * per_step // per_epoch > (done - 1) * per_step // per_epoch
        )
        if done == self.run.schedule.total_steps or is_epoch_over or is_due(done, interval):
            with self.journal.aside():
                self._keep_best(done, self._validate(self.plan.validation))

    def results(self) -> list[tuple[str, Path]]:
        return [("best", self.run.folder / "best")] if "best" in self.memory else []

    def _validate(self, videos: VideoList) -> dict[str, float]:
        """Scores of the model as it is over all validation videos, the same on every rank."""
        validation, device = self.config.validation, self.engine.device
        batches = share_batches(
            len(videos), validation.batch, self.engine.rank, self.engine.world_size
        )
        loader = make_loader(ValidationClips(videos, self.config), batches, self.config.data)
        sums, failures = torch.zeros(4, dtype=torch.float64, device=device), []
        for batch in DevicePrefetcher(loader, device):
            failures += batch.failures
            logits_BK = self.engine.evaluate(batch.clip_BTHWC).float()
            label_B, counts_B = batch.label_B, (batch.index_B >= 0).to(device)
            hits_BR = logits_BK.topk(min(5, logits_BK.shape[1])).indices == label_B[:, None]
            loss_B = F.cross_entropy(logits_BK, label_B, reduction="none")
            scores = torch.stack(
                [loss_B, hits_BR[:, 0], hits_BR.any(dim=1), torch.ones_like(loss_B)]
            ).double()
            sums += scores.where(counts_B, 0.0).sum(dim=1)
        loss, top1, top5, count = self.engine.sum(sums).tolist()
        for failure in [failure for part in self.engine.gather(failures) for failure in part]:
            self.journal.say(
                f"validation: {failure.path} does not count: {failure.decoder}: {failure.reason}"
            )
        divisor = count or float("nan")  # none could be decoded
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
