"""How the clips of a training were made: what a model folder keeps, how a command is told
otherwise, and what the commands read that draw clips.
"""

from typing import Literal

from video_mae.config.data import GivenReadConfig
from video_mae.config.evaluation import ClipSampling
from video_mae.config.schema import Knobs, knob, section
from video_mae.config.training import MaskConfig, MaskKind, PretrainConfig

Statistics = Literal["visible", "truth"]


class ClipsConfig(Knobs):
    """Section `clips` of a pretrained model's config.json: every command that shows the model clips
    starts from it. A classifier has `classifier.sampling` and `classifier.stride` for that.
    """

    sampling: ClipSampling = knob("dense", "how the frames of a clip are chosen")
    stride: int = knob(4, "video frames from one frame of a dense clip to the next", low=1)
    mask: MaskConfig = section(MaskConfig, "what the encoder did not see")

    @classmethod
    def of(cls, config: PretrainConfig) -> "ClipsConfig":
        """Those of a run outside of its stages; the stride is the smallest of its sources."""
        stride = min(source.stride for source in config.data.by_name.values())
        return cls(stride=stride, mask=config.mask)


class GivenMaskConfig(MaskConfig):
    """A mask in place of that of the training, as far as one is given."""

    kind: MaskKind | None = knob(  # pyright: ignore[reportIncompatibleVariableOverride]
        None, "as mask.kind of the training; null: as the model was trained"
    )
    ratio: float | None = knob(  # pyright: ignore[reportIncompatibleVariableOverride]
        None, "as mask.ratio of the training, likewise", above=0, below=1
    )


class PictureConfig(Knobs):
    """What the stages have that draw videos."""

    output: str
    num_clips: int = knob(1, "clips, spread over the video; 1 is the middle", low=1, high=100)
    stride: int | None = knob(None, "as data.stride, which it wins over", low=1)
    data: GivenReadConfig = section(GivenReadConfig, "how the files are read")


class LookConfig(PictureConfig):
    """`video-mae look MODEL_OR_RUN_FOLDER VIDEO... key=value ...`."""

    output: str = knob("looks", "folder for a NAME.png and a NAME.mp4 of each video", filled=True)


class ReconstructConfig(PictureConfig):
    """`video-mae reconstruct MODEL_OR_RUN_FOLDER VIDEO... key=value ...`."""

    first_keys = (
        "output num_clips stride mask.kind mask.ratio mask.decoder_mask_ratio seed statistics "
        "data.decoder data.root"
    )
    output: str = knob(
        "reconstructions", "folder for a NAME.png and a NAME.mp4 of each video", filled=True
    )
    seed: int = knob(0, "of the masks", low=0)
    statistics: Statistics = knob(
        "visible",
        "whose mean and deviation undo the normalisation: of the visible tubelets, or of the true "
        "hidden ones, which a model does not have",
    )
    mask: GivenMaskConfig = section(GivenMaskConfig, "masking")
