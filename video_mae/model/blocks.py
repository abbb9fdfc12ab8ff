"""The transformer that encoder and decoder are made of: attention, a block, blocks in a row.

Letters: B clips, S tokens of a sequence, D width of encoder or decoder, H heads.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from video_mae.config import ModelConfig
from video_mae.kernels.attention import packed_attention


class PackedProjection(nn.Module):
    """Queries, keys and values in one product; `bias` is qv as in VideoMAE, qkv (a key's cancels in
    the softmax), or none.
    """

    q_bias: nn.Parameter | None
    k_bias: nn.Parameter | None
    v_bias: nn.Parameter

    def __init__(self, width: int, bias: str = "qv") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * width, width))
        for letter in "qkv":  # the word none has none of them
            bias_D = nn.Parameter(torch.zeros(width)) if letter in bias else None
            self.register_parameter(f"{letter}_bias", bias_D)
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        if self.q_bias is None:
            return F.linear(x_BSD, self.weight)
        k_bias = torch.zeros_like(self.q_bias) if self.k_bias is None else self.k_bias
        return F.linear(x_BSD, self.weight, torch.cat([self.q_bias, k_bias, self.v_bias]))


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, num_heads: int, bias: str, impl: str) -> None:
        super().__init__()
        self.num_heads, self.impl = num_heads, impl
        self.qkv = PackedProjection(width, bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BSD: torch.Tensor, last: int) -> torch.Tensor:
        """Returns the `last` tokens only, which attend to all."""
        qkv_BS3HD = rearrange(
            self.qkv(x_BSD), "b s (three h d) -> b s three h d", three=3, h=self.num_heads
        )
        out_BSHD = packed_attention(qkv_BS3HD, self.impl)
        return self.proj(_last(out_BSHD, last).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(
        self,
        config: ModelConfig,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path: float,
        impl: str,
    ) -> None:
        super().__init__()
        hidden = round(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = Attention(width, num_heads, config.qkv_bias, impl)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.drop_path = StochasticDepth(drop_path, mode="row") if drop_path > 0 else nn.Identity()
        self.gamma_1, self.gamma_2 = None, None
        if config.layer_scale:
            self.gamma_1 = nn.Parameter(torch.full((width,), config.layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((width,), config.layer_scale))

    def forward(self, x_BSD: torch.Tensor, last: int) -> torch.Tensor:
        """Returns the `last` tokens only: what no later layer reads stops being computed after the
        attention.
        """
        attended = _scale(self.attn(self.norm1(x_BSD), last), self.gamma_1)
        x_BSD = _last(x_BSD, last) + self.drop_path(attended)
        return x_BSD + self.drop_path(_scale(self.mlp(self.norm2(x_BSD)), self.gamma_2))


def _last(x: torch.Tensor, last: int) -> torch.Tensor:
    # a slice that leaves nothing out would cost the backward pass a copy
    return x if last == x.shape[1] else x[:, -last:]


def _scale(x_BSD: torch.Tensor, gamma_D: torch.Tensor | None) -> torch.Tensor:
    return x_BSD if gamma_D is None else x_BSD * gamma_D


class Blocks(nn.ModuleList):
    """Blocks one after another, with stochastic depth growing linearly and activation checkpointing
    as an option.
    """

    def __init__(
        self,
        config: ModelConfig,
        depth: int,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path: float,
        impl: str,
        checkpointing: bool,
    ) -> None:
        super().__init__(
            Block(config, width, num_heads, mlp_ratio, drop_path * i / max(depth - 1, 1), impl)
            for i in range(depth)
        )
        self.checkpointing = checkpointing

    def forward(self, x_BSD: torch.Tensor, last: int) -> torch.Tensor:
        for i, block in enumerate(self):
            kept = last if i == len(self) - 1 else x_BSD.shape[1]
            if self.checkpointing and torch.is_grad_enabled():
                x_BSD = checkpoint(block, x_BSD, kept, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
            else:
                x_BSD = block(x_BSD, kept)
        return x_BSD
