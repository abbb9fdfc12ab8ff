"""L_rec: the squared error of the predicted tubelets, their targets read straight from the uint8 clip."""

import torch

from . import reference
from .dispatch import check_clip, choose
from .reference import Normalize


def reconstruction_loss(predicted_BMP: torch.Tensor, clip_BTHWC: torch.Tensor, index_BM: torch.Tensor, tubelet: tuple[int, int, int],
                        normalize: Normalize = "channel", impl: str = "auto") -> torch.Tensor:
    """Mean squared error between predictions and normalised true pixels of the masked tubelets, in float32.

    predicted_BMP: P ordered (frame, row, column, channel). clip_BTHWC: uint8, or floating point in [0, 1]. index_BM: int64.
    Raises: ValueError for a shape or dtype that does not fit. Source: VideoMAE (channel), MAE (tubelet).
    """
    return reconstruction_loss_and_targets(predicted_BMP, clip_BTHWC, index_BM, tubelet, normalize, impl)[0]


def reconstruction_loss_and_targets(predicted_BMP: torch.Tensor, clip_BTHWC: torch.Tensor, index_BM: torch.Tensor,
                                    tubelet: tuple[int, int, int], normalize: Normalize = "channel",
                                    impl: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """The same, with the targets_BMP that the contrastive loss wants, which cost no second read of the clip."""
    check_clip(clip_BTHWC, index_BM, tubelet, "reconstruction_loss")
    values = tubelet[0] * tubelet[1] * tubelet[2] * clip_BTHWC.shape[-1]
    if predicted_BMP.shape != (*index_BM.shape, values):
        raise ValueError(f"reconstruction_loss: predicted_BMP has shape {tuple(predicted_BMP.shape)}, not {(*index_BM.shape, values)}")
    if normalize not in ("channel", "tubelet", "none"):
        raise ValueError(f"reconstruction_loss: normalize {normalize} is not one of channel, tubelet, none")
    choose("reconstruction_loss", impl)
    return reference.reconstruction_loss(predicted_BMP, clip_BTHWC, index_BM, tubelet, normalize)
