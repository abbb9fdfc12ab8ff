"""L_rec + lambda * L_con: one read of the clip; on the fast way one operation with one buffer for
the gradient of the prediction.

The residuals of the reconstruction are that buffer: L_con adds its gradient to them in the same
unit, 2 / (B M P).
Letters: B clips, T frames, H W pixels, C channels, M masked, P values of a tubelet.
"""

from typing import Any

import torch
from torch import Tensor

from . import reference
from .contrastive import (
    Memory,
    checked_temperature,
    contrastive_forward,
    contrastive_loss,
    float32_temperature,
)
from .dispatch import choose
from .launch import register
from .reconstruction import (
    check_arguments,
    reconstruction_loss,
    reconstruction_loss_and_targets,
    token_errors,
)
from .reference import Negatives, Normalize, Tubelet
from .scaling import scale_tokens
from .tubelets import check_dtypes


def joint_loss(
    predicted_BMP: Tensor,
    clip_BTHWC: Tensor,
    index_BM: Tensor,
    tubelet: Tubelet,
    normalize: Normalize,
    temperature: float | Tensor,
    negatives: Negatives,
    contrastive_weight: float,
    impl: str = "auto",
    memory: Memory = "fast",
) -> tuple[Tensor, Tensor, Tensor]:
    """(L_rec + contrastive_weight * L_con, L_rec, L_con) as float32 scalars; the first alone has a
    gradient, the others tell its parts.

    Arguments as in `reconstruction_loss` and `contrastive_loss`; `temperature` gets a gradient
    where it is a tensor that needs one. memory (of the kernels): "least" streams the similarities
    instead of keeping chunks of them, and computes them twice. With contrastive_weight = 0 no
    contrastive loss is computed: it is 0. The kernels compare predictions with targets of the
    prediction's dtype. Raises: ValueError for a shape, dtype or index that does not fit.
    """
    check_arguments("joint_loss", predicted_BMP, clip_BTHWC, index_BM, tubelet, normalize)
    temperature = checked_temperature("joint_loss", predicted_BMP, temperature, negatives, memory)
    if contrastive_weight == 0:
        loss = reconstruction_loss(predicted_BMP, clip_BTHWC, index_BM, tubelet, normalize, impl)
        return loss, loss.detach(), torch.zeros_like(loss)
    chosen = choose("reconstruction_loss", impl, clip_BTHWC.device)
    if chosen == "triton":
        check_dtypes("joint_loss", clip_BTHWC.dtype, predicted_BMP.dtype)
    if chosen == "reference" or memory == "least":
        target_dtype = predicted_BMP.dtype if chosen == "triton" else None
        reconstruction, target_BMP = reconstruction_loss_and_targets(
            predicted_BMP, clip_BTHWC, index_BM, tubelet, normalize, chosen, target_dtype
        )
        contrastive = contrastive_loss(
            predicted_BMP, target_BMP, temperature, negatives, chosen, memory
        )
        loss = reconstruction + contrastive_weight * contrastive
        return loss, reconstruction.detach(), contrastive.detach()
    temperature_1 = float32_temperature(predicted_BMP, temperature)
    with_gradient = torch.is_grad_enabled() and (
        predicted_BMP.requires_grad or temperature_1.requires_grad
    )
    return _joint_op(
        predicted_BMP,
        temperature_1,
        clip_BTHWC,
        index_BM,
        tubelet,
        normalize,
        negatives,
        float(contrastive_weight),
        with_gradient,
    )[:3]


def _unit(predicted_BMP: Tensor) -> float:
    """dL_rec / d(prediction) of a residual of 1."""
    return 2 / max(predicted_BMP.numel(), 1)


@torch.no_grad()
def _joint(
    predicted_BMP: Tensor,
    temperature_1: Tensor,
    clip_BTHWC: Tensor,
    index_BM: Tensor,
    tubelet: list[int],
    normalize: Normalize,
    negatives: Negatives,
    contrastive_weight: float,
    with_gradient: bool,
) -> tuple[Tensor, ...]:
    """(loss, L_rec, L_con, d(loss) / d(prediction) in units of `_unit`, d(loss) / d(temperature)).

    Without a gradient the last but one is empty.
    """
    gradient_dtype = None
    if with_gradient:
        # float16 cannot hold what a cold temperature makes of a short prediction before the loss
        # scale is known
        is_half = predicted_BMP.dtype == torch.float16
        gradient_dtype = torch.float32 if is_half else predicted_BMP.dtype
    error_BM, target_BMP, gradient_BMP = token_errors(
        predicted_BMP,
        clip_BTHWC,
        index_BM,
        tubelet,
        normalize,
        gradient_dtype,
        predicted_BMP.dtype,
    )
    reconstruction = reference.mean_error(error_BM)
    if predicted_BMP.numel() == 0:
        zeros = (torch.zeros_like(reconstruction) for _ in range(2))
        return reconstruction, *zeros, gradient_BMP, torch.zeros_like(temperature_1)
    contrastive, temperature_gradient_1 = contrastive_forward(
        predicted_BMP,
        target_BMP,
        temperature_1,
        negatives,
        gradient_BMP if with_gradient else None,
        contrastive_weight / _unit(predicted_BMP),
    )
    return (
        reconstruction + contrastive_weight * contrastive,
        reconstruction,
        contrastive,
        gradient_BMP,
        contrastive_weight * temperature_gradient_1,
    )


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    gradient_BMP, temperature_gradient_1 = ctx.saved_tensors
    gradient_BM = gradient.expand(gradient_BMP.shape[:2])
    dpredicted_BMP = scale_tokens(gradient_BMP, gradient_BM, _unit(gradient_BMP), ctx.dtype)
    return dpredicted_BMP, gradient * temperature_gradient_1


_joint_op = register(
    "joint_loss(Tensor predicted, Tensor temperature, Tensor clip, Tensor index, int[] tubelet, "
    "str normalize, str negatives, float contrastive_weight, bool with_gradient) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _joint,
    keeps=lambda inputs, results: results[3:],
    backward=_gradients,
)
