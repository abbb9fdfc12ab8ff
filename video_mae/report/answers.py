"""What the answers of an evaluation (predictions.jsonl) show beyond their accuracy, as plotly takes
it.

M videos, V views of each, K classes.
"""

from collections.abc import Sequence
from html import escape

import numpy as np

from video_mae.files import JsonObject
from video_mae.report.record import Lines

NUM_MISTAKES = 8
NUM_BINS = 10  # of confidences
LONGEST_NAME = 18  # letters of a name beside the matrix


def worst_mistakes(answers: Lines) -> list[int]:
    """The lines of the wrong answers that were given with most confidence, first the surest."""
    wrong = [number for number, row in enumerate(answers) if row.get("right") is False]
    wrong.sort(key=lambda number: -answers[number]["top"][0]["probability"])
    return wrong[:NUM_MISTAKES]


def confusions(answers: Lines, names: Sequence[str]) -> JsonObject:
    """Of each class that has videos (y) the share that was taken for each class (x)."""
    counts_KK = np.zeros((len(names), len(names)), dtype=int)
    for row in answers:
        counts_KK[row["label"], row["predicted"]] += 1
    total_K = counts_KK.sum(axis=1)
    columns = np.flatnonzero(total_K + counts_KK.sum(axis=0)).tolist()
    y, z, text = [], [], []
    for i in np.flatnonzero(total_K).tolist():
        name = names[i]
        if len(name) > LONGEST_NAME:
            name = f"{name[: LONGEST_NAME - 3]}..."
        y.append(f"{escape(name)} {i}")
        z.append([])
        text.append([])
        for j in columns:
            num = int(counts_KK[i, j])
            words = f"{escape(names[i])}<br>taken for {escape(names[j])}<br>{num} of {total_K[i]}"
            z[-1].append(num / int(total_K[i]) if num else None)
            text[-1].append(words if num else "")
    return {"type": "heatmap", "x": [str(j) for j in columns], "y": y, "z": z, "text": text}


def calibration(answers: Lines) -> tuple[JsonObject, float]:
    """How often answers of a confidence (x) are right (y), and the expected calibration error, the
    mean distance between the two. Source: Guo et al. (2017), 10 bins.
    """
    confidence_M = np.array([row["top"][0]["probability"] for row in answers])
    right_M = np.array([row["right"] for row in answers])
    bin_M = np.minimum((confidence_M * NUM_BINS).astype(int), NUM_BINS - 1)
    bins = [bin_M == number for number in np.unique(bin_M)]
    x, y = ([float(of_M[mine_M].mean()) for mine_M in bins] for of_M in (confidence_M, right_M))
    text = [int(mine_M.sum()) for mine_M in bins]
    error = float(np.abs(np.subtract(x, y)) @ text) / len(answers)
    return {"type": "bar", "x": x, "y": y, "text": text}, error


def views(answers: Lines) -> tuple[JsonObject, float] | None:
    """How often each view by itself is right, and the share of views that agree with the answer;
    None where there is one view, or an earlier version wrote none.
    """
    viewed = [row for row in answers if len(row.get("view_predictions", ())) > 1]
    if not viewed:
        return None
    predicted_VM = np.array([row["view_predictions"] for row in viewed]).T
    label_M, answer_M = (np.array([row[key] for row in viewed]) for key in ("label", "predicted"))
    y = (predicted_VM == label_M).mean(axis=1).tolist()
    return {"type": "bar", "x": list(range(1, len(y) + 1)), "y": y}, float(
        (predicted_VM == answer_M).mean()
    )
