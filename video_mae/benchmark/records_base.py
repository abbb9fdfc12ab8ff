"""What benchmarks write and print: records as JSON lines, the header that says where they were
taken, tables.
"""

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

DASH = "-"  # a figure that cannot exist here


class Times(NamedTuple):
    """Milliseconds of one call: the median, and what a fifth and four fifths of the calls took at
    most.
    """

    p50: float
    p20: float
    p80: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measured cell. The first six fields are its name: `compare` looks for them in older
    files.

    reason: why there is nothing to tell (no such device, out of memory, an error of the compiler
    ...); empty for a measured cell. times: milliseconds by the way they were taken, e.g. {"cold":
    Times(...), "wall": Times(...)}. measures: all other figures, with the unit in the name
    (peak_mb, clips_per_second); what could not be measured is left out.
    """

    benchmark: str
    op: str
    shape: str
    dtype: str
    provider: str
    mode: str
    reason: str = ""
    times: dict[str, Times] = field(default_factory=dict)
    measures: dict[str, float | bool | str] = field(default_factory=dict)

    @property
    def name(self) -> tuple[str, ...]:
        return (self.benchmark, self.op, self.shape, self.dtype, self.provider, self.mode)


class Run(NamedTuple):
    """One start of a benchmark: its header (see `environment`) and what it measured."""

    header: dict[str, Any]
    records: list[Record]


def environment(device: torch.device) -> dict[str, Any]:
    """Where a benchmark runs: device, driver, versions, revision, date. Numbers of two runs compare
    only where `device` is the same.
    """
    cores = len(os.sched_getaffinity(0))
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": _revision(),
        "device": f"{_cpu_name()}, {torch.get_num_threads()} of {cores} cores",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": cores,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": None,
        "driver": None,
    }
    if device.type == "cuda":
        found |= {
            "device": torch.cuda.get_device_name(device),
            "cudnn": torch.backends.cudnn.version(),
            **_driver(device),
        }
    return found


def results_file(folder: str, header: dict[str, Any], name: str) -> Path:
    """FOLDER/DEVICE/NAME.jsonl: figures of other devices do not compare."""
    device = re.sub(r"\((R|TM)\)", "", header["device"])
    return Path(folder) / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") / f"{name}.jsonl"


def append(path: Path, run: Run) -> None:
    """Adds a run, or a part of one, to a JSON-lines file: its header, then a line a record. What is
    in the file stays as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"header": run.header}, *(asdict(record) for record in run.records)]
    with path.open("a", encoding="ascii") as stream:
        stream.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def read(path: Path) -> list[Run]:
    """The runs of a file, oldest first. Raises: FileNotFoundError; ValueError naming the line that
    is no record.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of benchmark records")
    runs: list[Run] = []
    for number, text in enumerate(path.read_text(encoding="ascii").splitlines(), 1):
        try:
            line = json.loads(text)
            if "header" in line:
                # else another part of the same run
                if not runs or runs[-1].header != line["header"]:
                    runs.append(Run(line["header"], []))
            else:
                line["times"] = {way: Times(*times) for way, times in line["times"].items()}
                runs[-1].records.append(Record(**line))
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            raise ValueError(f"{path}: line {number} is not a benchmark record") from None
    return runs


@dataclass(frozen=True)
class Table:
    """A titled table of texts, for the terminal and for Markdown; notes stand below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Aligned for a terminal: figures to the right, words to the left."""
        if not self.rows:
            return "\n".join([self.title, *(f"  {note}" for note in self.notes)])
        cells = [list(self.columns), *(list(row) for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        right = [
            all(row[i][:1].isdigit() or row[i] == DASH for row in self.rows)
            for i in range(len(self.columns))
        ]
        lines = [
            "  ".join(
                cell.rjust(width) if at_right else cell.ljust(width)
                for cell, width, at_right in zip(row, widths, right, strict=True)
            ).rstrip()
            for row in cells
        ]
        return "\n".join(
            [
                self.title,
                lines[0],
                "-" * len(lines[0]),
                *lines[1:],
                *(f"  {note}" for note in self.notes),
            ]
        )

    def markdown(self) -> str:
        lines = [
            f"### {self.title}",
            "",
            f"| {' | '.join(self.columns)} |",
            f"|{'---|' * len(self.columns)}",
            *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in self.rows),
        ]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)]).rstrip() + "\n"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _revision() -> str:
    """The git revision that these files are of, "-dirty" where they were changed since; unknown
    outside a checkout.
    """
    root = Path(__file__).resolve().parents[1]
    found = (
        _output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12")
        if (root / ".git").exists()
        else ""
    )
    return found or "unknown"


def _driver(device: torch.device) -> dict[str, str]:
    """Driver, clocks and power limit as they are: benchmarks read them and never set them."""
    names = ("driver_version", "clocks.sm", "clocks.max.sm", "power.limit")
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    values = _output(
        "nvidia-smi", f"--id={identity}", f"--query-gpu={','.join(names)}", "--format=csv,noheader"
    ).split(", ")
    return (
        dict(zip(("driver", "clock", "max_clock", "power_limit"), values, strict=True))
        if len(values) == len(names)
        else {}
    )


def _output(*command: str) -> str:
    """What a command prints, or nothing where there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
