"""The files a run leaves: metrics, log and quarantine."""

import json
import multiprocessing
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from video_mae.config import EngineConfig, JournalConfig, RunConfig
from video_mae.files import Register, mend_jsonl, read_jsonl
from video_mae.training.journal import Journal, peak_flops

STAGES = ("decoding", "copying")
KEYS = [
    "step",
    "epoch",
    "loss",
    "reconstruction_loss",
    "contrastive_loss",
    "lr",
    "grad_norm",
    "clips_per_second",
    "data_wait",
    "decoding_ms",
    "copying_ms",
    "mfu",
    "memory_gb",
    "skipped_steps",
    "bad_videos",
    "time",
]


class Failure(NamedTuple):
    path: str
    decoder: str = "decord"
    reason: str = "not a video"


class CountingTensor(torch.Tensor):
    """Counts the operations that would make the host wait for a GPU."""

    num_syncs = 0

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (
            torch.Tensor.item,
            torch.Tensor.tolist,
            torch.Tensor.cpu,
            torch.Tensor.numpy,
            torch.Tensor.__float__,
            torch.Tensor.__int__,
            torch.Tensor.__bool__,
        ):
            CountingTensor.num_syncs += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def make_journal(
    folder: Path, *, log_interval: int = 4, precision: Any = "fp32", **changes: Any
) -> Journal:
    """changes: of the engine (rank, world_size, device, mean, write_events), or of the journal."""
    folder.mkdir(parents=True, exist_ok=True)
    config = RunConfig(
        output=str(folder),
        engine=EngineConfig(precision=precision),
        journal=JournalConfig(log_interval=log_interval),
    )
    engine: Any = SimpleNamespace(
        config=config,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        mean=lambda values: values,
        write_events=lambda events: None,
    )
    for name in changes.keys() & vars(engine).keys():
        setattr(engine, name, changes.pop(name))
    settings = {"total_steps": 10, "clips_per_step": 8, "flops_per_clip": 1e9, "stages": STAGES}
    return Journal(engine, **{**settings, **changes})


def losses(
    loss: torch.Tensor | float,
    reconstruction: torch.Tensor | float,
    contrastive: torch.Tensor | float,
) -> dict[str, Any]:
    """What pretraining measures."""
    return {"loss": loss, "reconstruction_loss": reconstruction, "contrastive_loss": contrastive}


def take_steps(
    journal: Journal, first: int, last: int, loss: Callable[[int], float] = float
) -> None:
    for step in range(first, last + 1):
        value = torch.tensor(loss(step))
        journal.step(
            step, step / 5, losses(value, 2 * value, torch.tensor(0.0)), 1e-3 * step, 3 * value, 0
        )


def test_a_line_holds_exactly_the_promised_keys_and_interval_means(tmp_path: Path):
    journal = make_journal(tmp_path)
    take_steps(journal, 1, 10)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [KEYS] * 3
    assert [line["step"] for line in lines] == [4, 8, 10]  # every interval, and the last step
    assert [line["loss"] for line in lines] == [2.5, 6.5, 9.5]
    assert [line["reconstruction_loss"] for line in lines] == [5, 13, 19]
    assert [line["grad_norm"] for line in lines] == [7.5, 19.5, 28.5]
    assert lines[0]["epoch"] == 0.8
    assert lines[0]["lr"] == pytest.approx(4e-3)
    assert lines[0]["mfu"] is None
    assert lines[0]["memory_gb"] > 0.01
    assert abs(lines[0]["time"] - time.time()) < 60


def test_between_lines_nothing_waits_for_the_device(tmp_path: Path):
    journal = make_journal(tmp_path)
    CountingTensor.num_syncs = 0
    for step in range(1, 4):
        value = torch.tensor(1.0).as_subclass(CountingTensor)
        journal.step(step, 0.0, losses(value, value, 0.0), 1e-3, value, 0)
    assert CountingTensor.num_syncs == 0
    value = torch.tensor(5.0).as_subclass(CountingTensor)
    journal.step(4, 0.0, losses(value, value, 0.0), 1e-3, value, 0)
    assert CountingTensor.num_syncs == 1
    assert read_jsonl(tmp_path / "metrics.jsonl")[0]["loss"] == 2.0


def test_a_value_that_is_not_finite_is_null_in_valid_json(tmp_path: Path):
    take_steps(
        make_journal(tmp_path), 1, 4, loss=lambda step: float("nan") if step == 2 else float("inf")
    )
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["loss"] is None
    assert "loss not finite" in (tmp_path / "log.txt").read_text()


def test_values_are_averaged_over_ranks_and_only_the_main_rank_writes(tmp_path: Path):
    sent: list[torch.Tensor] = []

    def mean(values: torch.Tensor) -> torch.Tensor:
        sent.append(values)
        return values + 1

    other = make_journal(tmp_path, rank=1, mean=mean)
    take_steps(other, 1, 10)
    other.say("from the other rank")
    assert len(sent) == 3  # at the same steps as the main rank
    assert list(tmp_path.iterdir()) == []
    take_steps(make_journal(tmp_path, mean=mean), 1, 4)
    assert read_jsonl(tmp_path / "metrics.jsonl")[0]["loss"] == 3.5


def test_throughput_and_data_wait_are_shares_of_the_time_from_the_first_batch_on(tmp_path: Path):
    journal = make_journal(tmp_path, total_steps=4)
    time.sleep(0.3)  # building the model
    start = time.perf_counter()
    for step in range(1, 5):
        with journal.data_wait():
            time.sleep(0.03)
        time.sleep(0.01)
        take_steps(journal, step, step)
    seconds = time.perf_counter() - start
    line = read_jsonl(tmp_path / "metrics.jsonl")[0]
    assert line["clips_per_second"] == pytest.approx(4 * 8 / seconds, rel=0.1)
    assert 0.12 / seconds * 0.9 < line["data_wait"] < 1 - 0.04 / seconds * 0.9


def test_the_stages_of_loading_are_milliseconds_of_a_clip_over_all_ranks(tmp_path: Path):
    journal = make_journal(tmp_path, total_steps=4, world_size=2)  # 8 clips a step: 4 on this rank
    for step in range(1, 5):
        journal.spent((0.2, 0.01))
        journal.spent((0.04, 0.0))
        take_steps(journal, step, step)
    line = read_jsonl(tmp_path / "metrics.jsonl")[0]
    assert (line["decoding_ms"], line["copying_ms"]) == (
        pytest.approx(240 / 4),
        pytest.approx(10 / 4),
    )


def test_a_line_over_steps_of_other_sizes_counts_the_clips_and_operations_of_each(tmp_path: Path):
    journal = make_journal(tmp_path, total_steps=4)
    journal._peak_flops = 100.0
    for step in range(1, 5):
        if step == 2:
            journal.clips_per_step, journal.flops_per_clip = 24, 5.0
        journal.spent((0.2, 0.0))
        take_steps(journal, step, step)
    line = read_jsonl(tmp_path / "metrics.jsonl")[0]
    clips = 8 + 3 * 24
    assert line["decoding_ms"] == pytest.approx(800 / clips)
    flops = 8 * 1e9 + 3 * 24 * 5.0
    assert line["mfu"] / line["clips_per_second"] == pytest.approx(flops / 100 / clips)


def test_advice_is_asked_after_the_first_line_and_told_once_a_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    journal, asked = make_journal(tmp_path, total_steps=8, log_interval=1), []

    def advise(
        data_wait: float, milliseconds: Mapping[str, float], clips_per_second: float
    ) -> tuple[str, str] | None:
        asked.append((milliseconds["decoding"], milliseconds["copying"]))
        assert 0 <= data_wait <= 1
        assert clips_per_second > 0
        stages = [None, "decoding", "decoding", "copying", "decoding", None, "copying"]
        stage = stages[len(asked) - 1]
        return None if stage is None else (stage, f"{stage} is slow, {len(asked)}")

    journal.advise = advise
    for step in range(1, 9):
        journal.spent((0.008 * step, 0.0))
        take_steps(journal, step, step)
    assert asked == [(pytest.approx(float(step)), 0.0) for step in range(2, 9)]
    assert [line for line in capsys.readouterr().out.splitlines() if "slow" in line] == [
        "decoding is slow, 2",
        "copying is slow, 4",
    ]


def test_any_measures_are_averaged_and_shown_under_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    journal = make_journal(tmp_path, log_interval=2)
    for step in (1, 2):
        journal.step(
            step, 0.5, {"loss": torch.tensor(float(step)), "accuracy": 0.25 * step}, 1e-3, 0.5, 0
        )
    line = read_jsonl(tmp_path / "metrics.jsonl")[0]
    assert list(line) == [*KEYS[:3], "accuracy", *KEYS[5:]]
    assert (line["loss"], line["accuracy"], line["grad_norm"]) == (1.5, 0.375, 0.5)
    assert "loss 1.5000  accuracy 0.3750  lr 1.00e-03" in capsys.readouterr().out


def test_a_record_is_a_line_of_its_own_and_goes_to_the_monitors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    events: list[tuple[str, float, int]] = []
    journal = make_journal(tmp_path, write_events=events.extend)
    journal.record(3, 1.5, {"val_loss": float("nan"), "val_top1": 0.75, "val_videos": 8})
    make_journal(tmp_path / "other", rank=1).record(3, 1.5, {"val_loss": 1.0})
    (line,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert line.pop("time") == pytest.approx(time.time(), abs=60)
    assert line == {"step": 3, "epoch": 1.5, "val_loss": None, "val_top1": 0.75, "val_videos": 8}
    assert "step 3/10  val loss not finite  val top1 0.75  val videos 8" in capsys.readouterr().out
    assert events == [
        ("validation/epoch", 1.5, 3),
        ("validation/val_top1", 0.75, 3),
        ("validation/val_videos", 8.0, 3),
    ]
    assert not (tmp_path / "other" / "metrics.jsonl").exists()


def test_what_is_done_aside_slows_no_figure_down(tmp_path: Path):
    journal = make_journal(tmp_path, total_steps=1)
    start = time.perf_counter()
    with journal.data_wait():
        time.sleep(0.02)
    with journal.aside():
        time.sleep(0.4)
    seconds = time.perf_counter() - start - 0.4
    take_steps(journal, 1, 1)
    assert read_jsonl(tmp_path / "metrics.jsonl")[0]["clips_per_second"] == pytest.approx(
        8 / seconds, rel=0.25
    )


def test_resuming_cuts_the_lines_of_lost_work_and_a_torn_line(tmp_path: Path):
    take_steps(make_journal(tmp_path), 1, 10)
    metrics = tmp_path / "metrics.jsonl"
    first, second = metrics.read_bytes().splitlines(keepends=True)[:2]
    metrics.write_bytes(metrics.read_bytes() + b'{"step": 12, "lo')
    make_journal(tmp_path, rank=1, resumed_step=4)
    assert metrics.read_bytes().endswith(b'"lo')  # only the main rank touches it
    journal = make_journal(tmp_path, resumed_step=9)
    assert metrics.read_bytes() == first + second
    take_steps(journal, 10, 10)
    assert [line["step"] for line in read_jsonl(metrics)] == [4, 8, 10]
    make_journal(tmp_path, resumed_step=0)  # it died before its first checkpoint
    assert metrics.read_bytes() == b""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "metrics.jsonl"]


def test_the_console_line_and_messages_are_kept_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    journal = make_journal(tmp_path)
    journal.say("kernels: reference")
    take_steps(journal, 1, 4)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "kernels: reference"
    assert len(printed) == 2
    for part in (
        "step 4/10",
        "loss 2.5000",
        "lr 4.00e-03",
        "grad norm 7.5",
        "clips/s",
        "data wait 0%",
        "memory",
        "ETA 0:00:0",
    ):
        assert part in printed[1]
    assert "MFU" not in printed[1]
    assert [
        line.split("  ", 1)[1] for line in (tmp_path / "log.txt").read_text().splitlines()
    ] == printed


def test_on_a_terminal_a_bar_shows_the_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "300")
    journal = make_journal(tmp_path)
    journal.say("hello")
    take_steps(journal, 1, 8)
    journal.close()
    said, shown = capsys.readouterr()
    assert said == "hello\n"
    assert "loss=6.5000" in shown
    assert "8/10" in shown
    assert "loss 6.5000" in (tmp_path / "log.txt").read_text()


def test_monitors_receive_the_finite_values_of_each_line(tmp_path: Path):
    events: list[tuple[str, float, int]] = []
    take_steps(make_journal(tmp_path, write_events=events.extend), 1, 4)
    assert ("train/loss", 2.5, 4) in events
    assert {name for name, _, _ in events} == {f"train/{key}" for key in KEYS} - {
        "train/step",
        "train/time",
        "train/mfu",
    }


@pytest.mark.parametrize(
    ("name", "precision", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312e12),
        ("NVIDIA A10", "bf16", 125e12),
        ("NVIDIA A10G", "bf16", None),
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("NVIDIA GeForce RTX 4090", "bf16", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("Some Future GPU", "bf16", None),
    ],
)
def test_peak_flops_are_known_or_unknown_but_never_of_another_gpu(
    name: str, precision: Any, flops: float | None
):
    assert peak_flops(name, precision) == flops


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_mfu_is_the_share_of_the_peak_of_all_devices_and_steps_do_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("video_mae.training.journal.peak_flops", lambda name, precision: 1e12)
    device = torch.device("cuda")
    journal = make_journal(tmp_path, device=device, world_size=2)
    value = torch.tensor(2.0, device=device, dtype=torch.bfloat16)
    monkeypatch.setattr(
        journal.engine,
        "mean",
        lambda values: (torch.cuda.set_sync_debug_mode("default"), values)[1],
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 5):
            with journal.data_wait():
                pass
            journal.step(step, 0.0, losses(value, value, 0.5), 1e-3, value, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    line = read_jsonl(tmp_path / "metrics.jsonl")[0]
    assert (line["loss"], line["contrastive_loss"]) == (2.0, 0.5)
    assert line["mfu"] == pytest.approx(line["clips_per_second"] * 1e9 / 2e12)


def test_a_bad_video_is_quarantined_once_also_across_starts_and_ranks(tmp_path: Path):
    file = tmp_path / "quarantine.jsonl"
    quarantine, other_rank = Register(file), Register(file)
    quarantine.add([], 1)
    assert not quarantine.file.exists()
    quarantine.add([Failure("a.mp4"), Failure("b \u00e9.mp4", "av", "torn\n"), Failure("a.mp4")], 1)
    other_rank.add([Failure("a.mp4"), Failure("c.mp4")], 1)
    assert quarantine.paths == {"a.mp4", "b \u00e9.mp4", "c.mp4"}
    Register(file).add([Failure("c.mp4")], 1)  # a later start
    entries = read_jsonl(quarantine.file)
    assert [entry["path"] for entry in entries] == ["a.mp4", "b \u00e9.mp4", "c.mp4"]
    assert [list(entry) for entry in entries] == [["path", "decoder", "reason", "step", "time"]] * 3
    assert len(quarantine) == len(other_rank) == 3


def test_a_torn_quarantine_line_spoils_no_other(tmp_path: Path):
    file = tmp_path / "quarantine.jsonl"
    Register(file).add([Failure("a.mp4")], 1)
    with file.open("ab") as stream:
        stream.write(b'{"path": "b.mp4", "dec')
    mend_jsonl(file, 1, {"path"}, print)
    Register(file).add([Failure("b.mp4"), Failure("c.mp4")], 1)
    assert [entry["path"] for entry in read_jsonl(file)] == ["a.mp4", "b.mp4", "c.mp4"]


@pytest.mark.parametrize(
    "line",
    [b'{"step": 1, "loss": NaN}', b'{"step": 1, "loss": -Infinity}', b'{"step": 1.5}', b"\0"],
)
def test_a_line_that_is_no_json_of_ours_is_set_aside(tmp_path: Path, line: bytes):
    file, said = tmp_path / "metrics.jsonl", list[str]()
    file.write_bytes(line + b'\n{"step": 2}\n')
    mend_jsonl(file, 2, {"step"}, said.append)
    assert file.read_bytes() == b'{"step": 2}\n'
    assert said == [f"{file}: 1 damaged lines are left out, metrics.jsonl.damaged has them"]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == line + b'\n{"step": 2}\n'


def quarantine_many(folder: Path) -> None:
    quarantine = Register(folder / "quarantine.jsonl")
    for i in range(100):
        quarantine.add([Failure(f"{i}.mp4")], 1)


def test_processes_that_quarantine_at_once_spoil_no_line_and_count_each_path_once(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=quarantine_many, args=(tmp_path,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    file = tmp_path / "quarantine.jsonl"
    assert len(read_jsonl(file)) == file.read_bytes().count(b"\n")
    assert Register(file).paths == {f"{i}.mp4" for i in range(100)}
    assert len(Register(file)) == 100


def test_bad_videos_are_counted_in_the_metrics(tmp_path: Path):
    journal = make_journal(tmp_path)
    journal.quarantine.add([Failure("a.mp4")], 1)
    take_steps(journal, 1, 4)
    assert read_jsonl(tmp_path / "metrics.jsonl")[0]["bad_videos"] == 1
