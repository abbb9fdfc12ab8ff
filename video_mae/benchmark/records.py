"""The records of all benchmarks, for the step, the loader and the kernels alike, and what became
slower since an older file.

A benchmark makes a `Run(environment(device), [Record(...), ...])`, or several parts of one;
`report.publish` does the rest.
"""

from collections.abc import Iterable
from typing import NamedTuple

from video_mae.benchmark.records_base import (
    DASH,
    Record,
    Run,
    Table,
    Times,
    append,
    environment,
    read,
    results_file,
)

__all__ = [
    "DASH",
    "Change",
    "Record",
    "Run",
    "Table",
    "Times",
    "append",
    "compare",
    "environment",
    "read",
    "results_file",
    "slower_table",
]

TOLERANCE = 1.05  # a median may be longer by so much


class Change(NamedTuple):
    """A cell that takes longer than it did: `way` of its times, medians in milliseconds."""

    record: Record
    way: str
    before: Times
    now: Times


def compare(run: Run, baseline: Iterable[Run]) -> tuple[list[Change], int]:
    """(what became slower, number of times compared), each cell against the newest of the baseline
    that was taken on an equal device.

    Slower: the median grew by more than 5 %, and four fifths of the old calls were faster than four
    fifths of the new ones.
    """
    old = {
        record.name: record
        for other in baseline
        if other.header["device"] == run.header["device"]
        for record in other.records
        if not record.reason
    }
    pairs = [
        Change(record, way, old[record.name].times[way], now)
        for record in run.records
        if record.name in old
        for way, now in record.times.items()
        if way in old[record.name].times
    ]
    return [
        pair
        for pair in pairs
        if pair.now.p50 > TOLERANCE * pair.before.p50 and pair.now.p20 > pair.before.p80
    ], len(pairs)


def slower_table(run: Run, baseline: Iterable[Run], name: str) -> Table:
    """What became slower since the baseline, the worst first; `name` says what that is."""
    changes, compared = compare(run, baseline)
    rows = [
        [
            *c.record.name[1:],
            c.way,
            f"{c.before.p50:.4g}",
            f"{c.now.p50:.4g}",
            f"{c.now.p50 / c.before.p50:.2f}",
        ]
        for c in sorted(changes, key=lambda c: c.before.p50 / c.now.p50)
    ]
    note = (
        f"{len(changes)} of {compared} times are longer"
        if compared
        else f"nothing to compare: {name} has no equal cell of {run.header['device']}"
    )
    return Table(
        f"Slower than {name}",
        ["op", "shape", "dtype", "provider", "mode", "time", "before ms", "now ms", "x"],
        rows,
        [note],
    )
