"""The benchmark's rows of our own kernels, which a CPU has only in the interpreter: right, in every
mode.
"""

import pytest
import torch

from video_mae.benchmark import kernel_cells as benchmark_cells
from video_mae.benchmark import kernel_losses as benchmark_losses
from video_mae.benchmark.kernel_losses import Contrastive, Embed, Gather, Joint, Reconstruction
from video_mae.benchmark.kernel_problems import Attention, Problem
from video_mae.benchmark.measure import Call, Ceilings, Clock
from video_mae.benchmark.records_base import Times

pytestmark = pytest.mark.usefixtures("interpreted")

CPU = torch.device("cpu")
SIZE = (2, 16, 48)  # 3 tokens
PROBLEMS = {
    "triton": [
        kind("tiny", 1, SIZE, 2, 8, torch.float32, CPU)
        for kind in (Gather, Embed, Reconstruction, Joint)
    ],
    "least": [Contrastive("tiny", 1, 3, "clip", torch.float32, CPU)],
    "fast": [Contrastive("tiny", 1, 5, "batch", torch.float32, CPU)],
    "short": [Attention("tiny", 1, 17, 1, 16, torch.float16, CPU)],
    "long": [Attention("tiny", 1, 17, 1, 24, torch.float32, CPU)],
}


class OneCall(Clock):
    """Runs what it is given once: the interpreter is no place to take times."""

    def wall(self, calls: list[Call]) -> Times:
        calls[0]()
        return Times(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("word", "problem"),
    [(word, problem) for word, some in PROBLEMS.items() for problem in some],
    ids=lambda value: value if isinstance(value, str) else value.op,
)
def test_rows_of_our_kernels_are_right(
    word: str, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(benchmark_cells.REPEATS, "cpu", 2)
    if isinstance(problem, Contrastive):
        monkeypatch.setattr(benchmark_losses, "VALUES", 24)
    records = benchmark_cells.measure_problem(problem, OneCall(CPU), Ceilings(1e11, 1e10), [word])
    assert {record.mode for record in records} == set(problem.modes)
    for record in records:
        assert (record.reason, record.measures.get("gate"), record.measures.get("bit_equal")) == (
            "",
            "",
            True,
        ), record.name
        assert record.measures["is_ours"]
