"""Masked autoencoder pretraining on video."""

from video_mae.config import ClassifierConfig, MaskConfig, ModelConfig, ObjectiveConfig, PretrainConfig, load_config
from video_mae.masking import TokenMask, frame_mask, random_mask, token_mask, tube_mask
from video_mae.model import VideoClassifier, VideoMAE, VideoMAEOutput
from video_mae.schema import save_config
from video_mae.weights import load_pretrained, save_model_folder

__all__ = [
    "ClassifierConfig",
    "MaskConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "PretrainConfig",
    "TokenMask",
    "VideoClassifier",
    "VideoMAE",
    "VideoMAEOutput",
    "frame_mask",
    "load_config",
    "load_pretrained",
    "random_mask",
    "save_config",
    "save_model_folder",
    "token_mask",
    "tube_mask",
]
