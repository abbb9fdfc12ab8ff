"""How the records of `video-mae bench step` are shown."""

from itertools import groupby

from video_mae.benchmark.record import Record, Results, Table, make_table

THEIRS = "Hugging Face eager"
THEIRS_PREPARED = "Hugging Face eager, input prepared"
THEIRS_COMPILED = "Hugging Face compiled"
PARTS = (
    "data copy",
    "preparation",
    "gather",
    "embed",
    "encoder attention",
    "encoder rest",
    "decoder attention",
    "decoder rest",
    "losses",
    "optimizer",
)


def tables(results: Results) -> list[Table]:
    """For each model the steps, and the parts of those that are not compiled."""
    found: list[Table] = []
    for (shape, dtype), group in groupby(results.records, lambda record: record.name[2:4]):
        of: dict[str, list[Record]] = {"loss": [], "preparation": [], "step": [], "parts": []}
        for record in group:
            of[record.op].append(record)
        notes: list[str] = []
        for m in (record.measures for record in of["loss"]):
            closed = f"; NOT COMPARED: {m['gate']}" if m["gate"] else ""
            notes.append(f"loss: ours {m['ours']:.6f}, theirs {m['theirs']:.6f}{closed}")
        for record in of["preparation"]:
            notes.append(f"preparing their input {record.provider}: {record.main.p50:.4g} ms")
        columns = {
            "mode": "{mode}",
            "step": "{provider}",
            "ms": "{p50:.5g}",
            "p20-p80": "{p20:.5g}-{p80:.5g}",
            "clips/s": "{clips_per_second:.4g}",
            "TFLOP/s": "{tflops:.3g}",
            "% ceiling": "{ceiling_percent:.1f}",
            "MFU": "{mfu:.1%}",
            "peak MB": "{peak_mb:.4g}",
            "x HF": f"{{x {THEIRS}:.2f}}",
            "x HF prepared": f"{{x {THEIRS_PREPARED}:.2f}}",
            "x HF compiled": f"{{x {THEIRS_COMPILED}:.2f}}",
        }
        rows = [record.figures() for record in of["step"]]
        found.append(make_table(f"step {shape} {dtype}", columns, rows, notes))
        if of["parts"]:
            parts = {part: f"{{{part}:.3g}}" for part in PARTS}
            columns = {
                "part": "{provider} {mode}",
                **parts,
                "sum": "{sum:.4g}",
                "marked over unmarked step": "{marked_over_step:.3f}",
            }
            rows = [record.figures() for record in of["parts"]]
            for figures, record in zip(rows, of["parts"], strict=True):
                figures["sum"] = sum(time.p50 for time in record.times.values())
            table = make_table("", columns, rows)
            titles, *lines = zip(table.columns, *table.rows, strict=True)  # a column a step
            found.append(Table(f"parts of the step {shape} {dtype}, ms", titles, lines))
    return found
