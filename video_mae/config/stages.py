"""What the training stages read from their YAML files in common, what pretraining adds, and
`load_config`.
"""

from collections.abc import Sequence
from pathlib import Path

from video_mae.config.data import DataConfig
from video_mae.config.model import ModelConfig
from video_mae.config.objective import MaskConfig, ObjectiveConfig
from video_mae.config.schema import Knobs, Schema, knob, parse, section
from video_mae.config.training import EngineConfig, JournalConfig, OptimConfig


class RunConfig(Knobs):
    """What every training stage has: `deepspeed --module video_mae STAGE CONFIG.yaml key=value
    ...`.
    """

    output: str
    seed: int = knob(
        0,
        "of the weights, the order of the videos, and everything that is drawn for them",
        low=0,
        below=2**63,
    )
    model: ModelConfig = section(
        ModelConfig,
        "architecture; model.preset = small | base | large | huge | giant sets the published sizes",
    )
    data: DataConfig = section(DataConfig, "videos")
    optim: OptimConfig = section(OptimConfig, "optimization")
    engine: EngineConfig = section(EngineConfig, "DeepSpeed, precision and memory")
    journal: JournalConfig = section(JournalConfig, "logs and checkpoints")


class PretrainJournalConfig(JournalConfig):
    """As for every stage, and pictures."""

    picture_interval: int = knob(
        500, "reconstruction pictures; the last step always draws one", low=0
    )
    picture_clips: int = knob(4, "clips on a picture, of videos spread evenly over the list", low=1)


class PretrainConfig(RunConfig):
    """The pretraining stage: `deepspeed --module video_mae pretrain CONFIG.yaml key=value ...`."""

    output: str = knob(
        "runs/pretrain", "the run folder; starting the same one again resumes it", filled=True
    )
    objective: ObjectiveConfig = section(ObjectiveConfig, "losses")
    mask: MaskConfig = section(MaskConfig, "masking")
    journal: PretrainJournalConfig = section(
        PretrainJournalConfig, "logs, pictures and checkpoints"
    )


def load_config(
    path: str | Path, overrides: Sequence[str] = (), schema: type[Schema] = PretrainConfig
) -> Schema:
    """Reads a YAML file and dotted overrides (`optim.micro_batch=8`) into a dataclass, checked key
    by key.

    Precedence: defaults < `model.preset` < file < overrides.
    Raises: FileNotFoundError; ValueError with one line that names the file, the key, and the
    nearest valid key or the range.
    """
    return parse(path, overrides, schema)
