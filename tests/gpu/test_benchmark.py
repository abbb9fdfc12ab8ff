"""The kernel benchmark on a GPU: every way to take a time, and the rows of our kernels, at small
shapes.
"""

import time
from pathlib import Path

import pytest
import torch

from video_mae.benchmark import kernels
from video_mae.benchmark.attention_operation import AttentionOperation
from video_mae.benchmark.clock import Ceilings, Clock, peak_growth
from video_mae.benchmark.kernel_measurement import measure_operation
from video_mae.benchmark.kernel_operations import (
    ContrastiveOperation,
    EmbedOperation,
    GatherOperation,
    JointOperation,
    Operation,
    ReconstructionOperation,
)
from video_mae.benchmark.record import Results, append, environment
from video_mae.benchmark.report import write_page

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU, BF16 = torch.device("cuda"), torch.bfloat16
SIZE = (4, 96, 96)  # 72 tokens


def problem_of(number: int) -> Operation:
    return [
        lambda: AttentionOperation("short", BF16, GPU, 3, 160, 4, 64),
        lambda: AttentionOperation("long", BF16, GPU, 3, 785, 2, 80),
        lambda: GatherOperation("small", BF16, GPU, 3, SIZE, 11, 64),
        lambda: EmbedOperation("small", BF16, GPU, 3, SIZE, 11, 64),
        lambda: ReconstructionOperation("small", BF16, GPU, 3, SIZE, 61, 64),
        lambda: ContrastiveOperation("small", BF16, GPU, 3, 61, "batch"),
        lambda: JointOperation("small", BF16, GPU, 3, SIZE, 61, 64),
    ][number]()


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock(GPU, 5.0)


@pytest.mark.parametrize("number", range(7))
def test_our_kernels_are_right_and_measured_in_every_way(number: int, clock: Clock) -> None:
    problem = problem_of(number)
    records = measure_operation(problem, clock, Ceilings(1e15, 1e13))
    ours = [
        record
        for record in records
        if record.provider.startswith("ours")
        and not (record.provider == "ours short" and number == 1)
    ]
    assert {(record.provider, record.mode) for record in ours} >= {
        ("ours auto", mode) for mode in problem.modes
    }
    for record in ours:
        assert (record.reason, record.measures.get("gate"), record.measures.get("note")) == (
            "",
            "",
            None,
        ), record.name
        assert set(record.times) == {"cold", "graph", "wall"}
        assert all(0 < times.p20 <= times.p50 <= times.p80 < 100 for times in record.times.values())
        assert float(record.measures["peak_mb"]) > 0
        assert record.measures["bit_equal"] or record.measures.get("resolved") == "sdpa", (
            record.name
        )
    baseline = [record for record in records if record.provider == problem.baseline]
    assert [(record.reason, record.measures["gate"]) for record in baseline] == [("", "")] * len(
        problem.modes
    )


def test_every_sdpa_backend_is_told_by_name(clock: Clock) -> None:
    records = measure_operation(problem_of(0), clock, Ceilings(1e15, 1e13), ["sdpa"])
    forward = {record.provider: record for record in records if record.mode == "forward"}
    assert {"sdpa flash", "sdpa efficient", "sdpa math", "sdpa cudnn", "sdpa default"} <= set(
        forward
    )
    assert not forward["sdpa flash"].reason
    assert forward["sdpa default"].measures["resolved"] in ("flash", "cudnn", "efficient", "math")


def test_a_cold_time_does_not_wait_for_the_host_and_a_wall_time_does(clock: Clock) -> None:
    x = torch.zeros(1024, device=GPU)

    def call() -> None:
        time.sleep(0.001)
        x.add_(1)

    assert clock.cold(call).p50 < 0.5
    assert clock.wall([call]).p50 >= 1


def test_a_cold_time_finds_an_empty_cache(clock: Clock) -> None:
    x = torch.zeros(4 << 20, dtype=torch.float32, device=GPU)  # fits the cache
    warm = clock.graph(lambda: [x.sum] * 20)
    assert clock.cold(x.sum).p50 > warm.p50


def test_peak_memory_is_what_a_call_takes() -> None:
    x = torch.zeros(10_000_000, dtype=torch.uint8, device=GPU)
    assert peak_growth(lambda: x + 1, GPU)[1] / 1e6 == pytest.approx(10, rel=0.1)


def test_ceilings_are_those_of_a_gpu(clock: Clock, tmp_path: Path) -> None:
    ceilings = clock.ceilings(BF16)
    assert 1e13 < ceilings.flops_per_second < 5e15
    assert 1e11 < ceilings.bytes_per_second < 2e13
    header = {**environment(GPU), "dtype": "bfloat16", "ceilings": ceilings._asdict()}
    assert header["driver"]
    assert header["device"] == torch.cuda.get_device_name()
    append(
        tmp_path / "kernels.jsonl",
        Results(
            header,
            measure_operation(problem_of(0), clock, ceilings, ["ours", "reference"]),
        ),
    )
    assert [path.name for path in write_page(tmp_path / "kernels.jsonl", kernels.tables)] == [
        "kernels.md",
        "kernels_roofline.png",
    ]
