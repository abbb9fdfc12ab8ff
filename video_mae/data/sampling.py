"""Which videos and random numbers: pure functions of (seed, epoch, index), so resuming needs no
state but the step.
"""

from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

Key = tuple[int, int]
"""(epoch, index of the video): names a sample of the endless training stream."""


def sample_rng(seed: int, *key: int) -> np.random.Generator:
    """The random numbers of one draw of one sample, key = (epoch, index, draw): the same in every
    process, whatever was drawn before. Other keys are of what is drawn for an epoch or a block.
    """
    return np.random.default_rng(_sequence(seed, *key))


def sample_seed(seed: int, epoch: int, index: int, draw: int) -> int:
    """A seed in [0, 2**63) for one draw of one sample, as the mask wants it."""
    return int(_sequence(seed, epoch, index, draw).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _sequence(seed: int, *key: int) -> np.random.SeedSequence:
    # As spawn_key and not as more entropy: seeds above 2**32 then cannot run into the words of the
    # key.
    return np.random.SeedSequence(seed, spawn_key=key)


def epoch_order(
    seed: int, epoch: int, num_videos: int, source: int | None = None
) -> NDArray[np.int64]:
    """The order of the videos in an epoch, a permutation [num_videos]; each of several sources has
    its own.
    """
    key = (epoch,) if source is None else (epoch, source)
    return sample_rng(seed, *key).permutation(num_videos)


@dataclass
class ShardStream:
    """The endless stream of a packed list, shuffled within bounds, so that a stretch of it reads
    from few shards. A list of plain files is one shard: all its videos in an order of their own,
    epoch after epoch.

    An epoch takes the shards in a drawn order, and of them as many at a time as hold `window`
    videos (the last time up to twice as many), whose videos come in a drawn order. Where all are in
    one window, it is the order of `epoch_order`. sizes: videos in each shard. source: which of
    several it is.
    """

    sizes: Sequence[int]
    window: int
    seed: int
    source: int | None = None

    def __post_init__(self) -> None:
        self.num_videos = sum(self.sizes)
        self._epoch = self._window = -1

    def key_at(self, position: int) -> Key:
        """(epoch, index of the video) of a position in the stream."""
        epoch, place = divmod(position, self.num_videos)
        if epoch != self._epoch:
            self._epoch, self._window = epoch, -1
            self._draw_windows()
        window = bisect(self._begins, place) - 1
        if window != self._window:
            self._window, self._order = window, self._order_of(window)
        return epoch, int(self._order[place - self._begins[window]])

    def _draw_windows(self) -> None:
        """Which shards of an epoch are in which window, and at which place each begins."""
        self._shards, self._begins = [list[int]()], [0]
        held, left = 0, self.num_videos
        for shard in epoch_order(self.seed, self._epoch, len(self.sizes), self.source).tolist():
            self._shards[-1].append(shard)
            held, left = held + self.sizes[shard], left - self.sizes[shard]
            if min(held, left) >= self.window:
                self._shards.append([])
                self._begins.append(self.num_videos - left)
                held = 0

    def _order_of(self, window: int) -> NDArray[np.int64]:
        if len(self._begins) == 1:
            return epoch_order(self.seed, self._epoch, self.num_videos, self.source)
        ends = np.cumsum(self.sizes)
        shards = self._shards[window]
        videos = [np.arange(ends[shard] - self.sizes[shard], ends[shard]) for shard in shards]
        rng = sample_rng(self.seed, self._epoch, self.source or 0, window, 0)
        return rng.permutation(np.concatenate(videos))


@dataclass
class StepSampler(Sampler[list[Key]]):
    """Micro-batches of one rank, as lists of (epoch, index), for the optimizer steps first_step to
    last_step - 1.

    The videos form one endless stream, epoch after epoch; step s consumes the next micro_batch *
    accumulation * world_size of it, and rank r takes the r-th part of each micro-batch. So the
    videos of a step do not depend on the world size as long as that product stays, and a run that
    resumes at first_step goes on exactly where it stopped. A batch may cross the border of two
    epochs, unless epoch_videos says that an epoch ends after so many of its num_videos videos,
    whole steps: the others are left out of it. key_at: the stream, as a function of the position in
    it, where it is another (several sources).
    """

    num_videos: int
    micro_batch: int
    accumulation: int
    rank: int
    world_size: int
    seed: int
    first_step: int
    last_step: int
    key_at: Callable[[int], Key] | None = None
    epoch_videos: int | None = None

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        epoch_videos = self.epoch_videos or self.num_videos
        step_videos = self.micro_batch * self.accumulation * self.world_size
        assert epoch_videos == self.num_videos or epoch_videos % step_videos == 0
        key_at = self.key_at
        if key_at is None:
            key_at = ShardStream([self.num_videos], 1, self.seed).key_at
        for micro_step in range(len(self)):
            micro_step += self.first_step * self.accumulation
            first = (micro_step * self.world_size + self.rank) * self.micro_batch
            # over what the epochs before have left out
            first += first // epoch_videos * (self.num_videos - epoch_videos)
            yield [key_at(position) for position in range(first, first + self.micro_batch)]
