"""A decoding process that is killed, stopped or never gets to start costs no video: it is asked
again once, and only twice in a row is the video's fault.
"""

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from video_mae.decoding import Reading, VideoDecodeError, decode, isolation
from video_mae.decoding.frames import stream
from video_mae.decoding.isolation import Isolated, decoder_process

CHOICES = '''
import os, signal, time
import numpy as np

def counted(file):
    """How often this was called, in whatever process."""
    with open(file, "ab") as stream:
        stream.write(b"x")
    return os.path.getsize(file)

def signalled(file, number, most, num_frames):
    """All frames; the first `most` processes get a signal before."""
    if counted(file) <= most:
        os.kill(os.getpid(), number)
        time.sleep(60)
    return np.arange(num_frames)

def hang(file, num_frames):
    counted(file)
    time.sleep(60)

def slow(num_frames):
    time.sleep(1)
    return np.arange(num_frames)
'''


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """Choices of frames that harm their process, where it finds them as well."""
    folder = tmp_path_factory.mktemp("choices")
    (folder / "harmful_choices.py").write_text(CHOICES)
    sys.path.insert(0, str(folder))
    decoder_process().close()  # knows only what was there when it began
    try:
        yield importlib.import_module("harmful_choices")
    finally:
        sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> str:
    frames = np.random.default_rng(0).integers(256, size=(40, 32, 48, 3), dtype=np.uint8)
    return str(write_video(tmp_path_factory.mktemp("videos") / "clip.mp4", frames))


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, signal.SIGSEGV, pytest.param(signal.SIGSTOP, marks=pytest.mark.faults)],
)
def test_a_decode_whose_process_is_ended_once_is_done_again(
    choices: ModuleType, video: str, tmp_path: Path, number: int
) -> None:
    expected, count = decode(video, np.arange), tmp_path / "count"
    seconds = 3.0 if number == signal.SIGSTOP else 60.0
    wanted = partial(choices.signalled, str(count), number, 1)
    found = decode(video, wanted, Reading(seconds=seconds))
    assert np.array_equal(found, expected)
    assert count.stat().st_size == 2


def test_twice_in_a_row_is_the_fault_of_the_video(
    choices: ModuleType, video: str, tmp_path: Path
) -> None:
    count = tmp_path / "count"
    with pytest.raises(VideoDecodeError, match="ended by SIGKILL"):
        decode(video, partial(choices.signalled, str(count), signal.SIGKILL, 9))
    assert count.stat().st_size == 2


def test_what_hangs_is_tried_twice_as_well(choices: ModuleType, video: str, tmp_path: Path) -> None:
    count = tmp_path / "count"
    with pytest.raises(VideoDecodeError, match="no answer within 2 seconds"):
        decode(video, partial(choices.hang, str(count)), Reading(seconds=2))
    assert count.stat().st_size == 2


def test_a_stream_goes_on_where_its_process_was_killed(video: str) -> None:
    expected = decode(video, np.arange)
    found, frames = list[np.ndarray](), stream(video, np.arange)
    for number, (_, index, frame_HWC) in enumerate(frames):
        assert index == number
        found.append(frame_HWC)
        if number == 11:
            os.kill(decoder_process().call(os.getpid, seconds=60), signal.SIGKILL)
    assert np.array_equal(np.stack(found), expected)


def test_a_process_that_is_killed_while_it_starts_is_started_again(
    video: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, count = decode(video, np.arange), tmp_path / "count"
    harm = f"import os; stream = open('{count}', 'ab'); stream.write(b'x'); stream.flush(); "
    harm += "stream.tell() > NUMBER or os.kill(os.getpid(), 9); "
    for number, is_readable in ((1, True), (4, True), (99, False)):
        monkeypatch.setattr(
            isolation, "COMMAND", harm.replace("NUMBER", str(number)) + isolation.COMMAND
        )
        decoder_process().close()
        count.unlink(missing_ok=True)
        if is_readable:
            assert np.array_equal(decode(video, np.arange), expected)
            assert count.stat().st_size == number + 1
        else:
            with pytest.raises(VideoDecodeError, match="ended by SIGKILL"):
                decode(video, np.arange)
        monkeypatch.undo()
    decoder_process().close()


STOPPED = """
import sys
sys.path[:] = {path!r}
from harmful_choices import slow
from video_mae.decoding import Reading, decode
decode({video!r}, slow)
print("ready", flush=True)
print(len(decode({video!r}, slow, Reading(seconds=4))))
"""


@pytest.mark.faults
@pytest.mark.parametrize("whole", [True, False])
def test_a_time_in_which_all_is_stopped_is_no_fault_of_a_file(
    choices: ModuleType, video: str, whole: bool
) -> None:
    """As Ctrl-Z and fg do it to the group, or somebody to who asks alone."""
    command = [sys.executable, "-c", STOPPED.format(path=sys.path, video=video)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as asking:
        assert asking.stdout is not None
        assert asking.stdout.readline() == "ready\n"
        time.sleep(0.2)
        stop = partial(os.killpg if whole else os.kill, asking.pid)
        stop(signal.SIGSTOP)
        time.sleep(5)
        stop(signal.SIGCONT)
        assert asking.communicate(timeout=60)[0] == "40\n"


def test_an_answer_that_comes_in_time_is_taken() -> None:
    process = Isolated()
    process.call(time.sleep, 0.3, seconds=60)
    assert process.call(os.getpid, seconds=0.5) != os.getpid()
    process.close()
