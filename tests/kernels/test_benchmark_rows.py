"""The benchmark's rows of our own kernels, which a CPU has only in the interpreter: right, in every
mode.
"""

import pytest
import torch

from video_mae.benchmark import kernel_measurement, kernel_operations
from video_mae.benchmark.attention_operation import AttentionOperation
from video_mae.benchmark.clock import Call, Ceilings, Clock
from video_mae.benchmark.kernel_operations import (
    ContrastiveOperation,
    EmbedOperation,
    GatherOperation,
    JointOperation,
    Operation,
    ReconstructionOperation,
)
from video_mae.benchmark.record import Percentiles

pytestmark = pytest.mark.usefixtures("interpreted")

CPU = torch.device("cpu")
SIZE = (2, 16, 48)  # 3 tokens
PROBLEMS = {
    "triton": [
        kind("tiny", torch.float32, CPU, 1, SIZE, 2, 8)
        for kind in (GatherOperation, EmbedOperation, ReconstructionOperation, JointOperation)
    ],
    "least": [ContrastiveOperation("tiny", torch.float32, CPU, 1, 3, "clip")],
    "fast": [ContrastiveOperation("tiny", torch.float32, CPU, 1, 5, "batch")],
    "short": [AttentionOperation("tiny", torch.float16, CPU, 1, 17, 1, 16)],
    "long": [AttentionOperation("tiny", torch.float32, CPU, 1, 17, 1, 24)],
}


class OneCall(Clock):
    """Runs what it is given once: the interpreter is no place to take times."""

    def wall(self, calls: list[Call]) -> Percentiles:
        calls[0]()
        return Percentiles(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("word", "problem"),
    [(word, problem) for word, some in PROBLEMS.items() for problem in some],
    ids=lambda value: value if isinstance(value, str) else value.op,
)
def test_rows_of_our_kernels_are_right(
    word: str, problem: Operation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kernel_measurement.REPEATS, "cpu", 2)
    if isinstance(problem, ContrastiveOperation):
        monkeypatch.setattr(kernel_operations, "VALUES", 24)
    records = kernel_measurement.measure_operation(
        problem, OneCall(CPU), Ceilings(1e11, 1e10), [word]
    )
    assert {record.mode for record in records} == set(problem.modes)
    for record in records:
        assert (record.reason, record.measures.get("gate"), record.measures.get("bit_equal")) == (
            "",
            "",
            True,
        ), record.name
        assert record.measures["is_ours"]
