"""A process of one's own that decodes, so that what a file does to a decoder costs that process and
nothing else.

A decoder that hangs in native code cannot be interrupted, one that crashes takes its process along,
one that is told to allocates gigabytes. `Isolated` is the side that asks: it starts the process
when it is first needed, and replaces it when a call has ended it. `main` is the process: it calls
the functions it is asked to, and dies with who asks, or of what it reads. Answers come back through
a socket, the arrays in them through memory that both see.
"""

import ctypes
import mmap
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import count, islice
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np

START_SECONDS = 120.0
"""Within them a process is there, its libraries loaded, also on a busy machine."""
MOST_STARTS = 5
"""Until one is there that nobody kills meanwhile."""
MOST_FILES = 5000
"""That a process opens before another takes its place: decoders leave some KB behind with each."""
AHEAD = 4
"""Items that are worked on or wait to be taken, for each worker."""
HELD_BYTES = 2**30
"""What results may hold until they are taken; beyond it no more items are begun."""
SPARED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals to a group of processes are meant for the trainer; blocked until they are ignored."""
KEPT_BYTES = 2**28
"""Shared memory that stays for the next answer: new memory costs more than a copy. 16 frames of
340 x 256 pixels take 4 MB.
"""
PR_SET_PDEATHSIG = 1
COMMAND = (
    "import sys; sys.path[:] = {path!r}; from video_mae.decoding.isolation import main; "
    "main({socket}, {memory}, {parent})"
)

Item = TypeVar("Item")
Result = TypeVar("Result")


class KilledError(Exception):
    """The process ended in a call, or was ended because it took too long: one line of reason. That
    may be no fault of what was asked: another process is to be asked once more.
    """


class Isolated:
    """A process for the calling thread; calls are made one after another."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._shared: Any = None
        self._num_files = self._num_running = 0

    def load(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Makes ready for a file: a process that is new, or takes the place of an old one, loads
        its libraries with function(*arguments), which is no fault of the file.
        """
        if self._num_files >= MOST_FILES and not self._num_running:
            self.close()
        if not self.is_alive:
            self.ask(function, *arguments)
        self._num_files += 1

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A `call` that is about no file: where the process ends, another is asked."""
        for _ in range(MOST_STARTS - 1):
            with suppress(KilledError):
                return self.call(function, *arguments, seconds=START_SECONDS)
        return self.call(function, *arguments, seconds=START_SECONDS)

    def call(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        seconds: float,
        memory_gb: float = 0.0,
    ) -> Any:
        """function(*arguments) there, a function of a module's top level.

        seconds: how long it may take; memory_gb: what it may allocate, 0 is no limit.
        Raises: what the function raises; KilledError when the process ended or had to be.
        """
        connection, begin, folder = self._connect(), time.monotonic(), ""
        with suppress(FileNotFoundError):  # it was removed: no relative path leads anywhere
            folder = os.getcwd()
        try:
            connection.send((function, arguments, memory_gb, folder))
            # Late is late, also where this process comes to look only after the answer.
            if not connection.poll(seconds) or time.monotonic() - begin > seconds:
                self.close()
                raise KilledError(f"no answer within {seconds:g} seconds")
            answer, places = connection.recv()
            end = sum(num_bytes for _, num_bytes in places)
            if end > len(self._shared):
                self._shared.resize(end)
            arrays = [
                np.frombuffer(self._shared, np.uint8, num_bytes, first).copy()
                for first, num_bytes in places
            ]
        except (EOFError, OSError):  # it is gone, or closes what it has as it goes
            raise KilledError(self._reason()) from None
        succeeded, result = pickle.loads(answer, buffers=arrays)
        if succeeded:
            return result
        try:
            raise result
        finally:
            del result  # else it and this frame keep each other alive, and the process with them

    def iterate(
        self,
        function: Callable[..., Iterator[Result]],
        *arguments: Any,
        seconds: float,
        memory_gb: float = 0.0,
    ) -> Generator[Result]:
        """The items of the generator function(*arguments), which runs there from one to the next: a
        `call` each. The process may be called meanwhile. Raises: as `call`.
        """
        number = next(_numbers)
        self.call(_begin, number, function, arguments, seconds=seconds)
        process = self._process
        self._num_running += 1
        try:
            while self._process is process and self.is_alive:
                items = self.call(_go_on, number, seconds=seconds, memory_gb=memory_gb)
                if not items:
                    return
                yield items[0]
            # what a file did to the process was to another one's loss
            raise KilledError("the process that read it was ended meanwhile")
        finally:
            self._num_running -= 1
            if self._process is process and self.is_alive:
                self.call(_end, number, seconds=seconds)

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
        else:
            self._forget()

    def _connect(self) -> Connection:
        if self._connection is not None and self.is_alive:
            return self._connection
        self._forget()
        self._num_files = 0
        ours, theirs = socket.socketpair()
        memory = os.memfd_create("answer")
        os.ftruncate(memory, mmap.PAGESIZE)
        self._shared = mmap.mmap(memory, 0)
        command = COMMAND.format(
            path=[os.path.abspath(entry) for entry in sys.path],
            socket=theirs.fileno(),
            memory=memory,
            parent=os.getpid(),
        )
        # glibc keeps a heap a thread, and decoders start threads for each file: with two heaps
        # memory stays as it is.
        environment = {**os.environ, "MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1"}
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SPARED)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", command],
                pass_fds=(theirs.fileno(), memory),
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            theirs.close()
            os.close(memory)
        self._connection = Connection(ours.detach())
        return self._connection

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
            self._connection = self._shared = None


_numbers = count()
_of_thread = threading.local()


def decoder_process() -> Isolated:
    """The process of the calling thread; what a fork brought along from another process is left to
    that one.
    """
    if getattr(_of_thread, "owner", None) != os.getpid():
        _of_thread.owner, _of_thread.process = os.getpid(), Isolated()
    return _of_thread.process


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    num_workers: int,
    num_bytes: Callable[[Result], int] = lambda _: 0,
) -> Generator[Result]:
    """work(item) of all items, in their order, a few of them ahead, done by threads of which each
    has a `decoder_process` of its own.

    num_bytes: what a result holds until it is taken. Closing it waits for the work in hand.
    """
    left, ahead = iter(items), deque[Future[Result]]()
    pool = ThreadPoolExecutor(num_workers)
    try:
        while True:
            held = sum(num_bytes(future.result()) for future in ahead if future.done())
            room = AHEAD * num_workers - len(ahead)
            if ahead and held >= HELD_BYTES:
                room = 0
            ahead += [pool.submit(work, item) for item in islice(left, room)]
            if not ahead:
                return
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# From here on: what runs in the process.

_running: dict[int, Iterator[Any]] = {}


def end_with(parent: int) -> None:
    """Has Linux end this process with the thread that started it; one that is gone ends it here."""
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
    connection, shared = Connection(socket), mmap.mmap(memory, 0)
    while True:
        try:
            request = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)
        if len(shared) > KEPT_BYTES:
            shared.resize(mmap.PAGESIZE)
        connection.send(_answer(request, shared))


def _answer(request: bytes, shared: mmap.mmap) -> tuple[bytes, list[tuple[int, int]]]:
    """(whether it succeeded, the result or the error) as bytes; and where the bytes of the arrays
    in it are in shared memory.
    """
    buffers: list[pickle.PickleBuffer] = []
    try:
        function, arguments, memory_gb, folder = pickle.loads(request)
        if folder:
            os.chdir(folder)  # where relative paths start
        _limit(memory_gb)
        try:
            result = function(*arguments)
        finally:
            _limit(0)
    except Exception as error:
        try:
            data = pickle.dumps((False, error))
            # exceptions of some libraries go in, and do not come out again
            pickle.loads(data)
        except Exception:
            data = pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))
        return data, []
    try:
        data = pickle.dumps((True, result), protocol=5, buffer_callback=buffers.append)
        contents = [buffer.raw() for buffer in buffers]
        end = sum(map(len, contents))
        if end > len(shared):
            shared.resize(end)
    except Exception as error:  # pickle asks the objects themselves
        return pickle.dumps((False, RuntimeError(f"an answer that cannot be sent: {error}"))), []
    places = []
    shared.seek(0)
    for content in contents:
        places.append((shared.tell(), len(content)))
        shared.write(content)
    return data, places


def _begin(number: int, function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]) -> None:
    _running[number] = function(*arguments)


def _go_on(number: int) -> list[Any]:
    """The next item, or nothing at the end."""
    return list(islice(_running[number], 1))


def _end(number: int) -> None:
    del _running[number]


def _limit(memory_gb: float) -> None:
    """Memory that may be allocated beyond what there is now; 0: as much as there is."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = hard
    if memory_gb:
        with open("/proc/self/statm", "rb") as file:
            there = int(file.read().split()[0]) * mmap.PAGESIZE
        limit = there + int(memory_gb * 1e9)
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
