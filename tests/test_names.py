"""Names that files and classes may have: no UTF-8, line separators, signs of formulas, 255 bytes; each stage ends well and writes JSON."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from video_mae import ClassifierConfig, ModelConfig, ObjectiveConfig, VideoClassifier, VideoMAE, save_model_folder
from video_mae.cli import main

MODEL = ModelConfig(num_frames=4, height=16, width=16, patch_size=8, embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=8,
                    decoder_depth=1, decoder_num_heads=2)
FILES = ("b\udce4r.mp4", "\u65e5" * 83 + ".mp4", "x" * 251 + ".mp4", "a\nb.mp4", "a\rb.mp4", "a\vb.mp4", "a\u2028b.mp4", "a\x85b.mp4", "\ufeffa.mp4", " a .mp4",
         "#1.mp4", "$x_$.mp4", "a\\b.mp4", "%s{}.mp4", '"a".mp4', "\x1b[2J.mp4", "a 7.mp4")
CLASSES = ("cl\udce4ss", "$a_{^$", "x\u2028y", "\u65e5" * 85, "line\nbreak", "b\u00e4r")
BROKEN = "br\udcf6ken\u2028.mp4"
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """A folder per class; the first has a file of each name, the others have one."""
    root = tmp_path_factory.mktemp("names")
    video = write_video(root / "a.mp4", np.random.default_rng(0).integers(0, 255, (12, 24, 32, 3), dtype=np.uint8))
    for name in CLASSES:
        (root / "data" / name).mkdir(parents=True)
        shutil.copy(video, root / "data" / name / "one.mp4")
    for name in FILES:
        shutil.copy(video, root / "data" / CLASSES[0] / name)
    (root / "data" / CLASSES[1] / BROKEN).write_text("no video")
    return root / "data"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    save_model_folder(folder / "encoder", VideoMAE(MODEL, ObjectiveConfig()))
    save_model_folder(folder / "classifier", VideoClassifier(MODEL, ClassifierConfig(num_classes=len(CLASSES), stride=2)))
    return folder


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_of:
        main(arguments)
    return int(exit_of.value.code or 0)


def strict(path: Path, *, lines: bool = False) -> Any:
    """What a parser reads that knows no more than the standard: UTF-8, no lone surrogates, no NaN; a line is one for every reader."""
    text = path.read_bytes().decode("utf-8")
    assert not SURROGATE.search(text)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    if not lines:
        return json.loads(text, parse_constant=refuse)
    assert text.splitlines() == text.split("\n")[:-1]
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_evaluate(data, models, tmp_path, capsys):
    assert status("evaluate", str(models / "classifier"), str(data), f"output={tmp_path / 'out'}", "num_clips=1", "num_crops=1", "num_workers=0") == 0
    rows = strict(tmp_path / "out" / "predictions.jsonl", lines=True)
    metrics = strict(tmp_path / "out" / "metrics.json")
    print(len(rows), metrics, capsys.readouterr())


def test_predict(data, models):
    for name in FILES:
        assert status("predict", str(models / "classifier"), str(data / CLASSES[0] / name), "num_clips=1") == 0


def test_extract(data, models, tmp_path):
    assert status("extract", str(models / "encoder"), str(data), str(tmp_path / "out"), "num_workers=0", "data.stride=2") == 0
    rows = strict(tmp_path / "out" / "index.jsonl", lines=True)
    for row in rows:
        assert "bad" in row or (tmp_path / "out" / row["file"]).is_file()


def test_probe(data, models, tmp_path):
    assert status("probe", str(models / "encoder"), f"train={data}", f"validation={data}", f"output={tmp_path / 'out'}", "num_workers=0", "epochs=1") == 0
    strict(tmp_path / "out" / "metrics.json")


def test_pack(data, models, tmp_path):
    assert status("pack", str(data), str(tmp_path / "out"), "num_workers=1", "short_side=0") == 0
    strict(tmp_path / "out" / "manifest.json")
    strict(tmp_path / "out" / "manifest.jsonl", lines=True)
    strict(tmp_path / "out" / "refused.jsonl", lines=True)
    assert status("evaluate", str(models / "classifier"), str(tmp_path / "out"), f"output={tmp_path / 'e'}", "num_clips=1", "num_crops=1", "num_workers=0") == 0


def test_doctor(data, tmp_path):
    assert status("doctor", str(data), f"output={tmp_path / 'out'}", "num_workers=1") == 1
    strict(tmp_path / "out" / "videos.jsonl", lines=True)
    strict(tmp_path / "out" / "summary.json")


def test_reconstruct(data, models, tmp_path):
    for name in FILES:
        picture = tmp_path / f"{name[:-4][:50]}.png"
        assert status("reconstruct", str(models / "encoder"), str(data / CLASSES[0] / name), str(picture), "stride=2") == 0
        assert picture.is_file()
