"""The sources of a run: their files as one list, and which of them gives which sample."""

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from video_mae.config import DataConfig
from video_mae.config.data import SourceConfig
from video_mae.data.sampling import Key, ShardStream, sample_rng
from video_mae.data.shards import Members
from video_mae.data.videos import VideoList, read_annotations
from video_mae.decoding import Place, Reading, VideoDecodeError, decode, is_video

BLOCK = 1000
"""Every so many samples hold each source in its share."""
PROBES = 3
"""Files of a source that are tried at the start; one of them must fit."""


@dataclass(frozen=True)
class Source:
    """One source: `key` is what the user calls it, its videos are those from `first` on in the list
    of all.
    """

    key: str
    config: SourceConfig
    videos: VideoList
    first: int


class Sources:
    """The videos of all sources as one list: sources[index] is (place, {"label": label}), as in
    pytorchvideo's.
    """

    def __init__(self, parts: Sequence[tuple[str, SourceConfig, VideoList]]) -> None:
        self.parts, self._num_videos = list[Source](), 0
        for key, config, videos in parts:
            self.parts.append(Source(key, config, videos, self._num_videos))
            self._num_videos += len(videos)

    def __len__(self) -> int:
        return self._num_videos

    def __getitem__(self, index: int) -> tuple[Place, dict[str, int]]:
        source = self.at(index)
        return source.videos[index - source.first]

    @property
    def by_key(self) -> dict[str, VideoList]:
        """The videos of each source by what the user calls it."""
        return {f"{source.key}.source": source.videos for source in self.parts}

    def at(self, index: int) -> Source:
        """The source of a video."""
        return self.parts[bisect(self.parts, index, key=lambda source: source.first) - 1]

    def quotas(self) -> list[int]:
        """Samples of each source in a BLOCK. Raises: ValueError for a source that would have
        none.
        """
        weights = np.array(
            [getattr(source.config, "weight", None) or len(source.videos) for source in self.parts],
            dtype=np.float64,
        )
        exact = weights * (BLOCK / weights.sum())
        quotas = np.floor(exact).astype(np.int64)
        quotas[np.argsort(quotas - exact, kind="stable")[: BLOCK - quotas.sum()]] += 1
        for source, quota in zip(self.parts, quotas, strict=True):
            if quota == 0:
                raise ValueError(
                    f"{source.key}.weight: gives it less than 1 of {BLOCK} samples, raise it, or "
                    "leave the source out"
                )
        return quotas.tolist()

    def stream(self, seed: int) -> Callable[[int], Key]:
        """The endless stream of samples, a function of (seed, position) alone: of one source its
        epochs, of several a mixture.

        In every BLOCK of positions a source has its share, rounded, at drawn places; which of its
        videos come there are its own epochs, one after another.
        """
        is_mixed, streams = len(self.parts) > 1, list[ShardStream]()
        for number, source in enumerate(self.parts):
            paths, window = source.videos.paths, source.config.shuffle_window
            sizes = paths.shard_sizes() if isinstance(paths, Members) else [len(source.videos)]
            streams.append(ShardStream(sizes, window, seed, number if is_mixed else None))
        if not is_mixed:
            return streams[0].key_at
        quotas = self.quotas()

        @lru_cache(maxsize=1)
        def drawn(block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            """Of each place in a block its source, and how many of that have come before it."""
            rng, turn = sample_rng(seed, block), np.empty(BLOCK, dtype=np.int64)
            order = rng.permutation(np.repeat(np.arange(len(quotas)), quotas))
            for number, quota in enumerate(quotas):
                turn[order == number] = np.arange(quota)
            return order, turn

        def key_at(position: int) -> Key:
            block, place = divmod(position, BLOCK)
            order, turn = drawn(block)
            number = int(order[place])
            epoch, index = streams[number].key_at(block * quotas[number] + int(turn[place]))
            return epoch, self.parts[number].first + index

        return key_at

    def describe(self) -> str:
        """One line about several sources; of one it is empty."""
        if len(self.parts) == 1:
            return ""
        return ", ".join(
            f"{quota / BLOCK:.1%} of the samples from {source.key} ({len(source.videos)} files)"
            for source, quota in zip(self.parts, self.quotas(), strict=True)
        )


def read_sources(data: DataConfig, in_channels: int, *, resumed: bool = False) -> Sources:
    """Reads the lists and folders of data.source or of data.sources, and tries the first files,
    unless they were `resumed`.

    Raises: FileNotFoundError or ValueError with one line that names the key, the file and the
    remedy: for a list as `read_annotations` does, for files that do not fit the model, for a weight
    that is too small.
    """
    sources = Sources(
        [
            (key, config, read_annotations(config, f"{key}.source", resumed=resumed))
            for key, config in data.by_name.items()
        ]
    )
    for source in () if resumed else sources.parts:
        _check_first(source, data, in_channels)
    sources.quotas()
    return sources


def _check_first(source: Source, data: DataConfig, in_channels: int) -> None:
    """Finds a wrong data.axes or value range before a run has begun. Videos are not decoded here:
    only their channels are known.
    """
    config, mistakes = source.config, list[VideoDecodeError]()
    for index in range(min(PROBES, len(source.videos))):
        path = source.videos[index][0]
        if is_video(path):
            if (len(config.channels) or 3) == in_channels:
                return
            raise ValueError(
                f"{source.key}.source: {path} is a video of 3 channels, model.in_channels is "
                f"{in_channels}; change it, or choose {in_channels} with {source.key}.channels"
            )
        try:
            decode(path, [0], Reading.of(data, in_channels, config))
            return
        except VideoDecodeError as error:
            mistakes.append(error)
    first, reason = mistakes[0], mistakes[0].reason.replace("data.", f"{source.key}.")
    raise ValueError(
        f"{source.key}.source: no file can be used of the first {len(mistakes)}: {first.path}: "
        f"{first.decoder}: {reason}"
    )
