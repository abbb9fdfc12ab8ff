"""`Isolated`: a process of one's own that decodes, so that what a file does to a decoder costs that
process and nothing else.

A decoder that hangs in native code cannot be interrupted, one that crashes takes its process along,
one that is told to allocates gigabytes. The process is started when it is first needed, lives for
many calls, and is replaced when one of them ends it. Frames come back through memory that both
processes see.
"""

import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from video_mae.decoding.process import SPARED

_START = "import sys; sys.path[:] = {path!r}; from video_mae.decoding.process import main; main({socket}, {memory}, {parent})"


class KilledError(Exception):
    """The process ended in a call, or was ended because it took too long: one line of reason."""


class Isolated:
    """A process for the calling thread; calls are made one after another."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._memory, self._map = -1, None

    def call(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        seconds: float,
        memory_gb: float = 0.0,
        shares: bool = False,
    ) -> Any:
        """function(*arguments) there, a function of a module's top level; with `shares` it is also
        given what allocates shared memory.

        Arrays in the result are copies. seconds: how long it may take; memory_gb: what it may
        allocate, 0 is no limit.
        Raises: what the function raises; KilledError when the process ended or had to be.
        """
        connection = self._connect()
        try:
            connection.send_bytes(
                pickle.dumps(
                    (
                        function.__module__,
                        function.__name__,
                        arguments,
                        memory_gb,
                        shares,
                        _folder(),
                    )
                )
            )
            if not connection.poll(seconds):
                self.close()
                raise KilledError(f"no answer within {seconds:g} seconds")
            size, places = pickle.loads(connection.recv_bytes())
            answer = connection.recv_bytes()
        except (EOFError, OSError):  # it is gone, or closes what it has as it goes
            raise KilledError(self._reason()) from None
        succeeded, result = pickle.loads(
            answer, buffers=[self._copy(size, *place) for place in places]
        )
        if not succeeded:
            raise result
        return result

    @property
    def is_alive(self) -> bool:
        """Whether the process is there, so that a call need not start one."""
        return self._process is not None and self._process.poll() is None

    def close(self) -> None:
        """Ends the process; the next call starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        # one that waits for a dead network disk cannot even be killed
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        self._forget()

    def __del__(self) -> None:
        """Where a thread ends, so does its process; in a fork of the owner only the handles are
        closed.
        """
        if self._owner == os.getpid():
            self.close()
        elif self._connection is not None:
            self._forget()

    def _connect(self) -> Connection:
        if self._connection is not None and self.is_alive:
            return self._connection
        if self._connection is not None:
            self._forget()
        ours, theirs = socket.socketpair()
        self._memory = os.memfd_create("frames", os.MFD_CLOEXEC)
        command = _START.format(
            path=[os.path.abspath(entry) for entry in sys.path],
            socket=theirs.fileno(),
            memory=self._memory,
            parent=os.getpid(),
        )
        # glibc keeps a heap a thread, and decoders start threads for each file: with two heaps
        # memory stays as it is.
        environment = {**os.environ, "MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1"}
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SPARED)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", command],
                pass_fds=(theirs.fileno(), self._memory),
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
        self._connection = Connection(ours.detach())
        return self._connection

    def _copy(self, size: int, begin: int, num_bytes: int) -> Any:
        if num_bytes == 0:
            return np.empty(0, np.uint8)
        if self._map is None or len(self._map) < size:
            self._map = mmap.mmap(self._memory, size)
        return np.frombuffer(self._map, np.uint8, num_bytes, begin).copy()

    def _reason(self) -> str:
        process = self._process
        assert process is not None
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        status = process.returncode
        self.close()
        if status is None:
            return "the decoder's process closed its connection"
        if status >= 0:
            return f"the decoder's process ended with status {status}"
        return f"the decoder's process was ended by {signal.Signals(-status).name}"

    def _forget(self) -> None:
        if self._connection is not None:
            self._connection.close()
            os.close(self._memory)
        self._connection, self._memory, self._map = None, -1, None


def _folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed: no relative path leads anywhere
        return ""


_here = threading.local()


def decoder_process() -> Isolated:
    """The process of the calling thread; what a fork brought along from another process is left to
    that one.
    """
    if getattr(_here, "owner", None) != os.getpid():
        _here.owner, _here.process = os.getpid(), Isolated()
    return _here.process
