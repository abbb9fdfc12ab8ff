"""Visible tubelets of a clip, normalised, ready for the embedding: only these are turned into floats."""

import torch

from . import reference
from .dispatch import check_clip, choose


def gather_tubelets(clip_BTHWC: torch.Tensor, index_BV: torch.Tensor, tubelet: tuple[int, int, int], mean: tuple[float, ...],
                    std: tuple[float, ...], dtype: torch.dtype, impl: str = "auto") -> torch.Tensor:
    """Gathers tubelets and normalises them: (x - mean_c) / std_c.

    clip_BTHWC: uint8, or floating point in [0, 1]. index_BV: int64 tokens in raster order of the grid that `tubelet`
    (frames, rows, columns) makes of the clip. mean, std: one value, or one a channel.
    Returns: [B, V, P] of `dtype`, P ordered (channel, frame, row, column). No gradient: a clip is data.
    Raises: ValueError for a shape or dtype that does not fit.
    """
    check_clip(clip_BTHWC, index_BV, tubelet, "gather_tubelets")
    choose("gather_tubelets", impl)
    return reference.gather_tubelets(clip_BTHWC, index_BV, tubelet, mean, std, dtype)
