"""The fused operations in plain PyTorch: the truth in tests, and the path on a CPU.

Letters: B clips, T frames, H W pixels, C channels, N tokens, V visible, M masked, P values of a tubelet, h heads, d head width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange

Normalize = Literal["channel", "tubelet", "none"]
Negatives = Literal["clip", "batch"]

EPSILON = 1e-6  # of the normalised targets, for pixels in [0, 1]
NORM_FLOOR = 1e-3  # cosine similarity takes shorter vectors for this long, which bounds its gradient


def packed_attention(qkv_BN3HD: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v written out; returns out_BNHD."""
    q, k, v = rearrange(qkv_BN3HD, "b n three h d -> three b h n d")
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
    return rearrange(weights @ v, "b h n d -> b n h d")


def take_tubelets(clip_BTHWC: torch.Tensor, index_BV: torch.Tensor, tubelet: tuple[int, int, int]) -> torch.Tensor:
    """The chosen tubelets, untouched, as [B, V, t, p, q, C]: only these are read."""
    t, p, q = tubelet
    cells = rearrange(clip_BTHWC, "b (f t) (h p) (w q) c -> b f t h p w q c", t=t, p=p, q=q)
    height, width = cells.shape[3], cells.shape[5]
    batch_B1 = torch.arange(cells.shape[0], device=index_BV.device)[:, None]
    return cells[batch_B1, index_BV // (height * width), :, index_BV // width % height, :, index_BV % width]


def pixel_range(dtype: torch.dtype) -> float:
    """What a white pixel is stored as: 255 for uint8, 65535 for uint16, 1 for floating point."""
    return {torch.uint8: 255.0, torch.uint16: 65535.0}.get(dtype, 1.0)


def gather_tubelets(clip_BTHWC: torch.Tensor, index_BV: torch.Tensor, tubelet: tuple[int, int, int], mean: tuple[float, ...],
                    std: tuple[float, ...], dtype: torch.dtype) -> torch.Tensor:
    """Normalised tubelets [B, V, P], P ordered (channel, frame, row, column) as a Conv3d weight is."""
    compute = torch.promote_types(dtype, torch.float32)
    mean_C, std_C = (torch.tensor(values, device=clip_BTHWC.device, dtype=compute) for values in (mean, std))
    scale_C = 1 / (pixel_range(clip_BTHWC.dtype) * std_C)
    pixels = take_tubelets(clip_BTHWC, index_BV, tubelet).to(compute) * scale_C - mean_C / std_C
    return rearrange(pixels, "b v t p q c -> b v (c t p q)").to(dtype)


def tubelet_targets(clip_BTHWC: torch.Tensor, index_BM: torch.Tensor, tubelet: tuple[int, int, int], normalize: Normalize) -> torch.Tensor:
    """What the decoder should predict: float [B, M, P], P ordered (frame, row, column, channel).

    Statistics are taken in stored units (integers for uint8), so a flat tubelet gives exactly 0.
    channel: (x - mean_c) / (sqrt(var_c) + eps), VideoMAE; tubelet: (x - mean) / sqrt(var + eps), MAE and mae_st; var unbiased.
    """
    compute = torch.float64 if clip_BTHWC.dtype == torch.float64 else torch.float32
    white = pixel_range(clip_BTHWC.dtype)
    pixels = rearrange(take_tubelets(clip_BTHWC, index_BM, tubelet), "b m t p q c -> b m (t p q) c").to(compute)
    if normalize == "channel":
        variance, mean = torch.var_mean(pixels, dim=2, keepdim=True)
        pixels = (pixels - mean) / (variance.sqrt() + EPSILON * white)
    elif normalize == "tubelet":
        variance, mean = torch.var_mean(pixels, dim=(2, 3), keepdim=True)
        pixels = (pixels - mean) / (variance + EPSILON * white**2).sqrt()
    else:
        pixels = pixels / white
    return pixels.flatten(2)


def weighted_mean(error_BM: torch.Tensor, weight_BM: torch.Tensor | None) -> torch.Tensor:
    """sum(w * e) / sum(w), the mean where no weights are given, and 0 where nothing counts."""
    if weight_BM is None:
        return error_BM.sum() / max(error_BM.numel(), 1)
    return (weight_BM * error_BM).sum() / total_weight(weight_BM)


def total_weight(weight_BM: torch.Tensor) -> torch.Tensor:
    """The sum of the weights, 1 where it is 0: a batch in which no token counts has loss 0, not NaN."""
    total = weight_BM.sum()
    return torch.where(total == 0, 1.0, total)


def reconstruction_loss(predicted_BMP: torch.Tensor, clip_BTHWC: torch.Tensor, index_BM: torch.Tensor, tubelet: tuple[int, int, int],
                        normalize: Normalize, weight_BM: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean squared error, targets_BMP)."""
    targets_BMP = tubelet_targets(clip_BTHWC, index_BM, tubelet, normalize)
    error_BM = (predicted_BMP.to(targets_BMP.dtype) - targets_BMP).square().mean(-1)
    return weighted_mean(error_BM, weight_BM), targets_BMP


def joint_loss(predicted_BMP: torch.Tensor, clip_BTHWC: torch.Tensor, index_BM: torch.Tensor, tubelet: tuple[int, int, int],
               normalize: Normalize, temperature: float | torch.Tensor, negatives: Negatives,
               contrastive_weight: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(L_rec + contrastive_weight * L_con, L_rec, L_con), the gradient in the first alone."""
    reconstruction, target_BMP = reconstruction_loss(predicted_BMP, clip_BTHWC, index_BM, tubelet, normalize)
    contrastive = contrastive_loss(predicted_BMP, target_BMP, temperature, negatives)
    return reconstruction + contrastive_weight * contrastive, reconstruction.detach(), contrastive.detach()


def contrastive_loss(predicted_BMP: torch.Tensor, target_BMP: torch.Tensor, temperature: float | torch.Tensor,
                     negatives: Negatives) -> torch.Tensor:
    """mean_i -log(exp(s_ii / tau) / sum_j exp(s_ij / tau)), s the cosine similarity of prediction i and target j.

    A target of zeros (a flat tubelet) has no direction: it is a negative of similarity 0 for others, and no term of the mean.
    """
    if negatives == "batch":
        predicted_BMP, target_BMP = predicted_BMP.flatten(0, 1)[None], target_BMP.flatten(0, 1)[None]
    compute = torch.promote_types(predicted_BMP.dtype, torch.float32)
    predicted_BMP, target_BMP = (F.normalize(x.to(compute), dim=-1, eps=NORM_FLOOR) for x in (predicted_BMP, target_BMP))
    with torch.autocast(predicted_BMP.device.type, enabled=False):
        logits_BMM = predicted_BMP @ target_BMP.transpose(1, 2) / temperature
    loss_BM = logits_BMM.logsumexp(-1) - logits_BMM.diagonal(dim1=1, dim2=2)
    has_direction_BM = target_BMP.any(dim=-1)
    return torch.where(has_direction_BM, loss_BM, 0.0).sum() / has_direction_BM.sum().clamp(min=1)
