"""How good features are, told from their numbers alone: how many dimensions they fill, and how many
say nothing.

M samples, D features.
"""

import torch

DEAD = 0.01
"""A dimension whose deviation is at most this part of the mean deviation is dead."""


def effective_rank(x_MD: torch.Tensor) -> torch.Tensor:
    """How many dimensions features fill, a float64 scalar between 1 and min(M, D): the exponential
    of the entropy of their singular values, which are made to sum to 1.

    Of k equal singular values, and no others, it is k; of features that are all 0 it is 0, and of
    features that are not finite NaN. No mean is subtracted: one vector for all samples has rank 1.
    Source: RankMe (Garrido et al., 2023).
    """
    x_MD = x_MD.detach().double()
    if not x_MD.isfinite().all():  # for which the decomposition raises
        return x_MD.new_tensor(torch.nan)
    sigma = torch.linalg.svdvals(x_MD)
    if not sigma.any():
        return sigma.sum()
    return torch.special.entr(sigma / sigma.sum()).sum().exp()


def dead_share(x_MD: torch.Tensor) -> torch.Tensor:
    """The share of the dimensions whose standard deviation over the samples is at most DEAD times
    the mean of all deviations, a float64 scalar in [0, 1]; 1 where no dimension varies, NaN where a
    feature is not finite.
    """
    x_MD = x_MD.detach().double()
    if not x_MD.isfinite().all():
        return x_MD.new_tensor(torch.nan)
    # From the first sample on, so that a constant has no deviation at all, and not its rounding.
    deviation_D = (x_MD - x_MD[:1]).std(dim=0, correction=0)
    return (deviation_D <= DEAD * deviation_D.mean()).double().mean()
