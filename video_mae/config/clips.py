"""How the clips of a training were made: what a model folder keeps, and how a command is told
otherwise.
"""

from video_mae.config.evaluation import ClipSampling
from video_mae.config.schema import Knobs, knob, section
from video_mae.config.training import MaskConfig, MaskKind, PretrainConfig


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
