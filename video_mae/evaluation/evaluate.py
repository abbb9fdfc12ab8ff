"""The evaluation stage: every video of a list once, all its views, one row a video, and the
accuracies that a paper would print.

A forward pass holds the views of one video and nothing else, and the figures are made on one rank
from the scores of all videos in the order of the list: neither the number of ranks nor the batch
size can change them. M videos, K classes.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import pad

from video_mae.config.evaluation import EvaluateConfig
from video_mae.convert.model_folder import choose_frames, find_model_folder, load_pretrained
from video_mae.data.videos import read_labeled
from video_mae.data.views import load_views
from video_mae.data.workers import plan_workers
from video_mae.evaluation.predict import merge_views, names_of, view_logits, views_of
from video_mae.evaluation.ranks import Ranks, check_start
from video_mae.evaluation.scores import CONFIDENCE, Scores, write_class_table
from video_mae.files import draw_or_tell, json_text, say, write_text
from video_mae.kernels.dispatch import describe
from video_mae.model.vit import VideoClassifier
from video_mae.report.answers import worst_mistakes
from video_mae.report.page import write_report
from video_mae.report.record import versions
from video_mae.results import LIST_DIGEST, check_results, choose_folder, write_metrics
from video_mae.training.picture import GAP, in_colors, middles
from video_mae.training.run_page import device_name

DONE, NO_FIGURES = 0, 3
TOLD_CLASSES = 5
NUM_FRAMES = 4  # of a video that was mistaken


class Outcome(NamedTuple):
    """What a rank found for a video, by its place in the list: its scores [K]; NaN where it could
    not be decoded, and the reason. view_predictions: the first class of each view by itself.
    """

    video: int
    scores_K: NDArray[np.float64]
    bad: str
    view_predictions: list[int]


def start(model: str, source: str, config: EvaluateConfig) -> Callable[[], int]:
    """The stage as the command line starts it: a mistake is raised here, the evaluation is what is
    returned.
    """
    return Evaluation(model, source, config).run


class Evaluation:
    """A checked evaluation, which `run` does."""

    def __init__(self, model: str, source: str, config: EvaluateConfig) -> None:
        """Checks model, list, classes and output before anything is decoded.

        Raises: ValueError or FileNotFoundError with one line that names the file or key and the
        remedy.
        """
        check_start(config)
        self.config, data = config, config.data
        model_folder = find_model_folder(model)
        self.model = load_pretrained(model_folder, VideoClassifier, impl=config.kernels)
        self.told = choose_frames(self.model, config.sampling, config.stride or data.stride)
        head = self.model.classifier_config
        if config.antialias is not None:
            self.told.append(
                f"antialias = {config.antialias}: given, the model says {head.antialias}"
            )
            head = self.model.classifier_config = replace(head, antialias=config.antialias)
        self.videos = read_labeled(
            "LIST", source, data.root, head.num_classes, head.class_names, data.list_format
        )
        self.names = self.videos.class_names or names_of(head)
        self.workers = plan_workers(config.num_workers, data.decoder_threads)
        num_clips = config.num_clips or (5 if head.sampling == "dense" else 2)
        self.views = views_of(
            self.model.config, head, num_clips, config.num_crops, data, self.workers.threads
        )
        self.num_views = num_clips * config.num_crops
        self.settings = {
            "model": str(model_folder.absolute()),
            "list": source if "://" in source else str(Path(source).absolute()),
            LIST_DIGEST: self.videos.digest(),
            "sampling": head.sampling,
            "stride": head.stride,
            "num_clips": num_clips,
            "num_crops": config.num_crops,
            "antialias": head.antialias,
            "precision": config.precision,
            "bad_videos_are": "left out" if config.skip_bad else "wrong",
        }
        self.folder = choose_folder(config.output, model)
        check_results(self.folder, self.settings)

    def run(self) -> int:
        """Evaluates on this rank's share; rank 0 writes the results. Returns 0; 3 where there are
        no figures, and says why.
        """
        with Ranks() as ranks:
            outcomes = ranks.gather(self._outcomes(ranks))
            return self._conclude(outcomes) if ranks.is_main else DONE

    def _outcomes(self, ranks: Ranks) -> list[Outcome]:
        config, views, self.device = self.config, self.views, ranks.device
        model, mine = self.model.to(ranks.device), ranks.share(len(self.videos))
        ranks.say(
            *self.videos.notes,
            *self.told,
            f"{len(self.videos)} videos, {views.num_clips} x {views.num_crops} views each "
            f"({views.sampling}), {ranks.size} ranks; {describe(config.kernels, ranks.device)}; "
            f"device {ranks.device}, {config.precision}; {self.workers.describe()}",
            self.workers.told,
        )
        outcomes: list[Outcome] = []
        loader = load_views(
            self.videos.paths, mine, views, self.workers.num, ahead=2 * config.batch_size
        )
        with ranks.progress(len(mine)) as progress:
            for video, viewed, failure in loader:
                progress.update()
                if failure:
                    scores_K = np.full(len(self.names), np.nan)
                    outcomes.append(Outcome(video, scores_K, failure.reason, []))
                    continue
                logits_VK = view_logits(model, viewed, config.precision)
                own = logits_VK.argmax(dim=1).tolist()
                outcomes.append(Outcome(video, merge_views(logits_VK).numpy(), "", own))
        return outcomes

    def _conclude(self, outcomes: list[Outcome]) -> int:
        outcomes.sort(key=lambda outcome: outcome.video)
        scores = Scores(np.stack([outcome.scores_K for outcome in outcomes]), self.videos.label_M)
        has_scores_M, paths = scores.has_scores(), self.videos.paths
        bad = [outcome for outcome in outcomes if outcome.bad]
        why = ""
        odd = [one.video for one in outcomes if not one.bad and not has_scores_M[one.video]]
        if odd:
            why = (
                f"the scores of {paths[odd[0]]} are not finite; try precision=fp32, or another "
                "model"
            )
        elif len(bad) == len(outcomes):
            why = f"none of the {len(bad)} videos could be decoded; {paths[0]}: {bad[0].bad}"
        if why:
            say(f"no figures: {why}")
            return NO_FIGURES
        figures = scores
        if self.config.skip_bad:
            figures = Scores(scores.score_MK[has_scores_M], scores.label_M[has_scores_M])
        metrics = {
            **figures.metrics(),
            "interval": f"Wilson, {CONFIDENCE:.0%}",
            "views": self.num_views,
            "bad_videos": len(bad),
            "bad": [{"path": str(paths[one.video]), "reason": one.bad} for one in bad],
            "device": device_name(self.device),
            "versions": versions(),
        }
        rows = [self._row(outcome) for outcome in outcomes]
        text = "".join(json_text(row) + "\n" for row in rows)
        write_text(self.folder / "predictions.jsonl", text)
        write_class_table(self.folder / "classes.csv", figures, self.names)
        write_metrics(self.folder, self.settings, metrics)
        self._tell(metrics)
        draw_or_tell(
            self.folder / "mistakes", partial(self._draw_mistakes, videos=worst_mistakes(rows))
        )
        write_report(self.folder, say)
        return DONE

    def _draw_mistakes(self, folder: Path, videos: list[int]) -> None:
        """Writes some frames of each of these videos, as the middle view has them, side by side."""
        folder.mkdir()
        for video in videos:
            clip_VTHWC = self.views.read(self.videos.paths[video]).clips()
            clip_THWC = in_colors(clip_VTHWC[len(clip_VTHWC) // 2])
            shown = clip_THWC[middles(len(clip_THWC), min(NUM_FRAMES, len(clip_THWC)))]
            strip = rearrange(pad(shown, (0, 0, 0, GAP), value=255), "t h w c -> h (t w) c")
            Image.fromarray(strip.numpy()).save(folder / f"{video:08d}.jpg", quality=85)

    def _row(self, outcome: Outcome) -> dict[str, Any]:
        """A line of predictions.jsonl."""
        label, score_K = int(self.videos.label_M[outcome.video]), outcome.scores_K
        row: dict[str, Any] = {
            "path": str(self.videos.paths[outcome.video]),
            "label": label,
            "class": self.names[label],
        }
        if outcome.bad:
            return {**row, "views": 0, "bad": outcome.bad}
        first = np.argsort(-score_K, kind="stable")[:TOLD_CLASSES].tolist()
        row |= {
            "views": self.num_views,
            "view_predictions": outcome.view_predictions,
            "predicted": first[0],
            "right": first[0] == label,
            "top": [{"class": self.names[k], "probability": float(score_K[k])} for k in first],
        }
        if self.config.all_scores:
            row["scores"] = score_K.tolist()
        return row

    def _tell(self, metrics: dict[str, Any]) -> None:
        low, high = metrics["top1_interval"]
        print(
            f"top-1 {metrics['top1']:.2%} ({low:.2%} to {high:.2%}, {metrics['interval']}), "
            f"top-5 {metrics['top5']:.2%}, mean class accuracy "
            f"{metrics['mean_class_accuracy']:.2%}; {metrics['videos']} videos, "
            f"{metrics['views']} views each"
        )
        if metrics["bad_videos"]:
            print(
                f"{metrics['bad_videos']} videos could not be decoded and are "
                f"{self.settings['bad_videos_are']}; metrics.json names them"
            )
        say(f"results {self.folder}")
