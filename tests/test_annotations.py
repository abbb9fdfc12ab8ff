"""Which videos: list files and folders of classes, and what is said about wrong ones."""

import os
from pathlib import Path

import pytest

from video_mae.config import DataConfig
from video_mae.data import class_names, read_annotations


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files that only have to exist: annotations do not open them."""
    root = tmp_path / "the videos"
    root.mkdir()
    for number in (1, 2, 9):
        (root / f"clip of {number}.mp4").write_bytes(b"x")
    return root


def write_list(path: Path, *lines: str) -> DataConfig:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return DataConfig(source=str(path))


def test_a_list_has_paths_with_spaces_optional_labels_and_blank_lines(folder, tmp_path):
    config = write_list(tmp_path / "list.txt", f"{folder}/clip of 1.mp4 3", "", f"{folder}/clip of 2.mp4", f"{folder}/clip of 9.mp4\t-2\r")
    paths = read_annotations(config)
    assert [paths[i] for i in range(len(paths))] == [
        (f"{folder}/clip of 1.mp4", {"label": 3}), (f"{folder}/clip of 2.mp4", {"label": -1}), (f"{folder}/clip of 9.mp4", {"label": -2})]
    assert class_names(config) == ()


def test_relative_paths_start_at_the_root_or_else_at_the_list(folder, tmp_path):
    assert read_annotations(write_list(folder / "near.txt", "clip of 1.mp4 0"))[0][0] == str(folder / "clip of 1.mp4")
    (tmp_path / "far.txt").write_text("clip of 1.mp4 0")
    assert read_annotations(DataConfig(source=str(tmp_path / "far.txt"), root=str(folder)))[0][0] == str(folder / "clip of 1.mp4")
    with pytest.raises(FileNotFoundError, match=r"data\.root"):
        read_annotations(DataConfig(source=str(tmp_path / "far.txt"), root=str(tmp_path / "none")))


@pytest.mark.parametrize(("line", "error", "message"), [
    ("absent.mp4 3", FileNotFoundError, "no such file: .*absent.mp4"),
    ("clip of 1.mp4 dog", ValueError, "the label `dog` is not an integer"),
    ("clip of 1.mp4 1.5", ValueError, "the label `1.5` is not an integer"),
    ("a folder 1", ValueError, "is a folder"),
    ("pipe 1", ValueError, "not a regular file"),
    ("https://example.org/a.mp4 1", FileNotFoundError, "no such file"),
    ("nul\0.mp4 1", FileNotFoundError, "no such file"),
])
def test_a_bad_line_is_named_with_its_number(folder, line, error, message):
    (folder / "a folder").mkdir()
    os.mkfifo(folder / "pipe")
    with pytest.raises(error, match=message) as caught:
        read_annotations(write_list(folder / "bad.txt", "clip of 1.mp4 0", "", line, "also absent.mp4 1"))
    assert str(caught.value).startswith(f"{folder}/bad.txt:3: ")
    assert "\n" not in str(caught.value)


def test_a_source_that_is_no_list_is_refused_in_one_line(folder, tmp_path):
    for content, message in ((b"", "empty"), (b" \n\n", "empty"), ("clip.mp4 0\nb\xe4r.mp4 1".encode("latin-1"), r"list:2: .*UTF-8")):
        (tmp_path / "list").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_annotations(DataConfig(source=str(tmp_path / "list"), root=str(folder)))
    with pytest.raises(ValueError, match=r"data\.source: \(empty\)"):
        read_annotations(DataConfig())
    with pytest.raises(FileNotFoundError, match="no such list file or folder"):
        read_annotations(DataConfig(source=str(tmp_path / "absent")))


def test_a_folder_per_class_gives_labels_in_sorted_order(tmp_path):
    for name in ("zebra/deep/b.mkv", "zebra/a.MP4", "ant/c.avi", "ant/notes.txt", ".hidden/d.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    config = DataConfig(source=str(tmp_path))
    paths = read_annotations(config)
    assert [paths[i] for i in range(len(paths))] == [
        (str(tmp_path / name), {"label": label}) for name, label in (("ant/c.avi", 0), ("zebra/a.MP4", 1), ("zebra/deep/b.mkv", 1))]
    assert class_names(config) == ("ant", "zebra")
    (tmp_path / "stray.mp4").write_bytes(b"x")
    with pytest.raises(ValueError, match="in no class folder"):
        read_annotations(config)


def test_a_folder_without_videos_is_refused(tmp_path):
    (tmp_path / "class").mkdir()
    with pytest.raises(ValueError, match="no videos"):
        read_annotations(DataConfig(source=str(tmp_path)))
