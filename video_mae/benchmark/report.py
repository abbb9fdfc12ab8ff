"""What becomes of measured results: tables in the terminal, a line a record in a file, and a page
with plots made from that file; and the keys that every benchmark has.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from video_mae.benchmark.record import Results, Table, append, read, results_file, slower_table
from video_mae.config.bench import BenchConfig
from video_mae.extras import require_package

Tables = Callable[[Results], list[Table]]


def publish(
    name: str, parts: Iterable[Results], tables: Tables, config: BenchConfig, notes: Sequence[str]
) -> int:
    """Prints each part of the results as it is measured and appends it to OUTPUT/DEVICE/NAME.jsonl;
    at the end makes NAME.md and plots of that file anew and prints what became slower than in
    the baseline, an older file.

    All parts have the same header. notes: how to read the tables. Returns: exit status 0. Raises:
    FileNotFoundError or ValueError for the baseline, before anything is measured.
    """
    # all of it now: it may be the very file that these results are added to
    older = read(Path(config.baseline)) if config.baseline else []
    file, whole = Path(), Results({}, [])
    for part in parts:
        if not whole.header:
            file = results_file(config.output, part.header, name)
            whole = Results(part.header, [])
            print("", about(part), *notes, sep="\n")
        whole.records.extend(part.records)
        append(file, part)
        print(*(f"\n{table.text()}" for table in tables(part)), sep="\n", flush=True)
    made = [f"made {path}" for path in write_page(file, tables, notes)]
    print(f"\nrecords {file}", *made, sep="\n")
    if config.baseline:
        print(f"\n{slower_table(whole, older, config.baseline).text()}")
    return 0


def about(results: Results) -> str:
    """The header of results in a line."""
    facts, shown = dict(results.header), []
    for key, value in facts.pop("ceilings", {}).items():
        facts[key] = f"{value / 1e12:.4g} T"
    for key, value in facts.items():
        if value is not None and not isinstance(value, dict):
            shown.append(f"{key.replace('_', ' ')} {value}")
    return "; ".join(shown)


def newest(found: Sequence[Results]) -> list[Results]:
    """Newest first, without what later results measured again, by (op, shape, dtype): ratios stay
    within one run.
    """
    seen: set[tuple[str, ...]] = set()
    kept: list[Results] = []
    for header, records in reversed(found):
        records = [record for record in records if record.name[1:4] not in seen]
        seen |= {record.name[1:4] for record in records}
        if records:
            kept.append(Results(header, records))
    return kept


def write_page(file: Path, tables: Tables, notes: Sequence[str] = ()) -> list[Path]:
    """Makes NAME.md and plots beside NAME.jsonl, from its records alone; returns their paths.
    Without matplotlib there are no plots.
    """
    found = newest(read(file))
    plots = []
    try:
        require_package("matplotlib")
    except ImportError as error:
        print(f"no plots: {error}")
    else:
        from video_mae.benchmark.plots import draw_plots

        plots = draw_plots(found, file)
    parts = [
        f"# {file.stem}: {found[0].header['device']}",
        f"Made from `{file.name}`; newest first.",
        "\n".join(f"- {note}" for note in notes),
    ]
    for results in found:
        parts += [f"## {results.header['date']}", about(results)]
        parts += [table.markdown() for table in tables(results)]
    parts += [f"![{plot.stem}]({plot.name})" for plot in plots]
    page = file.with_suffix(".md")
    page.write_text("\n\n".join(part.strip() for part in parts if part) + "\n", encoding="utf-8")
    return [page, *plots]
