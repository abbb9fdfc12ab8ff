"""`video-mae doctor`: what it finds, what it writes, and with which status it ends."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from video_mae.cli import main
from video_mae.config.data import SourceConfig
from video_mae.data import read_annotations
from video_mae.data.shards import MANIFEST

Doctor = Callable[..., int]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """Clips of 70, 40 and 100 frames, one of them long without a key frame, and files that are
    none.
    """
    folder = tmp_path_factory.mktemp("the videos")
    rng = np.random.default_rng(0)
    for name, num_frames, size in (
        ("seventy.mp4", 70, 48),
        ("forty one.mp4", 41, 48),
        ("wide.mkv", 100, 64),
    ):
        write_video(
            folder / name, rng.integers(256, size=(num_frames, 32, size, 3), dtype=np.uint8)
        )
    whole = (folder / "seventy.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("no video")
    (folder / "copy.mp4").write_bytes(whole)
    os.mkfifo(folder / "pipe.mp4")
    return folder


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    """doctor("a.txt", ...): the exit status of the command; its files are in tmp_path/out."""

    def run(source: str | Path, *keys: str) -> int:
        with pytest.raises(SystemExit) as left:
            main(["doctor", str(source), f"output={tmp_path / 'out'}", "num_workers=2", *keys])
        return int(left.value.code or 0)

    return run


def rows(folder: Path) -> dict[int, dict[str, Any]]:
    return {
        row["line"]: row
        for row in map(json.loads, (folder / "out" / "videos.jsonl").read_text().splitlines())
    }


def clean(folder: Path) -> list[tuple[str, int]]:
    found = read_annotations(SourceConfig(source=str(folder / "out" / "clean.txt")))
    return [(os.path.realpath(path), info["label"]) for path, info in found]  # pyright: ignore[reportIndexIssue]


def test_every_line_is_judged_and_the_clean_list_has_the_good_ones(
    videos, doctor, tmp_path, capsys
):
    (videos / "list.txt").write_bytes(
        b"\n".join(
            [
                b"seventy.mp4 0",
                b"cut.mp4 0",
                b"text.mp4 1",
                b"",
                b"absent.mp4 1",
                b"pipe.mp4 1",
                b"b\xe4r.mp4 0",
                b"forty one.mp4 2",
                b"wide.mkv",
                b"copy.mp4 0",
                f"{videos}/wide.mkv 2".encode(),
                b"seventy.mp4 0",
                b"http://example.org/a.mp4 3",
                b"forty one.mp4\t2",
            ]
        )
        + b"\n"
    )
    assert doctor(videos / "list.txt") == 1
    assert clean(tmp_path) == [
        (str(videos / "seventy.mp4"), 0),
        (str(videos / "forty one.mp4"), 2),
        (str(videos / "copy.mp4"), 0),
    ]
    found = {
        line: [name for name in row["findings"] if name not in ("slow_seek", "short")]
        for line, row in rows(tmp_path).items()
    }
    assert found == {
        1: [],
        2: ["unreadable"],
        3: ["unreadable"],
        5: ["no_file"],
        6: ["no_file"],
        7: ["bad_line"],
        8: [],
        9: ["two_labels"],
        10: ["same_content"],
        11: ["two_labels"],
        12: ["again"],
        13: ["no_file"],
        14: ["again"],
    }
    reasons = {line: row["reason"] for line, row in rows(tmp_path).items()}
    for line, reason in (
        (2, "cut off"),
        (3, "container"),
        (5, "no such file"),
        (6, "not a regular"),
        (7, "UTF-8"),
        (9, "labels -1, 2"),
        (12, "is in line 1 as well"),
        (13, "is no local file"),
    ):
        assert reason in reasons[line]
    text = capsys.readouterr().out
    assert "13 files, 3 good, 10 bad" in text
    for number, line in ((2, 2), (3, 5), (1, 7), (2, 9), (2, 12), (1, 10)):
        assert any(
            row.split()[1] == str(number) and f"such as {videos}/list.txt:{line}" in row
            for row in text.splitlines()
            if row.startswith(("  bad", "  note"))
        )
    assert "labels: 2 classes, 0 to 2, of 1 to 2 good files" in text
    assert "labels without a good file: 1" in text


def test_a_list_without_fault_has_status_0_and_true_figures(videos, doctor, tmp_path, capsys):
    (videos / "good.txt").write_text('seventy.mp4 0\n"forty one.mp4" 1\nwide.mkv 1\n')
    for check in ("quick", "full"):
        assert doctor(videos / "good.txt", f"check={check}", "data.stride=3") == 0
        found = rows(tmp_path)
        assert [
            (row["num_frames"], row["height"], row["width"], row["decoded_frames"])
            for row in found.values()
        ] == [
            (n, 32, width, n if check == "full" else 0)
            for n, width in ((70, 48), (41, 48), (100, 64))
        ]
        first = found[1]  # its key frames lie 11 apart: a new picture of noise is a cut to x264
        assert (
            first["container"],
            first["codec"],
            first["fps"],
            first["bits"],
            first["rotation"],
        ) == ("mp4", "h264", 25, 8, 0)
        assert (first["seconds"], first["constant_rate"], first["key_frame_distance"]) == (
            pytest.approx(70 / 25),
            True,
            11,
        )
        assert first["num_bytes"] == (videos / "seventy.mp4").stat().st_size
        # 15 * 3 + 1 = 46 frames
        assert [row["findings"] for row in found.values()] == [[], ["short"], []]
        assert ["frames", "41", "70", "100"] in [
            line.split() for line in capsys.readouterr().out.splitlines()
        ]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["distributions"]["frames"] == {"min": 41, "median": 70, "max": 100}
    assert summary["labels"] == {"classes": 2, "missing": [], "files": {"0": 1, "1": 2}}


def test_the_clean_list_stands_on_its_own(videos, doctor, tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "far.txt").write_text("seventy.mp4 0\ntext.mp4 0\n")
    (tmp_path / "lists" / "classes.txt").write_text("run\n")
    assert doctor(tmp_path / "lists" / "far.txt", f"data.root={videos}") == 1
    assert clean(tmp_path) == [(str(videos / "seventy.mp4"), 0)]
    assert (tmp_path / "out" / "classes.txt").read_text() == "run\n"
    # `..` after it leads elsewhere than its name says
    (tmp_path / "lists" / "linked").symlink_to(videos)
    (videos.parent / "beside.mp4").write_bytes((videos / "wide.mkv").read_bytes())
    (tmp_path / "lists" / "far.txt").write_text("linked/../beside.mp4 3\nlinked/seventy.mp4\n")
    monkeypatch.chdir(tmp_path)
    assert doctor("lists/far.txt") == 1
    assert clean(tmp_path) == [(str(videos.parent / "beside.mp4"), 3)]


def test_a_folder_of_classes_gives_a_list_with_their_names(videos, doctor, tmp_path):
    for name in ("walk/a.mp4", "run/b 7.mp4", "run/c.mp4"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).symlink_to(
            videos / ("text.mp4" if "c" in name else "forty one.mp4")
        )
    (tmp_path / "set" / "run" / "line\nbreak.mp4").symlink_to(videos / "wide.mkv")
    assert doctor(tmp_path / "set") == 1
    lines = (tmp_path / "out" / "clean.txt").read_text().splitlines()
    assert lines == []  # the same video in two classes: no telling which is right
    (tmp_path / "set" / "walk" / "a.mp4").unlink()
    (tmp_path / "set" / "walk" / "a.mp4").symlink_to(videos / "seventy.mp4")
    assert doctor(tmp_path / "set") == 1
    assert clean(tmp_path) == [(str(videos / "forty one.mp4"), 0), (str(videos / "seventy.mp4"), 1)]
    assert (tmp_path / "out" / "classes.txt").read_text().split() == ["run", "walk"]
    found = [
        json.loads(line) for line in (tmp_path / "out" / "videos.jsonl").read_text().splitlines()
    ]
    assert {Path(row["path"]).name: row["findings"] for row in found if not row["good"]} == {
        "c.mp4": ["unreadable"],
        "line\nbreak.mp4": ["no_name"],
    }


def test_what_takes_too_long_is_bad_and_the_others_are_not(videos, doctor, tmp_path, shared_videos):
    (tmp_path / "list").write_text(
        f"{shared_videos}/hostile/bomb8k.mp4 0\n{videos}/seventy.mp4 0\n"
        f"{shared_videos}/hostile/decord_hang_edit_list.mp4 0\n{shared_videos}/broken/audio_only.mp4 0\n"
    )
    assert doctor(tmp_path / "list", "data.decoder=decord", "data.decode_seconds=20") == 1
    assert {Path(row["path"]).name: row["good"] for row in rows(tmp_path).values()} == {
        "bomb8k.mp4": False,
        "seventy.mp4": True,
        "decord_hang_edit_list.mp4": True,
        "audio_only.mp4": False,
    }
    named = {Path(row["path"]).name: row["findings"] for row in rows(tmp_path).values()}
    assert named["decord_hang_edit_list.mp4"] == ["short", "edit_list", "other_count"]
    assert named["audio_only.mp4"] == ["no_pictures"]
    assert doctor(tmp_path / "list", "data.decode_seconds=0.0001") == 1
    assert clean_or_nothing(tmp_path) == []


def clean_or_nothing(folder: Path) -> list[str]:
    return (folder / "out" / "clean.txt").read_text().splitlines()


def test_known_wrong_kinds_and_slow_seeks_come_with_the_command_that_cures_them(
    doctor, tmp_path, shared_videos, capsys
):
    real = shared_videos / "real"
    (tmp_path / "list").write_text(
        "".join(
            f"{real}/{name}\n"
            for name in (
                "TrumanShow_wave_f_nm_np1_fr_med_26.avi",
                "editlist.mp4",
                "h265_video.mp4",
                "R6llTwEh07w.mp4",
                "vfr.mp4",
                "video_90.mov",
            )
        )
    )
    assert doctor(tmp_path / "list", "data.decoder=decord", "data.stride=1") == 0
    assert [set(row["findings"]) - {"short"} for row in rows(tmp_path).values()] == [
        {"packed_b_frames", "other_count"},
        {"edit_list", "slow_seek", "variable_rate", "other_count"},
        {"hevc"},
        {"slow_seek"},
        {"slow_seek", "variable_rate"},
        set(),
    ]
    assert [row["decoder"] for row in rows(tmp_path).values()][-3:] == ["decord"] * 3
    assert "decord" not in [row["decoder"] for row in rows(tmp_path).values()][:3]
    assert all("wrongly" in row["fallback"] for row in list(rows(tmp_path).values())[:3])
    assert (rows(tmp_path)[6]["height"], rows(tmp_path)[6]["width"]) == (568, 320)
    assert f"video-mae pack {tmp_path}/out/clean.txt" in capsys.readouterr().out


def test_pictures_and_arrays_are_checked_as_well(doctor, tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    np.save(tmp_path / "c.npy", np.zeros((5, 8, 9, 3), np.uint8))
    (tmp_path / "list").write_text("a.png\nb.png\nc.npy\n")
    assert doctor(tmp_path / "list", "check=full") == 1
    assert [
        (row["good"], row["num_frames"], row["height"], row["width"])
        for row in rows(tmp_path).values()
    ] == [(True, 1, 20, 30), (False, 0, 0, 0), (True, 5, 8, 9)]


def test_a_packed_folder_is_checked_and_has_no_list(videos, doctor, tmp_path):
    (tmp_path / "list").write_text(f"{videos}/seventy.mp4 0\n{videos}/wide.mkv 1\n")
    with pytest.raises(SystemExit) as left:
        main(["pack", str(tmp_path / "list"), str(tmp_path / "packed"), "num_workers=1"])
    assert left.value.code == 0
    assert (tmp_path / "packed" / MANIFEST).exists()
    assert doctor(tmp_path / "packed") == 0
    assert [(row["num_frames"], row["label"]) for row in rows(tmp_path).values()] == [
        (70, 0),
        (100, 1),
    ]
    assert not (tmp_path / "out" / "clean.txt").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{}/absent"], "no such list"),
        (["{}/empty"], "is empty"),
        (["{}/list", "data.source=x"], "data.source"),
        (["{}/list", "num_workers=0"], "num_workers"),
        (["{}/list", "check=slow"], "check"),
        (["{}/list", "data.decode_seconds=0"], "decode_seconds"),
    ],
)
def test_a_mistake_in_the_command_has_status_2_and_one_line(tmp_path, capsys, words, message):
    (tmp_path / "empty").touch()
    (tmp_path / "list").write_text("a.mp4\n")
    with pytest.raises(SystemExit) as left:
        main(["doctor", *(word.format(tmp_path) for word in words)])
    said = capsys.readouterr().err
    assert (left.value.code, said.count("\n")) == (2, 1)
    assert message in said


def test_help_tells_what_the_status_means(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    assert "exit status 0: all is good, 1: something is bad" in " ".join(
        capsys.readouterr().out.split()
    )
