"""L_total = L_rec + lambda * L_con: the method is told step by step in docs/objective.md.

Letters: B clips, T frames, H W pixels, C channels, N tubelets, M masked ones, P values of a
tubelet, F features of one.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from video_mae.config import ModelConfig, ObjectiveConfig
from video_mae.kernels.contrastive import contrastive_loss
from video_mae.kernels.joint import joint_loss
from video_mae.kernels.reference import pixel_range

SMOOTH_UP_TO = 1.0  # beta: errors of features below it count squared, larger ones linearly
COLDEST = 0.01  # a learned temperature stays between this and 1


class Losses(NamedTuple):
    """Scalars, float32; `contrastive_loss` is 0 where lambda is 0."""

    loss: torch.Tensor
    reconstruction_loss: torch.Tensor
    contrastive_loss: torch.Tensor


class Objective(nn.Module):
    """Both losses of the predicted tubelets; their targets come from the clip itself, or are
    features that a teacher makes of it.

    `impl` chooses the kernels. A learned temperature is tau = COLDEST ** sigmoid(parameter), so it
    cannot leave (COLDEST, 1) nor get stuck at a clamp.
    """

    def __init__(
        self, config: ObjectiveConfig, tubelet: tuple[int, int, int], impl: str = "auto"
    ) -> None:
        super().__init__()
        self.config, self.tubelet, self.impl = config, tubelet, impl
        if config.learn_temperature:
            share = math.log(config.temperature) / math.log(COLDEST)
            # DeepSpeed wants a dimension
            self.temperature_logit = nn.Parameter(torch.tensor([math.log(share / (1 - share))]))

    def temperature(self) -> float | torch.Tensor:
        if not self.config.learn_temperature:
            return self.config.temperature
        return (math.log(COLDEST) * self.temperature_logit[0].float().sigmoid()).exp()

    def forward(
        self, predicted_BMP: torch.Tensor, target: torch.Tensor, masked_BM: torch.Tensor
    ) -> Losses:
        """predicted_BMP: P ordered (frame, row, column, channel); target: clip_BTHWC, uint8, or
        features [B, N, P] of all tokens; masked_BM: int64. The sum alone has a gradient.
        """
        c = self.config
        if c.target == "features":
            return self._of_features(predicted_BMP, target, masked_BM)
        return Losses(
            *joint_loss(
                predicted_BMP,
                target,
                masked_BM,
                self.tubelet,
                c.normalize,
                self.temperature(),
                c.negatives,
                c.contrastive_weight,
                self.impl,
                c.contrastive_memory,
            )
        )

    def _of_features(
        self, predicted_BMF: torch.Tensor, target_BNF: torch.Tensor, masked_BM: torch.Tensor
    ) -> Losses:
        c, index_BM1 = self.config, masked_BM[:, :, None]
        if target_BNF.shape[::2] != predicted_BMF.shape[::2]:
            raise ValueError(
                f"target_BNF: is {tuple(target_BNF.shape)}; each token of each clip needs "
                f"{predicted_BMF.shape[2]} features"
            )
        target_BMF = target_BNF.gather(1, index_BM1.expand(-1, -1, target_BNF.shape[2])).float()
        if c.feature_loss == "squared":
            reconstruction = F.mse_loss(predicted_BMF.float(), target_BMF)
        else:
            reconstruction = F.smooth_l1_loss(predicted_BMF.float(), target_BMF, beta=SMOOTH_UP_TO)
        contrastive = torch.zeros_like(reconstruction)
        if c.contrastive_weight > 0:
            contrastive = contrastive_loss(
                predicted_BMF,
                target_BMF,
                self.temperature(),
                c.negatives,
                self.impl,
                c.contrastive_memory,
            )
        loss = reconstruction + c.contrastive_weight * contrastive
        return Losses(loss, reconstruction.detach(), contrastive.detach())


def predicted_clip(clip_BTHWC: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """The frames that the decoder predicts: all, or config.predicted_frames of them, evenly spread
    from first to last (mae_st).

    Cut by config.predicted_tubelet, they have the grid of the clip, which may be of any length.
    """
    if config.predicted_frames is None:
        return clip_BTHWC
    num_frames = clip_BTHWC.shape[1]
    num_predicted = num_frames // config.tubelet_size * config.predicted_tubelet[0]
    # as torch.linspace(0, num_frames - 1, num_predicted).long() has them, without a tensor
    frames = [i * (num_frames - 1) // max(1, num_predicted - 1) for i in range(num_predicted)]
    return torch.stack([clip_BTHWC[:, frame] for frame in frames], dim=1)


def pixel_scale(
    config: ModelConfig, objective: ObjectiveConfig
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, std) of the channels where a model predicts pixels that are normalised by them; None
    where they are in [0, 1].
    """
    return (config.mean, config.std) if objective.pixels == "normalized" else None


def target_clip(
    clip_BTHWC: torch.Tensor, config: ModelConfig, objective: ObjectiveConfig
) -> torch.Tensor:
    """What the losses compare predictions with: the predicted frames, as they are or as floats (x -
    mean) / std.
    """
    clip_BTHWC, scale = predicted_clip(clip_BTHWC, config), pixel_scale(config, objective)
    if scale is None:
        return clip_BTHWC
    dtype = torch.float64 if clip_BTHWC.dtype == torch.float64 else torch.float32
    # no host sync
    mean_C, std_C = (
        torch.cat([clip_BTHWC.new_full((1,), value, dtype=dtype) for value in values])
        for values in scale
    )
    return (clip_BTHWC.to(dtype) / pixel_range(clip_BTHWC.dtype) - mean_C) / std_C
