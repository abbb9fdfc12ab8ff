"""What is hidden, and what is minimised."""

from typing import Literal

from video_mae.config.schema import Knobs, knob, require


class ObjectiveConfig(Knobs):
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
        0.0, "lambda; 0 is plain VideoMAE and computes no contrastive loss", low=0
    )
    temperature: float = knob(
        0.1,
        "tau of the contrastive softmax (its start value where it is learned)",
        low=0.01,
        high=1,
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
        super().__post_init__()
        if self.learn_temperature:
            require(
                0.01 < self.temperature < 1,
                "temperature",
                self.temperature,
                "must be inside (0.01, 1) to be learned",
            )
            require(
                self.contrastive_weight > 0,
                "learn_temperature",
                self.learn_temperature,
                "needs objective.contrastive_weight above 0",
            )


class MaskConfig(Knobs):
    """Which tokens the encoder does not see, and which of those the decoder predicts."""

    kind: Literal["tube", "random", "random_kept", "frame"] = knob(
        "tube",
        "hide the same places in every frame, any tokens, any tokens "
        "counted by those that are kept (MAE, mae_st), or whole frames",
    )
    ratio: float = knob(
        0.9,
        "share hidden: int(ratio * tokens a frame) a frame (tube), of all (random), or of the "
        "frames (frame); random_kept keeps int((1 - ratio) * tokens)",
        above=0,
        below=1,
    )
    decoder_mask_ratio: float = knob(
        0.0,
        "share of the tokens the decoder skips by a running cell (dual masking of VideoMAE V2: "
        "0.25, 0.5 or 0.75); 0 predicts every hidden token",
        low=0,
        high=0.75,
        multiple_of=0.25,
    )
