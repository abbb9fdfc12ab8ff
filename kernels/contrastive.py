"""L_con: each predicted tubelet should resemble its own target more than the targets of other
tubelets.

Two ways on a GPU: fast (contrastive_chunked.py) and least memory (contrastive_streaming.py).

Letters: B clips, M predicted tubelets, P values of a tubelet.
"""

from typing import Any, Literal

import torch

from . import contrastive_chunked as chunked
from . import contrastive_streaming as streaming
from . import reference
from .dispatch import choose
from .reference import Negatives

Memory = Literal["fast", "least"]


class _Fast(torch.autograd.Function):
    """The forward pass makes the gradient; the backward pass scales it."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        return chunked.loss_and_gradient(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        loss_gradient = gradients[0]
        dtemperature_1, weight_B, gradient_BMP = ctx.saved_tensors
        dpredicted_BMP = (
            chunked.scaled(gradient_BMP, loss_gradient * weight_B)
            if ctx.needs_input_grad[0]
            else None
        )
        return dpredicted_BMP, None, loss_gradient * dtemperature_1, None, None


class _Least(torch.autograd.Function):
    """The forward pass keeps a few floats a row; the backward pass computes the similarities again."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        return streaming.forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        loss_gradient = gradients[0]
        predicted_BMP, target_BMP, temperature_1, dtemperature_1, weight_B, *rows = (
            ctx.saved_tensors
        )
        dpredicted_BMP = None
        if ctx.needs_input_grad[0]:
            dpredicted_BMP = streaming.backward(
                predicted_BMP, target_BMP, temperature_1, loss_gradient * weight_B, *rows
            )
        return dpredicted_BMP, None, loss_gradient * dtemperature_1


def _arguments(
    predicted_BMP: torch.Tensor, target_BMP: torch.Tensor, negatives: Negatives
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the kernels take them: contiguous, of one dtype; negatives of the batch are those of one
    long clip.
    """
    target_BMP = target_BMP.detach().to(predicted_BMP.dtype)
    if negatives == "batch":
        predicted_BMP, target_BMP = (
            predicted_BMP.flatten(0, 1)[None],
            target_BMP.flatten(0, 1)[None],
        )
    return predicted_BMP.contiguous(), target_BMP.contiguous()


def contrastive_forward(
    predicted_BMP: torch.Tensor,
    target_BMP: torch.Tensor,
    temperature: torch.Tensor,
    negatives: Negatives,
    gradient_out: torch.Tensor | None,
    gradient_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, d loss / d tau), for objectives that keep one gradient of the prediction; by the fast
    kernels, without autograd.

    ADDS gradient_scale * d loss / d predicted to gradient_out, contiguous, where there is one.
    temperature: float32, one element.
    """
    predicted, target = _arguments(predicted_BMP.detach(), target_BMP, negatives)
    temperature_1 = temperature.detach().reshape(1)
    if gradient_out is None:
        loss, dtemperature_1 = chunked.loss_and_gradient(
            predicted, target, temperature_1, False, chunked.SCRATCH_BYTES
        )[:2]
    else:
        gradient = gradient_out.view(predicted.shape)
        loss, dtemperature_1 = chunked.add_gradient(
            predicted, target, temperature_1, gradient, gradient_scale, chunked.SCRATCH_BYTES
        )
    return loss, dtemperature_1.reshape(temperature.shape)


def contrastive_loss(
    predicted_BMP: torch.Tensor,
    target_BMP: torch.Tensor,
    temperature: float | torch.Tensor,
    negatives: Negatives = "clip",
    impl: str = "auto",
    memory: Memory = "fast",
    scratch_bytes: int = chunked.SCRATCH_BYTES,
) -> torch.Tensor:
    """InfoNCE over the masked tubelets, cosine similarity, in float32: the mean of the clips' means
    over targets that are not flat.

    temperature: tau, a number or a 0-d tensor that may need a gradient. negatives: the masked
    tubelets of the same clip, or of all clips given, which then count as one clip. target_BMP:
    data, it gets no gradient from the kernels, which take it in the dtype of predicted_BMP. memory
    (of the kernels): "fast" makes the gradient in the forward pass, with scratch_bytes (more is
    faster for thousands of negatives); "least" needs neither scratch nor that gradient, and
    computes the similarities again, several times.
    Raises: ValueError for shapes, dtypes or devices that do not fit. Source: van den Oord et al.
    (2018); patches of one image as negatives as in ConMIM (Yi et al., 2023).
    """
    if predicted_BMP.ndim != 3 or predicted_BMP.shape != target_BMP.shape:
        raise ValueError(
            f"contrastive_loss: predicted_BMP {tuple(predicted_BMP.shape)} and target_BMP {tuple(target_BMP.shape)} must be "
            "equal, (B, M, P)"
        )
    if negatives not in ("clip", "batch"):
        raise ValueError(f"contrastive_loss: negatives {negatives} is not one of clip, batch")
    if memory not in ("fast", "least"):
        raise ValueError(f"contrastive_loss: memory {memory} is not one of fast, least")
    if (
        choose("contrastive_loss", impl, predicted_BMP.device) == "reference"
        or predicted_BMP.numel() == 0
    ):
        return reference.contrastive_loss(predicted_BMP, target_BMP, temperature, negatives)
    if (
        predicted_BMP.dtype not in (torch.bfloat16, torch.float16, torch.float32)
        or not target_BMP.is_floating_point()
    ):
        raise ValueError(
            f"contrastive_loss: impl triton takes bfloat16, float16 or float32, not predicted_BMP of {predicted_BMP.dtype} "
            f"and target_BMP of {target_BMP.dtype}; use impl reference"
        )
    if isinstance(temperature, torch.Tensor):
        if temperature.numel() != 1:
            raise ValueError(
                f"contrastive_loss: temperature has shape {tuple(temperature.shape)}, not one value"
            )
        temperature_1 = temperature.reshape(1).float()
    else:
        temperature_1 = torch.full(
            (1,), temperature, dtype=torch.float32, device=predicted_BMP.device
        )
    if not predicted_BMP.device == target_BMP.device == temperature_1.device:
        raise ValueError(
            f"contrastive_loss: predicted_BMP is on {predicted_BMP.device}, target_BMP on {target_BMP.device}, temperature on "
            f"{temperature_1.device}"
        )
    predicted_BMP, target_BMP = _arguments(predicted_BMP, target_BMP, negatives)
    if memory == "least":
        return _Least.apply(predicted_BMP, target_BMP, temperature_1)[0]  # pyright: ignore
    with_gradient = torch.is_grad_enabled() and predicted_BMP.requires_grad
    return _Fast.apply(predicted_BMP, target_BMP, temperature_1, with_gradient, scratch_bytes)[0]  # pyright: ignore
