"""The probe stage: what an encoder knows without being trained any further, told by heads of three
kinds on its features.

Every video is encoded once, all heads of the grid are trained in one pass over the features, the
best is chosen on the validation list. B examples, N tokens, D features, G settings of a kind, M
videos, V views of a video, K classes.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from video_mae.config import DataConfig
from video_mae.config.frozen import Kind, ProbeConfig
from video_mae.config.schema import flatten, require
from video_mae.convert.model_folder import Model, find_model_folder, load_pretrained
from video_mae.data.dataset import ClipDataset
from video_mae.data.labels import LabeledVideos, read_labeled
from video_mae.data.loader import make_loader
from video_mae.data.sampling import StepSampler
from video_mae.data.views import Views
from video_mae.data.workers import Workers, plan_workers
from video_mae.decoding import Choose, Reading
from video_mae.decoding.choices import uniform_indices
from video_mae.evaluation.features import (
    FeatureSet,
    FrozenEncoder,
    check_precision,
    collect_features,
)
from video_mae.evaluation.heads import (
    AttentiveHead,
    HeadGrid,
    LinearHead,
    Setting,
    neighbour_scores,
)
from video_mae.evaluation.predict import merge_views
from video_mae.evaluation.ranks import Ranks
from video_mae.evaluation.scores import Scores
from video_mae.files import LIST_DIGEST, check_results, choose_folder, write_metrics, write_text
from video_mae.model.vit import VideoClassifier, VideoMAE
from video_mae.training.engine import world_from_environment

DONE, NO_FIGURES = 0, 3
CHOICE = "the settings of each probe were chosen on the validation list, so its figures flatter; those of the test list do not"
# other values of these give the same results
FREE_KEYS = ("output", "cache", "num_workers", "data.decoder_threads", "data.list_format")


@dataclass(frozen=True)
class Plan:
    """A checked probe."""

    config: ProbeConfig
    model: Model
    lists: dict[str, LabeledVideos]
    views: Views
    workers: Workers
    folder: Path
    settings: dict[str, Any]


class Probe(NamedTuple):
    """A kind of probe, trained with each of its settings, and the scores score_GMK that these give
    to the videos of a list.
    """

    settings: Sequence[dict[str, float]]
    score: Callable[[FeatureSet], torch.Tensor]


class Example(NamedTuple):
    """A batch for the heads: the features that each kind reads, and labels [B]."""

    features: dict[str, torch.Tensor]
    label_B: torch.Tensor


def start(model: str, config: ProbeConfig) -> Callable[[], int]:
    """The stage as the command line starts it: a mistake is raised here, the work is what is
    returned.
    """
    plan = prepare(model, config)
    return lambda: run(plan)


def prepare(model: str, config: ProbeConfig) -> Plan:
    """Checks model, lists, classes and output before anything is decoded. Raises: ValueError or
    FileNotFoundError with one line.
    """
    if world_from_environment()[1] > 1:
        raise ValueError("probe: runs in one process; start it without the launcher")
    check_precision(config.precision)
    model_folder = find_model_folder(model)
    encoder = load_pretrained(model_folder)
    if config.weights == "random":
        torch.manual_seed(config.seed)
        encoder = (
            VideoMAE(encoder.config)
            if isinstance(encoder, VideoMAE)
            else VideoClassifier(encoder.config, encoder.classifier_config)
        )
    c = encoder.config
    heads = config.num_heads or c.num_heads
    require(
        c.embed_dim % heads == 0,
        "num_heads",
        heads,
        f"does not divide the encoder's width {c.embed_dim}",
    )
    train = read_labeled(
        "train", config.train, config.data.root, list_format=config.data.list_format
    )
    lists = {"train": train}
    for name, source in (("validation", config.validation), ("test", config.test)):
        if source:
            lists[name] = read_labeled(
                name,
                source,
                config.data.root,
                train.num_classes,
                train.class_names,
                config.data.list_format,
            )
    workers = plan_workers(config.num_workers, config.data.decoder_threads)
    views = Views(
        num_frames=c.num_frames,
        height=c.height,
        width=c.width,
        sampling=config.sampling,
        stride=config.data.stride,
        num_clips=config.num_clips,
        num_crops=config.num_crops,
        reading=Reading.of(config.data, c.in_channels, threads=workers.threads),
    )
    knobs = {key: value for key, value in flatten(config).items() if key not in FREE_KEYS}
    settings = {
        "model": str(model_folder.absolute()),
        **knobs,
        LIST_DIGEST: {name: videos.videos.digest() for name, videos in lists.items()},
    }
    folder = choose_folder(
        config.output, model, "probe" if config.weights == "pretrained" else "probe_random"
    )
    check_results(folder, settings)
    return Plan(config, encoder, lists, views, workers, folder, settings)


def run(plan: Plan) -> int:
    """Encodes, trains, chooses and writes the results. Returns 0; 3 where there are no figures, and
    says why.
    """
    config, folder = plan.config, plan.folder
    for videos in plan.lists.values():
        for note in videos.videos.notes:
            print(note)
    print("; ".join(filter(None, (plan.workers.describe(), plan.workers.told))), flush=True)
    encoder = FrozenEncoder(plan.model, Ranks().device, config.precision)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".features-", dir=folder)
        if config.cache == "disk"
        else nullcontext() as cache
    ):
        features = {name: _features(plan, encoder, name, cache) for name in plan.lists}
        for name, of_list in features.items():
            if of_list.seen_M.sum() < 2:
                print(
                    f"no figures: fewer than 2 of the {len(plan.lists[name])} videos of {name} could be decoded",
                    flush=True,
                )
                return NO_FIGURES
        probes = _train(plan, encoder, features["train"])
        chosen: dict[Kind, dict[str, Any]] = {
            kind: _choose(probe, features) for kind, probe in probes.items()
        }
    table = _table(plan, chosen)
    write_text(folder / "table.txt", table)
    write_metrics(
        folder,
        plan.settings,
        {
            "videos": {name: len(videos) for name, videos in plan.lists.items()},
            "classes": plan.lists["train"].num_classes,
            "note": CHOICE,
            "probes": chosen,
            "bad": {
                name: [{"path": bad.path, "reason": bad.reason} for bad in of_list.failures]
                for name, of_list in features.items()
            },
        },
    )
    print(f"{table}results {folder}", flush=True)
    return DONE


def _features(plan: Plan, encoder: FrozenEncoder, name: str, cache: str | None) -> FeatureSet:
    """The features of a list: tokens only where an attentive probe reads them there."""
    config = plan.config
    with_tokens = "attentive" in config.kinds and not (name == "train" and config.augment)
    return collect_features(
        encoder,
        plan.lists[name],
        plan.views,
        with_tokens=with_tokens,
        file=Path(cache) / name if cache else None,
        batch_size=config.encode_batch,
        num_workers=plan.workers.num,
        what=name,
    )


def _train(plan: Plan, encoder: FrozenEncoder, train: FeatureSet) -> dict[Kind, Probe]:
    """The probes that are asked for: heads of all kinds and settings are trained in one pass over
    the same batches.
    """
    config, width, num_classes = (
        plan.config,
        encoder.config.embed_dim,
        plan.lists["train"].num_classes,
    )
    settings = [Setting(lr, decay) for lr, decay in product(config.lrs, config.weight_decays)]
    makers: dict[Kind, Callable[[], LinearHead | AttentiveHead]] = {
        "linear": partial(LinearHead, width, num_classes),
        "attentive": partial(
            AttentiveHead, width, num_classes, config.num_heads or encoder.config.num_heads
        ),
    }
    grids: dict[Kind, HeadGrid] = {}
    for kind, make in makers.items():
        if kind in config.kinds:
            torch.manual_seed(config.seed)
            grids[kind] = HeadGrid(make, width, settings).to(encoder.device)
    if grids:
        num = (
            len(plan.lists["train"])
            if config.augment
            else int(train.seen_M.sum()) * train.pooled_MVD.shape[1]
        )
        batch = min(config.batch_size, num)
        steps = math.ceil(config.epochs * num / batch)
        sampler = StepSampler(num, batch, 1, 0, 1, config.seed, 0, steps)
        for step, example in enumerate(
            _drawn(plan, encoder, sampler) if config.augment else _cached(train, sampler)
        ):
            for kind, grid in grids.items():
                grid.step(
                    example.features[kind].to(encoder.device),
                    example.label_B.to(encoder.device),
                    step / steps,
                )
    probes: dict[Kind, Probe] = {
        kind: Probe(
            [setting._asdict() for setting in settings],
            partial(_head_scores, grid, kind, config.batch_size),
        )
        for kind, grid in grids.items()
    }
    if "knn" in config.kinds:
        probes["knn"] = Probe(
            [{"k": k} for k in config.ks],
            partial(_knn_scores, train, num_classes, config.ks, config.temperature),
        )
    return probes


def _cached(train: FeatureSet, sampler: StepSampler) -> Iterator[Example]:
    """Batches of views that were encoded before; each view is an example."""
    video_B, view_B = torch.where(train.seen_M[:, None].expand(-1, train.pooled_MVD.shape[1]))
    for keys in sampler:
        places = torch.tensor([index for _, index in keys])
        video, view = video_B[places], view_B[places]
        features = {"linear": train.pooled_MVD[video, view]}
        if train.tokens_MVND is not None:
            features["attentive"] = train.tokens_MVND[video, view].float()
        yield Example(features, train.label_M[video])


class _DrawnClips(ClipDataset):
    """As for pretraining, with the frames of a clip chosen as the probe wants them."""

    sampling: Literal["dense", "uniform"] = "dense"

    def _choice(self, rng: np.random.Generator, stride: int) -> Choose:
        return (
            super()._choice(rng, stride)
            if self.sampling == "dense"
            else partial(uniform_indices, num_frames=self.num_frames, rng=rng)
        )


def _drawn(plan: Plan, encoder: FrozenEncoder, sampler: StepSampler) -> Iterator[Example]:
    """Batches of clips that are drawn and encoded anew each time; a broken video is replaced by
    another, as in pretraining.
    """
    config, c = plan.config, encoder.config
    data = DataConfig(
        **asdict(config.data),
        crop="random_resized",
        crop_scales=config.crop_areas,
        flip=config.flip,
        num_workers=config.num_workers,
    )
    clips = _DrawnClips(
        plan.lists["train"].videos,
        data,
        c.num_frames,
        c.height,
        c.width,
        config.seed,
        c.in_channels,
    )
    clips.sampling = config.sampling
    for batch in make_loader(clips, sampler, data):
        features = encoder(batch.clip_BTHWC)
        yield Example(
            {"linear": features.pooled_BD, "attentive": features.tokens_BND}, batch.label_B
        )


def _head_scores(grid: HeadGrid, kind: Kind, batch_size: int, features: FeatureSet) -> torch.Tensor:
    """score_GMK of all heads, the softmaxes of a video's views averaged."""
    source, device = (
        features.pooled_MVD if kind == "linear" else features.tokens_MVND,
        next(grid.parameters()).device,
    )
    assert source is not None
    scores = [
        merge_views(grid.logits(part.flatten(0, 1).float().to(device)).unflatten(1, part.shape[:2]))
        for part in source.split(max(batch_size // source.shape[1], 1))
    ]
    return torch.cat(scores, dim=1)


def _knn_scores(
    train: FeatureSet, num_classes: int, ks: Sequence[int], temperature: float, features: FeatureSet
) -> torch.Tensor:
    """score_GMK of the neighbours, those of a video's views averaged."""
    label_MV = train.label_M[:, None].expand(train.pooled_MVD.shape[:2])
    scores = neighbour_scores(
        features.pooled_MVD.flatten(0, 1),
        train.pooled_MVD[train.seen_M].flatten(0, 1),
        label_MV[train.seen_M].flatten(),
        num_classes,
        ks,
        temperature,
    )
    return scores.unflatten(1, features.pooled_MVD.shape[:2]).mean(dim=2).double()


def _choose(probe: Probe, features: dict[str, FeatureSet]) -> dict[str, Any]:
    """What metrics.json says of a kind: the setting with the best top-1 on the validation list, of
    equal ones the most certain.
    """
    validation = _all_scores(probe, features["validation"])
    place = max(
        range(len(validation)),
        key=lambda g: (validation[g].metrics()["top1"], validation[g].log_score()),
    )
    chosen = {
        "chosen": dict(probe.settings[place]),
        "validation": validation[place].metrics(),
        "test": None,
    }
    if "test" in features:
        chosen["test"] = _all_scores(probe, features["test"])[place].metrics()
    return {
        **chosen,
        "grid": [
            {**setting, "validation_top1": scores.metrics()["top1"]}
            for setting, scores in zip(probe.settings, validation, strict=True)
        ],
    }


def _all_scores(probe: Probe, features: FeatureSet) -> list[Scores]:
    score_GMK = probe.score(features)
    score_GMK[:, ~features.seen_M] = torch.nan
    return [Scores(score_MK, features.label_M.numpy()) for score_MK in score_GMK.numpy()]


def _table(plan: Plan, chosen: dict[Kind, dict[str, Any]]) -> str:
    """What is printed, and kept as table.txt."""
    counts = ", ".join(f"{len(videos)} {name}" for name, videos in plan.lists.items())
    lines = [
        f"{plan.config.weights} weights, {plan.lists['train'].num_classes} classes; videos: {counts}",
        f"{'probe':10} {'validation':>10} {'test':>10}  settings chosen",
    ]
    for kind, found in chosen.items():
        test = f"{found['test']['top1']:.2%}" if found["test"] else "-"
        settings = ", ".join(f"{name} {value:g}" for name, value in found["chosen"].items())
        lines.append(f"{kind:10} {found['validation']['top1']:>10.2%} {test:>10}  {settings}")
    return "\n".join([*lines, f"top-1; {CHOICE}"]) + "\n"
