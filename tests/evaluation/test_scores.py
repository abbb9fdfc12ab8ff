"""Accuracies against torchmetrics and the definitions, ties, videos without scores, and the table."""

import csv
import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

from video_mae.evaluation.scores import Scores, wilson_interval, write_class_table

NAMES = [f"class {label}" for label in range(7)]


def drawn(num_videos: int = 200, num_classes: int = 7, seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    return Scores(rng.random((num_videos, num_classes)), rng.integers(num_classes, size=num_videos))


def test_accuracies_are_those_of_torchmetrics():
    scores = drawn()
    score_MK, label_M = torch.from_numpy(scores.score_MK), torch.from_numpy(scores.label_M)
    metrics = scores.metrics()
    expected = {
        "top1": multiclass_accuracy(score_MK, label_M, 7, average="micro"),
        "top5": multiclass_accuracy(score_MK, label_M, 7, average="micro", top_k=5),
        "mean_class_accuracy": multiclass_accuracy(score_MK, label_M, 7, average="macro"),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), abs=1e-6), name
    assert np.array_equal(
        scores.confusion(), multiclass_confusion_matrix(score_MK, label_M, 7).numpy()
    )


def test_mean_class_accuracy_is_over_the_classes_that_have_videos():
    score_MK = np.array([[0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.8, 0.2, 0.0], [0.2, 0.8, 0.0]])
    metrics = Scores(score_MK, np.array([0, 0, 0, 1])).metrics()
    assert metrics["mean_class_accuracy"] == (2 / 3 + 1) / 2
    assert metrics["classes_with_videos"] == 2
    assert metrics["top5"] == 1.0  # of three classes all are among the first five


def test_equal_scores_are_decided_the_same_way_everywhere():
    scores = Scores(np.full((3, 3), 1 / 3), np.array([0, 1, 2]))
    assert scores.place_of_label().tolist() == [0, 1, 2]
    assert scores.confusion().argmax(axis=1).tolist() == [0, 0, 0]
    assert scores.metrics()["top1"] == 1 / 3


def test_a_video_without_scores_is_wrong_and_in_no_column():
    score_MK = np.array([[0.9, 0.1], [np.nan, np.nan], [0.3, 0.7]])
    scores = Scores(score_MK, np.array([0, 0, 1]))
    assert scores.metrics()["top1"] == 2 / 3
    assert scores.metrics()["top5"] == 2 / 3
    assert scores.confusion().tolist() == [[1, 0], [0, 1]]
    assert scores.log_score() == pytest.approx((math.log(0.9) + math.log(0.7)) / 2)


@pytest.mark.parametrize(("right", "total"), [(0, 5), (5, 5), (3, 10), (801, 1000), (1, 1)])
def test_the_interval_is_wilsons(right: int, total: int) -> None:
    expected = binomtest(right, total).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_class_table_has_a_line_a_class(tmp_path):
    score_MK = np.zeros((5, 7))
    score_MK[range(5), [0, 2, 2, 1, 6]] = 1.0
    score_MK[4] = np.nan
    write_class_table(
        tmp_path / "classes.csv", Scores(score_MK, np.array([0, 0, 0, 1, 1])), ["a, b", *NAMES[1:]]
    )
    rows = list(csv.DictReader((tmp_path / "classes.csv").open()))
    assert [row["label"] for row in rows] == [str(label) for label in range(7)]
    assert rows[0] == {
        "label": "0",
        "class": "a, b",
        "videos": "3",
        "without_scores": "0",
        "top1": "0.3333",
        "top5": "1.0000",
        "most_taken_for": "class 2",
        "times": "2",
    }
    assert (
        rows[1]["videos"],
        rows[1]["without_scores"],
        rows[1]["top1"],
        rows[1]["most_taken_for"],
    ) == ("2", "1", "0.5000", "")
    assert (rows[3]["videos"], rows[3]["top1"]) == ("0", "")
