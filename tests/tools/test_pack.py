"""Packing: the frames of the source in their order, whatever the source is; the same bytes however
often it was killed.
"""

import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from video_mae.cli import main
from video_mae.config.data import SourceConfig
from video_mae.config.pack import PackConfig
from video_mae.config.schema import parse
from video_mae.data import read_annotations
from video_mae.decoding import Member, Reading, decode, decoders, read_clip, times_and_start
from video_mae.decoding.media import local_file
from video_mae.decoding.pyav_video import pixels, sequential
from video_mae.processes import hold_folder
from video_mae.tools import pack

REAL = (
    "R6llTwEh07w.mp4",
    "TrumanShow_wave_f_nm_np1_fr_med_26.avi",
    "SchoolRulesHowTheyHelpUs_wave_f_nm_np1_ba_med_0.avi",
    "RATRACE_wave_f_nm_np1_fr_goo_37.avi",
    "hmdb51_Turnk_r_Pippi_Michel_cartwheel_f_cm_np2_le_med_6.avi",
    "editlist.mp4",
    "video_90.mov",
    "video_180.mov",
    "video_270.mov",
    "h264_10bits.mp4",
    "h265_video.mp4",
    "odd.mp4",
    "vfr.mp4",
    "one.mp4",
    "two.mp4",
    "vp9.webm",
    "flipping_a_pancake.mkv",
)


def moving(num_frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth frames_THWC of which no two are alike."""
    rng = np.random.default_rng(seed)
    phase, (y, x) = rng.random(3) * 6, np.mgrid[:height, :width]
    frames = [
        [
            np.sin(x / (9 + 4 * c) + phase[c] + t / 3) * np.cos(y / (11 - 2 * c) - t / 4)
            for c in range(3)
        ]
        for t in range(num_frames)
    ]
    return (np.array(frames).transpose(0, 2, 3, 1) * 100 + 128).astype(np.uint8)


def render(
    path: Path,
    frames_THWC: np.ndarray,
    pix_fmt: str = "yuv420p",
    stamps: Sequence[int] | None = None,
    **options: str,
) -> Path:
    """An H.264 file with B-frames; stamps in hundredths of seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=25, options={"crf": "12", "bf": "2", "g": "250", **options}
        )
        stream.height, stream.width, stream.pix_fmt = *frames_THWC.shape[1:3], pix_fmt
        stream.codec_context.time_base = Fraction(1, 100)
        for number, frame_HWC in enumerate(frames_THWC):
            frame = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
            frame.pts, frame.time_base = stamps[number] if stamps else 4 * number, Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def patch(path: Path, box: bytes, at: int, data: bytes) -> Path:
    """Overwrites bytes of a box of an MP4 file, counted from the end of its name."""
    content = bytearray(path.read_bytes())
    place = content.index(box) + len(box) + at
    content[place : place + len(data)] = data
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def odd_videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("odd")
    quarter_turn = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    return {
        "constant": render(folder / "constant.mp4", moving(40, 90, 122)),
        "variable": render(
            folder / "variable.mp4",
            moving(30, 64, 80),
            stamps=[n * n // 4 + 3 * n for n in range(30)],
        ),
        "late": render(
            folder / "late.mkv", moving(20, 64, 80), stamps=[500 + 4 * n for n in range(20)]
        ),
        "ten_bits": render(folder / "ten.mp4", moving(20, 64, 80), "yuv420p10le"),
        "odd": render(folder / "odd.mp4", moving(20, 65, 79), "yuv444p"),
        "turned": patch(
            render(folder / "turned.mp4", moving(20, 64, 80)), b"tkhd", 40, quarter_turn
        ),
        "edited": patch(
            render(folder / "edited.mp4", moving(40, 64, 80)), b"elst", 8, struct.pack(">I", 600)
        ),
        "single": render(folder / "single.mp4", moving(1, 64, 80)),
    }


def write_list(
    folder: Path, videos: Sequence[Path | str], labels: Sequence[int] | None = None
) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{video} {labels[number] if labels else number % 3}\n"
        for number, video in enumerate(videos)
    ]
    (folder / "list.txt").write_text("".join(lines))
    return str(folder / "list.txt")


def packed(source: str, folder: Path, **knobs: Any) -> list[tuple[Member, dict[str, int]]]:
    assert pack.start(source, str(folder), PackConfig(**{"num_workers": 2, **knobs})) == 0
    videos = read_annotations(SourceConfig(source=str(folder)))
    return [videos[number] for number in range(len(videos))]  # pyright: ignore[reportReturnType]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def all_frames(place: str | Member, decoder: Any = "pyav") -> np.ndarray:
    return decode(place, np.arange, Reading(decoder=decoder))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-9))


def luma(path: str, size: tuple[int, int]) -> tuple[list[np.ndarray], list[float | None]]:
    """The frames of a file as grey, upright, of a size, and their times: the truth."""
    frames, stamps = [], []
    for frame in sequential(path):
        height, width = size if frame.rotation % 180 == 0 else size[::-1]
        grey = frame.reformat(width=width, height=height, format="yuv420p").to_ndarray()[:height]
        frames.append(np.rot90(grey, frame.rotation // 90))
        stamps.append(frame.time)
    return frames, stamps


def check_packed(source: Path, member: Member, row: dict[str, Any]) -> None:
    wanted, stamps = luma(str(source), (row["height"], row["width"]))
    with local_file(member) as path:
        found, new_stamps = luma(path, (row["height"], row["width"]))
    assert len(found) == len(wanted) == row["num_frames"]
    own = [psnr(a, b) for a, b in zip(wanted, found, strict=True)]
    assert min(own) > 27, own
    # a neighbour is not mistaken for a frame
    if len(wanted) > 1 and psnr(wanted[0], wanted[1]) < 45:
        shifted = [psnr(a, b) for a, b in zip(wanted[1:], found, strict=False)]
        assert np.mean(own) > np.mean(shifted) + 1
    if None not in stamps and all(b > a for a, b in pairwise(stamps)):  # pyright: ignore[reportOperatorIssue]
        assert np.allclose(
            np.array(new_stamps, float), np.array(stamps, float) - stamps[0], atol=1e-5
        )  # pyright: ignore
    assert new_stamps[0] == 0
    assert (hashlib.sha256(source.read_bytes()).hexdigest(), source.stat().st_size) == (
        row["source_sha256"],
        row["source_bytes"],
    )


def test_a_packed_clip_has_the_frames_of_its_source_in_their_order(
    odd_videos: dict[str, Path], tmp_path: Path
) -> None:
    videos = packed(
        write_list(tmp_path, list(odd_videos.values())), tmp_path / "out", short_side=60
    )
    sizes = {}
    for (member, _), row, (name, source) in zip(
        videos, rows_of(tmp_path / "out"), odd_videos.items(), strict=True
    ):
        check_packed(source, member, row)
        sizes[name] = (row["height"], row["width"], row["num_frames"], row["fps"])
    assert sizes["constant"] == (60, 82, 40, 25)  # of 90 x 122
    assert sizes["turned"] == (74, 60, 20, 25)
    assert sizes["odd"][:2] == (60, 72)
    assert sizes["edited"][2] == 15  # 600 ms of 1600
    assert sizes["late"][3] == 25
    assert sizes["variable"][3] == round(29 / ((29 * 29 // 4 + 87) / 100), 4)


def test_none_is_scaled_up_and_odd_sides_become_even(
    odd_videos: dict[str, Path], tmp_path: Path
) -> None:
    packed(write_list(tmp_path, [odd_videos["odd"], odd_videos["constant"]]), tmp_path / "out")
    assert [(row["height"], row["width"]) for row in rows_of(tmp_path / "out")] == [
        (64, 78),
        (90, 122),
    ]


@pytest.mark.parametrize("name", REAL)
def test_a_real_clip_keeps_its_frames(name: str, shared_videos: Path, tmp_path: Path) -> None:
    ((member, _),) = packed(
        write_list(tmp_path, [shared_videos / "real" / name]), tmp_path / "out", num_workers=1
    )
    (row,) = rows_of(tmp_path / "out")
    assert min(row["height"], row["width"]) <= 224
    check_packed(shared_videos / "real" / name, member, row)
    found, wanted = all_frames(member), np.array([0, row["num_frames"] // 2, row["num_frames"] - 1])
    for decoder in decoders.NAMES:
        if not decoders.problem(decoder):
            read = read_clip(member, wanted, Reading(decoder=decoder))  # pyright: ignore[reportArgumentType]
            # nothing about it is known to be read wrongly
            assert (read.decoder, read.fallback) == (decoder, "")
            assert psnr(read.clip_THWC, found[wanted]) > 35


@pytest.mark.parametrize("decoder", decoders.NAMES)
def test_random_access_to_a_packed_clip_equals_reading_it_in_order(
    decoder: Any, odd_videos: dict[str, Path], tmp_path: Path
) -> None:
    if decoders.problem(decoder):
        pytest.skip(decoders.problem(decoder))
    videos = packed(write_list(tmp_path, list(odd_videos.values())), tmp_path / "out", gop=7)
    rng = np.random.default_rng(0)
    for member, _ in videos:
        frames = all_frames(member, decoder)
        assert psnr(frames, all_frames(member, "pyav")) > 40
        for _ in range(4):
            wanted = rng.integers(0, len(frames), 5)
            assert np.array_equal(
                decode(member, wanted, Reading(decoder=decoder)),
                frames[wanted],
            )


def test_key_frames_come_every_gop_frames_and_none_refers_ahead(
    odd_videos: dict[str, Path], tmp_path: Path
) -> None:
    ((member, _),) = packed(write_list(tmp_path, [odd_videos["constant"]]), tmp_path / "out", gop=8)
    with local_file(member) as path, av.open(path) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        assert [stream.type for stream in container.streams] == ["video"]
    keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
    assert max(np.diff([*keys, 40])) <= 8
    assert all(packet.pts == packet.dts for packet in packets)


def test_packed_frames_are_the_pixels_that_a_decoder_gives(
    odd_videos: dict[str, Path], tmp_path: Path
) -> None:
    picture = Image.fromarray(moving(1, 50, 70)[0])
    picture.save(tmp_path / "still.png")
    np.save(tmp_path / "array.npy", moving(5, 20, 30))
    sources = [
        odd_videos["constant"],
        odd_videos["turned"],
        tmp_path / "still.png",
        tmp_path / "array.npy",
    ]
    videos = packed(
        write_list(tmp_path, sources), tmp_path / "out", form="frames", short_side=40, frame_step=3
    )
    for (member, _), source in zip(videos[:2], sources, strict=False):
        wanted = np.stack([pixels(frame, 40) for frame in sequential(str(source))])[::3]
        assert np.array_equal(decode(member, np.arange), wanted)
        assert np.array_equal(decode(member, [4, 1, 1, 6]), wanted[[4, 1, 1, 6]])
    assert [row["num_frames"] for row in rows_of(tmp_path / "out")] == [14, 7, 1, 2]
    assert [row["fps"] for row in rows_of(tmp_path / "out")] == [
        round(25 / 3, 4),
        round(25 / 3, 4),
        None,
        None,
    ]
    assert decode(videos[2][0], np.arange).shape == (1, 40, 56, 3)
    # 20 is not scaled up
    assert np.array_equal(decode(videos[3][0], np.arange), moving(5, 20, 30)[::3])
    assert (
        psnr(
            decode(videos[2][0], np.arange)[0],
            np.asarray(picture.resize((56, 40), Image.Resampling.BILINEAR)),
        )
        > 35
    )


def test_fps_keeps_at_most_so_many_frames_a_second(
    odd_videos: dict[str, Path], tmp_path: Path
) -> None:
    source = write_list(tmp_path, [odd_videos["constant"], odd_videos["variable"]])
    for form in ("video", "frames"):
        packed(source, tmp_path / form, form=form, fps=6.25)
        first, second = rows_of(tmp_path / form)
        assert (first["num_frames"], first["fps"]) == (10, 6.25)  # every fourth
        assert 12 <= second["num_frames"] < 30
    place, _ = read_annotations(SourceConfig(source=str(tmp_path / "video")))[1]
    seconds = times_and_start(place, Reading())[0][:, 0]
    assert np.diff(seconds).min() > 0.5 / 6.25
    assert len(seconds) <= seconds[-1] * 6.25 + 1.2
    (member, _), _ = packed(source, tmp_path / "all", fps=100.0)
    assert len(all_frames(member)) == 40


def test_python_and_webdataset_read_the_shards(odd_videos: dict[str, Path], tmp_path: Path) -> None:
    names = ["constant", "ten_bits", "odd", "turned"]
    source = write_list(tmp_path, [odd_videos[name] for name in names], [7, -1, 0, 123])
    packed(source, tmp_path / "out")
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as archive:
        order = [info.name.split(".")[0] for info in archive]
        for info in archive:
            key, ending = info.name.split(".", 1)  # as webdataset groups them
            samples.setdefault(key, {})[ending] = archive.extractfile(info).read()  # pyright: ignore[reportOptionalMemberAccess]
            assert (info.mtime, info.uid, info.gid, info.uname, info.mode) == (0, 0, 0, "", 0o644)
    assert order == sorted(order)
    assert [sample.get("cls") for sample in samples.values()] == [b"7", None, b"0", b"123"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for (key, sample), row, name in zip(
        samples.items(), rows_of(tmp_path / "out"), names, strict=True
    ):
        about = json.loads(sample["json"])
        assert about["path"] == row["path"] == str(odd_videos[name])
        assert {**about, "key": key} == {
            key: value
            for key, value in row.items()
            if key not in ("shard", "offset", "size", "sha256")
        }
        assert hashlib.sha256(sample["mp4"]).hexdigest() == row["sha256"]
        whole = (tmp_path / "out" / row["shard"]).read_bytes()
        assert whole[row["offset"] : row["offset"] + row["size"]] == sample["mp4"]
    shard = tmp_path / "out" / "shard-000000.tar"
    checksum = hashlib.sha256(shard.read_bytes()).hexdigest()
    assert manifest["shards"] == [
        {"name": shard.name, "bytes": shard.stat().st_size, "sha256": checksum}
    ]
    assert (manifest["videos"], manifest["refused"], manifest["bytes"]) == (
        4,
        0,
        shard.stat().st_size,
    )
    assert shard.read_bytes().endswith(bytes(1024))


@pytest.fixture(scope="module")
def many(odd_videos: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A list of 60 clips that take no time, every seventh of them refused."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(60):
        if number % 7 == 3:
            (folder / f"{number}.mp4").write_bytes(b"junk" * number)
        else:
            render(folder / f"{number}.mp4", moving(4 + number % 9, 48, 64, number))
    return write_list(folder, [f"{number}.mp4" for number in range(60)])


SMALL = {"crf": 1, "shard_mb": 1, "form": "frames"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(many: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    packed(many, folder, **SMALL)
    assert len(list(folder.glob("*.tar"))) >= 4
    return contents(folder)


def in_a_process(work: Callable[[], object]) -> Any:
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(int(work() or 0)))  # pyright: ignore
    process.start()
    return process


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_bytes_do_not_depend_on_the_number_of_workers(
    num_workers: int, many: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    packed(many, tmp_path / "out", **SMALL, num_workers=num_workers)
    assert contents(tmp_path / "out") == undisturbed


def test_encoding_gives_the_same_bytes_whatever_else_goes_on(
    odd_videos: dict[str, Path], tmp_path: Path
) -> None:
    source = write_list(tmp_path, list(odd_videos.values()))
    for num_workers in (1, 3):
        packed(source, tmp_path / str(num_workers), num_workers=num_workers, preset="veryfast")
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_kills_at_any_moment_leave_nothing_but_time_to_be_made_up(
    many: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    rng, folder, kills, seen = random.Random(0), tmp_path / "out", 0, set()

    def num_rows() -> int:
        return (
            (folder / "manifest.jsonl").read_bytes().count(b"\n")
            if (folder / "manifest.jsonl").exists()
            else 0
        )

    while kills < 20:
        num_workers, wanted = rng.choice([1, 2, 3]), num_rows() + rng.randrange(12)
        process = in_a_process(
            lambda n=num_workers: pack.start(many, str(folder), PackConfig(**SMALL, num_workers=n))
        )
        while process.exitcode is None and num_rows() < wanted:
            time.sleep(0.001)
        process.join(rng.uniform(0, 0.02))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            seen.add(num_rows())
        else:  # it was finished: from the start again
            assert process.exitcode == 0
            assert contents(folder) == undisturbed
            shutil.rmtree(folder)
    assert len(seen) > 8
    packed(many, folder, **SMALL)
    assert contents(folder) == undisturbed


def test_a_power_cut_that_took_written_bytes_away_is_made_up(
    many: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    packed(many, folder, **SMALL)
    shards = sorted(folder.glob("*.tar"))
    for damage in range(5):
        (folder / "manifest.json").unlink()
        if damage == 0:
            os.truncate(shards[-1], shards[-1].stat().st_size // 3)
        elif damage == 1:
            shards[-1].unlink()
        elif damage == 2:
            (folder / "shards.jsonl").write_bytes(b"")
        elif damage == 3:
            whole = bytearray(shards[-1].read_bytes())
            whole[len(whole) // 2 : len(whole) // 2 + 4096] = bytes(4096)
            shards[-1].write_bytes(whole)
        else:
            rows = (folder / "manifest.jsonl").read_bytes()
            (folder / "manifest.jsonl").write_bytes(rows[: len(rows) * 2 // 3])
            (folder / "shard-000099.tar").write_bytes(b"left over")
        packed(many, folder, **SMALL)
        assert contents(folder) == undisturbed, damage


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly_and_it_says_how_to_go_on(
    number: signal.Signals,
    many: str,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "out"
    process = in_a_process(
        lambda: pack.start(many, str(folder), PackConfig(**SMALL, num_workers=1))
    )
    while not (folder / "shard-000000.tar").exists():
        time.sleep(0.005)
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == 128 + number
    assert "of 60 videos; the same command goes on from there" in capfd.readouterr().out
    packed(many, folder, **SMALL)
    assert contents(folder) == undisturbed


def test_a_full_disk_is_told_in_a_line_and_nothing_is_lost(
    many: str, undisturbed: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"

    def limited() -> None:
        # of a file: 1 MB is a shard's
        resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, resource.RLIM_INFINITY))
        keys = [f"{key}={value}" for key, value in SMALL.items()]
        main(["pack", many, str(folder), *keys, "num_workers=1"])

    process = in_a_process(limited)
    process.join(60)
    assert process.exitcode == 74
    told = capfd.readouterr().err
    assert (
        f"video-mae pack: {folder}: cannot be written ([Errno 27] File too large): needed are some "
        in told
    )
    assert "make room, or let it be written to, and start the same command again" in told
    assert "Traceback" not in told
    num_rows = len(rows_of(folder)[:-1])
    assert num_rows > 5
    packed(many, folder, **SMALL)
    assert contents(folder) == undisturbed


def test_what_is_finished_is_left_alone(
    many: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed(many, tmp_path / "out", **SMALL)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    packed(many, tmp_path / "out", **SMALL, decode_seconds=7.0)
    assert (
        "is packed already: 51 videos, 9 refused (refused.jsonl says why)"
        in capsys.readouterr().out
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_folder_belongs_to_one_list_and_one_way_of_packing(many: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    packed(many, folder, **SMALL)

    def refuses(message: str, source: str = many, where: str = str(folder), **knobs: Any) -> None:
        with pytest.raises(ValueError, match=message) as error:
            pack.start(source, where, PackConfig(**{**SMALL, **knobs}))
        assert "\n" not in str(error.value)

    refuses(
        "was made with short_side = 224, now 112; choose another folder",
        short_side=112,
    )
    longer = write_list(
        tmp_path / "longer", [Path(many).parent / f"{number}.mp4" for number in range(59)]
    )
    refuses("was made with another list of this name", longer)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    refuses("is not empty and has no pack.json", where=str(tmp_path / "full"))
    refuses("is a URL; pack into a local folder", where="s3://bucket/out")
    (folder / "manifest.json").unlink()
    with hold_folder(folder):
        refuses(f"process {os.getpid()} on .* is at work in it; wait for it, or choose another")
    packed(many, folder, **SMALL)


def refused(videos: Sequence[Path | str], folder: Path, **knobs: Any) -> list[str]:
    assert (
        pack.start(
            write_list(folder, videos), str(folder / "out"), PackConfig(num_workers=1, **knobs)
        )
        == 0
    )
    told = [
        json.loads(line) for line in (folder / "out" / "refused.jsonl").read_text().splitlines()
    ]
    assert told == [row for row in rows_of(folder / "out") if "refused" in row]
    return [row["refused"] for row in told]


def test_what_cannot_be_packed_is_refused_with_its_reason(
    odd_videos: dict[str, Path], tmp_path: Path
) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "still.png")
    np.save(tmp_path / "volume.npy", np.zeros((4, 20, 20), np.float32))
    (tmp_path / "playlist.mp4").write_text("#EXTM3U\n/etc/passwd\n")
    (tmp_path / "cut.mp4").write_bytes(odd_videos["constant"].read_bytes()[:-900])
    os.mkfifo(tmp_path / "pipe.mp4")
    good = str(odd_videos["single"])
    names = ["still.png", "volume.npy", "playlist.mp4", "cut.mp4", "pipe.mp4", "absent.mp4"]
    reasons = refused([good, *(tmp_path / name for name in names)], tmp_path / "video")
    for reason, expected in zip(
        reasons,
        (
            "form=frames",
            "form=frames",
            "not a video container",
            "cut off",
            "not a regular file",
            "No such file",
        ),
        strict=True,
    ):
        assert expected in reason
    assert refused([good, tmp_path / "volume.npy"], tmp_path / "frames", form="frames") == [
        "holds float32 of 1 channels, only uint8 of 3 is packed; list it as it is"
    ]


def test_a_video_that_makes_no_progress_is_refused_without_figures_of_time(
    write_video: Callable[..., Path], tmp_path: Path
) -> None:
    # long enough that no answer is there before it is asked for, on the busiest machine
    noise_THWC = np.random.default_rng(0).integers(256, size=(48, 256, 320, 3), dtype=np.uint8)
    source = write_list(tmp_path, [write_video(tmp_path / "noise.mp4", noise_THWC)])
    assert (
        pack.start(source, str(tmp_path / "out"), PackConfig(num_workers=1, decode_seconds=1e-9))
        == 3
    )
    assert {row["refused"] for row in rows_of(tmp_path / "out")} == {
        "it makes no progress (decode_seconds)"
    }


def test_hostile_files_are_refused_or_packed_within_limits(
    shared_videos: Path, tmp_path: Path
) -> None:
    names = sorted(
        path for part in ("broken", "hostile") for path in (shared_videos / part).iterdir()
    )
    config = PackConfig(num_workers=2, short_side=64, decode_memory_gb=2.0)
    assert pack.start(write_list(tmp_path, names), str(tmp_path / "out"), config) == 0
    rows = {Path(row["path"]).name: row for row in rows_of(tmp_path / "out")}
    assert rows["decord_hang_edit_list.mp4"]["num_frames"] == 60
    for name in (
        "hls_playlist.mp4",
        "ffconcat_script.mp4",
        "zero.mp4",
        "audio_only.mp4",
        "trunc_end_30.mp4",
        "zeroed_mid.mp4",
    ):
        assert rows[name]["refused"]


def test_a_list_of_which_nothing_is_there_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"none of its 2 files is there; the first: no such file: .*, correct the path or root",
    ):
        pack.start(write_list(tmp_path, ["a.mp4", "b.mp4"]), str(tmp_path / "out"), PackConfig())
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError, match="LIST: no such list file or folder"):
        pack.start(str(tmp_path / "none.txt"), str(tmp_path / "out"), PackConfig())


def test_names_of_classes_and_packed_folders_are_sources(
    odd_videos: dict[str, Path], tmp_path: Path
) -> None:
    for name, video in (("zebra", "odd"), ("ant", "single"), ("ant", "ten_bits")):
        (tmp_path / "classes" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "classes" / name / f"{video}.mp4").write_bytes(odd_videos[video].read_bytes())
    videos = packed(str(tmp_path / "classes"), tmp_path / "out")
    assert [row["path"] for row in rows_of(tmp_path / "out")] == [
        "ant/single.mp4",
        "ant/ten_bits.mp4",
        "zebra/odd.mp4",
    ]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["class_names"] == [
        "ant",
        "zebra",
    ]
    again = packed(str(tmp_path / "out"), tmp_path / "again", form="frames")
    for (member, about), (raw, raw_about) in zip(videos, again, strict=True):
        assert about == raw_about
        assert np.array_equal(decode(raw, np.arange), all_frames(member))
    assert json.loads((tmp_path / "again" / "manifest.json").read_text())["class_names"] == [
        "ant",
        "zebra",
    ]


def test_the_command_line_packs(odd_videos: dict[str, Path], tmp_path: Path) -> None:
    source = write_list(tmp_path, ["../" + os.path.relpath(odd_videos["odd"], tmp_path.parent)])
    with pytest.raises(SystemExit) as end:
        main(
            [
                "pack",
                source,
                str(tmp_path / "out"),
                "--form",
                "frames",
                "--frame-step",
                "2",
                "num_workers=1",
                "--root",
                str(tmp_path),
            ]
        )
    assert end.value.code == 0
    assert rows_of(tmp_path / "out")[0]["num_frames"] == 10
    assert rows_of(tmp_path / "out")[0]["path"].startswith("../")


@pytest.mark.parametrize(
    "wrong",
    [
        "form=avi",
        "short_side=-1",
        "fps=0",
        "frame_step=2",
        "gop=0",
        "crf=99",
        "num_workers=0",
        "shard_mb=0",
        "decode_seconds=0",
        "decode_memory_gb=inf",
    ],
)
def test_a_wrong_setting_is_named(wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong.split("=")[0]):
        parse(None, [wrong], PackConfig)


def test_no_process_and_no_handle_is_left(odd_videos: dict[str, Path], tmp_path: Path) -> None:
    source = write_list(
        tmp_path, [odd_videos["single"], odd_videos["odd"], tmp_path / "absent.mp4"]
    )
    packed(source, tmp_path / "first")
    before = (
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        {child.pid for child in psutil.Process().children()},
    )
    packed(source, tmp_path / "second")
    assert (
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        {child.pid for child in psutil.Process().children()},
    ) == before
