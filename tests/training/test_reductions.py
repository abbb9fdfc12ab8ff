"""What 2 and 4 ranks send to one another in a step, by ZeRO stage and accumulation, and that buckets,
overlap and hierarchical partitioning change when something is sent, and no weight.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

REDUCTIONS = Path(__file__).parent / "launched" / "reductions.py"

pytestmark = pytest.mark.launcher
RANKS = [2, pytest.param(4, marks=pytest.mark.faults)]


@pytest.fixture(scope="module", params=RANKS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    done = subprocess.run(
        [sys.executable, str(REDUCTIONS), str(request.param), str(folder)],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return folder


def test_gradients_are_reduced_once_a_step_where_the_stage_allows_it(folder: Path) -> None:
    sent: dict[str, Any] = json.loads((folder / "sent.json").read_text())
    num = sum(weight.numel() for weight in load_file(folder / "stage0_1.safetensors").values())

    def numbers(name: str, operation: str) -> Any:
        """As shares of the model, which is filled up for the ranks."""
        return pytest.approx(sent[name].get(operation, [0])[0] / num, rel=0.01)

    for stage in (0, 1):
        assert sent[f"stage{stage}_3"] == sent[f"stage{stage}_1"]
        assert numbers(f"stage{stage}_3", "all_reduce") == 1
    assert numbers("stage2_1", "all_reduce") == 1
    assert numbers("stage2_3", "all_reduce") == 3
    assert numbers("stage3_1", "reduce_scatter_tensor") == 1
    assert numbers("stage3_3", "reduce_scatter_tensor") == 3
    for stage in (1, 2, 3):
        gathered = "all_gather_into_tensor"
        assert sent[f"stage{stage}_1"][gathered] == sent[f"stage{stage}_3"][gathered]
        # the norm of the gradients, and what the ranks tell one another of the step
        assert sent[f"stage{stage}_3"]["small"] == [3, 2]
    assert sent["stage0_3"]["small"] == [2, 1]
    for stage in (1, 2):
        # as much, more often
        for name in (f"buckets{stage}", f"overlap{stage}"):
            whole, parts = sent[f"stage{stage}_3"]["all_reduce"], sent[name]["all_reduce"]
            assert parts[0] == whole[0]
            assert parts[1] > whole[1]


def test_when_something_is_sent_changes_no_weight(folder: Path) -> None:
    for stage in (1, 2, 3):
        wanted = load_file(folder / f"stage{stage}_3.safetensors")
        for kind in ("buckets", "overlap", "hpz"):
            name = kind if kind == "hpz" else f"{kind}{stage}"
            file = folder / f"{name}.safetensors"
            if not file.exists() or (kind == "hpz" and stage != 3):
                continue
            for key, weight in load_file(file).items():
                # of two numbers there is one sum, of four there are several
                torch.testing.assert_close(weight, wanted[key], rtol=1e-5, atol=1e-6)
                if folder.name.startswith("ranks2"):
                    assert torch.equal(weight, wanted[key]), (name, key)
