"""Masked autoencoder pretraining on video."""

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
