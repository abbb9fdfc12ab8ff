"""Windows of many videos as a table: the right frames, times and classes, whatever is killed."""

import csv
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch

from video_mae import (
    ClassifierConfig,
    ModelConfig,
    VideoClassifier,
    classify_video,
    load_pretrained,
    save_model_folder,
)
from video_mae.cli import main
from video_mae.decoding import decode

NAMES = ("=run", "swim, fast", "fly")
MODEL = ModelConfig(
    num_frames=4, height=16, width=16, patch_size=8, embed_dim=24, depth=1, num_heads=2
)


def saved(folder: Path, **head: Any) -> Path:
    torch.manual_seed(0)
    config = ClassifierConfig(
        num_classes=3, class_names=NAMES, stride=2, head_init_scale=10.0, **head
    )
    save_model_folder(folder, VideoClassifier(MODEL, config))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """31, 5 and 20 frames, 25 a second, and a file that is none."""
    root, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for name, number in (("a/long", 31), ("a/short", 5), ("b/other", 20)):
        frames = rng.integers(0, 256, (number, 16, 16, 3), dtype=np.uint8)
        write_video(root / f"{name}.mp4", frames)
    (root / "b" / "bad.mp4").write_bytes(b"nothing")
    return root


@pytest.fixture(autouse=True)
def _one_thread(quiet_process: None) -> None:
    pass


def status(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def expected(model: Path, video: Path, indices: list[list[int]]) -> np.ndarray:
    """Probabilities [C, K] of clips of these frames, written out."""
    frames = torch.from_numpy(decode(str(video), np.arange))
    with torch.no_grad():
        clips = torch.stack([frames[clip] for clip in indices])
        return load_pretrained(model)(clips).softmax(dim=-1).numpy()


def probabilities(found: list[dict[str, str]]) -> np.ndarray:
    """[C, K] in the order of the classes."""
    called = {"'=run" if name == "=run" else name: k for k, name in enumerate(NAMES)}
    scores = np.full((len(found), 3), np.nan)
    for row, score_K in zip(found, scores, strict=True):
        for place in (1, 2, 3):
            score_K[called[row[f"class_{place}"]]] = float(row[f"probability_{place}"])
    return scores


def test_rows_are_windows_with_their_times_and_classes(
    model: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "out.csv"
    words = [f"output={table}", "hop=5", "num_workers=0", "batch_size=2"]
    assert status("predict", model, videos, *words) == 0
    told = capsys.readouterr().out
    assert told.count("bad.mp4: ") == 1
    assert f"predictions {table}" in told
    found = rows(table)
    assert [Path(row["path"]).name for row in found] == (
        ["long.mp4"] * 6 + ["short.mp4"] + ["bad.mp4"] + ["other.mp4"] * 4
    )
    # a clip spans 8 frames, every second of them; the last of 31 frames is number 30
    long = [[min(5 * clip + 2 * t, 30) for t in range(4)] for clip in range(6)]
    assert probabilities(found[:6]) == pytest.approx(
        expected(model, videos / "a" / "long.mp4", long), abs=2e-6
    )
    for row, start in zip(found[:6], range(0, 30, 5), strict=True):
        assert float(row["start_seconds"]) == pytest.approx(start / 25, abs=1e-3)
        assert float(row["end_seconds"]) == pytest.approx(min(start + 8, 31) / 25, abs=1e-3)
        best = [float(row[f"probability_{place}"]) for place in (1, 2, 3)]
        assert best == sorted(best, reverse=True)
    (bad,) = (row for row in found if row["error"])
    assert Path(bad["path"]).name == "bad.mp4"
    # a row of all columns, of which two are filled
    assert set(bad.values()) == {bad["path"], bad["error"], ""}


def test_a_folder_is_taken_whole_and_goes_on_beside_its_own_table(
    model: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, table = tmp_path / "mine", tmp_path / "mine" / "x.csv"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".trash").mkdir()
    shutil.copy(videos / "a" / "short.mp4", folder / "deep" / "er" / "below.mp4")
    shutil.copy(videos / "a" / "long.mp4", folder / "top.mp4")
    for hidden in ("._top.mp4", "deep/._below.mp4", ".trash/old.mp4"):
        (folder / hidden).write_bytes(b"nothing")

    def work() -> tuple[list[str], dict[str, int]]:
        assert status("predict", model, folder, f"output={table}", "num_workers=0") == 0
        assert "have no videos" not in capsys.readouterr().out
        made = {path.name[:3]: path.stat().st_mtime_ns for path in folder.glob("x.csv.parts/*.npz")}
        return [Path(row["path"]).name for row in rows(table)], made

    names, first = work()
    assert names == ["below.mp4"] + ["top.mp4"] * 4
    text = table.read_bytes()
    assert work() == (names, first)
    assert table.read_bytes() == text
    # another video of that name is done again, and nothing else
    shutil.copy(videos / "b" / "other.mp4", folder / "top.mp4")
    names, second = work()
    assert names == ["below.mp4"] + ["top.mp4"] * 3
    assert [second[name] == first[name] for name in ("bel", "top")] == [True, False]


def test_files_and_folders_may_be_named_one_by_one_and_keys_stand_anywhere(
    model: Path, videos: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "fps=25.mp4"
    shutil.copy(videos / "a" / "short.mp4", odd)
    table = tmp_path / "out.csv"
    words = [odd, f"output={table}", videos / "a", "top=1", videos / "a" / "short.mp4"]
    assert status("predict", model, *words, "num_workers=0") == 0
    found = rows(table)
    assert [Path(row["path"]).name for row in found] == (
        ["fps=25.mp4"] + ["long.mp4"] * 4 + ["short.mp4"]
    )
    assert "class_1" in found[0]
    assert "class_2" not in found[0]
    assert found[0]["probability_1"] == found[-1]["probability_1"]


def test_a_model_of_whole_videos_sees_them_or_the_windows_asked_for(
    videos: Path, tmp_path: Path
) -> None:
    model, video = saved(tmp_path / "model", sampling="uniform"), videos / "a" / "long.mp4"
    assert status("predict", model, video, f"output={tmp_path / 'whole.csv'}") == 0
    (row,) = rows(tmp_path / "whole.csv")
    assert probabilities([row]) == pytest.approx(
        expected(model, video, [[3, 11, 19, 27]]), abs=2e-6
    )
    assert float(row["end_seconds"]) == pytest.approx(31 / 25, abs=1e-3)
    words = [f"output={tmp_path / 'windows.csv'}", "window=12", "hop=20"]
    assert status("predict", model, video, *words) == 0
    found = rows(tmp_path / "windows.csv")
    clips = [[0, 3, 6, 9], [20, 23, 26, 29]]
    assert probabilities(found) == pytest.approx(expected(model, video, clips), abs=2e-6)
    assert float(found[0]["end_seconds"]) == pytest.approx(12 / 25, abs=1e-3)


def test_frames_are_resized_as_the_model_was_trained(
    write_video: Callable[..., Path], tmp_path: Path
) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    video, model = write_video(tmp_path / "x.mp4", frames), tmp_path / "model"
    saved(model, antialias=False)
    assert status("predict", model, video, f"output={tmp_path / 'x.csv'}") == 0
    scores = dict(classify_video(load_pretrained(model), video, num_clips=1))
    (found,) = probabilities(rows(tmp_path / "x.csv"))
    assert found == pytest.approx([scores[name] for name in NAMES], abs=1e-5)


@pytest.mark.slow
def test_what_is_killed_goes_on_to_the_same_table(
    model: Path, videos: Path, write_video: Callable[..., Path], tmp_path: Path
) -> None:
    frames = np.random.default_rng(1).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    first = write_video(tmp_path / "videos" / "00.mp4", frames)
    for number in range(1, 16):
        shutil.copy(first, tmp_path / "videos" / f"{number:02}.mp4")
    (tmp_path / "videos" / "10.mp4").write_bytes(b"nothing")
    words = [str(model), str(tmp_path / "videos"), "hop=2", "num_workers=0"]
    command = [sys.executable, "-m", "video_mae", "predict", *words, f"output={tmp_path / 'k.csv'}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts, deadline = tmp_path / "k.csv.parts", time.monotonic() + 300
    while len(list(parts.glob("*.npz"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in parts.glob("*.npz")}
    assert len(before) < 15
    assert not (tmp_path / "k.csv").exists()
    assert status("predict", *words, f"output={tmp_path / 'k.csv'}") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert status("predict", *words, f"output={tmp_path / 'whole.csv'}") == 0
    assert (tmp_path / "k.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert len(rows(tmp_path / "k.csv")) == 15 * 27 + 1


def test_mistakes_are_one_line(
    model: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = f"output={tmp_path / 'out.csv'}"
    assert status("predict", model, videos / "a", table, "num_workers=0") == 0
    (tmp_path / "mine.csv").write_text("path\n")
    capsys.readouterr()
    for words, said in (
        ([videos / "a", table, "stride=3"], "extract.json: was made with data.stride = 2, now 3"),
        ([videos / "a", f"output={tmp_path / 'mine.csv'}"], "mine.csv exists without "),
        ([videos / "a"], "output: (empty) must name a file"),
        ([videos / "a" / "long.mp4"] * 2, "output: (empty) must name a file"),
        ([videos / "none.mp4", table], "none.mp4"),
        ([videos / "a", table, "hops=3"], "unknown key hops (did you mean hop?)"),
        ([videos / "a", table, "data.stride=3"], "made with data.stride = 2, now 3"),
    ):
        assert status("predict", model, *words) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert said in error, error
    assert (tmp_path / "mine.csv").read_text() == "path\n"
    assert status("predict", model, videos / "b" / "bad.mp4", f"output={tmp_path / 'b.csv'}") == 3


def test_the_page_names_what_is_dropped(
    model: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, answers, video = [], [], str(videos / "a" / "long.mp4")

    class Interface:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            made.append(arguments)

        def launch(self, **options: Any) -> None:
            (answer, *_), classes = made[0], classify_video(load_pretrained(model), video)
            named, film = answer(video)
            assert named == dict(classes)
            with av.open(str(film)) as container:  # it is there while the page is
                answers.append(len(list(container.decode(video=0))))

    gradio = SimpleNamespace(
        Interface=Interface, Video=object, Label=object, Image=object, __spec__=SimpleNamespace()
    )
    monkeypatch.setitem(sys.modules, "gradio", gradio)  # pyright: ignore[reportArgumentType]
    assert status("serve", model) == 0
    assert answers == [load_pretrained(model).config.num_frames]
