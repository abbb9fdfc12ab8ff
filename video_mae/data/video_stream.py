"""The videos of a list, read one after another; with workers each is read by one of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from video_mae.data.dataset import Failure
from video_mae.data.loader import Loader, worker_options
from video_mae.data.views import Views
from video_mae.decoding import Place, VideoDecodeError

Found = tuple[int, Any, Failure | None]
"""The place of a video in its list, and what is read of it, or the reason why there is no more."""


@dataclass(frozen=True)
class VideoStream(IterableDataset[Found]):
    """Of the videos `order` in turn all that `read` gives; what cannot be decoded is told, not
    replaced.
    """

    paths: Sequence[Place]
    order: Sequence[int]
    read: Callable[[Place], Iterable[Any]]

    def __iter__(self) -> Iterator[Found]:
        worker = get_worker_info()
        mine = self.order if worker is None else self.order[worker.id :: worker.num_workers]
        for video in mine:
            try:
                for found in self.read(self.paths[video]):
                    yield video, found, None
            except VideoDecodeError as error:
                yield video, None, Failure(*error.args)

    def load(self, num_workers: int, ahead: int = 2) -> "DataLoader[Found]":
        """The stream, of which each worker keeps `ahead` parts ready: those of a video come in
        their order, and where each video has one part, they come in the order of the videos.
        """
        workers = min(num_workers, len(self.order))
        return DataLoader(self, batch_size=None, **worker_options(workers, ahead))


def load_views(
    paths: Sequence[Place], order: Sequence[int], views: Views, num_workers: int, ahead: int = 2
) -> Loader[Found]:
    """The VideoViews of the videos `order`, in that order, each once, also where workers die."""

    def make(delivered: int) -> "DataLoader[Found]":
        stream = VideoStream(paths, order[delivered:], lambda path: [views.read(path)])
        return stream.load(num_workers, ahead)

    return Loader(make)
