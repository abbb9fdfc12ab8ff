"""The masked autoencoder, readable top to bottom: Encoder, Decoder, VideoMAE, VideoClassifier.

Semantics of the official VideoMAE (Tong et al., 2022), but only visible tubelets are ever embedded,
clips stay uint8, and the decoder runs only the tokens that the loss needs. Options of the
configuration make it image MAE (He et al., 2021) or mae_st (Feichtenhofer et al., 2022).
Letters: B clips, T frames, H W pixels, C channels, N tokens of the grid, V visible, M masked
(predicted), X visible ones that the decoder gets again, A class tokens, S tokens of a sequence, D
encoder width, E decoder width, P values of a tubelet, K classes.
"""

from typing import NamedTuple

import torch
from torch import nn

from video_mae.config import ClassifierConfig, ClipsConfig, ModelConfig, ObjectiveConfig
from video_mae.kernels.tubelets import gather_tubelets
from video_mae.model.blocks import Blocks, PackedProjection
from video_mae.model.masking import AnyMask, ContextMask
from video_mae.model.objective import Losses, Objective, target_clip
from video_mae.model.positions import Grid, Positions


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
        # patch_embed keeps PyTorch's default, as the official Conv3d does
        self.blocks.apply(_xavier)

    def grid_of(self, clip_BTHWC: torch.Tensor) -> Grid:
        """(time, height, width) of a clip in tokens: what the mask functions take. Raises:
        ValueError for a clip that has none.
        """
        c, sides = self.config, clip_BTHWC.shape[1:]
        is_whole = len(sides) == 4 and sides[3] == c.in_channels
        for side, unit in zip(sides, c.tubelet, strict=False):
            is_whole = is_whole and side >= unit and side % unit == 0
        if not is_whole:
            raise ValueError(
                f"clip_BTHWC: (frames, height, width, channels) is {tuple(sides)}, the model takes "
                f"multiples of {c.tubelet} with {c.in_channels} channels"
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
        c, num_clips = self.config, clip_BTHWC.shape[0]
        positions, class_position_D = self.positions(self.grid_of(clip_BTHWC))
        if visible_BV is None:
            tokens_N = torch.arange(len(positions), device=clip_BTHWC.device)
            visible_BV = tokens_N.expand(num_clips, -1)
        else:
            positions = positions[visible_BV]
        dtype = self.patch_embed.weight.dtype
        tubelets_BVP = gather_tubelets(
            clip_BTHWC, visible_BV, c.tubelet, c.mean, c.std, dtype, self.impl
        )
        tokens_BSD = self.patch_embed(tubelets_BVP) + positions.to(dtype)
        if self.class_token is not None:
            class_D = self.class_token + class_position_D
            class_BAD = class_D.expand(num_clips, c.class_tokens, -1)
            tokens_BSD = torch.cat([class_BAD, tokens_BSD], dim=1)
        return self.norm(self.blocks(tokens_BSD, last=tokens_BSD.shape[1]))


class Decoder(nn.Module):
    """A narrow ViT that predicts the masked tubelets from the encoded visible ones."""

    def __init__(
        self, config: ModelConfig, *, impl: str = "auto", checkpointing: bool = False
    ) -> None:
        super().__init__()
        c = self.config = config
        width = c.decoder_embed_dim
        self.encoder_to_decoder = nn.Linear(c.embed_dim, width, bias=c.decoder_embed_bias)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.positions = Positions(c, width)
        self.class_token = None
        if c.class_tokens and c.decoder_class_token == "own":
            self.class_token = nn.Parameter(0.02 * torch.randn(width))
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
        self.blocks.apply(_xavier)
        self.head.apply(_xavier)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(
        self, encoded_BSD: torch.Tensor, mask: AnyMask, grid: Grid | None = None
    ) -> torch.Tensor:
        """Predictions [B, M, P] of the masked tubelets, P ordered (frame, row, column, channel).

        encoded_BSD: class tokens, then the visible ones; grid: of the clip, where it is not the
        model's. Raises: ValueError for a mask that lacks what model.decoder_context = all needs.
        """
        c = self.config
        positions_NE, class_position_E = self.positions(grid or c.grid)
        seen_BSE = self.encoder_to_decoder(encoded_BSD)
        positions_NE = positions_NE.to(seen_BSE.dtype)
        hidden_BM = mask.masked_BM
        if c.decoder_context == "all":
            if isinstance(mask, ContextMask):
                hidden_BM = torch.cat([mask.context_BX, hidden_BM], dim=1)
            elif mask.visible_BV.shape[1] + hidden_BM.shape[1] != len(positions_NE):
                raise ValueError(
                    "mask: leaves tokens out, and does not say which of them model.decoder_context "
                    '= all has the decoder see; make it by token_mask(..., decoder_context="all")'
                )
        class_BAE = seen_BSE[:, : c.class_tokens]
        if self.class_token is not None:
            class_BAE = self.class_token.expand_as(class_BAE)
        parts = [
            seen_BSE[:, c.class_tokens :] + positions_NE[mask.visible_BV],
            self.mask_token + positions_NE[hidden_BM],
        ]
        if c.class_tokens:
            parts.insert(0, class_BAE + class_position_E)
        predicted_BME = self.blocks(torch.cat(parts, dim=1), last=mask.masked_BM.shape[1])
        return self.head(self.norm(predicted_BME))


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

    clips_config: ClipsConfig | None = None
    """How the clips of its training were made, where that is known; a model folder keeps it."""

    def __init__(
        self,
        config: ModelConfig | None = None,
        objective: ObjectiveConfig | None = None,
        *,
        impl: str = "auto",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        c = self.config = config or ModelConfig()
        o = self.objective_config = objective or ObjectiveConfig()
        if (o.target == "features") != (c.target_width is not None):
            raise ValueError(
                f"objective.target: {o.target} and model.target_width = {c.target_width} do not "
                "belong together; features have a width, that of their teacher"
            )
        self.encoder = Encoder(c, impl=impl, checkpointing=checkpointing, final_norm=c.encoder_norm)
        self.decoder = Decoder(c, impl=impl, checkpointing=checkpointing)
        self.objective = Objective(self.objective_config, c.predicted_tubelet, impl)

    @property
    def grid(self) -> Grid:
        """(time, height, width) in tokens: what the mask functions take."""
        return self.config.grid

    def predict(
        self, clip_BTHWC: torch.Tensor, mask: AnyMask, grid: Grid | None = None
    ) -> torch.Tensor:
        """Predictions [B, M, P] of the masked tubelets, P ordered (frame, row, column, channel).

        A mask belongs to a grid: name it where it is not the model's. Raises: ValueError for a clip
        of another grid, or a mask that lacks what model.decoder_context = all needs.
        """
        grid, c = grid or self.grid, self.config
        sides = [count * side for count, side in zip(grid, c.tubelet, strict=True)]
        expected = (*sides, c.in_channels)
        if clip_BTHWC.shape[1:] != expected:
            raise ValueError(
                "clip_BTHWC: (frames, height, width, channels) is "
                f"{tuple(clip_BTHWC.shape[1:])}, the mask is of a clip of {expected}; name the "
                "grid of another mask as `grid`"
            )
        return self.decoder(self.encoder(clip_BTHWC, mask.visible_BV), mask, grid)

    def forward(
        self,
        clip_BTHWC: torch.Tensor,
        mask: AnyMask | None = None,
        grid: Grid | None = None,
        target_BNF: torch.Tensor | None = None,
    ) -> VideoMAEOutput | torch.Tensor:
        """clip_BTHWC: uint8; grid: of the mask, where it is not the model's; target_BNF: of all
        tokens, where objective.target = features. Without a mask all tokens of the encoder, for
        those who have to go through a wrapper of the whole model (ZeRO 3). Raises: ValueError for a
        clip of another grid, or a target that is missing or not needed.
        """
        if mask is None:
            return self.encoder(clip_BTHWC)
        predicted_BMP = self.predict(clip_BTHWC, mask, grid)
        target = target_BNF
        if target is None:
            target = target_clip(clip_BTHWC, self.config, self.objective_config)
        losses: Losses = self.objective(predicted_BMP, target, mask.masked_BM)
        return VideoMAEOutput(*losses, predicted_BMP)


class VideoClassifier(nn.Module):
    """Action recognition: encoder, pooling, a linear head.

    A mean leaves out the encoder's last norm and is normed by `fc_norm`; the first token has only
    the former.

    `VideoClassifier(config, ClassifierConfig(...))`, or `VideoClassifier(config, K)` for K classes
    without names. Source: the official fine-tuning model of VideoMAE; linear layers start from a
    normal distribution of 0.02.
    """

    clips_config: ClipsConfig | None = None  # classifier_config says it

    def __init__(
        self,
        config: ModelConfig,
        classifier: ClassifierConfig | int,
        *,
        impl: str = "auto",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(classifier, int):
            classifier = ClassifierConfig(num_classes=classifier)
        if classifier.num_classes is None:
            raise ValueError(
                "classifier.num_classes: null is for a training, whose data has them; give a number"
            )
        self.config, self.classifier_config = config, classifier
        is_first = classifier.pooling == "first"
        self.encoder = Encoder(config, impl=impl, checkpointing=checkpointing, final_norm=is_first)
        norm = nn.LayerNorm(config.embed_dim, eps=config.head_norm_eps)
        self.fc_norm = nn.Identity() if is_first else norm
        self.head_dropout = nn.Dropout(classifier.head_dropout)
        self.head = nn.Linear(config.embed_dim, classifier.num_classes)
        for module in (*self.encoder.blocks.modules(), self.head):
            if isinstance(module, nn.Linear | PackedProjection):
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
    c, encoded = config, config.class_tokens + num_visible
    seen = encoded + num_context + num_masked
    macs = encoder_macs(c, num_visible)
    macs += encoded * c.embed_dim * c.decoder_embed_dim
    macs += _block_macs(seen, c.decoder_embed_dim, c.decoder_depth, c.decoder_mlp_ratio)
    return macs + num_masked * c.decoder_embed_dim * c.predicted_values


def encoder_macs(config: ModelConfig, num_tokens: int) -> float:
    """Multiply-accumulates of the encoder for num_tokens tubelets of a clip; a classifier sees
    config.num_tokens.
    """
    return num_tokens * config.tubelet_values * config.embed_dim + _block_macs(
        config.class_tokens + num_tokens, config.embed_dim, config.depth, config.mlp_ratio
    )


def _block_macs(num_tokens: int, width: int, depth: int, mlp_ratio: float) -> float:
    return depth * (num_tokens * width**2 * (4 + 2 * mlp_ratio) + 2 * num_tokens**2 * width)


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
