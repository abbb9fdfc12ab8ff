"""Small videos of every container and codec that PyAV's libraries can write, the number of each
frame drawn in it.

`python tests/video_matrix.py` writes the table of docs/data.md, which says which decoder is trusted
with what.
"""

import io
import os
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import PictureType
from numpy.typing import NDArray

from video_mae.decoding import Reading
from video_mae.decoding.frames import open_file
from video_mae.decoding.inspection import describe
from video_mae.decoding.packets import IN_ORDER
from video_mae.decoding.pyav_video import sequential

HEIGHT, WIDTH, NUM_FRAMES, GROUP = 64, 96, 40, 10
DOCS = Path(__file__).resolve().parents[2] / "docs" / "data.md"
BEGIN, END = (
    "<!-- what each decoder is trusted with: python tests/video_matrix.py -->\n",
    "<!-- end -->\n",
)

X264 = {"preset": "ultrafast", "crf": "15", "sc_threshold": "0", "g": str(GROUP)}
MPEG = {"g": str(GROUP), "b": "2000000"}
VPX = {"deadline": "realtime", "cpu-used": "8", "g": str(GROUP), "b": "1000000"}
CODECS: dict[str, tuple[str, str, dict[str, str]]] = {
    "H.264": ("libx264", "yuv420p", {**X264, "bf": "0"}),
    "H.264 with B-frames": ("libx264", "yuv420p", {**X264, "bf": "3", "b_strategy": "0"}),
    "H.264, key frames alone": ("libx264", "yuv420p", {**X264, "g": "1"}),
    "H.264, neighbouring key frames": (
        "libx264",
        "yuv420p",
        {**X264, "bf": "3", "b_strategy": "0", "g": "30"},
    ),
    "H.264, open groups": (
        "libx264",
        "yuv420p",
        {**X264, "bf": "3", "b_strategy": "0", "x264-params": "open-gop=1"},
    ),
    "H.264, refreshed bit by bit": (
        "libx264",
        "yuv420p",
        {**X264, "bf": "0", "x264-params": "intra-refresh=1"},
    ),
    "H.264, stamps of decoding": ("libx264", "yuv420p", {**X264, "bf": "3", "b_strategy": "0"}),
    "H.265": (
        "libx265",
        "yuv420p",
        {"preset": "ultrafast", "x265-params": f"log-level=none:keyint={GROUP}:bframes=0"},
    ),
    "H.265 with B-frames": (
        "libx265",
        "yuv420p",
        {"preset": "ultrafast", "x265-params": f"log-level=none:keyint={GROUP}:bframes=3"},
    ),
    "MPEG-1 with B-frames": ("mpeg1video", "yuv420p", {**MPEG, "bf": "2"}),
    "MPEG-2": ("mpeg2video", "yuv420p", {**MPEG, "bf": "0"}),
    "MPEG-2 with B-frames": ("mpeg2video", "yuv420p", {**MPEG, "bf": "2"}),
    "MPEG-4": ("mpeg4", "yuv420p", {**MPEG, "bf": "0"}),
    "MPEG-4 with B-frames": ("mpeg4", "yuv420p", {**MPEG, "bf": "2"}),
    "MPEG-4, packed B-frames": ("mpeg4", "yuv420p", {**MPEG, "bf": "1"}),
    "VP8": ("libvpx", "yuv420p", VPX),
    "VP9": ("libvpx-vp9", "yuv420p", VPX),
    "AV1": ("libsvtav1", "yuv420p", {"preset": "12", "g": str(GROUP)}),
    "MJPEG": ("mjpeg", "yuvj420p", {"b": "4000000"}),
    "ProRes": ("prores_ks", "yuv422p10le", {}),
    "FFV1": ("ffv1", "yuv420p", {"g": str(GROUP)}),
    "WMV2": ("wmv2", "yuv420p", MPEG),
    "Sorenson H.263": ("flv", "yuv420p", MPEG),
    "GIF": ("gif", "rgb8", {}),
    "raw pictures": ("wrapped_avframe", "yuv420p", {}),
}
H264 = tuple(name for name in CODECS if name.startswith("H.264"))
STORED = tuple(name for name in H264 if name != "H.264, stamps of decoding")
MPEGS = tuple(name for name in CODECS if name.startswith("MPEG") and "packed" not in name)
H265 = ("H.265", "H.265 with B-frames")
CONTAINERS: dict[str, tuple[str, dict[str, str], tuple[str, ...]]] = {
    "mp4": (
        "mp4",
        {},
        (*H264, *H265, *MPEGS, "MPEG-4, packed B-frames", "VP9", "AV1", "MJPEG", "FFV1"),
    ),
    "fragmented mp4": (
        "mp4",
        {"movflags": "frag_keyframe+empty_moov"},
        (*STORED, *H265, *MPEGS, "VP9", "AV1", "MJPEG", "FFV1"),
    ),
    "mov": ("mov", {}, (*H264, *H265, *MPEGS, "MJPEG", "ProRes")),
    "3gp": ("3gp", {}, (*STORED, "MPEG-4", "MPEG-4 with B-frames")),
    "mkv": (
        "matroska",
        {},
        (
            *H264,
            *H265,
            *MPEGS,
            "MPEG-4, packed B-frames",
            "VP8",
            "VP9",
            "AV1",
            "MJPEG",
            "ProRes",
            "FFV1",
        ),
    ),
    "webm": ("webm", {}, ("VP8", "VP9", "AV1")),
    "avi": (
        "avi",
        {},
        (*STORED, *MPEGS, "MPEG-4, packed B-frames", "VP8", "VP9", "MJPEG", "FFV1", "WMV2"),
    ),
    "avi from a pipe": (
        "avi",
        {},
        (*STORED, *MPEGS, "VP8", "MJPEG", "FFV1", "WMV2", "Sorenson H.263"),
    ),
    "wmv": ("asf", {}, (*STORED, *MPEGS, "VP8", "MJPEG", "WMV2")),
    "flv": ("flv", {}, (*H264, *H265, "VP9", "AV1", "Sorenson H.263")),
    "ts": ("mpegts", {}, (*STORED, *H265, *MPEGS)),
    "m2ts": ("mpegts", {"mpegts_m2ts_mode": "1"}, (*STORED, *H265, *MPEGS)),
    "mpg": ("vob", {}, (*STORED, *H265, *MPEGS)),
    "ogv": ("ogg", {}, ("VP8",)),
    "mxf": ("mxf", {}, (*STORED, "MPEG-2", "MPEG-2 with B-frames", "ProRes", "FFV1")),
    "h264": ("h264", {}, STORED),
    "gif": ("gif", {}, ("GIF",)),
    "mjpeg": ("mjpeg", {}, ("MJPEG",)),
    "y4m": ("yuv4mpegpipe", {}, ("raw pictures",)),
}
CASES = [(container, codec) for container, (_, _, codecs) in CONTAINERS.items() for codec in codecs]


class Pipe(io.RawIOBase):
    """A file that is written from its start to its end, as what goes through a pipe."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self.file.write(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def picture(number: int) -> NDArray[np.uint8]:
    """A frame with its number in bars, bright ones for bits that are set, and something that moves
    below.
    """
    frame_HWC = np.full((HEIGHT, WIDTH, 3), 60, np.uint8)
    for bit in range(8):
        frame_HWC[8:40, 12 * bit : 12 * bit + 12] = 220 if number >> bit & 1 else 20
    frame_HWC[44:60, (2 * number) % 80 : (2 * number) % 80 + 16] = (200, 120, 40)
    return frame_HWC


def number_in(frame_HWC: NDArray[np.uint8]) -> int:
    return sum(
        int(frame_HWC[16:32, 12 * bit + 4 : 12 * bit + 8].mean() > 120) << bit for bit in range(8)
    )


def write(path: Path, container: str, codec: str) -> None:
    """Writes a video of NUM_FRAMES frames."""
    form, options, _ = CONTAINERS[container]
    with av.open(
        Pipe(path) if container == "avi from a pipe" else str(path),
        "w",
        format=form,
        options=options,
    ) as output:
        stream, packets = encoded(output, codec)
        if "packed" in codec:
            packets = packed(stream, packets)
        for place, packet in enumerate(packets):
            # as whoever copies a stream that has no others into an mp4
            if codec == "H.264, stamps of decoding":
                packet.pts = packet.dts = place
            output.mux(packet)


def encoded(output: Any, codec: str) -> tuple[Any, list[av.Packet]]:
    name, form, options = CODECS[codec]
    stream = output.add_stream(name, rate=25, options=options)
    stream.width, stream.height, stream.pix_fmt, stream.codec_context.thread_count = (
        WIDTH,
        HEIGHT,
        form,
        1,
    )
    packets = list[av.Packet]()
    for number in range(NUM_FRAMES):
        frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
        if codec == "H.264, neighbouring key frames" and number in (19, 20):
            frame.pict_type = PictureType.I
        packets += stream.encode(frame)
    packets += stream.encode()
    leave_real_time()
    return stream, packets


def leave_real_time() -> None:
    """To be called after an encoding: SVT-AV1 has a thread that encodes for root scheduled before
    all others, and with it every process that it starts from then on.
    """
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def packed(stream: Any, packets: list[av.Packet]) -> list[av.Packet]:
    """MPEG-4 as DivX packs it: a B-frame in the packet of the frame that is shown after it, an
    empty picture in its own.
    """
    note, nothing, picture_code = (
        b"\x00\x00\x01\xb2DivX503b1393p",
        b"\x00\x00\x01\xb6\x50\x4f",
        b"\x00\x00\x01\xb6",
    )
    contents = [bytes(packet) for packet in packets]
    contents[0] = contents[0].replace(picture_code, note + picture_code)
    for place in range(1, len(contents)):
        if contents[place][4] >> 6 == 2 and contents[place].startswith(picture_code):
            contents[place - 1] += contents[place]
            contents[place] = nothing
    made = []
    for place, (content, packet) in enumerate(zip(contents, packets, strict=True)):
        one = av.Packet(content)
        one.stream, one.time_base, one.pts, one.dts, one.is_keyframe = (
            stream,
            Fraction(1, 25),
            place,
            place,
            packet.is_keyframe,
        )
        made.append(one)
    return made


def in_order(path: str) -> list[int]:
    """The numbers in the frames of a file that is read from its start."""
    return [
        number_in(np.asarray(frame.to_ndarray(format="rgb24"), np.uint8))
        for frame in sequential(path)
    ]


def alone(path: str, decoder: str) -> tuple[str, str, list[int]]:
    """(what read a file, why it was not the one asked for, the numbers in its frames), each frame
    asked for as the only one.

    From the last one back, so that each is sought; every tenth in a file that was just opened.
    """
    reading, numbers = Reading(decoder=decoder), list[int]()  # pyright: ignore[reportArgumentType]
    with open_file(path, reading) as (frames, name, fallback):
        # the other one has its own turn
        step = 1 if name == decoder else max(frames.num_frames // 2, 1)
        indices = list(reversed(range(0, frames.num_frames, step)))
    while indices:
        with open_file(path, reading) as (frames, _, _):
            while indices:
                index = indices.pop(0)
                (frame_HWC,) = frames.read(np.array([index]))
                numbers.append(number_in(frame_HWC))
                if index % 10 == 0:
                    break
    return name, fallback, numbers[::-1]


def table(folder: Path) -> str:
    """The table of docs/data.md, from files that are there or else written into a folder."""
    lines = ["| container | codecs | pyav | decord | torchcodec |", "|---|---|---|---|---|"]
    for container in CONTAINERS:
        groups: dict[tuple[str, ...], list[str]] = {}
        for codec in CONTAINERS[container][2]:
            description = describe(str(place(folder, container, codec)))
            seeks = "from the start" if set(description.traits) & {*IN_ORDER} else "seeks"
            trusted = [
                "yes" if name in description.trusted_with else "-"
                for name in ("decord", "torchcodec")
            ]
            groups.setdefault((seeks, *trusted), []).append(codec)
        for verdict, codecs in groups.items():
            lines.append(f"| {container} | {'; '.join(codecs)} | {' | '.join(verdict)} |")
    return "\n".join(lines) + "\n"


def place(folder: Path, container: str, codec: str) -> Path:
    """Where a video is, which is written where there is none."""
    path = folder / f"{container}, {codec}".replace(" ", "_").replace(",", "")
    if not path.exists():
        write(path, container, codec)
    return path


def with_table(text: str, table: str) -> str:
    """A document with the table in its place."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table + END + rest.split(END)[1]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        DOCS.write_text(
            with_table(DOCS.read_text(encoding="utf-8"), table(Path(folder))), encoding="utf-8"
        )
