"""L_con: each predicted tubelet should resemble its own target more than the targets of other tubelets."""

import torch

from . import reference
from .dispatch import choose
from .reference import Negatives


def contrastive_loss(predicted_BMP: torch.Tensor, target_BMP: torch.Tensor, temperature: float | torch.Tensor,
                     negatives: Negatives = "clip", impl: str = "auto") -> torch.Tensor:
    """InfoNCE over the masked tubelets, cosine similarity, in float32.

    temperature: tau, a number or a 0-d tensor that may need a gradient. negatives: the masked tubelets of the same clip, or
    of all clips given. Raises: ValueError for shapes that differ. Source: van den Oord et al. (2018); patches of one image as
    negatives as in ConMIM (Yi et al., 2023).
    """
    if predicted_BMP.ndim != 3 or predicted_BMP.shape != target_BMP.shape:
        raise ValueError(f"contrastive_loss: predicted_BMP {tuple(predicted_BMP.shape)} and target_BMP {tuple(target_BMP.shape)} must be "
                         "equal, (B, M, P)")
    if negatives not in ("clip", "batch"):
        raise ValueError(f"contrastive_loss: negatives {negatives} is not one of clip, batch")
    choose("contrastive_loss", impl)
    return reference.contrastive_loss(predicted_BMP, target_BMP, temperature, negatives)
