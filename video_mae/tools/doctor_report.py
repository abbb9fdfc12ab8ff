"""What `video-mae doctor` found: a case for each line, a table of all of them, and the files."""

import os
import shlex
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from statistics import median
from typing import Any

from video_mae.config.data import ReadConfig
from video_mae.data.lists import format_line
from video_mae.data.paths import printable
from video_mae.data.videos import CLASS_FILE, class_file, place
from video_mae.decoding import Member, Place
from video_mae.decoding.inspection import Description
from video_mae.files import json_text, write_whole

VIDEOS_FILE, SUMMARY_FILE, CLEAN_FILE = "videos.jsonl", "summary.json", "clean.txt"
WIDTH = 118


class Finding(Enum):
    """What may be said of a case: whether it is bad, so that the clean list leaves it out, and
    words for the table.
    """

    BAD_LINE = True, "the line cannot be read"
    NO_FILE = True, "no such regular file"
    NO_PICTURES = True, "no video in it, sound only"
    UNREADABLE = True, "cannot be decoded"
    TWO_LABELS = True, "the same video with two labels"
    AGAIN = True, "named again"
    NO_LABEL = True, "without a label, others have one"
    NEGATIVE_LABEL = True, "a label below 0"
    NO_NAME = True, "a name that no list can hold"
    OTHER_DECODER = False, "the run's decoder cannot open it, another does"
    NOT_TRUSTED = False, "of a kind that the run's decoder would read wrongly, another reads it"
    EDIT_LIST = (
        False,
        "an edit list hides frames: decord and torchcodec would read it wrongly, and leave it to pyav",
    )
    PACKED_B_FRAMES = False, "packed B-frames (DivX): must be decoded from its start for each clip"
    NO_INDEX = (
        False,
        "no index of its frames (MPEG streams, Ogg, piped AVI ...): must be decoded from its start for each clip",
    )
    ASF = False, "ASF (WMV): must be decoded from its start for each clip"
    NO_ORDER = (
        False,
        "time stamps or key frames that are not what they say: must be decoded from its start for each clip",
    )
    MIRRORED = (
        False,
        "a mirrored or slanted picture: decord and torchcodec would show it wrongly, and leave it to pyav",
    )
    HEVC = False, "H.265: decord would read it wrongly, and leaves it to others"
    SLOW_SEEK = False, "key frames far apart: most of what is decoded for a clip is thrown away"
    SAME_CONTENT = False, "the same content as another file"
    SHORT = False, "shorter than a clip: its last frame is repeated"
    VARIABLE_RATE = False, "a variable frame rate: a clip's frames are not evenly spaced in time"
    OTHER_COUNT = False, "has another number of frames than its header says"

    @property
    def is_bad(self) -> bool:
        return self.value[0]

    @property
    def words(self) -> str:
        return self.value[1]


CURED_BY_PACKING = (
    Finding.EDIT_LIST,
    Finding.PACKED_B_FRAMES,
    Finding.NO_INDEX,
    Finding.ASF,
    Finding.NO_ORDER,
    Finding.MIRRORED,
    Finding.HEVC,
    Finding.SLOW_SEEK,
    Finding.OTHER_DECODER,
    Finding.NOT_TRUSTED,
)


@dataclass
class Case:
    """A line of the list, and what was found; 0 and "" where that is not known. decoded_frames:
    those of check=full.
    """

    number: int
    path: Place
    label: int
    reason: str = ""
    findings: list[Finding] = field(default_factory=list)
    decoder: str = ""
    fallback: str = ""
    num_frames: int = 0
    decoded_frames: int = 0
    height: int = 0
    width: int = 0
    num_bytes: int = 0
    sha256: str | None = None
    description: Description | None = None

    @property
    def is_bad(self) -> bool:
        return any(finding.is_bad for finding in self.findings)

    def add(self, finding: Finding, reason: str = "") -> None:
        """Notes a finding; the first reason of a case is kept."""
        self.findings.append(finding)
        self.reason = self.reason or reason

    def as_row(self) -> dict[str, Any]:
        """What videos.jsonl says of it."""
        row = {
            **vars(self),
            "path": str(self.path),
            "findings": [finding.name.lower() for finding in self.findings],
            **(asdict(self.description) if self.description else {}),
        }
        return {
            "line": row.pop("number"),
            "good": not self.is_bad,
            **{key: value for key, value in row.items() if key != "description"},
        }


class Report:
    """All cases of a list."""

    def __init__(
        self,
        source: str,
        data: ReadConfig,
        check: str,
        num_frames: int,
        cases: Sequence[Case],
        names: Sequence[str],
        notes: Sequence[str] = (),
    ) -> None:
        self.notes = notes
        self.source, self.data, self.check, self.num_frames, self.cases, self.names = (
            source,
            data,
            check,
            num_frames,
            cases,
            names,
        )
        for case in cases:
            if not case.is_bad and isinstance(case.path, str) and not _can_be_listed(case.path):
                case.add(Finding.NO_NAME, "has a line break, or is not UTF-8; rename it")
        self.bad = [case for case in cases if case.is_bad]
        self.good = [case for case in cases if not case.is_bad]
        self.labels = Counter(case.label for case in self.good if case.label >= 0)
        self.missing = [
            label for label in range(max(self.labels, default=-1) + 1) if label not in self.labels
        ]

    def write(self, folder: Path) -> Path | None:
        """Writes videos.jsonl, summary.json and, of what is no packed folder, clean.txt; returns
        the latter's path.
        """
        folder.mkdir(parents=True, exist_ok=True)
        _write_lines(folder / VIDEOS_FILE, (json_text(case.as_row()) for case in self.cases))
        _write_lines(folder / SUMMARY_FILE, [json_text(self.summary(), indent=2)])
        if any(isinstance(case.path, Member) for case in self.cases):
            return None
        _write_lines(
            folder / CLEAN_FILE,
            (
                format_line(self._path_from(folder, str(case.path)), case.label)
                for case in self.good
            ),
        )
        beside = Path(self.source).parent / CLASS_FILE
        if self.names:
            _write_lines(folder / CLASS_FILE, self.names)
        elif beside.is_file() and Path(self.source).is_file():
            _write_lines(folder / CLASS_FILE, class_file(Path(self.source)))
        return folder / CLEAN_FILE

    def _path_from(self, folder: Path, path: str) -> str:
        """Of a file beside or below the list relative to where the clean list lies; else whole, so
        that data.root does not matter.
        """
        whole = os.path.join(os.getcwd(), path)
        if (
            Path(self.source).is_file()
            and not self.data.root
            and not os.path.relpath(path, Path(self.source).parent).startswith(os.pardir)
        ):
            relative = os.path.relpath(path, folder)
            with suppress(OSError):
                # `..` after a link leads elsewhere than its name says
                if os.path.samefile(folder / relative, path):
                    return relative
        return whole

    def summary(self) -> dict[str, Any]:
        """What summary.json says."""
        return {
            "source": self.source,
            "notes": list(self.notes),
            "check": self.check,
            "decoder": self.data.decoder,
            "files": len(self.cases),
            "good": len(self.good),
            "bad": len(self.bad),
            "findings": {
                finding.name.lower(): {
                    "files": len(found),
                    "bad": finding.is_bad,
                    "meaning": finding.words,
                    "example": str(found[0].path),
                }
                for finding, found in self._found()
            },
            "distributions": {
                name: dict(zip(("min", "median", "max"), values, strict=True))
                for name, values in self._distributions()
            },
            "kinds": dict(self._kinds()),
            "decoders": dict(Counter(case.decoder for case in self.good)),
            "labels": {
                "classes": len(self.labels),
                "missing": self.missing,
                "files": {str(label): self.labels[label] for label in sorted(self.labels)},
            },
        }

    def text(self, clean: Path | None, worst: int) -> str:
        """The report for a reader; `clean` is the list that was written."""
        lines = [
            f"{printable(self.source)}: {len(self.cases)} files, {len(self.good)} good, {len(self.bad)} bad "
            f"({self.check} check, decoder {self.data.decoder})",
            *(f"  {note}" for note in self.notes),
        ]
        found = self._found()
        if found:
            width = max(len(finding.words) for finding, _ in found)
            lines += [
                "",
                *(
                    f"  {'bad ' if finding.is_bad else 'note'} {len(cases):>8}  {finding.words:<{width}}  "
                    f"such as {self._name(cases[0])}"
                    for finding, cases in found
                ),
            ]
        lines += ["", f"  {'':<24}{'min':>12}{'median':>12}{'max':>12}"]
        lines += [
            f"  {name:<24}"
            + "".join(f"{value:>12,.4g}" if value < 1e4 else f"{value:>12,.0f}" for value in values)
            for name, values in self._distributions()
        ]
        lines += ["", *(f"  {line}" for line in self._about_kinds_and_labels())]
        if self.bad and worst:
            lines += [
                "",
                "bad files:",
                *(f"  {self._name(case)}: {case.reason}" for case in self.bad[:worst]),
            ]
            if len(self.bad) > worst:
                lines.append(f"  and {len(self.bad) - worst} more in {VIDEOS_FILE}")
        return "\n".join([*lines, *self._advice(clean)])

    def _found(self) -> list[tuple[Finding, list[Case]]]:
        return [
            (finding, found)
            for finding in Finding
            if (found := [case for case in self.cases if finding in case.findings])
        ]

    def _distributions(self) -> list[tuple[str, tuple[float, float, float]]]:
        readable = [case for case in self.cases if case.num_frames and case.height]
        described = [case.description for case in readable if case.description]
        columns: dict[str, list[float]] = {
            "frames": [case.num_frames for case in readable],
            "height": [case.height for case in readable],
            "width": [case.width for case in readable],
            "frames a second": [d.fps for d in described],
            "seconds": [d.seconds for d in described],
            "key frame every": [d.key_frame_distance for d in described],
            "MB": [case.num_bytes / 1e6 for case in readable],
        }
        return [
            (name, (min(values), float(median(values)), max(values)))
            for name, values in columns.items()
            if values
        ]

    def _kinds(self) -> list[tuple[str, int]]:
        return Counter(
            f"{d.codec} in {d.container}"
            + (f", {d.bits} bits" if d.bits > 8 else "")
            + (", turned" if d.rotation else "")
            + (", mirrored" if d.mirrored else "")
            for case in self.cases
            if (d := case.description)
        ).most_common()

    def _about_kinds_and_labels(self) -> list[str]:
        kinds = "; ".join(f"{count} {kind}" for kind, count in self._kinds())
        lines = textwrap.wrap(f"kinds: {kinds}", WIDTH, subsequent_indent="  ") if kinds else []
        if not self.labels:
            return [*lines, "labels: none"]
        counts = self.labels.values()
        lines.append(
            f"labels: {len(self.labels)} classes, {min(self.labels)} to {max(self.labels)}, of {min(counts)} to {max(counts)} "
            f"good files, median {median(counts):g}"
        )
        if self.missing:
            few = ", ".join(str(label) for label in self.missing[:8]) + (
                ", ..." if len(self.missing) > 8 else ""
            )
            lines.append(
                f"labels without a good file: {few}"
                + ("; classes are counted from 0" if min(self.labels) > 0 else "")
            )
        return lines

    def _advice(self, clean: Path | None) -> list[str]:
        lines = []
        if any(finding in CURED_BY_PACKING for finding, _ in self._found()) and clean:
            packed = Path(self.source).absolute().with_name(f"{Path(self.source).stem}_packed")
            lines.append(
                "packing makes all of these exact and fast to read (key frames every 16, short side 224):\n"
                f"  video-mae pack {shlex.quote(str(clean))} {shlex.quote(str(packed))}"
            )
        if clean and self.good:
            lines.append(f"the good files, for data.source and every other LIST:\n  {clean}")
        return ["", *lines] if lines else []

    def _name(self, case: Case) -> str:
        return f"{place(self.source, case.number)} {printable(os.path.basename(str(case.path)))}".rstrip()


def _can_be_listed(path: str) -> bool:
    return (
        "\n" not in path
        and "\r" not in path
        and not any("\ud800" <= letter <= "\udfff" for letter in path)
    )


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    def write(unfinished: Path) -> None:
        with unfinished.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)

    write_whole(path, write)
