"""What a training stage reads from its YAML file, and `load_config`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from video_mae.config.data import DataConfig
from video_mae.config.model import PRESETS, ModelConfig
from video_mae.config.objective import MaskConfig, ObjectiveConfig
from video_mae.config.training import EngineConfig, JournalConfig, OptimConfig
from video_mae.schema import Schema, knob, parse, require, section


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The pretraining stage: `deepspeed --module video_mae pretrain CONFIG.yaml key=value ...`."""

    output: str = knob("runs/pretrain", "the run folder; starting the same one again resumes it")
    seed: int = knob(0, "of the weights, the order of the videos, clips, crops and masks")
    model: ModelConfig = section(ModelConfig, "architecture; model.preset = small | base | large | huge | giant sets the published sizes")
    objective: ObjectiveConfig = section(ObjectiveConfig, "losses")
    mask: MaskConfig = section(MaskConfig, "masking")
    data: DataConfig = section(DataConfig, "videos")
    optim: OptimConfig = section(OptimConfig, "optimization")
    engine: EngineConfig = section(EngineConfig, "DeepSpeed, precision and memory")
    journal: JournalConfig = section(JournalConfig, "logs, pictures and checkpoints")

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", self.seed, "must be in [0, 2**63)")
        require(self.output != "", "output", "(empty)", "must name the run folder")


def load_config(path: str | Path, overrides: Sequence[str] = (), schema: type[Schema] = PretrainConfig) -> Schema:
    """Reads a YAML file and dotted overrides (`optim.micro_batch=8`) into a dataclass, checked key by key.

    Precedence: defaults < `model.preset` < file < overrides.
    Raises: FileNotFoundError; ValueError with one line that names the file, the key, and the nearest valid key or the range.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    return parse(path, overrides, schema, PRESETS)
