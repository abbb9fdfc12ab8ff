"""L_con: each predicted tubelet should resemble its own target more than the targets of other
tubelets.

Two ways on a GPU: fast (contrastive_chunked.py) and least memory (contrastive_streaming.py).

Letters: B clips, M predicted tubelets, P values of a tubelet.
"""

from typing import Literal

import torch
from torch import Tensor

from . import contrastive_chunked as chunked
from . import contrastive_streaming as streaming
from . import reference
from .dispatch import choose
from .reference import Negatives
from .tubelets import FLOAT_TYPES

Memory = Literal["fast", "least"]


def dense(predicted_BMP: Tensor, target_BMP: Tensor, negatives: Negatives) -> tuple[Tensor, Tensor]:
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


def checked_temperature(
    operation: str,
    predicted_BMP: Tensor,
    temperature: float | Tensor,
    negatives: str,
    memory: str,
) -> float | Tensor:
    """The temperature, of shape [1] where it is a tensor. Raises: ValueError naming the argument
    that does not fit.
    """
    if negatives not in ("clip", "batch"):
        raise ValueError(f"{operation}: negatives {negatives} is not one of clip, batch")
    if memory not in ("fast", "least"):
        raise ValueError(f"{operation}: memory {memory} is not one of fast, least")
    if not isinstance(temperature, Tensor):
        return temperature
    if temperature.numel() != 1 or temperature.device != predicted_BMP.device:
        raise ValueError(
            f"{operation}: temperature has shape {tuple(temperature.shape)}, not one value on "
            f"{predicted_BMP.device}, or is on {temperature.device}"
        )
    return temperature.reshape(1)


def float32_temperature(predicted_BMP: Tensor, temperature: float | Tensor) -> Tensor:
    """As the kernels take it, [1]."""
    if isinstance(temperature, Tensor):
        return temperature.float()
    return torch.full((1,), temperature, dtype=torch.float32, device=predicted_BMP.device)


def contrastive_forward(
    predicted_BMP: Tensor,
    target_BMP: Tensor,
    temperature_1: Tensor,
    negatives: Negatives,
    gradient_BMP: Tensor | None,
    gradient_scale: float,
) -> tuple[Tensor, Tensor]:
    """(loss, d loss / d tau [1]), for objectives that keep one gradient of the prediction.

    By the fast kernels, without autograd. ADDS gradient_scale * d loss / d predicted to
    gradient_BMP, contiguous, where there is one. temperature_1: float32.
    """
    predicted, target = dense(predicted_BMP.detach(), target_BMP, negatives)
    gradient = None if gradient_BMP is None else gradient_BMP.view(predicted.shape)
    temperature_1, scratch = temperature_1.detach(), chunked.SCRATCH_BYTES
    return chunked.loss_and_gradient(
        predicted, target, temperature_1, gradient, gradient_scale, scratch
    )[:2]


def contrastive_loss(
    predicted_BMP: Tensor,
    target_BMP: Tensor,
    temperature: float | Tensor,
    negatives: Negatives = "clip",
    impl: str = "auto",
    memory: Memory = "fast",
    scratch_bytes: int = chunked.SCRATCH_BYTES,
) -> Tensor:
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
            f"contrastive_loss: predicted_BMP {tuple(predicted_BMP.shape)} and target_BMP "
            f"{tuple(target_BMP.shape)} must be equal, (B, M, P)"
        )
    temperature = checked_temperature(
        "contrastive_loss", predicted_BMP, temperature, negatives, memory
    )
    chosen = choose("contrastive_loss", impl, predicted_BMP.device)
    if chosen == "reference" or predicted_BMP.numel() == 0:
        return reference.contrastive_loss(predicted_BMP, target_BMP, temperature, negatives)
    if predicted_BMP.dtype not in FLOAT_TYPES or not target_BMP.is_floating_point():
        raise ValueError(
            "contrastive_loss: impl triton takes bfloat16, float16 or float32, not predicted_BMP "
            f"of {predicted_BMP.dtype} and target_BMP of {target_BMP.dtype}; use impl reference"
        )
    if predicted_BMP.device != target_BMP.device:
        raise ValueError(
            f"contrastive_loss: predicted_BMP is on {predicted_BMP.device}, target_BMP on "
            f"{target_BMP.device}"
        )
    with_gradient = torch.is_grad_enabled() and predicted_BMP.requires_grad
    given = (
        *dense(predicted_BMP, target_BMP, negatives),
        float32_temperature(predicted_BMP, temperature),
    )
    if memory == "least":
        return streaming.forward(*given)[0]
    return chunked.forward(*given, with_gradient, scratch_bytes)[0]
