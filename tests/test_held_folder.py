"""One process a folder: the second start is refused, what a dead one left is taken over and told."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from video_mae import processes
from video_mae.processes import hold_folder, identity, remove_unfinished

HOLD = """
import sys, time
from pathlib import Path
from video_mae.processes import hold_folder
try:
    with hold_folder(Path(sys.argv[1])) as told:
        print(*told or ["held"], flush=True)
        time.sleep(float(sys.argv[2]))
except ValueError as error:
    print(error, flush=True)
"""


def hold(folder: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_of_many_starts_one_holds_the_folder_until_it_ends(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    starts = [hold(folder, 100) for _ in range(5)]
    lines = [said(start) for start in starts]
    holder = starts[lines.index("held\n")]
    for start, line in zip(starts, lines, strict=True):
        if start is not holder:
            assert f"{folder}: process {holder.pid} on " in line
            assert "is at work in it; wait for it, or choose another folder" in line
            start.wait()
    os.kill(holder.pid, signal.SIGSTOP)  # it lives
    assert "is at work in it" in said(hold(folder, 0))
    holder.kill()  # a zombie, until somebody waits for it
    last = hold(folder, 0)
    assert f"process {holder.pid} on " in (line := said(last))
    assert "has ended without a word; this one goes on" in line
    holder.wait()
    last.wait()
    assert list(folder.iterdir()) == []  # given back
    again = hold(folder, 0)
    assert said(again) == "held\n"
    again.wait()


@pytest.mark.parametrize("lives", [True, False])
def test_a_process_of_another_machine_is_known_by_its_signs_of_life(
    lives: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "SILENT_SECONDS", 1.0)
    elsewhere = {**identity(), "host": "elsewhere", "machine": "another"}
    (tmp_path / ".lock").write_text(json.dumps(elsewhere) + "\n")
    ended = threading.Event()

    def give_signs() -> None:
        while not ended.wait(0.1):
            os.utime(tmp_path / ".lock")

    if lives:
        threading.Thread(target=give_signs).start()
        time.sleep(0.2)
    try:
        if lives:
            with (
                pytest.raises(ValueError, match="on elsewhere is at work in it"),
                hold_folder(tmp_path),
            ):
                pass
        else:
            with hold_folder(tmp_path) as told:
                assert "on elsewhere was at work in it" in told[0]
    finally:
        ended.set()


def test_what_a_crash_tore_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(b'{"host": "a", "pi')
    for folder in (tmp_path, tmp_path / "other"):
        with hold_folder(folder) as told:
            assert told == []
            assert (folder / ".lock").exists()
        assert not (folder / ".lock").exists()


def test_a_process_whose_folder_is_removed_ends_and_leaves_the_next_ones_alone(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    first = hold(folder, 100)
    assert said(first) == "held\n"
    shutil.rmtree(folder)
    assert said(first) == f"{folder}: was removed, and may become another's; this process ends\n"
    assert first.wait(60) == -signal.SIGTERM
    second = hold(folder, 0)
    assert said(second) == "held\n"
    second.wait()


def test_what_is_cleaned_up_is_of_this_folder_alone(tmp_path: Path) -> None:
    """A run that lies in another one's folder, and may be at work."""
    left = [tmp_path / name for name in (".unfinished-a", "checkpoints/.step_00000004")]
    others = [tmp_path / "other" / name for name in (".unfinished-a", "checkpoints/.step_00000004")]
    for folder in (*left, *others):
        folder.mkdir(parents=True)
    lines = remove_unfinished(tmp_path)
    assert lines == [f"removed what an earlier start left behind: {one}" for one in left]
    assert [one.exists() for one in (*left, *others)] == [False, False, True, True]


def test_of_several_ranks_the_first_holds_the_folder(tmp_path: Path) -> None:
    with hold_folder(tmp_path / "run", rank=1) as told:
        assert told == []
    assert not (tmp_path / "run").exists()
