"""Every decoder on the same files: what a jump gives is what reading in order gives, and PyAV's
reading from the start is the truth.

F frames of a file, H W pixels, C channels.
"""

import struct
from collections.abc import Callable
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from video_matrix import leave_real_time

from video_mae.config.pack import PackConfig
from video_mae.decoding import (
    Reading,
    VideoDecodeError,
    decode,
    read_clip,
    resolve_decoder,
    stream,
    times_and_start,
    transcode,
)
from video_mae.decoding import decoders as table
from video_mae.decoding.choices import uniform_indices
from video_mae.decoding.containers import ASF, EDIT_LIST, NO_INDEX, PACKED_B_FRAMES
from video_mae.decoding.inspection import describe
from video_mae.decoding.isolation import Isolated
from video_mae.decoding.media import scaled_size
from video_mae.decoding.packets import ADJACENT_KEYS, OPEN_GROUPS
from video_mae.decoding.pyav_video import pixels, sequential

SHARED = Path(__file__).resolve().parents[3] / "shared" / "videos" / "real"
REAL = sorted(path.name for path in SHARED.iterdir()) if SHARED.is_dir() else []
CLOSE = 6.0
"""Mean difference of two decoders' pixels, of 255: they convert colours and scale in ways of their
own.
"""
MOST = 100
"""Frames of a long file that are read in order."""
KNOWN = {
    EDIT_LIST: ("editlist.mp4",),
    ADJACENT_KEYS: ("h265_video.mp4",),
    PACKED_B_FRAMES: (
        "RATRACE_wave_f_nm_np1_fr_goo_37.avi",
        "SchoolRulesHowTheyHelpUs_wave_f_nm_np1_ba_med_0.avi",
        "TrumanShow_wave_f_nm_np1_fr_med_26.avi",
        "hmdb51_Turnk_r_Pippi_Michel_cartwheel_f_cm_np2_le_med_6.avi",
        "tests_data_test.avi",
    ),
}
each_decoder = pytest.mark.parametrize(
    "decoder",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                bool(table.problem(name)), reason=f"{name}: {table.problem(name)}"
            ),
        )
        for name in table.NAMES
    ],
)


def picture(index: int, height: int, width: int) -> NDArray[np.uint8]:
    """A frame that no other is like: a soft ball on a slanted ground, both on their way."""
    y, x = np.mgrid[:height, :width] / min(height, width)
    ball = np.exp(-20 * ((x - 0.2 - 0.013 * index) ** 2 + (y - 0.5) ** 2))
    ground = 0.2 + 0.3 * x + 0.004 * index
    return (
        (255 * np.stack([ground + 0.4 * ball, ground, ground + 0.3 * y], axis=2))
        .clip(0, 255)
        .astype(np.uint8)
    )


def render(
    path: Path,
    num_frames: int = 45,
    size: tuple[int, int] = (48, 64),
    *,
    codec: str = "libx264",
    form: str = "yuv420p",
    stamps: Callable[[int], int] | None = None,
    **options: str,
) -> Path:
    """stamps: when frame i is shown, milliseconds; else 25 frames a second. options: of the
    encoder, with _ for -.
    """
    options = {name.replace("_", "-"): value for name, value in options.items()}
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *size, form
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(index, *size), format="rgb24")
            if stamps:
                frame.pts, frame.time_base = stamps(index), Fraction(1, 1000)
                stream.codec_context.time_base = frame.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    leave_real_time()
    return path


def patch(path: Path, box: bytes, at: int, content: bytes) -> Path:
    """Writes over what a box of an mp4 file has at an offset of its content."""
    data = bytearray(path.read_bytes())
    start = data.index(box) + 4 + at
    data[start : start + len(content)] = content
    path.write_bytes(data)
    return path


def turned(path: Path, matrix: tuple[float, float, float, float]) -> Path:
    return patch(
        path,
        b"tkhd",
        40,
        struct.pack(">ii", *(int(65536 * value) for value in matrix[:2]))
        + bytes(4)
        + struct.pack(">ii", *(int(65536 * value) for value in matrix[2:])),
    )


QUICK: Any = {"preset": "ultrafast", "crf": "12"}
RENDERED: dict[str, Callable[[Path], Path]] = {
    "constant.mp4": lambda path: render(path, crf="12", bf="0", g="12"),
    "between.mp4": lambda path: render(path, crf="12", bf="3", g="20", b_pyramid="normal"),
    "open.mkv": lambda path: render(path, crf="12", bf="2", g="15", x264_params="open-gop=1"),
    "long.mp4": lambda path: render(path, 90, crf="12", g="250"),
    "variable.mp4": lambda path: render(
        path,
        crf="12",
        bf="2",
        g="20",
        stamps=lambda i: 40 * i + 13 * (i % 3) + (900 if i > 20 else 0),
    ),
    "variable.mkv": lambda path: render(path, g="20", stamps=lambda i: 33 * i + i * i, **QUICK),
    "right.mp4": lambda path: turned(render(path, 20, (48, 80), **QUICK), (0, 1, -1, 0)),
    "left.mp4": lambda path: turned(render(path, 20, (48, 80), **QUICK), (0, -1, 1, 0)),
    "over.mp4": lambda path: turned(render(path, 20, (48, 80), **QUICK), (-1, 0, 0, -1)),
    "ten bits.mp4": lambda path: render(path, form="yuv420p10le", g="10", **QUICK),
    "odd.mp4": lambda path: render(path, size=(51, 77), form="yuv444p", g="10", **QUICK),
    "padded.mp4": lambda path: render(path, size=(48, 48), g="10", **QUICK),
    "one.mp4": lambda path: render(path, 1, **QUICK),
    "two.mp4": lambda path: render(path, 2, **QUICK),
    "vp9.webm": lambda path: render(
        path, 30, codec="libvpx-vp9", deadline="realtime", cpu_used="8", g="12"
    ),
    "plain.avi": lambda path: render(path, codec="mpeg4", g="12", bf="0", b="2000000"),
    "stream.ts": lambda path: render(path, g="15", bf="2", crf="12"),
    "stream.mpg": lambda path: render(path, codec="mpeg2video", g="12", bf="2", b="2000000"),
    "flash.flv": lambda path: render(path, g="12", bf="2", crf="12"),
    "windows.wmv": lambda path: render(path, codec="wmv2", g="12", b="2000000"),
    "hidden.mp4": lambda path: patch(
        render(path, bf="2", g="12", crf="12"), b"elst", 8, struct.pack(">I", 900)
    ),
    "h265.mp4": lambda path: render(
        path, 30, codec="libx265", x265_params="log-level=none:keyint=10", preset="ultrafast"
    ),
}
MISREAD = {
    "hidden.mp4": EDIT_LIST,
    "open.mkv": OPEN_GROUPS,
    "stream.ts": NO_INDEX,
    "stream.mpg": NO_INDEX,
    "windows.wmv": ASF,
}
FILES = [*RENDERED, *REAL]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("rendered")

    def find(name: str) -> str:
        if name not in RENDERED:
            return str(SHARED / name)
        return str(folder / name if (folder / name).exists() else RENDERED[name](folder / name))

    return find


@cache
def truth(path: str) -> tuple[NDArray[np.uint8], list[float]]:
    """frames_FHWC and their time stamps in seconds, NaN where there is none, from PyAV's reading of
    the file from its start.
    """
    frames = list(sequential(path))
    stamps = [
        np.nan
        if frame.pts is None or frame.time_base is None
        else float(frame.pts * frame.time_base)
        for frame in frames
    ]
    return np.stack([pixels(frame, 0) for frame in frames]), stamps


def differences(left_FHWC: NDArray[np.uint8], right_HWC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean differences [F] of frames to one, every other pixel."""
    return np.abs(left_FHWC[:, ::2, ::2].astype(np.int16) - right_HWC[::2, ::2]).mean(
        axis=(1, 2, 3)
    )


def shown_as(frame_HWC: NDArray[np.uint8], index: int, truth_FHWC: NDArray[np.uint8]) -> bool:
    """Whether a frame is the one of that index: none of its neighbours is closer, and it is close."""
    first = max(index - 4, 0)
    found = differences(truth_FHWC[first : index + 5], frame_HWC)
    return found[index - first] < CLOSE and found[index - first] <= found.min() + 0.3


@each_decoder
@pytest.mark.parametrize("name", FILES)
def test_a_jump_to_any_frame_gives_what_reading_in_order_gives(decoder, name, place):
    path, reading = place(name), Reading(decoder=decoder)
    truth_FHWC, _ = truth(path)
    in_order = read_clip(path, slice(MOST), reading)
    assert in_order.num_frames == len(truth_FHWC)
    num_frames = len(in_order.clip_THWC)
    last = read_clip(path, [-1], reading)
    assert shown_as(last.clip_THWC[0], len(truth_FHWC) - 1, truth_FHWC)
    if in_order.decoder == "pyav":
        np.testing.assert_array_equal(in_order.clip_THWC, truth_FHWC[:num_frames])
        np.testing.assert_array_equal(last.clip_THWC[0], truth_FHWC[-1])
    for index in {0, num_frames // 3, num_frames // 2, num_frames - 1}:
        assert shown_as(in_order.clip_THWC[index], index, truth_FHWC), (in_order.decoder, index)
    rng = np.random.default_rng(0)
    for wanted in (
        rng.integers(num_frames, size=9),
        np.sort(rng.integers(num_frames, size=7)),
        np.array([num_frames - 1]),
        np.minimum(rng.integers(num_frames) + 4 * np.arange(6), num_frames - 1),
        np.array([num_frames - 1, 0, num_frames - 1]),
    ):
        found = read_clip(path, wanted, reading)
        assert found.decoder == in_order.decoder
        np.testing.assert_array_equal(found.clip_THWC, in_order.clip_THWC[wanted])


@each_decoder
@pytest.mark.parametrize(
    "name", ["between.mp4", "variable.mp4", "ten bits.mp4", "hidden.mp4", "vp9.webm", *REAL[:3]]
)
def test_threads_change_nothing(decoder, name, place):
    wanted = np.array([1, 7, 8, 15, 20])
    clips = [
        decode(place(name), wanted, Reading(decoder=decoder, threads=threads))
        for threads in (1, 2, 4)
    ]
    np.testing.assert_array_equal(clips[1], clips[0])
    np.testing.assert_array_equal(clips[2], clips[0])


@each_decoder
@pytest.mark.parametrize(
    "name",
    [
        "constant.mp4",
        "right.mp4",
        "over.mp4",
        "ten bits.mp4",
        "odd.mp4",
        "padded.mp4",
        "variable.mkv",
        *(
            name
            for name in REAL
            if name
            in (
                "video_90.mov",
                "R6llTwEh07w.mp4",
                "odd.mp4",
                "vp9.webm",
                "v_SoccerJuggling_g23_c01.avi",
            )
        ),
    ],
)
def test_frames_are_scaled_as_they_are_decoded(decoder, name, place):
    path = place(name)
    truth_FHWC, _ = truth(path)
    index = min(5, len(truth_FHWC) - 1)
    frame = next(frame for place, frame in enumerate(sequential(path)) if place == index)
    for short_side in (32, 47):
        clip_THWC = decode(path, [index], Reading(decoder=decoder, short_side=short_side))
        assert clip_THWC.shape == (
            1,
            *scaled_size(truth_FHWC.shape[1], truth_FHWC.shape[2], short_side),
            3,
        )
        assert differences(clip_THWC, pixels(frame, short_side))[0] < CLOSE
    large = decode(path, [index], Reading(decoder=decoder, short_side=4096))
    np.testing.assert_array_equal(large, decode(path, [index], Reading(decoder=decoder)))


@pytest.mark.parametrize(
    ("height", "width", "short_side", "size"),
    [
        (256, 340, 0, (256, 340)),
        (256, 340, 224, (224, 298)),
        (340, 256, 224, (298, 224)),
        (100, 100, 30, (30, 30)),
        (101, 77, 77, (101, 77)),
        (8, 900, 4, (4, 450)),
        (901, 9, 8, (801, 8)),
    ],
)
def test_the_shorter_side_is_the_one_that_is_asked_for(height, width, short_side, size):
    assert scaled_size(height, width, short_side) == size


@each_decoder
@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(".avi")])
def test_frames_have_the_times_of_their_stamps(decoder, name, place):
    path = place(name)
    _, stamps = truth(path)
    found, _ = times_and_start(path, Reading(decoder=decoder))
    assert found.shape == (len(stamps), 2)
    np.testing.assert_allclose(found[:, 0] - found[0, 0], np.array(stamps) - stamps[0], atol=2e-3)
    assert (found[:, 1] > found[:, 0]).all()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, MISREAD.get(name, "")) for name in RENDERED),
        *(
            (name, next((kind for kind, names in KNOWN.items() if name in names), ""))
            for name in REAL
        ),
    ],
)
def test_what_leads_decoders_astray_is_known_before_they_open_a_file(name, kind, place):
    assert set(describe(place(name)).traits[:1]) == {kind} - {""}


@each_decoder
@pytest.mark.parametrize(
    "name",
    [*MISREAD, "h265.mp4", *(name for names in KNOWN.values() for name in names if name in REAL)],
)
def test_what_a_decoder_misreads_is_left_to_another_and_named(decoder, name, place):
    path = place(name)
    description = describe(path)
    found = read_clip(path, partial(uniform_indices, num_frames=1), Reading(decoder=decoder))
    truth_FHWC, _ = truth(path)
    assert shown_as(found.clip_THWC[0], len(truth_FHWC) // 2, truth_FHWC)
    assert (found.decoder == decoder) == (decoder in description.trusted_with)
    reason = next(iter(description.traits), "hevc in mp4")
    fallback = f"{decoder}: {reason}; it would be read wrongly, `video-mae pack` cures it"
    assert found.fallback == ("" if found.decoder == decoder else fallback)


def test_a_file_that_the_decoder_cannot_open_is_left_to_the_next_that_can(tmp_path):
    path = render(tmp_path / "av1.mkv", 12, codec="libsvtav1", preset="12", g="6")
    found = read_clip(str(path), slice(4), Reading(decoder="decord"))
    assert found.decoder == next(
        name for name in table.NAMES if name != "decord" and not table.problem(name)
    )
    assert found.fallback.startswith("decord: ")
    assert "\n" not in found.fallback
    np.testing.assert_array_equal(
        found.clip_THWC,
        decode(str(path), slice(4), Reading(decoder=found.decoder)),  # pyright: ignore[reportArgumentType]
    )  # pyright: ignore[reportArgumentType]


@each_decoder
def test_where_none_can_open_a_file_the_first_one_says_why(decoder, tmp_path):
    path = render(tmp_path / "a.mp4", 12, **QUICK)
    data = bytearray(path.read_bytes())
    data[data.index(b"avcC") : data.index(b"avcC") + 40] = bytes(40)
    path.write_bytes(data)
    with pytest.raises(VideoDecodeError) as caught:
        decode(str(path), np.arange, Reading(decoder=decoder))
    assert caught.value.decoder == decoder
    assert "\n" not in caught.value.reason


def test_auto_is_the_first_that_works_and_what_is_asked_for_is_not_replaced(monkeypatch):
    # of those that read everything right it is the one that is always there
    assert table.NAMES[0] == "pyav"
    for missing in ({"torchcodec"}, {"torchcodec", "decord"}, {"pyav"}):
        monkeypatch.setattr(
            table,
            "problem",
            lambda name, missing=missing: "No module named x" if name in missing else "",
        )
        assert table.resolve("auto") == next(name for name in table.NAMES if name not in missing)
        for name in table.NAMES:
            if name not in missing:
                assert table.resolve(name) == name
                continue
            others = ", ".join(other for other in table.NAMES if other not in missing)
            with pytest.raises(
                ValueError,
                match=rf"^data\.decoder: {name} cannot be loaded .*No module named x.*take one of: {others}$",
            ):
                table.resolve(name)


@each_decoder
def test_a_run_is_given_the_decoder_that_it_asks_for(decoder):
    assert resolve_decoder(decoder) == decoder
    assert table.version(decoder)[0].isdigit()


CORNERS = np.array([[(230, 30, 30), (30, 200, 30)], [(30, 30, 230), (220, 220, 220)]], np.uint8)
TILTED = [
    np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    for angle in np.radians([-44, -0.2, 0.2, 30])
]
TURNS = [
    np.array(matrix)
    for matrix in (
        [[1, 0], [0, 1]],
        [[0, 1], [-1, 0]],
        [[-1, 0], [0, -1]],
        [[0, -1], [1, 0]],
        [[-1, 0], [0, 1]],
        [[1, 0], [0, -1]],
        [[0, 1], [1, 0]],
        [[0, -1], [-1, 0]],
    )
]


def corners(path: Path) -> Path:
    """A video of 80 x 48 pixels, in each corner another colour."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options=QUICK)
        stream.height, stream.width, stream.pix_fmt = 48, 80, "yuv444p"
        for _ in range(3):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(
                        np.kron(CORNERS, np.ones((24, 40, 1), np.uint8)), format="rgb24"
                    )
                )
            )
        container.mux(stream.encode())
    return path


def shown_corners(matrix: NDArray[np.float64]) -> list[list[int]]:
    """Which corner of the stored picture is shown where, by its number: each goes where the matrix
    takes it.
    """
    # (x, y) as rows
    places = np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]]) @ np.round(matrix).astype(int)
    shown = [[0, 0], [0, 0]]
    for number, (x, y) in enumerate(places.tolist()):
        shown[(y + 1) // 2][(x + 1) // 2] = number
    return shown


def corner_numbers(frame_HWC: NDArray[np.uint8]) -> list[list[int]]:
    height, width = frame_HWC.shape[:2]
    found = frame_HWC[
        [[height // 5], [height - 1 - height // 5]], [[width // 5, width - 1 - width // 5]]
    ].astype(int)
    return np.abs(found[:, :, None] - CORNERS.reshape(4, 3)).sum(-1).argmin(-1).tolist()


@each_decoder
@pytest.mark.parametrize("short_side", [0, 24])
def test_pictures_are_turned_and_mirrored_as_their_matrix_says(decoder, short_side, tmp_path):
    plain = corners(tmp_path / "plain.mp4").read_bytes()
    for turn in TURNS:
        for matrix in [turn, *(tilt @ turn for tilt in TILTED)]:
            path = tmp_path / "turned.mp4"
            path.write_bytes(plain)
            turned(path, tuple(matrix.ravel()))
            found = read_clip(str(path), [1], Reading(decoder=decoder, short_side=short_side))
            height, width = (48, 80) if turn[0, 0] else (80, 48)
            assert found.clip_THWC.shape[1:3] == scaled_size(height, width, short_side)
            assert corner_numbers(found.clip_THWC[0]) == shown_corners(turn)
            assert found.decoder == (
                decoder if matrix is turn and np.linalg.det(turn) > 0 else "pyav"
            )


@each_decoder
def test_times_count_from_the_first_frame_whatever_the_clock_of_the_file_says(decoder, tmp_path):
    for name in ("late.mkv", "late.mp4", "late.flv"):
        path = render(
            tmp_path / name,
            20,
            stamps=lambda i: 100_000 + 40 * i,
            bf="2",
            b_strategy="0",
            g="10",
            preset="ultrafast",
        )
        seconds_F2, start = times_and_start(str(path), Reading(decoder=decoder))
        np.testing.assert_allclose(
            seconds_F2, np.stack([np.arange(20), np.arange(1, 21)], axis=1) / 25, atol=1e-6
        )
        assert start == describe(str(path)).start_seconds == pytest.approx(100, abs=0.2)


@each_decoder
def test_transport_streams_of_camcorders_are_read(decoder, tmp_path):
    path = render(tmp_path / "a.ts", 30, g="10", bf="2", preset="ultrafast")
    data = path.read_bytes()
    path = tmp_path / "a.mts"
    path.write_bytes(
        b"".join(bytes(4) + data[place : place + 188] for place in range(0, len(data), 188))
    )
    found = read_clip(str(path), np.arange, Reading(decoder=decoder))
    assert (found.decoder, len(found.clip_THWC)) == ("pyav", 30)
    np.testing.assert_array_equal(found.clip_THWC, truth(str(path))[0])


@pytest.mark.parametrize("form", ["video", "frames"])
def test_packing_bakes_in_how_a_picture_is_shown_and_when(form, tmp_path):
    plain = corners(tmp_path / "plain.mp4").read_bytes()
    for turn in TURNS:
        path = tmp_path / "turned.mp4"
        path.write_bytes(plain)
        turned(path, tuple(turn.ravel()))
        description = describe(str(path))
        assert description.mirrored == (np.linalg.det(turn) < 0)
        assert abs(description.rotation) % 180 == (90 if turn[0, 0] == 0 else 0)
        *_, packed = transcode.pack(str(path), PackConfig(form=form))
        assert packed is not None
        copy = tmp_path / ("packed.mp4" if form == "video" else "packed.npy")
        copy.write_bytes(packed.media.tobytes())
        clip_THWC = decode(str(copy), np.arange, Reading())
        assert clip_THWC.shape == (3, packed.about["height"], packed.about["width"], 3)
        assert corner_numbers(clip_THWC[0]) == shown_corners(turn)
        if form == "video":
            np.testing.assert_allclose(
                times_and_start(str(copy), Reading())[0],
                times_and_start(str(path), Reading())[0],
                atol=1e-4,
            )


def test_frames_are_chosen_by_any_function(
    write_video: Callable[..., Path], tmp_path: Path
) -> None:
    frames_THWC = np.zeros((9, 32, 48, 3), dtype=np.uint8)
    frames_THWC[4:] = 200
    path = str(write_video(tmp_path / "a.mp4", frames_THWC))
    clip_THWC = decode(path, lambda num_frames: np.array([0, num_frames - 1, 0]))
    assert [int(frame.mean()) > 100 for frame in clip_THWC] == [False, True, False]
    assert np.array_equal(clip_THWC, decode(path, [0, -1, 0]))
    found = [index for _, index, _ in stream(path, lambda num_frames: np.arange(num_frames)[::4])]
    assert found == [0, 4, 8]


def test_a_file_that_fails_loads_no_torch(tmp_path: Path) -> None:
    path = str(tmp_path / "a.mp4")
    Path(path).write_bytes(bytes(1000))
    process = Isolated()
    try:
        with pytest.raises(ValueError):  # noqa: PT011  (of any decoder)
            process.call(table.open_video, path, path, Reading(decoder="pyav"), seconds=60)
        # a function of this file would bring what the file imports
        assert not process.call(eval, "'torch' in __import__('sys').modules", seconds=60)
    finally:
        process.close()
