"""The data path: lists -> videos -> sampler -> decoding and crops in workers -> batches of uint8
clips -> device.
"""

from video_mae.data.dataset import Batch, ClipDataset, Failure, collate
from video_mae.data.loader import make_loader
from video_mae.data.sampling import StepSampler, sample_rng
from video_mae.data.sources import read_sources
from video_mae.data.videos import read_annotations
from video_mae.decoding import VideoDecodeError, decode
from video_mae.decoding.choices import clip_indices

__all__ = [
    "Batch",
    "ClipDataset",
    "Failure",
    "StepSampler",
    "VideoDecodeError",
    "clip_indices",
    "collate",
    "decode",
    "make_loader",
    "read_annotations",
    "read_sources",
    "sample_rng",
]
