"""The probe stage: what an encoder knows without being trained any further, told by heads of three
kinds on its features.

Every video is encoded once, all heads of the grid are trained in one pass over the features, the
best is chosen on the validation list. B examples, N tokens, D features, G settings of a kind, M
videos, V views of a video, K classes.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from video_mae.config import ClassifierConfig, DataConfig
from video_mae.config.evaluation import ProbeConfig, ProbeKind
from video_mae.config.schema import flatten, require
from video_mae.convert.model_folder import find_model_folder, load_pretrained
from video_mae.data.dataset import ClipDataset, Failure
from video_mae.data.loader import make_loader
from video_mae.data.sampling import StepSampler
from video_mae.data.videos import VideoList, read_labeled
from video_mae.data.views import load_views
from video_mae.data.workers import plan_workers
from video_mae.evaluation.features import FrozenEncoder, clips_of
from video_mae.evaluation.heads import AttentiveHead, HeadGrid, LinearHead, Setting
from video_mae.evaluation.predict import merge_views, views_of
from video_mae.evaluation.ranks import Ranks, check_start
from video_mae.evaluation.scores import Scores
from video_mae.files import UNFINISHED, write_text
from video_mae.model.vit import VideoClassifier, VideoMAE
from video_mae.processes import remove_unfinished
from video_mae.progress_bar import ProgressBar
from video_mae.results import LIST_DIGEST, check_results, choose_folder, write_metrics
from video_mae.training.feature_quality import neighbour_scores

DONE, NO_FIGURES = 0, 3
CHOICE = (
    "the settings of each probe were chosen on the validation list, so its figures flatter; those "
    "of the test list do not"
)
# other values of these give the same results
FREE_KEYS = ("output", "cache", "num_workers", "data.decoder_threads", "data.list_format")
Examples = Iterator[tuple[dict[str, Tensor], Tensor]]
"""Batches for the heads: the features that each kind reads, and labels [B]."""


def start(model: str, config: ProbeConfig) -> Callable[[], int]:
    """The stage as the command line starts it: a mistake is raised here, the work is what is
    returned.
    """
    return Probing(model, config).run


class FeatureSet(NamedTuple):
    """The features of the views of a list: float32 [M, V, D] in memory; tokens float16
    [M, V, N, D], in memory or in a mapped file.

    seen_M: whether the video could be decoded; where not, its features are 0.
    """

    pooled_MVD: Tensor
    tokens_MVND: Tensor | None
    label_M: Tensor
    seen_M: Tensor
    failures: Sequence[Failure]


class Probing:
    """A checked probe, which `run` does."""

    def __init__(self, model: str, config: ProbeConfig) -> None:
        """Checks model, lists, classes and output before anything is decoded. Raises: ValueError
        or FileNotFoundError with one line.
        """
        if check_start(config).size > 1:
            raise ValueError("probe: runs in one process; start it without the launcher")
        self.config, data = config, config.data
        model_folder = find_model_folder(model)
        self.model = load_pretrained(model_folder)
        trained = clips_of(self.model)
        sampling, stride = config.sampling or trained.sampling, data.stride or trained.stride
        frames = ClassifierConfig(sampling=sampling, stride=stride)
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
        self.lists: dict[str, VideoList] = {}
        known: dict[str, Any] = {"list_format": data.list_format}
        for name in ("train", "validation", "test"):
            source = getattr(config, name)
            if source:
                self.lists[name] = read_labeled(name, source, data.root, **known)
                train = self.lists["train"]
                known |= {"num_classes": train.num_classes, "names": train.class_names}
        self.num_classes: int = known["num_classes"]
        self.workers = plan_workers(config.num_workers, data.decoder_threads)
        self.views = views_of(
            c, frames, config.num_clips, config.num_crops, data, self.workers.threads
        )
        self.num_views = config.num_clips * config.num_crops
        self.settings = {
            "model": str(model_folder.absolute()),
            **{key: value for key, value in flatten(config).items() if key not in FREE_KEYS},
            "sampling": sampling,
            "data.stride": stride,
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
        ranks.say(self.workers.describe(), self.workers.told)
        encoder = FrozenEncoder(self.model, ranks.device, config.precision)
        folder.mkdir(parents=True, exist_ok=True)
        ranks.say(*remove_unfinished(folder))
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder) as scratch:
            features = {}
            for name, videos in self.lists.items():
                features[name] = self.encode(name, encoder, Path(scratch))
                if features[name].seen_M.sum() < 2:
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
        ranks.say(*table.splitlines(), f"results {folder}")
        return DONE

    def encode(self, name: str, encoder: FrozenEncoder, scratch: Path) -> FeatureSet:
        """The features of all views of a list, each video read once; tokens only where an attentive
        probe reads them there. scratch: a folder for them; it may be deleted while they are in use.
        """
        config, c, videos = self.config, encoder.config, self.lists[name]
        num = len(videos), self.num_views
        pooled_MVD, tokens_MVND = torch.zeros(*num, c.embed_dim), None
        if "attentive" in config.kinds and not (name == "train" and config.augment):
            size = (*num, c.num_tokens, c.embed_dim)
            tokens_MVND = torch.from_numpy(
                np.memmap(scratch / name, np.float16, "w+", shape=size)
                if config.cache == "disk"
                else np.zeros(size, np.float16)
            )
        seen_M, failures = torch.zeros(len(videos), dtype=torch.bool), []
        num_workers, together = self.workers.num, config.encode_batch
        found = iter(
            load_views(videos.paths, range(len(videos)), self.views, num_workers, 2 * together)
        )
        with ProgressBar(len(videos), desc=name) as progress:
            while batch := list(islice(found, together)):
                progress.update(len(batch))
                failures += [failure for _, _, failure in batch if failure]
                views_of_video = {video: views for video, views, _ in batch if views}
                if views_of_video:
                    clips = [views.clips(encoder.device) for views in views_of_video.values()]
                    features, places = encoder(torch.cat(clips)), list(views_of_video)
                    seen_M[places] = True
                    pooled_MVD[places] = features.pooled_BD.cpu().unflatten(0, (-1, num[1]))
                    if tokens_MVND is not None:
                        tokens_BND = features.tokens_BND.half().cpu()
                        tokens_MVND[places] = tokens_BND.unflatten(0, (-1, num[1]))
        label_M = torch.from_numpy(videos.label_M)
        return FeatureSet(pooled_MVD, tokens_MVND, label_M, seen_M, failures)

    def _train(self, encoder: FrozenEncoder, train: FeatureSet) -> dict[str, HeadGrid]:
        """The heads that are asked for: those of all kinds and settings are trained in one pass
        over the same batches.
        """
        config, width = self.config, encoder.config.embed_dim
        settings = [Setting(lr, decay) for lr, decay in product(config.lrs, config.weight_decays)]
        makers = (
            ("linear", partial(LinearHead, width, self.num_classes)),
            ("attentive", partial(AttentiveHead, width, self.num_classes, self.num_heads)),
        )
        grids = dict[str, HeadGrid]()
        for kind, make in makers:
            if kind in config.kinds:
                torch.manual_seed(config.seed)
                grids[kind] = HeadGrid(make, settings).to(encoder.device)
        if not grids:
            return grids
        num = len(self.lists["train"])
        if not config.augment:
            num = int(train.seen_M.sum()) * self.num_views
        batch = min(config.batch_size, num)
        steps = math.ceil(config.epochs * num / batch)
        sampler = StepSampler(num, batch, 1, 0, 1, config.seed, 0, steps)
        examples = self._drawn(encoder, sampler) if config.augment else _cached(train, sampler)
        with ProgressBar(steps, "step", desc="heads") as progress:
            for step, (features, label_B) in enumerate(examples):
                for kind, grid in grids.items():
                    x, label_B = features[kind].to(encoder.device), label_B.to(encoder.device)
                    grid.step(x, label_B, step / steps)
                progress.update()
        return grids

    def _drawn(self, encoder: FrozenEncoder, sampler: StepSampler) -> Examples:
        """Batches of clips that are drawn and encoded anew each time; a broken video is replaced by
        another, as in pretraining.
        """
        config, c = self.config, encoder.config
        data = DataConfig(
            **asdict(replace(config.data, stride=self.views.stride)),
            crop="random_resized",
            crop_scales=(0.3, 1.0),
            flip=config.flip,
            num_workers=config.num_workers,
        )
        frames = ClassifierConfig(sampling="uniform") if self.views.sampling == "uniform" else None
        size = c.num_frames, c.height, c.width
        clips = ClipDataset(self.lists["train"], data, *size, config.seed, c.in_channels, frames)
        for batch in make_loader(clips, sampler, data):
            features = encoder(batch.clip_BTHWC)
            read = {"linear": features.pooled_BD, "attentive": features.tokens_BND}
            yield read, batch.label_B

    def _probe(
        self,
        kind: ProbeKind,
        grids: Mapping[str, HeadGrid],
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
                score_GMK = self._votes(features["train"], of_list.pooled_MVD)
            else:
                read_MV = of_list.pooled_MVD if kind == "linear" else of_list.tokens_MVND
                assert read_MV is not None
                score_GMK = self._head_scores(grids[kind], read_MV)
            score_GMK[:, ~of_list.seen_M] = torch.nan
            label_M = of_list.label_M.numpy()
            scores[name] = [Scores(score_MK, label_M) for score_MK in score_GMK.numpy()]
        return choose_setting(settings, scores)

    def _votes(self, train: FeatureSet, query_MVD: Tensor) -> Tensor:
        """score_GMK of the neighbours, those of a video's views averaged."""
        score_GBK = neighbour_scores(
            query_MVD.flatten(0, 1),
            train.pooled_MVD[train.seen_M].flatten(0, 1),
            train.label_M[train.seen_M].repeat_interleave(self.num_views),
            self.num_classes,
            self.config.ks,
            self.config.temperature,
        )
        return score_GBK.unflatten(1, (-1, self.num_views)).mean(dim=2).double()

    def _head_scores(self, grid: HeadGrid, features_MV: Tensor) -> Tensor:
        """score_GMK of all heads, the softmaxes of a video's views averaged."""
        device, scores = next(grid.parameters()).device, []
        for part_MV in features_MV.split(max(self.config.batch_size // self.num_views, 1)):
            logits_GBK = grid.logits(part_MV.flatten(0, 1).float().to(device))
            scores.append(merge_views(logits_GBK.unflatten(1, (-1, self.num_views))))
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


def _cached(train: FeatureSet, sampler: StepSampler) -> Examples:
    """Batches of views that were encoded before; each view is an example."""
    seen_VE = train.seen_M.expand(train.pooled_MVD.shape[1], -1)
    example_E2 = seen_VE.T.nonzero()
    for keys in sampler:
        video_B, view_B = example_E2[[index for _, index in keys]].T
        features = {"linear": train.pooled_MVD[video_B, view_B]}
        if train.tokens_MVND is not None:
            features["attentive"] = train.tokens_MVND[video_B, view_B].float()
        yield features, train.label_M[video_B]


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
