"""How good features are: how many dimensions they fill, how many say nothing, and which classes
are read from them without anything that is trained step by step.

M samples or examples to learn from, B others, D features, K classes, G choices, R singular values.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

DEAD = 0.01
"""A dimension whose deviation is at most this part of the mean deviation is dead."""
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)
"""Strengths of the ridge for each example, to choose from."""
VARIANCE_EPS = 1e-6
"""Added to the variance of a feature before it is divided by its deviation, as by a batch norm."""


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


def ridge_scores(
    query_BD: torch.Tensor, example_MD: torch.Tensor, label_M: torch.Tensor, num_classes: int
) -> torch.Tensor:
    """Scores [B, K], float64, of the linear read-out that a ridge regression on one-hot labels
    gives: features standardised by the examples, an intercept that is not shrunk.

    The strength is that of RIDGES whose squared error on each example left out is the smallest, in
    closed form: residual / (1 - leverage). Source: Golub, Heath and Wahba (1979).
    """
    x_MD, y_MK = example_MD.double(), F.one_hot(label_M, num_classes).double()
    mean_D, mean_K = x_MD.mean(dim=0), y_MK.mean(dim=0)
    deviation_D = (x_MD.var(dim=0, correction=0) + VARIANCE_EPS).sqrt()
    left_MR, sigma_R, right_RD = torch.linalg.svd(
        (x_MD - mean_D) / deviation_D, full_matrices=False
    )
    target_MK = y_MK - mean_K
    target_RK = left_MR.T @ target_MK
    best, least = sigma_R, torch.inf
    for ridge in RIDGES:
        shrunk_R = sigma_R**2 + ridge * len(x_MD)
        kept_R = sigma_R**2 / shrunk_R
        residual_MK = target_MK - left_MR * kept_R @ target_RK
        leverage_M = 1 / len(x_MD) + left_MR**2 @ kept_R
        error = float((residual_MK / (1 - leverage_M)[:, None]).square().sum())
        if error < least:
            best, least = shrunk_R, error
    weight_DK = right_RD.T @ ((sigma_R / best)[:, None] * target_RK)
    return (query_BD.double() - mean_D) / deviation_D @ weight_DK + mean_K


def neighbour_scores(
    query_BD: torch.Tensor,
    example_MD: torch.Tensor,
    label_M: torch.Tensor,
    num_classes: int,
    ks: Sequence[int],
    temperature: float,
    chunk: int = 1024,
) -> torch.Tensor:
    """For each of the ks the scores [G, B, K] of the k nearest examples: their votes, weighted with
    exp(cosine / temperature), sum to 1.

    A k beyond the number of examples takes all. Source: the weighted nearest neighbours of Wu et
    al. (2018), as DINO uses them.
    """
    example_DM = F.normalize(example_MD, dim=1).T
    most = min(max(ks), len(label_M))
    nearest = [
        (F.normalize(part, dim=1) @ example_DM).topk(most, dim=1) for part in query_BD.split(chunk)
    ]
    similarity_BM, index_BM = (torch.cat(parts) for parts in zip(*nearest, strict=True))
    scores = []
    for k in ks:
        weight_BM = (similarity_BM[:, :k] / temperature).softmax(dim=1)
        scores.append(
            weight_BM.new_zeros(len(query_BD), num_classes).scatter_add_(
                1, label_M[index_BM[:, :k]], weight_BM
            )
        )
    return torch.stack(scores)
