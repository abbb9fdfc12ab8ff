"""The fine-tuning stage: a pretrained encoder learns to name actions, validated while it trains."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange

from video_mae.config import FinetuneConfig
from video_mae.data.augment import mix_batch, strengthen_clip
from video_mae.data.dataset import (
    Batch,
    ClipDataset,
    ValidationClips,
    labelled_clips,
    share_batches,
)
from video_mae.data.loader import DevicePrefetcher, make_loader
from video_mae.data.sampling import sample_seed
from video_mae.data.sources import Sources
from video_mae.data.videos import VideoList, read_training_videos, read_validation_videos
from video_mae.model.lora import choose_trained
from video_mae.model.vit import VideoClassifier, encoder_macs
from video_mae.training.loop import Training
from video_mae.training.saving import publish
from video_mae.training.starting_weights import starting_weights


def start(config: FinetuneConfig) -> int | Callable[[], int]:
    """The stage as the command line starts it: a mistake is raised here, the training is what is
    returned.
    """
    return prepare(config).start()


def prepare(config: FinetuneConfig) -> "Finetuning":
    """Checks configuration, lists, labels, checkpoint and run folder without starting anything.

    Raises: ValueError or FileNotFoundError with one line that names the file or key and the remedy.
    """
    config = config.cut()
    videos, classifier = read_training_videos(config)
    config = replace(config, classifier=classifier)
    wants_validation = config.validation.source or config.validation.patience
    validation = read_validation_videos(config) if wants_validation else None
    config, weights = starting_weights(config)
    sources = Sources([("data", config.data, videos)])
    return Finetuning(config, sources, weights, validation)


def run(training: "Finetuning") -> int:
    """Trains from the newest checkpoint of the run folder to the last step; returns the exit
    status, as `Training.run` says.
    """
    return training.run()


def make_classifier(config: FinetuneConfig) -> VideoClassifier:
    """The network of a configuration, with new weights; what stays as it is, is frozen."""
    model = VideoClassifier(
        config.model,
        config.classifier,
        impl=config.engine.kernels,
        checkpointing=config.engine.activation_checkpointing,
    )
    choose_trained(model, config.freeze_blocks, config.lora)
    return model


class Finetuning(Training[FinetuneConfig]):
    """A fine-tuning run: augmented clips, soft targets, validation."""

    def make_model(self) -> tuple[VideoClassifier, float]:
        config, model = self.config, make_classifier(self.config)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.introduction.append(f"{trained / 1e6:.3g} million parameters are trained")
        # Frozen blocks have no backward pass; frozen matrices with an update have half of it.
        backward = (1 if config.lora.rank else 2) * (1 - config.freeze_blocks / config.model.depth)
        macs = encoder_macs(config.model, config.model.num_tokens)
        return model, macs * (1 + backward) / 3

    def make_dataset(self) -> ClipDataset:
        return labelled_clips(self.videos, self.config)

    def augments_in_workers(self) -> bool:
        augment = self.config.augment
        return augment.changes_pixels and augment.where == "worker"

    def introduce(self) -> str:
        classifier = self.config.classifier
        frames = "frames spread over each video"
        if classifier.sampling == "dense":
            frames = f"dense clips of stride {classifier.stride}"
        return (
            f"{classifier.num_classes} classes, {frames}, {len(self.validation or ()) or 'no'} "
            "validation videos"
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
            target = F.one_hot(label_B, config.classifier.num_classes or 0).float()
            seed = sample_seed(config.seed, step, self.engine.rank, 1 + micro)
            clip_BTHWC, target = mix_batch(clip_BTHWC, target, augment, seed)
        logits_BK = self.engine(clip_BTHWC).float()
        values = {"loss": F.cross_entropy(logits_BK, target, label_smoothing=smoothing)}
        if not augment.mixes:
            values["accuracy"] = (logits_BK.argmax(dim=1) == label_B).float().mean()
        return values

    def after(self, done: int) -> None:
        if self.validation is not None and self.is_measured(done, self.config.validation.interval):
            with self.journal.aside():
                scores = self._validate(self.validation)
                if self.average:
                    with self.average.in_place():
                        averages = self._validate(self.validation)
                    for name in ("val_loss", "val_top1", "val_top5"):
                        scores[name.replace("val_", "val_ema_")] = averages[name]
                self._keep_best(done, scores)

    def reason_to_end(self, done: int) -> str:
        """Also because validation.patience has run out."""
        reason, config = super().reason_to_end(done), self.config.validation
        best = self.memory.get("best", {"step": 0})["step"]
        waited = self.num_measures(done, config.interval) - self.num_measures(best, config.interval)
        if config.patience and not reason and waited >= config.patience:
            reason = f"stopped early at step {done}: best was step {best}"
        return reason

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
        is_best = (scores["val_top1"], -scores["val_loss"]) > (best["val_top1"], -best["val_loss"])
        self._learn_of_steps(of_all=True)  # weights that only lead to skipped steps are no best
        if (
            is_best
            and not self.skipped_in_a_row
            and publish(self, {"best": self.engine.full_state()})
        ):
            self.memory["best"] = {"step": done, **scores}
