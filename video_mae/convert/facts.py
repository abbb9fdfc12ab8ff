"""What a user may say of another project's model, and what is usual where nobody says it."""

from typing import TYPE_CHECKING, Any, Literal

from video_mae.config.schema import Knobs, knob, require

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]
Options = dict[str, Any]
"""What a file says beside its tensors, by its own keys."""
USUAL_FRAMES, USUAL_SIDE, USUAL_STRIDE = 16, 224, 4
# of Something-Something, V1 and V2, whose models take one frame of each part of a video
SOMETHING_CLASSES = 174


class Facts(Knobs):
    """What a source may leave open. A clip size that it tells must agree; heads, statistics and
    normalisation given here win.
    """

    num_heads: int | None = knob(
        None,
        "attention heads of the encoder; null: as the source says, or as published for its width",
        low=1,
    )
    decoder_num_heads: int | None = knob(None, "attention heads of the decoder, likewise", low=1)
    num_frames: int | None = knob(
        None,
        f"frames of a clip; null: as the source says, or {USUAL_FRAMES} (1 for an image model)",
        low=1,
    )
    height: int | None = knob(None, f"pixels; null: as the source says, or {USUAL_SIDE}", low=1)
    width: int | None = knob(None, "pixels, likewise", low=1)
    sampling: Literal["dense", "uniform"] | None = knob(
        None,
        "how a classifier's frames are chosen (classifier.sampling); null: as the "
        "source says, or uniform for the 174 classes of Something-Something, else dense",
    )
    stride: int | None = knob(
        None,
        "video frames from one frame of a dense clip to the next; null: as the source says, or "
        f"{USUAL_STRIDE}",
        low=1,
    )
    mean: tuple[float, ...] = knob(
        (),
        "channel means of the input in [0, 1]; empty: as the source says, or as its project has "
        "them",
    )
    std: tuple[float, ...] = knob((), "channel standard deviations, likewise")
    normalize: Literal["channel", "tubelet", "none"] | None = knob(
        None,
        "what normalised the targets of pretraining; null: as the source says, or as published",
    )
    decoder_context: Literal["scored", "all"] | None = knob(
        None,
        "what the decoder sees in dual masking (model.decoder_context); null: as "
        "the source says, or scored",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.mean) == len(self.std),
            "std",
            self.std,
            f"must have as many values as mean = {self.mean}",
        )


class ConvertConfig(Facts):
    """`video-mae convert SOURCE DESTINATION key=value ...`."""

    format: Literal["model", "official", "hugging_face", "torch_export", "onnx"] = knob(
        "model",
        "what to write: a model folder of this project, a file for the code of VideoMAE, a folder "
        "for transformers, a program of torch.export (.pt2) or of ONNX (both of classifiers)",
    )
    overwrite: bool = knob(False, "replace what is at DESTINATION")
    trust: bool = knob(
        False,
        "read the pickles of a checkpoint that DeepSpeed wrote (earlier versions), which can "
        "execute code: only for runs of your own",
    )
