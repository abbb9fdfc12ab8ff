"""Which videos: list files and folders of classes, and what is said about wrong ones."""

import os
import pickle
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from video_mae.config import DataConfig
from video_mae.data import paths, read_annotations, videos
from video_mae.data.lists import format_line, read_list, split_line


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
    config = write_list(
        tmp_path / "list.txt",
        f"{folder}/clip of 1.mp4 3",
        "",
        f"{folder}/clip of 2.mp4",
        f"{folder}/clip of 9.mp4\t-2\r",
    )
    paths = read_annotations(config)
    assert [paths[i] for i in range(len(paths))] == [
        (f"{folder}/clip of 1.mp4", {"label": 3}),
        (f"{folder}/clip of 2.mp4", {"label": -1}),
        (f"{folder}/clip of 9.mp4", {"label": -2}),
    ]
    assert read_annotations(config).class_names == ()


def test_relative_paths_start_at_the_root_or_else_at_the_list(folder, tmp_path):
    assert read_annotations(write_list(folder / "near.txt", "clip of 1.mp4 0"))[0][0] == str(
        folder / "clip of 1.mp4"
    )
    (tmp_path / "far.txt").write_text("clip of 1.mp4 0")
    assert read_annotations(DataConfig(source=str(tmp_path / "far.txt"), root=str(folder)))[0][
        0
    ] == str(folder / "clip of 1.mp4")
    with pytest.raises(FileNotFoundError, match=r"data\.root"):
        read_annotations(DataConfig(source=str(tmp_path / "far.txt"), root=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("line", "path", "label"),
    [
        ("a b.mp4\t3", "a b.mp4", 3),
        ("a.mp4,3", "a.mp4", 3),
        ("a.mp4, 3", "a.mp4", 3),
        ("a,b.mp4 , 3", "a,b.mp4", 3),
        ("a.mp4", "a.mp4", -1),
        ("a,b.mp4", "a,b.mp4", -1),
        ("a 1,2", "a 1", 2),
        ('"a b 7" 3', "a b 7", 3),
        ('"a b 7"', "a b 7", -1),
        ('"a ""b"".mp4",3', 'a "b".mp4', 3),
        ('"a b.mp4"\t+3', "a b.mp4", 3),
        ('"a" and "b" 3', '"a" and "b"', 3),
        ("3", "3", -1),
        (",3", ",3", -1),
        ("a.mp4 -1", "a.mp4", -1),
        ("#1.mp4 0", "#1.mp4", 0),
        ("a 9999999999999999999", "a 9999999999999999999", -1),
        ("a.mp4 \u0663", "a.mp4 \u0663", -1),
    ],
)
def test_a_line_is_a_path_and_a_label_in_each_way_that_lists_have(line, path, label):
    assert split_line(line) == (path, label)


@pytest.mark.parametrize(
    "path",
    [
        "a.mp4",
        "a b",
        "a 7",
        "a,7",
        '"a"',
        '"a',
        'a"b',
        " a",
        "a\t",
        "7",
        "a,",
        "#a",
        "\u00e9",
        '"a" 3',
    ],
)
def test_a_line_that_is_written_is_read_back(path, tmp_path):
    for label in (-1, 0, 12):
        (tmp_path / "list").write_text(format_line(path, label) + "\n", encoding="utf-8")
        assert [
            (line.path, line.label, line.mistake) for line in read_list(tmp_path / "list")[0]
        ] == [(path, label, "")]


@pytest.mark.parametrize(
    ("encoding", "end"),
    [
        ("utf-8", "\n"),
        ("utf-8", "\r\n"),
        ("utf-8", "\r"),
        ("utf-8-sig", "\n"),
        ("utf-16", "\r\n"),
        ("utf-16", "\n"),
    ],
)
def test_a_list_is_read_whatever_system_saved_it(folder, encoding, end):
    (folder / "b\u00e4r.mp4").touch()
    (folder / "list").write_bytes(
        end.join(["b\u00e4r.mp4 1", "", "clip of 1.mp4 0", ""]).encode(encoding)
    )
    videos: Any = read_annotations(DataConfig(source=str(folder / "list")))
    assert [(Path(path).name, info["label"]) for path, info in videos] == [
        ("b\u00e4r.mp4", 1),
        ("clip of 1.mp4", 0),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("clip of 1.mp4 0\n".encode("utf-16-le"), "list:1: .*NUL byte"),
        ("clip of 1.mp4 0\n".encode("utf-16")[:-1], "list:1: .*UTF-16"),
        (bytes(2**21), "list:1: .*longer"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2\n", "list:1: .*NUL byte"),
        (b"\x89PNG\r\n\x1a\n", "list:1: .*UTF-8"),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_annotations(DataConfig(source=str(tmp_path / "list")))
    assert "\n" not in str(caught.value)


def test_links_lead_anywhere_and_a_video_may_be_named_twice(folder, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked.mp4").symlink_to(folder / "clip of 1.mp4")
    (root / "folder").symlink_to(folder)
    videos = read_annotations(
        write_list(
            root / "list",
            "linked.mp4 0",
            "folder/../the videos/clip of 1.mp4 1",
            "folder/clip of 2.mp4 2",
            "linked.mp4 1",
        )
    )
    assert [
        Path(videos[i][0]).samefile(folder / f"clip of {n}.mp4") for i, n in enumerate((1, 1, 2, 1))
    ] == [True] * 4
    assert len(read_annotations(DataConfig(source=str(root / "folder")))) == 3


def test_a_relative_path_leads_out_of_the_folder_of_its_list_only_where_the_root_is_given(
    folder, tmp_path
):
    root = tmp_path / "root"
    root.mkdir()
    climbing = ("../the videos/clip of 1.mp4", "x/../../the videos/clip of 1.mp4")
    for line, written in enumerate((*climbing, f'"{climbing[0]}" 3'), 2):
        path = write_list(root / "list", *[f"{folder / 'clip of 2.mp4'}"] * (line - 1), written)
        with pytest.raises(ValueError, match=rf"list:{line}: .* leads out of the folder") as error:
            read_annotations(path)
        assert "data.root" in str(error.value)
    (root / "..notes.mp4").symlink_to(folder / "clip of 1.mp4")
    assert len(read_annotations(write_list(root / "list", "..notes.mp4", "./..notes.mp4"))) == 2
    allowed = replace(write_list(root / "list", climbing[0]), root=str(root))
    assert Path(read_annotations(allowed)[0][0]).samefile(folder / "clip of 1.mp4")


def test_what_is_no_file_in_a_folder_is_refused_and_not_opened(tmp_path):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "a.mp4").touch()
    (tmp_path / "class" / "round").symlink_to(tmp_path)  # not walked into
    assert len(read_annotations(DataConfig(source=str(tmp_path)))) == 1
    os.mkfifo(tmp_path / "class" / "b.mp4")
    with pytest.raises(ValueError, match=r"b\.mp4 is not a regular file"):
        read_annotations(DataConfig(source=str(tmp_path)))


@pytest.mark.parametrize("seconds", [0.0, 0.002])
def test_the_first_bad_file_is_named_also_where_threads_hide_the_latency_of_a_disk(
    folder, monkeypatch, seconds
):
    names = [f"clip of {1 if i not in (301, 302, 490) else 7}.mp4 0" for i in range(500)]
    config = write_list(folder / "list", *names)
    seen: set[str] = set()

    def slow(path: str) -> bool:
        time.sleep(seconds)
        seen.add(threading.current_thread().name)
        return "of 7" not in path

    monkeypatch.setattr(paths, "LISTED", 501)  # their folder is not listed
    monkeypatch.setattr(paths, "STAT_CHUNK", 50)
    monkeypatch.setattr(paths, "is_regular", slow)
    monkeypatch.setattr(videos, "file_mistake", lambda path, label: (ValueError, path))
    with pytest.raises(ValueError, match=r"list:302: .*clip of 7"):
        read_annotations(config)
    assert len(seen) > 1 or seconds == 0


def test_videos_are_a_sequence_and_survive_pickling(folder):
    videos: Any = read_annotations(
        write_list(folder / "list", "clip of 1.mp4 1", "clip of 2.mp4", "clip of 9.mp4 -5")
    )
    expected = [
        (str(folder / f"clip of {n}.mp4"), {"label": label})
        for n, label in ((1, 1), (2, -1), (9, -5))
    ]
    copy = pickle.loads(pickle.dumps(videos))
    assert list(videos) == list(copy) == expected
    assert videos[-1] == expected[2]
    with pytest.raises(IndexError):
        videos[3]


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("absent.mp4 3", FileNotFoundError, "no such file: .*absent.mp4"),
        ("clip of 1.mp4 dog", ValueError, "the label `dog` is not an integer"),
        ("clip of 1.mp4 1.5", ValueError, "the label `1.5` is not an integer"),
        ("a folder 1", ValueError, "is a folder"),
        ("pipe 1", ValueError, "not a regular file"),
        (
            "https://example.org/a.mp4 1",
            ValueError,
            "bad.txt:3: https://example.org/a.mp4 is no local file",
        ),
        (
            "concat:clip of 1.mp4|clip of 2.mp4 1",
            ValueError,
            r"bad.txt:3: concat:clip of 1.mp4\|clip of 2.mp4 is no local file",
        ),
        ("pipe:0", ValueError, "bad.txt:3: pipe:0 is no local file"),
        ("nul\0.mp4 1", ValueError, "NUL byte"),
        ("/dev/zero 1", ValueError, "not a regular file"),
        ("/proc/self/maps 1", ValueError, "not a regular file"),
        ("/proc/kmsg 1", ValueError, "not a regular file"),
        ("socket 1", ValueError, "not a regular file"),
        ("circle 1", FileNotFoundError, "circle is a link that leads to no file"),
        ("dangling 1", FileNotFoundError, "dangling is a link that leads to no file"),
        ("to pipe 1", ValueError, "not a regular file"),
        ("# a comment", FileNotFoundError, "no such file: .*# a comment"),
        ('"clip of 1.mp4', FileNotFoundError, "no such file"),
        ("x" * 5000, FileNotFoundError, r"no such file: .*xxx\.\.\."),
        ("x" * 70000, ValueError, "longer than 65536 characters"),
        ("\x1b[2Jabsent", FileNotFoundError, r"no such file: .*\?\[2Jabsent"),
    ],
)
def test_a_bad_line_is_named_with_its_number(folder, line, error, message, monkeypatch):
    (folder / "a folder").mkdir()
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(folder)  # names of sockets are short
        listener.bind("socket")
    for name, target in (("circle", "circle"), ("dangling", "absent.mp4"), ("to pipe", "pipe")):
        (folder / name).symlink_to(target)
    with pytest.raises(error, match=message) as caught:
        read_annotations(
            write_list(folder / "bad.txt", "clip of 1.mp4 0", "", line, "also absent.mp4 1")
        )
    assert str(caught.value).startswith(f"{folder}/bad.txt:3: ")
    assert len(str(caught.value)) < 800
    assert "\n" not in str(caught.value)


def test_a_source_that_is_no_list_is_refused_in_one_line(folder, tmp_path):
    for content, message in (
        (b"", "empty"),
        (b" \n\n", "empty"),
        ("clip.mp4 0\nb\xe4r.mp4 1".encode("latin-1"), r"list:2: .*UTF-8"),
    ):
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
        (str(tmp_path / name), {"label": label})
        for name, label in (("ant/c.avi", 0), ("zebra/a.MP4", 1), ("zebra/deep/b.mkv", 1))
    ]
    assert read_annotations(config).class_names == ("ant", "zebra")
    (tmp_path / "stray.mp4").write_bytes(b"x")
    paths = read_annotations(config)
    assert paths[3] == (str(tmp_path / "stray.mp4"), {"label": -1})
    assert "what is in no class folder has no label" in paths.notes[-1]
    with pytest.raises(ValueError, match=r"stray.mp4 has no label in .* a class folder"):
        videos.read_labeled("data.source", str(tmp_path))


def test_a_folder_without_videos_is_refused(tmp_path):
    (tmp_path / "class").mkdir()
    with pytest.raises(ValueError, match="no videos"):
        read_annotations(DataConfig(source=str(tmp_path)))
