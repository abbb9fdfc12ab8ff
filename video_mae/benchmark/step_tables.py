"""How the records of `video-mae bench step` are shown."""

from collections.abc import Sequence

from video_mae.benchmark.records import DASH, Record, Run, Table

BENCHMARK = "step"
OURS_BY_ENGINE = "ours by Engine"
THEIRS, THEIRS_PREPARED, THEIRS_COMPILED = (
    "Hugging Face eager",
    "Hugging Face eager, input prepared",
    "Hugging Face compiled",
)
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

NOTES = (
    "A step: copy of the clips to the device, forward, backward, AdamW (fused; float32 master weights under bfloat16). The steps take "
    "turns, back and forth; ms are medians; x HF: the median over the rounds of Hugging Face's time over ours in the same round.",
    "ours by Engine: as a training run takes it, through DeepSpeed (ZeRO 1, one process). What it takes beyond `ours eager` is "
    "DeepSpeed's.",
    "full: 90 % tube masking, every hidden token is decoded. dual: the decoder leaves half of all tokens out (VideoMAE V2). Hugging "
    "Face's model cannot; its full step is what dual is compared with.",
    "Hugging Face: VideoMAEForPreTraining with SDPA, our weights, clips and masks. Its input is made of uint8 clips on the device in two "
    "passes, the cheapest way that we know; this is part of its step, but for `input prepared`.",
    "% ceiling: of the FLOP/s of a large matrix product, measured in this run; MFU: of the data sheet's. Both count 6 operations for each "
    "multiply-accumulate that a forward pass needs.",
    "Parts: eager steps with marks on the tensors between the parts, in the forward and the backward pass; a mark takes the time of the "
    "clock on a CPU, and of an event in the stream on a GPU. attention is softmax(q k^T) v alone, its projections are in rest.",
)


def tables(run: Run) -> list[Table]:
    """For each model the steps, and the parts of those that are not compiled."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in run.records:
        groups.setdefault((record.shape, record.dtype), []).append(record)
    found: list[Table] = []
    for (shape, dtype), records in groups.items():
        of = {
            op: [record for record in records if record.op == op]
            for op in ("loss", "preparation", "step", "parts")
        }
        notes = [
            f"loss: ours {m['ours']:.6f}, theirs {m['theirs']:.6f}"
            + (f"; NOT COMPARED: {m['gate']}" if m["gate"] else "")
            for m in (record.measures for record in of["loss"])
        ]
        notes += [
            f"preparing their input {record.provider}: {record.times['step'].p50:.4g} ms"
            for record in of["preparation"]
        ]
        columns = [
            "mode",
            "step",
            "ms",
            "p20-p80",
            "clips/s",
            "TFLOP/s",
            "% ceiling",
            "MFU",
            "peak MB",
            "x HF",
            "x HF prepared",
            "x HF compiled",
        ]
        found.append(
            Table(f"step {shape} {dtype}", columns, [_row(record) for record in of["step"]], notes)
        )
        if of["parts"]:
            found.append(_parts_table(f"parts of the step {shape} {dtype}, ms", of["parts"]))
    return found


def _row(record: Record) -> list[str]:
    if record.reason:
        return [record.mode, record.provider, *[DASH] * 9, f"not available: {record.reason}"]
    m, times = record.measures, record.times["step"]
    forms = {
        "clips_per_second": ".4g",
        "tflops": ".3g",
        "ceiling_percent": ".1f",
        "mfu": ".1%",
        "peak_mb": ".4g",
        **{f"x {name}": ".2f" for name in (THEIRS, THEIRS_PREPARED, THEIRS_COMPILED)},
    }
    return [
        record.mode,
        record.provider,
        f"{times.p50:.5g}",
        f"{times.p20:.5g}-{times.p80:.5g}",
        *(format(m[key], form) if key in m else DASH for key, form in forms.items()),
    ]


def _parts_table(title: str, records: Sequence[Record]) -> Table:
    def cell(record: Record, part: str) -> str:
        return f"{record.times[part].p50:.3g}" if part in record.times else DASH

    rows = [[part, *(cell(record, part) for record in records)] for part in PARTS]
    rows.append(
        ["sum", *(f"{sum(times.p50 for times in record.times.values()):.4g}" for record in records)]
    )
    rows.append(
        [
            "marked over unmarked step",
            *(f"{record.measures['marked_over_step']:.3f}" for record in records),
        ]
    )
    return Table(title, ["part", *(f"{record.provider} {record.mode}" for record in records)], rows)
