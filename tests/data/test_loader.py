"""The loader: cores shared out, the same batches for any workers and threads, workers that are
killed, processes that leave none behind.
"""

import gc
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from checkpoint_files import saved_memory

from video_mae.config import DataConfig, PretrainConfig
from video_mae.data import (
    Batch,
    ClipDataset,
    StepSampler,
    clip_indices,
    make_loader,
    read_annotations,
)
from video_mae.data.dataset import UndecodableError
from video_mae.data.loader import DevicePrefetcher, Loader
from video_mae.data.workers import Costs, Workers, advise, plan_workers
from video_mae.decoding import Reading, decoder_version, read_clip, resolve_decoder
from video_mae.files import read_jsonl

GONE_SECONDS = 4  # torch's own watch over the trainer takes 5, and longer in the middle of a batch


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """cores(n, ranks=r): a machine of n cores with r ranks on it."""

    def pretend(num: int, ranks: int = 1) -> None:
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(num)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))

    return pretend


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """Nine videos of moving noise whose frames cannot be taken for one another, and one that is no
    video.
    """
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for number in range(9):
        coarse = rng.integers(256, size=(30, 6, 8, 3), dtype=np.uint8)
        write_video(
            folder / f"{number}.mp4", coarse.repeat(8, axis=1).repeat(8 + 2 * (number % 3), axis=2)
        )
    (folder / "broken.mp4").write_bytes(b"no video" * 99)
    names = [*(f"{number}.mp4 {number}" for number in range(9)), "broken.mp4 9"]
    (folder / "list.txt").write_text("\n".join(names) + "\n")
    return folder / "list.txt"


def loader(
    videos: Path,
    *,
    steps: int = 4,
    rank: int = 0,
    ranks: int = 1,
    say: Callable[[str], None] = print,
    **changes: Any,
) -> "Loader[Batch]":
    data = replace(
        DataConfig(source=str(videos), stride=2, clips_per_video=2, flip=True, num_workers=0),
        **changes,
    )
    clips = ClipDataset(read_annotations(data), data, num_frames=4, height=32, width=32, seed=3)
    loader = make_loader(
        clips, StepSampler(len(clips), 4 // ranks, 1, rank, ranks, 3, 0, steps), data
    )
    loader.say = say
    return loader


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert (one.failures, one.fallbacks) == (other.failures, other.fallbacks)
        for name in ("clip_BTHWC", "seeds_B", "host_seeds_B", "label_B", "index_B"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize(
    ("num", "ranks", "asked", "planned"),
    [
        (16, 2, (None, None), (8, 1)),
        (64, 1, (None, None), (16, 4)),
        (64, 8, (None, None), (8, 1)),
        (2, 4, (None, None), (1, 1)),
        (16, 2, (3, None), (3, 2)),
        (16, 2, (0, None), (0, 4)),
        (16, 2, (12, None), (8, 1)),
        (16, 2, (None, 4), (2, 4)),
        (16, 1, (8, 2), (8, 2)),
        (16, 1, (12, 2), (8, 2)),
        (4, 1, (1, 9), (1, 4)),
        (16, 1, (1, None), (1, 4)),
        (3, 1, (2, None), (2, 1)),
    ],
)
def test_ranks_x_workers_x_threads_never_exceed_the_cores(
    cores: Callable[..., None],
    num: int,
    ranks: int,
    asked: tuple[Any, Any],
    planned: tuple[int, int],
) -> None:
    cores(num, ranks)
    plan = plan_workers(*asked)
    assert (plan.num, plan.threads) == planned
    assert ranks * max(plan.num, 1) * plan.threads <= max(num, ranks)
    less = [
        name
        for name, wish, given in zip(
            ("num_workers", "decoder_threads"), asked, planned, strict=True
        )
        if wish and given < wish
    ]
    assert all(f"{name} = " in plan.told for name in less)
    assert bool(plan.told) == bool(less)
    assert "\n" not in plan.told + plan.describe()


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_batches_are_the_same_for_any_workers_threads_and_ranks(
    videos: Path, cores: Callable[..., None], decoder: str
) -> None:
    cores(16)
    alone = list(loader(videos, decoder=decoder, decoder_threads=1))
    assert any(batch.failures for batch in alone)
    assert len({clip.numpy().tobytes() for batch in alone for clip in batch.clip_BTHWC}) > 12
    assert_same(list(loader(videos, decoder=decoder, decoder_threads=4)), alone)
    assert_same(list(loader(videos, decoder=decoder, num_workers=2, decoder_threads=3)), alone)
    first, second = (
        list(loader(videos, decoder=decoder, num_workers=1, decoder_threads=2, rank=rank, ranks=2))
        for rank in (0, 1)
    )
    for whole, left, right in zip(alone, first, second, strict=True):
        assert torch.equal(whole.clip_BTHWC, torch.cat([left.clip_BTHWC, right.clip_BTHWC]))
        assert whole.host_seeds_B.tolist() == [
            *left.host_seeds_B.tolist(),
            *right.host_seeds_B.tolist(),
        ]


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize(
    "name",
    [
        "WUzgd7C1pWA.mp4",
        "flipping_a_pancake.mkv",
        "v_SoccerJuggling_g23_c01.avi",
        "h265_video.mp4",
        "vfr.mp4",
        "video_90.mov",
        "nasa_13013.mp4",
    ],
)
def test_real_videos_decode_to_the_same_frames_with_any_number_of_threads(
    shared_videos: Path, decoder: Any, name: str
) -> None:
    one, four = (
        read_clip(
            str(shared_videos / "real" / name),
            partial(clip_indices, num_frames=16, stride=3, rng=np.random.default_rng(1)),
            Reading(decoder=decoder, threads=threads),
        )
        for threads in (1, 4)
    )
    assert (one.decoder, one.fallback) == (four.decoder, four.fallback)
    assert np.array_equal(one.clip_THWC, four.clip_THWC)


def test_the_threads_that_are_planned_reach_the_decoder(
    videos: Path, cores: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cores(12)
    seen: list[int] = []
    monkeypatch.setattr(
        "video_mae.data.dataset.read_clip",
        lambda place, choose, reading: seen.append(reading.threads) or 1 / 0,
    )
    data = DataConfig(source=str(videos), num_workers=4)
    with pytest.raises(ZeroDivisionError):
        ClipDataset(read_annotations(data), data, 4, 32, 32, 3)[0, 0]
    assert seen == [3]


def test_batches_carry_what_they_cost_and_the_device_adds_its_copy(videos: Path) -> None:
    begin = time.perf_counter()
    batches = list(DevicePrefetcher(loader(videos), torch.device("cpu")))
    seconds = time.perf_counter() - begin
    total = Costs.total(batch.costs for batch in batches)
    assert all(
        getattr(total, stage) > 0 for stage in ("decoding", "augmenting", "collating", "copying")
    )
    assert 0.6 * seconds < sum(total) < seconds  # all of the time but that of looking and sampling
    assert total.decoding > total.augmenting


@dataclass
class Parcel:
    """What a DevicePrefetcher sees of a batch."""

    number: int
    costs: Costs = Costs()
    on_device = ()

    def pin_memory(self) -> "Parcel":
        return self

    def to(self, device: torch.device) -> "Parcel":
        assert device.type == "cuda"
        return self


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """For the thread that prefetches; tests/gpu looks at what a GPU does."""
    for name in ("Stream", "current_stream", "set_device"):
        monkeypatch.setattr(
            torch.cuda, name, lambda _: SimpleNamespace(wait_event=lambda event: None)
        )
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    event = SimpleNamespace(record=lambda: None, query=lambda: True, elapsed_time=lambda end: 250.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    return torch.device("cuda", 0)


def test_the_thread_that_prefetches_is_one_batch_ahead_and_ends(
    pretended_gpu: torch.device,
) -> None:
    taken: list[int] = []

    def parcels() -> Iterator[Any]:
        for number in range(6):
            taken.append(number)
            yield Parcel(number, Costs(decoding=1.0))

    batches: Any = DevicePrefetcher(parcels(), pretended_gpu)
    for number in range(6):
        time.sleep(0.05)
        assert len(taken) == number + 1  # the one that comes now is there, no more
        batch = next(batches)
        assert (batch.number, batch.costs.decoding) == (number, 1.0)
        assert batch.costs.copying == pytest.approx(0.25, abs=0.05)
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(batches)
    assert not batches._thread.is_alive()

    endless: Any = DevicePrefetcher((Parcel(number) for number in itertools.count()), pretended_gpu)  # pyright: ignore
    assert next(endless).number == 0
    endless.close()
    assert not endless._thread.is_alive()


def test_what_the_loader_raises_in_the_thread_is_raised_where_batches_are_taken(
    pretended_gpu: torch.device,
) -> None:
    def parcels() -> Iterator[Any]:
        yield Parcel(0)
        raise RuntimeError("20 videos in a row")

    batches = DevicePrefetcher(parcels(), pretended_gpu)
    next(batches)
    with pytest.raises(RuntimeError, match="20 videos in a row"):
        next(batches)


def children(process: psutil.Process | None = None) -> list[psutil.Process]:
    return (process or psutil.Process()).children(recursive=True)


def workers_of(items: Any) -> list[int]:
    return [worker.pid for worker in items.gi_frame.f_locals["items"]._workers]


def test_a_worker_that_is_killed_is_replaced_and_no_batch_is_lost(videos: Path) -> None:
    expected = list(loader(videos, steps=12))
    told: list[str] = []
    batches = iter(loader(videos, steps=12, num_workers=2, prefetch_batches=1, say=told.append))
    found = [next(batches) for _ in range(3)]
    for pid in workers_of(batches):
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.3)  # a handler of SIGCHLD, if there were one, would raise here
    numbers = torch.get_rng_state()
    found += list(batches)
    assert torch.equal(torch.get_rng_state(), numbers)  # they are those of a step in the middle
    assert_same(found, expected)
    assert len(told) == 1
    assert "decoding worker" in told[0]
    assert "no batch is lost" in told[0]


class Handed:
    """Items of workers from `delivered` to 3, of which `broken` end in an error on their way."""

    def __init__(self, delivered: int, error: Exception, broken: range = range(0)) -> None:
        self.left, self.error, self.broken = list(range(delivered, 4)), error, broken
        self._workers: list[Any] = []

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if not self.left:
            raise StopIteration
        if self.left[0] in self.broken:
            raise self.error
        return self.left.pop(0)


def telling(make: Callable[[int], Any], told: list[str]) -> Loader[int]:
    loader: Loader[int] = Loader(make)
    loader.say = told.append
    return loader


def test_workers_that_die_each_time_end_the_run_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("video_mae.data.loader.MAX_RESTARTS", 2)
    starts, told = [], list[str]()
    death = RuntimeError("DataLoader worker (pid(s) 5, 6) exited unexpectedly")

    def make(delivered: int) -> Any:
        starts.append(delivered)
        return Handed(delivered, death, range(1, 4))

    with pytest.raises(
        RuntimeError,
        match=r"exited unexpectedly'\)\), for the last of 3 times: is there enough memory\? Lower data",
    ):
        list(telling(make, told))
    assert (starts, len(told)) == ([0, 1, 1], 2)


def test_deaths_with_batches_between_them_are_never_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("video_mae.data.loader.MAX_RESTARTS", 1)

    def make(delivered: int) -> Any:
        return Handed(delivered, EOFError(), range(delivered + 1, 4))

    told: list[str] = []
    assert list(telling(make, told)) == [0, 1, 2, 3]
    assert len(told) == 3
    assert all("(1 of at most 1 times in a row)" in line for line in told)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "reset by peer"),
        ConnectionRefusedError(111, "refused"),
        EOFError(),
        FileNotFoundError(2, "no such socket"),
        RuntimeError("received 0 items of ancdata"),
    ],
)
def test_a_worker_that_dies_with_a_batch_in_its_hands_is_replaced_too(error: Exception) -> None:
    told: list[str] = []

    def make(delivered: int) -> Any:
        return Handed(delivered, error, range(0 if delivered else 1, 0 if delivered else 2))

    found = list(telling(make, told))
    assert found == [0, 1, 2, 3]
    assert len(told) == 1
    assert type(error).__name__ in told[0]

    of_data = type(error)("Caught it in DataLoader worker process 1.\nOriginal Traceback")
    with pytest.raises(type(error)):
        list(telling(lambda delivered: Handed(delivered, of_data, range(1, 4)), told))
    assert len(told) == 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_list_of_which_nothing_can_be_decoded_is_one_line(
    tmp_path: Path, num_workers: int
) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 99)
    (tmp_path / "list.txt").write_text("broken.mp4 1\n")
    told: list[str] = []
    with pytest.raises(UndecodableError) as error:
        list(loader(tmp_path / "list.txt", num_workers=num_workers, say=told.append))
    assert str(error.value).startswith("data.source: 20 videos in a row cannot be decoded")
    assert "\n" not in str(error.value)
    assert told == []


def wait_until_gone(processes: list[psutil.Process]) -> list[psutil.Process]:
    return psutil.wait_procs(processes, timeout=GONE_SECONDS)[1]


@pytest.fixture
def start_run(tiny_file: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """start_run("optim.steps=3", ...): the tiny run as a process of its own, with a worker."""
    started: list[subprocess.Popen[str]] = []

    def start(*overrides: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "video_mae",
            "pretrain",
            str(tiny_file),
            f"output={tmp_path / 'run'}",
            "data.num_workers=2",
            *overrides,
        ]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
        return started[-1]

    # a loader that an earlier test left would be ended, for seconds, while this test looks
    gc.collect()
    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.launcher
@pytest.mark.parametrize("end", ["finished", "killed"])
def test_a_run_leaves_no_process_behind(
    start_run: Callable[..., subprocess.Popen[str]], tmp_path: Path, end: str
) -> None:
    process = start_run(
        f"optim.steps={150 if end == 'finished' else 100_000}", "optim.micro_batch=2"
    )
    trainer, seen, deadline = (
        psutil.Process(process.pid),
        dict[int, psutil.Process](),
        time.monotonic() + 120,
    )
    while len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) < 3:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline
        seen |= {child.pid: child for child in children(trainer)}
        time.sleep(0.1)
    seen |= {child.pid: child for child in children(trainer)}
    assert len(seen) >= 4  # two workers, a decoding process of each
    if end == "killed":
        process.kill()
    assert process.wait(timeout=120) == (-signal.SIGKILL if end == "killed" else 0)
    assert wait_until_gone(list(seen.values())) == []


GOOD = Costs(reading=1.0, decoding=8.0, augmenting=2.0, collating=0.5, copying=0.1)
LOADING: dict[str, Any] = {"data": DataConfig(), "workers": Workers(4, 1, 16, 2), "world_size": 2}


@pytest.mark.parametrize(
    ("costs", "changes", "stage", "remedies", "not_remedies"),
    [
        (
            Costs(1, 41, 8, 2, 0.1),
            {},
            "decoding",
            ("data.num_workers=6", "clips_per_video=2", "short_side", "`video-mae pack`"),
            ("crop_where",),
        ),
        (
            Costs(1, 61, 8, 2, 0.1),
            {"workers": Workers(8, 1, 16, 2)},
            "decoding",
            ("clips_per_video=2",),
            ("num_workers",),
        ),
        (
            Costs(1, 99, 8, 2, 0.1),
            {"workers": Workers(8, 1, 16, 2)},
            "decoding",
            ("more cores (12 a rank)",),
            ("num_workers",),
        ),
        (Costs(1, 41, 8, 2, 0.1), {"packed": "video"}, "decoding", ("--form frames",), ()),
        (
            Costs(1, 41, 8, 2, 0.1),
            {"packed": "frames"},
            "decoding",
            ("num_workers",),
            ("pack", "short_side"),
        ),
        (
            Costs(50, 4, 8, 2, 0.1),
            {},
            "reading",
            ("video-mae pack", "disk"),
            ("short_side", "crop_where"),
        ),
        (
            Costs(1, 4, 60, 2, 0.1),
            {"augments_in_workers": True},
            "augmenting",
            ("augment.where=device", "data.crop_where=device"),
            ("pack",),
        ),
        (
            Costs(1, 4, 8, 60, 0.1),
            {"data": DataConfig(crop_where="device")},
            "collating",
            ("data.crop_where=worker",),
            ("pack",),
        ),
        (Costs(1, 4, 3, 2, 60), {}, "copying", ("fewer bytes",), ("pack", "cores")),
        (
            Costs(1, 4, 3, 2, 0.1),
            {},
            "handing over",
            ("prefetch_batches=4", "where no optim.global_batch derives it"),
            ("pack", "cores"),
        ),
        (
            Costs(1, 41, 8, 2, 0.1),
            {"workers": Workers(0, 1, 16, 2)},
            "no workers",
            ("data.num_workers=6",),
            ("pack",),
        ),
    ],
)
def test_a_wait_for_data_names_its_stage_and_what_helps_there(
    costs: Costs,
    changes: dict[str, Any],
    stage: str,
    remedies: tuple[str, ...],
    not_remedies: tuple[str, ...],
) -> None:
    found = advise(0.37, costs._asdict(), 130.0, **{**LOADING, **changes})
    assert found is not None
    name, line = found
    cause, remedy = line.rsplit(": ", 1)
    assert name == stage
    assert "data wait 37%" in cause
    assert "\n" not in line
    for word in remedies:
        assert word in remedy
    for word in not_remedies:
        assert word not in remedy


def test_the_figures_of_an_advice_add_up() -> None:
    found = advise(0.37, Costs(1, 41, 8, 2, 0.1)._asdict(), 130.0, **LOADING)
    assert found is not None
    # 2 ranks x 4 workers / 52 ms = 154 clips/s; 130 clips/s in 63 % of the time are 206.
    assert (
        "of 52.0 ms a clip decoding takes 41.0; 4 workers a rank give 154 clips/s, the model "
        "would take 206: " in found[1]
    )


def test_a_short_wait_needs_no_advice() -> None:
    assert advise(0.05, GOOD._asdict(), 130.0, **LOADING) is None
    assert advise(0.0, Costs()._asdict(), 0.0, **LOADING) is None


Tiny = Callable[..., PretrainConfig]


@pytest.mark.trains_here
@pytest.mark.usefixtures("quiet_process")
class TestRun:
    """What a training run records of its decoder."""

    def test_the_decoder_of_a_run_is_recorded_and_kept(
        self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from video_mae.training.pretrain import prepare, run

        config = tiny("data.decoder=decord", "journal.checkpoint_interval=2")
        run(prepare(config))
        folder = Path(config.output)
        assert "decoder: decord" in (folder / "config.yaml").read_text()
        memory = saved_memory(folder / "checkpoints" / "step_00000004")
        assert memory["decoder"] == f"decord {decoder_version('decord')}"
        # auto is what the run has, not what it would be now
        assert prepare(tiny()).config.data.decoder == "decord"
        with pytest.raises(
            ValueError,
            match=r"run: this run was started with data.decoder = decord, now it is pyav; set "
            r"it back",
        ):
            prepare(tiny("data.decoder=pyav"))

        def gone(name: str) -> str:
            raise ValueError(
                f"data.decoder: {name} cannot be loaded here (no module); install it, or take "
                f"one of: pyav"
            )

        monkeypatch.setattr("video_mae.training.run_folder.resolve_decoder", gone)
        with pytest.raises(
            ValueError,
            match=r"run: this run reads videos with decord: decord cannot be loaded here \(no "
            r"module\); "
            "install it, or choose another output$",
        ):
            prepare(tiny())

    def test_auto_is_resolved_before_a_run_starts(self, tiny: Tiny) -> None:
        from video_mae.training.pretrain import prepare

        plan = prepare(tiny("data.decoder=auto"))
        assert plan.config.data.decoder == resolve_decoder("auto") != "auto"

    def test_a_checkpoint_of_another_version_of_the_decoder_is_told(
        self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from video_mae.training.pretrain import prepare, run

        config = tiny("optim.steps=2")
        monkeypatch.setattr("video_mae.training.loop.decoder_version", lambda _: "0.1")
        run(prepare(config))
        monkeypatch.undo()
        run(prepare(config))
        name = resolve_decoder("auto")
        assert (
            f"videos are read by {name} {decoder_version(name)}, up to step 2 they were by "
            f"{name} 0.1" in (Path(config.output) / "log.txt").read_text()
        )

    def test_videos_that_another_decoder_reads_are_counted_and_named_once(
        self, tiny: Tiny, shared_videos: Path, tmp_path: Path
    ) -> None:
        from video_mae.training.pretrain import prepare, run

        (tmp_path / "list.txt").write_text(
            "".join(
                f"{shared_videos / name}\n"
                for name in ("real/editlist.mp4", "real/demo_demo.mp4", "real/R6llTwEh07w.mp4")
            )
        )
        config = tiny(
            f"data.source={tmp_path / 'list.txt'}", "data.decoder=decord", "data.num_workers=1"
        )
        run(prepare(config))
        folder = Path(config.output)
        (entry,) = read_jsonl(folder / "fallbacks.jsonl")
        assert (Path(entry["path"]).name, entry["decoder"]) == ("editlist.mp4", "pyav")
        assert "edit list" in entry["reason"]
        log = (folder / "log.txt").read_text()
        assert log.count("1 of the videos so far were read by another decoder") == 2
        assert "editlist.mp4 by pyav, as decord: an edit list hides frames" in log
        report = (folder / "report.html").read_text()
        assert "1 videos were read by another decoder (fallbacks.jsonl), the first" in report
        assert not (folder / "quarantine.jsonl").exists()

    def test_a_killed_worker_changes_nothing_of_a_run(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from video_mae.training.loop import Training
        from video_mae.training.pretrain import prepare, run

        accumulate, losses = Training._accumulate, list[list[float]]()

        def kill(self: Training[Any], batches: Any, step: int) -> Any:
            if step == 3:
                os.kill(workers_of(batches._batches)[0], signal.SIGKILL)
            return accumulate(self, batches, step)

        for name in ("quiet", "killed"):
            if name == "killed":
                monkeypatch.setattr(Training, "_accumulate", kill)
            run(prepare(tiny(f"output={tmp_path / name}", "data.num_workers=1", "optim.steps=8")))
            losses.append([line["loss"] for line in read_jsonl(tmp_path / name / "metrics.jsonl")])
        assert losses[0] == losses[1]
        assert len(losses[0]) == 8
        assert "1 of at most" in (tmp_path / "killed" / "log.txt").read_text()
