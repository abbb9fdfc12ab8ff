"""L_rec + lambda * L_con: one read of the clip; on the fast way one operation with one buffer for
the gradient of the prediction.

The residuals of the reconstruction are that buffer: L_con adds its gradient to them in the same
unit, 2 / (B M P).
Letters: B clips, T frames, H W pixels, C channels, M masked, P values of a tubelet.
"""

from typing import Any

import torch

from . import contrastive, reference
from .contrastive import Memory, contrastive_loss
from .dispatch import choose
from .launch import register
from .reconstruction import (
    check_arguments,
    reconstruction_loss,
    reconstruction_loss_and_targets,
    scale_tokens,
    token_errors,
)
from .reference import Negatives, Normalize
from .tubelets import check_dtypes


def joint_loss(
    predicted_BMP: torch.Tensor,
    clip_BTHWC: torch.Tensor,
    index_BM: torch.Tensor,
    tubelet: tuple[int, int, int],
    normalize: Normalize,
    temperature: float | torch.Tensor,
    negatives: Negatives,
    contrastive_weight: float,
    impl: str = "auto",
    memory: Memory = "fast",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(L_rec + contrastive_weight * L_con, L_rec, L_con) as float32 scalars; the first alone has a
    gradient, the others tell its parts.

    Arguments as in `reconstruction_loss` and `contrastive_loss`; `temperature` gets a gradient
    where it is a tensor that needs one. memory (of the kernels): "least" streams the similarities
    instead of keeping chunks of them, and computes them twice. With contrastive_weight = 0 no
    contrastive loss is computed: it is 0. The kernels compare predictions with targets of the
    prediction's dtype. Raises: ValueError for a shape, dtype or index that does not fit.
    """
    check_arguments("joint_loss", predicted_BMP, clip_BTHWC, index_BM, tubelet, normalize)
    if negatives not in ("clip", "batch"):
        raise ValueError(f"joint_loss: negatives {negatives} is not one of clip, batch")
    if memory not in ("fast", "least"):
        raise ValueError(f"joint_loss: memory {memory} is not one of fast, least")
    if isinstance(temperature, torch.Tensor) and (
        temperature.numel() != 1 or temperature.device != predicted_BMP.device
    ):
        raise ValueError(
            f"joint_loss: temperature has shape {tuple(temperature.shape)} on {temperature.device}, not one value on "
            f"{predicted_BMP.device}"
        )
    if contrastive_weight == 0:
        loss = reconstruction_loss(predicted_BMP, clip_BTHWC, index_BM, tubelet, normalize, impl)
        return loss, loss.detach(), torch.zeros_like(loss)
    if choose("reconstruction_loss", impl, clip_BTHWC.device) == "reference":
        if isinstance(temperature, torch.Tensor):
            temperature = temperature.reshape(())
        return reference.joint_loss(
            predicted_BMP,
            clip_BTHWC,
            index_BM,
            tubelet,
            normalize,
            temperature,
            negatives,
            contrastive_weight,
        )
    check_dtypes("joint_loss", clip_BTHWC.dtype, predicted_BMP.dtype)
    if memory == "least":
        reconstruction, target_BMP = reconstruction_loss_and_targets(
            predicted_BMP,
            clip_BTHWC,
            index_BM,
            tubelet,
            normalize,
            "triton",
            target_dtype=predicted_BMP.dtype,
        )
        contrastive_part = contrastive_loss(
            predicted_BMP, target_BMP, temperature, negatives, "triton", "least"
        )
        return (
            reconstruction + contrastive_weight * contrastive_part,
            reconstruction.detach(),
            contrastive_part.detach(),
        )
    if not isinstance(temperature, torch.Tensor):
        temperature = torch.full((), temperature, dtype=torch.float32, device=predicted_BMP.device)
    with_gradient = torch.is_grad_enabled() and (
        predicted_BMP.requires_grad or temperature.requires_grad
    )
    return _Joint.apply(
        predicted_BMP,
        temperature.reshape(()).float(),
        clip_BTHWC,
        index_BM,
        tubelet,
        normalize,
        negatives,
        float(contrastive_weight),
        with_gradient,
    )[:3]


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(
        predicted_BMP: torch.Tensor,
        temperature: torch.Tensor,
        clip_BTHWC: torch.Tensor,
        index_BM: torch.Tensor,
        tubelet: tuple[int, int, int],
        normalize: Normalize,
        negatives: Negatives,
        contrastive_weight: float,
        with_gradient: bool,
    ) -> tuple[torch.Tensor, ...]:
        return _joint_op(
            predicted_BMP,
            temperature,
            clip_BTHWC,
            index_BM,
            tubelet,
            normalize,
            negatives,
            contrastive_weight,
            with_gradient,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        _, *parts, gradient_BMP, temperature_gradient = output
        ctx.mark_non_differentiable(*parts, gradient_BMP, temperature_gradient)
        ctx.save_for_backward(gradient_BMP, temperature_gradient)
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient_BMP, temperature_gradient = ctx.saved_tensors
        gradient_BMP = scale_tokens(
            gradient_BMP, grad_loss.expand(gradient_BMP.shape[:2]), _unit(gradient_BMP), ctx.dtype
        )
        return (
            gradient_BMP,
            grad_loss * temperature_gradient,
            None,
            None,
            None,
            None,
            None,
            None,
            None,
        )


def _unit(predicted_BMP: torch.Tensor) -> float:
    """dL_rec / d(prediction) of a residual of 1."""
    return 2 / max(predicted_BMP.numel(), 1)


@torch.no_grad()
def _joint(
    predicted_BMP: torch.Tensor,
    temperature: torch.Tensor,
    clip_BTHWC: torch.Tensor,
    index_BM: torch.Tensor,
    tubelet: list[int],
    normalize: Normalize,
    negatives: Negatives,
    contrastive_weight: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, ...]:
    """(loss, L_rec, L_con, d(loss) / d(prediction) in units of `_unit`, d(loss) / d(temperature));
    without a gradient the last two are empty and 0.
    """
    error_BM, target_BMP, gradient_BMP = token_errors(
        predicted_BMP,
        clip_BTHWC,
        index_BM,
        tubelet,
        normalize,
        _gradient_dtype(predicted_BMP) if with_gradient else None,
        predicted_BMP.dtype,
    )
    reconstruction = reference.weighted_mean(error_BM, None)
    if predicted_BMP.numel() == 0:
        zero = torch.zeros_like(reconstruction)
        return reconstruction, zero, zero.clone(), gradient_BMP, zero.clone()
    contrastive_part, temperature_gradient = contrastive.contrastive_forward(
        predicted_BMP,
        target_BMP,
        temperature,
        negatives,
        gradient_BMP if with_gradient else None,
        contrastive_weight / _unit(predicted_BMP),
    )
    if with_gradient:
        temperature_gradient = contrastive_weight * temperature_gradient.reshape(())
    else:
        temperature_gradient = torch.zeros_like(temperature)
    return (
        reconstruction + contrastive_weight * contrastive_part,
        reconstruction,
        contrastive_part,
        gradient_BMP,
        temperature_gradient,
    )


def _joint_fake(
    predicted_BMP: torch.Tensor,
    temperature: torch.Tensor,
    clip_BTHWC: torch.Tensor,
    index_BM: torch.Tensor,
    tubelet: list[int],
    normalize: Normalize,
    negatives: Negatives,
    contrastive_weight: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, ...]:
    loss, reconstruction, contrastive_part, temperature_gradient = (
        torch.empty((), dtype=torch.float32, device=predicted_BMP.device) for _ in range(4)
    )
    dtype = _gradient_dtype(predicted_BMP) if with_gradient else torch.float32
    gradient_BMP = torch.empty(
        predicted_BMP.shape if with_gradient else 0, dtype=dtype, device=predicted_BMP.device
    )
    return loss, reconstruction, contrastive_part, gradient_BMP, temperature_gradient


def _gradient_dtype(predicted_BMP: torch.Tensor) -> torch.dtype:
    """float16 cannot hold what a cold temperature makes of a short prediction before the loss scale
    is known.
    """
    return torch.float32 if predicted_BMP.dtype == torch.float16 else predicted_BMP.dtype


_joint_op = register(
    "joint_loss(Tensor predicted, Tensor temperature, Tensor clip, Tensor index, int[] tubelet, str normalize, "
    "str negatives, float contrastive_weight, bool with_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _joint,
    _joint_fake,
)
