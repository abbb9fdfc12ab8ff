"""Batches on the device before they are wanted: the next one is copied while the step before it
runs.
"""

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from video_mae.data.dataset import Batch

AHEAD = 1  # batches on the device beside the one in use: a copy takes less time than a step


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
            self._room, self._closed = threading.Semaphore(AHEAD), False
            self._copies: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
            self._thread = threading.Thread(target=self._copy_all, name="prefetch", daemon=True)
            self._thread.start()

    def __next__(self) -> Batch:
        if self._thread is None:
            batch = next(self._batches)
            begin = time.perf_counter()
            moved = batch.to(self.device)
            return replace(moved, costs=batch.costs._replace(copying=time.perf_counter() - begin))
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
        return replace(
            batch, costs=batch.costs._replace(copying=batch.costs.copying + self._copied())
        )

    def close(self) -> None:
        """Ends the thread; nothing more is copied."""
        if self._thread is not None:
            self._closed = True
            self._room.release()
            self._thread.join(timeout=5)  # it may wait for a batch; it is a daemon

    def _copied(self) -> float:
        """Seconds of the copies that are done since this was last asked: those of the batches
        before.
        """
        done = [copy for copy in self._copies if copy[1].query()]
        self._copies = [copy for copy in self._copies if copy not in done]
        return sum(begin.elapsed_time(end) for begin, end in done) / 1e3

    def _copy_all(self) -> None:
        try:
            torch.cuda.set_device(self.device)
            with torch.cuda.stream(torch.cuda.Stream(self.device)):
                while True:
                    self._room.acquire()
                    if self._closed:
                        return
                    batch = next(self._batches)
                    began = time.perf_counter()
                    pinned = batch.pin_memory()
                    pinning = time.perf_counter() - began
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    begin.record()
                    moved = pinned.to(self.device)
                    end.record()
                    self._ready.put(
                        (replace(moved, costs=batch.costs._replace(copying=pinning)), begin, end)
                    )
        except BaseException as error:  # StopIteration as well: raised where the batches are taken
            self._ready.put(error)
