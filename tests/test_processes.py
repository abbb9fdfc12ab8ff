"""A command ends with those that started it, and with a second signal; what was started to outlive
them does.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

COMMAND = """
import os, pathlib, sys, time
from video_mae.processes import end_with_launchers
end_with_launchers()
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(100)
"""
# As launchers do: it notes its number, and its process is a rank.
LAUNCHER = """
import os, pathlib, subprocess, sys
pathlib.Path(sys.argv[1] + ".launcher").write_text(str(os.getpid()))
environment = {**os.environ, "RANK": "0"}
subprocess.run([sys.executable, "command.py", sys.argv[1]], env=environment, start_new_session=True)
"""
# As `deepspeed` is killed while its launcher still imports what it needs.
LOST = """
import os, pathlib, subprocess, sys
environment = {**os.environ, "RANK": "0", "CROSS_RANK": "0"}
done = subprocess.run([sys.executable, "command.py", sys.argv[1]], env=environment)
pathlib.Path(sys.argv[1]).write_text(f"ended {done.returncode}")
"""
# Waits as a collective does: no handler comes to its turn.
WAITING = """
import ctypes
from video_mae.processes import on_signals
on_signals(print)
lock, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
library.pthread_mutex_lock(lock)
print("ready", flush=True)
library.pthread_mutex_lock(lock)
"""
HANDLING = """
import time
from video_mae.processes import on_signals
on_signals(lambda number, frame: print(number, flush=True))
print("ready", flush=True)
while True:
    time.sleep(0.1)
"""
PYTHON = f"{sys.executable} command.py"
LAUNCHED = f"{sys.executable} launcher.py"
# What a shell does, which process is killed then, and whether the command ends.
STARTS = {
    "shell": (f"{PYTHON} shell; true", "shell", True),
    "background": (f"{PYTHON} background & sleep 100", "shell", False),
    "nohup": (f"nohup {PYTHON} nohup > /dev/null; true", "shell", False),
    "session": (f"setsid {PYTHON} session; true", "shell", False),
    "launcher": (f"{LAUNCHED} launcher; true", "launcher", True),
    "runner": (f"{LAUNCHED} runner; true", "shell", True),
    "nohup_launcher": (
        f"nohup {LAUNCHED} nohup_launcher > /dev/null & sleep 100",
        "launcher",
        True,
    ),
    "nohup_runner": (f"nohup {LAUNCHED} nohup_runner > /dev/null & sleep 100", "shell", False),
}


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def signals_of_a_terminal() -> None:
    """Whatever these tests were started by: what is in the background ignores SIGINT."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def started() -> Iterator[list[psutil.Process]]:
    """Processes that are killed after the test, with all that they have started."""
    processes = list[psutil.Process]()
    yield processes
    for process in processes:
        if process.is_running():
            for child in [*process.children(recursive=True), process]:
                child.kill()


def test_a_command_ends_with_who_started_it_but_not_where_it_was_to_go_on(
    tmp_path: Path, started: list[psutil.Process]
) -> None:
    (tmp_path / "command.py").write_text(COMMAND)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    shells, commands = dict[str, subprocess.Popen[bytes]](), dict[str, psutil.Process]()
    # a training in this process has left its rank
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    for name, (line, _, _) in STARTS.items():
        shells[name] = subprocess.Popen(
            ["bash", "-c", line],
            cwd=tmp_path,
            env=environment,
            start_new_session=True,
            preexec_fn=signals_of_a_terminal,
        )
        started.append(psutil.Process(shells[name].pid))
    for name in STARTS:
        file = tmp_path / name
        wait_for(lambda file=file: file.exists() and file.read_text())
        commands[name] = psutil.Process(int(file.read_text()))
        started.append(commands[name])
    for name, (_, killed, _) in STARTS.items():
        if killed == "launcher":
            os.kill(int((tmp_path / f"{name}.launcher").read_text()), signal.SIGKILL)
        else:
            shells[name].kill()
            shells[name].wait()
    ending = [commands[name] for name, (_, _, ends) in STARTS.items() if ends]
    assert psutil.wait_procs(ending, timeout=60)[1] == []
    time.sleep(2)  # the others have had the time, too
    assert [name for name, (_, _, ends) in STARTS.items() if not ends] == [
        name for name, command in commands.items() if command.is_running()
    ]


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_rank_whose_launcher_has_lost_who_started_it_ends(
    is_whole: bool, tmp_path: Path, started: list[psutil.Process]
) -> None:
    (tmp_path / "command.py").write_text(COMMAND)
    (tmp_path / "launcher.py").write_text(LOST)
    line = f"{sys.executable} launcher.py number"
    # the shell in between is gone at once
    shell = subprocess.Popen(
        ["bash", "-c", f"{line}; true" if is_whole else f"({line} &) ; sleep 100"],
        cwd=tmp_path,
        start_new_session=True,
        preexec_fn=signals_of_a_terminal,
    )
    started.append(psutil.Process(shell.pid))
    number = tmp_path / "number"
    wait_for(lambda: number.exists() and number.read_text())
    time.sleep(2)
    if is_whole:
        started.append(psutil.Process(int(number.read_text())))
    else:
        wait_for(lambda: number.read_text() == f"ended {-signal.SIGTERM}")


def test_a_second_signal_ends_a_process_whose_handlers_have_to_wait(
    started: list[psutil.Process],
) -> None:
    process = subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True)
    started.append(psutil.Process(process.pid))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    time.sleep(2)
    assert process.poll() is None
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM


def test_the_second_signal_ends_a_process_that_handles_the_first(
    started: list[psutil.Process],
) -> None:
    """But signals that come together are one: of a terminal, say, and of the launcher."""
    ignored = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    start = f"{ignored}os.execv(sys.executable, [sys.executable, '-c', {HANDLING!r}])"
    process = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True)
    started.append(psutil.Process(process.pid))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)  # ignored from its start
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == f"{signal.SIGINT:d}\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == f"{signal.SIGTERM:d}\n"
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM


def test_a_signal_to_an_earlier_run_of_the_process_is_none_to_the_next() -> None:
    script = (
        "import signal\n"
        "from video_mae import processes\n"
        "processes.SAME_SECONDS = 0\n"
        "for _ in range(2):\n"
        "    processes.on_signals(lambda number, frame: print(number, flush=True))\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, 2 * f"{signal.SIGTERM:d}\n")
