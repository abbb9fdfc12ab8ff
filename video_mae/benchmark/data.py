"""`video-mae bench data`: clips a second of one core, and memory, of our loader in all its forms,
the official pipeline, pytorchvideo's.
"""

import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from video_mae.benchmark.contender import ratio
from video_mae.benchmark.measure import quantiles
from video_mae.benchmark.pipelines import (
    CONTENDERS,
    STAGES,
    Contender,
    Form,
    Found,
    Job,
    bare,
    official,
    ours,
    serve,
)
from video_mae.benchmark.records import DASH, Record, Run, Table, environment
from video_mae.benchmark.report import OUTPUT, publish
from video_mae.config.data import SourceConfig
from video_mae.config.schema import Knobs, knob, require
from video_mae.data import read_annotations
from video_mae.files import one_line
from video_mae.tools.demo import DemoConfig, make_demo_data
from video_mae.tools.pack import PackConfig
from video_mae.tools.pack import start as pack

BENCHMARK = "data"
OFFICIAL = next(contender.name for contender in CONTENDERS if contender.pipeline is official)
ALL = [contender.name for contender in CONTENDERS]
PATIENCE_SECONDS = 300  # a decoder can hang
RENDERED = DemoConfig(
    train_clips=8,
    validation_clips=8,
    num_frames=80,
    height=256,
    width=340,
    fps=30,
    difficulty="hard",
)
NOTES = (
    "A pipeline is a process with one thread on one core (ours with the process that decodes for it, on the same core); all are measured "
    "in turn, on the same core and files, a clip or the crops of each file in a round. ms: of one clip, medians over the rounds; ratios "
    "are medians over the rounds of two times in the same round.",
    "x alone: the time over that of the same library decoding the same frames with nothing around it. x official: the official "
    "pipeline's time over this one's. GPU cores: how many such cores feed a device that takes `appetite` clips a second.",
    "Ours, the official pipeline and decoding alone read the same frames; ours and the official one cut the same boxes. Packed frames lie "
    "`stride` apart in the file. pytorchvideo decodes every frame of a clip's time; audio is off. Ours ends with uint8, four times fewer "
    "bytes to copy to a GPU, which normalises the tenth that the encoder sees.",
    "peak MB: resident memory that the first pass over the files adds to what the process has after its imports, batch included; of ours "
    "also all of the process that decodes.",
)


class DataBenchConfig(Knobs):
    """`video-mae bench data key=value ...`."""

    source: str = knob(
        "",
        "a list file with lines `PATH LABEL`, or a folder with a folder per class; empty: 8 videos of 340 x 256 pixels, "
        "rendered into a temporary folder",
    )
    num_frames: int = knob(16, "frames of a clip", low=1)
    stride: int = knob(4, "video frames from one frame of a clip to the next", low=1)
    side: int = knob(224, "height and width of a clip in pixels", low=1)
    batch: int = knob(
        8, "clips that are collated into one tensor, several crops of a video among them", low=1
    )
    rounds: int = knob(9, "passes over the files, a clip of each", low=2)
    rows: tuple[str, ...] = knob((), "only these rows, by their names; empty: all")
    appetite: float = knob(
        1600.0,
        "clips a second that a device takes; ViT-B with 90 % masking on an H100 at 35 % of its peak: 1600",
        above=0,
    )
    output: str = knob(
        OUTPUT,
        "a folder: DEVICE/data.jsonl in it is appended to, its page is made anew",
        filled=True,
    )
    baseline: str = knob(
        "", "an older file of records: prints what became slower since (also --baseline FILE)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.rows:
            require(name in ALL, "rows", name, "is no row; there are: " + "; ".join(ALL))


def start(config: DataBenchConfig) -> int:
    """The stage as the command line starts it. Raises: ValueError or FileNotFoundError for a source
    that is none.
    """
    return publish(BENCHMARK, measure(config), tables, config.output, config.baseline, NOTES)


def measure(config: DataBenchConfig) -> Iterator[Run]:
    """Packs the videos both ways, and measures all pipelines in turn: one run."""
    with tempfile.TemporaryDirectory() as workshop:
        source = config.source
        if not source:
            make_demo_data(Path(workshop) / "videos", RENDERED)
            source = str(Path(workshop) / "videos" / "train.txt")
        contenders = [
            contender for contender in CONTENDERS if contender.name in (config.rows or ALL)
        ]
        sources, sizes = _sources(
            source, Path(workshop), config.stride, {contender.form for contender in contenders}
        )
        job = Job(sources, config.num_frames, config.stride, config.side, config.batch)
        videos = read_annotations(SourceConfig(source=source))
        name = f"{len(videos)} {'videos of ' + one_line(Path(source).name) if config.source else 'rendered videos of 340x256'}"
        header = {
            **environment(torch.device("cpu")),
            "benchmark": BENCHMARK,
            "source": name,
            "appetite": config.appetite,
            "bytes": sizes,
        }
        yield Run(header, measure_job(job, contenders, config.rounds, name, config.appetite))


def _sources(
    source: str, workshop: Path, stride: int, forms: Collection[Form]
) -> tuple[dict[Form, str], dict[str, int]]:
    """The videos in the forms that are asked for, and the bytes of each form."""
    sources: dict[Form, str] = {"plain": source}
    videos = read_annotations(SourceConfig(source=source))
    sizes = {"plain": sum(os.path.getsize(videos[i][0]) for i in range(len(videos)))}
    settings: dict[Form, PackConfig] = {
        "video": PackConfig(form="video"),
        "frames": PackConfig(form="frames", frame_step=stride),
    }
    for form, config in settings.items():
        if form in forms:
            folder = workshop / form
            pack(source, str(folder), config)
            sources[form] = str(folder)
            sizes[form] = sum(file.stat().st_size for file in folder.glob("*.tar"))
    return sources, sizes


def measure_job(
    job: Job, contenders: Sequence[Contender], num_rounds: int, name: str, appetite: float
) -> list[Record]:
    """A record a contender."""
    # a clean process: decord's bridge is global, and memory is to be measured
    context = multiprocessing.get_context("spawn")
    core = max(os.sched_getaffinity(0))
    with ExitStack() as stack:
        connections: dict[str, Any] = {}
        found: dict[str, Found] = {}
        for contender in contenders:
            connections[contender.name], there = context.Pipe()
            process = context.Process(target=serve, args=(contender, job, core, there), daemon=True)
            process.start()
            stack.callback(process.kill)
            there.close()
            found[contender.name] = _answer(connections[contender.name])
        clips: dict[str, list[dict[str, float]]] = {contender.name: [] for contender in contenders}
        for i in range(1, num_rounds + 1):
            for contender in reversed(contenders) if i % 2 else contenders:
                if found[contender.name].reason:
                    continue
                connections[contender.name].send(i)
                answer = _answer(connections[contender.name])
                if isinstance(answer, Found):
                    found[contender.name] = answer
                else:
                    clips[contender.name].append(answer)
    total = {name: [sum(stages.values()) for stages in rounds] for name, rounds in clips.items()}
    return [
        _record(name, job, contender, found[contender.name], clips[contender.name], total, appetite)
        for contender in contenders
    ]


def _answer(connection: Any) -> Any:
    try:
        return (
            connection.recv()
            if connection.poll(PATIENCE_SECONDS)
            else Found(reason=f"no answer for {PATIENCE_SECONDS} seconds")
        )
    except EOFError:
        return Found(reason="its process died")


def _record(
    name: str,
    job: Job,
    contender: Contender,
    found: Found,
    clips: Sequence[dict[str, float]],
    total: Mapping[str, Sequence[float]],
    appetite: float,
) -> Record:
    shape = f"{name}, clips of {job.num_frames}x{job.side}x{job.side}, stride {job.stride}, batches of {job.batch}"
    provider = contender.name
    if found.reason:
        return Record(
            benchmark=BENCHMARK,
            op="loader",
            shape=shape,
            dtype=DASH,
            provider=provider,
            mode="clips",
            reason=found.reason,
        )
    own = total[provider]
    clips_per_second = 1e3 / statistics.median(own)
    measures: dict[str, float | bool | str] = {
        "clips_per_second": clips_per_second,
        "bytes_a_clip": found.bytes_a_clip,
    }
    if found.peak_bytes is not None:
        measures["peak_mb"] = found.peak_bytes / 1e6
    if contender.pipeline is not bare:
        measures["gpu_cores"] = appetite / clips_per_second
    alone = total.get(f"{contender.decoder} alone", ())
    if contender.pipeline is ours and contender.form == "plain" and len(alone) == len(own):
        measures["x alone"] = ratio(own, alone)
    if len(total.get(OFFICIAL, ())) == len(own):
        measures["x official"] = ratio(total[OFFICIAL], own)
    times = {
        "clip": quantiles(list(own)),
        **{stage: quantiles([stages[stage] for stages in clips]) for stage in STAGES},
    }
    return Record(
        benchmark=BENCHMARK,
        op="loader",
        shape=shape,
        dtype=found.dtype,
        provider=provider,
        mode="clips",
        times=times,
        measures=measures,
    )


def tables(run: Run) -> list[Table]:
    """One table: a row a pipeline, its stages in columns."""
    columns = [
        "pipeline",
        "clips/s of a core",
        "ms a clip",
        "p20-p80",
        *STAGES,
        "x alone",
        "x official",
        "GPU cores",
        "peak MB",
        "MB a clip",
        "clips",
    ]
    return [
        Table(
            f"loader {shape}",
            columns,
            [_row(record) for record in run.records if record.shape == shape],
        )
        for shape in dict.fromkeys(record.shape for record in run.records)
    ]


def _row(record: Record) -> list[str]:
    if record.reason:
        return [record.provider, *[DASH] * (len(STAGES) + 8), f"not available: {record.reason}"]
    m, clip = record.measures, record.times["clip"]
    shown = [
        f"{float(m[key]):{form}}" if key in m else DASH
        for key, form in (
            ("x alone", ".2f"),
            ("x official", ".2f"),
            ("gpu_cores", ".0f"),
            ("peak_mb", ".0f"),
        )
    ]
    return [
        record.provider,
        f"{m['clips_per_second']:.1f}",
        f"{clip.p50:.1f}",
        f"{clip.p20:.1f}-{clip.p80:.1f}",
        *(f"{record.times[stage].p50:.1f}" for stage in STAGES),
        *shown,
        f"{float(m['bytes_a_clip']) / 1e6:.1f}",
        record.dtype,
    ]
