"""Masked autoencoder pretraining on video."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from video_mae.config import (
        ClassifierConfig,
        MaskConfig,
        ModelConfig,
        ObjectiveConfig,
        PretrainConfig,
        load_config,
    )
    from video_mae.config.schema import save_config
    from video_mae.convert.facts import Facts
    from video_mae.convert.importing import import_model
    from video_mae.convert.model_folder import load_pretrained, save_model_folder
    from video_mae.evaluation.predict import classify_video
    from video_mae.model.inflation import deflated, inflated, resized
    from video_mae.model.masking import TokenMask, frame_mask, random_mask, token_mask, tube_mask
    from video_mae.model.vit import Encoder, VideoClassifier, VideoMAE, VideoMAEOutput

__all__ = [
    "ClassifierConfig",
    "Encoder",
    "Facts",
    "MaskConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "PretrainConfig",
    "TokenMask",
    "VideoClassifier",
    "VideoMAE",
    "VideoMAEOutput",
    "classify_video",
    "deflated",
    "frame_mask",
    "import_model",
    "inflated",
    "load_config",
    "load_pretrained",
    "random_mask",
    "resized",
    "save_config",
    "save_model_folder",
    "token_mask",
    "tube_mask",
]

_HOMES = {
    "video_mae.config": "ClassifierConfig, MaskConfig, ModelConfig, ObjectiveConfig, "
    "PretrainConfig, load_config",
    "video_mae.convert.facts": "Facts",
    "video_mae.convert.importing": "import_model",
    "video_mae.model.inflation": "deflated, inflated, resized",
    "video_mae.model.masking": "TokenMask, frame_mask, random_mask, token_mask, tube_mask",
    "video_mae.model.vit": "Encoder, VideoClassifier, VideoMAE, VideoMAEOutput",
    "video_mae.evaluation.predict": "classify_video",
    "video_mae.config.schema": "save_config",
    "video_mae.convert.model_folder": "load_pretrained, save_model_folder",
}


def __getattr__(name: str) -> Any:
    """A public name, loaded when it is first asked for: a process that only decodes needs none of
    them.
    """
    for module, names in _HOMES.items():
        if name in names.split(", "):
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
