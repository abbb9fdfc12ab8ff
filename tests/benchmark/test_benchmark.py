"""The kernel benchmark on a CPU: it measures every provider there is, finds wrong ones, and its
rooflines are those worked out by hand.
"""

import math
import runpy
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from video_mae.benchmark import kernel_operations, kernels
from video_mae.benchmark.attention_operation import AttentionOperation
from video_mae.benchmark.clock import Ceilings, Clock, Work
from video_mae.benchmark.kernel_measurement import judge, measure_operation
from video_mae.benchmark.kernel_operations import (
    ContrastiveOperation,
    EmbedOperation,
    GatherOperation,
    JointOperation,
    Provider,
    ReconstructionOperation,
)
from video_mae.benchmark.record import Percentiles, Record, Results, percentiles
from video_mae.kernels import reference

CPU = torch.device("cpu")
H100 = Ceilings(800e12, 3.0e12)
CEILINGS = Ceilings(1e11, 1e10)
SIZE = (4, 48, 80)  # 2 x 3 x 5 tokens
norms = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "norms.py")))


def tiny_problems(dtype: torch.dtype = torch.float32) -> list[Any]:
    return [
        GatherOperation("tiny", dtype, CPU, 2, SIZE, 7, 24),
        EmbedOperation("tiny", dtype, CPU, 2, SIZE, 7, 24),
        ReconstructionOperation("tiny", dtype, CPU, 3, SIZE, 23, 24),
        ContrastiveOperation("tiny", dtype, CPU, 2, 23, "clip"),
        ContrastiveOperation("tiny", dtype, CPU, 2, 23, "batch"),
        JointOperation("tiny", dtype, CPU, 2, SIZE, 23, 24),
        AttentionOperation("tiny", dtype, CPU, 2, 37, 3, 24),
    ]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the minute that compiling takes."""
    monkeypatch.setattr(kernel_operations, "compiled", lambda function: function)


def measured(problem: Any) -> dict[tuple[str, str], Record]:
    records = measure_operation(problem, Clock(CPU, 0.5), CEILINGS)
    return {(record.provider, record.mode): record for record in records}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", range(7))
@pytest.mark.usefixtures("eager")
def test_every_provider_that_a_cpu_has_is_right_and_measured(
    number: int, dtype: torch.dtype
) -> None:
    problem = tiny_problems(dtype)[number]
    cells = measured(problem)
    missing = {provider for (provider, _), record in cells.items() if record.reason}
    assert missing <= {
        "sdpa cudnn",
        "sdpa efficient",
        "flex",
        "ours short",
        "ours long",
        "ours triton",
        "ours fast",
        "ours fast, 256 MB",
        "ours least",
    }
    assert {"ours auto", "reference", "reference compiled", problem.baseline} <= {
        provider for provider, _ in cells
    } - missing
    for (provider, mode), record in cells.items():
        if provider not in missing:
            assert record.measures["gate"] == "", (provider, mode)
            assert record.measures["bit_equal"]
            assert (
                0 < record.times["wall"].p20 <= record.times["wall"].p50 <= record.times["wall"].p80
            )
            assert set(record.times) == {"wall"}  # the other ways need a GPU
            assert "peak_mb" not in record.measures
    assert {mode for provider, mode in cells if provider == "ours auto"} == set(problem.modes)


def test_a_compiled_provider_runs_its_backward_pass_again_and_again() -> None:
    cells = measure_operation(tiny_problems()[3], Clock(CPU, 0.5), CEILINGS, ["plain compiled"])
    assert [(record.mode, record.reason, record.measures["gate"]) for record in cells] == [
        (mode, "", "") for mode in kernel_operations.MODES
    ]


class Faulty(AttentionOperation):
    """Attention with providers that are wrong in one way each."""

    def providers(self) -> dict[str, Provider]:
        def row(x: Any) -> torch.Tensor:
            out = self.definition(x).clone()
            out[1, 5, 0] = out[1, 5, 0] * 1.01
            return out

        def gradient(x: Any) -> torch.Tensor:
            out = self.definition(x)
            return out.detach() + (out - out.detach()) * 1.001

        calls = count()

        def random(x: Any) -> torch.Tensor:
            return self.definition(x) * (1 + 2e-7 * (next(calls) % 2))

        def raises(x: Any) -> torch.Tensor:
            raise torch.OutOfMemoryError("out of memory\nand a second line")

        def no_backward(x: Any) -> torch.Tensor:
            return self.definition(x).detach()

        ours = {
            "right": self.definition,
            "row": row,
            "scale": lambda x: self.definition(x) * 1.0001,
            "gradient": gradient,
            "nan": lambda x: self.definition(x) * math.nan,
        }
        others = {
            "reference": self.definition,
            "random": random,
            "shape": lambda x: self.definition(x)[:, :-1],
            "raises": raises,
            "no backward": no_backward,
        }
        return {**others, **{f"ours {name}": run for name, run in ours.items()}}


def faulty_cells() -> dict[tuple[str, str], Record]:
    cells = measured(Faulty("tiny", torch.float32, CPU, 2, 37, 3, 24))
    return {(name.removeprefix("ours "), mode): record for (name, mode), record in cells.items()}


class TooLarge(AttentionOperation):
    """Attention whose inputs do not fit."""

    def inputs(self) -> Any:
        raise torch.OutOfMemoryError("out of memory")


def test_a_wrong_kernel_is_found_and_gets_no_speed_up() -> None:
    cells = faulty_cells()
    gates = {name: record.measures.get("gate") for name, record in cells.items()}
    for provider in ("row", "scale", "nan"):
        assert "result: " in str(gates[provider, "forward"])
    # a single wrong row: the largest error tells
    assert "off by up to" in str(gates["row", "forward"])
    assert "values not finite" in str(gates["nan", "forward"])
    assert gates["gradient", "forward"] == ""
    assert str(gates["gradient", "backward"]).startswith("dq: ")
    assert "dv: " in str(gates["gradient", "both"])
    assert gates["right", "both"] == gates["reference", "both"] == ""
    assert not cells["random", "forward"].measures["bit_equal"]
    assert cells["right", "both"].measures["bit_equal"]
    (table,) = kernels.tables(Results({}, list(cells.values())))
    rows = {
        (row[1].removeprefix("ours "), row[0]): dict(zip(table.columns, row, strict=True))
        for row in table.rows
    }
    for name, row in rows.items():
        wrong = cells[name].reason or gates[name]
        assert (row["x reference"] == row["x best other"] == "-") == bool(wrong), name
    assert rows["row", "forward"]["verdict"].startswith("WRONG: result: off by")
    assert float(rows["reference", "forward"]["x reference"]) == 1


def test_what_is_not_available_is_a_row_that_says_why() -> None:
    cells = faulty_cells()
    assert cells["raises", "forward"].reason == "OutOfMemoryError: out of memory"
    assert ("raises", "both") not in cells
    assert cells["no backward", "forward"].measures["gate"] == ""
    assert cells["no backward", "backward"].reason.startswith(
        "RuntimeError: element 0 of tensors does not require grad"
    )
    assert "shape" in cells["shape", "forward"].reason or "shape" in str(
        cells["shape", "forward"].measures["gate"]
    )
    (record,) = measured(TooLarge("tiny", torch.float32, CPU, 2, 37, 3, 24)).values()
    assert (record.provider, "do not fit the memory" in record.reason) == ("every provider", True)
    text = kernels.tables(Results({}, list(cells.values())))[0].text()
    assert "not available: OutOfMemoryError: out of memory" in text


def cell(
    provider: str,
    ms: float,
    ours: bool = False,
    gate: str = "",
    mode: str = "forward",
    tokens: int = 160,
) -> Record:
    return Record(
        benchmark="kernels",
        op="attention",
        shape=f"s {tokens}",
        dtype="bfloat16",
        provider=provider,
        mode=mode,
        times={"cold": Percentiles(ms, 0.9 * ms, 1.1 * ms), "wall": Percentiles(9.0, 8.0, 10.0)},
        measures={
            "gate": gate,
            "is_ours": ours,
            "is_baseline": provider == "reference",
            "flops": 2e9,
            "bytes": 1e7,
            "tflops": 2 / ms,
            "gbps": 10 / ms,
            "floor_percent": 50.0,
            "peak_mb": tokens,
            "max_error": 1e-3,
            "rms_error": 1e-3,
            "bit_equal": True,
            "batch": 2,
            "heads": 3,
            "width": 64,
            "tokens": tokens,
        },
    )


def test_speed_ups_are_against_the_baseline_and_the_fastest_right_other() -> None:
    records = [
        cell("reference", 8.0),
        cell("wrong", 0.1, gate="result: off"),
        cell("sdpa flash", 2.0),
        cell("ours", 1.0, ours=True),
        cell("ours auto", 0.5, ours=True),
    ]
    (table,) = kernels.tables(Results({}, records))
    columns = [table.columns.index(name) for name in ("x reference", "x best other")]
    assert [[row[i] for i in columns] for row in table.rows] == [
        ["1.00", "0.25"],
        ["-", "-"],
        ["4.00", "1.00"],
        ["8.00", "2.00"],
        ["16.00", "4.00"],
    ]
    assert table.notes == ["best other: forward sdpa flash"]
    (table,) = kernels.tables(
        Results({}, [cell("reference", 8.0, gate="result: off"), cell("ours", 1.0, ours=True)])
    )
    assert [row[columns[0]] for row in table.rows] == ["-", "-"]
    assert "reference forward is wrong, so nothing is compared with it" in table.notes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_gate_is_the_rule_of_the_tests(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(65, 33, generator=generator).double()
    low = exact.to(dtype)
    outcomes = set()
    for scale in (0.0, *(norms.RMSE[dtype] * 10**power for power in (-1.5, -1, -0.5, 0, 0.5, 1))):
        for rows in (65, 1):
            noise = torch.zeros_like(exact)
            noise[:rows] = torch.randn(rows, 33, generator=generator)
            ours = (exact + scale * noise).to(dtype)
            verdict = judge(ours, low, exact)
            try:
                norms.assert_close(ours, low, exact)
                allowed = True
            except AssertionError:
                allowed = False
            # the tests let a large relative error pass where no value is off by more than two
            # roundings
            if allowed and verdict.failure:
                assert "relative" in verdict.failure
                assert verdict.max_error <= norms.rounding_noise(exact, dtype)
            else:
                assert allowed == (verdict.failure == ""), (scale, rows)
                outcomes.add((allowed, "off by" in verdict.failure))
    assert outcomes == {(True, False), (False, True)}
    # everything a little off, nothing by much: only the second half of the rule tells
    if dtype == torch.bfloat16:
        assert judge((exact + 0.012).to(dtype), low, exact).failure.startswith("relative error")


@pytest.mark.parametrize(
    ("dims", "gflops", "megabytes", "forward_us", "backward"),
    [
        ((32, 160, 12, 64), 2.52, 31.7, 10.6, (6.29, 63.4, 21.1)),
        ((32, 160, 16, 64), 3.36, 42.3, 14.1, (8.39, 84.5, 28.2)),
        ((32, 160, 16, 80), 4.19, 52.8, 17.6, (10.5, 106, 35.2)),
        ((32, 160, 16, 88), 4.61, 58.0, 19.3, (11.5, 116, 38.7)),
        ((32, 1568, 6, 64), 120.9, 155, 151, (302, 311, 378)),
        ((32, 944, 6, 64), 43.8, 93.5, 54.8, (110, 187, 137)),
        ((32, 784, 12, 64), 60.4, 155, 75.5, (151, 311, 189)),
        ((32, 1568, 16, 88), 443, 568, 554, (1108, 1137, 1385)),
    ],
)
def test_the_roofline_of_attention_is_that_worked_out_by_hand(
    dims: tuple[int, int, int, int],
    gflops: float,
    megabytes: float,
    forward_us: float,
    backward: tuple[float, float, float],
) -> None:
    problem = AttentionOperation("by hand", torch.bfloat16, CPU, *dims)
    for mode, expected in (("forward", (gflops, megabytes, forward_us)), ("backward", backward)):
        work = problem.work(mode)
        assert (work.flops / 1e9, work.bytes / 1e6, 1e3 * H100.floor_ms(work)) == pytest.approx(
            expected, rel=0.01
        )
    assert problem.work("both").flops == pytest.approx(3.5 * problem.work("forward").flops)


def test_the_roofline_of_the_losses_is_that_worked_out_by_hand() -> None:
    size = (16, 224, 224)
    per_clip = 32 * 1e6
    gather = GatherOperation("by hand", torch.bfloat16, CPU, 32, size, 160, 768).work("forward")
    assert gather.bytes / per_clip == pytest.approx(0.25 + 0.49, rel=0.01)
    assert 1e3 * H100.floor_ms(gather) == pytest.approx(7.9, rel=0.01)
    reconstruction = ReconstructionOperation("by hand", torch.bfloat16, CPU, 32, size, 1408, 768)
    assert reconstruction.work("forward").bytes / per_clip == pytest.approx(6.5, rel=0.01)
    assert reconstruction.work("both").bytes / per_clip == pytest.approx(10.8, rel=0.01)
    assert H100.floor_ms(reconstruction.work("both")) == pytest.approx(0.115, rel=0.01)
    contrastive = ContrastiveOperation("by hand", torch.bfloat16, CPU, 32, 1408, "clip")
    assert contrastive.work("forward").flops == pytest.approx(0.195e12, rel=0.01)
    assert contrastive.work("both").flops == 2 * contrastive.work("forward").flops
    assert ContrastiveOperation("by hand", torch.bfloat16, CPU, 32, 1408, "batch").work(
        "forward"
    ).flops == pytest.approx(6.24e12, rel=0.01)
    assert EmbedOperation("by hand", torch.bfloat16, CPU, 32, size, 160, 768).work(
        "forward"
    ).flops == pytest.approx(12e9, rel=0.01)


def test_times_are_those_of_the_calls() -> None:
    slow = Clock(CPU, 30.0).wall([lambda: time.sleep(0.003), lambda: time.sleep(0.003)])
    assert 3 <= slow.p20 <= slow.p50 <= slow.p80
    assert slow.p20 < 30
    assert percentiles([1, 2, 3, 4, 5, 6]) == (3.5, 2, 5)
    ceilings = Ceilings(2e12, 1e12)
    assert ceilings.floor_ms(Work(4e9, 1e9)) == 2
    assert ceilings.floor_ms(Work(4e9, 8e9)) == 8


def test_inputs_are_what_both_recipes_take() -> None:
    problem = tiny_problems()[2]

    def inputs(seed: int) -> Any:
        torch.manual_seed(seed)
        return problem.inputs()

    x = inputs(3)
    assert all(torch.equal(value, vars(inputs(3))[name]) for name, value in vars(x).items())
    assert not torch.equal(x.clip_BTHWC, inputs(4).clip_BTHWC)
    for clip in range(3):
        assert x.index_BN[clip].tolist() == x.mask_BN[clip].nonzero().flatten().tolist()
    mean, std = (torch.tensor(values) for values in (kernel_operations.MEAN, kernel_operations.STD))
    torch.testing.assert_close(
        x.video_BCTHW.permute(0, 2, 3, 4, 1) * std + mean, x.clip_BTHWC / 255
    )
    torch.testing.assert_close(
        problem.official_targets(x),
        reference.tubelet_targets(x.clip_BTHWC, x.index_BN, (2, 16, 16), "channel"),
        rtol=1e-4,
        atol=1e-4,
    )
