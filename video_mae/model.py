"""The masked autoencoder, readable top to bottom: positions, Attention, Block, Encoder, Decoder, VideoMAE, VideoClassifier.

Semantics of the official VideoMAE (Tong et al., 2022), but only visible tubelets are ever embedded, clips stay uint8, and the
decoder runs only the tokens that the loss needs.
Letters: B clips, T frames, H W pixels, C channels, N tokens of the grid, V visible, M masked (predicted), S tokens of a
sequence, D width of encoder or decoder, P values of a tubelet, K classes.
"""

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
from video_mae.masking import TokenMask
from video_mae.objective import Objective

NORM_EPS = 1e-6


def sinusoid_positions(num_tokens: int, width: int) -> torch.Tensor:
    """Fixed positions [N, D] over the flattened (time, height, width) index: sine in even columns, cosine in odd ones.

    Source: Vaswani et al. (2017), as VideoMAE flattens it; computed in float64, returned in float32.
    """
    frequency = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(num_tokens, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).float()


class PackedProjection(nn.Module):
    """Queries, keys and values in one product; keys have no bias (it would cancel in the softmax)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * width, width))
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return F.linear(x_BSD, self.weight, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, num_heads: int, impl: str) -> None:
        super().__init__()
        self.num_heads, self.impl = num_heads, impl
        self.qkv = PackedProjection(width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BSD: torch.Tensor, last: int) -> torch.Tensor:
        qkv = rearrange(self.qkv(x_BSD), "b s (three h d) -> b s three h d", three=3, h=self.num_heads)
        return self.proj(packed_attention(qkv, self.impl)[:, -last:].flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, drop_path: float, impl: str) -> None:
        super().__init__()
        hidden = round(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, num_heads, impl)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.drop_path = StochasticDepth(drop_path, mode="row") if drop_path > 0 else nn.Identity()

    def forward(self, x_BSD: torch.Tensor, last: int) -> torch.Tensor:
        """Returns the `last` tokens only: what no later layer reads stops being computed after the attention."""
        x = x_BSD[:, -last:] + self.drop_path(self.attn(self.norm1(x_BSD), last))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Blocks(nn.ModuleList):
    """Blocks one after another, with stochastic depth growing linearly and activation checkpointing as an option."""

    def __init__(self, depth: int, width: int, num_heads: int, mlp_ratio: float, drop_path: float, impl: str, checkpointing: bool) -> None:
        super().__init__(Block(width, num_heads, mlp_ratio, drop_path * i / max(depth - 1, 1), impl) for i in range(depth))
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
    """A ViT over the visible tubelets of a clip."""

    positions_ND: torch.Tensor

    def __init__(self, config: ModelConfig, *, impl: str = "auto", checkpointing: bool = False, final_norm: bool = True) -> None:
        super().__init__()
        self.config, self.impl = config, impl
        self.patch_embed = nn.Linear(config.tubelet_values, config.embed_dim)
        self.register_buffer("positions_ND", sinusoid_positions(config.num_tokens, config.embed_dim), persistent=False)
        self.blocks = Blocks(config.depth, config.embed_dim, config.num_heads, config.mlp_ratio, config.drop_path, impl, checkpointing)
        self.norm = nn.LayerNorm(config.embed_dim, eps=NORM_EPS) if final_norm else nn.Identity()
        _xavier(self.blocks)  # patch_embed keeps PyTorch's default, as the official Conv3d does

    def forward(self, clip_BTHWC: torch.Tensor, visible_BV: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens [B, V, D] of the chosen tubelets in the order given, or of all N in raster order.

        clip_BTHWC: uint8 (or floating point in [0, 1]); visible_BV: int64. Raises: ValueError for a clip of another size.
        """
        c = self.config
        if clip_BTHWC.shape[1:] != (c.num_frames, c.height, c.width, c.in_channels):
            raise ValueError(f"clip_BTHWC: (frames, height, width, channels) is {tuple(clip_BTHWC.shape[1:])}, the model takes "
                             f"{(c.num_frames, c.height, c.width, c.in_channels)}")
        if visible_BV is None:
            visible_BV = torch.arange(c.num_tokens, device=clip_BTHWC.device).expand(clip_BTHWC.shape[0], -1)
        dtype = self.patch_embed.weight.dtype
        tubelets_BVP = gather_tubelets(clip_BTHWC, visible_BV, c.tubelet, c.mean, c.std, dtype, self.impl)
        tokens_BVD = self.patch_embed(tubelets_BVP) + self.positions_ND[visible_BV].to(dtype)
        return self.norm(self.blocks(tokens_BVD, last=visible_BV.shape[1]))


class Decoder(nn.Module):
    """A narrow ViT that predicts the masked tubelets from the encoded visible ones."""

    positions_ND: torch.Tensor

    def __init__(self, config: ModelConfig, *, impl: str = "auto", checkpointing: bool = False) -> None:
        super().__init__()
        width = config.decoder_embed_dim
        self.encoder_to_decoder = nn.Linear(config.embed_dim, width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("positions_ND", sinusoid_positions(config.num_tokens, width), persistent=False)
        self.blocks = Blocks(config.decoder_depth, width, config.decoder_num_heads, config.decoder_mlp_ratio, 0.0, impl, checkpointing)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head = nn.Linear(width, config.tubelet_values)
        _xavier(self.blocks, self.head)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, encoded_BVD: torch.Tensor, mask: TokenMask) -> torch.Tensor:
        """Predictions [B, M, P] of the masked tubelets, P ordered (frame, row, column, channel)."""
        visible_BVD = self.encoder_to_decoder(encoded_BVD)
        positions_ND = self.positions_ND.to(visible_BVD.dtype)
        masked_BMD = self.mask_token + positions_ND[mask.masked_BM]
        tokens_BSD = torch.cat([visible_BVD + positions_ND[mask.visible_BV], masked_BMD], dim=1)
        return self.head(self.norm(self.blocks(tokens_BSD, last=mask.masked_BM.shape[1])))


class VideoMAEOutput(NamedTuple):
    """The three losses (float32 scalars) and the predictions [B, M, P]."""

    loss: torch.Tensor
    reconstruction_loss: torch.Tensor
    contrastive_loss: torch.Tensor
    predicted_BMP: torch.Tensor


class VideoMAE(nn.Module):
    """Encoder, decoder and objective: `VideoMAE(config)(clip_BTHWC, mask)`.

    `impl` chooses the kernels, `checkpointing` recomputes blocks in the backward pass.
    Source: VideoMAE (Tong et al., 2022), dual masking of VideoMAE V2 (Wang et al., 2023) through the mask.
    """

    def __init__(self, config: ModelConfig | None = None, objective: ObjectiveConfig | None = None, *, impl: str = "auto",
                 checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config or ModelConfig()
        self.objective_config = objective or ObjectiveConfig()
        self.encoder = Encoder(self.config, impl=impl, checkpointing=checkpointing)
        self.decoder = Decoder(self.config, impl=impl, checkpointing=checkpointing)
        self.objective = Objective(self.objective_config, self.config.tubelet, impl)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(time, height, width) in tokens: what the mask functions take."""
        return self.config.grid

    def predict(self, clip_BTHWC: torch.Tensor, mask: TokenMask) -> torch.Tensor:
        """Predictions [B, M, P] of the masked tubelets, P ordered (frame, row, column, channel)."""
        return self.decoder(self.encoder(clip_BTHWC, mask.visible_BV), mask)

    def forward(self, clip_BTHWC: torch.Tensor, mask: TokenMask) -> VideoMAEOutput:
        """clip_BTHWC: uint8. Raises: ValueError for a clip of another size than the configuration's."""
        predicted_BMP = self.predict(clip_BTHWC, mask)
        losses = self.objective(predicted_BMP, clip_BTHWC, mask.masked_BM)
        return VideoMAEOutput(losses.loss, losses.reconstruction_loss, losses.contrastive_loss, predicted_BMP)


class VideoClassifier(nn.Module):
    """Action recognition: encoder without its last norm, mean over all tokens, `fc_norm`, a linear head.

    `VideoClassifier(config, ClassifierConfig(...))`, or `VideoClassifier(config, K)` for K classes without names.
    Source: the official fine-tuning model of VideoMAE; linear layers start from a normal distribution of 0.02.
    """

    def __init__(self, config: ModelConfig, classifier: ClassifierConfig | int, *, impl: str = "auto", checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.classifier_config = classifier = ClassifierConfig(num_classes=classifier) if isinstance(classifier, int) else classifier
        self.encoder = Encoder(config, impl=impl, checkpointing=checkpointing, final_norm=False)
        self.fc_norm = nn.LayerNorm(config.embed_dim, eps=NORM_EPS)
        self.head_dropout = nn.Dropout(classifier.head_dropout)
        self.head = nn.Linear(config.embed_dim, classifier.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear | PackedProjection) and module is not self.encoder.patch_embed:
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.head.weight.data.mul_(classifier.head_init_scale)

    def forward(self, clip_BTHWC: torch.Tensor) -> torch.Tensor:
        """Logits [B, K]."""
        return self.head(self.head_dropout(self.fc_norm(self.encoder(clip_BTHWC).mean(dim=1))))


def pretraining_macs(config: ModelConfig, num_visible: int, num_masked: int) -> float:
    """Multiply-accumulates of one clip's forward pass; training costs about 6 floating point operations for each."""
    def blocks(num_tokens: int, width: int, depth: int, mlp_ratio: float) -> float:
        return depth * (num_tokens * width**2 * (4 + 2 * mlp_ratio) + 2 * num_tokens**2 * width)

    d, e = config.embed_dim, config.decoder_embed_dim
    return (num_visible * config.tubelet_values * d + blocks(num_visible, d, config.depth, config.mlp_ratio) + num_visible * d * e
            + blocks(num_visible + num_masked, e, config.decoder_depth, config.decoder_mlp_ratio)
            + num_masked * e * config.tubelet_values)


def _xavier(*roots: nn.Module) -> None:
    for root in roots:
        for module in root.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
