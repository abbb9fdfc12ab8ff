"""Lists as other projects write them: read where it is certain what is meant, else refused in a
line that names the column.
"""

import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from video_mae.config import DataConfig
from video_mae.config.data import SourceConfig
from video_mae.data import paths, read_annotations, read_sources
from video_mae.data.videos import VideoList, read_labeled
from video_mae.tools.doctor import DoctorConfig
from video_mae.tools.doctor import start as doctor
from video_mae.tools.pack import read_items

V2 = "as VideoMAE V2 has them: whole videos without labels (data.list_format=start_frames)"
NAMED = "its first line names columns: paths are those of "


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.mp4 and `b c.mp4`, and a folder of frames: nothing opens them."""
    for name in ("a.mp4", "b c.mp4", "frames/img_00001.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def read(folder: Path, lines: Sequence[str], list_format: Any = "auto") -> VideoList:
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return read_annotations(SourceConfig(source=str(folder / "list.csv"), list_format=list_format))


def found(videos: VideoList) -> list[tuple[str, int]]:
    return [(Path(path).name, info["label"]) for path, info in videos]


@pytest.mark.parametrize(
    ("lines", "labels", "note"),
    [
        (["a.mp4 0 -1", "b c.mp4 0 -1"], [-1, -1], V2),
        (["a.mp4,0,-1", "b c.mp4,0,-1"], [-1, -1], V2),
        (['"a.mp4", "0", "-1"', '"b c.mp4"\t0\t-1'], [-1, -1], V2),
        (["path label", "a.mp4 3", "b c.mp4 5"], [3, 5], f"{NAMED}`path`, labels those of `label`"),
        (
            ["Path,Label", "a.mp4,3", '"b c.mp4",5'],
            [3, 5],
            f"{NAMED}`path`, labels those of `label`",
        ),
        (["video_path", "a.mp4", "b c.mp4"], [-1, -1], f"{NAMED}`video_path`, there are no labels"),
        (
            ["", ",clip_name,clip_path,label", "0,one,a.mp4,3", '1,"t,wo","b c.mp4","5"'],
            [3, 5],
            f"{NAMED}`clip_path`, labels those of `label`",
        ),
        (
            ["label\tduration (s)\tfile", "3\t25\ta.mp4", "\t30\tb c.mp4"],
            [3, -1],
            f"{NAMED}`file`, labels those of `label`",
        ),
        (
            ["name;class_id", "a.mp4;3", "b c.mp4;5"],
            [3, 5],
            f"{NAMED}`name`, labels those of `class_id`",
        ),
        (
            ['label "path"', "3   a.mp4", '5 "b c.mp4"'],
            [3, 5],
            f"{NAMED}`path`, labels those of `label`",
        ),
        (['"a.mp4","3"', '"b c.mp4", "5"'], [3, 5], ""),
        (["a.mp4 3", "b c.mp4 5"], [3, 5], ""),
    ],
)
def test_a_first_line_that_leaves_no_doubt_is_followed_and_told(
    folder: Path, lines: list[str], labels: list[int], note: str
) -> None:
    videos = read(folder, lines)
    assert found(videos) == list(zip(("a.mp4", "b c.mp4"), labels, strict=True))
    assert len(videos.notes) == bool(note)
    assert "".join(videos.notes).endswith(note)
    assert all(told.startswith(f"{folder / 'list.csv'}: ") for told in videos.notes)


@pytest.mark.parametrize(
    ("list_format", "lines", "labels"),
    [
        ("start_frames", ["a.mp4 0 -1", '"b c.mp4",0,-1'], [-1, -1]),
        ("frames_label", ["a.mp4 163 1", "b c.mp4,9,7"], [1, 7]),
        ("label", ["a.mp4 1", "b c.mp4 7"], [1, 7]),
    ],
)
def test_a_format_that_is_named_is_followed_and_needs_no_note(
    folder: Path, list_format: str, lines: list[str], labels: list[int]
) -> None:
    videos = read(folder, lines, list_format)
    assert (found(videos), videos.notes) == (
        list(zip(("a.mp4", "b c.mp4"), labels, strict=True)),
        (),
    )


def test_what_looks_like_another_format_but_names_a_file_is_that_file(folder: Path) -> None:
    for name in ("a.mp4 0", "path"):
        (folder / name).touch()
    assert found(read(folder, ["a.mp4 0 -1"])) == [("a.mp4 0", -1)]
    assert found(read(folder, ["path", "a.mp4 3"])) == [("path", -1), ("a.mp4", 3)]


@pytest.mark.parametrize(
    ("line", "message", "list_format"),
    [
        (
            "a.mp4 163 1",
            r"`163 1` stands behind .*/a\.mp4, where one label is expected; set data\.list_format",
            "auto",
        ),
        ("a.mp4,1,3,5", r"`,1,3 5` stands behind .*/a\.mp4, where one label is expected", "auto"),
        ("b c.mp4 swim 3", r"`swim 3` stands behind .*/b c\.mp4", "auto"),
        ('"b c.mp4",swim,3', r"`swim 3` stands behind .*/b c\.mp4", "auto"),
        ('"b c.mp4","swim"', 'the label `"swim"` is not an integer', "auto"),
        ("a.mp4;3", r"`;3` stands behind .*/a\.mp4", "auto"),
        ("a.mp4 0 -1", r"`0 -1` stands behind .*/a\.mp4", "label"),
        (
            "frames 1 58",
            r"`1 58` stands behind the folder .*/frames; folders of frames are not read, make "
            r"a video of each",
            "auto",
        ),
        ("frames 163 1", "frames is a folder, name a video file", "frames_label"),
        (
            "frames 9601 300",
            "names frames `9601 300` of frames, and not all of a video, `0 -1`; folders of frames",
            "start_frames",
        ),
        (
            "a.mp4 3",
            r"no two numbers behind its path; data\.list_format=start_frames reads lines `PATH "
            r"0 -1`",
            "start_frames",
        ),
        (
            "a.mp4 3",
            r"no two numbers behind its path; data\.list_format=frames_label reads lines `PATH "
            r"FRAMES LABEL`",
            "frames_label",
        ),
        ("gone.mp4 163 1", r"no such file: .*gone\.mp4 163", "auto"),
    ],
)
def test_a_column_too_many_or_too_few_is_named_with_its_line(
    folder: Path, line: str, message: str, list_format: str
) -> None:
    good = {"start_frames": "a.mp4 0 -1", "frames_label": "a.mp4 9 1"}.get(list_format, "a.mp4 1")
    with pytest.raises(
        (ValueError, FileNotFoundError), match=rf"list\.csv:3: .*{message}"
    ) as error:
        read(folder, [good, "", line], list_format)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["path,label,split", "a.mp4,3"], r"list\.csv:2: has 2 columns, the first line names 3"),
        (
            ["label,path", "swim,a.mp4"],
            r"list\.csv:2: the label `swim` is not an integer, number the classes from 0",
        ),
        (["label,path", "3,"], r"list\.csv:2: has no `path`, remove the line"),
    ],
)
def test_a_line_that_does_not_fit_its_header_is_named(
    folder: Path, lines: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(folder, lines)


@pytest.mark.parametrize(
    ("first", "list_format"),
    [("label,youtube_id,time_start,split", "auto"), ("class", "auto"), ("a,b", "header")],
)
def test_a_header_without_a_column_of_paths_is_named(
    folder: Path, first: str, list_format: str
) -> None:
    with pytest.raises(ValueError, match=r"list\.csv:1: names no column of paths; call it `path`"):
        read(folder, [first, "swim,---QUuC4vJs,0,validate"], list_format)


def test_every_stage_reads_the_same_formats_and_tells_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "v2.txt").write_text("a.mp4 0 -1\n")
    (folder / "frames.txt").write_text("a.mp4 9 4\n")
    v2, frames, video = str(folder / "v2.txt"), str(folder / "frames.txt"), str(folder / "a.mp4")
    assert read_items(v2, "")[0][0][:3] == (video, "a.mp4", -1)
    assert V2 in capsys.readouterr().out
    videos = read_annotations(SourceConfig(source=v2))
    assert tuple(videos.paths) == (video,)
    assert V2 in videos.notes[0]
    assert doctor(v2, DoctorConfig(output=str(folder / "doctor")))() == 1  # the file is empty
    assert f"v2.txt: lines are `PATH 0 -1`, {V2}" in capsys.readouterr().out
    assert V2 in read_sources(DataConfig(source=v2), 3).by_key["data.source"].notes[0]
    assert read_items(frames, "", "frames_label")[0][0][:3] == (video, "a.mp4", 4)
    data = SourceConfig(source=frames, list_format="frames_label")
    assert tuple(read_annotations(data).paths) == (video,)
    assert read_labeled("LIST", frames, list_format="frames_label").label_M.tolist() == [4]


def test_a_long_list_takes_little_time_and_memory_and_a_call_for_many_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in range(500):
        (tmp_path / f"some_long_name_of_a_video_{name:06d}.mp4").touch()
    names = [
        f"some_long_name_of_a_video_{name % 500:06d}.mp4 {name % 400}\n" for name in range(50_000)
    ]
    (tmp_path / "list").write_text("".join(names))
    asked: list[str] = []
    ask = paths.is_regular
    monkeypatch.setattr(paths, "is_regular", lambda path: asked.append(path) or ask(path))
    read_labeled("LIST", str(tmp_path / "list"), num_classes=400)  # what is loaded once
    begin = time.process_time()
    read_labeled("LIST", str(tmp_path / "list"), num_classes=400)
    # a twentieth of a million, four times as long as that may take; 0.2 on an idle core
    assert time.process_time() - begin < 2
    assert len(asked) < 10  # it was one for each line
    tracemalloc.start()
    videos = read_labeled("LIST", str(tmp_path / "list"), num_classes=400)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    length = len(videos.paths[0])
    # the bytes of a path, where it ends, its label; it was 250 more
    assert held < len(videos) * (length * 1.2 + 20)
    assert most < len(videos) * (length * 1.2 + 90)
    assert videos[49_999] == (
        str(tmp_path / "some_long_name_of_a_video_000499.mp4"),
        {"label": 399},
    )
