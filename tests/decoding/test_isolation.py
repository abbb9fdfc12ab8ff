"""What a decoder may do to its process, and that it does nothing to anybody else."""

import errno
import gc
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pytest

from video_mae.decoding import Reading, VideoDecodeError, decode, isolation, stream
from video_mae.decoding.isolation import Isolated, KilledError, decoder_process

STRANGE = '''
import ctypes, mmap, os, signal, sys, threading, time
import numpy as np

class Odd(Exception):
    def __init__(self, first, second):
        super().__init__("odd")

class Holding(Exception):
    def __init__(self):
        super().__init__("holding a lock")
        self.lock = threading.Lock()

class Outside(BaseException):
    pass

def pid():
    return os.getpid()

def loaded():
    return sorted(sys.modules)

def hang_with_the_interpreter_locked():
    ctypes.PyDLL(None).pause()

def raise_signal(number):
    signal.raise_signal(number)

def read_nothing():
    ctypes.string_at(0)

def leave(status):
    sys.exit(status)

def close_all():
    os.closerange(3, 256)
    time.sleep(60)

def raise_odd():
    raise Odd(1, 2)

def raise_holding():
    raise Holding

def raise_outside():
    raise Outside

def lock():
    return threading.Lock()

def big_list(num_bytes):
    return bytes(num_bytes)

def shared_array(shape, dtype):
    array = np.empty(shape, dtype)
    array[...] = np.arange(shape[-1])
    return array

def several():
    return {"empty": np.empty((0, 3)), "turned": np.arange(12).reshape(3, 4).T, "words": ["a"], "scalar": np.float32(2)}

def allocate_and_touch(num_bytes):
    place = mmap.mmap(-1, num_bytes)
    place[:: mmap.PAGESIZE] = bytes(len(range(0, num_bytes, mmap.PAGESIZE)))

def unguarded(path, num_frames):
    """decord by itself: without the table of what it misreads, and without a limit to the frames that it makes up."""
    import decord
    reader = decord.VideoReader(path)
    return reader.get_batch(np.linspace(0, len(reader) - 1, num_frames).astype(np.int64)).shape
'''


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """A module of functions that behave badly, where the process finds it as well."""
    folder = tmp_path_factory.mktemp("strange")
    (folder / "strange_functions.py").write_text(STRANGE)
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module("strange_functions")
    finally:
        sys.path.remove(str(folder))


@pytest.fixture(autouse=True)
def _new_process() -> None:
    """What earlier tests have left of this thread's process is no part of these."""
    decoder_process().close()


@pytest.fixture
def isolated() -> Iterator[Isolated]:
    process = Isolated()
    yield process
    process.close()


def is_gone(pid: int, seconds: float = 1.0) -> bool:
    """Whether nothing is left of a process within that time, not even a zombie of another parent
    than init.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if (
                psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
                and psutil.Process(pid).ppid() != os.getpid()
            ):
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


def test_a_process_lives_for_many_calls_and_has_no_torch(isolated, strange):
    pid = isolated.call(strange.pid, seconds=30)
    assert pid != os.getpid()
    assert isolated.call(strange.pid, seconds=30) == pid
    assert "torch" not in isolated.call(strange.loaded, seconds=30)
    isolated.close()
    assert is_gone(pid)
    assert not isolated.is_alive
    assert isolated.call(strange.pid, seconds=30) not in (pid, os.getpid())


@pytest.mark.parametrize("how", ["sleeps", "locks the interpreter", "is stopped"])
def test_what_hangs_is_ended_at_its_deadline_and_the_next_call_is_answered(isolated, strange, how):
    pid = isolated.call(strange.pid, seconds=30)
    begin = time.monotonic()
    calls = {
        "sleeps": (time.sleep, 600),
        "is stopped": (strange.raise_signal, signal.SIGSTOP),
        "locks the interpreter": (strange.hang_with_the_interpreter_locked,),
    }
    with pytest.raises(KilledError, match=r"no answer within 0\.5 seconds"):
        isolated.call(*calls[how], seconds=0.5)
    assert time.monotonic() - begin < 1.5
    assert is_gone(pid, 0.1)
    assert isolated.call(strange.pid, seconds=30) != pid


@pytest.mark.parametrize(
    ("function", "arguments", "reason"),
    [
        ("raise_signal", (signal.SIGSEGV,), "ended by SIGSEGV"),
        ("raise_signal", (signal.SIGKILL,), "ended by SIGKILL"),
        ("raise_signal", (signal.SIGFPE,), "ended by SIGFPE"),
        ("raise_signal", (signal.SIGABRT,), "ended by SIGABRT"),
        ("read_nothing", (), "ended by SIGSEGV"),
        ("leave", (3,), "ended with status 3"),
        ("leave", (0,), "ended with status 0"),
        ("raise_outside", (), "ended with status 1"),
    ],
)
def test_a_process_that_ends_costs_its_call_only(isolated, strange, function, arguments, reason):
    pid = isolated.call(strange.pid, seconds=30)
    with pytest.raises(KilledError, match=reason):
        isolated.call(getattr(strange, function), *arguments, seconds=30)
    assert is_gone(pid, 0.1)
    assert isolated.call(strange.pid, seconds=30) != pid


def test_a_process_that_closes_its_side_is_replaced(isolated, strange):
    with pytest.raises(KilledError):
        isolated.call(strange.close_all, seconds=30)
    assert isolated.call(strange.pid, seconds=30)


def test_an_error_is_the_callers_and_the_process_goes_on(isolated, strange):
    pid = isolated.call(strange.pid, seconds=30)
    for function, error, text in (
        (strange.raise_odd, RuntimeError, "Odd: odd"),
        (strange.raise_holding, RuntimeError, "holding a lock"),
        (strange.lock, RuntimeError, "cannot be sent"),
        (os.listdir, FileNotFoundError, "No such file"),
    ):
        with pytest.raises(error, match=text):
            isolated.call(
                function, *(["/no/such/folder"] if function is os.listdir else []), seconds=30
            )
    assert isolated.call(strange.pid, seconds=30) == pid


def test_memory_without_end_is_an_error_within_the_limit_and_the_limit_is_for_one_call(
    isolated, strange
):
    pid = isolated.call(strange.pid, seconds=30)
    for function in (strange.big_list, np.ones, strange.allocate_and_touch):
        with pytest.raises((MemoryError, OSError)) as caught:
            isolated.call(function, 2**30, seconds=30, memory_gb=0.5)
        assert isinstance(caught.value, MemoryError) or caught.value.errno == errno.ENOMEM
    assert psutil.Process(pid).memory_info().rss < 3e8
    assert len(isolated.call(strange.big_list, 6 * 10**8, seconds=30, memory_gb=2)) == 6 * 10**8
    assert isolated.call(strange.pid, seconds=30) == pid


def test_arrays_come_back_as_they_are_and_large_memory_is_given_back(isolated, strange):
    small = isolated.call(strange.shared_array, (3, 5, 7), np.uint16, seconds=30)
    assert (small.dtype, small.flags.writeable) == (np.uint16, True)
    np.testing.assert_array_equal(small, np.broadcast_to(np.arange(7), (3, 5, 7)))
    large = isolated.call(strange.shared_array, (300, 2**20), np.uint8, seconds=60)
    np.testing.assert_array_equal(
        large[::50], np.broadcast_to(np.arange(2**20).astype(np.uint8), (6, 2**20))
    )
    again = isolated.call(strange.shared_array, (3, 5, 7), np.int64, seconds=30)
    np.testing.assert_array_equal(again, small)
    # later calls do not write into it
    np.testing.assert_array_equal(small, np.broadcast_to(np.arange(7), (3, 5, 7)))
    pid = isolated.call(strange.pid, seconds=30)
    assert psutil.Process(pid).memory_info().shared < 2**28
    found = isolated.call(strange.several, seconds=30)
    np.testing.assert_array_equal(found["turned"], np.arange(12).reshape(3, 4).T)
    assert (found["empty"].shape, found["words"], found["scalar"]) == ((0, 3), ["a"], 2)


def test_nothing_is_left_of_processes_that_came_and_went(strange):
    def handles() -> int:
        return len(os.listdir("/proc/self/fd"))

    process = Isolated()
    process.call(strange.pid, seconds=30)
    process.close()
    before = handles()
    for ending in (strange.pid, strange.read_nothing, time.sleep):
        for _ in range(3):
            with_deadline = (60,) if ending is time.sleep else ()
            try:
                process.call(ending, *with_deadline, seconds=0.2 if ending is time.sleep else 30)
            except KilledError:
                continue
            process.close()
    assert handles() == before
    assert [
        child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE
    ] == []


def test_each_thread_has_a_process_that_ends_with_it(strange):
    pids: list[int] = []
    together = threading.Barrier(4)

    def work() -> None:
        pids.append(decoder_process().call(strange.pid, seconds=60))
        together.wait(60)
        assert decoder_process().call(strange.pid, seconds=60) in pids

    before = len(os.listdir("/proc/self/fd"))
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(pids)) == 4
    assert all(is_gone(pid) for pid in pids)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_fork_has_a_process_of_its_own_and_leaves_the_other_alone(strange):
    own = decoder_process().call(strange.pid, seconds=30)
    ours, theirs = multiprocessing.Pipe()

    def work() -> None:
        theirs.send([decoder_process().call(strange.pid, seconds=30) for _ in range(2)])

    fork = multiprocessing.get_context("fork").Process(target=work)
    fork.start()
    forked = ours.recv()
    fork.join(30)
    assert fork.exitcode == 0
    assert forked[0] == forked[1] != own
    assert is_gone(forked[0])
    assert decoder_process().call(strange.pid, seconds=30) == own


PARENT = """
import os, signal, sys, threading, time
sys.path[:] = {path!r}
from video_mae.decoding.isolation import Isolated
import strange_functions as strange
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda *_: None)
process = Isolated()
{body}
"""


def parent(body: str) -> "subprocess.Popen[str]":
    """A process of its own group that starts one that decodes."""
    command = PARENT.format(path=sys.path, body=body)
    return subprocess.Popen(
        [sys.executable, "-c", command], stdout=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.parametrize("busy", [False, True])
def test_a_process_is_gone_a_second_after_who_asks_was_killed(strange, busy):
    going_on = "process.call(time.sleep, 60, seconds=60)" if busy else "time.sleep(60)"
    with parent(f"print(process.call(strange.pid, seconds=30), flush=True)\n{going_on}") as asking:
        assert asking.stdout is not None
        pid = int(asking.stdout.readline())
        assert psutil.pid_exists(pid)
        time.sleep(0.1)
        asking.kill()
        assert is_gone(pid)


def test_signals_to_the_group_spare_the_process_from_its_start_on(strange):
    body = """
def storm():
    while not done:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.killpg(0, number)
        time.sleep(0.002)
done = []
threading.Thread(target=storm, daemon=True).start()
pids = [process.call(strange.pid, seconds=60) for _ in range(20)]
process.call(time.sleep, 0.3, seconds=60)
done.append(1)
print(len(set(pids)), flush=True)
"""
    with parent(body) as asking:
        assert asking.communicate(timeout=60)[0] == "1\n"


def test_a_hang_in_native_code_costs_its_deadline(isolated, strange, shared_videos):
    path = str(shared_videos / "hostile" / "decord_hang_edit_list.mp4")
    isolated.call(strange.pid, seconds=30)
    begin = time.monotonic()
    with pytest.raises(KilledError, match="no answer within 4 seconds"):
        isolated.call(strange.unguarded, path, 16, seconds=4)
    assert time.monotonic() - begin < 5
    assert isolated.call(strange.pid, seconds=30)
    # guarded, it is left to another
    assert len(decode(path, slice(None, None, 4), Reading(decoder="decord"))) == 15


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_a_bomb_is_refused_within_its_limits(decoder, shared_videos):
    path = str(shared_videos / "hostile" / "bomb8k.mp4")
    for memory_gb in (1.0, 4.0):
        begin = time.monotonic()
        # each of them says in its own way that there is no memory
        with pytest.raises(VideoDecodeError):
            decode(
                path,
                slice(16),
                Reading(decoder=decoder, memory_gb=memory_gb, seconds=30),
            )
        assert time.monotonic() - begin < 31
        status = Path(f"/proc/{decoder_process().call(os.getpid, seconds=30)}/status").read_text()
        assert int(status.split("VmHWM:")[1].split()[0]) * 1024 < (memory_gb + 0.3) * 1e9


def test_a_process_is_renewed_before_it_grows_old_but_not_under_an_open_file(
    tmp_path, write_video: Callable[..., Path], monkeypatch
):
    path = str(
        write_video(
            tmp_path / "clip.mp4",
            np.random.default_rng(0).integers(256, size=(20, 32, 48, 3), dtype=np.uint8),
        )
    )
    monkeypatch.setattr(isolation, "MOST_FILES", 3)
    all_FHWC = decode(path, np.arange)

    def pid() -> int:
        return decoder_process().call(os.getpid, seconds=30)

    first, streamed = pid(), stream(path, np.arange)
    shown = [next(streamed)[2]]
    # meanwhile the stream's file is open
    assert all(np.array_equal(decode(path, np.arange), all_FHWC) for _ in range(4))
    assert pid() == first
    shown += [frame for _, _, frame in streamed]
    np.testing.assert_array_equal(np.stack(shown), all_FHWC)
    assert np.array_equal(decode(path, np.arange), all_FHWC)
    assert pid() != first
    assert is_gone(first)


@pytest.mark.parametrize(("decoder", "num_opens"), [("pyav", 3000), ("decord", 1000)])
def test_memory_and_handles_are_the_same_after_thousands_of_opens(
    decoder, num_opens, tmp_path, write_video: Callable[..., Path]
):
    path = write_video(
        tmp_path / "clip.mp4",
        np.random.default_rng(0).integers(256, size=(9, 32, 48, 3), dtype=np.uint8),
    )
    (tmp_path / "cut.mp4").write_bytes(path.read_bytes()[:-900])

    def taken() -> tuple[int, list[int]]:
        """Bytes of this process and the one that decodes; handles of both, and threads of the
        latter.
        """
        gc.collect()
        both = [psutil.Process(), psutil.Process(decoder_process().call(os.getpid, seconds=30))]
        return sum(one.memory_info().rss for one in both), [
            *(one.num_fds() for one in both),
            both[1].num_threads(),
        ]

    reading, memory, handles = Reading(decoder=decoder), 0, []
    for turn in range(num_opens):
        if turn == 1:
            _, handles = taken()
        if turn == 300:
            memory, _ = taken()
        decode(str(path), [1, 3, 8], reading)
        if turn % 10 == 0:
            with pytest.raises(VideoDecodeError):
                decode(str(tmp_path / "cut.mp4"), np.arange, reading)
    assert taken()[0] <= 1.05 * memory
    assert taken()[1] == handles


def test_a_relative_path_is_read_from_where_the_caller_is(
    tmp_path, write_video: Callable[..., Path], monkeypatch
):
    for name, num_frames in (("a", 3), ("b", 5)):
        write_video(tmp_path / name / "clip.mp4", np.zeros((num_frames, 16, 16, 3), np.uint8))
    for name, num_frames in (("a", 3), ("b", 5)):
        monkeypatch.chdir(tmp_path / name)
        assert len(decode("clip.mp4", np.arange)) == num_frames
