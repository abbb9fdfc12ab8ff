"""What is benchmarked: an operation at a shape, its inputs, definition and least work, and all that
can compute it; attention.

Letters: B clips, N tokens, H heads, D head width.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from video_mae.benchmark.measure import Work
from video_mae.kernels import attention_long, attention_short, reference
from video_mae.kernels.attention import HALF, packed_attention, pick

MODES = ("forward", "backward", "both")
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class Provider(NamedTuple):
    """One way to compute an operation: `run(inputs)`, with an autograd graph where something needs
    a gradient.

    is_ours: of this project. graphable: CUDA can record it, for it neither waits for the device (a
    boolean mask does) nor copies to it. resolved: what a name such as auto stands for here.
    """

    name: str
    run: Callable[[Any], torch.Tensor]
    is_ours: bool = False
    graphable: bool = True
    resolved: str = ""


class Problem:
    """One operation at one shape. `baseline` names the provider that speed-ups are against: what
    people run today.
    """

    op: str
    baseline: str
    loss_limit: float | None = None  # of the relative error of a result that is one number
    modes: tuple[str, ...] = MODES

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device

    @property
    def shape(self) -> str:
        """The name of the shape, as `shapes=` and the tables have it."""
        raise NotImplementedError

    def inputs(self, seed: int) -> Any:
        """A NamedTuple of random inputs; those that need a gradient say so."""
        raise NotImplementedError

    def leaves(self, x: Any) -> list[torch.Tensor]:
        return [t for t in x if isinstance(t, torch.Tensor) and t.requires_grad]

    def upstream(self, x: Any, out: torch.Tensor) -> torch.Tensor:
        """The gradient of the result: for a loss a number that brings the gradients near 1."""
        raise NotImplementedError

    def definition(self, x: Any) -> torch.Tensor:
        """The operation, in the precision of its inputs."""
        raise NotImplementedError

    def low(self, x: Any) -> torch.Tensor:
        """What PyTorch's own arithmetic gives in the inputs' dtype: the yardstick of `judge`."""
        return self.definition(x)

    def sample(self, result: torch.Tensor) -> torch.Tensor:
        """The part of an input or result that is checked."""
        return result

    def work(self, mode: str) -> Work:
        """The fewest floating-point operations and bytes; only what is needed counts, whatever a
        provider computes beside it.
        """
        raise NotImplementedError

    def named(
        self, out: torch.Tensor, gradients: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What is checked: "result", and the gradients of the leaves in order."""
        return {
            "result": out,
            **{f"gradient {i}": gradient for i, gradient in enumerate(gradients)},
        }

    def facts(self) -> dict[str, float]:
        """Figures of the shape that plots need."""
        return {}

    def providers(self) -> list[Provider]:
        raise NotImplementedError

    def _random(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def _normal(self, *shape: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=self.device).to(self.dtype)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for fixed shapes."""
    return torch.compile(function, dynamic=False)


class AttentionInputs(NamedTuple):
    """The packed qkv and the gradient of the result."""

    qkv_BN3HD: torch.Tensor
    dout_BNHD: torch.Tensor


class Attention(Problem):
    """packed_attention at [batch, tokens, 3, heads, width]."""

    op, baseline = "attention", "reference"

    def __init__(
        self,
        name: str,
        batch: int,
        tokens: int,
        heads: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(dtype, device)
        self.name, self.dims = name, (batch, tokens, heads, width)

    @property
    def shape(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.dims))}"

    def inputs(self, seed: int) -> AttentionInputs:
        batch, tokens, heads, width = self.dims
        generator = self._random(seed)
        return AttentionInputs(
            self._normal(batch, tokens, 3, heads, width, generator=generator).requires_grad_(),
            self._normal(batch, tokens, heads, width, generator=generator),
        )

    def upstream(self, x: AttentionInputs, out: torch.Tensor) -> torch.Tensor:
        return x.dout_BNHD

    def definition(self, x: AttentionInputs) -> torch.Tensor:
        return reference.packed_attention(x.qkv_BN3HD)

    def sample(self, result: torch.Tensor) -> torch.Tensor:
        """The first and the last clip: in float64 all the scores of a batch would not fit."""
        return torch.stack([result[0], result[-1]])

    def named(
        self, out: torch.Tensor, gradients: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        parts = [part for gradient in gradients for part in gradient.unbind(2)]
        return dict(zip(("result", "dq", "dk", "dv"), (out, *parts), strict=False))

    def facts(self) -> dict[str, float]:
        return dict(zip(("batch", "tokens", "heads", "width"), self.dims, strict=True))

    def work(self, mode: str) -> Work:
        """4 B H N^2 d, 2.5 times that backward (no score is kept); q, k, v, out and the
        log-sum-exp, backward also their gradients.
        """
        batch, tokens, heads, width = self.dims
        part, lse = batch * tokens * heads * width * self.dtype.itemsize, 4 * batch * heads * tokens
        flops = 4 * batch * heads * tokens**2 * width
        forward, backward = Work(flops, 4 * part + lse), Work(2.5 * flops, 8 * part + lse)
        return {
            "forward": forward,
            "backward": backward,
            "both": Work(*map(sum, zip(forward, backward, strict=True))),
        }[mode]

    def providers(self) -> list[Provider]:
        run_compiled, run_flex = compiled(reference.packed_attention), compiled(flex_attention)
        batch, tokens, heads, width = self.dims
        qkv_BN3HD = torch.empty(
            batch, tokens, 3, heads, width, dtype=self.dtype, device=self.device, requires_grad=True
        )
        q, k, v = heads_first(qkv_BN3HD)
        default = (
            SDPBackend(torch._fused_sdp_choice(q, k, v)).name.removesuffix("_ATTENTION").lower()
        )
        auto = pick(qkv_BN3HD.shape, self.dtype, "auto", self.device)

        def flex(x: AttentionInputs) -> torch.Tensor:
            return run_flex(*heads_first(x.qkv_BN3HD)).transpose(1, 2).contiguous()

        return [
            Provider("reference", self.definition),
            Provider("reference compiled", lambda x: run_compiled(x.qkv_BN3HD)),
            *(Provider(f"sdpa {name}", _sdpa(backend)) for name, backend in BACKENDS.items()),
            Provider("sdpa default", _sdpa(None), resolved=default),
            Provider("flex", flex),
            Provider("ours short", _program(attention_short), is_ours=True),
            Provider("ours long", _program(attention_long), is_ours=True),
            Provider(
                "ours auto",
                lambda x: packed_attention(x.qkv_BN3HD).contiguous(),
                is_ours=True,
                resolved=auto,
            ),
        ]


def heads_first(qkv_BN3HD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [B, H, N, d] as strided views of the packed tensor; backward their gradients are
    stacked, which a provider is charged.
    """
    q, k, v = (part.transpose(1, 2) for part in qkv_BN3HD.unbind(2))
    return q, k, v


def _sdpa(backend: SDPBackend | None) -> Callable[[AttentionInputs], torch.Tensor]:
    """PyTorch's attention by one backend, or by what it picks; the result as the next layer takes
    it.
    """

    def run(x: AttentionInputs) -> torch.Tensor:
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            q, k, v = heads_first(x.qkv_BN3HD)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()

    return run


class _Program(torch.autograd.Function):
    """One of our two programs, whatever `auto` would pick."""

    @staticmethod
    def forward(ctx: Any, qkv_BN3HD: torch.Tensor, program: Any) -> torch.Tensor:
        out, lse = program.forward(qkv_BN3HD)
        ctx.save_for_backward(qkv_BN3HD, out, lse)
        ctx.program = program
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.program.backward(*ctx.saved_tensors, *gradients), None


def _program(program: Any) -> Callable[[AttentionInputs], torch.Tensor]:
    def run(x: AttentionInputs) -> torch.Tensor:
        tokens = x.qkv_BN3HD.shape[1]
        pick(x.qkv_BN3HD.shape, x.qkv_BN3HD.dtype, "triton", x.qkv_BN3HD.device)
        if program is attention_short and not (
            tokens <= attention_short.MAX_TOKENS and x.qkv_BN3HD.dtype in HALF
        ):
            raise ValueError(f"takes 16-bit values of up to {attention_short.MAX_TOKENS} tokens")
        return _Program.apply(x.qkv_BN3HD, program)  # pyright: ignore[reportReturnType]

    return run
