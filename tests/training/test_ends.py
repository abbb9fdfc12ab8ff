"""How real runs of two ranks end: by signals to any of their processes, where a rank is gone or
hangs, and where another start finds the folder taken. No process is left, and no step is lost that
could be saved.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from video_mae import VideoClassifier, load_config, save_model_folder
from video_mae.config import ClassifierConfig
from video_mae.files import read_jsonl

BIN = Path(sys.executable).parent
PYTHON = f"{sys.executable} -m video_mae"
DEEPSPEED = f"{BIN / 'deepspeed'} --num_accelerators 2 --master_port PORT --module video_mae"
TORCHRUN = f"{BIN / 'torchrun'} --nproc_per_node 2 --master_port PORT -m video_mae"
LONG = "optim.steps=100000 data.num_workers=1 journal.log_interval=1"
PATIENCE = 240.0
"""Seconds: of a machine that has other things to do. A run that does not end takes for ever."""
STALL_SECONDS = 20.0

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


def wait_for(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Run:
    """A command in a session of its own, its processes, and what it says."""

    def __init__(self, line: str, output: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            line = line.replace("PORT", str(probe.getsockname()[1]))
        self.output, self.said = output, output.with_suffix(f".{time.monotonic_ns()}")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if not torch.cuda.is_available():
            environment["DS_ACCELERATOR"] = "cpu"
        with self.said.open("wb") as said:
            self.command = subprocess.Popen(
                shlex.split(line),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self.processes = list[psutil.Process]()

    @property
    def text(self) -> str:
        return self.said.read_text(errors="replace")

    @property
    def num_steps(self) -> int:
        return len(read_jsonl(self.output / "metrics.jsonl"))

    @property
    def saved_step(self) -> int:
        latest = self.output / "checkpoints" / "latest"
        return int(latest.read_text().removeprefix("step_")) if latest.exists() else 0

    def train(self, num_steps: int = 4) -> None:
        """Waits for some more steps, and notes all processes that there are then."""
        before = self.num_steps
        wait_for(
            lambda: self.num_steps >= before + num_steps or self.command.poll() is not None,
            self.text,
        )
        assert self.command.poll() is None, self.text
        top = psutil.Process(self.command.pid)
        self.processes = [top, *top.children(recursive=True)]

    def find(self, target: str) -> psutil.Process:
        """The command itself, the launcher that has the ranks, or a rank: rank0, rank1."""
        if target == "command":
            return self.processes[0]
        ranks = dict[int, psutil.Process]()
        for process in self.left():
            environment = process.environ()
            if "RANK" in environment and "RANK" not in psutil.Process(process.ppid()).environ():
                ranks[int(environment["RANK"])] = process
        if target == "launcher":
            return psutil.Process(ranks[0].ppid())
        return ranks[int(target[-1])]

    def left(self) -> list[psutil.Process]:
        self.command.poll()
        return [process for process in self.processes if lives(process)]

    def kill(self) -> None:
        for process in self.processes:
            if lives(process):
                process.kill()
        if self.command.poll() is None:
            os.killpg(self.command.pid, signal.SIGKILL)
        self.command.wait()


@pytest.fixture
def start(tiny_file: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """start(line, *overrides): a run in tmp_path/run, whose command stands for TRAIN in the line."""
    runs = list[Run]()
    output = tmp_path / "run"

    def begin(line: str, *overrides: str) -> Run:
        train = f"pretrain {tiny_file} output={output} {LONG} {' '.join(overrides)}"
        runs.append(Run(line.replace("TRAIN", train), output))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


def assert_saved_and_gone(run: Run, num_steps: int) -> None:
    wait_for(lambda: not run.left(), f"{run.left()}\n{run.text}")
    assert run.saved_step >= num_steps, run.text
    assert run.saved_step == run.num_steps
    assert "Traceback" not in run.text.replace(
        'Traceback (most recent call last):\n  File "' + str(BIN), ""
    )


@pytest.mark.parametrize("target", ["command", "launcher", "rank0"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_to_any_process_ends_all_with_a_checkpoint(
    start: Callable[..., Run], number: signal.Signals, target: str
) -> None:
    run = start(f"{DEEPSPEED} TRAIN")
    run.train()
    assert len(run.processes) >= 6  # with a worker of each rank
    if (number, target) == (signal.SIGKILL, "rank0"):
        time.sleep(3)  # a sign of its life, after the others have begun
    before = run.num_steps
    run.find(target).send_signal(number)
    if (number, target) == (signal.SIGKILL, "rank0"):  # with it a part of the state is lost
        wait_for(lambda: not run.left(), run.text)
        (line,) = re.findall("stalled: .*", run.text)
        assert re.search(r"rank 0 \(.*, process \d+\): .* since .*, after step \d+; no sign", line)
        assert line in (run.output / "log.txt").read_text()
        assert "gloo" in (run.output / "log.txt").read_text()
        assert "Traceback" not in run.text
    else:
        assert_saved_and_gone(run, before)


@pytest.mark.parametrize("how", ["timeout", "bash", "torchrun", "torchrun_killed", "batch"])
def test_who_else_ends_a_run(start: Callable[..., Run], how: str) -> None:
    line, number = f"{DEEPSPEED} TRAIN", signal.SIGTERM
    if how == "timeout":
        line = f"timeout 10000 {line}"
    elif how == "bash":
        line = f"bash -c '{line}; echo'"
    elif how.startswith("torchrun"):
        line = f"{TORCHRUN} TRAIN"
    run = start(line)
    run.train()
    before = run.num_steps
    if how == "batch":  # a scheduler knows all processes of a job
        for process in run.processes:
            process.send_signal(number)
    else:
        run.find("command").send_signal(signal.SIGKILL if how == "torchrun_killed" else number)
    assert_saved_and_gone(run, before)


@pytest.mark.parametrize("nohup", ["", "nohup "])
def test_a_closed_terminal_ends_a_run_unless_it_is_to_go_on(
    start: Callable[..., Run], tiny_file: Path, tmp_path: Path, nohup: str
) -> None:
    shell = (
        "import os, pty, sys, time\n"
        "pid, terminal = pty.fork()\n"
        "if pid == 0:\n"
        "    os.execvp('bash', ['bash', '-c', sys.argv[1]])\n"
        "while not os.path.exists(sys.argv[2]):\n"
        "    time.sleep(0.1)\n"
        "os._exit(0)\n"  # closes it
    )
    closed = tmp_path / "closed"
    train = f"pretrain {tiny_file} output={tmp_path / 'run'} {LONG}"
    log = f" > {tmp_path / 'nohup.txt'} 2>&1" if nohup else ""
    inside = f"{nohup}{DEEPSPEED} {train}{log}; true"
    run = start(shlex.join([sys.executable, "-c", shell, inside, str(closed)]))
    run.train()
    before = run.num_steps
    closed.touch()
    run.command.wait()
    run.processes = run.processes[1:]
    if not nohup:
        assert_saved_and_gone(run, before)
        return
    wait_for(lambda: run.num_steps > before + 20, "it does not go on")
    assert len(run.left()) == len(run.processes) - 1  # without the shell of the terminal
    run.find("launcher").terminate()
    assert_saved_and_gone(run, before + 20)


def test_a_second_signal_does_not_wait_for_the_end_of_the_step(
    start: Callable[..., Run],
) -> None:
    run = start(f"{PYTHON} TRAIN", "optim.accumulation=1000000")
    beat = run.output / ".heartbeats" / "rank_0"
    wait_for(lambda: beat.exists() and int(beat.read_text().split()[0] or 0) > 9, run.text)
    run.command.send_signal(signal.SIGTERM)
    time.sleep(2)
    assert run.command.poll() is None
    run.command.send_signal(signal.SIGTERM)
    assert run.command.wait(PATIENCE) == 128 + signal.SIGTERM


@pytest.mark.parametrize("fault", ["rank0 stopped", "rank1 stopped", "reading"])
def test_a_rank_that_hangs_is_named_and_all_leave(start: Callable[..., Run], fault: str) -> None:
    run = start(f"{DEEPSPEED} TRAIN", f"engine.stall_seconds={STALL_SECONDS}")
    run.train()
    beats = sorted((run.output / ".heartbeats").iterdir())
    wait_for(lambda: all(re.search("step [1-9]", beat.read_text()) for beat in beats), "no beat")
    stopped = run.find("rank0" if fault == "rank0 stopped" else "rank1")
    pid = stopped.pid
    if fault == "reading":
        # its worker, beside the process that has said which decoder there is
        (stopped,) = (one for one in stopped.children() if "isolation" not in str(one.cmdline()))
    begin = time.monotonic()
    stopped.suspend()
    wait_for(lambda: "stalled: " in run.text, run.text)
    assert time.monotonic() - begin > STALL_SECONDS - 3
    (line,) = re.findall("stalled: .*", run.text)
    number = 0 if fault == "rank0 stopped" else 1
    assert re.match(
        rf"stalled: rank {number} \({re.escape(socket.gethostname())}, process {pid}\): "
        r"(reading|forward|all-reduce) since .*, after step \d+; .*"
        rf"see {re.escape(str(run.output / 'log.txt'))}, and start the same command again$",
        line,
    )
    assert ("; no sign of life since" in line) == (fault != "reading")
    assert line in (run.output / "log.txt").read_text()
    if fault != "reading":
        other = run.find(f"rank{1 - number}")
        wait_for(lambda: not lives(other), run.text)
        time.sleep(3)  # the launcher looks once a second, and has to see this one first
        stopped.kill()  # as the launcher does after half a minute
    wait_for(lambda: not run.left(), run.text)
    assert run.command.returncode == 75
    assert "Traceback" not in run.text


def test_a_second_start_into_a_folder_is_refused_and_what_a_dead_one_held_is_taken_over(
    start: Callable[..., Run],
) -> None:
    first = start(f"{PYTHON} TRAIN")
    first.train()
    second = start(f"{PYTHON} TRAIN")
    assert second.command.wait(PATIENCE) == 2
    assert len(second.text.splitlines()) == 1
    assert f"process {first.command.pid} on " in second.text
    assert "is at work in it; wait for it, or choose another folder" in second.text
    first.train()
    before = first.num_steps
    first.kill()
    third = start(f"{PYTHON} TRAIN")
    wait_for(lambda: "step 3/" in third.text or third.command.poll() is not None, third.text)
    assert f"process {first.command.pid} on " in (log := (third.output / "log.txt").read_text())
    assert "has ended without a word" in log
    third.command.terminate()
    assert third.command.wait(PATIENCE) == 128 + signal.SIGTERM
    assert 0 < third.saved_step == third.num_steps < before
    assert not (third.output / ".lock").exists()


def test_stages_that_train_nothing_end_with_their_launcher_and_hold_their_folder(
    demo_folder: Path, tiny_file: Path, tmp_path: Path
) -> None:
    """extract in two ranks; a signal leaves none behind."""
    model = load_config(tiny_file).model
    save_model_folder(tmp_path / "model", VideoClassifier(model, ClassifierConfig(num_classes=8)))
    video = next(demo_folder.rglob("*.mp4"))
    (tmp_path / "videos").mkdir()
    for number in range(5000):
        os.link(video, tmp_path / "videos" / f"{number}.mp4")
    (tmp_path / "list.txt").write_text(
        "".join(f"{tmp_path / 'videos' / f'{number}.mp4'}\n" for number in range(5000))
    )
    features = tmp_path / "features"
    line = f"{DEEPSPEED} extract {tmp_path / 'model'} {tmp_path / 'list.txt'} {features}"
    run = Run(line, tmp_path / "extract")
    try:
        wait_for(lambda: len(list(features.glob("*.npz"))) > 3, run.text)
        top = psutil.Process(run.command.pid)
        run.processes = [top, *top.children(recursive=True)]
        assert len(run.processes) >= 4
        second = Run(line.replace(DEEPSPEED, PYTHON), tmp_path / "second")
        assert second.command.wait(PATIENCE) == 2
        assert "is at work in it" in second.text
        assert len(second.text.splitlines()) == 1
        top.kill()
        wait_for(lambda: not run.left(), f"{run.left()}\n{run.text}")
    finally:
        run.kill()
