"""What benchmarks write and print: records as JSON lines under a header that says where they were
taken, tables of them, and what became slower since older ones.
"""

import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from video_mae.files import json_line

DASH = "-"  # a figure that cannot exist here
TOLERANCE = 1.05  # a median may be longer by so much


class Percentiles(NamedTuple):
    """Milliseconds of one call: the median, and what a fifth and four fifths of the calls took at
    most.
    """

    p50: float
    p20: float
    p80: float


def percentiles(samples: Sequence[float]) -> Percentiles:
    """Of at least two samples."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Percentiles(statistics.median(samples), fifths[0], fifths[3])


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measured cell. The first six fields are its name, by which older files are searched.

    reason: why there is nothing to tell (no such device, out of memory, an error of the compiler
    ...); empty for a measured cell. times: by the way they were taken, e.g. {"cold":
    Percentiles(...), "wall": ...}; tables and plots show the first. measures: all other figures,
    with the unit in the name (peak_mb, clips_per_second); what could not be measured is left out.
    """

    benchmark: str
    op: str
    shape: str
    dtype: str
    provider: str
    mode: str
    reason: str = ""
    times: dict[str, Percentiles] = field(default_factory=dict)
    measures: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> tuple[str, ...]:
        return (self.benchmark, self.op, self.shape, self.dtype, self.provider, self.mode)

    @property
    def main(self) -> Percentiles:
        """The time that rates and ratios are made of."""
        return next(iter(self.times.values()))

    def figures(self) -> dict[str, Any]:
        """What `make_table` can show: the fields, the measures, every median by its way, and p20,
        p50, p80 of the main time.
        """
        medians = {way: time.p50 for way, time in self.times.items()}
        main = self.main._asdict() if self.times else {}
        return {**vars(self), **self.measures, **medians, **main}


class Results(NamedTuple):
    """One start of a benchmark, or a part of it: its header (see `environment`) and what it
    measured.
    """

    header: dict[str, Any]
    records: list[Record]


def reason_of(error: Exception) -> str:
    """What became of a cell that an error has kept from being measured."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0].strip()}"


def dtype_name(dtype: torch.dtype) -> str:
    """E.g. bfloat16."""
    return str(dtype).removeprefix("torch.")


def environment(device: torch.device) -> dict[str, Any]:
    """Where a benchmark runs: device, driver, versions, revision, date. Numbers of two runs compare
    only where `device` is the same.
    """
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: *(.*)", info.read_text() if info.exists() else "", re.M)
    cpu = names[0].strip() if names else platform.processor() or platform.machine()
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": _revision(),
        "device": f"{cpu}, {threads} of {cores} cores",
        "cpu": cpu,
        "threads": threads,
        "cores": cores,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": None,
        "driver": None,
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cudnn"] = torch.backends.cudnn.version()
        found |= _driver(device)
    return found


def results_file(folder: str, header: Mapping[str, Any], name: str) -> Path:
    """FOLDER/DEVICE/NAME.jsonl: figures of other devices do not compare."""
    device = re.sub(r"\((R|TM)\)", "", header["device"])
    return Path(folder) / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") / f"{name}.jsonl"


def append(path: Path, results: Results) -> None:
    """Adds to a JSON-lines file: the header, then a line a record. What is in the file stays as it
    is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"header": results.header}, *map(asdict, results.records)]
    with path.open("ab") as stream:
        stream.writelines(map(json_line, lines))


def read(path: Path) -> list[Results]:
    """What a file has, oldest first. Raises: FileNotFoundError; ValueError naming the line that is
    no record.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of benchmark records")
    found: list[Results] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            if "header" not in line:
                times = line["times"].items()
                line["times"] = {way: Percentiles(*time) for way, time in times}
                found[-1].records.append(Record(**line))
            # an equal header begins another part of the same run
            elif not found or found[-1].header != line["header"]:
                found.append(Results(line["header"], []))
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            raise ValueError(f"{path}: line {number} is not a benchmark record") from None
    return found


class Table(NamedTuple):
    """A titled table of texts, for the terminal and for Markdown; notes stand below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Aligned for a terminal: figures to the right, words to the left."""
        columns = []
        for title, *cells in zip(self.columns, *self.rows, strict=True):
            width = max(map(len, (title, *cells)))
            is_numeric = all(cell[:1].isdigit() or cell == DASH for cell in cells)
            align = str.rjust if is_numeric else str.ljust
            columns.append([align(cell, width) for cell in (title, *cells)])
        lines = ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
        lines.insert(1, "-" * len(lines[0]))
        shown = lines if self.rows else []
        return "\n".join([self.title, *shown, *(f"  {note}" for note in self.notes)])

    def markdown(self) -> str:
        rows = [self.columns, ["---"] * len(self.columns), *self.rows]
        lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
        lines[1] = lines[1].replace(" ", "")
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"### {self.title}", "", *lines, "", *notes]).rstrip() + "\n"


def make_table(
    title: str,
    columns: Mapping[str, str],
    rows: Iterable[Mapping[str, Any]],
    notes: Sequence[str] = (),
) -> Table:
    """A row for each mapping of figures (see `Record.figures`).

    columns: a title, and the format of its cells as `str.format` has it; a dash stands where a row
    lacks the figure. The last cell of a row with a reason says it.
    """
    texts: list[list[str]] = []
    for figures in rows:
        cells = []
        for form in columns.values():
            try:
                cells.append(form.format_map(figures))
            except KeyError:
                cells.append(DASH)
        if figures["reason"]:
            cells[-1] = f"not available: {figures['reason']}"
        texts.append(cells)
    return Table(title, list(columns), texts, notes)


def slower_table(results: Results, baseline: Iterable[Results], name: str) -> Table:
    """What became slower, the worst first, each cell against the newest of the baseline that was
    taken on an equal device; `name` says what the baseline is.

    Slower: the median grew by more than 5 %, and four fifths of the old calls were faster than four
    fifths of the new ones.
    """
    device = results.header["device"]
    old: dict[tuple[str, ...], dict[str, Percentiles]] = {}
    for other in baseline:
        if other.header["device"] == device:
            old |= {record.name: record.times for record in other.records if not record.reason}
    rows, num_compared = [], 0
    for record in results.records:
        times = old.get(record.name, {})
        for way, now in record.times.items():
            if way not in times:
                continue
            num_compared += 1
            before = times[way]
            if now.p50 > TOLERANCE * before.p50 and now.p20 > before.p80:
                changes = {"way": way, "before": before.p50, "now": now.p50}
                rows.append({**vars(record), **changes, "x": now.p50 / before.p50})
    note = f"{len(rows)} of {num_compared} times are longer"
    if not num_compared:
        note = f"nothing to compare: {name} has no equal cell of {device}"
    columns = {
        "op": "{op}",
        "shape": "{shape}",
        "dtype": "{dtype}",
        "provider": "{provider}",
        "mode": "{mode}",
        "time": "{way}",
        "before ms": "{before:.4g}",
        "now ms": "{now:.4g}",
        "x": "{x:.2f}",
    }
    rows.sort(key=lambda row: -row["x"])
    return make_table(f"Slower than {name}", columns, rows, [note])


def _revision() -> str:
    """The git revision that these files are of, "-dirty" where they were changed since; unknown
    outside a checkout.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    command = ("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12")
    return _output(*command) or "unknown"


def _driver(device: torch.device) -> dict[str, str]:
    """Driver, clocks and power limit as they are: benchmarks read them and never set them."""
    keys = ("driver", "clock", "max_clock", "power_limit")
    query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit"
    identity = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    values = _output("nvidia-smi", identity, query, "--format=csv,noheader").split(", ")
    return dict(zip(keys, values, strict=True)) if len(values) == len(keys) else {}


def _output(*command: str) -> str:
    """What a command prints, or nothing where there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
