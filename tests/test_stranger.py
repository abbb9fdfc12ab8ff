"""The path of somebody who has never seen this: own videos, a public model, a classifier, a table,
a file for elsewhere, by the commands of docs/getting_started.md as they stand there.

What is changed is named here: sizes, steps and precision, so that it takes seconds on a CPU.
"""

import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import documents
import numpy as np
import pytest
import torch
from deepspeed.launcher.runner import parse_args

from video_mae import ModelConfig, VideoClassifier, VideoMAE, load_pretrained, save_model_folder
from video_mae.cli import main
from video_mae.data import decode

PAGE = documents.ROOT / documents.BY_STRANGER
SIZE = {
    "num_frames": 4,
    "height": 32,
    "width": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
MODEL = [f"model.{name}={value}" for name, value in {**SIZE, **DECODER}.items()]
TRAINING = ["data.num_workers=0", "engine.precision=fp32", "journal.log_interval=1"]
SMALLER = {
    "split": [],
    "doctor": ["num_workers=1"],
    "pretrain": [*MODEL, *TRAINING, "optim.steps=4", "optim.warmup_steps=1", "data.stride=1"],
    "finetune": [*MODEL, *TRAINING, "optim.steps=12", "optim.accumulation=1", "optim.base_lr=0.1"],
    "evaluate": ["num_workers=0", "num_clips=1", "num_crops=1"],
    "predict": ["num_workers=0"],
    "convert": [],
}
"""What is appended to the commands of a stage."""
LAUNCHER = """#!/bin/sh
echo "$*" >> launches.txt
while [ "$1" != --module ]; do shift; done
shift
exec python -m "$@"
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_video: Callable[..., Path]) -> Path:
    """Where they work: twenty videos in two folders, two new ones, and under the name of the public
    model what our export makes for transformers.
    """
    rng = np.random.default_rng(0)
    for number in range(22):
        name = ("dark", "light")[number % 2]
        frames = rng.integers(0, 90, (20, 48, 64, 3), dtype=np.uint8) + 160 * (number % 2)
        folder = tmp_path / ("new_videos" if number >= 20 else f"videos/{name}")
        path = folder / ("one.mp4" if number == 20 else f"{number}.mp4")
        write_video(path, frames.astype(np.uint8))
    (tmp_path / "configs").symlink_to(documents.ROOT / "configs")
    torch.manual_seed(0)
    epsilons = {"norm_eps": 1e-12, "head_norm_eps": 1e-5}  # as the public ones have them
    config = ModelConfig(**{**SIZE, **DECODER, **epsilons})  # pyright: ignore[reportArgumentType]
    save_model_folder(tmp_path / "source", VideoMAE(config))
    monkeypatch.chdir(tmp_path)
    Path("MCG-NJU").mkdir()
    with pytest.raises(SystemExit):
        main(["convert", "source", "MCG-NJU/videomae-base", "format=hugging_face"])
    assert "VideoMAEForPreTraining" in Path("MCG-NJU/videomae-base/config.json").read_text()
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """run(words): what a command prints; one that trains has a process of its own."""

    def done(words: list[str]) -> str:
        trains = words[0] in ("pretrain", "finetune") and "--dry-run" not in words
        words = [*words, *SMALLER[words[0]]]
        if trains:
            command = [sys.executable, "-m", "video_mae", *words]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, (words, result.stderr)
            return result.stdout
        with pytest.raises(SystemExit) as ended:
            main(words)
        said = capsys.readouterr()
        assert not ended.value.code, (words, said.err)
        return said.out

    return done


@pytest.mark.slow
@pytest.mark.usefixtures("home", "quiet_process")
def test_nothing_but_the_page_is_needed(run: Callable[[list[str]], str]) -> None:
    commands = [
        words
        for block in documents.blocks(PAGE)
        if block.language == "sh"
        for line in block.lines
        for words in documents.words_of(line)
    ]
    stages = [words[0] for words in commands]
    wanted = "split doctor pretrain finetune finetune evaluate predict convert"
    assert stages == wanted.split()
    said = {}
    for words in commands:
        said[" ".join(words)] = run(words)

    lists = [
        len(Path(f"videos_split/{part}.txt").read_text().splitlines())
        for part in ("train", "validation", "test")
    ]
    assert lists == [16, 2, 2]
    # what a run says, and which command comes next
    first = Path("runs/first/report.html").read_text()
    assert re.search(r"<pre>video-mae probe .*runs/first", first)
    assert list(Path("runs/first/reconstructions").glob("step_*.webp"))
    dry, tuned = (text for words, text in said.items() if words.startswith("finetune"))
    assert "dry run: nothing was written" in dry
    assert "starts from MCG-NJU/videomae-base" in dry + tuned
    assert load_pretrained("runs/own_videos", VideoClassifier).classifier_config.class_names == (
        "dark",
        "light",
    )
    report = Path("runs/own_videos/report.html").read_text()
    assert "video-mae predict" in report
    assert "confusion" in report.lower()

    with open("predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {Path(row["path"]).name for row in rows} == {"one.mp4", "21.mp4"}
    assert all(row["class_1"] in ("dark", "light") for row in rows)

    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession("classifier.onnx")
    frames = decode("new_videos/one.mp4", [0, 4, 8, 12])
    clip_BTHWC = np.ascontiguousarray(frames[None, :, :32, :32])
    (logits_BK,) = session.run(["logits"], {"clip": clip_BTHWC})
    with torch.no_grad():
        ours_BK = load_pretrained("runs/own_videos")(torch.from_numpy(clip_BTHWC))
    np.testing.assert_allclose(logits_BK, ours_BK.numpy(), atol=1e-4)

    for block in documents.blocks(PAGE):
        if block.language == "python":
            exec(block.text, {})


@pytest.mark.slow
def test_the_demo_ends_with_what_it_names(tmp_path: Path) -> None:
    """The script of `make demo`, in a folder of its own: all its commands, on few short videos.

    Five starts of a launcher and two processes each would take longer than all else: what stands in
    for it writes down what it is told, which the real one has to understand, and starts a process.
    """
    for name in ("scripts/demo.sh", "scripts/demo_figures.py", "configs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(documents.ROOT / name)
    launcher = tmp_path / "bin" / "deepspeed"
    launcher.parent.mkdir()
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    num_actions = 15 if find_spec("pybullet") else 8
    result = subprocess.run(
        ["bash", "scripts/demo.sh"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PATH": f"{launcher.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            # the script takes the third video of an action
            "DEMO_DATA": f"num_frames=16 train_clips={2 * num_actions} "
            f"validation_clips={3 * num_actions}",
            "DEMO_TRAINING": "optim.steps=2 optim.warmup_steps=1",
        },
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"top-1 on videos of unseen photographs, {num_actions} actions" in result.stdout
    assert re.search(r"^fine-tuned +\d", result.stdout, re.MULTILINE)
    named = re.findall(r"^  (runs/.*)", result.stdout, re.MULTILINE)
    assert len(named) == 6
    assert all((tmp_path / path).exists() for path in named)
    assert list((tmp_path / "runs/demo/unseen").glob("*.mp4"))

    launches = [line.split() for line in (tmp_path / "launches.txt").read_text().splitlines()]
    told = [parse_args(words) for words in launches]
    assert all(one.module and one.user_script == "video_mae" for one in told)
    stages = [one.user_args[0] for one in told]
    assert stages == ["pretrain", "finetune", "finetune", "evaluate", "evaluate"]
    assert {one.num_gpus for one in told} == {torch.cuda.device_count() or 2}
