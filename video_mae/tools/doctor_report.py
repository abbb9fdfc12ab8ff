"""What `video-mae doctor` found: a row for each line of the list, a summary, a clean list."""

import os
import shlex
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from video_mae.data.lists import format_line
from video_mae.data.paths import printable
from video_mae.data.videos import CLASS_FILE, place
from video_mae.decoding import Member, Place
from video_mae.decoding.inspection import Description
from video_mae.files import json_text, write_json, write_text

VIDEOS_FILE, SUMMARY_FILE, CLEAN_FILE = "videos.jsonl", "summary.json", "clean.txt"
WIDTH = 118
FEW = 8  # missing labels that are told

BAD = {
    "bad_line": "the line cannot be read",
    "no_file": "no such regular file",
    "no_pictures": "no video in it, sound only",
    "unreadable": "cannot be decoded",
    "two_labels": "the same video with two labels",
    "again": "named again",
    "no_label": "without a label, others have one",
    "negative_label": "a label below 0",
    "no_name": "a name that no list can hold",
}
"""Findings for which the clean list leaves a file out, and words for the table."""
CURED_BY_PACKING = {
    "other_decoder": "the run's decoder cannot open it, another does",
    "not_trusted": "of a kind that the run's decoder would read wrongly, another reads it",
    "edit_list": "an edit list hides frames: decord and torchcodec would read it wrongly, and "
    "leave it to pyav",
    "packed_b_frames": "packed B-frames (DivX): must be decoded from its start for each clip",
    "no_index": "no index of its frames (MPEG streams, Ogg, piped AVI ...): must be decoded from "
    "its start for each clip",
    "asf": "ASF (WMV): must be decoded from its start for each clip",
    "no_order": "time stamps or key frames that are not what they say: must be decoded from its "
    "start for each clip",
    "mirrored": "a mirrored or slanted picture: decord and torchcodec would show it wrongly, and "
    "leave it to pyav",
    "hevc": "H.265: decord would read it wrongly, and leaves it to others",
    "slow_seek": "key frames far apart: most of what is decoded for a clip is thrown away",
}
FINDINGS = {
    **BAD,
    **CURED_BY_PACKING,
    "same_content": "the same content as another file",
    "short": "shorter than a clip: its last frame is repeated",
    "variable_rate": "a variable frame rate: a clip's frames are not evenly spaced in time",
    "other_count": "has another number of frames than its header says",
}


@dataclass
class Examined:
    """A line of the list, and what was found; 0 and "" where that is not known. decoded_frames:
    those of check=full.
    """

    number: int
    path: Place
    label: int
    reason: str = ""
    findings: list[str] = field(default_factory=list)
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
        return not BAD.keys().isdisjoint(self.findings)

    def add(self, finding: str, reason: str = "") -> None:
        """Notes one of FINDINGS; the first reason of a file is kept."""
        assert finding in FINDINGS
        self.findings.append(finding)
        self.reason = self.reason or reason

    def as_row(self) -> dict[str, Any]:
        """What videos.jsonl says of it."""
        row = {"line": self.number, "good": not self.is_bad, **vars(self), "path": str(self.path)}
        del row["number"], row["description"]
        return {**row, **(asdict(self.description) if self.description else {})}


def summarize(
    source: str, notes: Sequence[str], check: str, decoder: str, lines: Sequence[Examined]
) -> dict[str, Any]:
    """What summary.json says."""
    good = [line for line in lines if not line.is_bad]
    findings = {}
    for name, meaning in FINDINGS.items():
        found = [line for line in lines if name in line.findings]
        if found:
            findings[name] = {
                "files": len(found),
                "bad": name in BAD,
                "meaning": meaning,
                "example": str(found[0].path),
            }
    readable = [line for line in lines if line.num_frames and line.height]
    described = [line.description for line in readable if line.description]
    columns: dict[str, list[float]] = {
        "frames": [line.num_frames for line in readable],
        "height": [line.height for line in readable],
        "width": [line.width for line in readable],
        "frames a second": [d.fps for d in described],
        "seconds": [d.seconds for d in described],
        "key frame every": [d.key_frame_distance for d in described],
        "MB": [line.num_bytes / 1e6 for line in readable],
    }
    kinds = Counter(_kind(line.description) for line in lines if line.description)
    labels = Counter(line.label for line in good if line.label >= 0)
    return {
        "source": source,
        "notes": list(notes),
        "check": check,
        "decoder": decoder,
        "files": len(lines),
        "good": len(good),
        "bad": len(lines) - len(good),
        "findings": findings,
        "distributions": {
            name: {"min": min(values), "median": float(median(values)), "max": max(values)}
            for name, values in columns.items()
            if values
        },
        "kinds": dict(kinds.most_common()),
        "decoders": dict(Counter(line.decoder for line in good)),
        "labels": {
            "classes": len(labels),
            "missing": sorted(set(range(max(labels, default=0))) - labels.keys()),
            "files": {str(label): labels[label] for label in sorted(labels)},
        },
    }


def _kind(d: Description) -> str:
    kind = f"{d.codec} in {d.container}"
    if d.bits > 8:
        kind += f", {d.bits} bits"
    if d.rotation:
        kind += ", turned"
    if d.mirrored:
        kind += ", mirrored"
    return kind


def write(
    folder: Path,
    summary: dict[str, Any],
    lines: Sequence[Examined],
    names: Sequence[str],
) -> Path | None:
    """Writes videos.jsonl, summary.json and, of what is no packed folder, clean.txt, with whole
    paths; returns the latter's path.
    """
    write_text(folder / VIDEOS_FILE, "".join(json_text(line.as_row()) + "\n" for line in lines))
    write_json(folder / SUMMARY_FILE, summary)
    if isinstance(lines[0].path, Member):
        return None
    clean = [
        format_line(os.path.join(os.getcwd(), str(line.path)), line.label) + "\n"
        for line in lines
        if not line.is_bad
    ]
    write_text(folder / CLEAN_FILE, "".join(clean))
    if names:
        write_text(folder / CLASS_FILE, "".join(f"{name}\n" for name in names))
    return folder / CLEAN_FILE


def report(
    summary: dict[str, Any], lines: Sequence[Examined], clean: Path | None, worst: int
) -> str:
    """The report for a reader; `clean` is the list that was written."""
    source, found = summary["source"], summary["findings"]

    def name(line: Examined) -> str:
        base = printable(os.path.basename(str(line.path)))
        return f"{place(source, line.number)} {base}".rstrip()

    told = [
        f"{source}: {summary['files']} files, {summary['good']} good, {summary['bad']} "
        f"bad ({summary['check']} check, decoder {summary['decoder']})",
        *(f"  {note}" for note in summary["notes"]),
    ]
    if found:
        told.append("")
        width = max(len(FINDINGS[finding]) for finding in found)
        for finding, of_finding in found.items():
            kind = "bad " if finding in BAD else "note"
            example = next(line for line in lines if finding in line.findings)
            told.append(
                f"  {kind} {of_finding['files']:>8}  {FINDINGS[finding]:<{width}}  such as "
                f"{name(example)}"
            )
    told += ["", f"  {'':<24}{'min':>12}{'median':>12}{'max':>12}"]
    for column, values in summary["distributions"].items():
        cells = [
            f"{value:>12,.4g}" if value < 1e4 else f"{value:>12,.0f}" for value in values.values()
        ]
        told.append(f"  {column:<24}{''.join(cells)}")
    told.append("")
    kinds = "; ".join(f"{count} {kind}" for kind, count in summary["kinds"].items())
    if kinds:
        told += textwrap.wrap(
            f"kinds: {kinds}", WIDTH + 2, initial_indent="  ", subsequent_indent="    "
        )
    told += [f"  {line}" for line in _about_labels(**summary["labels"])]
    bad = [line for line in lines if line.is_bad]
    if bad and worst:
        told += ["", "bad files:", *(f"  {name(line)}: {line.reason}" for line in bad[:worst])]
        if len(bad) > worst:
            told.append(f"  and {len(bad) - worst} more in {VIDEOS_FILE}")
    advice = []
    if clean and not CURED_BY_PACKING.keys().isdisjoint(found):
        packed = Path(source).absolute().with_name(f"{Path(source).stem}_packed")
        advice.append(
            "packing makes all of these exact and fast to read (key frames every 16, short side "
            f"224):\n  video-mae pack {shlex.quote(str(clean))} {shlex.quote(str(packed))}"
        )
    if clean and summary["good"]:
        advice.append(f"the good files, for data.source and every other LIST:\n  {clean}")
    if advice:
        told += ["", *advice]
    return "\n".join(told)


def _about_labels(classes: int, missing: Sequence[int], files: dict[str, int]) -> list[str]:
    if not files:
        return ["labels: none"]
    first, counts = next(iter(files)), files.values()
    told = [
        f"labels: {classes} classes, {first} to {list(files)[-1]}, of {min(counts)} to "
        f"{max(counts)} good files, median {median(counts):g}"
    ]
    if missing:
        few = ", ".join(str(label) for label in missing[:FEW])
        if len(missing) > FEW:
            few += ", ..."
        if first != "0":
            few += "; classes are counted from 0"
        told.append(f"labels without a good file: {few}")
    return told
