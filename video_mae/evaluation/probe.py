"""The probe stage: what an encoder knows without being trained any further, told by heads of three
kinds on its features.

Every video is encoded once, all heads of the grid are trained in one pass over the features, the
best is chosen on the validation list. B examples, N tokens, D features, G settings of a kind, M
videos, V views of a video, X = M V views, K classes.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from video_mae.config import DataConfig
from video_mae.config.evaluation import ProbeConfig, ProbeKind
from video_mae.config.schema import flatten, require
from video_mae.convert.model_folder import find_model_folder, load_pretrained
from video_mae.data.dataset import ClipDataset, Failure
from video_mae.data.loader import make_loader
from video_mae.data.sampling import StepSampler
from video_mae.data.videos import read_labeled
from video_mae.data.views import ViewDataset, Views, make_view_loader
from video_mae.data.workers import plan_workers
from video_mae.decoding import Choose, Reading
from video_mae.decoding.choices import uniform_indices
from video_mae.evaluation.features import FrozenEncoder
from video_mae.evaluation.heads import (
    AttentiveHead,
    HeadGrid,
    LinearHead,
    Setting,
)
from video_mae.evaluation.predict import merge_views
from video_mae.evaluation.ranks import Ranks, check_start
from video_mae.evaluation.scores import Scores
from video_mae.files import LIST_DIGEST, check_results, choose_folder, write_metrics, write_text
from video_mae.model.vit import VideoClassifier, VideoMAE
from video_mae.training.feature_quality import neighbour_scores

DONE, NO_FIGURES = 0, 3
CHOICE = (
    "the settings of each probe were chosen on the validation list, so its figures flatter; those "
    "of the test list do not"
)
# other values of these give the same results
FREE_KEYS = ("output", "cache", "num_workers", "data.decoder_threads", "data.list_format")
Examples = Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]
"""Batches for the heads: the features that each kind reads, and labels [B]."""


def start(model: str, config: ProbeConfig) -> Callable[[], int]:
    """The stage as the command line starts it: a mistake is raised here, the work is what is
    returned.
    """
    return Probing(model, config).run


class FeatureSet(NamedTuple):
    """The features of the views of a list, those of a video behind one another: float32 [X, D] in
    memory; tokens float16 [X, N, D], in memory or in a mapped file.

    seen_X: whether the video could be decoded; where not, its features are 0.
    """

    pooled_XD: torch.Tensor
    tokens_XND: torch.Tensor | None
    label_X: torch.Tensor
    seen_X: torch.Tensor
    failures: Sequence[Failure]


class Probing:
    """A checked probe, which `run` does."""

    def __init__(self, model: str, config: ProbeConfig) -> None:
        """Checks model, lists, classes and output before anything is decoded. Raises: ValueError
        or FileNotFoundError with one line.
        """
        if check_start(config.precision).size > 1:
            raise ValueError("probe: runs in one process; start it without the launcher")
        self.config, data = config, config.data
        model_folder = find_model_folder(model)
        self.model = load_pretrained(model_folder)
        if config.weights == "random":
            torch.manual_seed(config.seed)
            if isinstance(self.model, VideoMAE):
                self.model = VideoMAE(self.model.config)
            else:
                self.model = VideoClassifier(self.model.config, self.model.classifier_config)
        c = self.model.config
        self.num_heads = config.num_heads or c.num_heads
        require(
            c.embed_dim % self.num_heads == 0,
            "num_heads",
            self.num_heads,
            f"does not divide the encoder's width {c.embed_dim}",
        )
        train = read_labeled("train", config.train, data.root, list_format=data.list_format)
        self.num_classes = train.num_classes
        self.lists = {"train": train}
        for name, source in (("validation", config.validation), ("test", config.test)):
            if source:
                self.lists[name] = read_labeled(
                    name,
                    source,
                    data.root,
                    train.num_classes,
                    train.class_names,
                    data.list_format,
                )
        self.workers = plan_workers(config.num_workers, data.decoder_threads)
        self.views = Views(
            num_frames=c.num_frames,
            height=c.height,
            width=c.width,
            sampling=config.sampling,
            stride=data.stride,
            num_clips=config.num_clips,
            num_crops=config.num_crops,
            reading=Reading.of(data, c.in_channels, threads=self.workers.threads),
        )
        self.num_views = config.num_clips * config.num_crops
        self.settings = {
            "model": str(model_folder.absolute()),
            **{key: value for key, value in flatten(config).items() if key not in FREE_KEYS},
            LIST_DIGEST: {name: videos.digest() for name, videos in self.lists.items()},
        }
        name = "probe" if config.weights == "pretrained" else "probe_random"
        self.folder = choose_folder(config.output, model, name)
        check_results(self.folder, self.settings)

    def run(self) -> int:
        """Encodes, trains, chooses and writes the results. Returns 0; 3 where there are no figures,
        and says why.
        """
        config, folder, ranks = self.config, self.folder, Ranks()
        for videos in self.lists.values():
            ranks.say(*videos.notes)
        ranks.say("; ".join(filter(None, (self.workers.describe(), self.workers.told))))
        encoder = FrozenEncoder(self.model, ranks.device, config.precision)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".features-", dir=folder) as scratch:
            features = {}
            for name, videos in self.lists.items():
                features[name] = self.encode(name, encoder, Path(scratch))
                if features[name].seen_X.sum() < 2 * self.num_views:
                    ranks.say(
                        f"no figures: fewer than 2 of the {len(videos)} videos of {name} could be "
                        "decoded"
                    )
                    return NO_FIGURES
            grids = self._train(encoder, features["train"])
            probes = {kind: self._probe(kind, grids, features) for kind in config.kinds}
        table = self._table(probes)
        write_text(folder / "table.txt", table)
        metrics = {
            "videos": {name: len(videos) for name, videos in self.lists.items()},
            "classes": self.num_classes,
            "note": CHOICE,
            "probes": probes,
            "bad": {
                name: [{"path": bad.path, "reason": bad.reason} for bad in of_list.failures]
                for name, of_list in features.items()
            },
        }
        write_metrics(folder, self.settings, metrics)
        ranks.say(f"{table}results {folder}")
        return DONE

    def encode(self, name: str, encoder: FrozenEncoder, scratch: Path) -> FeatureSet:
        """The features of all views of a list, each video read once; tokens only where an attentive
        probe reads them there. scratch: a folder for them; it may be deleted while they are in use.
        """
        config, c, videos = self.config, encoder.config, self.lists[name]
        num = len(videos) * self.num_views
        pooled_XD, tokens_XND = torch.zeros(num, c.embed_dim), None
        if "attentive" in config.kinds and not (name == "train" and config.augment):
            size = (num, c.num_tokens, c.embed_dim)
            tokens_XND = torch.from_numpy(
                np.memmap(scratch / name, np.float16, "w+", shape=size)
                if config.cache == "disk"
                else np.zeros(size, np.float16)
            )
        seen_X, failures = torch.zeros(num, dtype=torch.bool), []
        dataset, order = ViewDataset(videos.paths, self.views), range(len(videos))
        loader = make_view_loader(dataset, order, config.encode_batch, self.workers.num)
        with tqdm(total=len(videos), unit="video", desc=name, disable=None) as progress:
            for batch in loader:
                progress.update(len(batch))
                failures += [video.failure for video in batch if video.failure]
                viewed = {video.index: video.views for video in batch if video.views}
                if viewed:
                    clips = [views.to(encoder.device).clips() for views in viewed.values()]
                    features = encoder(torch.cat(clips))
                    first_B1 = torch.tensor(list(viewed))[:, None] * self.num_views
                    places_B = (first_B1 + torch.arange(self.num_views)).flatten()
                    seen_X[places_B] = True
                    pooled_XD[places_B] = features.pooled_BD.cpu()
                    if tokens_XND is not None:
                        tokens_XND[places_B] = features.tokens_BND.half().cpu()
        label_X = torch.tensor(videos.label_M).repeat_interleave(self.num_views)
        return FeatureSet(pooled_XD, tokens_XND, label_X, seen_X, failures)

    def _train(self, encoder: FrozenEncoder, train: FeatureSet) -> dict[ProbeKind, HeadGrid]:
        """The heads that are asked for: those of all kinds and settings are trained in one pass
        over the same batches.
        """
        config, width = self.config, encoder.config.embed_dim
        settings = [Setting(lr, decay) for lr, decay in product(config.lrs, config.weight_decays)]
        makers: dict[ProbeKind, Callable[[], LinearHead | AttentiveHead]] = {
            "linear": partial(LinearHead, width, self.num_classes),
            "attentive": partial(AttentiveHead, width, self.num_classes, self.num_heads),
        }
        grids: dict[ProbeKind, HeadGrid] = {}
        for kind, make in makers.items():
            if kind in config.kinds:
                torch.manual_seed(config.seed)
                grids[kind] = HeadGrid(make, width, settings).to(encoder.device)
        if not grids:
            return grids
        num = len(self.lists["train"]) if config.augment else int(train.seen_X.sum())
        batch = min(config.batch_size, num)
        steps = math.ceil(config.epochs * num / batch)
        sampler = StepSampler(num, batch, 1, 0, 1, config.seed, 0, steps)
        examples = self._drawn(encoder, sampler) if config.augment else _cached(train, sampler)
        for step, (features, label_B) in enumerate(examples):
            for kind, grid in grids.items():
                x, label_B = features[kind].to(encoder.device), label_B.to(encoder.device)
                grid.step(x, label_B, step / steps)
        return grids

    def _drawn(self, encoder: FrozenEncoder, sampler: StepSampler) -> Examples:
        """Batches of clips that are drawn and encoded anew each time; a broken video is replaced by
        another, as in pretraining.
        """
        config, c = self.config, encoder.config
        data = DataConfig(
            **asdict(config.data),
            crop="random_resized",
            crop_scales=(0.3, 1.0),
            flip=config.flip,
            num_workers=config.num_workers,
        )
        make = ClipDataset if config.sampling == "dense" else _UniformClips
        clips = make(
            self.lists["train"],
            data,
            c.num_frames,
            c.height,
            c.width,
            config.seed,
            c.in_channels,
        )
        for batch in make_loader(clips, sampler, data):
            features = encoder(batch.clip_BTHWC)
            read = {"linear": features.pooled_BD, "attentive": features.tokens_BND}
            yield read, batch.label_B

    def _probe(
        self,
        kind: ProbeKind,
        grids: Mapping[ProbeKind, HeadGrid],
        features: Mapping[str, FeatureSet],
    ) -> dict[str, Any]:
        """What metrics.json says of a kind."""
        settings: list[dict[str, float]] = [{"k": k} for k in self.config.ks]
        if kind != "knn":
            settings = [setting._asdict() for setting in grids[kind].settings]
        scores = {}
        for name in features.keys() - {"train"}:
            of_list = features[name]
            if kind == "knn":
                score_GMK = self._votes(features["train"], of_list.pooled_XD)
            else:
                read_X = of_list.pooled_XD if kind == "linear" else of_list.tokens_XND
                assert read_X is not None
                score_GMK = self._head_scores(grids[kind], read_X)
            score_GMK[:, ~of_list.seen_X[:: self.num_views]] = torch.nan
            label_M = of_list.label_X[:: self.num_views].numpy()
            scores[name] = [Scores(score_MK, label_M) for score_MK in score_GMK.numpy()]
        return choose_setting(settings, scores)

    def _votes(self, train: FeatureSet, query_XD: torch.Tensor) -> torch.Tensor:
        """score_GMK of the neighbours, those of a video's views averaged."""
        score_GXK = neighbour_scores(
            query_XD,
            train.pooled_XD[train.seen_X],
            train.label_X[train.seen_X],
            self.num_classes,
            self.config.ks,
            self.config.temperature,
        )
        return score_GXK.unflatten(1, (-1, self.num_views)).mean(dim=2).double()

    def _head_scores(self, grid: HeadGrid, features_X: torch.Tensor) -> torch.Tensor:
        """score_GMK of all heads, the softmaxes of a video's views averaged."""
        device, scores = next(grid.parameters()).device, []
        num_videos = max(self.config.batch_size // self.num_views, 1)
        for part in features_X.split(num_videos * self.num_views):
            logits = grid.logits(part.float().to(device))
            scores.append(merge_views(logits.unflatten(1, (-1, self.num_views))))
        return torch.cat(scores, dim=1)

    def _table(self, probes: Mapping[str, dict[str, Any]]) -> str:
        """What is printed, and kept as table.txt."""
        counts = ", ".join(f"{len(videos)} {name}" for name, videos in self.lists.items())
        lines = [
            f"{self.config.weights} weights, {self.num_classes} classes; videos: {counts}",
            f"{'probe':10} {'validation':>10} {'test':>10}  settings chosen",
        ]
        for kind, found in probes.items():
            test = f"{found['test']['top1']:.2%}" if found["test"] else "-"
            settings = ", ".join(f"{name} {value:g}" for name, value in found["chosen"].items())
            lines.append(f"{kind:10} {found['validation']['top1']:>10.2%} {test:>10}  {settings}")
        return "\n".join([*lines, f"top-1; {CHOICE}"]) + "\n"


class _UniformClips(ClipDataset):
    """As for pretraining, with a frame of each of as many equal parts of a video."""

    def _choice(self, rng: np.random.Generator, stride: int) -> Choose:
        return partial(uniform_indices, num_frames=self.num_frames, rng=rng)


def _cached(train: FeatureSet, sampler: StepSampler) -> Examples:
    """Batches of views that were encoded before; each view is an example."""
    seen_E = train.seen_X.nonzero().flatten()
    for keys in sampler:
        places_B = seen_E[[index for _, index in keys]]
        features = {"linear": train.pooled_XD[places_B]}
        if train.tokens_XND is not None:
            features["attentive"] = train.tokens_XND[places_B].float()
        yield features, train.label_X[places_B]


def choose_setting(
    settings: Sequence[dict[str, float]], scores: Mapping[str, Sequence[Scores]]
) -> dict[str, Any]:
    """The setting with the best top-1 on the validation list, of equal ones the most certain.

    scores: of each list, those that each setting gives.
    """
    validation = [of_setting.metrics() for of_setting in scores["validation"]]
    place = max(
        range(len(settings)),
        key=lambda g: (validation[g]["top1"], scores["validation"][g].log_score()),
    )
    return {
        "chosen": settings[place],
        "validation": validation[place],
        "test": scores["test"][place].metrics() if "test" in scores else None,
        "grid": [
            {**setting, "validation_top1": metrics["top1"]}
            for setting, metrics in zip(settings, validation, strict=True)
        ],
    }
