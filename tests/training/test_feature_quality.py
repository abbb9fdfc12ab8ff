"""The quality of features: of spectra and deviations that are known, and against definitions."""

import math

import numpy as np
import pytest
import torch

from video_mae.training.feature_quality import (
    DEAD,
    RIDGES,
    dead_share,
    effective_rank,
    neighbour_scores,
    ridge_scores,
)


def with_spectrum(sigma: list[float], num_samples: int, width: int) -> torch.Tensor:
    """Random features [num_samples, width] with these singular values."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.linalg.qr(torch.randn(side, len(sigma), generator=generator, dtype=torch.float64))[0]
        for side in (num_samples, width)
    ]
    return parts[0] @ torch.diag(torch.tensor(sigma, dtype=torch.float64)) @ parts[1].T


@pytest.mark.parametrize(("num_samples", "width"), [(13, 7), (5, 11), (6, 6)])
@pytest.mark.parametrize("num", [1, 3, 5])
def test_equal_singular_values_count_each(num_samples: int, width: int, num: int) -> None:
    x_MD = with_spectrum([0.3] * num, num_samples, width)
    assert float(effective_rank(x_MD)) == pytest.approx(num)


def test_the_rank_is_the_exponential_of_the_entropy() -> None:
    # shares 1/2, 1/4, 1/4: 2 ** 1.5; of squares it would be another number
    x_MD = with_spectrum([4.0, 2.0, 2.0], 9, 5)
    assert float(effective_rank(x_MD)) == pytest.approx(2**1.5)
    assert float(effective_rank(1e-3 * x_MD)) == pytest.approx(2**1.5)
    assert float(effective_rank(x_MD.T)) == pytest.approx(2**1.5)
    x = np.random.default_rng(0).normal(size=(23, 8)) + 5  # the mean is not taken out
    sigma = np.linalg.svd(x, compute_uv=False)
    share = sigma / sigma.sum()
    found = effective_rank(torch.from_numpy(x).float())
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-5)


def test_collapsed_features_have_rank_one_and_nothing_but_dead_dimensions() -> None:
    x_MD = torch.randn(1, 7).expand(5, 7)
    assert float(effective_rank(x_MD)) == pytest.approx(1.0)
    assert float(dead_share(x_MD)) == 1.0
    assert float(effective_rank(torch.zeros(4, 3))) == 0.0


def test_dead_dimensions_are_those_with_next_to_no_deviation() -> None:
    torch.manual_seed(0)
    x_MD = torch.randn(50, 8)
    x_MD = (x_MD - x_MD.mean(dim=0)) / x_MD.std(dim=0, correction=0)
    assert float(dead_share(x_MD)) == 0.0
    # deviations of 6 dimensions are 1, of one 0: the mean is about 6 / 8
    x_MD[:, 2] = 0.1
    limit = DEAD * 6 / 8
    for deviation, expected in ((1.1 * limit, 1 / 8), (0.9 * limit, 2 / 8)):
        changed_MD = x_MD.clone()
        changed_MD[:, 5] *= deviation
        assert float(dead_share(changed_MD)) == expected
        # neither a scale nor a place is looked at
        assert float(dead_share(1e-4 * changed_MD - 3)) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_have_no_quality(bad: float) -> None:
    x_MD = torch.randn(5, 4)
    x_MD[3, 1] = bad
    assert effective_rank(x_MD).isnan()
    assert dead_share(x_MD).isnan()


def test_neighbours_vote_as_defined():
    rng = np.random.default_rng(0)
    query, example, label = (
        rng.normal(size=(5, 4)),
        rng.normal(size=(11, 4)),
        rng.integers(3, size=11),
    )
    scores_GBK = neighbour_scores(
        torch.from_numpy(query),
        torch.from_numpy(example),
        torch.from_numpy(label),
        3,
        (1, 4, 50),
        0.2,
        chunk=2,
    )
    for scores_BK, k in zip(scores_GBK.numpy(), (1, 4, 11), strict=True):
        for q, scores_K in zip(query, scores_BK, strict=True):
            cosine = example @ q / np.linalg.norm(example, axis=1) / np.linalg.norm(q)
            votes = np.zeros(3)
            for m in np.argsort(-cosine)[:k]:
                votes[label[m]] += np.exp(cosine[m] / 0.2)
            assert scores_K == pytest.approx(votes / votes.sum())


def refitted(x_MD: np.ndarray, y_MK: np.ndarray, query_BD: np.ndarray, ridge: float) -> np.ndarray:
    """The minimum of |x w + b - y|^2 + ridge |w|^2, by the normal equations of (w, b)."""
    num, width = x_MD.shape
    ones = np.hstack([x_MD, np.ones((num, 1))])
    penalty = ridge * np.diag([1.0] * width + [0.0])
    solution = np.linalg.solve(ones.T @ ones + penalty, ones.T @ y_MK)
    return query_BD @ solution[:-1] + solution[-1]


def test_the_ridge_is_the_one_that_predicts_what_is_left_out() -> None:
    chosen = set()
    for num, width, noise in ((17, 5, 0.1), (17, 5, 6.0), (9, 23, 1.0)):
        rng = np.random.default_rng(num + width)
        label, label_of_query = np.arange(num) % 3, np.arange(4) % 3
        slope = np.linspace(-3, 3, width)
        x = 20 * (label[:, None] * slope + noise * rng.normal(size=(num, width))) + 7
        query = 20 * (label_of_query[:, None] * slope + noise * rng.normal(size=(4, width))) + 7
        scale = np.sqrt(x.var(axis=0) + 1e-6)
        scaled, others = (x - x.mean(axis=0)) / scale, (query - x.mean(axis=0)) / scale
        y, errors = np.eye(4)[label], []  # of one class there is no example
        for ridge in RIDGES:
            left_out = [
                refitted(np.delete(scaled, m, 0), np.delete(y, m, 0), scaled[[m]], ridge * num)
                for m in range(num)
            ]
            errors.append(((np.concatenate(left_out) - y) ** 2).sum())
        best = RIDGES[int(np.argmin(errors))]
        chosen.add(best)
        found = ridge_scores(
            torch.from_numpy(query).float(), torch.from_numpy(x).float(), torch.from_numpy(label), 4
        )
        expected = refitted(scaled, y, others, best * num)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert len(chosen) > 1  # there was something to choose


def test_a_feature_that_does_not_vary_takes_no_part_in_the_ridge() -> None:
    torch.manual_seed(0)
    label_M = torch.arange(12) % 2
    x_MD = torch.randn(12, 4) + 3.0 * label_M[:, None]
    constant_MD = torch.cat([x_MD, torch.full((12, 1), 0.1)], dim=1)
    query_BD = constant_MD[:5].clone()
    query_BD[:, 4] = 0.1
    torch.testing.assert_close(
        ridge_scores(query_BD, constant_MD, label_M, 2),
        ridge_scores(query_BD[:, :4], x_MD, label_M, 2),
    )
