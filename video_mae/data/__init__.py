"""The data path: sources -> annotations -> sampler -> decoding and crops in workers -> batches of
uint8 clips.
"""

from video_mae.data.annotations import class_names, read_annotations
from video_mae.data.dataset import Batch, ClipDataset, Failure, Sample, collate
from video_mae.data.loader import make_loader
from video_mae.data.sampling import StepSampler, epoch_order, sample_rng, sample_seed
from video_mae.data.sources import Sources, read_sources
from video_mae.decoding import VideoDecodeError, decode
from video_mae.decoding.choices import clip_indices

__all__ = [
    "Batch",
    "ClipDataset",
    "Failure",
    "Sample",
    "Sources",
    "StepSampler",
    "VideoDecodeError",
    "class_names",
    "clip_indices",
    "collate",
    "decode",
    "epoch_order",
    "make_loader",
    "read_annotations",
    "read_sources",
    "sample_rng",
    "sample_seed",
]
