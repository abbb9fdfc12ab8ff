"""Which videos and random numbers: pure functions of (seed, epoch, index), so resuming needs no
state but the step.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

Key = tuple[int, int]
"""(epoch, index of the video): names a sample of the endless training stream."""


def sample_rng(seed: int, epoch: int, index: int, draw: int) -> np.random.Generator:
    """The random numbers of one draw of one sample: the same in every process, whatever was drawn
    before.
    """
    return np.random.default_rng(_sequence(seed, epoch, index, draw))


def sample_seed(seed: int, epoch: int, index: int, draw: int) -> int:
    """A seed in [0, 2**63) for one draw of one sample, as the mask wants it."""
    return int(_sequence(seed, epoch, index, draw).generate_state(1, np.uint64)[0] >> np.uint64(1))


def epoch_order(
    seed: int, epoch: int, num_videos: int, source: int | None = None
) -> NDArray[np.int64]:
    """The order of the videos in an epoch, a permutation [num_videos]; each of several sources has
    its own.
    """
    return np.random.default_rng(
        _sequence(seed, epoch) if source is None else _sequence(seed, epoch, source)
    ).permutation(num_videos)


def block_order(seed: int, block: int, quotas: Sequence[int]) -> NDArray[np.int64]:
    """Which source gives each of the next sum(quotas) samples: source s, quotas[s] times, in a
    drawn order.
    """
    return np.random.default_rng(_sequence(seed, block)).permutation(
        np.repeat(np.arange(len(quotas)), quotas)
    )


def _sequence(seed: int, *key: int) -> np.random.SeedSequence:
    # As spawn_key and not as more entropy: seeds above 2**32 then cannot run into the words of the
    # key.
    return np.random.SeedSequence(seed, spawn_key=key)


class EpochStream:
    """The endless stream of one list: all its videos in an order of their own, epoch after epoch."""

    def __init__(self, num_videos: int, seed: int, source: int | None = None) -> None:
        self.num_videos, self.seed, self.source = num_videos, seed, source
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def key_at(self, position: int) -> Key:
        """(epoch, index of the video) of a position in the stream."""
        epoch, place = divmod(position, self.num_videos)
        if epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                epoch_order(self.seed, epoch, self.num_videos, self.source),
            )
        return epoch, int(self._order[place])


class ShardStream:
    """The endless stream of a packed list, shuffled within bounds, so that a stretch of it reads
    from few shards.

    An epoch takes the shards in a drawn order, and of them as many at a time as hold `window`
    videos (the last time up to twice as many), whose videos come in a drawn order. Where all are in
    one window, it is the order of an `EpochStream`. sizes_S: videos in each shard.
    """

    def __init__(
        self, sizes_S: NDArray[np.int64], window: int, seed: int, source: int | None = None
    ) -> None:
        self.first_S, self.sizes_S = np.cumsum(sizes_S) - sizes_S, sizes_S
        self.num_videos, self.window, self.seed, self.source = (
            int(sizes_S.sum()),
            window,
            seed,
            source,
        )
        self._epoch, self._window = -1, -1
        self._begins = self._order = np.empty(0, dtype=np.int64)
        self._shards: list[NDArray[np.int64]] = []

    def key_at(self, position: int) -> Key:
        """(epoch, index of the video) of a position in the stream."""
        epoch, place = divmod(position, self.num_videos)
        if epoch != self._epoch:
            self._open_epoch(epoch)
        window = int(np.searchsorted(self._begins, place, side="right")) - 1
        if window != self._window:
            self._open_window(window)
        return epoch, int(self._order[place - self._begins[window]])

    def _open_epoch(self, epoch: int) -> None:
        drawn = epoch_order(self.seed, epoch, len(self.sizes_S), self.source)
        ends, begins, first = np.cumsum(self.sizes_S[drawn]), [0], [0]
        while self.num_videos - begins[-1] >= 2 * self.window:
            last = int(np.searchsorted(ends, begins[-1] + self.window))
            if self.num_videos - ends[last] < self.window:
                break
            begins.append(int(ends[last]))
            first.append(last + 1)
        self._epoch, self._window, self._begins = epoch, -1, np.array(begins)
        self._shards = np.split(drawn, first[1:])

    def _open_window(self, window: int) -> None:
        if len(self._begins) == 1:
            self._order = epoch_order(self.seed, self._epoch, self.num_videos, self.source)
        else:
            firsts, sizes = self.first_S[self._shards[window]], self.sizes_S[self._shards[window]]
            videos = np.concatenate(
                [
                    first + np.arange(size)
                    for first, size in zip(firsts.tolist(), sizes.tolist(), strict=True)
                ]
            )
            self._order = np.random.default_rng(
                _sequence(self.seed, self._epoch, self.source or 0, window, 0)
            ).permutation(videos)
        self._window = window


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

    def __init__(
        self,
        num_videos: int,
        micro_batch: int,
        accumulation: int,
        rank: int,
        world_size: int,
        seed: int,
        first_step: int,
        last_step: int,
        key_at: Callable[[int], Key] | None = None,
        epoch_videos: int | None = None,
    ) -> None:
        assert num_videos >= 1
        assert 0 <= rank < world_size
        assert 0 <= first_step <= last_step
        assert (
            epoch_videos in (None, num_videos)
            or epoch_videos % (micro_batch * accumulation * world_size) == 0
        )
        self.num_videos = num_videos
        self.micro_batch = micro_batch
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.first_step = first_step
        self.last_step = last_step
        self.key_at = key_at or EpochStream(num_videos, seed).key_at
        self.epoch_videos = epoch_videos or num_videos

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        for micro_step in range(
            self.first_step * self.accumulation, self.last_step * self.accumulation
        ):
            first = (micro_step * self.world_size + self.rank) * self.micro_batch
            # over what the epochs before have left out
            first += first // self.epoch_videos * (self.num_videos - self.epoch_videos)
            yield [self.key_at(position) for position in range(first, first + self.micro_batch)]
