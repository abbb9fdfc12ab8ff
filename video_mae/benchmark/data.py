"""`video-mae bench data`: clips a second of one core, and memory, of our loader in all its forms,
the official pipeline, pytorchvideo's.
"""

import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from video_mae.benchmark.clock import ratio, turns
from video_mae.benchmark.pipelines import (
    PIPELINES,
    STAGES,
    ClipTask,
    Pipeline,
    SourceForm,
    bare,
    begin,
    official,
    ours,
    run_epoch,
)
from video_mae.benchmark.record import (
    DASH,
    Record,
    Results,
    Table,
    environment,
    make_table,
    percentiles,
)
from video_mae.benchmark.report import publish
from video_mae.config.bench import DataBenchConfig
from video_mae.config.data import SourceConfig
from video_mae.config.schema import require
from video_mae.data import read_annotations
from video_mae.files import one_line
from video_mae.tools.demo import DemoConfig, make_demo_data
from video_mae.tools.pack import PackConfig
from video_mae.tools.pack import start as pack

ALL = [pipeline.name for pipeline in PIPELINES]
OFFICIAL = next(pipeline.name for pipeline in PIPELINES if pipeline.make is official)
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
    "A pipeline is a process with one thread on one core (ours with the process that decodes for "
    "it, on the same core); all are measured in turn, on the same core and files, a clip or the "
    "crops of each file in a round. ms: of one clip, medians over the rounds; ratios are medians "
    "over the rounds of two times in the same round.",
    "x alone: the time over that of the same library decoding the same frames with nothing around "
    "it. x official: the official pipeline's time over this one's. GPU cores: how many such cores "
    "feed a device that takes `appetite` clips a second.",
    "Ours, the official pipeline and decoding alone read the same frames; ours and the official "
    "one cut the same boxes. Packed frames lie `stride` apart in the file. pytorchvideo decodes "
    "every frame of a clip's time; audio is off. Ours ends with uint8, four times fewer bytes to "
    "copy to a GPU, which normalises the tenth that the encoder sees.",
    "peak MB: resident memory that the first pass over the files adds to what the process has "
    "after its imports, batch included; of ours also all of the process that decodes.",
)
COLUMNS = {
    "pipeline": "{provider}",
    "clips/s of a core": "{clips_per_second:.1f}",
    "ms a clip": "{p50:.1f}",
    "p20-p80": "{p20:.1f}-{p80:.1f}",
    **{stage: f"{{{stage}:.1f}}" for stage in STAGES},
    "x alone": "{x alone:.2f}",
    "x official": "{x official:.2f}",
    "GPU cores": "{gpu_cores:.0f}",
    "peak MB": "{peak_mb:.0f}",
    "MB a clip": "{mb_a_clip:.1f}",
    "clips": "{dtype}",
}


def start(config: DataBenchConfig) -> int:
    """The stage as the command line starts it. Raises: ValueError or FileNotFoundError for a source
    that is none.
    """
    return publish("data", measure(config), tables, config, NOTES)


def measure(config: DataBenchConfig) -> Iterator[Results]:
    """Packs the videos both ways, and measures all pipelines in turn: one run.

    Raises: ValueError for a row that there is not, and as `read_annotations`.
    """
    for name in config.rows:
        require(name in ALL, "rows", name, "is no row; there are: " + "; ".join(ALL))
    with tempfile.TemporaryDirectory() as workshop:
        source = config.source
        if not source:
            make_demo_data(Path(workshop) / "videos", RENDERED)
            source = str(Path(workshop) / "videos" / "train.txt")
        pipelines = [pipeline for pipeline in PIPELINES if pipeline.name in (config.rows or ALL)]
        forms: set[SourceForm] = {pipeline.form for pipeline in pipelines}
        sources, sizes = make_forms(source, Path(workshop), config.stride, forms)
        task = ClipTask(sources, config.num_frames, config.stride, config.side, config.batch)
        name = f"videos of {one_line(Path(source).name)}"
        if not config.source:
            name = "rendered videos of 340x256"
        name = f"{len(read_annotations(SourceConfig(source=source)))} {name}"
        header = {
            **environment(torch.device("cpu")),
            "benchmark": "data",
            "source": name,
            "appetite": config.appetite,
            "bytes": sizes,
        }
        yield Results(header, measure_task(task, pipelines, config.rounds, name, config.appetite))


def make_forms(
    source: str, workshop: Path, stride: int, forms: Collection[SourceForm]
) -> tuple[dict[SourceForm, str], dict[str, int]]:
    """The videos in the forms that are asked for, and the bytes of each form."""
    videos = read_annotations(SourceConfig(source=source))
    sources: dict[SourceForm, str] = {"plain": source}
    sizes = {"plain": sum(os.path.getsize(videos[i][0]) for i in range(len(videos)))}
    settings: dict[SourceForm, PackConfig] = {
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


def measure_task(
    task: ClipTask, pipelines: Sequence[Pipeline], num_rounds: int, name: str, appetite: float
) -> list[Record]:
    """A record a pipeline."""
    # a clean process: decord's bridge is global, and memory is to be measured
    context = multiprocessing.get_context("spawn")
    core = max(os.sched_getaffinity(0))
    others = multiprocessing.active_children()
    # of each epoch, or why there is nothing; epoch 0 tells the facts
    answers: dict[str, Any] = {pipeline.name: [] for pipeline in pipelines}
    with ExitStack() as stack:
        pools = {
            pipeline.name: stack.enter_context(ProcessPoolExecutor(1, context, begin, (core,)))
            for pipeline in pipelines
        }
        stack.callback(_kill_all_but, others)
        for pipeline in chain(pipelines, turns(pipelines, num_rounds)):
            done = answers[pipeline.name]
            if isinstance(done, str):
                continue
            answer = ask(pools[pipeline.name], run_epoch, pipeline, task, len(done))
            if isinstance(answer, str):
                answers[pipeline.name] = answer
            else:
                done.append(answer)
    return [make_record(name, task, pipeline, answers, appetite) for pipeline in pipelines]


def ask(pool: ProcessPoolExecutor, function: Any, *arguments: Any) -> Any:
    """What the process of a pipeline answers; a text says why it does not."""
    try:
        return pool.submit(function, *arguments).result(PATIENCE_SECONDS)
    except TimeoutError:
        return f"no answer for {PATIENCE_SECONDS} seconds"
    except BrokenProcessPool:
        return "its process died"


def _kill_all_but(others: Collection[Any]) -> None:
    """Also what hangs."""
    for process in multiprocessing.active_children():
        if process not in others:
            process.kill()


def make_record(
    name: str,
    task: ClipTask,
    pipeline: Pipeline,
    answers: Mapping[str, Any],
    appetite: float,
) -> Record:
    """answers: by pipeline a text that says why there is nothing, or the facts of epoch 0 and then
    the stages of each round.
    """
    record = partial(
        Record,
        benchmark="data",
        op="loader",
        shape=f"{name}, clips of {task.num_frames}x{task.side}x{task.side}, "
        f"stride {task.stride}, batches of {task.batch}",
        provider=pipeline.name,
        mode="clips",
    )
    if isinstance(answers[pipeline.name], str):
        return record(dtype=DASH, reason=answers[pipeline.name])
    facts, *stages = answers[pipeline.name]
    totals: dict[str, list[float]] = {}
    for other, found in answers.items():
        if not isinstance(found, str):
            totals[other] = [sum(clip.values()) for clip in found[1:]]
    own = totals[pipeline.name]
    clips_per_second = 1e3 / statistics.median(own)
    measures = {"clips_per_second": clips_per_second, **facts}
    dtype = measures.pop("dtype")
    if pipeline.make is not bare:
        measures["gpu_cores"] = appetite / clips_per_second
    alone = totals.get(f"{pipeline.decoder} alone", ())
    if pipeline.make is ours and pipeline.form == "plain" and len(alone) == len(own):
        measures["x alone"] = ratio(own, alone)
    if len(totals.get(OFFICIAL, ())) == len(own):
        measures["x official"] = ratio(totals[OFFICIAL], own)
    times = {"clip": percentiles(own)}
    for stage in STAGES:
        times[stage] = percentiles([clip[stage] for clip in stages])
    return record(dtype=dtype, times=times, measures=measures)


def tables(results: Results) -> list[Table]:
    """A row a pipeline, its stages in columns."""
    found: list[Table] = []
    for shape in dict.fromkeys(record.shape for record in results.records):
        rows = [record.figures() for record in results.records if record.shape == shape]
        for figures in rows:
            if not figures["reason"]:
                figures["mb_a_clip"] = figures["bytes_a_clip"] / 1e6
        found.append(make_table(f"loader {shape}", COLUMNS, rows))
    return found
