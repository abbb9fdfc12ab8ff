"""The sources of a run: their files as one list, and which of them gives which sample."""

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from video_mae.config import DataConfig
from video_mae.config.data import SourceConfig
from video_mae.data.annotations import read_annotations
from video_mae.data.sampling import EpochStream, Key, ShardStream, block_order
from video_mae.data.shards import PackedVideos
from video_mae.data.videos import VideoList
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

    def stream(self, seed: int, number: int | None = None) -> EpochStream | ShardStream:
        """Its videos, epoch after epoch, in orders of its own; number: which of several sources it
        is.
        """
        if isinstance(self.videos, PackedVideos):
            return ShardStream(self.videos.shard_sizes(), self.config.shuffle_window, seed, number)
        return EpochStream(len(self.videos), seed, number)


class Sources:
    """The videos of all sources as one list: sources[index] is (place, {"label": label}), as in
    pytorchvideo's.
    """

    def __init__(self, parts: Sequence[tuple[str, SourceConfig, VideoList]]) -> None:
        self.parts: list[Source] = []
        for key, config, videos in parts:
            self.parts.append(Source(key, config, videos, len(self)))

    def __len__(self) -> int:
        return self.parts[-1].first + len(self.parts[-1].videos) if self.parts else 0

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
        """Samples of each source in a BLOCK. Raises: ValueError for a source that would have none."""
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
                    f"{source.key}.weight: gives it less than 1 of {BLOCK} samples, raise it, or leave the source out"
                )
        return quotas.tolist()

    def stream(self, seed: int) -> Callable[[int], Key]:
        """The endless stream of samples, a function of (seed, position) alone: of one source its
        epochs, of several a mixture.

        In every BLOCK of positions a source has its share, rounded, at drawn places; which of its
        videos come there are its own epochs, one after another.
        """
        if len(self.parts) == 1:
            return self.parts[0].stream(seed).key_at
        return _Mixture(self, seed).key_at

    def describe(self) -> str:
        """One line about several sources; of one it is empty."""
        if len(self.parts) == 1:
            return ""
        return ", ".join(
            f"{quota / BLOCK:.1%} of the samples from {source.key} ({len(source.videos)} files)"
            for source, quota in zip(self.parts, self.quotas(), strict=True)
        )


def read_sources(data: DataConfig, in_channels: int) -> Sources:
    """Reads the lists and folders of data.source or of data.sources, and tries the first files.

    Raises: FileNotFoundError or ValueError with one line that names the key, the file and the
    remedy: for a list as `read_annotations` does, for files that do not fit the model, for a weight
    that is too small.
    """
    sources = Sources(
        [(key, config, read_annotations(config, key)) for key, config in data.by_name.items()]
    )
    for source in sources.parts:
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
                f"{source.key}.source: {path} is a video of 3 channels, model.in_channels is {in_channels}; change it, or "
                f"choose {in_channels} with {source.key}.channels"
            )
        try:
            decode(path, [0], Reading.of(data, in_channels, config))
        except VideoDecodeError as error:
            mistakes.append(error)
        else:
            return
    first, reason = mistakes[0], mistakes[0].reason.replace("data.", f"{source.key}.")
    raise ValueError(
        f"{source.key}.source: no file can be used of the first {len(mistakes)}: {first.path}: {first.decoder}: {reason}"
    )


class _Mixture:
    def __init__(self, sources: Sources, seed: int) -> None:
        self.seed, self.quotas = seed, sources.quotas()
        self.firsts = [source.first for source in sources.parts]
        self.streams = [source.stream(seed, number) for number, source in enumerate(sources.parts)]
        self._block, self._order, self._turn = (
            -1,
            np.empty(0, dtype=np.int64),
            np.empty(0, dtype=np.int64),
        )

    def key_at(self, position: int) -> Key:
        block, place = divmod(position, BLOCK)
        if block != self._block:
            self._block, self._order = block, block_order(self.seed, block, self.quotas)
            self._turn = np.empty(BLOCK, dtype=np.int64)
            for source, quota in enumerate(self.quotas):
                self._turn[self._order == source] = np.arange(quota)
        source = int(self._order[place])
        epoch, index = self.streams[source].key_at(
            block * self.quotas[source] + int(self._turn[place])
        )
        return epoch, self.firsts[source] + index
