"""Does masked pretraining help where labels are few, and which? `make experiment` answers with
figures; README.md says how to read them.

Every competitor gets the same labelled clips and augmentation, and is scored on clips of
photographs and, for people, from directions that none of them has seen. A run that was stopped goes
on as if it had not.
"""

import json
import multiprocessing
import platform
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accuracy_report import write_report
from clips import photographs
from trials import ARMS, ArmName, ExperimentConfig, Job, choose_device, job_of, work

from video_mae.config.explain import describe
from video_mae.config.schema import parse, to_dict
from video_mae.files import read_jsonl, write_whole

FREE_KEYS = ("output", "workers")  # other values of these give the same results
# seconds of a step, a step, a step, a job on one core: their ratio counts
COST = {"pretrain": 0.05, "search": 0.1, "finetune": 0.1, "probe": 5.0}


def first_jobs(config: ExperimentConfig) -> list[Job]:
    """Pretraining, and the search for the best training from scratch."""
    # pixels, which teach, before features
    arms: list[ArmName] = [arm for arm in ARMS if arm in config.arms]
    seeds_of = {arm: [0, 1] if arm in config.repeated else [0] for arm in arms}
    return [
        *(Job("pretrain", arm, seed) for arm in arms for seed in seeds_of[arm]),
        *(
            Job("search", "random", labels=labels, steps=steps, lr=lr)
            for labels in config.label_counts
            for steps in config.scratch_steps
            for lr in config.scratch_lrs
        ),
    ]


def last_jobs(config: ExperimentConfig, lines: Sequence[dict[str, Any]]) -> list[Job]:
    """All that gives figures; lines: of the first jobs."""
    jobs = []
    for labels in config.label_counts:
        for seed in config.seeds:
            steps, lr = best_from_scratch(lines, labels)
            jobs.append(Job("finetune", "random", 0, labels, seed, steps, lr))
            jobs.append(Job("probe", "random", 0, labels, seed))
            for first in first_jobs(config):
                if first.kind == "pretrain":
                    job = Job("finetune", first.arm, first.weights, labels, seed)
                    job = job._replace(steps=steps, lr=config.finetune_lr)
                    jobs += [job, Job("probe", first.arm, first.weights, labels, seed)]
    return jobs


def best_from_scratch(lines: Sequence[dict[str, Any]], labels: int) -> tuple[int, float]:
    """Steps and learning rate that were best on the tuning photographs; of equals the fewest and
    the lowest.
    """
    tried = [line for line in lines if line["kind"] == "search" and line["labels"] == labels]
    best = min(tried, key=lambda line: (-line["top1"]["fine-tuned"], line["steps"], line["lr"]))
    return best["steps"], best["lr"]


def finished(config: ExperimentConfig, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """The lines of jobs as these end: in this process, or in workers of one thread each, none
    before the teacher that it needs.
    """
    if config.workers == 1 or choose_device().type == "cuda":
        for job in jobs:
            yield work(config, job)
        return
    waiting, running = list(jobs), dict[Future[dict[str, Any]], Job]()
    with ProcessPoolExecutor(
        config.workers, multiprocessing.get_context("spawn"), _start_worker
    ) as pool:
        try:
            while waiting or running:
                pending = (*waiting, *running.values())
                teachers = [job for job in pending if job[:2] == ("pretrain", "pixels")]
                missing = {job.weights for job in teachers}
                ready = [job for job in waiting if not (_is_taught(job) and job.weights in missing)]
                for job in ready[: config.workers - len(running)]:
                    waiting.remove(job)
                    running[pool.submit(work, config, job)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    running.pop(future)
                    yield future.result()
        except BaseException:
            # an interruption too: nobody would collect what the workers go on to do
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _is_taught(job: Job) -> bool:
    return job.kind == "pretrain" and ARMS[job.arm].target == "features"


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others


def header(config: ExperimentConfig) -> dict[str, Any]:
    """The first line of results.jsonl."""
    device = choose_device()
    settings = {name: value for name, value in to_dict(config).items() if name not in FREE_KEYS}
    train, scored = photographs(config.scored_on)
    packages = ["torch", "numpy", "scikit-image", "pillow"]
    if config.subject == "people":
        packages.append("pybullet")
    return {
        "config": settings,
        "photographs": {"train": train, "scored": scored},
        "model": to_dict(config.shown.model),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU",
        "versions": {name: version(name) for name in packages},
    }


def run(config: ExperimentConfig) -> str:
    """Does what is not yet done, writes all files into the output folder and returns the table.

    Raises: ValueError where the folder holds the results of other settings.
    """
    folder = Path(config.output)
    results, first = folder / "results.jsonl", header(config)
    lines = read_jsonl(results)
    if lines and lines[0]["config"] != first["config"]:
        changed = ", ".join(
            name for name, value in first["config"].items() if lines[0]["config"].get(name) != value
        )
        raise ValueError(
            f"{results}: holds results of other settings ({changed}): name another folder as "
            "output=..., or remove this one"
        )
    lines = lines or [first]
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(results, lambda path: _write_lines(path, lines))  # without a line that a crash tore
    print(f"{len(config.shown.classes)} classes of {config.subject}", flush=True)
    _do("pretraining and search", config, first_jobs(config), lines)
    _do("figures", config, last_jobs(config, lines[1:]), lines)
    return write_report(folder, lines)


def _do(
    part: str, config: ExperimentConfig, jobs: Sequence[Job], lines: list[dict[str, Any]]
) -> None:
    """Appends what is missing to the lines, and to their file."""
    done = {job_of(line) for line in lines[1:]}
    left, now = [job for job in jobs if job not in done], []
    for line in finished(config, left):
        with (Path(config.output) / "results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        lines.append(line)
        now.append(line)
        progress = _progress(config, line, now, left)
        print(f"{part}: {len(jobs) - len(left) + len(now)} of {len(jobs)}; {progress}", flush=True)


def _write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _cost(config: ExperimentConfig, job: Job) -> float:
    if job.kind == "pretrain":
        return COST[job.kind] * config.steps * ARMS[job.arm].times
    return COST[job.kind] * (job.steps or 1)


def _progress(
    config: ExperimentConfig,
    line: dict[str, Any],
    now: Sequence[dict[str, Any]],
    left: Sequence[Job],
) -> str:
    pace = fmean(done["seconds"] / _cost(config, job_of(done)) for done in now)
    workers = 1 if choose_device().type == "cuda" else config.workers
    rest = sum(_cost(config, job) for job in left)
    rest -= sum(_cost(config, job_of(done)) for done in now)
    what = f"{line['kind']} {line['arm']} {line['weights']}"
    if line["labels"]:
        what += f" {line['labels']} labels seed {line['seed']}"
    result = ", ".join(f"{name} {value:.1%}" for name, value in line.get("top1", {}).items())
    minutes = pace * rest / workers / 60
    return f"{what}: {result} {line['seconds']:.0f} s; about {minutes:.0f} minutes left"


def main(arguments: Sequence[str]) -> int:
    """The experiment with `key=value` changes. Returns 0; 2 for a mistake in these; 130 where it
    was interrupted.
    """
    if {"-h", "--help"} & set(arguments):
        print(describe(ExperimentConfig))
        return 0
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        config = parse(None, arguments, ExperimentConfig)
        table = run(config)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{table}\nresults {config.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
