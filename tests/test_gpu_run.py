"""scripts/gpu_run.sh, whose minutes on a GPU are few: rehearsed without a GPU, and without what a
machine with one may lack.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LACKING = ("av", "decord", "deepspeed", "fvcore", "iopath", "pytorchvideo", "torchcodec")
BLOCK = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {LACKING}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""
PARTS = {
    "facts",
    "kernels_right",
    "attention",
    "losses",
    "step",
    "training",
    "lengths",
    "other_attention",
    "large_inputs",
}


def gpu_run(folder: Path, site: Path, minutes: int) -> "subprocess.CompletedProcess[str]":
    """Called from another folder, with what is there."""
    environment = {
        **os.environ,
        "PYTHON": os.path.relpath(sys.executable, folder.parent),
        "PYTHONPATH": str(site),
        # on a busy machine two threads wait for each other
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [str(ROOT / "scripts" / "gpu_run.sh"), folder.name, str(minutes)],
        env=environment,
        cwd=folder.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def parts(folder: Path) -> dict[str, str]:
    """How each part ended last."""
    lines = [line.split("\t") for line in (folder / "parts.tsv").read_text().splitlines()]
    return {name: status for name, status, _ in lines}


@pytest.mark.timeout(1200)
def test_a_rehearsal_ends_with_every_part_done_and_is_not_repeated(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(BLOCK)
    folder = tmp_path / "gpu"

    out_of_time = gpu_run(folder, site, 0)
    assert out_of_time.returncode == 1
    assert {name for name, status in parts(folder).items() if status == "no time left"} >= PARTS

    finished = gpu_run(folder, site, 15)
    assert finished.returncode == 0, finished.stdout
    assert {name for name, status in parts(folder).items() if status == "done"} >= PARTS
    for benchmark in ("kernels", "step"):
        assert list((folder / "results").glob(f"*/{benchmark}.jsonl"))
    assert " skipped" in (folder / "kernels_right.log").read_text()

    written = (folder / "parts.tsv").read_text().count("\tdone\t")
    again = gpu_run(folder, site, 15)
    assert again.returncode == 0
    assert (folder / "parts.tsv").read_text().count("\tdone\t") == written
