"""What is hidden, and what is minimised."""

import math
from dataclasses import dataclass
from typing import Literal

from video_mae.config.schema import knob, require


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """L_total = L_rec + contrastive_weight * L_con (docs/objective.md)."""

    normalize: Literal["channel", "tubelet", "none"] = knob(
        "channel",
        "statistics that normalise a target: per channel of a "
        "tubelet (VideoMAE), per tubelet (MAE, mae_st), or raw [0, 1] pixels",
    )
    pixels: Literal["unit", "normalized"] = knob(
        "unit",
        "what a target is made of before that: pixels in [0, 1] (VideoMAE), or as the "
        "encoder sees them, normalised by model.mean and model.std (MAE, mae_st)",
    )
    contrastive_weight: float = knob(
        0.0, "lambda; 0 is plain VideoMAE and computes no contrastive loss"
    )
    temperature: float = knob(
        0.1, "tau of the contrastive softmax (its start value where it is learned)"
    )
    learn_temperature: bool = knob(False, "train tau, kept between 0.01 and 1")
    negatives: Literal["clip", "batch"] = knob(
        "clip", "which masked tubelets compete: of the same clip, or of the rank's micro-batch"
    )
    contrastive_memory: Literal["fast", "least"] = knob(
        "fast",
        "how the kernels compute it: with the similarities of some tubelets at a "
        "time in memory, or streamed and computed twice",
    )

    def __post_init__(self) -> None:
        require(
            0 <= self.contrastive_weight < math.inf,
            "objective.contrastive_weight",
            self.contrastive_weight,
            "must be at least 0, finite",
        )
        require(
            0.01 <= self.temperature <= 1,
            "objective.temperature",
            self.temperature,
            "must be in [0.01, 1]",
        )
        require(
            not self.learn_temperature or 0.01 < self.temperature < 1,
            "objective.temperature",
            self.temperature,
            "must be inside (0.01, 1) to be learned",
        )
        require(
            not self.learn_temperature or self.contrastive_weight > 0,
            "objective.learn_temperature",
            self.learn_temperature,
            "needs objective.contrastive_weight above 0",
        )


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which tokens the encoder does not see, and which of those the decoder predicts."""

    kind: Literal["tube", "random", "random_kept", "frame"] = knob(
        "tube",
        "hide the same places in every frame, any tokens, any tokens "
        "counted by those that are kept (MAE, mae_st), or whole frames",
    )
    ratio: float = knob(
        0.9,
        "share hidden: int(ratio * tokens a frame) a frame (tube), of all (random), or of the frames (frame); "
        "random_kept keeps int((1 - ratio) * tokens)",
    )
    decoder_mask_ratio: float = knob(
        0.0,
        "share of the tokens the decoder skips by a running cell (dual masking of VideoMAE V2: "
        "0.25, 0.5 or 0.75); 0 predicts every hidden token",
    )

    def __post_init__(self) -> None:
        require(0 < self.ratio < 1, "mask.ratio", self.ratio, "must be between 0 and 1")
        require(
            self.decoder_mask_ratio in (0.0, 0.25, 0.5, 0.75),
            "mask.decoder_mask_ratio",
            self.decoder_mask_ratio,
            "must be 0, 0.25, 0.5 or 0.75",
        )
