"""The operations on clips that are benchmarked: gather, embedding, and the losses, beside the
recipes that people use today.

Letters: B clips, T frames, H W pixels, C channels, N tokens, V visible, M masked, P values of a
tubelet, D width of the encoder.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange

from video_mae.benchmark.kernel_problems import Problem, Provider, compiled
from video_mae.benchmark.measure import Work
from video_mae.kernels import reference
from video_mae.kernels.contrastive import Memory, contrastive_loss
from video_mae.kernels.dispatch import choose
from video_mae.kernels.joint import joint_loss
from video_mae.kernels.reconstruction import reconstruction_loss
from video_mae.kernels.reference import Negatives
from video_mae.kernels.tubelets import gather_tubelets

TUBELET, VALUES = (2, 16, 16), 1536
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEMPERATURE, CONTRASTIVE_WEIGHT = 0.1, 0.1
LARGE_SCRATCH = 256 << 20
INDEX_BYTES = 8


class ClipInputs(NamedTuple):
    """A clip twice, as ours takes it (uint8) and as the official code does (normalised floats),
    with the tokens that count as indices and as a boolean mask; weights of the embedding, or
    predictions, need a gradient.
    """

    clip_BTHWC: torch.Tensor
    video_BCTHW: torch.Tensor
    index_BN: torch.Tensor
    mask_BN: torch.Tensor
    weight_DP: torch.Tensor | None = None
    bias_D: torch.Tensor | None = None
    dout_BVD: torch.Tensor | None = None
    predicted_BMP: torch.Tensor | None = None


class ClipProblem(Problem):
    """An operation on `count` tubelets of each clip of a batch."""

    baseline = "official"

    def __init__(
        self,
        name: str,
        batch: int,
        size: tuple[int, int, int],
        count: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(dtype, device)
        self.name, self.batch, self.size, self.count, self.width = name, batch, size, count, width
        self.mean, self.std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1, 1) for values in (MEAN, STD)
        )

    @property
    def shape(self) -> str:
        return f"{self.name} {self.batch}x{'x'.join(map(str, self.size))}, {self.count} tokens"

    def clip(self, generator: torch.Generator) -> ClipInputs:
        """Random pixels and tokens. The float clip is made here, untimed, as the official loader
        makes it on the CPU.
        """
        clip_BTHWC = torch.randint(
            0,
            256,
            (self.batch, *self.size, 3),
            dtype=torch.uint8,
            device=self.device,
            generator=generator,
        )
        video_BCTHW = (rearrange(clip_BTHWC, "b t h w c -> b c t h w") / 255 - self.mean) / self.std
        tokens = self.size[0] * self.size[1] * self.size[2] * 3 // VALUES
        order_BN = torch.rand(self.batch, tokens, device=self.device, generator=generator).argsort(
            dim=1
        )
        index_BN = order_BN[:, : self.count].sort(dim=1).values
        mask_BN = torch.zeros(self.batch, tokens, dtype=torch.bool, device=self.device).scatter_(
            1, index_BN, True
        )
        return ClipInputs(clip_BTHWC, video_BCTHW.contiguous(), index_BN, mask_BN)

    def auto(self, operation: str) -> str:
        return choose(operation, "auto", self.device)


class Gather(ClipProblem):
    """gather_tubelets: no gradient, a clip is data."""

    op = "gather"
    modes = ("forward",)

    def inputs(self, seed: int) -> ClipInputs:
        return self.clip(self._random(seed))

    def definition(self, x: ClipInputs) -> torch.Tensor:
        return reference.gather_tubelets(
            x.clip_BTHWC, x.index_BN, TUBELET, MEAN, STD, self._dtype(x)
        )

    def work(self, mode: str) -> Work:
        values = self.batch * self.count * VALUES
        return Work(0, values * (1 + self.dtype.itemsize) + INDEX_BYTES * self.batch * self.count)

    def providers(self) -> list[Provider]:
        run_reference, run_official = compiled(self.definition), compiled(self._official)
        return [
            Provider("official", self._official, graphable=False),
            Provider("official compiled", run_official, graphable=False),
            Provider("reference", self.definition, graphable=False),
            Provider("reference compiled", run_reference),
            Provider("ours triton", lambda x: self._ours(x, "triton"), is_ours=True),
            Provider(
                "ours auto",
                lambda x: self._ours(x, "auto"),
                is_ours=True,
                resolved=self.auto("gather_tubelets"),
            ),
        ]

    def _dtype(self, x: ClipInputs) -> torch.dtype:
        return torch.float64 if x.clip_BTHWC.dtype == torch.float64 else self.dtype

    def _ours(self, x: ClipInputs, impl: str) -> torch.Tensor:
        return gather_tubelets(x.clip_BTHWC, x.index_BN, TUBELET, MEAN, STD, self.dtype, impl)

    def _official(self, x: ClipInputs) -> torch.Tensor:
        t, p, q = TUBELET
        patches_BNP = rearrange(
            x.video_BCTHW.to(self.dtype),
            "b c (t r) (h p) (w q) -> b (t h w) (c r p q)",
            r=t,
            p=p,
            q=q,
        )
        return patches_BNP[x.mask_BN].reshape(self.batch, -1, VALUES)


class Embed(Gather):
    """Gather and embedding: the gradient is that of its weight and bias. The official code embeds
    all tokens and drops most of them.
    """

    op = "embed"
    modes = Problem.modes

    def inputs(self, seed: int) -> ClipInputs:
        generator = self._random(seed)
        clip = self.clip(generator)
        weight_DP, bias_D = (
            self._normal(self.width, VALUES, generator=generator),
            self._normal(self.width, generator=generator),
        )
        return clip._replace(
            weight_DP=(weight_DP * VALUES**-0.5).requires_grad_(),
            bias_D=bias_D.requires_grad_(),
            dout_BVD=self._normal(self.batch, self.count, self.width, generator=generator),
        )

    def upstream(self, x: ClipInputs, out: torch.Tensor) -> torch.Tensor:
        assert x.dout_BVD is not None
        return x.dout_BVD

    def definition(self, x: ClipInputs) -> torch.Tensor:
        return self._linear(super().definition(x), x)

    def work(self, mode: str) -> Work:
        """Forward the visible pixels, the weight and the tokens; backward the pixels again, the
        tokens' gradient and the weight's.
        """
        flops = 2 * self.batch * self.count * VALUES * self.width
        pixels = self.batch * self.count * (VALUES + INDEX_BYTES)
        numbers = self.batch * self.count * self.width + (VALUES + 1) * self.width
        once = Work(flops, pixels + numbers * self.dtype.itemsize)
        return Work(2 * once.flops, 2 * once.bytes) if mode == "both" else once

    def _linear(self, tubelets_BVP: torch.Tensor, x: ClipInputs) -> torch.Tensor:
        assert x.weight_DP is not None
        return F.linear(tubelets_BVP, x.weight_DP, x.bias_D)

    def _ours(self, x: ClipInputs, impl: str) -> torch.Tensor:
        return self._linear(super()._ours(x, impl), x)

    def _official(self, x: ClipInputs) -> torch.Tensor:
        assert x.weight_DP is not None
        weight = x.weight_DP.unflatten(1, (3, *TUBELET))
        tokens_BND = (
            F.conv3d(x.video_BCTHW.to(self.dtype), weight, x.bias_D, stride=TUBELET)
            .flatten(2)
            .transpose(1, 2)
        )
        return tokens_BND[x.mask_BN].reshape(self.batch, -1, self.width)


class Reconstruction(ClipProblem):
    """reconstruction_loss, targets normalised per channel."""

    op = "reconstruction"
    loss_limit = 1e-5

    def inputs(self, seed: int) -> ClipInputs:
        generator = self._random(seed)
        clip = self.clip(generator)
        return clip._replace(
            predicted_BMP=self._normal(
                self.batch, self.count, VALUES, generator=generator
            ).requires_grad_()
        )

    def upstream(self, x: Any, out: torch.Tensor) -> torch.Tensor:
        return torch.full_like(out, self.batch * self.count * VALUES)

    def definition(self, x: ClipInputs) -> torch.Tensor:
        assert x.predicted_BMP is not None
        return reference.reconstruction_loss(
            x.predicted_BMP, x.clip_BTHWC, x.index_BN, TUBELET, "channel"
        )[0]

    def work(self, mode: str) -> Work:
        """Predictions and their pixels read, and the gradient written; both passes in one need not
        read twice.
        """
        values = self.batch * self.count * VALUES
        read = values * (1 + self.dtype.itemsize) + INDEX_BYTES * self.batch * self.count
        return Work(0, read if mode == "forward" else read + values * self.dtype.itemsize)

    def providers(self) -> list[Provider]:
        run_reference, run_official = compiled(self.definition), compiled(self._official)
        return [
            Provider("official", self._official, graphable=False),
            Provider("official compiled", run_official, graphable=False),
            Provider("reference", self.definition),
            Provider("reference compiled", run_reference),
            Provider("ours triton", lambda x: self._ours(x, "triton"), is_ours=True),
            Provider(
                "ours auto",
                lambda x: self._ours(x, "auto"),
                is_ours=True,
                resolved=self.auto("reconstruction_loss"),
            ),
        ]

    def _ours(self, x: ClipInputs, impl: str) -> torch.Tensor:
        assert x.predicted_BMP is not None
        return reconstruction_loss(
            x.predicted_BMP, x.clip_BTHWC, x.index_BN, TUBELET, "channel", impl
        )

    def _official(self, x: ClipInputs) -> torch.Tensor:
        assert x.predicted_BMP is not None
        return F.mse_loss(x.predicted_BMP.float(), self._official_targets(x))

    @torch.no_grad()
    def _official_targets(self, x: ClipInputs) -> torch.Tensor:
        """The recipe of VideoMAE's training code: undo the normalisation of the floats, cut all
        tokens, normalise them, drop some.
        """
        t, p, q = TUBELET
        patches = rearrange(
            x.video_BCTHW * self.std + self.mean,
            "b c (t r) (h p) (w q) -> b (t h w) (r p q) c",
            r=t,
            p=p,
            q=q,
        )
        patches = (patches - patches.mean(dim=2, keepdim=True)) / (
            patches.var(dim=2, unbiased=True, keepdim=True).sqrt() + 1e-6
        )
        return rearrange(patches, "b n p c -> b n (p c)")[x.mask_BN].reshape(self.batch, -1, VALUES)


class Joint(Reconstruction):
    """joint_loss: both losses and one gradient."""

    op = "joint"
    loss_limit = 1e-4

    def definition(self, x: ClipInputs) -> torch.Tensor:
        assert x.predicted_BMP is not None
        return joint_loss(
            x.predicted_BMP,
            x.clip_BTHWC,
            x.index_BN,
            TUBELET,
            "channel",
            TEMPERATURE,
            "clip",
            CONTRASTIVE_WEIGHT,
            "reference",
        )[0]

    def low(self, x: ClipInputs) -> torch.Tensor:
        assert x.predicted_BMP is not None
        loss, target_BMP = reference.reconstruction_loss(
            x.predicted_BMP, x.clip_BTHWC, x.index_BN, TUBELET, "channel"
        )
        return loss + CONTRASTIVE_WEIGHT * plain_contrastive(x.predicted_BMP, target_BMP, "clip")

    def work(self, mode: str) -> Work:
        flops = 2 * self.batch * self.count**2 * VALUES
        return Work(2 * flops if mode == "both" else flops, super().work(mode).bytes)

    def providers(self) -> list[Provider]:
        return [
            *super().providers(),
            Provider("ours least", lambda x: self._ours(x, "triton", "least"), is_ours=True),
        ]

    def _ours(self, x: ClipInputs, impl: str, memory: Memory = "fast") -> torch.Tensor:
        assert x.predicted_BMP is not None
        return joint_loss(
            x.predicted_BMP,
            x.clip_BTHWC,
            x.index_BN,
            TUBELET,
            "channel",
            TEMPERATURE,
            "clip",
            CONTRASTIVE_WEIGHT,
            impl,
            memory,
        )[0]

    def _official(self, x: ClipInputs) -> torch.Tensor:
        assert x.predicted_BMP is not None
        target_BMP = self._official_targets(x)
        return F.mse_loss(
            x.predicted_BMP.float(), target_BMP
        ) + CONTRASTIVE_WEIGHT * plain_contrastive(x.predicted_BMP, target_BMP, "clip")


class ContrastiveInputs(NamedTuple):
    """Predictions that resemble their targets."""

    predicted_BMP: torch.Tensor
    target_BMP: torch.Tensor


class Contrastive(Problem):
    """contrastive_loss of given targets."""

    op, baseline = "contrastive", "plain"
    loss_limit = 1e-4

    def __init__(
        self,
        name: str,
        batch: int,
        count: int,
        negatives: Negatives,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(dtype, device)
        self.name, self.batch, self.count = name, batch, count
        self.negatives: Negatives = negatives

    @property
    def shape(self) -> str:
        return f"{self.name} {self.batch}x{self.count}, negatives of the {self.negatives}"

    def inputs(self, seed: int) -> ContrastiveInputs:
        generator = self._random(seed)
        target_BMP = self._normal(self.batch, self.count, VALUES, generator=generator)
        noise_BMP = self._normal(self.batch, self.count, VALUES, generator=generator)
        return ContrastiveInputs((0.3 * target_BMP + noise_BMP).requires_grad_(), target_BMP)

    def upstream(self, x: ContrastiveInputs, out: torch.Tensor) -> torch.Tensor:
        return torch.full_like(out, self.batch * self.count)

    def definition(self, x: ContrastiveInputs) -> torch.Tensor:
        return reference.contrastive_loss(
            x.predicted_BMP, x.target_BMP, TEMPERATURE, self.negatives
        )

    def low(self, x: ContrastiveInputs) -> torch.Tensor:
        return plain_contrastive(x.predicted_BMP, x.target_BMP, self.negatives)

    def work(self, mode: str) -> Work:
        """One product of all predictions with their rivals forward, one of its softmax with the
        targets backward.
        """
        rows, rivals = (
            self.batch * self.count,
            self.count if self.negatives == "clip" else self.batch * self.count,
        )
        flops, values = 2 * rows * rivals * VALUES, rows * VALUES * self.dtype.itemsize
        return {
            "forward": Work(flops, 2 * values),
            "backward": Work(flops, 3 * values),
            "both": Work(2 * flops, 3 * values),
        }[mode]

    def providers(self) -> list[Provider]:
        run_plain, run_reference = compiled(self.low), compiled(self.definition)

        def ours(**way: Any) -> Callable[[ContrastiveInputs], torch.Tensor]:
            return lambda x: contrastive_loss(
                x.predicted_BMP, x.target_BMP, TEMPERATURE, self.negatives, **way
            )

        return [
            Provider("plain", self.low),
            Provider("plain compiled", run_plain),
            Provider("reference", self.definition),
            Provider("reference compiled", run_reference),
            Provider("ours fast", ours(impl="triton"), is_ours=True),
            Provider(
                "ours fast, 256 MB", ours(impl="triton", scratch_bytes=LARGE_SCRATCH), is_ours=True
            ),
            Provider("ours least", ours(impl="triton", memory="least"), is_ours=True),
            Provider(
                "ours auto",
                ours(impl="auto"),
                is_ours=True,
                resolved=choose("contrastive_loss", "auto", self.device),
            ),
        ]


def plain_contrastive(
    predicted_BMP: torch.Tensor, target_BMP: torch.Tensor, negatives: Negatives
) -> torch.Tensor:
    """InfoNCE as it is usually written: normalise, multiply, cross-entropy; in the precisions that
    autocast chooses.
    """
    dtype = predicted_BMP.dtype
    if negatives == "batch":
        predicted_BMP, target_BMP = (
            predicted_BMP.flatten(0, 1)[None],
            target_BMP.flatten(0, 1)[None],
        )
    predicted_BMP, target_BMP = (
        F.normalize(x.float(), dim=-1, eps=reference.NORM_FLOOR).to(dtype)
        for x in (predicted_BMP, target_BMP)
    )
    logits_BMM = (predicted_BMP @ target_BMP.transpose(1, 2) / TEMPERATURE).float()
    labels = torch.arange(logits_BMM.shape[1], device=logits_BMM.device).repeat(logits_BMM.shape[0])
    return F.cross_entropy(logits_BMM.flatten(0, 1), labels)
