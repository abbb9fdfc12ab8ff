"""The loader: worker processes that decode, survive the signals that the trainer handles, die with
it, and are replaced when they die.
"""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from video_mae.config import DataConfig
from video_mae.data.dataset import Batch, Sample, collate
from video_mae.data.workers import keep_memory, plan_workers
from video_mae.decoding.isolation import end_with

DYING_SECONDS = 0.5  # from the end of a process's connections to its own
MAX_RESTARTS = 10
_DEATH = re.compile(r"DataLoader worker \(pid\S* [\d, ]+\) (exited unexpectedly|is killed)")

Item = TypeVar("Item")


def make_loader(
    dataset: Dataset[Sample],
    sampler: Sampler[Any],
    data: DataConfig,
    say: Callable[[str], None] = print,
) -> "Loader[Batch]":
    """Batches of the sampler's micro-batches, in its order, the same for any number of workers and
    threads.
    """
    workers = plan_workers(data.num_workers, data.decoder_threads).num

    def make(delivered: int) -> "DataLoader[Any]":
        return DataLoader(
            dataset,
            batch_sampler=_Rest(sampler, delivered),
            collate_fn=collate,
            **worker_options(workers, data.prefetch_batches),
        )

    return Loader(make, len(sampler), say)  # pyright: ignore[reportArgumentType]  (a Sampler of batches has a length)


def worker_options(workers: int, prefetch_batches: int = 2) -> dict[str, Any]:
    """What every DataLoader here is told about its workers.

    It has no timeout: what hangs is a decoder, whose process has a limit of its own, and twenty
    such limits in a row are no fault.
    """
    if workers == 0:
        return {"num_workers": 0}
    return {
        "num_workers": workers,
        "prefetch_factor": prefetch_batches,
        "multiprocessing_context": "fork",
        "worker_init_fn": partial(_start_worker, os.getpid()),
    }


class Loader(Generic[Item]):
    """What `make(0)` gives, item after item; when a worker dies, `make(number delivered)` goes on
    with the item after them.

    The samples are functions of their keys, so the items are the same. Raises: RuntimeError when
    workers die again and again.
    """

    def __init__(
        self,
        make: "Callable[[int], DataLoader[Any]]",
        length: int,
        say: Callable[[str], None] = print,
    ) -> None:
        self.make, self.length, self.say = make, length, say

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Item]:
        return _Items(self.make, self.say)


class _Items(Iterator[Item]):
    """The workers are started here, by the thread that makes it, not when the first item is asked
    for.
    """

    def __init__(
        self, make: "Callable[[int], DataLoader[Any]]", say: Callable[[str], None]
    ) -> None:
        self.make, self.say = make, say
        self.delivered = self.restarts = 0
        self.items: Iterator[Item] = self._start()

    def __next__(self) -> Item:
        while True:
            try:
                item = next(self.items)
            except (RuntimeError, OSError, EOFError) as error:
                death = _death(error, self.items)
                if not death:
                    raise
            else:
                self.delivered += 1
                return item
            self.restarts += 1
            if self.restarts > MAX_RESTARTS:
                raise RuntimeError(
                    f"{death}, for the last of {self.restarts} times: is there enough memory? Lower data.num_workers, "
                    "data.prefetch_batches or optim.micro_batch"
                )
            self.say(
                f"{death}: all are started anew, no batch is lost ({self.restarts} of at most {MAX_RESTARTS} times)"
            )
            self.items = iter(())  # ends what is left of them first
            self.items = self._start()

    def _start(self) -> Iterator[Item]:
        if threading.current_thread() is not threading.main_thread():
            return iter(self.make(self.delivered))
        # DataLoader would have SIGCHLD raise its error wherever the training happens to be; it also
        # looks itself while it waits.
        handler = signal.getsignal(signal.SIGCHLD)
        items = iter(self.make(self.delivered))
        signal.signal(signal.SIGCHLD, handler)
        return items


def _death(error: Exception, items: Any) -> str:
    """What is told where an error means that a worker died; nothing where it is another error."""
    if isinstance(error, RuntimeError):
        return (
            str(error).replace("DataLoader worker", "a decoding worker").splitlines()[0]
            if _DEATH.match(str(error))
            else ""
        )
    # The memory of a batch is handed over by the worker that made it: one that dies meanwhile is
    # seen as a broken connection.
    for worker in getattr(items, "_workers", ()):
        worker.join(timeout=DYING_SECONDS)
        if not worker.is_alive():
            return f"a decoding worker (pid {worker.pid}) ended while it handed over a batch"
    return ""


class _Rest(Sampler[Any]):
    """What a sampler gives after its first items."""

    def __init__(self, items: Iterable[Any], skipped: int) -> None:
        self.items, self.skipped = items, skipped

    def __iter__(self) -> Iterator[Any]:
        return islice(self.items, self.skipped, None)


def _start_worker(trainer: int, _: int) -> None:
    """What a decoding process does first: one thread, an end with the trainer's, and signals that
    are meant for it are left to it.
    """
    torch.set_num_threads(1)
    keep_memory()
    end_with(trainer)
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the trainer finishes its step
    # and saves, and needs batches for it. Only the trainer's own SIGTERM counts. A thread waits for
    # it because a handler would not run while a decoder hangs.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_leave_with_trainer, daemon=True).start()


def _leave_with_trainer() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
