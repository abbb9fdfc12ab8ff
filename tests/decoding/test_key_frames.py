"""Videos whose key frames are not what their flags say: each frame asked for alone is that of
reading in order, or another decoder's.
"""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import video_matrix as matrix

from video_mae.decoding import Reading, VideoDecodeError, decoders, read_clip
from video_mae.decoding.containers import EDIT_LIST
from video_mae.decoding.inspection import describe
from video_mae.decoding.isolation import decoder_process
from video_mae.decoding.packets import LATE_START
from video_mae.decoding.pyav_video import pixels, sequential

NAMES = [name for name in decoders.NAMES if not decoders.problem(name)]
Change = Callable[[list[av.Packet]], list[av.Packet]]


def remade(path: Path, container: str, codec: str, change: Change, **options: str) -> str:
    """A video of the matrix whose packets were changed on their way into the container."""
    with av.open(str(path), "w", format=matrix.CONTAINERS[container][0], options=options) as output:
        for packet in change(matrix.encoded(output, codec)[1]):
            output.mux(packet)
    return str(path)


def all_keys(packets: list[av.Packet]) -> list[av.Packet]:
    for packet in packets:
        packet.is_keyframe = True
    return packets


def without_first(packets: list[av.Packet]) -> list[av.Packet]:
    return packets[1:]


def begun_earlier(num_frames: int) -> Change:
    """Negative stamps: an mp4 hides what comes before 0, as `ffmpeg -ss 0.5 -i a.mp4 -c copy`
    writes it.
    """

    def shift(packets: list[av.Packet]) -> list[av.Packet]:
        for packet in packets:
            ticks = round(num_frames / 25 / Fraction(packet.time_base))
            assert packet.pts is not None
            assert packet.dts is not None
            packet.pts, packet.dts = packet.pts - ticks, packet.dts - ticks
        return packets

    return shift


def check(path: str) -> tuple[list[int], Any]:
    """The numbers of the frames in order, and what `doctor` knows; each decoder gives each of them
    alone, or is passed over.
    """
    in_order, description = matrix.in_order(path), describe(path)
    for name in NAMES:
        read_by, fallback, numbers = decoder_process().call(matrix.alone, path, name, seconds=60.0)
        assert read_by == (name if name in description.trusted_with else "pyav")
        assert bool(fallback) == (read_by != name)
        assert numbers == (
            in_order if read_by == name else in_order[:: max(len(in_order) // 2, 1)]
        ), name
    return in_order, description


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("mp4", "H.264 with B-frames"),
        ("fragmented mp4", "H.264"),
        ("mkv", "H.265 with B-frames"),
        ("mp4", "MPEG-4"),
        ("mp4", "MPEG-4 with B-frames"),
        ("avi", "MPEG-4"),
        ("mkv", "MPEG-2 with B-frames"),
        ("mov", "MPEG-2"),
    ],
)
def test_key_frames_that_are_none_lead_nowhere(container, codec, tmp_path):
    in_order, _ = check(
        remade(tmp_path / "a", container, codec, all_keys, **matrix.CONTAINERS[container][1])
    )
    assert in_order == list(range(matrix.NUM_FRAMES))


@pytest.mark.parametrize("codec", ["H.264", "MJPEG", "FFV1"])
def test_where_all_are_key_frames_they_are_sought(codec, tmp_path, monkeypatch):
    name, form, options = matrix.CODECS[codec]
    monkeypatch.setitem(matrix.CODECS, codec, (name, form, {**options, "g": "1"}))
    _, description = check(remade(tmp_path / "a", "mkv", codec, lambda packets: packets))
    assert description.traits == ()


@pytest.mark.parametrize(
    "codec", ["H.264 with B-frames", "H.265 with B-frames", "MPEG-2 with B-frames"]
)
@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_a_first_key_frame_that_is_missing(codec, container, tmp_path):
    in_order, description = check(remade(tmp_path / "a", container, codec, without_first))
    assert in_order == list(range(in_order[0], matrix.NUM_FRAMES))
    assert LATE_START in description.traits


@pytest.mark.parametrize(
    "codec",
    [
        "H.264 with B-frames",
        "H.264, open groups",
        "H.265 with B-frames",
        "MPEG-2 with B-frames",
        "MPEG-4 with B-frames",
        "VP9",
    ],
)
@pytest.mark.parametrize("num_hidden", [1, 3, 7, 12])
def test_an_edit_list_hides_what_comes_before_the_first_frame(codec, num_hidden, tmp_path):
    in_order, description = check(remade(tmp_path / "a", "mp4", codec, begun_earlier(num_hidden)))
    assert in_order[-1] == matrix.NUM_FRAMES - 1
    assert len(in_order) < matrix.NUM_FRAMES
    assert EDIT_LIST in description.traits
    assert description.trusted_with == ("pyav",)


@pytest.mark.parametrize("container", ["mp4", "mkv", "avi"])
def test_the_last_frames_of_a_refresh_column_by_column_are_whole(container, tmp_path, monkeypatch):
    noise_HWC = np.random.default_rng(0).integers(
        0, 255, (matrix.HEIGHT, matrix.WIDTH, 3), dtype=np.uint8
    )
    monkeypatch.setattr(matrix, "picture", lambda number: np.roll(noise_HWC, 3 * number, axis=1))
    monkeypatch.setattr(matrix, "NUM_FRAMES", 60)
    name, form, options = matrix.CODECS["H.264, refreshed bit by bit"]
    # numbers of frames wrap round beside a key frame
    monkeypatch.setitem(matrix.CODECS, "H.264", (name, form, {**options, "g": "12"}))
    path = remade(tmp_path / "a", container, "H.264", lambda packets: packets)
    for index, frame in enumerate(sequential(path)):
        alone_HWC = read_clip(path, [index], Reading(decoder="pyav")).clip_THWC[0]
        assert np.array_equal(alone_HWC, pixels(frame, 0)), index


def test_what_has_no_decoder_here_is_refused_in_words(tmp_path):
    path = tmp_path / "a.mkv"
    remade(path, "mkv", "MPEG-4", lambda packets: packets)
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/ASP", b"V_MPEG4/ISO/XXX"))
    with pytest.raises(VideoDecodeError, match="no decoder for its video"):
        read_clip(str(path), [0], Reading(decoder="pyav"))
