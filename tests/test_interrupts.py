"""Ctrl-C in a terminal, which reaches a command and all that it has started: one line, status 130."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from video_mae import ClassifierConfig, ModelConfig, VideoClassifier, save_model_folder

SECONDS = 300


@pytest.fixture(scope="module")
def words(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that takes longer than anybody waits."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("interrupted")
    config = ModelConfig(
        num_frames=4, height=32, width=32, patch_size=8, embed_dim=32, depth=1, num_heads=2
    )
    save_model_folder(folder / "model", VideoClassifier(config, ClassifierConfig(num_classes=8)))
    lines = (demo_folder / "train.txt").read_text().splitlines()
    long = folder / "list.txt"
    long.write_text("".join(f"{demo_folder / line}\n" for line in lines * 1000))
    return [
        "probe",
        str(folder / "model"),
        f"train={long}",
        f"validation={long}",
        f"output={folder / 'probed'}",
        "num_workers=1",
    ]


def interrupted(command: list[str], is_time: Callable[[int, Path], bool], folder: Path) -> str:
    """What a command says on stderr that has SIGINT, with its group, as soon as it is time."""
    out, err = folder / "out", folder / "err"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "video_mae", *command],
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            # whatever these tests were started by: what is in the background ignores it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        try:
            deadline = time.monotonic() + SECONDS
            while not is_time(process.pid, out):
                assert process.poll() is None, err.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(SECONDS) == 130, err.read_text()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return err.read_text()


def imports_torch(pid: int, out: Path) -> bool:
    return "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()


def is_at_work(pid: int, out: Path) -> bool:
    return "processes a rank" in out.read_text()


@pytest.mark.parametrize("is_time", [imports_torch, is_at_work])
def test_an_interrupted_stage_says_one_line(
    is_time: Callable[[int, Path], bool], words: list[str], tmp_path: Path
) -> None:
    said = interrupted(words, is_time, tmp_path)
    assert said == "video-mae: interrupted, what is done is kept\n"
