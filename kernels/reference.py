"""The fused operations in plain PyTorch: the truth in tests, and the path on a CPU.

Letters: B clips, T frames, H W pixels, C channels, N tokens, V visible, M masked, P values of a
tubelet, h heads, d head width.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Normalize = Literal["channel", "tubelet", "none"]
Negatives = Literal["clip", "batch"]
Tubelet = tuple[int, int, int]  # frames, rows, columns

EPSILON = 1e-6  # of the normalised targets, for pixels in [0, 1]
# cosine similarity takes shorter vectors for this long, which bounds its gradient
NORM_FLOOR = 1e-3


def packed_attention(qkv_BN3HD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v written out; returns out_BNHD."""
    q, k, v = rearrange(qkv_BN3HD, "b n three h d -> three b h n d")
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
    return rearrange(weights @ v, "b h n d -> b n h d")


def take_rows(clip_BTHWC: Tensor, index_BV: Tensor, tubelet: Tubelet) -> Tensor:
    """The rows of the chosen tubelets, untouched, as [B, V, t p, q C]: only these are read.

    A row of a tubelet is one run of memory, which a CPU copies in one go and computes with at full
    width: pixel by pixel, three values at a time, everything here would take several times as long.
    """
    t, p, q = tubelet
    _, frames, height, width, channels = clip_BTHWC.shape
    grid_height, grid_width = height // p, width // q
    # of one frame after another, row by row, grid_width to a row of pixels
    rows = clip_BTHWC.reshape(-1, q * channels)
    batch_B1 = torch.arange(clip_BTHWC.shape[0], device=index_BV.device)[:, None]
    frame_BV, place_BV = (
        index_BV // (grid_height * grid_width) * t,
        index_BV // grid_width % grid_height * p,
    )
    first_BV = (
        (batch_B1 * frames + frame_BV) * height + place_BV
    ) * grid_width + index_BV % grid_width
    frame_t1, row_p = (
        torch.arange(t, device=index_BV.device)[:, None],
        torch.arange(p, device=index_BV.device),
    )
    row_BVR = first_BV[:, :, None] + ((frame_t1 * height + row_p) * grid_width).flatten()
    return rows.index_select(0, row_BVR.flatten()).view(*row_BVR.shape, q * channels)


def pixel_range(dtype: torch.dtype) -> float:
    """What a white pixel is stored as: 255 for uint8, 65535 for uint16, 1 for floating point."""
    return {torch.uint8: 255.0, torch.uint16: 65535.0}.get(dtype, 1.0)


def gather_tubelets(
    clip_BTHWC: Tensor,
    index_BV: Tensor,
    tubelet: Tubelet,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Normalised tubelets [B, V, P], P ordered (channel, frame, row, column) as in a Conv3d."""
    compute = torch.promote_types(dtype, torch.float32)
    (t, p, q), channels = tubelet, clip_BTHWC.shape[-1]
    mean_C, std_C = (
        torch.tensor(values, device=clip_BTHWC.device, dtype=compute).expand(channels)
        for values in (mean, std)
    )
    scale_C = 1 / (pixel_range(clip_BTHWC.dtype) * std_C)
    rows = take_rows(clip_BTHWC, index_BV, tubelet).to(compute) * scale_C.repeat(q) - (
        mean_C / std_C
    ).repeat(q)
    return rearrange(rows, "b v (t p) (q c) -> b v (c t p q)", t=t, p=p, q=q, c=channels).to(dtype)


def tubelet_targets(
    clip_BTHWC: Tensor,
    index_BM: Tensor,
    tubelet: Tubelet,
    normalize: Normalize,
) -> Tensor:
    """What the decoder should predict: float [B, M, P], P ordered (frame, row, column, channel).

    Statistics are taken in stored units, from the first pixel on, so a flat tubelet gives exactly 0
    whatever the dtype. channel: (x - mean_c) / (sqrt(var_c) + eps), VideoMAE; tubelet: (x - mean) /
    sqrt(var + eps), MAE and mae_st; var unbiased.
    """
    compute = torch.float64 if clip_BTHWC.dtype == torch.float64 else torch.float32
    white, (t, p, q), channels = pixel_range(clip_BTHWC.dtype), tubelet, clip_BTHWC.shape[-1]
    rows = take_rows(clip_BTHWC, index_BM, tubelet).to(compute)
    if normalize == "none":
        return (rows / white).flatten(2)

    def total(values: Tensor) -> Tensor:
        """The sums over a tubelet's channels, or over all of it, repeated to a row's length."""
        sums_BMC = values.sum(2).unflatten(2, (q, channels)).sum(2)
        return (
            sums_BMC
            if normalize == "channel"
            else sums_BMC.sum(2, keepdim=True).expand_as(sums_BMC)
        ).repeat(1, 1, q)[:, :, None]

    count = t * p * q * (1 if normalize == "channel" else channels)
    first = (
        rows[:, :, :1, :channels]
        if normalize == "channel"
        else rows[:, :, :1, :1].expand(-1, -1, -1, channels)
    )
    rows -= first.repeat(1, 1, 1, q)
    rows -= total(rows) / count
    variance = total(rows.square()) / (count - 1)
    rows /= (
        variance.sqrt() + EPSILON * white
        if normalize == "channel"
        else (variance + EPSILON * white**2).sqrt()
    )
    return rows.flatten(2)


class _SquaredLength(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=-1).square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0][..., None] * ctx.saved_tensors[0]


def squared_length(x: Tensor) -> Tensor:
    """x.square().sum(-1); autograd alone would make five more tensors of the size of x for it."""
    return _SquaredLength.apply(x)  # pyright: ignore[reportReturnType]


def mean_error(error_BM: Tensor) -> Tensor:
    """The mean, 0 where there is nothing."""
    return error_BM.sum() / max(error_BM.numel(), 1)


def reconstruction_loss(
    predicted_BMP: Tensor,
    clip_BTHWC: Tensor,
    index_BM: Tensor,
    tubelet: Tubelet,
    normalize: Normalize,
) -> tuple[Tensor, Tensor]:
    """(mean squared error, targets_BMP)."""
    targets_BMP = tubelet_targets(clip_BTHWC, index_BM, tubelet, normalize)
    error_BM = (
        squared_length(predicted_BMP.to(targets_BMP.dtype) - targets_BMP) / targets_BMP.shape[-1]
    )
    return mean_error(error_BM), targets_BMP


def contrastive_loss(
    predicted_BMP: Tensor,
    target_BMP: Tensor,
    temperature: float | Tensor,
    negatives: Negatives,
) -> Tensor:
    """Mean over clips of mean_i -log(exp(s_ii / tau) / sum_j exp(s_ij / tau)), s the cosine
    similarity of prediction i and target j.

    A target of zeros (a flat tubelet) has no direction: it is a negative of similarity 0 for
    others, and no term of its clip's mean. A clip without any term has loss 0 and counts: a batch
    is the mean of its clips. Negatives of the batch: all is one clip.
    """
    if negatives == "batch":
        predicted_BMP, target_BMP = (
            predicted_BMP.flatten(0, 1)[None],
            target_BMP.flatten(0, 1)[None],
        )
    compute = torch.promote_types(predicted_BMP.dtype, torch.float32)
    predicted_BMP, target_BMP = (
        F.normalize(x.to(compute), dim=-1, eps=NORM_FLOOR) for x in (predicted_BMP, target_BMP)
    )
    with torch.autocast(predicted_BMP.device.type, enabled=False):
        logits_BMM = predicted_BMP @ target_BMP.transpose(1, 2) / temperature
    loss_BM = logits_BMM.logsumexp(-1) - logits_BMM.diagonal(dim1=1, dim2=2)
    has_direction_BM = target_BMP.any(dim=-1)
    mean_B = torch.where(has_direction_BM, loss_BM, 0.0).sum(1) / has_direction_BM.sum(1).clamp(
        min=1
    )
    return mean_B.sum() / max(len(mean_B), 1)
