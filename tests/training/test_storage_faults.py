"""Real runs whose disk is full, read-only, gone, or whose machine shares no memory: one line each,
nothing half-written, and the run goes on to the same bits when there is room again.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from video_mae.training.checkpoint import fault, folders

pytestmark = [pytest.mark.faults, pytest.mark.launcher, pytest.mark.timeout(2400)]

CANNOT_WRITE, TORN = 74, (".step_", ".unfinished-")
STEPS = ["optim.steps=6", "journal.checkpoint_interval=2", "engine.zero_stage=1"]
COMMAND = [sys.executable, "-m", "video_mae", "pretrain"]


def start(
    config: Path, output: Path, *changes: str, ranks: int = 1, before: tuple[str, ...] = ()
) -> "subprocess.Popen[str]":
    command = COMMAND
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        command = [launcher, "--num_accelerators", str(ranks), "--master_port", port]
        command += ["--module", *COMMAND[2:]]
    return subprocess.Popen(
        [*before, *command, str(config), f"output={output}", *STEPS, *changes],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )


def ended(process: "subprocess.Popen[str]", status: int) -> str:
    text, _ = process.communicate(timeout=400)
    assert process.returncode == status, text[-4000:]
    return text


def refusals(text: str) -> list[str]:
    """The lines about the disk; everything else that went wrong would be seen, too."""
    assert "Traceback" not in text, text[-4000:]
    return [line for line in text.splitlines() if "cannot be written" in line]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same(run: Path, other: Path) -> bool:
    ours, theirs = weights(run), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def losses(run: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    ended(start(tiny_file, run), 0)
    return run


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A little file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine mounts nothing for this user")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def no_half(run: Path) -> bool:
    return not [path for path in run.rglob(".*") if path.name.startswith(TORN)]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_disk_that_fills_up_keeps_the_checkpoint_before_and_a_larger_one_ends_in_the_same_bits(
    disk: Path, tiny_file: Path, mode: str, tmp_path: Path
) -> None:
    run, whole = disk / "run", tmp_path / "whole"
    remount(disk, "size=1300k")  # room for a checkpoint, its model and half of the next one
    changes = [f"journal.checkpoint_async={mode == 'async'}".lower()]
    lines = refusals(ended(start(tiny_file, run, *changes, ranks=2), CANNOT_WRITE))
    assert 1 <= len(lines) <= 3  # of the saves after steps 4 and 6, and a line of metrics at most
    assert "No space left on device" in lines[-1]
    assert "make room" in lines[-1]
    assert no_half(run)
    assert [fault(folder, slice(None)) for folder in folders(run / "checkpoints")] == [""]
    remount(disk, "size=20m")
    assert not refusals(ended(start(tiny_file, run, *changes, ranks=2), 0))
    assert not refusals(ended(start(tiny_file, whole, ranks=2), 0))
    assert same(run, whole)
    assert losses(run) == losses(whole)


def test_a_disk_that_is_full_from_the_start_leaves_a_folder_that_can_be_started(
    disk: Path, tiny_file: Path, undisturbed: Path
) -> None:
    (disk / "other").write_bytes(b"0" * 2**20)
    remount(disk, "size=1m")
    (line,) = refusals(ended(start(tiny_file, disk / "run"), CANNOT_WRITE))
    assert "No space left on device" in line
    remount(disk, "size=20m")
    ended(start(tiny_file, disk / "run"), 0)
    assert same(disk / "run", undisturbed)


def test_a_read_only_disk_is_told_and_nothing_is_lost(
    disk: Path, tiny_file: Path, undisturbed: Path
) -> None:
    remount(disk, "size=20m")
    ended(start(tiny_file, disk / "run"), 0)
    remount(disk, "ro")
    for output in ("run", "new"):
        (line,) = refusals(ended(start(tiny_file, disk / output), CANNOT_WRITE))
        assert "Read-only file system" in line
    assert same(disk / "run", undisturbed)


def test_a_run_folder_that_is_removed_ends_all_ranks_and_is_not_made_again(
    tiny_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(tiny_file, run, "optim.steps=100000", ranks=2)
    while not (run / "checkpoints" / "latest").exists():
        time.sleep(0.2)
        assert process.poll() is None
    run.rename(tmp_path / "away")
    assert "it was removed" in refusals(ended(process, CANNOT_WRITE))[-1]
    assert not (run / "config.yaml").exists()
    assert fault(folders(tmp_path / "away" / "checkpoints")[0], slice(None)) == ""


def test_files_that_may_not_be_so_large_end_the_run_at_its_end(
    tiny_file: Path, tmp_path: Path
) -> None:
    limit = ("prlimit", f"--fsize={100_000}")
    lines = refusals(ended(start(tiny_file, tmp_path / "run", before=limit), CANNOT_WRITE))
    saves = [line for line in lines if ".step_" in line]
    assert len(saves) == 3  # after steps 2, 4 and 6; a picture is none
    assert no_half(tmp_path / "run")
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_too_little_shared_memory_halves_the_workers_and_changes_no_bit(
    tiny_file: Path, undisturbed: Path, tmp_path: Path
) -> None:
    script = 'mount -t tmpfs -o size=200k tmpfs /dev/shm && exec "$@"'
    alone = ("unshare", "--mount", "bash", "-c", script, "bash")
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine mounts nothing for this user")
    text = ended(start(tiny_file, tmp_path / "run", "data.num_workers=2", before=alone), 0)
    assert "/dev/shm: has no room for a batch of 49152 bytes more" in text
    assert "half of the workers go on" in text
    assert same(tmp_path / "run", undisturbed)


def test_kills_while_a_thread_writes_leave_a_checkpoint_to_go_on_from(
    tiny_file: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run, changes = tmp_path / "run", ["journal.checkpoint_async=true"]
    for step in (2, 4, 6):
        process = start(tiny_file, run, *changes)
        building = run / "checkpoints" / f".step_0000000{step}"
        while process.poll() is None and not building.exists():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert all(fault(folder, slice(None)) == "" for folder in folders(run / "checkpoints"))
    ended(start(tiny_file, run, *changes), 0)
    assert same(run, undisturbed)
    assert losses(run) == losses(undisturbed)
    assert no_half(run)
