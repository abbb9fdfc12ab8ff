"""Which videos, frames and random numbers: pure functions of (seed, epoch, index), so resuming needs no state but the step.

T frames of a clip.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

Key = tuple[int, int]
"""(epoch, index of the video): names a sample of the endless training stream."""


def clip_indices(num_video_frames: int, num_frames: int, stride: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Frame indices [T] of a clip: a random start, then every stride-th frame; a short video starts at 0 and repeats its last step.

    Source: VideoMAE's pretraining sampler (start uniform in [0, num_video_frames - num_frames * stride]).
    """
    start = int(rng.integers(max(num_video_frames - num_frames * stride, 0) + 1))
    last_step = (num_video_frames - 1 - start) // stride
    return start + stride * np.minimum(np.arange(num_frames, dtype=np.int64), last_step)


def sample_rng(seed: int, epoch: int, index: int, draw: int) -> np.random.Generator:
    """The random numbers of one draw of one sample: the same in every process, whatever was drawn before."""
    return np.random.default_rng(_sequence(seed, epoch, index, draw))


def sample_seed(seed: int, epoch: int, index: int, draw: int) -> int:
    """A seed in [0, 2**63) for one draw of one sample, as the mask wants it."""
    return int(_sequence(seed, epoch, index, draw).generate_state(1, np.uint64)[0] >> np.uint64(1))


def epoch_order(seed: int, epoch: int, num_videos: int) -> NDArray[np.int64]:
    """The order of the videos in an epoch, a permutation [num_videos]."""
    return np.random.default_rng(_sequence(seed, epoch)).permutation(num_videos)


def _sequence(seed: int, *key: int) -> np.random.SeedSequence:
    # As spawn_key and not as more entropy: seeds above 2**32 then cannot run into the words of the key.
    return np.random.SeedSequence(seed, spawn_key=key)


class StepSampler(Sampler[list[Key]]):
    """Micro-batches of one rank, as lists of (epoch, index), for the optimizer steps first_step to last_step - 1.

    The videos form one endless stream, epoch after epoch; step s consumes the next micro_batch * accumulation * world_size of it, and
    rank r takes the r-th part of each micro-batch. So the videos of a step do not depend on the world size as long as that product
    stays, and a run that resumes at first_step goes on exactly where it stopped. A batch may cross the border of two epochs.
    """

    def __init__(self, num_videos: int, micro_batch: int, accumulation: int, rank: int, world_size: int, seed: int, first_step: int,
                 last_step: int) -> None:
        assert num_videos >= 1
        assert 0 <= rank < world_size
        assert 0 <= first_step <= last_step
        self.num_videos = num_videos
        self.micro_batch = micro_batch
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.first_step = first_step
        self.last_step = last_step

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for micro_step in range(self.first_step * self.accumulation, self.last_step * self.accumulation):
            first = (micro_step * self.world_size + self.rank) * self.micro_batch
            keys: list[Key] = []
            for position in range(first, first + self.micro_batch):
                if position // self.num_videos != epoch:
                    epoch = position // self.num_videos
                    order = epoch_order(self.seed, epoch, self.num_videos)
                keys.append((epoch, int(order[position % self.num_videos])))
            yield keys
