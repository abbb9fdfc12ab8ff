"""The operations that are benchmarked: inputs, definition, least work, and all that can compute it.

Letters: B clips, T frames, H W pixels, C channels, N tokens, V visible, M masked, P values of a
tubelet, D width of the encoder; of attention B clips, N tokens, H heads, D head width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from video_mae.benchmark.clock import Work
from video_mae.kernels import reference
from video_mae.kernels.contrastive import contrastive_loss
from video_mae.kernels.dispatch import choose
from video_mae.kernels.joint import joint_loss
from video_mae.kernels.reconstruction import reconstruction_loss
from video_mae.kernels.reference import Negatives
from video_mae.kernels.tubelets import gather_tubelets

Inputs = Any
"""A SimpleNamespace of tensors; those that need a gradient say so."""
Provider = Callable[[Inputs], Tensor]
"""One way to compute an operation, with an autograd graph where something needs a gradient."""

MODES = ("forward", "backward", "both")
TUBELET, VALUES = (2, 16, 16), 1536
EDGES = {"r": 2, "p": 16, "q": 16}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEMPERATURE, CONTRASTIVE_WEIGHT = 0.1, 0.1
CONTRAST: Any = (TEMPERATURE, "clip", CONTRASTIVE_WEIGHT)
INDEX_BYTES = 8


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for fixed shapes."""
    return torch.compile(function, dynamic=False)


@dataclass
class Operation(ABC):
    """One operation at one shape."""

    name: str
    dtype: torch.dtype
    device: torch.device
    batch: int

    op = kernel = form = ""  # here, as dispatch.py calls it, and its name at a shape
    baseline = "official"  # the provider that speed-ups are against: what people run today
    modes = MODES
    loss_limit = 0.0  # of the relative error of a result that is one number
    # providers that CUDA cannot record: a boolean mask waits for the device
    waiting = ("official", "official compiled")
    triton = {"triton": {}}  # our ways beside auto, their arguments

    @property
    def shape(self) -> str:
        """Its name, as the key `shapes` and the tables have it."""
        return self.form.format_map(vars(self))

    @abstractmethod
    def inputs(self) -> Inputs:
        """Random; `upstream` is the gradient of the result, for a loss a number that brings the
        gradients near 1.
        """

    @abstractmethod
    def definition(self, x: Inputs) -> Tensor:
        """The operation, in the precision of its inputs."""

    @abstractmethod
    def ours(self, x: Inputs, **way: Any) -> Tensor:
        """By the kernels."""

    @abstractmethod
    def work(self, mode: str) -> Work:
        """The fewest floating-point operations and bytes; only what is needed counts, whatever a
        provider computes beside it.
        """

    def official(self, x: Inputs) -> Tensor:
        """The baseline, where it is not the definition."""
        return self.definition(x)

    def facts(self) -> dict[str, int]:
        """Figures of the shape, which plots need."""
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}

    def low(self, x: Inputs) -> Tensor:
        """What PyTorch's own arithmetic gives in the inputs' dtype: the yardstick of `judge`."""
        return self.definition(x)

    def sample(self, result: Tensor) -> Tensor:
        """The part of an input or result that is checked."""
        return result

    def named(self, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The gradients of the inputs, as verdicts call them."""
        return {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}

    def providers(self) -> dict[str, Provider]:
        """Every way to compute it; those of this project begin with `ours`."""
        found = {
            self.baseline: self.official,
            f"{self.baseline} compiled": compiled(self.official),
            "reference": self.definition,
            "reference compiled": compiled(self.definition),
        }
        for name, way in self.triton.items():
            found[f"ours {name}"] = partial(self.ours, impl="triton", **way)
        return {**found, "ours auto": partial(self.ours, impl="auto")}

    def resolved(self, x: Inputs) -> dict[str, str]:
        """What the name of a provider stands for here."""
        return {"ours auto": choose(self.kernel, "auto", self.device)}

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)


@dataclass
class ClipOperation(Operation):
    """An operation on `count` tubelets of each clip of a batch."""

    size: tuple[int, int, int]
    count: int
    width: int  # of the encoder

    form = "{name} {batch}x{size[0]}x{size[1]}x{size[2]}, {count} tokens"

    @property
    def num_values(self) -> int:
        return self.batch * self.count * VALUES

    def inputs(self) -> Inputs:
        """A clip twice, as ours takes it (uint8) and as the official code does (normalised floats,
        made here, untimed, as the official loader makes them on the CPU), with the tokens that
        count as indices and as a boolean mask.
        """
        shape = (self.batch, *self.size, 3)
        clip_BTHWC = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        mean, std = torch.tensor((MEAN, STD), device=self.device).view(2, 3, 1, 1, 1)
        video_BCTHW = (rearrange(clip_BTHWC, "b t h w c -> b c t h w") / 255 - mean) / std
        num_tokens = clip_BTHWC[0].numel() // VALUES
        order_BN = torch.rand(self.batch, num_tokens, device=self.device).argsort(dim=1)
        index_BN = order_BN[:, : self.count].sort(dim=1).values
        return SimpleNamespace(
            clip_BTHWC=clip_BTHWC,
            video_BCTHW=video_BCTHW.contiguous(),
            index_BN=index_BN,
            mask_BN=torch.zeros_like(order_BN, dtype=torch.bool).scatter_(1, index_BN, True),
            mean=mean,
            std=std,
        )

    def read_bytes(self) -> int:
        """Of the pixels of the tubelets, as many numbers, and the index."""
        return self.num_values * (1 + self.dtype.itemsize) + INDEX_BYTES * self.batch * self.count


class GatherOperation(ClipOperation):
    """gather_tubelets: no gradient, a clip is data."""

    op, kernel, modes = "gather", "gather_tubelets", ("forward",)
    waiting = (*ClipOperation.waiting, "reference")  # which copies to the device

    def definition(self, x: Inputs) -> Tensor:
        is_exact = x.clip_BTHWC.dtype == torch.float64
        dtype = torch.float64 if is_exact else self.dtype
        return reference.gather_tubelets(x.clip_BTHWC, x.index_BN, TUBELET, MEAN, STD, dtype)

    def official(self, x: Inputs) -> Tensor:
        video_BCTHW = x.video_BCTHW.to(self.dtype)
        patches_BNP = rearrange(
            video_BCTHW, "b c (t r) (h p) (w q) -> b (t h w) (c r p q)", **EDGES
        )
        return patches_BNP[x.mask_BN].reshape(self.batch, -1, VALUES)

    def ours(self, x: Inputs, **way: Any) -> Tensor:
        return gather_tubelets(x.clip_BTHWC, x.index_BN, TUBELET, MEAN, STD, self.dtype, **way)

    def work(self, mode: str) -> Work:
        return Work(0, self.read_bytes())


class EmbedOperation(GatherOperation):
    """Gather and embedding: the gradient is that of its weight and bias. The official code embeds
    all tokens and drops most of them.
    """

    op, modes = "embed", MODES

    def inputs(self) -> Inputs:
        x = super().inputs()
        x.weight_DP = (self.normal(self.width, VALUES) * VALUES**-0.5).requires_grad_()
        x.bias_D = self.normal(self.width).requires_grad_()
        x.upstream = self.normal(self.batch, self.count, self.width)
        return x

    def definition(self, x: Inputs) -> Tensor:
        return F.linear(super().definition(x), x.weight_DP, x.bias_D)

    def official(self, x: Inputs) -> Tensor:
        weight = x.weight_DP.unflatten(1, (3, *TUBELET))
        tokens_BDTHW = F.conv3d(x.video_BCTHW.to(self.dtype), weight, x.bias_D, stride=TUBELET)
        tokens_BND = tokens_BDTHW.flatten(2).transpose(1, 2)
        return tokens_BND[x.mask_BN].reshape(self.batch, -1, self.width)

    def ours(self, x: Inputs, **way: Any) -> Tensor:
        return F.linear(super().ours(x, **way), x.weight_DP, x.bias_D)

    def work(self, mode: str) -> Work:
        """Forward the visible pixels, the weight and the tokens; backward the pixels again, the
        tokens' gradient and the weight's.
        """
        passes = 2 if mode == "both" else 1
        pixels = self.batch * self.count * (VALUES + INDEX_BYTES)
        numbers = self.batch * self.count * self.width + (VALUES + 1) * self.width
        num_bytes = pixels + numbers * self.dtype.itemsize
        return Work(passes * 2 * self.num_values * self.width, passes * num_bytes)


class ReconstructionOperation(ClipOperation):
    """reconstruction_loss, targets normalised per channel."""

    op, kernel = "reconstruction", "reconstruction_loss"
    loss_limit = 1e-5

    def inputs(self) -> Inputs:
        x = super().inputs()
        x.predicted_BMP = self.normal(self.batch, self.count, VALUES).requires_grad_()
        x.upstream = torch.tensor(float(self.num_values), device=self.device)
        return x

    def arguments(self, x: Inputs) -> Any:
        return x.predicted_BMP, x.clip_BTHWC, x.index_BN, TUBELET, "channel"

    def definition(self, x: Inputs) -> Tensor:
        return reference.reconstruction_loss(*self.arguments(x))[0]

    def official(self, x: Inputs) -> Tensor:
        return F.mse_loss(x.predicted_BMP.float(), self.official_targets(x))

    def ours(self, x: Inputs, **way: Any) -> Tensor:
        return reconstruction_loss(*self.arguments(x), **way)

    def work(self, mode: str) -> Work:
        """Predictions and their pixels read, and the gradient written; both passes in one need not
        read twice.
        """
        written = 0 if mode == "forward" else self.num_values * self.dtype.itemsize
        return Work(0, self.read_bytes() + written)

    @torch.no_grad()
    def official_targets(self, x: Inputs) -> Tensor:
        """The recipe of VideoMAE's training code: undo the normalisation of the floats, cut all
        tokens, normalise them, drop some.
        """
        pixels_BCTHW = x.video_BCTHW * x.std + x.mean
        patches = rearrange(pixels_BCTHW, "b c (t r) (h p) (w q) -> b (t h w) (r p q) c", **EDGES)
        variance = patches.var(dim=2, unbiased=True, keepdim=True)
        patches = (patches - patches.mean(dim=2, keepdim=True)) / (variance.sqrt() + 1e-6)
        return patches.flatten(2)[x.mask_BN].reshape(self.batch, -1, VALUES)


class JointOperation(ReconstructionOperation):
    """joint_loss: both losses and one gradient."""

    op, loss_limit = "joint", 1e-4
    triton = {"triton": {}, "least": {"memory": "least"}}

    def definition(self, x: Inputs) -> Tensor:
        return self.ours(x, impl="reference")

    def low(self, x: Inputs) -> Tensor:
        return plain_joint(x, *reference.reconstruction_loss(*self.arguments(x)))

    def official(self, x: Inputs) -> Tensor:
        target_BMP = self.official_targets(x)
        return plain_joint(x, F.mse_loss(x.predicted_BMP.float(), target_BMP), target_BMP)

    def ours(self, x: Inputs, **way: Any) -> Tensor:
        return joint_loss(*self.arguments(x), *CONTRAST, **way)[0]

    def work(self, mode: str) -> Work:
        products = 2 if mode == "both" else 1
        return Work(products * 2 * self.count * self.num_values, super().work(mode).bytes)


@dataclass
class ContrastiveOperation(Operation):
    """contrastive_loss of given targets, which the predictions resemble."""

    count: int
    negatives: Negatives

    op, kernel, baseline = "contrastive", "contrastive_loss", "plain"
    form = "{name} {batch}x{count}, negatives of the {negatives}"
    loss_limit = 1e-4
    triton = {
        "fast": {},
        "fast, 256 MB": {"scratch_bytes": 256 << 20},
        "least": {"memory": "least"},
    }

    def inputs(self) -> Inputs:
        target_BMP, noise_BMP = (self.normal(self.batch, self.count, VALUES) for _ in range(2))
        return SimpleNamespace(
            predicted_BMP=(0.3 * target_BMP + noise_BMP).requires_grad_(),
            target_BMP=target_BMP,
            upstream=torch.tensor(float(self.batch * self.count), device=self.device),
        )

    def arguments(self, x: Inputs) -> Any:
        return x.predicted_BMP, x.target_BMP, TEMPERATURE, self.negatives

    def definition(self, x: Inputs) -> Tensor:
        return reference.contrastive_loss(*self.arguments(x))

    def official(self, x: Inputs) -> Tensor:
        return plain_contrastive(x.predicted_BMP, x.target_BMP, self.negatives)

    low = official

    def ours(self, x: Inputs, **way: Any) -> Tensor:
        return contrastive_loss(*self.arguments(x), **way)

    def work(self, mode: str) -> Work:
        """One product of all predictions with their rivals forward, one of its softmax with the
        targets backward.
        """
        rows = self.batch * self.count
        rivals = self.count if self.negatives == "clip" else rows
        products = 2 if mode == "both" else 1
        tensors = 2 if mode == "forward" else 3
        flops = products * 2 * rows * rivals * VALUES
        return Work(flops, tensors * rows * VALUES * self.dtype.itemsize)


def plain_joint(x: Inputs, loss: Tensor, target_BMP: Tensor) -> Tensor:
    """A reconstruction loss and, weighted, the contrastive loss."""
    return loss + CONTRASTIVE_WEIGHT * plain_contrastive(x.predicted_BMP, target_BMP, "clip")


def plain_contrastive(predicted_BMP: Tensor, target_BMP: Tensor, negatives: Negatives) -> Tensor:
    """InfoNCE as it is usually written: normalise, multiply, cross-entropy; in the precisions that
    autocast chooses.
    """
    dtype = predicted_BMP.dtype
    units = []
    for x_BMP in (predicted_BMP, target_BMP):
        if negatives == "batch":
            x_BMP = x_BMP.flatten(0, 1)[None]
        units.append(F.normalize(x_BMP.float(), dim=-1, eps=reference.NORM_FLOOR).to(dtype))
    logits_BMM = (units[0] @ units[1].transpose(1, 2) / TEMPERATURE).float()
    labels = torch.arange(logits_BMM.shape[1], device=logits_BMM.device).repeat(len(logits_BMM))
    return F.cross_entropy(logits_BMM.flatten(0, 1), labels)
