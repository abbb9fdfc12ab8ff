"""Folders of classes, and files in the place of a list: all that is a video is read, by every
stage; what is left out is told.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from video_mae.config import DataConfig, FinetuneConfig, PretrainConfig
from video_mae.config.data import SourceConfig
from video_mae.data import read_annotations, read_sources
from video_mae.data.videos import read_labeled, read_training_videos
from video_mae.decoding import READERS, VIDEO_EXTENSIONS, Reading, decode
from video_mae.tools.doctor import DoctorConfig
from video_mae.tools.doctor import start as doctor
from video_mae.tools.pack import PackConfig
from video_mae.tools.pack import start as pack
from video_mae.training.pretrain import prepare

# What PyAV writes: the ending, FFmpeg's name of the container, the codec.
WRITTEN = [
    ("flv", "flv", "flv"),
    ("wmv", "asf", "msmpeg4"),
    ("asf", "asf", "wmv2"),
    ("mpeg", "mpeg", "mpeg1video"),
    ("mpe", "mpeg", "mpeg2video"),
    ("vob", "vob", "mpeg2video"),
    ("m2v", "mpeg2video", "mpeg2video"),
    ("3gp", "3gp", "libx264"),
    ("3g2", "3g2", "libx264"),
    ("f4v", "f4v", "libx264"),
    ("m2ts", "mpegts", "libx264"),
    ("divx", "avi", "mpeg4"),
    ("ogv", "ogg", "libvpx"),
    ("gif", "gif", "gif"),
    ("qt", "mov", "mjpeg"),
    ("mk3d", "matroska", "libvpx"),
]


def touch(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return str(folder)


def names(source: str) -> list[str]:
    return [Path(path).name for path, _ in read_annotations(SourceConfig(source=source))]


def notes(source: str) -> list[str]:
    return [
        note.removeprefix(f"{source}: ")
        for note in read_annotations(SourceConfig(source=source)).notes
    ]


def write(path: Path, container: str, codec: str) -> Path:
    """6 frames of 64 x 48 pixels; what is called .m2ts as it is written would get packets of 192
    bytes.
    """
    unnamed = path.with_name("unnamed")
    with av.open(str(unnamed), "w", format=container) as file:
        stream: Any = file.add_stream(codec, rate=25)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        for number in range(6):
            frame_HWC = np.full((48, 64, 3), 40 * number, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        file.mux(stream.encode())
    return unnamed.rename(path)


@pytest.mark.parametrize(("ending", "container", "codec"), WRITTEN)
def test_what_decodes_when_it_is_listed_is_found_in_a_folder(
    tmp_path: Path, ending: str, container: str, codec: str
) -> None:
    (tmp_path / "swim").mkdir()
    try:
        video = write(tmp_path / "swim" / f"a.{ending.upper()}", container, codec)
    except av.FFmpegError:
        pytest.skip(f"PyAV's libraries write no {codec} in {container}")
    ((path, info),) = read_annotations(SourceConfig(source=str(tmp_path)))
    assert (path, info) == (str(video), {"label": 0})
    clip_THWC = decode(path, np.arange, Reading())
    assert clip_THWC.shape[1:] == (48, 64, 3)
    assert len(clip_THWC) >= 5  # FFmpeg's own readers miss the last frame of some


def test_every_ending_of_a_video_is_found_beside_every_other(tmp_path: Path) -> None:
    source = touch(tmp_path, *(f"swim/a{ending}" for ending in VIDEO_EXTENSIONS))
    assert set(names(source)) == {f"a{ending}" for ending in VIDEO_EXTENSIONS}
    assert notes(source) == []
    assert not set(VIDEO_EXTENSIONS) & set(READERS)


def test_what_is_left_out_is_counted_and_an_empty_class_named(tmp_path: Path) -> None:
    source = touch(
        tmp_path,
        "jump/a.mp4",
        "jump/a.jpg",
        "jump/b.JPG",
        "run/a.swf",
        "swim/deep/a.wmv",
        "swim/README",
        "walk/.keep",
        "swim/.trash/old.wmv",
        "walk/._a.mp4",
        "predicted.parts/extract.json",
        "predicted.parts/a.npz",
        "a.txt",
    )
    assert names(source) == ["a.mp4", "a.wmv"]
    assert notes(source) == [
        "files that are left out by their endings: 2 .jpg, 1 .swf, 1 without an ending, 1 .txt",
        "2 of 4 classes have no videos, and keep their labels: run, walk",
    ]
    many = touch(
        tmp_path / "many", "b/a.mp4", *(f"{letter}/a.{letter * 3}" for letter in "acdefghijkl")
    )
    assert notes(many)[0].endswith(
        "1 .aaa, 1 .ccc, 1 .ddd, 1 .eee, 1 .fff, 1 .ggg, 1 .hhh, 1 .iii, and 3 more"
    )
    assert (
        notes(many)[1]
        == "11 of 12 classes have no videos, and keep their labels: a, c, d, e, f, g, h, i, "
        "and 3 more"
    )


def test_a_folder_of_which_nothing_is_read_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no videos in its folders, put files .*; there are 2 \.swf, 1 \.txt$"
    ):
        names(touch(tmp_path, "jump/a.swf", "run/a.swf", "run/a.txt"))


def test_an_animation_is_a_video_but_among_pictures(tmp_path: Path) -> None:
    assert names(touch(tmp_path / "1", "a.gif", "b.gif")) == ["a.gif", "b.gif"]
    assert names(touch(tmp_path / "2", "a.gif", "b.mp4", "c.png")) == ["a.gif", "b.mp4"]
    pictures = touch(tmp_path / "3", "a.gif", "b.jpg", "c.png")
    assert names(pictures) == ["b.jpg", "c.png"]
    assert notes(pictures) == ["files that are left out by their endings: 1 .gif"]


def test_every_stage_takes_the_same_files_of_a_folder_and_tells_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_finetune: Callable[..., FinetuneConfig]
) -> None:
    (tmp_path / "data" / "swim").mkdir(parents=True)
    video = str(write(tmp_path / "data" / "swim" / "a.flv", "flv", "flv"))
    source = touch(tmp_path / "data", "run/a.swf")
    left = "files that are left out by their endings: 1 .swf"
    empty = "1 of 2 classes have no videos, and keep their labels: run"
    assert list(read_labeled("LIST", source).paths) == [video]
    videos = read_annotations(SourceConfig(source=source))
    assert tuple(videos.paths) == (video,)
    assert [left in (told := "; ".join(videos.notes)), empty in told] == [True, True]
    assert doctor(source, DoctorConfig(output=str(tmp_path / "doctor")))() == 0
    assert capsys.readouterr().out.startswith(
        f"{source}: 1 files, 1 good, 0 bad (quick check, decoder pyav)\n  {source}: {left}\n"
    )
    assert f"{left}" in (tmp_path / "doctor" / "summary.json").read_text()
    assert pack(source, str(tmp_path / "packed"), PackConfig(num_workers=1)) == 0
    assert f"{source}: {left}\n" in capsys.readouterr().out
    assert read_sources(DataConfig(source=source), 3)[0] == (video, {"label": 1})
    videos, classifier = read_training_videos(
        tiny_finetune(f"data.source={source}", "classifier.num_classes=2")
    )
    assert (videos[0], len(videos.notes), classifier.class_names) == (
        (video, {"label": 1}),
        2,
        ("run", "swim"),
    )


@pytest.mark.parametrize("name", ["a.flv", "A.WMV", "a.gif"])
def test_a_video_in_the_place_of_a_list_is_that_video(
    name: str,
    tmp_path: Path,
    tiny: Callable[..., PretrainConfig],
    capsys: pytest.CaptureFixture[str],
) -> None:
    container, codec = {
        "a.flv": ("flv", "flv"),
        "A.WMV": ("asf", "msmpeg4"),
        "a.gif": ("gif", "gif"),
    }[name]
    video = str(write(tmp_path / name, container, codec))
    assert tuple(read_annotations(SourceConfig(source=video)).paths) == (video,)
    assert doctor(video, DoctorConfig(output=str(tmp_path / "doctor")))() == 0
    assert "1 files, 1 good" in capsys.readouterr().out
    assert pack(video, str(tmp_path / "packed"), PackConfig(num_workers=1)) == 0
    assert "1 videos" in capsys.readouterr().out
    plan = prepare(tiny(f"data.source={video}"))
    assert list(plan.videos.by_key["data.source"]) == [(video, {"label": -1})]  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"has no label in .*, write lines `PATH LABEL`"):
        read_labeled("LIST", video)


def test_a_text_that_is_called_a_video_is_not_read_as_a_list(tmp_path: Path) -> None:
    (tmp_path / "list.mpg").write_text("a.mp4 0\n")
    assert names(str(tmp_path / "list.mpg")) == ["list.mpg"]
    shutil.copy(tmp_path / "list.mpg", tmp_path / "list.data")
    (tmp_path / "a.mp4").touch()
    assert names(str(tmp_path / "list.data")) == ["a.mp4"]
