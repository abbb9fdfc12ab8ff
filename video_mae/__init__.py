"""Masked autoencoder pretraining on video."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from video_mae.config import ClassifierConfig, MaskConfig, ModelConfig, ObjectiveConfig, PretrainConfig, load_config
    from video_mae.convert import Facts, import_model
    from video_mae.inflation import deflated, inflated, resized
    from video_mae.masking import TokenMask, frame_mask, random_mask, token_mask, tube_mask
    from video_mae.model import Encoder, VideoClassifier, VideoMAE, VideoMAEOutput
    from video_mae.predict import classify_video
    from video_mae.schema import save_config
    from video_mae.weights import load_pretrained, save_model_folder

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
    "video_mae.config": "ClassifierConfig, MaskConfig, ModelConfig, ObjectiveConfig, PretrainConfig, load_config",
    "video_mae.convert": "Facts, import_model",
    "video_mae.inflation": "deflated, inflated, resized",
    "video_mae.masking": "TokenMask, frame_mask, random_mask, token_mask, tube_mask",
    "video_mae.model": "Encoder, VideoClassifier, VideoMAE, VideoMAEOutput",
    "video_mae.predict": "classify_video",
    "video_mae.schema": "save_config",
    "video_mae.weights": "load_pretrained, save_model_folder",
}


def __getattr__(name: str) -> Any:
    """A public name, loaded when it is first asked for: a process that only decodes needs none of them."""
    for module, names in _HOMES.items():
        if name in names.split(", "):
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
