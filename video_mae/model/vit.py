"""The masked autoencoder, readable top to bottom: Attention, Block, Encoder, Decoder, VideoMAE,
VideoClassifier.

Semantics of the official VideoMAE (Tong et al., 2022), but only visible tubelets are ever embedded,
clips stay uint8, and the decoder runs only the tokens that the loss needs. Options of the
configuration make it image MAE (He et al., 2021) or mae_st (Feichtenhofer et al., 2022).
Letters: B clips, T frames, H W pixels, C channels, N tokens of the grid, V visible, M masked
(predicted), A class tokens, S tokens of a sequence, D width of encoder or decoder, P values of a
tubelet, K classes.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from video_mae.config import ClassifierConfig, ModelConfig, ObjectiveConfig
from video_mae.kernels.attention import packed_attention
from video_mae.kernels.tubelets import gather_tubelets
from video_mae.model.masking import AnyMask, ContextMask
from video_mae.model.objective import Objective, target_clip
from video_mae.model.positions import Grid, Positions


class PackedProjection(nn.Module):
    """Queries, keys and values in one product; `bias` is qv as in VideoMAE, qkv (a key's cancels in
    the softmax), or none.
    """

    q_bias: nn.Parameter
    k_bias: nn.Parameter
    v_bias: nn.Parameter

    def __init__(self, width: int, bias: str = "qv") -> None:
        super().__init__()
        self.bias = bias
        self.weight = nn.Parameter(torch.empty(3 * width, width))
        for letter in () if bias == "none" else bias:
            self.register_parameter(f"{letter}_bias", nn.Parameter(torch.zeros(width)))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        if self.bias == "none":
            return F.linear(x_BSD, self.weight)
        k_bias = self.k_bias if self.bias == "qkv" else torch.zeros_like(self.q_bias)
        return F.linear(x_BSD, self.weight, torch.cat([self.q_bias, k_bias, self.v_bias]))


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, num_heads: int, bias: str, impl: str) -> None:
        super().__init__()
        self.num_heads, self.impl = num_heads, impl
        self.qkv = PackedProjection(width, bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BSD: torch.Tensor, last: int) -> torch.Tensor:
        qkv = rearrange(
            self.qkv(x_BSD), "b s (three h d) -> b s three h d", three=3, h=self.num_heads
        )
        return self.proj(_last(packed_attention(qkv, self.impl), last).flatten(2))


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
            self.gamma_1, self.gamma_2 = (
                nn.Parameter(torch.full((width,), config.layer_scale)) for _ in range(2)
            )

    def forward(self, x_BSD: torch.Tensor, last: int) -> torch.Tensor:
        """Returns the `last` tokens only: what no later layer reads stops being computed after the
        attention.
        """
        x = _last(x_BSD, last) + self.drop_path(
            _scale(self.attn(self.norm1(x_BSD), last), self.gamma_1)
        )
        return x + self.drop_path(_scale(self.mlp(self.norm2(x)), self.gamma_2))


def _last(x_BSD: torch.Tensor, last: int) -> torch.Tensor:
    # a slice that leaves nothing out would cost the backward pass a copy
    return x_BSD if last == x_BSD.shape[1] else x_BSD[:, -last:]


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


class Encoder(nn.Module):
    """A ViT over the visible tubelets of a clip, of the configured size or any other."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        impl: str = "auto",
        checkpointing: bool = False,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        c = self.config = config
        self.impl = impl
        self.patch_embed = nn.Linear(c.tubelet_values, c.embed_dim)
        self.positions = Positions(c, c.embed_dim)
        self.class_token = nn.Parameter(0.02 * torch.randn(c.embed_dim)) if c.class_tokens else None
        self.blocks = Blocks(
            c, c.depth, c.embed_dim, c.num_heads, c.mlp_ratio, c.drop_path, impl, checkpointing
        )
        self.norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps) if final_norm else nn.Identity()
        _xavier(self.blocks)  # patch_embed keeps PyTorch's default, as the official Conv3d does

    def grid_of(self, clip_BTHWC: torch.Tensor) -> Grid:
        """(time, height, width) of a clip in tokens: what the mask functions take. Raises:
        ValueError for a clip that has none.
        """
        c, sides = self.config, tuple(clip_BTHWC.shape[1:])
        if (
            len(sides) != 4
            or sides[3] != c.in_channels
            or any(n % unit or not n for n, unit in zip(sides, c.tubelet, strict=False))
        ):
            raise ValueError(
                f"clip_BTHWC: (frames, height, width, channels) is {sides}, the model takes multiples of {c.tubelet} with "
                f"{c.in_channels} channels"
            )
        return sides[0] // c.tubelet_size, sides[1] // c.patch_size, sides[2] // c.patch_size

    def forward(
        self, clip_BTHWC: torch.Tensor, visible_BV: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens [B, A + V, D]: A class tokens, then the chosen tubelets in the order given, or all
        N in raster order.

        clip_BTHWC: uint8 (or floating point in [0, 1]) of any size that has a grid; visible_BV:
        int64 tokens of that grid.
        Raises: ValueError for a clip that is no multiple of the tubelet.
        """
        c = self.config
        positions, class_position_D = self.positions(self.grid_of(clip_BTHWC))
        if visible_BV is None:
            visible_BV = torch.arange(len(positions), device=clip_BTHWC.device).expand(
                clip_BTHWC.shape[0], -1
            )
        else:
            positions = positions[visible_BV]
        dtype = self.patch_embed.weight.dtype
        tubelets_BVP = gather_tubelets(
            clip_BTHWC, visible_BV, c.tubelet, c.mean, c.std, dtype, self.impl
        )
        tokens_BSD = self.patch_embed(tubelets_BVP) + positions.to(dtype)
        if self.class_token is not None:
            class_BAD = (self.class_token + class_position_D).expand(
                tokens_BSD.shape[0], c.class_tokens, -1
            )
            tokens_BSD = torch.cat([class_BAD, tokens_BSD], dim=1)
        return self.norm(self.blocks(tokens_BSD, last=tokens_BSD.shape[1]))


class Decoder(nn.Module):
    """A narrow ViT that predicts the masked tubelets from the encoded visible ones."""

    def __init__(
        self, config: ModelConfig, *, impl: str = "auto", checkpointing: bool = False
    ) -> None:
        super().__init__()
        c, width = config, config.decoder_embed_dim
        self.config = config
        self.encoder_to_decoder = nn.Linear(c.embed_dim, width, bias=c.decoder_embed_bias)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.positions = Positions(c, width)
        self.class_token = (
            nn.Parameter(0.02 * torch.randn(width))
            if c.class_tokens and c.decoder_class_token == "own"
            else None
        )
        self.blocks = Blocks(
            c,
            c.decoder_depth,
            width,
            c.decoder_num_heads,
            c.decoder_mlp_ratio,
            0.0,
            impl,
            checkpointing,
        )
        self.norm = nn.LayerNorm(width, eps=c.head_norm_eps)
        self.head = nn.Linear(width, c.predicted_values)
        _xavier(self.blocks, self.head)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(
        self, encoded_BSD: torch.Tensor, mask: AnyMask, grid: Grid | None = None
    ) -> torch.Tensor:
        """Predictions [B, M, P] of the masked tubelets, P ordered (frame, row, column, channel).

        encoded_BSD: class tokens, then the visible ones; grid: of the clip, where it is not the
        model's.
        """
        num_class = self.config.class_tokens
        visible_BSD = self.encoder_to_decoder(encoded_BSD)
        positions_ND, class_position_D = self.positions(grid or self.config.grid)
        positions_ND = positions_ND.to(visible_BSD.dtype)
        absent_BM = mask.masked_BM
        if isinstance(mask, ContextMask) and self.config.decoder_context == "all":
            absent_BM = torch.cat([mask.context_BC, absent_BM], dim=1)
        parts = [
            visible_BSD[:, num_class:] + positions_ND[mask.visible_BV],
            self.mask_token + positions_ND[absent_BM],
        ]
        if num_class:
            class_BAD = (
                visible_BSD[:, :num_class]
                if self.class_token is None
                else self.class_token.expand(len(visible_BSD), num_class, -1)
            )
            parts.insert(0, class_BAD + class_position_D)
        return self.head(
            self.norm(self.blocks(torch.cat(parts, dim=1), last=mask.masked_BM.shape[1]))
        )


class VideoMAEOutput(NamedTuple):
    """The three losses (float32 scalars) and the predictions [B, M, P]."""

    loss: torch.Tensor
    reconstruction_loss: torch.Tensor
    contrastive_loss: torch.Tensor
    predicted_BMP: torch.Tensor


class VideoMAE(nn.Module):
    """Encoder, decoder and objective: `VideoMAE(config)(clip_BTHWC, mask)`.

    `impl` chooses the kernels, `checkpointing` recomputes blocks in the backward pass. Source:
    VideoMAE (Tong et al., 2022), dual masking of VideoMAE V2 (Wang et al., 2023) through the mask.
    """

    def __init__(
        self,
        config: ModelConfig | None = None,
        objective: ObjectiveConfig | None = None,
        *,
        impl: str = "auto",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = config or ModelConfig()
        self.objective_config = objective or ObjectiveConfig()
        self.encoder = Encoder(
            self.config, impl=impl, checkpointing=checkpointing, final_norm=self.config.encoder_norm
        )
        self.decoder = Decoder(self.config, impl=impl, checkpointing=checkpointing)
        self.objective = Objective(self.objective_config, self.config.predicted_tubelet, impl)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(time, height, width) in tokens: what the mask functions take."""
        return self.config.grid

    def predict(
        self, clip_BTHWC: torch.Tensor, mask: AnyMask, grid: Grid | None = None
    ) -> torch.Tensor:
        """Predictions [B, M, P] of the masked tubelets, P ordered (frame, row, column, channel).

        A mask belongs to a grid: name it where it is not the model's. Raises: ValueError for a clip
        of another grid, or a mask that lacks what model.decoder_context = all needs.
        """
        grid = grid or self.grid
        size = (
            *(tokens * side for tokens, side in zip(grid, self.config.tubelet, strict=True)),
            self.config.in_channels,
        )
        if clip_BTHWC.shape[1:] != size:
            raise ValueError(
                f"clip_BTHWC: (frames, height, width, channels) is {tuple(clip_BTHWC.shape[1:])}, the mask is of a clip of "
                f"{size}; name the grid of another mask as `grid`"
            )
        is_whole = mask.visible_BV.shape[1] + mask.masked_BM.shape[1] == math.prod(grid)
        if (
            self.config.decoder_context == "all"
            and not is_whole
            and not isinstance(mask, ContextMask)
        ):
            raise ValueError(
                "mask: leaves tokens out, and does not say which of them model.decoder_context = all has the decoder see; "
                'make it by token_mask(..., decoder_context="all")'
            )
        return self.decoder(self.encoder(clip_BTHWC, mask.visible_BV), mask, grid)

    def forward(
        self, clip_BTHWC: torch.Tensor, mask: AnyMask, grid: Grid | None = None
    ) -> VideoMAEOutput:
        """clip_BTHWC: uint8; grid: of the mask, where it is not the model's. Raises: ValueError for
        a clip of another grid.
        """
        predicted_BMP = self.predict(clip_BTHWC, mask, grid)
        losses = self.objective(
            predicted_BMP,
            target_clip(clip_BTHWC, self.config, self.objective_config),
            mask.masked_BM,
        )
        return VideoMAEOutput(
            losses.loss, losses.reconstruction_loss, losses.contrastive_loss, predicted_BMP
        )


class VideoClassifier(nn.Module):
    """Action recognition: encoder, pooling, a linear head.

    A mean leaves out the encoder's last norm and is normed by `fc_norm`; the first token has only
    the former.

    `VideoClassifier(config, ClassifierConfig(...))`, or `VideoClassifier(config, K)` for K classes
    without names. Source: the official fine-tuning model of VideoMAE; linear layers start from a
    normal distribution of 0.02.
    """

    def __init__(
        self,
        config: ModelConfig,
        classifier: ClassifierConfig | int,
        *,
        impl: str = "auto",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.classifier_config = classifier = (
            ClassifierConfig(num_classes=classifier) if isinstance(classifier, int) else classifier
        )
        self.encoder = Encoder(
            config, impl=impl, checkpointing=checkpointing, final_norm=classifier.pooling == "first"
        )
        self.fc_norm = (
            nn.Identity()
            if classifier.pooling == "first"
            else nn.LayerNorm(config.embed_dim, eps=config.head_norm_eps)
        )
        self.head_dropout = nn.Dropout(classifier.head_dropout)
        self.head = nn.Linear(config.embed_dim, classifier.num_classes)
        for module in self.modules():
            if (
                isinstance(module, nn.Linear | PackedProjection)
                and module is not self.encoder.patch_embed
            ):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.head.weight.data.mul_(classifier.head_init_scale)

    def forward(self, clip_BTHWC: torch.Tensor) -> torch.Tensor:
        """Logits [B, K] of clips of any size."""
        return self.head(self.head_dropout(self.pool(self.encoder(clip_BTHWC))))

    def pool(self, tokens_BSD: torch.Tensor) -> torch.Tensor:
        """The vector [B, D] of a clip that the head reads, of the encoder's tokens."""
        pooling = self.classifier_config.pooling
        if pooling == "first":
            return tokens_BSD[:, 0]
        left_out = 1 if pooling == "rest" else self.config.class_tokens
        return self.fc_norm(tokens_BSD[:, left_out:].mean(dim=1))


def pretraining_macs(
    config: ModelConfig, num_visible: int, num_masked: int, num_context: int = 0
) -> float:
    """Multiply-accumulates of one clip's forward pass; training costs about 6 floating point
    operations for each.

    num_context: further mask tokens that the decoder sees (of a ContextMask).
    """
    d, e, encoded = config.embed_dim, config.decoder_embed_dim, config.class_tokens + num_visible
    return (
        encoder_macs(config, num_visible)
        + encoded * d * e
        + _block_macs(
            encoded + num_context + num_masked, e, config.decoder_depth, config.decoder_mlp_ratio
        )
        + num_masked * e * config.predicted_values
    )


def encoder_macs(config: ModelConfig, num_tokens: int) -> float:
    """Multiply-accumulates of the encoder for num_tokens tubelets of a clip; a classifier sees
    config.num_tokens.
    """
    return num_tokens * config.tubelet_values * config.embed_dim + _block_macs(
        config.class_tokens + num_tokens, config.embed_dim, config.depth, config.mlp_ratio
    )


def _block_macs(num_tokens: int, width: int, depth: int, mlp_ratio: float) -> float:
    return depth * (num_tokens * width**2 * (4 + 2 * mlp_ratio) + 2 * num_tokens**2 * width)


def _xavier(*roots: nn.Module) -> None:
    for root in roots:
        for module in root.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
