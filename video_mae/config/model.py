"""The architecture, and the published sizes."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from video_mae.config.schema import knob, require

Sampling = Literal["dense", "uniform", "parts", "parts_v2"]
"""How the frames of a clip that is to be named are chosen."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture: the default is ViT-B of VideoMAE at 16 x 224 x 224. A still image has
    num_frames=tubelet_size=1.
    """

    in_channels: int = knob(3, "channels of a pixel")
    num_frames: int = knob(16, "frames of a clip")
    height: int = knob(224, "pixels")
    width: int = knob(224, "pixels")
    tubelet_size: int = knob(2, "frames of a tubelet")
    patch_size: int = knob(16, "pixels, height and width of a tubelet")
    embed_dim: int = knob(768, "encoder width")
    depth: int = knob(12, "encoder blocks")
    num_heads: int = knob(12, "encoder attention heads")
    mlp_ratio: float = knob(4.0, "encoder MLP width over embed_dim")
    decoder_embed_dim: int = knob(384, "decoder width")
    decoder_depth: int = knob(4, "decoder blocks")
    decoder_num_heads: int = knob(6, "decoder attention heads")
    decoder_mlp_ratio: float = knob(4.0, "decoder MLP width over decoder_embed_dim")
    drop_path: float = knob(
        0.0, "stochastic depth of the last encoder block, growing linearly from 0"
    )
    mean: tuple[float, ...] = knob(
        IMAGENET_MEAN, "channel means of the input in [0, 1]; one value serves all channels"
    )
    std: tuple[float, ...] = knob(IMAGENET_STD, "channel standard deviations, likewise")
    positions: Literal["sinusoid", "sincos", "learned", "separate"] = knob(
        "sinusoid",
        "sinusoid of the flattened index (VideoMAE); sine and cosine of row and column (MAE), and of time where there are "
        "more frames of tokens; a learned table; or learned tables of space and of time, added (mae_st)",
    )
    position_grid: tuple[int, int, int] | None = knob(
        None,
        "grid (time, height, width) in tokens that the positions were made for, "
        "where it is not the model's own",
    )
    resize_positions: Literal["interpolate", "compute"] = knob(
        "interpolate",
        "how sinusoid and sincos meet a grid other than "
        "position_grid; learned tables are always interpolated",
    )
    class_tokens: int = knob(
        0,
        "copies of a learned token before the others: 1 in image MAE, one a frame of tokens once inflated",
    )
    decoder_class_token: Literal["encoded", "own"] = knob(
        "encoded",
        "the decoder's class token, where there is one: the encoder's as it "
        "comes out (MAE), or one of its own (mae_st)",
    )
    qkv_bias: Literal["none", "qv", "qkv"] = knob(
        "qv", "which of query, key and value have a bias; a key's changes no output, MAE has one"
    )
    decoder_embed_bias: bool = knob(
        False, "a bias of the projection from encoder to decoder (MAE, mae_st)"
    )
    layer_scale: float = knob(
        0.0, "first value of a factor a channel on every residual branch; 0 has none"
    )
    norm_eps: float = knob(1e-6, "epsilon of the norms of all blocks, and of the encoder's last")
    head_norm_eps: float = knob(1e-6, "epsilon of the norm before a head: decoder.norm and fc_norm")
    encoder_norm: bool = knob(
        True,
        "a norm after the encoder's last block in pretraining; a classifier's pooling decides for itself",
    )
    predicted_frames: int | None = knob(
        None, "frames of a clip that the decoder predicts, spread evenly (mae_st: half); null: all"
    )
    decoder_context: Literal["scored", "all"] = knob(
        "scored",
        "where dual masking has the decoder see mask tokens: at those places alone "
        "that are scored, or at all that the running cell chooses (VideoMAE V2)",
    )

    def __post_init__(self) -> None:
        for name in (
            "in_channels",
            "num_frames",
            "height",
            "width",
            "tubelet_size",
            "patch_size",
            "embed_dim",
            "depth",
            "num_heads",
            "decoder_embed_dim",
            "decoder_depth",
            "decoder_num_heads",
        ):
            require(
                getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1"
            )
        for side, unit in (
            ("num_frames", "tubelet_size"),
            ("height", "patch_size"),
            ("width", "patch_size"),
        ):
            require(
                getattr(self, side) % getattr(self, unit) == 0,
                f"model.{side}",
                getattr(self, side),
                f"is not a multiple of model.{unit} = {getattr(self, unit)}",
            )
        for width, heads in (
            ("embed_dim", "num_heads"),
            ("decoder_embed_dim", "decoder_num_heads"),
        ):
            require(
                getattr(self, width) % getattr(self, heads) == 0,
                f"model.{width}",
                getattr(self, width),
                f"is not a multiple of model.{heads} = {getattr(self, heads)}",
            )
            require(
                getattr(self, width) % 2 == 0,
                f"model.{width}",
                getattr(self, width),
                "must be even (sine and cosine pairs)",
            )
        for name, width in (
            ("mlp_ratio", self.embed_dim),
            ("decoder_mlp_ratio", self.decoder_embed_dim),
        ):
            ratio = getattr(self, name)
            require(
                math.isfinite(ratio) and round(ratio * width) >= 1,
                f"model.{name}",
                ratio,
                f"of {width} is no width of an MLP",
            )
        require(0 <= self.drop_path < 1, "model.drop_path", self.drop_path, "must be in [0, 1)")
        for name in ("mean", "std"):
            values = getattr(self, name)
            require(
                len(values) in (1, self.in_channels),
                f"model.{name}",
                values,
                f"must have 1 value or one for each of model.in_channels = {self.in_channels}",
            )
            require(all(map(math.isfinite, values)), f"model.{name}", values, "must be finite")
        require(min(self.std) > 0, "model.std", self.std, "must be above 0")
        for name in ("embed_dim", "decoder_embed_dim"):
            require(
                self.positions != "sincos" or getattr(self, name) % 4 == 0,
                f"model.{name}",
                getattr(self, name),
                "must be a multiple of 4 for model.positions = sincos",
            )
        require(
            self.position_grid is None or min(self.position_grid) >= 1,
            "model.position_grid",
            self.position_grid,
            "must be at least 1 each",
        )
        require(
            self.class_tokens >= 0, "model.class_tokens", self.class_tokens, "must be at least 0"
        )
        for name in ("norm_eps", "head_norm_eps"):
            require(
                0 < getattr(self, name) < 1,
                f"model.{name}",
                getattr(self, name),
                "must be between 0 and 1",
            )
        require(
            0 <= self.layer_scale < math.inf,
            "model.layer_scale",
            self.layer_scale,
            "must be at least 0, finite",
        )
        frames = self.predicted_frames
        require(
            frames is None or (1 <= frames <= self.num_frames and frames % self.grid[0] == 0),
            "model.predicted_frames",
            frames,
            f"must be a multiple of the {self.grid[0]} frames of tokens, at most model.num_frames = {self.num_frames}",
        )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "ModelConfig":
        """A published size: small, base, large, huge (VideoMAE) or giant (VideoMAE V2), with any
        field changed.

        Raises: ValueError for an unknown name. Source: the official pretraining scripts.
        """
        require(name in PRESETS, "model.preset", name, f"is not one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @property
    def grid(self) -> tuple[int, int, int]:
        """(time, height, width) in tokens."""
        return (
            self.num_frames // self.tubelet_size,
            self.height // self.patch_size,
            self.width // self.patch_size,
        )

    @property
    def tubelet(self) -> tuple[int, int, int]:
        """(frames, height, width) of a tubelet in pixels."""
        return self.tubelet_size, self.patch_size, self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def tubelet_values(self) -> int:
        """P: values of a tubelet."""
        return self.tubelet_size * self.patch_size**2 * self.in_channels

    @property
    def predicted_tubelet(self) -> tuple[int, int, int]:
        """(frames, height, width) that the decoder predicts of a tubelet: all of it, but for
        `predicted_frames`.
        """
        return (
            (self.predicted_frames or self.num_frames) // self.grid[0],
            self.patch_size,
            self.patch_size,
        )

    @property
    def predicted_values(self) -> int:
        """Outputs of the decoder's head."""
        return self.predicted_tubelet[0] * self.patch_size**2 * self.in_channels


def _size(
    embed_dim: int, depth: int, num_heads: int, decoder: tuple[int, int, int], **more: Any
) -> dict[str, Any]:
    width, heads, blocks = decoder
    return dict(
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        decoder_embed_dim=width,
        decoder_num_heads=heads,
        decoder_depth=blocks,
        **more,
    )


PRESETS: dict[str, dict[str, Any]] = {
    "small": _size(384, 12, 6, (192, 3, 4)),
    "base": _size(768, 12, 12, (384, 6, 4)),
    "large": _size(1024, 24, 16, (512, 8, 12)),
    "huge": _size(1280, 32, 16, (640, 8, 12)),
    "giant": _size(1408, 40, 16, (512, 8, 4), patch_size=14, mlp_ratio=48 / 11),
}


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The head of a classifier, and how it wants frames chosen: what a model folder needs to name
    the action in a video.
    """

    num_classes: int = knob(400, "outputs of the head")
    class_names: tuple[str, ...] = knob(
        (), "names of the labels 0, 1, ...; empty where they are not known"
    )
    sampling: Sampling = knob(
        "dense",
        "how a clip's frames are chosen: `stride` frames apart; one of each of num_frames equal parts of "
        "the whole video (uniform, TSN); or of parts of whole frames, which leave out its end (parts: VideoMAE on "
        "Something-Something; parts_v2: VideoMAE V2). In tests the last three are the same",
    )
    stride: int = knob(4, "video frames from one frame of a dense clip to the next")
    antialias: bool = knob(
        True,
        "average what resizing leaves out, in training, validation and tests; false: as OpenCV resizes, and "
        "so the fine-tuning and the tests of VideoMAE do",
    )
    head_dropout: float = knob(0.0, "dropout before the head")
    head_init_scale: float = knob(0.001, "factor of the head's first weights")
    pooling: Literal["mean", "first", "rest"] = knob(
        "mean",
        "mean of the patch tokens, then fc_norm; the encoder's norm, then the first "
        "token: the class token where there is one; or, as mean, of all tokens but the first: "
        "mae_st without a class token leaves out its first patch",
    )

    def __post_init__(self) -> None:
        require(
            self.num_classes >= 1, "classifier.num_classes", self.num_classes, "must be at least 1"
        )
        require(
            len(self.class_names) in (0, self.num_classes),
            "classifier.class_names",
            f"({len(self.class_names)} names)",
            f"must name each of classifier.num_classes = {self.num_classes}, or none",
        )
        require(self.stride >= 1, "classifier.stride", self.stride, "must be at least 1")
        require(
            0 <= self.head_dropout < 1,
            "classifier.head_dropout",
            self.head_dropout,
            "must be in [0, 1)",
        )
        require(
            0 <= self.head_init_scale < math.inf,
            "classifier.head_init_scale",
            self.head_init_scale,
            "must be at least 0, finite",
        )
