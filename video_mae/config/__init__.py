"""Every knob: frozen keyword-only dataclasses, whose field names are the YAML keys, and
`load_config`.
"""

from video_mae.config.clips import ClipsConfig
from video_mae.config.data import DataConfig
from video_mae.config.finetune import AugmentConfig, FinetuneConfig, LoraConfig
from video_mae.config.model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PRESETS,
    ClassifierConfig,
    ModelConfig,
)
from video_mae.config.optim import OptimConfig
from video_mae.config.training import (
    EngineConfig,
    JournalConfig,
    MaskConfig,
    ObjectiveConfig,
    PretrainConfig,
    RunConfig,
    load_config,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PRESETS",
    "AugmentConfig",
    "ClassifierConfig",
    "ClipsConfig",
    "DataConfig",
    "EngineConfig",
    "FinetuneConfig",
    "JournalConfig",
    "LoraConfig",
    "MaskConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PretrainConfig",
    "RunConfig",
    "load_config",
]
