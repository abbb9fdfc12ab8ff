"""The loader: worker processes that decode, survive the signals that the trainer handles, die with
it, and are replaced when they die; and what brings their batches to the device before they are
wanted.
"""

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from video_mae.config import DataConfig
from video_mae.data.dataset import Batch, Sample, collate
from video_mae.data.device_crop import NO_ROOM
from video_mae.data.workers import keep_memory, plan_workers
from video_mae.decoding.isolation import end_with
from video_mae.files import say

MAX_RESTARTS = 10  # without a batch between them
AHEAD = 1  # batches on the device beside the one in use: a copy takes less time than a step
_OF_DATA = "in DataLoader worker process"  # says DataLoader of what the data set has raised

Item = TypeVar("Item")


def make_loader(
    dataset: Dataset[Sample], batches: Iterable[Any], data: DataConfig
) -> "Loader[Batch]":
    """The micro-batches whose keys `batches` gives, in their order, the same for any number of
    workers and threads.
    """
    workers = plan_workers(data.num_workers, data.decoder_threads).num

    def make(delivered: int) -> "DataLoader[Any]":
        return DataLoader(
            dataset,
            batch_sampler=islice(batches, delivered, None),
            collate_fn=collate,
            **worker_options(workers >> loader.halvings, data.prefetch_batches),
        )

    loader: Loader[Batch] = Loader(make)
    return loader


def worker_options(workers: int, prefetch_batches: int) -> dict[str, Any]:
    """What every DataLoader here is told about its workers.

    It has no timeout: what hangs is a decoder, whose process has a limit of its own, and twenty
    such limits in a row are no fault.
    """
    options: dict[str, Any] = {
        "num_workers": workers,
        # its own: else a loader that is started anew would draw from the numbers of a training step
        "generator": torch.Generator(),
    }
    if workers:
        options |= {
            "prefetch_factor": prefetch_batches,
            "multiprocessing_context": "fork",
            "worker_init_fn": partial(_start_worker, os.getpid()),
        }
    return options


class Loader(Generic[Item]):
    """What `make(0)` gives, item after item; when a worker dies, `make(number delivered)` goes on
    with the item after them.

    The samples are functions of their keys, so the items are the same. halvings: of the number of
    workers, each time the memory that they share with the trainer had no room for their batches.
    say: who is told. Raises: what the data set does; RuntimeError when workers die again and again.
    """

    def __init__(self, make: "Callable[[int], DataLoader[Any]]") -> None:
        self.make, self.halvings = make, 0
        self.say: Callable[[str], None] = say

    def __iter__(self) -> Iterator[Item]:
        # the workers are started here, by this thread, not when the first item is asked for
        return self._items(self._start(0))

    def _items(self, items: Iterator[Item]) -> Iterator[Item]:
        delivered = restarts = 0
        while True:
            try:
                item = next(items)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                # The memory of a batch is handed over by the worker that made it: one that dies
                # meanwhile is a broken connection, in many words.
                death = f"a decoding worker is gone ({error!r})"
                if NO_ROOM in str(error):
                    self.halvings += 1
                    death = f"{str(error).splitlines()[-1]}, half of the workers go on"
                elif not hasattr(items, "_workers") or _OF_DATA in str(error):
                    raise
            else:
                delivered, restarts = delivered + 1, 0
                yield item
                continue
            restarts += 1
            if restarts > MAX_RESTARTS:
                raise RuntimeError(
                    f"{death}, for the last of {restarts} times: is there enough memory? Lower "
                    "data.num_workers, data.prefetch_batches or optim.micro_batch"
                )
            self.say(
                f"{death}: all are started anew, no batch is lost ({restarts} of at most "
                f"{MAX_RESTARTS} times in a row)"
            )
            items = iter(())  # ends what is left of them first
            items = self._start(delivered)

    def _start(self, delivered: int) -> Iterator[Item]:
        handler = signal.getsignal(signal.SIGCHLD)
        items = iter(self.make(delivered))
        # DataLoader would have SIGCHLD raise its error wherever the training happens to be; it also
        # looks itself while it waits. In another thread it sets no handler.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
        return items


def _start_worker(trainer: int, _: int) -> None:
    """What a decoding process does first: one thread, an end with the trainer's, and signals that
    are meant for it are left to it.
    """
    torch.set_num_threads(1)
    keep_memory()
    end_with(trainer)
    # Ctrl-C, a closed terminal's SIGHUP and a scheduler's SIGTERM reach the whole process group:
    # the trainer finishes its step and saves, and needs batches for it. Only the trainer's own
    # SIGTERM counts. A thread waits for it because a handler would not run while a decoder hangs.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_leave_with_trainer, daemon=True).start()


def _leave_with_trainer() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class DevicePrefetcher(Iterator[Batch]):
    """The batches of a loader on a device, in their order, their costs with that of copying.

    On a GPU a thread takes them from the loader, pins them, and copies (and cuts) them on a stream
    of its own, one ahead of the step; the stream that is current where a batch is taken waits for
    its copy, on the device. On a CPU batches are only handed through. What the loader raises is
    raised here. `close` ends the thread; a loader that is not exhausted is given up.
    """

    def __init__(self, batches: Iterable[Batch], device: torch.device) -> None:
        # workers are started by this thread, whose end is theirs
        self.device, self._batches = device, iter(batches)
        self._thread: threading.Thread | None = None
        if device.type == "cuda":
            self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
            self._room = threading.Semaphore(AHEAD)
            self._copies: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
            self._thread = threading.Thread(target=self._copy_all, name="prefetch", daemon=True)
            self._thread.start()

    def __next__(self) -> Batch:
        if self._thread is None:
            batch = next(self._batches)
            begin = time.perf_counter()
            batch = batch.to(self.device)
            batch.costs = batch.costs._replace(copying=time.perf_counter() - begin)
            return batch
        found = self._ready.get()
        if isinstance(found, BaseException):
            self._ready.put(found)  # for whoever asks again
            raise found
        batch, begin, end = found
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(end)
        for tensor in batch.on_device:
            # its memory belongs to the other stream, which must not use it again before this one is
            # done
            tensor.record_stream(stream)
        self._room.release()
        self._copies.append((begin, end))
        # of the batches before, whose copies are done; they end in their order
        done = [copy for copy in self._copies if copy[1].query()]
        self._copies = self._copies[len(done) :]
        copied = sum(begin.elapsed_time(end) for begin, end in done) / 1e3
        batch.costs = batch.costs._replace(copying=batch.costs.copying + copied)
        return batch

    def close(self) -> None:
        """Ends the thread; nothing more is copied."""
        if self._thread is not None:
            self._batches = iter(())
            self._room.release()
            self._thread.join(timeout=5)  # it may wait for a batch; it is a daemon

    def _copy_all(self) -> None:
        try:
            torch.cuda.set_device(self.device)
            with torch.cuda.stream(torch.cuda.Stream(self.device)):
                while True:
                    self._room.acquire()
                    batch = next(self._batches)
                    began = time.perf_counter()
                    batch = batch.pin_memory()
                    batch.costs = batch.costs._replace(copying=time.perf_counter() - began)
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    begin.record()
                    batch = batch.to(self.device)
                    end.record()
                    self._ready.put((batch, begin, end))
        except BaseException as error:  # StopIteration as well: raised where the batches are taken
            self._ready.put(error)
