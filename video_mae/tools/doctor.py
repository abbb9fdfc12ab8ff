"""`video-mae doctor LIST`: reads every line and every video of a list, says what is wrong with
which, and writes down the good ones.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from video_mae.config.data import SourceConfig
from video_mae.config.tools import DoctorConfig
from video_mae.data.paths import file_mistake
from video_mae.data.videos import read_lines
from video_mae.decoding import (
    Place,
    Reading,
    VideoDecodeError,
    is_video,
    read_clip,
    resolve_decoder,
    stream,
    times_and_start,
)
from video_mae.decoding.choices import first_middle_last
from video_mae.decoding.containers import ASF, EDIT_LIST, NO_INDEX, PACKED_B_FRAMES
from video_mae.decoding.inspection import count_frames, describe, sha256
from video_mae.decoding.isolation import decoder_process, in_order
from video_mae.decoding.media import MAX_CLIP_BYTES, Member
from video_mae.decoding.packets import ALL_KEYS, DECODING_ORDER, LATE_START, MIRRORED, NO_STAMPS
from video_mae.files import say, unicode_text
from video_mae.progress_bar import ProgressBar
from video_mae.tools.doctor_report import Examined, report, summarize, write

GOOD, BAD = 0, 1
SLOW_SEEK = 64
"""Frames from one key frame to the next above which packing pays: half of them are decoded in vain
for a clip; packed ones have 16.
"""
SLOWEST_READ = 1e7  # bytes a second of a disk that works
SLOWEST_DECODE = 10  # frames a second, likewise
# as pyav, decord and torchcodec say it
NO_STREAM = re.compile("no video stream|find video stream|No valid stream")
TRAITS = {
    EDIT_LIST: "edit_list",
    PACKED_B_FRAMES: "packed_b_frames",
    NO_INDEX: "no_index",
    ASF: "asf",
    **dict.fromkeys((NO_STAMPS, DECODING_ORDER, LATE_START, ALL_KEYS), "no_order"),
    MIRRORED: "mirrored",
}


def start(source: str, config: DoctorConfig) -> Callable[[], int]:
    """The stage as the command line starts it. Raises: ValueError or FileNotFoundError where there
    is no list, no such decoder.
    """
    return Doctor(source, config).run


class Doctor:
    """The examination of a list, which `run` does."""

    def __init__(self, source: str, config: DoctorConfig) -> None:
        """Reads the lines of a list, the files of a folder of classes, or the videos of a packed
        folder. Raises: as `start`.
        """
        self.source, self.config, read = source, config, config.data
        data = SourceConfig(source=source, root=read.root, list_format=read.list_format)
        lines, self.notes, self.names = read_lines(data)
        self.lines = [
            Examined(*line, findings=["bad_line"] if line.mistake else []) for line in lines
        ]
        self.folder = Path(config.output)
        if not config.output:
            if "://" in source:
                raise ValueError(
                    "output: (empty), name a folder for what is found, there is none beside a URL"
                )
            path = Path(source).absolute()
            self.folder = path.with_name(f"{path.name if path.is_dir() else path.stem}_doctor")
        self.decoder = resolve_decoder(read.decoder)
        self.reading = Reading.of(replace(read, decoder=self.decoder))

    def run(self) -> int:
        """Examines all, prints the report and writes its files. Returns the exit status: 0, or 1
        where something is bad.
        """
        lines, config = self.lines, self.config
        self._compare("again", by_path=True)
        num_workers = min(config.num_workers or len(os.sched_getaffinity(0)), len(lines))
        bad = 0
        with (
            ProgressBar(len(lines)) as progress,
            closing(in_order(self._examine, lines, num_workers)) as examined,
        ):
            for line in examined:
                bad += line.is_bad
                progress.set_postfix(bad=bad, refresh=False)
                progress.update()
        self._compare("same_content", by_path=False)
        self._check_labels_and_names()
        summary = summarize(self.source, self.notes, config.check, self.decoder, lines)
        clean = write(self.folder, summary, lines, self.names)
        for text in report(summary, lines, clean, config.worst).split("\n"):
            say(text)
        return BAD if summary["bad"] else GOOD

    def _compare(self, again: str, *, by_path: bool) -> None:
        """A video is good once; with two labels it is not good at all. Compared are paths, as they
        are written, or contents.
        """
        same = defaultdict[str, list[Examined]](list)
        for line in self.lines:
            key = str(line.path) if by_path else line.sha256
            if key and not line.is_bad:
                same[key].append(line)
        for group in same.values():
            labels = sorted({line.label for line in group})
            for line in group:
                if len(labels) > 1:
                    other = next(other for other in group if other.label != line.label)
                    twin = "is named" if by_path else f"is the same as {other.path}"
                    told = ", ".join(map(str, labels))
                    line.add("two_labels", f"{twin} with the labels {told}")
                elif line is not group[0]:
                    line.add(again, f"is in line {group[0].number} as well" if by_path else "")

    def _check_labels_and_names(self) -> None:
        """Where one has a label, all must; the clean list must be able to hold each."""
        has_labels = any(line.label >= 0 for line in self.lines)
        for line in self.lines:
            if has_labels and line.label == -1 and not line.is_bad:
                line.add("no_label", "has no label, others have")
            if line.label < -1:
                line.add("negative_label", f"has the label {line.label}, number the classes from 0")
            if isinstance(line.path, str) and not line.is_bad:
                is_unicode = unicode_text(line.path) == line.path
                if not is_unicode or "\n" in line.path or "\r" in line.path:
                    line.add("no_name", "has a line break, or is not UTF-8; rename it")

    def _examine(self, line: Examined) -> Examined:
        reading = self.reading
        if not {"bad_line", "again"}.isdisjoint(line.findings):
            return line
        if isinstance(line.path, str):
            _, mistake = file_mistake(line.path, line.label)
            if mistake:
                line.add("no_file", mistake.replace(" or root", " or data.root"))
                return line
        with suppress(OSError):  # it may be gone by now: the decoder will say so
            line.num_bytes = (
                line.path.size if isinstance(line.path, Member) else os.path.getsize(line.path)
            )
        line.sha256 = _ask(sha256, line.path, reading.seconds + line.num_bytes / SLOWEST_READ, 0)
        if is_video(line.path):
            line.description = _ask(describe, line.path, reading.seconds, reading.memory_gb)
        try:
            self._read(line)
        except VideoDecodeError as error:
            line.decoder = error.decoder
            has_no_stream = NO_STREAM.search(error.reason)
            line.add("no_pictures" if has_no_stream else "unreadable", error.reason)
        self._judge(line)
        return line

    def _read(self, line: Examined) -> None:
        """Reads frames as a run would. Raises: VideoDecodeError."""
        config, reading = self.config, self.reading

        def refuse(reason: str) -> VideoDecodeError:
            return VideoDecodeError(str(line.path), line.decoder, reason)

        try:
            found = read_clip(line.path, first_middle_last, reading)
        except VideoDecodeError:
            with suppress(VideoDecodeError):  # it may open all the same
                line.num_frames = len(times_and_start(line.path, reading)[0])
            raise
        line.num_frames = found.num_frames
        line.decoder, line.fallback = found.decoder, found.fallback
        frame_HWC = found.clip_THWC[0]
        line.height, line.width = frame_HWC.shape[:2]
        if frame_HWC.nbytes * min(config.num_frames, line.num_frames) > MAX_CLIP_BYTES:
            raise refuse(
                f"{config.num_frames} frames of {line.width} x {line.height} pixels are more than "
                "2 GB"
            )
        if (
            is_video(line.path)
            and line.num_frames < (config.num_frames - 1) * config.data.stride + 1
        ):
            line.add("short")
        if config.check == "quick":
            return
        for _ in stream(line.path, np.arange, reading):
            line.decoded_frames += 1
        if is_video(line.path):
            seconds = reading.seconds + line.num_frames / SLOWEST_DECODE
            num_frames = _ask(count_frames, line.path, seconds, reading.memory_gb)
            if num_frames not in (None, line.num_frames):
                line.decoded_frames = num_frames
                raise refuse(f"{num_frames} frames come out in order, not {line.num_frames}")

    def _judge(self, line: Examined) -> None:
        d = line.description
        if d is None:
            return
        known = list(dict.fromkeys(TRAITS[trait] for trait in d.traits if trait in TRAITS))
        # of packed B-frames and the like, which say more
        if len(known) > 1 and "no_order" in known:
            known.remove("no_order")
        if d.codec == "hevc":
            known.append("hevc")
        is_trusted = self.decoder in d.trusted_with
        checks = {
            "other_decoder": line.fallback and is_trusted,
            "not_trusted": line.fallback and not is_trusted and not known,
            "slow_seek": d.key_frame_distance > SLOW_SEEK,
            "variable_rate": not d.constant_rate,
            "other_count": line.num_frames and d.header_frames not in (0, line.num_frames),
        }
        for finding in (*known, *(finding for finding, is_so in checks.items() if is_so)):
            line.add(finding)


def _ask(function: Callable[..., Any], path: Place, seconds: float, memory_gb: float) -> Any:
    """What the function says of a file there; None where it cannot: reading the frames will tell
    why.
    """
    # the end of its process; FFmpeg's, the disk's, those of a container that is none
    with suppress(Exception):
        return decoder_process().call(function, path, seconds=seconds, memory_gb=memory_gb)
