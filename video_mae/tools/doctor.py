"""`video-mae doctor LIST`: reads every line and every video of a list, says what is wrong with
which, and writes down the good ones.
"""

import os
import re
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from video_mae.config.data import ReadConfig
from video_mae.config.schema import knob, require, section
from video_mae.data.annotations import class_names, file_mistake, read_annotations, read_entries
from video_mae.data.shards import is_packed
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
from video_mae.decoding.inspection import Description, count_frames, describe, sha256
from video_mae.decoding.isolation import KilledError, decoder_process
from video_mae.decoding.media import MAX_CLIP_BYTES, Member
from video_mae.decoding.packets import ALL_KEYS, DECODING_ORDER, LATE_START, MIRRORED, NO_STAMPS
from video_mae.tools.doctor_report import Case, Finding, Report

GOOD, BAD, INTERRUPTED = 0, 1, 130
SLOW_SEEK = 64
"""Frames from one key frame to the next above which packing pays: half of them are decoded in vain
for a clip; packed ones have 16.
"""
SLOWEST_READ = 1e7  # bytes a second of a disk that works
SLOWEST_DECODE = 10  # frames a second, likewise
# as pyav, decord and torchcodec say it
NO_STREAM = re.compile("no video stream|find video stream|No valid stream")
TRAITS = {
    EDIT_LIST: Finding.EDIT_LIST,
    PACKED_B_FRAMES: Finding.PACKED_B_FRAMES,
    NO_INDEX: Finding.NO_INDEX,
    ASF: Finding.ASF,
    **dict.fromkeys((NO_STAMPS, DECODING_ORDER, LATE_START, ALL_KEYS), Finding.NO_ORDER),
    MIRRORED: Finding.MIRRORED,
}


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """`video-mae doctor LIST key=value ...`: exit status 0 where all is good, 1 where something is
    bad, 2 for a mistake in the command.
    """

    check: Literal["quick", "full"] = knob(
        "quick",
        "quick: the first, the middle and the last frame are decoded, each by a jump; full: "
        "also all of them in order, and counted",
    )
    num_frames: int = knob(16, "frames of a clip, data.stride apart: what is shorter is told")
    num_workers: int | None = knob(None, "processes that decode; null: as many as there are cores")
    worst: int = knob(10, "how many bad files the console names; videos.jsonl has all")
    output: str = knob(
        "",
        "folder for videos.jsonl, summary.json and clean.txt; empty: LIST_doctor beside the list",
    )
    data: ReadConfig = section(ReadConfig, "how the files are read; their list is LIST")

    def __post_init__(self) -> None:
        for name, least in (("num_frames", 1), ("worst", 0)):
            require(
                getattr(self, name) >= least, name, getattr(self, name), f"must be at least {least}"
            )
        require(
            self.num_workers is None or self.num_workers >= 1,
            "num_workers",
            self.num_workers,
            "must be at least 1, or null",
        )
        require(
            self.data.source == "",
            "data.source",
            self.data.source,
            "is not read: LIST is the word after doctor",
        )


def start(source: str, config: DoctorConfig) -> Callable[[], int]:
    """The stage as the command line starts it. Raises: ValueError or FileNotFoundError where there
    is no list, no such decoder.
    """
    cases, notes = _cases(source, config.data)
    if not cases:
        raise ValueError(f"{source}: the list is empty, write lines `PATH LABEL` into it")
    output = config.output or _beside(source)
    config = replace(
        config,
        output=output,
        data=replace(config.data, source="", decoder=resolve_decoder(config.data.decoder)),
    )
    return lambda: run(source, cases, config, notes)


def run(source: str, cases: Sequence[Case], config: DoctorConfig, notes: Sequence[str] = ()) -> int:
    """Examines all, prints the report and writes its files. Returns the exit status: 0, or 1 where
    something is bad.
    """
    _compare_paths(cases)
    try:
        _examine_all(cases, config)
    except KeyboardInterrupt:
        print("video-mae doctor: interrupted, nothing is written", file=sys.stderr, flush=True)
        return INTERRUPTED
    _compare_contents(cases)
    _compare_labels(cases)
    report = Report(
        source,
        config.data,
        config.check,
        config.num_frames,
        cases,
        class_names(replace(config.data, source=source)),
        notes,
    )
    print(report.text(report.write(Path(config.output)), config.worst), flush=True)
    return BAD if report.bad else GOOD


def _beside(source: str) -> str:
    if "://" in source:
        raise ValueError(
            "output: (empty), name a folder for what is found, there is none beside a URL"
        )
    path = Path(source).absolute()
    return str(path.with_name(f"{path.name if path.is_dir() else path.stem}_doctor"))


def _cases(source: str, data: ReadConfig) -> tuple[list[Case], tuple[str, ...]]:
    """The lines of a list, the files of a folder of classes, or the videos of a packed folder; and
    what is to be told about them.
    """
    data = replace(data, source=source)
    if is_packed(source):
        return [
            Case(number, path, info["label"])
            for number, (path, info) in enumerate(read_annotations(data), start=1)
        ], ()
    entries, notes = read_entries(data)
    return [Case(*entry, [Finding.BAD_LINE] if entry.mistake else []) for entry in entries], notes


def _examine_all(cases: Sequence[Case], config: DoctorConfig) -> None:
    """Each thread has a process that decodes; they take turns at the cases."""
    turns, lock, stop = count(), threading.Lock(), threading.Event()
    reading = Reading.of(config.data)
    num_workers = min(config.num_workers or len(os.sched_getaffinity(0)), len(cases))

    def work() -> None:
        try:
            while not stop.is_set():
                with lock:
                    turn = next(turns)
                if turn >= len(cases):
                    return
                _examine(cases[turn], reading, config)
                with lock:
                    progress.update()
                    bad[0] += cases[turn].is_bad
                    progress.set_postfix(bad=bad[0], refresh=False)
        finally:
            decoder_process().close()

    bad = [0]
    with (
        tqdm(total=len(cases), unit="video", disable=None) as progress,
        ThreadPoolExecutor(num_workers) as pool,
    ):
        workers = [pool.submit(work) for _ in range(num_workers)]
        try:
            for worker in workers:
                worker.result()
        finally:
            stop.set()


def _examine(case: Case, reading: Reading, config: DoctorConfig) -> None:
    if Finding.BAD_LINE in case.findings or Finding.AGAIN in case.findings:
        return
    if isinstance(case.path, str):
        _, mistake = file_mistake(case.path, case.label)
        if mistake:
            case.add(Finding.NO_FILE, mistake)
            return
    with suppress(OSError):  # it may be gone by now: the decoder will say so
        case.num_bytes = (
            case.path.size if isinstance(case.path, Member) else os.path.getsize(case.path)
        )
    case.sha256 = _ask(sha256, case.path, reading.seconds + case.num_bytes / SLOWEST_READ, 0)
    description = (
        _ask(describe, case.path, reading.seconds, reading.memory_gb)
        if is_video(case.path)
        else None
    )
    case.description = description
    try:
        _read(case, reading, config)
    except VideoDecodeError as error:
        case.decoder = error.decoder
        case.add(
            Finding.NO_PICTURES if NO_STREAM.search(error.reason) else Finding.UNREADABLE,
            error.reason,
        )
    if isinstance(description, Description):
        _judge(case, description, reading.decoder)


def _read(case: Case, reading: Reading, config: DoctorConfig) -> None:
    """Reads frames as a run would. Raises: VideoDecodeError."""
    try:
        found = read_clip(case.path, first_middle_last, reading)
    except VideoDecodeError:
        with suppress(VideoDecodeError):  # it may open all the same
            case.num_frames = len(times_and_start(case.path, reading)[0])
        raise
    case.num_frames = found.num_frames
    case.decoder, case.fallback = found.decoder, found.fallback
    frame_HWC = found.clip_THWC[0]
    case.height, case.width = frame_HWC.shape[:2]
    if frame_HWC.nbytes * min(config.num_frames, case.num_frames) > MAX_CLIP_BYTES:
        raise VideoDecodeError(
            str(case.path),
            found.decoder,
            f"{config.num_frames} frames of {case.width} x {case.height} pixels are more than 2 GB",
        )
    if is_video(case.path) and case.num_frames < (config.num_frames - 1) * config.data.stride + 1:
        case.add(Finding.SHORT)
    if config.check == "quick":
        return
    case.decoded_frames = 0
    for _ in stream(case.path, np.arange, reading):
        case.decoded_frames += 1
    if is_video(case.path):
        num_frames = _ask(
            count_frames,
            case.path,
            reading.seconds + case.num_frames / SLOWEST_DECODE,
            reading.memory_gb,
        )
        if isinstance(num_frames, int) and num_frames != case.num_frames:
            case.decoded_frames = num_frames
            raise VideoDecodeError(
                str(case.path),
                found.decoder,
                f"{num_frames} frames come out in order, not {case.num_frames}",
            )


def _judge(case: Case, description: Description, decoder: str) -> None:
    known = list(dict.fromkeys(TRAITS[trait] for trait in description.traits if trait in TRAITS))
    # of packed B-frames and the like, which say more
    if len(known) > 1 and Finding.NO_ORDER in known:
        known.remove(Finding.NO_ORDER)
    if description.codec == "hevc":
        known.append(Finding.HEVC)
    if case.fallback and decoder in description.trusted_with:
        known.append(Finding.OTHER_DECODER)
    elif case.fallback and not known:
        known.append(Finding.NOT_TRUSTED)
    for finding in known:
        case.add(finding)
    if description.key_frame_distance > SLOW_SEEK:
        case.add(Finding.SLOW_SEEK)
    if not description.constant_rate:
        case.add(Finding.VARIABLE_RATE)
    if (
        case.num_frames
        and description.header_frames
        and description.header_frames != case.num_frames
    ):
        case.add(Finding.OTHER_COUNT)


def _ask(function: Any, path: Place, seconds: float, memory_gb: float) -> Any:
    """What the function says of a file there; None where it cannot: reading the frames will tell
    why.
    """
    try:
        return decoder_process().call(function, path, seconds=seconds, memory_gb=memory_gb)
    except KilledError:
        return None
    except Exception:  # FFmpeg's, the disk's, those of a container that is none
        return None


def _compare_paths(cases: Sequence[Case]) -> None:
    """A path is good once; with two labels it is not good at all. Paths are compared as they are
    written.
    """
    same: defaultdict[str, list[Case]] = defaultdict(list)
    for case in cases:
        if not case.is_bad:
            same[str(case.path)].append(case)
    for group in same.values():
        if len({case.label for case in group}) > 1:
            for case in group:
                case.add(Finding.TWO_LABELS, f"is named with the labels {_listed(group)}")
        else:
            for case in group[1:]:
                case.add(Finding.AGAIN, f"is in line {group[0].number} as well")


def _compare_contents(cases: Sequence[Case]) -> None:
    """Files of the same bytes may be there twice, with one label."""
    same: defaultdict[str, list[Case]] = defaultdict(list)
    for case in cases:
        if case.sha256 and not case.is_bad:
            same[case.sha256].append(case)
    for group in same.values():
        if len({case.label for case in group}) > 1:
            for case in group:
                other = next(other for other in group if other.label != case.label)
                case.add(
                    Finding.TWO_LABELS,
                    f"has the same content as {other.path}, labels {_listed(group)}",
                )
        else:
            for case in group[1:]:
                case.add(Finding.SAME_CONTENT)


def _compare_labels(cases: Sequence[Case]) -> None:
    """Where one has a label, all must."""
    if any(case.label >= 0 for case in cases):
        for case in cases:
            if case.label == -1 and not case.is_bad:
                case.add(Finding.NO_LABEL, "has no label, others have")
    for case in cases:
        if case.label < -1:
            case.add(
                Finding.NEGATIVE_LABEL, f"has the label {case.label}, number the classes from 0"
            )


def _listed(group: Sequence[Case]) -> str:
    return ", ".join(str(label) for label in sorted({case.label for case in group}))
