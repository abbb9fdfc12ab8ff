"""This process among others: how another one knows it again, who started it, the signals that ask
it to end, and the folder that it keeps to itself.

A launcher that is killed tells its processes nothing, and the `deepspeed` command passes no signal
on. So a command looks for itself whether those are there that started it.
"""

import fcntl
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from video_mae.files import UNFINISHED, FolderError, json_line, read_jsonl, say, storing

LEFT_BEHIND = (UNFINISHED, ".step_", ".damaged_step_", ".model-")
"""How the names of what a killed process, of earlier versions too, leaves behind begin."""
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LOOK_SECONDS = 1.0
"""From one look at the launchers to the next."""
SAME_SECONDS = 0.8
"""Signals as close together are one: that of a terminal, say, and of a launcher that had it too."""

_first = list[float]()
"""When the first signal came."""


def _status(pid: int | str) -> list[str]:
    """Of a process: its parent, its group, and last its start, in ticks since that of the machine;
    nothing where it has ended, whether or not its parent has taken notice. Source: proc(5).
    """
    try:
        line = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    # the name before it, in brackets, may hold anything
    state, *words = line.rpartition(")")[2].split()
    return [] if state in "ZX" else words[:19]


def identity() -> dict[str, Any]:
    """This process as `is_running` takes it, with its host for people, and its `machine`: one start
    of one kernel, and one container's view of its processes.
    """
    machine = os.readlink("/proc/self/ns/pid")
    with suppress(OSError):  # some sandboxes have none
        machine += Path("/proc/sys/kernel/random/boot_id").read_text()
    return {
        "host": socket.gethostname(),
        "machine": machine,
        "pid": os.getpid(),
        "start": _status("self")[-1],
    }


def is_running(other: dict[str, Any]) -> bool:
    """Whether a process of this machine is there, and not another one of its number."""
    return _status(other["pid"])[-1:] == [other["start"]]


def on_signals(handle: Callable[[int, Any], object]) -> None:
    """Has handle(number, frame) called for the signals that ask a command to end, but not for
    SIGHUP where it was ignored from the start, as by `nohup`. A second signal ends the process at
    once, also where no handler comes to its turn, as in a collective: a thread hears of it.
    """
    _first.clear()
    signal.set_wakeup_fd(_told())
    for number in ENDING:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handle)


@cache
def _told() -> int:
    """Where each signal is to be written, for a thread that ends the process with the second."""
    heard, told = os.pipe()
    os.set_blocking(told, False)

    def hear() -> None:
        while True:
            number, now = os.read(heard, 1)[0], time.monotonic()
            if number in ENDING:
                _first.append(now)
                if now > _first[0] + SAME_SECONDS:
                    os._exit(128 + number)

    threading.Thread(target=hear, daemon=True).start()
    return told


def end_with_launchers() -> None:
    """From now on this process has a SIGTERM when one of those that started it is gone: those of
    its group, which a shell stops as one; under a launcher those of the launcher's.

    What was started in the background or by `nohup` outlives who did it. Then only those count
    whose command line ends as that of this process does: they are there for it alone. Of
    `deepspeed` and its launcher one is gone already where less than two are found.
    """
    pid = os.getppid()
    group = str(os.getpgid(pid if "RANK" in os.environ else 0))
    may_go = signal.SIG_IGN in map(signal.getsignal, (signal.SIGHUP, signal.SIGINT))
    end = os.fsencode(f"{sys.argv[-1]}\0")
    found = list[dict[str, Any]]()
    while (status := _status(pid)) and status[1] == group:
        if may_go and not Path(f"/proc/{pid}/cmdline").read_bytes().endswith(end):
            break
        found.append({"pid": pid, "start": status[-1]})
        pid = int(status[0])
    is_alone = "CROSS_RANK" in os.environ and len(found) < 2 and os.getppid() != os.getpgid(0)

    def watch() -> None:
        while not is_alone and all(map(is_running, found)):
            time.sleep(LOOK_SECONDS)
        if not _first:
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


SIGN_SECONDS, SILENT_SECONDS = 3.0, 30.0
"""How often who holds a folder gives a sign of life in it; and how long another machine, which
cannot see the process, waits for one.
"""


def require_free(folder: Path) -> list[str]:
    """Returns a line where another process held a folder and ended without giving it back. Raises:
    FolderError naming the process that holds it.
    """
    file, told = folder / ".lock", list[str]()
    for holder in read_jsonl(file):
        who = f"{folder}: process {holder['pid']} on {holder['host']}"
        is_alive = is_running(holder)
        if holder["machine"] != identity()["machine"]:
            before = file.stat()
            time.sleep(SILENT_SECONDS)
            file.read_bytes()  # a network file system looks anew when a file is opened
            is_alive = file.stat().st_mtime != before.st_mtime
        if is_alive:
            raise FolderError(f"{who} is at work in it; wait for it, or choose another folder")
        told.append(f"{who} was at work in it, and has ended without a word; this one goes on")
    return told


@contextmanager
def hold_folder(folder: Path, rank: int = 0) -> Iterator[list[str]]:
    """Inside, this process has a folder to itself; gives what is to be told of those before it. Of
    several ranks the first one has it for all. Raises: FolderError as `require_free`; StorageError.
    """
    if rank != 0:
        yield []
        return
    file, ended = folder / ".lock", threading.Event()
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as stream:
            # Of two starts in the same instant one waits; not on a file system without locks.
            with suppress(OSError):
                fcntl.flock(stream, fcntl.LOCK_EX)
            told = require_free(folder) + remove_unfinished(folder)
            file.write_bytes(json_line(identity()))

    def give_signs() -> None:
        while not ended.wait(SIGN_SECONDS):
            with suppress(OSError):
                if not (file.exists() or ended.is_set()):
                    say(f"{folder}: was removed, and may become another's; this process ends")
                    return os.kill(os.getpid(), signal.SIGTERM)
                os.utime(file)

    threading.Thread(target=give_signs, daemon=True).start()
    try:
        yield told
    finally:
        ended.set()
        with suppress(OSError):
            file.unlink()


def remove_unfinished(folder: Path) -> list[str]:
    """Removes from a folder what killed processes were making in it; returns a line on each. What
    lies deeper may be of others that are at work.
    """
    lines: list[str] = []
    for place in ("", "checkpoints/", "reconstructions/"):
        for one in folder.glob(f"{place}.*"):
            if one.name.startswith(LEFT_BEHIND):
                shutil.rmtree(one) if one.is_dir() else one.unlink()
                lines.append(f"removed what an earlier start left behind: {one}")
    return lines
