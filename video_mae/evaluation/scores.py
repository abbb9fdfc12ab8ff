"""How good a classifier's scores are: accuracies with their uncertainty, and the table of the
classes.

M videos, K classes.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from video_mae.files import one_line

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Scores:
    """Scores of videos and the truth: score_MK is not finite where there are none, as for a video
    that cannot be decoded.
    """

    score_MK: NDArray[np.float64]
    label_M: NDArray[np.int64]

    def place_of_label(self) -> NDArray[np.int64]:
        """How many classes come before a video's label, [M]: 0 is right; K where there are no
        scores. Of equal scores the first wins.
        """
        num_classes = self.score_MK.shape[1]
        own_M1 = self.score_MK[np.arange(len(self.label_M)), self.label_M][:, None]
        is_earlier = np.arange(num_classes) < self.label_M[:, None]
        before = (self.score_MK > own_M1) | ((self.score_MK == own_M1) & is_earlier)
        return np.where(self.has_scores(), before.sum(axis=1), num_classes)

    def has_scores(self) -> NDArray[np.bool_]:
        """Which videos [M] have scores."""
        return np.all(np.isfinite(self.score_MK), axis=1)

    def log_score(self) -> float:
        """The mean logarithm of the label's score, over the videos that have scores; -inf where
        there are none.
        """
        seen_M = self.has_scores()
        if not seen_M.any():
            return -np.inf
        own_M = self.score_MK[seen_M, self.label_M[seen_M]]
        return float(np.log(np.maximum(own_M, np.finfo(np.float64).tiny)).mean())

    def confusion(self) -> NDArray[np.int64]:
        """How many videos of class i (row) were taken for class j, [K, K]; those without scores are
        in none.
        """
        num_classes = self.score_MK.shape[1]
        counts = np.zeros((num_classes, num_classes), dtype=np.int64)
        seen = self.has_scores()
        np.add.at(counts, (self.label_M[seen], self.score_MK[seen].argmax(axis=1)), 1)
        return counts

    def metrics(self) -> dict[str, float | int | list[float]]:
        """top1, its interval, top5, mean_class_accuracy, and the counts behind them; a video
        without scores is wrong.

        mean_class_accuracy: over the classes that have a video. Where there are fewer than 5
        classes, top5 is among all of them.
        """
        place_M = self.place_of_label()
        right = int((place_M == 0).sum())
        of_class = np.bincount(self.label_M)
        right_of_class = np.bincount(self.label_M, place_M == 0)
        seen = of_class > 0
        return {
            "videos": len(place_M),
            "top1": right / len(place_M),
            "top1_interval": list(wilson_interval(right, len(place_M))),
            "top5": int((place_M < min(5, self.score_MK.shape[1])).sum()) / len(place_M),
            "mean_class_accuracy": float((right_of_class[seen] / of_class[seen]).mean()),
            "classes_with_videos": int(seen.sum()),
        }


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """The interval of a share of independent draws. Source: Wilson (1927); unlike share +- z sigma
    it stays in [0, 1].
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, weight = right / total, z**2 / total
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * (share * (1 - share) / total + weight / total / 4) ** 0.5
    return max(middle - half, 0.0), min(middle + half, 1.0)


def write_class_table(path: Path, scores: Scores, names: Sequence[str]) -> None:
    """Writes one line a class as CSV: label, class, videos, without_scores, top1, top5, and the
    class that it was most taken for.
    """
    place_M, confusion, seen = scores.place_of_label(), scores.confusion(), scores.has_scores()
    np.fill_diagonal(confusion, 0)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(
            (
                "label",
                "class",
                "videos",
                "without_scores",
                "top1",
                "top5",
                "most_taken_for",
                "times",
            )
        )
        for label, name in enumerate(names):
            mine = scores.label_M == label
            top1 = top5 = taken = ""
            if mine.any():
                top1 = f"{(place_M[mine] == 0).mean():.4f}"
                top5 = f"{(place_M[mine] < min(5, len(names))).mean():.4f}"
            worst = int(confusion[label].argmax())
            times = confusion[label, worst]
            if times:
                taken = cell(names[worst])
            missing = (mine & ~seen).sum()
            table.writerow((label, cell(name), mine.sum(), missing, top1, top5, taken, times))


def cell(name: str) -> str:
    """A name as a cell of a table that no spreadsheet takes for a formula."""
    return one_line(f"'{name}" if name.startswith(tuple("=+-@")) else name)
