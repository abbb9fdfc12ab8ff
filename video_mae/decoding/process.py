"""The process that decodes, for another one: it calls the functions it is asked to, and dies with
who asks, or of what it reads.

It is started as `python -c "from video_mae.decoding.process import main; main(SOCKET, MEMORY,
PARENT)"` and imports no more than it needs.
"""

import ctypes
import mmap
import os
import pickle
import resource
import signal
import sys
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

PR_SET_PDEATHSIG = 1
PAGE = mmap.PAGESIZE
SPARED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals to a group of processes are meant for the trainer among them. Who starts this process
blocks them until it ignores them.
"""
KEPT_BYTES = 2**28
"""Shared memory that stays there for the next answer; a clip of 16 frames of 340 x 256 pixels takes
4 MB.
"""


class SharedMemory:
    """Memory that both processes see; what is allocated since `clear` lies there one after another."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.used, self.size = descriptor, 0, 0
        self.map: mmap.mmap | None = None

    def clear(self) -> None:
        """Forgets what was allocated, and gives back what a very large answer took."""
        self.used = 0
        if self.size > KEPT_BYTES:
            self.map, self.size = None, 0
            os.ftruncate(self.descriptor, 0)

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """An array in the memory, its content undefined."""
        dtype = np.dtype(dtype)
        num_bytes = max(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, 1)
        begin = self.used
        self.used = begin + -(-num_bytes // PAGE) * PAGE
        if self.used > self.size:
            os.ftruncate(self.descriptor, self.used)
            self.map, self.size = mmap.mmap(self.descriptor, self.used), self.used
        assert self.map is not None
        return np.frombuffer(self.map, dtype, int(np.prod(shape, dtype=np.int64)), begin).reshape(
            shape
        )

    def place(self, view: memoryview) -> tuple[int, int]:
        """(first byte, bytes) of a buffer there; one that lies elsewhere is copied to it."""
        data = np.frombuffer(view, np.uint8)
        if self.map is not None:
            begin = data.ctypes.data - np.frombuffer(self.map, np.uint8).ctypes.data
            if begin >= 0 and begin + data.nbytes <= self.size:
                return begin, data.nbytes
        there = self.allocate((data.nbytes,), np.uint8)
        there[:] = data
        return self.place(there.data) if data.nbytes else (0, 0)


def end_with(parent: int) -> None:
    """Has Linux end this process when the thread that started it is gone; one that already is ends
    it here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


def main(socket: int, memory: int, parent: int) -> None:
    """Answers calls until the other side is gone."""
    end_with(parent)
    for number in SPARED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SPARED)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # FFmpeg's complaints about damaged files
    connection, shared = Connection(socket), SharedMemory(memory)
    while True:
        try:
            request = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)
        module, name, arguments, memory_gb, shares, folder = pickle.loads(request)
        shared.clear()
        try:
            if folder:
                os.chdir(folder)  # where relative paths start
            function = getattr(import_module(module), name)
            _limit(memory_gb)
            answer = (
                True,
                function(*arguments, shared.allocate) if shares else function(*arguments),
            )
        except Exception as error:
            answer = (False, error)
        _limit(0)
        data, buffers = _pickled(answer)
        places = [shared.place(buffer.raw()) for buffer in buffers]
        connection.send_bytes(pickle.dumps((shared.size, places)))
        connection.send_bytes(data)


def _pickled(answer: tuple[bool, Any]) -> tuple[bytes, list[pickle.PickleBuffer]]:
    """An answer as bytes, and buffers beside them; what cannot be sent is an error that can."""
    buffers: list[pickle.PickleBuffer] = []
    try:
        data = pickle.dumps(answer, protocol=5, buffer_callback=buffers.append)
        if not answer[0]:
            # exceptions of some libraries go in, and do not come out again
            pickle.loads(data, buffers=buffers)
    except Exception as error:  # pickle asks the objects themselves
        what = (
            f"an answer that cannot be sent: {error}"
            if answer[0]
            else f"{type(answer[1]).__name__}: {answer[1]}"
        )
        return pickle.dumps((False, RuntimeError(what)), protocol=5), []
    return data, buffers


def _limit(memory_gb: float) -> None:
    """Memory that may be allocated beyond what there is now; 0: as much as there is."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if memory_gb == 0:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        return
    with open("/proc/self/statm", "rb") as file:
        there = int(file.read().split()[0]) * PAGE
    limit = there + int(memory_gb * 1e9)
    resource.setrlimit(
        resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
