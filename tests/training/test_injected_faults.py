"""A run of two ranks to whose processes, disk and checkpoints things are done at random moments,
and which the simplest loop starts again: it ends in the bits of a run that nobody disturbed.

`make test` does a few of them, `make faults` many; VIDEO_MAE_FAULTS=200 still more, VIDEO_MAE_SEED=1
others, at other moments.
"""

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from checkpoint_files import saved_state

from video_mae.files import read_jsonl
from video_mae.training.checkpoint import fault, folders, step_name

FEW, MANY = 3, int(os.environ.get("VIDEO_MAE_FAULTS", "68"))
SEED = int(os.environ.get("VIDEO_MAE_SEED", "0"))
PATIENCE = 600.0
"""Seconds: of a machine that has other things to do."""
MARK = "VIDEO_MAE_TEST_LOOP"
UNLUCKY = Path(__file__).parent / "launched" / "unlucky.py"

ROLES = ("command", "launcher", "rank", "worker", "decoder")
KINDS = [*product(("kill", "terminate", "stop"), ROLES), ("hang", "rank"), ("fill", "disk")]
# Only these may end a start; the others cost some seconds.
ENDING = {*product(("kill", "terminate"), ROLES[:3]), ("hang", "rank"), ("fill", "disk")}
WORLDS = [(2, 1), (1, 2)]
"""(ranks, accumulation): a sum of two gradients has the same bits, whoever adds them up."""

STAGES = [0, 1, 2]

# The command returns 0 where its launcher is killed by a signal: `finished` is what a run that is
# done writes last.
LOOP = """
until ./start && grep -qs finished $RUN/run.json; do
    echo $? >> ended
    sleep 1
done
echo 0 >> ended
"""
# A person would write the command where ./start is; here it waits for what is done between starts.
START = """#!/bin/bash
touch ready
until [ -e go ]; do sleep 0.1; done
rm go
exec $(cat command)
"""

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(2 * PATIENCE + 120 * MANY)]


@dataclass
class Start:
    """One of the loop's: when it began, where what it says begins, what was done to it."""

    begin: float
    offset: int
    faults: list[tuple[str, str]] = field(default_factory=list)


class Loop:
    """Starts a command until the run is done. between: does what is to be done between two starts, and
    returns the command.
    """

    def __init__(self, folder: Path, run: Path, between: Callable[["Loop"], str]) -> None:
        self.folder, self.run, self.between = folder, run, between
        self.said, self.starts, self.events = folder / "said", list[Start](), list[str]()
        (folder / "start").write_text(START)
        (folder / "start").chmod(0o755)
        environment = {**os.environ, MARK: str(folder), "RUN": str(run), "OMP_NUM_THREADS": "1"}
        if not torch.cuda.is_available():
            environment["DS_ACCELERATOR"] = "cpu"
        self.begin = time.monotonic()
        with self.said.open("wb") as said:
            self.shell = subprocess.Popen(
                ["bash", "-c", LOOP],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def statuses(self) -> list[int]:
        """Of the starts that have ended."""
        file = self.folder / "ended"
        return [int(status) for status in file.read_text().split()] if file.exists() else []

    @property
    def step(self) -> int:
        file = self.run / "metrics.jsonl"
        with suppress(OSError, IndexError, ValueError), file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 5000))
            return json.loads(stream.read().splitlines()[-1])["step"]
        return 0

    def note(self, event: str) -> None:
        self.events.append(f"{time.monotonic() - self.begin:7.1f} s  step {self.step}: {event}")
        print(self.events[-1], flush=True)

    def text(self, number: int) -> str:
        """What a start has said."""
        ends = [*(start.offset for start in self.starts), self.said.stat().st_size]
        begin, end = ends[:-1][number], ends[1:][number]
        return self.said.read_bytes()[begin:end].decode(errors="replace")

    def wait(self, condition: Callable[[], object], seconds: float = PATIENCE) -> bool:
        """Looks after the loop until something is so, or the loop has ended; returns whether it
        goes on.
        """
        deadline = time.monotonic() + seconds
        while self.shell.poll() is None:
            if (self.folder / "ready").exists():
                (self.folder / "ready").unlink()
                if self.starts:
                    self.note(f"start {len(self.starts) - 1} ended: {self.statuses[-1]}")
                (self.folder / "command").write_text(self.between(self))
                self.starts.append(Start(time.monotonic(), self.said.stat().st_size))
                (self.folder / "go").touch()
            if condition():
                return True
            assert time.monotonic() < deadline, "\n".join([*self.events, self.text(-1)[-3000:]])
            time.sleep(0.05)
        return False

    def rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.wait(lambda: time.monotonic() >= end)

    def everyone(self) -> list[psutil.Process]:
        """All processes that live of those that the loop has started."""
        found = list[psutil.Process]()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                is_ours = process.environ().get(MARK) == str(self.folder)
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return [process for process in found if process.pid != self.shell.pid]

    def find(self, role: str) -> list[psutil.Process]:
        found = list[psutil.Process]()
        for process in self.everyone():
            with suppress(psutil.Error):
                if self._role(process) == role:
                    found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def _role(self, process: psutil.Process) -> str:
        line, parent = process.cmdline(), process.parent()
        if any("video_mae.decoding.isolation" in word for word in line):
            return "decoder"
        if "deepspeed.launcher.launch" in line:
            return "launcher"
        if "RANK" in process.environ():
            if parent is None or "RANK" not in parent.environ():
                return "rank"
            return "worker" if line == parent.cmdline() else "another"
        is_command = parent is not None and parent.pid == self.shell.pid and len(line) > 9
        return "command" if is_command else "another"


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def begin(
    demo_folder: Path, tiny_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Loop]]:
    """begin(run, between): a loop of a run; between(loop) returns the overrides of a start. The
    list has a video that nobody can decode.
    """
    lists, loops = tmp_path_factory.mktemp("list"), list[Loop]()
    (lists / "broken.mp4").write_bytes(b"no video" * 99)
    lines = (demo_folder / "train.txt").read_text().splitlines()
    lines = [f"{demo_folder / line}" for line in lines]
    lines.insert(7, f"{lists / 'broken.mp4'} 0")
    (lists / "list.txt").write_text("\n".join(lines) + "\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    deepspeed = Path(sys.executable).with_name("deepspeed")
    always = [
        f"data.source={lists / 'list.txt'}",
        "data.max_bad_share=0.2",
        "optim.micro_batch=2",
        "optim.ema=0.9",
        "journal.checkpoint_interval=4",
        "journal.keep_checkpoints=3",
        "engine.stall_seconds=30",
    ]

    def start(run: Path, between: Callable[[Loop], list[str]]) -> Loop:
        def command(loop: Loop) -> str:
            ranks, *overrides = between(loop)
            words = [deepspeed, "--num_accelerators", ranks, "--master_port", port, UNLUCKY]
            words += ["pretrain", tiny_file, f"output={run}", *always, *overrides]
            return " ".join(map(str, words))

        loops.append(Loop(tmp_path_factory.mktemp("loop"), run, command))
        return loops[-1]

    yield start
    for loop in loops:
        loop.shell.kill()
        for process in loop.everyone():
            with suppress(psutil.Error):
                process.kill()
        loop.shell.wait()


def world(steps: int, ranks: int = 2, accumulation: int = 1, *more: str) -> list[str]:
    return [str(ranks), f"optim.steps={steps}", f"optim.accumulation={accumulation}", *more]


@dataclass
class Trial:
    """What is to happen to a run, and the same run when nothing does."""

    num_faults: int
    steps: int
    undisturbed: Path
    start_seconds: float
    """Until a start has a line of metrics."""


@pytest.fixture(scope="module", params=[FEW, pytest.param(MANY, marks=pytest.mark.faults)])
def trial(
    request: pytest.FixtureRequest,
    begin: Callable[..., Loop],
    tmp_path_factory: pytest.TempPathFactory,
) -> Trial:
    run, num_faults = tmp_path_factory.mktemp("undisturbed") / "run", request.param
    steps = 20 * num_faults + 80  # it is not done before they are
    loop = begin(run, lambda loop: world(steps))
    loop.wait(lambda: loop.step)
    start_seconds = time.monotonic() - loop.begin
    loop.wait(lambda: False, 2 * PATIENCE)
    assert loop.statuses == [0], loop.text(0)
    return Trial(num_faults, steps, run, start_seconds)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, where that can be."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    is_mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    yield folder
    if is_mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    with suppress(OSError), (disk / "ballast").open("ab", buffering=0) as file:
        for size in (2**20, 2**12):
            with suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass


def wait_for_a_moment(loop: Loop, start_seconds: float, rng: random.Random) -> None:
    """Some steps from now; or sooner, while a start begins, if the fault before makes for one."""
    step, is_early, num_starts = loop.step, rng.random() < 0.4, len(loop.starts)
    late_step = step + rng.randint(2, 10)
    early, late = rng.uniform(0, 1.2 * start_seconds), rng.uniform(0, 0.3)
    loop.wait(lambda: loop.step >= late_step or (is_early and len(loop.starts) > num_starts))
    if loop.step < late_step:
        end = time.monotonic() + early
        loop.wait(lambda: loop.step >= late_step or time.monotonic() >= end)
    loop.rest(late)


def do(loop: Loop, kind: str, role: str, disk: Path, rng: random.Random) -> bool:
    """Returns whether it was done: the loop may be done before."""
    first = len(loop.starts) - 1
    if kind == "fill":
        seconds = rng.uniform(0.5, 3)
        loop.note(f"no room for {seconds:.1f} s")
        end = time.monotonic() + seconds
        loop.wait(lambda: fill(disk) or time.monotonic() >= end)
        (disk / "ballast").unlink()
    else:
        found = list[psutil.Process]()
        loop.wait(lambda: found.extend(loop.find(role)) or found)
        if not found:
            return False
        first, victim = len(loop.starts) - 1, rng.choice(found)
        seconds = rng.uniform(0.2, 2)
        loop.note(f"{kind} {role} {victim.pid}")
        with suppress(psutil.NoSuchProcess):
            if kind == "kill":
                victim.kill()
            elif kind == "terminate":
                victim.terminate()
            else:
                victim.suspend()
        if kind == "hang" and len(loop.find("rank")) > 1:
            loop.wait(lambda: len(loop.find("rank")) != 2)  # until the other one has left
        elif kind in ("stop", "hang"):
            loop.rest(seconds)
        with suppress(psutil.NoSuchProcess):
            victim.resume()
    for start in loop.starts[first:]:
        start.faults.append((kind, role))
    return True


def truncate_newest(loop: Loop, rng: random.Random) -> None:
    """Unless it is the only one, or ranks of the start before are still at work on it."""
    whole = [one for one in folders(loop.run / "checkpoints") if not fault(one, slice(None))]
    if len(whole) > 1 and not loop.find("rank"):
        file = rng.choice(sorted(whole[0].iterdir()))
        size = rng.randrange(file.stat().st_size)
        os.truncate(file, size)
        loop.note(f"{file.relative_to(loop.run)} has only {size} bytes left")


def check_causes(loop: Loop) -> None:
    """No start has ended by itself: something was done to it, or to the one before, whose ranks
    still have the folder for some seconds.
    """
    for number, (start, status) in enumerate(zip(loop.starts, loop.statuses, strict=True)):
        is_refused = number > 0 and "is at work in it; wait for it" in loop.text(number)
        is_caused = not ENDING.isdisjoint(start.faults) or is_refused
        assert is_caused or status == 0, "\n".join([*loop.events, loop.text(number)[-3000:]])


@pytest.mark.parametrize("seed", [SEED])
def test_a_run_that_is_killed_stopped_starved_and_damaged_ends_in_the_same_bits(
    begin: Callable[..., Loop], trial: Trial, disk: Path, seed: int
) -> None:
    run, rng, rng_of_starts = disk / "run", random.Random(seed), random.Random(seed + 1)

    def between(loop: Loop) -> list[str]:
        if len(loop.starts) % 3 == 2:
            truncate_newest(loop, rng_of_starts)
        return world(
            trial.steps,
            *WORLDS[len(loop.starts) % 3 == 1],
            f"data.num_workers={rng_of_starts.choice([1, 2])}",
            f"engine.zero_stage={rng_of_starts.choice(STAGES)}",
            f"journal.checkpoint_async={rng_of_starts.choice(['true', 'false'])}",
        )

    loop, num_done = begin(run, between), 0
    loop.note(f"seed {seed}, a start takes {trial.start_seconds:.1f} s")
    kinds = [kind for kind in KINDS if kind[0] != "fill" or os.path.ismount(disk)]
    rounds = [rng.sample(kinds, len(kinds)) for _ in range(trial.num_faults // len(kinds) + 1)]
    # the first start has two ranks, of which one can miss the other
    faults = [("hang", "rank"), *chain(*rounds)][: trial.num_faults]
    for kind, role in faults:
        wait_for_a_moment(loop, trial.start_seconds, rng)
        num_done += do(loop, kind, role, disk, rng)
    loop.wait(lambda: False, 2 * PATIENCE)
    report = "\n".join([*loop.events, loop.text(-1)[-3000:]])
    assert loop.statuses[-1] == 0, report
    assert num_done > 0.8 * trial.num_faults, report
    check_causes(loop)

    deadline = time.monotonic() + PATIENCE
    while loop.everyone():
        assert time.monotonic() < deadline, f"{loop.everyone()}\n{report}"
        time.sleep(0.5)
    check_same(run, trial, report)
    # a start of a run that is done makes what the last one left behind good, and nothing else
    again = begin(run, lambda loop: world(trial.steps))
    again.wait(lambda: False)
    assert again.statuses == [0], again.text(0)
    check_same(run, trial, report)
    ours, theirs = (
        {path.relative_to(one) for path in one.rglob(".*")} for one in (run, trial.undisturbed)
    )
    assert ours == theirs


def check_same(run: Path, trial: Trial, report: str) -> None:
    whole, steps = trial.undisturbed, trial.steps
    ours, theirs = (saved_state(one / "checkpoints" / step_name(steps)) for one in (run, whole))
    assert ours.keys() == theirs.keys()
    others = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not others, report
    for name in ("model", "model_ema"):
        ours, theirs = (one / name / "model.safetensors" for one in (run, whole))
        assert ours.read_bytes() == theirs.read_bytes(), report
    lines, expected = metrics(run), metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, steps + 1)), report
    for line, of_whole in zip(lines, expected, strict=True):
        for key in ("epoch", "lr", "skipped_steps"):
            assert line[key] == of_whole[key], report
        # the mean over two ranks is not rounded as that over two micro-batches
        assert line["loss"] == pytest.approx(of_whole["loss"], rel=1e-6), report
    assert lines[-1]["bad_videos"] == 1
    (bad,) = read_jsonl(run / "quarantine.jsonl")
    assert Path(bad["path"]).name == "broken.mp4"
