"""`video-mae bench data`: clips a second of one core, and memory, of our loader, the official pipeline and pytorchvideo's."""

import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from video_mae.benchmark.contender import ratio
from video_mae.benchmark.pipelines import PIPELINES, STAGES, Found, Job, serve
from video_mae.benchmark.records import DASH, Record, Run, Table, environment
from video_mae.benchmark.report import OUTPUT, publish
from video_mae.data import read_annotations
from video_mae.demo import DemoConfig, make_demo_data
from video_mae.kernels.benchmark_measure import quantiles
from video_mae.schema import knob, require

BENCHMARK = "data"
OURS = "ours"
PATIENCE_SECONDS = 300  # a decoder can hang
RENDERED = DemoConfig(train_clips=8, validation_clips=8, num_frames=80, height=256, width=340, fps=30, difficulty="hard")
NOTES = (
    "A pipeline is a process with one thread on one core; all are measured in turn, on the same core and files, a clip of each file in a "
    "round. ms: of one clip, medians over the rounds; x: the median over the rounds of their time over ours in the same round.",
    "Ours and the official pipeline read the same frames and cut the same boxes. pytorchvideo decodes every frame of a clip's time; audio "
    "is off. Ours ends with uint8, four times fewer bytes to copy to a GPU, which normalises the tenth that the encoder sees.",
    "peak MB: resident memory that the first pass over the files adds to what the process has after its imports, batch included.",
)


@dataclass(frozen=True, kw_only=True)
class DataBenchConfig:
    """`video-mae bench data key=value ...`."""

    source: str = knob("", "a list file with lines `PATH LABEL`, or a folder with a folder per class; empty: 8 videos of 340 x 256 pixels, "
                       "rendered into a temporary folder")
    num_frames: int = knob(16, "frames of a clip")
    stride: int = knob(4, "video frames from one frame of a clip to the next")
    side: int = knob(224, "height and width of a clip in pixels")
    batch: int = knob(8, "clips that are collated into one tensor")
    rounds: int = knob(9, "passes over the files, a clip of each")
    output: str = knob(OUTPUT, "a folder: DEVICE/data.jsonl in it is appended to, its page is made anew")
    baseline: str = knob("", "an older file of records: prints what became slower since (also --baseline FILE)")

    def __post_init__(self) -> None:
        for key, least in (("num_frames", 1), ("stride", 1), ("side", 1), ("batch", 1), ("rounds", 2)):
            require(getattr(self, key) >= least, key, getattr(self, key), f"must be at least {least}")
        require(self.output != "", "output", "(empty)", "must name a folder")


def start(config: DataBenchConfig) -> int:
    """The stage as the command line starts it. Raises: ValueError or FileNotFoundError for a source that is none."""
    return publish(BENCHMARK, measure(config), tables, config.output, config.baseline, NOTES)


def measure(config: DataBenchConfig) -> Iterator[Run]:
    """Measures all pipelines in turn: one run."""
    with tempfile.TemporaryDirectory() as workshop:
        source = config.source
        if not source:
            make_demo_data(Path(workshop) / "videos", RENDERED)
            source = str(Path(workshop) / "videos" / "train.txt")
        job = Job(source, config.num_frames, config.stride, config.side, config.batch)
        name = f"{len(read_annotations(job.data))} {'videos of ' + Path(source).name if config.source else 'rendered videos of 340x256'}"
        header = {**environment(torch.device("cpu")), "benchmark": BENCHMARK, "source": name}
        yield Run(header, measure_job(job, config.rounds, name))


def measure_job(job: Job, num_rounds: int, name: str) -> list[Record]:
    """A record a pipeline."""
    context = multiprocessing.get_context("spawn")  # a clean process: decord's bridge is global, and memory is to be measured
    core = max(os.sched_getaffinity(0))
    with ExitStack() as stack:
        connections: dict[str, Any] = {}
        found: dict[str, Found] = {}
        for provider in PIPELINES:
            connections[provider], there = context.Pipe()
            process = context.Process(target=serve, args=(provider, job, core, there), daemon=True)
            process.start()
            stack.callback(process.kill)
            there.close()
            found[provider] = _answer(connections[provider])
        clips: dict[str, list[dict[str, float]]] = {provider: [] for provider in PIPELINES}
        for i in range(1, num_rounds + 1):
            for provider in reversed(PIPELINES) if i % 2 else PIPELINES:
                if found[provider].reason:
                    continue
                connections[provider].send(i)
                answer = _answer(connections[provider])
                if isinstance(answer, Found):
                    found[provider] = answer
                else:
                    clips[provider].append(answer)
    return [_record(name, job, provider, found[provider], clips) for provider in PIPELINES]


def _answer(connection: Any) -> Any:
    try:
        return connection.recv() if connection.poll(PATIENCE_SECONDS) else Found(reason=f"no answer for {PATIENCE_SECONDS} seconds")
    except EOFError:
        return Found(reason="its process died")


def _record(name: str, job: Job, provider: str, found: Found, clips: Mapping[str, Sequence[dict[str, float]]]) -> Record:
    shape = f"{name}, clips of {job.num_frames}x{job.side}x{job.side}, stride {job.stride}, batches of {job.batch}"
    if found.reason:
        return Record(benchmark=BENCHMARK, op="loader", shape=shape, dtype=DASH, provider=provider, mode="clips", reason=found.reason)
    total = {other: [sum(stages.values()) for stages in rounds] for other, rounds in clips.items()}
    measures: dict[str, float | bool | str] = {"clips_per_second": 1e3 / statistics.median(total[provider]),
                                               "bytes_a_clip": found.bytes_a_clip}
    if found.peak_bytes is not None:
        measures["peak_mb"] = found.peak_bytes / 1e6
    if provider != OURS and len(total[OURS]) == len(total[provider]):
        measures["x ours"] = ratio(total[provider], total[OURS])
    times = {"clip": quantiles(total[provider]), **{stage: quantiles([stages[stage] for stages in clips[provider]]) for stage in STAGES}}
    return Record(benchmark=BENCHMARK, op="loader", shape=shape, dtype=found.dtype, provider=provider, mode="clips", times=times,
                  measures=measures)


def tables(run: Run) -> list[Table]:
    """One table: a row a pipeline, its stages in columns."""
    columns = ["pipeline", "clips/s of a core", "ms a clip", "p20-p80", *STAGES, "x ours", "peak MB", "MB a clip", "clips"]
    return [Table(f"loader {shape}", columns, [_row(record) for record in run.records if record.shape == shape])
            for shape in dict.fromkeys(record.shape for record in run.records)]


def _row(record: Record) -> list[str]:
    if record.reason:
        return [record.provider, *[DASH] * 10, f"not available: {record.reason}"]
    m, clip = record.measures, record.times["clip"]
    stages = [f"{record.times[stage].p50:.1f}" for stage in STAGES]
    return [record.provider, f"{m['clips_per_second']:.1f}", f"{clip.p50:.1f}", f"{clip.p20:.1f}-{clip.p80:.1f}", *stages,
            f"{m['x ours']:.2f}" if "x ours" in m else DASH, f"{m['peak_mb']:.0f}" if "peak_mb" in m else DASH,
            f"{float(m['bytes_a_clip']) / 1e6:.1f}", record.dtype]
