"""The architecture, and the published sizes."""

import math
from typing import Any, Literal

from video_mae.config.schema import MOST_SIZE, Knobs, knob, require
from video_mae.config.yaml_text import MAX_VALUES

Sampling = Literal["dense", "uniform", "parts", "parts_v2"]
"""How the frames of a clip that is to be named are chosen."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MOST_DEPTH = 1024
"""The largest published ViT has 48 blocks, of a width of 6,144 (ViT-22B)."""
MOST_TOKENS, MOST_VALUES, MOST_WEIGHTS = 2**20, 2**31, 2**38
"""Of a clip: its positions are computed, whatever their number, and its values are what a decoder
hands over at most. Of the matrices of all blocks of the encoder, or the decoder: a terabyte.
"""


PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "embed_dim": 384,
        "depth": 12,
        "num_heads": 6,
        "decoder_embed_dim": 192,
        "decoder_depth": 4,
        "decoder_num_heads": 3,
    },
    "base": {
        "embed_dim": 768,
        "depth": 12,
        "num_heads": 12,
        "decoder_embed_dim": 384,
        "decoder_depth": 4,
        "decoder_num_heads": 6,
    },
    "large": {
        "embed_dim": 1024,
        "depth": 24,
        "num_heads": 16,
        "decoder_embed_dim": 512,
        "decoder_depth": 12,
        "decoder_num_heads": 8,
    },
    "huge": {
        "embed_dim": 1280,
        "depth": 32,
        "num_heads": 16,
        "decoder_embed_dim": 640,
        "decoder_depth": 12,
        "decoder_num_heads": 8,
    },
    "giant": {
        "embed_dim": 1408,
        "depth": 40,
        "num_heads": 16,
        "decoder_embed_dim": 512,
        "decoder_depth": 4,
        "decoder_num_heads": 8,
        "patch_size": 14,
        "mlp_ratio": 48 / 11,
    },
}
"""The published sizes."""


class ModelConfig(Knobs):
    """The architecture: the default is ViT-B of VideoMAE at 16 x 224 x 224. A still image has
    num_frames=tubelet_size=1.
    """

    preset_values = PRESETS

    in_channels: int = knob(3, "channels of a pixel", low=1, high=MOST_SIZE)
    num_frames: int = knob(16, "frames of a clip", low=1)
    height: int = knob(224, "pixels", low=1)
    width: int = knob(224, "pixels", low=1)
    tubelet_size: int = knob(2, "frames of a tubelet", low=1)
    patch_size: int = knob(16, "pixels, height and width of a tubelet", low=1)
    embed_dim: int = knob(768, "encoder width", low=1)
    depth: int = knob(12, "encoder blocks", low=1, high=MOST_DEPTH)
    num_heads: int = knob(12, "encoder attention heads", low=1)
    mlp_ratio: float = knob(4.0, "encoder MLP width over embed_dim")
    decoder_embed_dim: int = knob(384, "decoder width", low=1)
    decoder_depth: int = knob(4, "decoder blocks", low=1, high=MOST_DEPTH)
    decoder_num_heads: int = knob(6, "decoder attention heads", low=1)
    decoder_mlp_ratio: float = knob(4.0, "decoder MLP width over decoder_embed_dim")
    drop_path: float = knob(
        0.0, "stochastic depth of the last encoder block, growing linearly from 0", low=0, below=1
    )
    mean: tuple[float, ...] = knob(
        IMAGENET_MEAN, "channel means of the input in [0, 1]; one value serves all channels"
    )
    std: tuple[float, ...] = knob(IMAGENET_STD, "channel standard deviations, likewise", above=0)
    positions: Literal["sinusoid", "sincos", "learned", "separate"] = knob(
        "sinusoid",
        "sinusoid of the flattened index (VideoMAE); sine and cosine of row and column (MAE), and "
        "of time where there are more frames of tokens; a learned table; or learned tables of "
        "space and of time, added (mae_st)",
    )
    position_grid: tuple[int, int, int] | None = knob(
        None,
        "grid (time, height, width) in tokens that the positions were made for, "
        "where it is not the model's own",
        low=1,
    )
    resize_positions: Literal["interpolate", "compute"] = knob(
        "interpolate",
        "how sinusoid and sincos meet a grid other than "
        "position_grid; learned tables are always interpolated",
    )
    class_tokens: int = knob(
        0,
        "copies of a learned token before the others: 1 in image MAE, one a frame of tokens once "
        "inflated",
        low=0,
        high=MOST_SIZE,
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
        0.0, "first value of a factor a channel on every residual branch; 0 has none", low=0
    )
    norm_eps: float = knob(
        1e-6, "epsilon of the norms of all blocks, and of the encoder's last", above=0, below=1
    )
    head_norm_eps: float = knob(
        1e-6, "epsilon of the norm before a head: decoder.norm and fc_norm", above=0, below=1
    )
    encoder_norm: bool = knob(
        True,
        "a norm after the encoder's last block in pretraining; a classifier's pooling decides for "
        "itself",
    )
    predicted_frames: int | None = knob(
        None, "frames of a clip that the decoder predicts, spread evenly (mae_st: half); null: all"
    )
    target_width: int | None = knob(
        None,
        "features that the decoder predicts of a tubelet, set by objective.teacher; null: its "
        "pixels",
        low=1,
        high=MOST_SIZE,
    )
    decoder_context: Literal["scored", "all"] = knob(
        "scored",
        "where dual masking has the decoder see mask tokens: at those places alone "
        "that are scored, or at all that the running cell chooses (VideoMAE V2)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, unit in (
            ("num_frames", "tubelet_size"),
            ("height", "patch_size"),
            ("width", "patch_size"),
            ("embed_dim", "num_heads"),
            ("decoder_embed_dim", "decoder_num_heads"),
        ):
            value, divisor = getattr(self, name), getattr(self, unit)
            remedy = f"is not a multiple of model.{unit} = {divisor}"
            require(value % divisor == 0, name, value, remedy)
        values = self.num_tokens * self.tubelet_values
        remedy = f"x model.height x model.width are {self.num_tokens} tokens of {values} values"
        is_believed = self.num_tokens <= MOST_TOKENS and values <= MOST_VALUES
        require(is_believed, "num_frames", self.num_frames, f"{remedy}, which are not believed")
        made_for = self.position_grid or self.grid
        is_believed = math.prod(made_for) <= MOST_TOKENS
        require(is_believed, "position_grid", made_for, "has more tokens than are believed")
        # pairs of sine and cosine: of the flattened index, or of row and column
        pair = 4 if self.positions == "sincos" else 2
        for part in ("", "decoder_"):
            width, ratio = getattr(self, f"{part}embed_dim"), getattr(self, f"{part}mlp_ratio")
            remedy = f"of {width} is no width of an MLP"
            require(round(ratio * width) >= 1, f"{part}mlp_ratio", ratio, remedy)
            remedy = f"must be a multiple of {pair} for model.positions = {self.positions}"
            require(width % pair == 0, f"{part}embed_dim", width, remedy)
            depth = getattr(self, f"{part}depth")
            remedy = f"blocks of width {width} have more than {MOST_WEIGHTS} weights"
            weights = depth * width**2 * (4 + 2 * ratio)
            require(weights <= MOST_WEIGHTS, f"{part}depth", depth, remedy)
        for name in ("mean", "std"):
            values = getattr(self, name)
            remedy = f"must have 1 value or one for each of model.in_channels = {self.in_channels}"
            require(len(values) in (1, self.in_channels), name, values, remedy)
        frames, times = self.predicted_frames, self.grid[0]
        require(
            frames is None or (1 <= frames <= self.num_frames and frames % times == 0),
            "predicted_frames",
            frames,
            f"must be a multiple of the {times} frames of tokens, at most model.num_frames = "
            f"{self.num_frames}",
        )
        remedy = "is of pixels: leave it out where model.target_width is set"
        require(frames is None or self.target_width is None, "predicted_frames", frames, remedy)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "ModelConfig":
        """A published size: small, base, large, huge (VideoMAE) or giant (VideoMAE V2), with any
        field changed.

        Raises: ValueError for an unknown name. Source: the official pretraining scripts.
        """
        require(name in PRESETS, "model.preset", name, f"is not one of {', '.join(PRESETS)}")
        return cls(**(PRESETS[name] | changes))

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
        return math.prod(self.grid)

    @property
    def tubelet_values(self) -> int:
        """P: values of a tubelet."""
        return math.prod(self.tubelet) * self.in_channels

    @property
    def predicted_tubelet(self) -> tuple[int, int, int]:
        """(frames, height, width) that the decoder predicts of a tubelet: all of it, but for
        `predicted_frames`.
        """
        frames = (self.predicted_frames or self.num_frames) // self.grid[0]
        return frames, self.patch_size, self.patch_size

    @property
    def predicted_values(self) -> int:
        """Outputs of the decoder's head: features, or the pixels of `predicted_tubelet`."""
        return self.target_width or math.prod(self.predicted_tubelet) * self.in_channels


class ClassifierConfig(Knobs):
    """The head of a classifier, and how it wants frames chosen: what a model folder needs to name
    the action in a video.
    """

    num_classes: int | None = knob(
        400,
        "outputs of the head; null: as many as there are classes in data.source",
        low=1,
        high=MAX_VALUES,
    )
    class_names: tuple[str, ...] = knob(
        (), "names of the labels 0, 1, ...; empty where they are not known"
    )
    sampling: Sampling = knob(
        "dense",
        "how a clip's frames are chosen: `stride` frames apart; one of each of num_frames equal "
        "parts of the whole video (uniform, TSN); or of parts of whole frames, which leave out "
        "its end (parts: VideoMAE on Something-Something; parts_v2: VideoMAE V2). In tests the "
        "last three are the same",
    )
    stride: int = knob(4, "video frames from one frame of a dense clip to the next", low=1)
    antialias: bool = knob(
        True,
        "average what resizing leaves out, in training, validation and tests; false: as OpenCV "
        "resizes, and so the fine-tuning and the tests of VideoMAE do",
    )
    head_dropout: float = knob(0.0, "dropout before the head", low=0, below=1)
    head_init_scale: float = knob(0.001, "factor of the head's first weights", low=0)
    pooling: Literal["mean", "first", "rest"] = knob(
        "mean",
        "mean of the patch tokens, then fc_norm; the encoder's norm, then the first "
        "token: the class token where there is one; or, as mean, of all tokens but the first: "
        "mae_st without a class token leaves out its first patch",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.num_classes is None or len(self.class_names) in (0, self.num_classes),
            "class_names",
            f"({len(self.class_names)} names)",
            f"must name each of classifier.num_classes = {self.num_classes}, or none",
        )
