"""Processes that decode for a real run are killed at random moments: no bit of its weights is
another one's, and no video is blamed.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
KILLS = int(os.environ.get("VIDEO_MAE_KILLS", "10"))
STEPS = 12 * KILLS + 20
APART = (4, 10)
"""Steps from one kill to the next, however slow the machine is."""


def start(tiny_file: Path, folder: Path) -> "subprocess.Popen[bytes]":
    """A run that says what it has to say into a file: nobody reads a pipe meanwhile."""
    command = [sys.executable, "-m", "video_mae", "pretrain", str(tiny_file), f"output={folder}"]
    changes = ["data.num_workers=2", "optim.micro_batch=2", "journal.log_interval=1"]
    with folder.with_suffix(".out").open("wb") as output:
        return subprocess.Popen(
            [*command, *changes, f"optim.steps={STEPS}"], stdout=output, stderr=subprocess.STDOUT
        )


def said(folder: Path) -> str:
    return folder.with_suffix(".out").read_text()[-3000:]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(tiny_file, folder)
    assert process.wait(timeout=900) == 0, said(folder)
    return weights(folder)


def workers_and_decoders(trainer: psutil.Process) -> tuple[list[Any], list[Any]]:
    """What there is now: some may be gone by the time they are looked at."""
    workers = trainer.children()
    decoders = [child for child in trainer.children(recursive=True) if child not in workers]
    return workers, decoders


@pytest.fixture
def started(tiny_file: Path, tmp_path: Path) -> "Iterator[subprocess.Popen[bytes]]":
    process = start(tiny_file, tmp_path / "run")
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("victims", ["workers", "decoders"])
def test_killed_processes_cost_no_bits(
    started: "subprocess.Popen[bytes]", tmp_path: Path, undisturbed: bytes, victims: str
) -> None:
    rng, killed, next_step, process = random.Random(victims), 0, 3, started
    trainer, metrics = psutil.Process(process.pid), tmp_path / "run" / "metrics.jsonl"
    while killed < KILLS:
        time.sleep(rng.uniform(0.01, 0.2))
        if process.poll() is not None:
            raise AssertionError(f"{killed} killed: {said(tmp_path / 'run')}")
        if not metrics.exists() or metrics.read_bytes().count(b"\n") < next_step:
            continue
        workers, decoders = workers_and_decoders(trainer)
        chosen = {"workers": workers, "decoders": decoders}[victims]
        with suppress(IndexError, ProcessLookupError):
            os.kill(rng.choice(chosen).pid, signal.SIGKILL)
            killed, next_step = killed + 1, next_step + rng.randint(*APART)
    assert process.wait(timeout=900) == 0, said(tmp_path / "run")
    assert "Traceback" not in said(tmp_path / "run")
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()
    assert weights(tmp_path / "run") == undisturbed


def test_a_list_of_which_nothing_can_be_decoded_ends_a_run_with_one_line_and_status_3(
    tmp_path: Path, tiny_file: Path
) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 99)
    (tmp_path / "list.txt").write_text("broken.mp4 1\n")
    command = [sys.executable, "-m", "video_mae", "pretrain", str(tiny_file)]
    for workers in (0, 1):
        run = tmp_path / f"run{workers}"
        changes = [f"data.source={tmp_path / 'list.txt'}", f"data.num_workers={workers}"]
        found = subprocess.run(
            [*command, f"output={run}", *changes],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert found.returncode == 3, found.stderr[-2000:]
        assert "Traceback" not in found.stdout + found.stderr
        last = found.stdout.splitlines()[-1]
        assert "stopped: data.source: 20 videos in a row cannot be decoded" in last
        assert "broken.mp4" in last
        assert "20 videos in a row" in (run / "log.txt").read_text()
