"""The quality of features, of spectra and deviations that are known."""

import math

import numpy as np
import pytest
import torch

from video_mae.training.feature_quality import DEAD, dead_share, effective_rank


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
