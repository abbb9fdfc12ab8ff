"""The evaluation stage: every video of a list once, all its views, one row a video, and the
accuracies that a paper would print.

A forward pass holds the views of one video and nothing else, and the figures are made on one rank
from the scores of all videos in the order of the list: neither the number of ranks nor the batch
size can change them. M videos, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from video_mae.config.evaluation import EvaluateConfig
from video_mae.config.world import World
from video_mae.convert.model_folder import choose_frames, find_model_folder, load_pretrained
from video_mae.data.labels import LabeledVideos, read_labeled
from video_mae.data.views import ViewDataset, Views, make_view_loader
from video_mae.data.workers import Workers, plan_workers
from video_mae.evaluation.features import check_precision
from video_mae.evaluation.predict import classify_views, names_of, views_of
from video_mae.evaluation.ranks import Ranks
from video_mae.evaluation.scores import CONFIDENCE, Scores, draw_confusion, write_class_table
from video_mae.files import (
    LIST_DIGEST,
    check_results,
    choose_folder,
    draw_or_tell,
    json_text,
    write_metrics,
    write_text,
)
from video_mae.kernels.dispatch import describe
from video_mae.model.vit import VideoClassifier

DONE, NO_FIGURES = 0, 3
TOLD_CLASSES = 5


@dataclass(frozen=True)
class Plan:
    """A checked evaluation."""

    config: EvaluateConfig
    model: VideoClassifier
    videos: LabeledVideos
    views: Views
    workers: Workers
    names: tuple[str, ...]
    folder: Path
    settings: dict[str, Any]
    told: list[str]


class Outcome(NamedTuple):
    """What a rank found for a video, by its place in the list: its scores [K], or why it could not
    be decoded.
    """

    video: int
    scores_K: NDArray[np.float64] | None
    reason: str


def start(model: str, source: str, config: EvaluateConfig) -> Callable[[], int]:
    """The stage as the command line starts it: a mistake is raised here, the evaluation is what is
    returned.
    """
    plan = prepare(model, source, config)
    return lambda: run(plan)


def prepare(model: str, source: str, config: EvaluateConfig) -> Plan:
    """Checks model, list, classes and output before anything is decoded.

    Raises: ValueError or FileNotFoundError with one line that names the file or key and the remedy.
    """
    World.from_environment()
    check_precision(config.precision)
    model_folder = find_model_folder(model)
    classifier = load_pretrained(model_folder, VideoClassifier, impl=config.kernels)
    told = choose_frames(classifier, config.sampling, config.stride)
    head = classifier.classifier_config
    if config.antialias is not None:
        told.append(f"antialias = {config.antialias}: given, the model says {head.antialias}")
        head = classifier.classifier_config = replace(head, antialias=config.antialias)
    videos = read_labeled(
        "LIST",
        source,
        config.data.root,
        head.num_classes,
        head.class_names,
        config.data.list_format,
    )
    num_clips = config.num_clips or (5 if head.sampling == "dense" else 2)
    workers = plan_workers(config.num_workers, config.data.decoder_threads)
    views = views_of(classifier, num_clips, config.num_crops, config.data, workers.threads)
    settings = {
        "model": str(model_folder.absolute()),
        "list": source if "://" in source else str(Path(source).absolute()),
        LIST_DIGEST: videos.videos.digest(),
        "sampling": views.sampling,
        "stride": views.stride,
        "num_clips": num_clips,
        "num_crops": config.num_crops,
        "antialias": views.antialias,
        "precision": config.precision,
        "bad_videos_are": "left out" if config.skip_bad else "wrong",
    }
    folder = choose_folder(config.output, model)
    check_results(folder, settings)
    names = names_of(head) if head.class_names or not videos.class_names else videos.class_names
    return Plan(config, classifier, videos, views, workers, names, folder, settings, told)


def run(plan: Plan) -> int:
    """Evaluates on this rank's share; rank 0 writes the results. Returns 0; 3 where there are no
    figures, and says why.
    """
    ranks = Ranks()
    try:
        outcomes = ranks.gather(_outcomes(plan, ranks))
        return _conclude(plan, outcomes) if ranks.is_main else DONE
    finally:
        ranks.leave()


def _outcomes(plan: Plan, ranks: Ranks) -> list[Outcome]:
    config, views = plan.config, plan.views
    model, mine = plan.model.to(ranks.device), ranks.share(len(plan.videos))
    if ranks.is_main:
        for line in (*plan.videos.videos.notes, *plan.told):
            print(line, flush=True)
        print(
            f"{len(plan.videos)} videos, {views.num_clips} x {views.num_crops} views each ({views.sampling}), {ranks.size} ranks; "
            f"{describe(config.kernels, ranks.device)}; device {ranks.device}, {config.precision}; {plan.workers.describe()}",
            flush=True,
        )
        if plan.workers.told:
            print(plan.workers.told, flush=True)
    outcomes: list[Outcome] = []
    loader = make_view_loader(
        ViewDataset(plan.videos.paths, views), mine, config.batch_size, plan.workers.num
    )
    with tqdm(total=len(mine), unit="video", disable=None if ranks.is_main else True) as progress:
        for batch in loader:
            for video in batch:
                if video.views is None:
                    assert video.failure is not None
                    outcomes.append(Outcome(video.index, None, video.failure.reason))
                else:
                    outcomes.append(
                        Outcome(
                            video.index,
                            classify_views(model, video.views, config.precision).numpy(),
                            "",
                        )
                    )
                progress.update()
    return outcomes


def _conclude(plan: Plan, outcomes: list[Outcome]) -> int:
    outcomes = sorted(outcomes, key=lambda outcome: outcome.video)
    assert [outcome.video for outcome in outcomes] == list(range(len(plan.videos))), (
        "a video is missing, or came twice"
    )
    paths, num_classes = plan.videos.paths, plan.model.classifier_config.num_classes
    for outcome in outcomes:
        if outcome.scores_K is not None and not np.isfinite(outcome.scores_K).all():
            print(
                f"no figures: the scores of {paths[outcome.video]} are not finite; try precision=fp32, or another model",
                flush=True,
            )
            return NO_FIGURES
    bad = [outcome for outcome in outcomes if outcome.scores_K is None]
    if len(bad) == len(outcomes):
        print(
            f"no figures: none of the {len(bad)} videos could be decoded; {paths[0]}: {bad[0].reason}",
            flush=True,
        )
        return NO_FIGURES
    nothing_K = np.full(num_classes, np.nan)
    scores = Scores(
        np.stack(
            [nothing_K if outcome.scores_K is None else outcome.scores_K for outcome in outcomes]
        ),
        np.array(plan.videos.labels, dtype=np.int64),
    )
    counted = scores.has_scores() if plan.config.skip_bad else np.ones(len(outcomes), dtype=bool)
    figures = Scores(scores.score_MK[counted], scores.label_M[counted])
    metrics = {
        **figures.metrics(),
        "interval": f"Wilson, {CONFIDENCE:.0%}",
        "views": plan.views.num_clips * plan.views.num_crops,
        "bad_videos": len(bad),
        "bad": [{"path": str(paths[outcome.video]), "reason": outcome.reason} for outcome in bad],
    }
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_text(
        plan.folder / "predictions.jsonl",
        "".join(_row(plan, scores, outcome) for outcome in outcomes),
    )
    write_class_table(plan.folder / "classes.csv", figures, plan.names)
    write_metrics(plan.folder, plan.settings, metrics)
    _tell(plan, metrics)
    draw_or_tell(
        plan.folder / "confusion.png",
        partial(draw_confusion, confusion=figures.confusion(), names=plan.names),
    )
    return DONE


def _row(plan: Plan, scores: Scores, outcome: Outcome) -> str:
    """A line of predictions.jsonl."""
    label = plan.videos.labels[outcome.video]
    row: dict[str, Any] = {
        "path": str(plan.videos.paths[outcome.video]),
        "label": label,
        "class": plan.names[label],
    }
    if outcome.scores_K is None:
        row |= {"views": 0, "bad": outcome.reason}
    else:
        first = np.argsort(-outcome.scores_K, kind="stable")[:TOLD_CLASSES].tolist()
        row |= {
            "views": plan.views.num_clips * plan.views.num_crops,
            "predicted": first[0],
            "right": first[0] == label,
            "top": [
                {"class": plan.names[k], "probability": float(outcome.scores_K[k])} for k in first
            ],
        }
        if plan.config.all_scores:
            row["scores"] = outcome.scores_K.tolist()
    return json_text(row) + "\n"


def _tell(plan: Plan, metrics: dict[str, Any]) -> None:
    low, high = metrics["top1_interval"]
    print(
        f"top-1 {metrics['top1']:.2%} ({low:.2%} to {high:.2%}, {metrics['interval']}), top-5 {metrics['top5']:.2%}, mean class accuracy "
        f"{metrics['mean_class_accuracy']:.2%}; {metrics['videos']} videos, {metrics['views']} views each"
    )
    if metrics["bad_videos"]:
        print(
            f"{metrics['bad_videos']} videos could not be decoded and are {plan.settings['bad_videos_are']}; metrics.json names them"
        )
    print(f"results {plan.folder}", flush=True)
