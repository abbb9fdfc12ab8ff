"""The scripts of examples/ do what they say, on a few small videos."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from video_mae import (
    ClassifierConfig,
    ModelConfig,
    VideoClassifier,
    load_pretrained,
    save_model_folder,
)

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
Run = Callable[..., list[str]]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet_process: None
) -> Run:
    """run("pretrain", arguments ...): what it prints, in lines."""

    def started(name: str, *arguments: object) -> list[str]:
        path = EXAMPLES / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return started


def test_a_model_is_pretrained_and_tells_videos_apart(
    run: Run, demo_folder: Path, tmp_path: Path
) -> None:
    lines = run("pretrain", demo_folder / "train.txt", tmp_path / "model", 11)
    losses = [float(line.rpartition(" ")[2]) for line in lines[:-1]]
    assert losses[-1] < losses[0]
    assert load_pretrained(tmp_path / "model").config.num_frames == 8

    lines = run("features_and_neighbours", tmp_path / "model", demo_folder / "val.txt", 2)
    paths = [line for line in lines if line[0] != " "]
    assert len(paths) == 8
    assert len(lines) == 8 * 3
    for place, path in enumerate(paths):
        assert all(path not in line for line in lines[3 * place + 1 : 3 * place + 3])


def test_each_video_of_a_folder_is_named(run: Run, demo_folder: Path, tmp_path: Path) -> None:
    config = ModelConfig(
        num_frames=4, height=32, width=32, patch_size=16, embed_dim=24, depth=1, num_heads=2
    )
    head = ClassifierConfig(num_classes=2, class_names=("fall", "rise"), stride=2)
    save_model_folder(tmp_path / "model", VideoClassifier(config, head))
    lines = run("classify_folder", tmp_path / "model", demo_folder / "val")
    assert len(lines) == 8
    assert all(line.split()[1] in ("fall", "rise") for line in lines)
