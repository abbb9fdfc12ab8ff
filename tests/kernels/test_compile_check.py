"""Every kernel compiles for GPUs that are not here without a spill, and the check would say so if
one did not.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BAD = """
import torch
import triton
import triton.language as tl
from video_mae.kernels.compile_check import Run


@triton.jit
def product(a, b, c, SIZE: tl.constexpr, STEPS: tl.constexpr):
    i, k = tl.arange(0, SIZE)[:, None], tl.arange(0, 64)
    acc = tl.zeros([SIZE, SIZE], tl.float32)
    for step in range(STEPS):
        x = tl.load(a + i * 64 * STEPS + step * 64 + k[None, :])
        y = tl.load(b + (step * 64 + k[:, None]) * SIZE + tl.arange(0, SIZE)[None, :])
        acc = tl.dot(x, y, acc)
    tl.store(c + i * SIZE + tl.arange(0, SIZE)[None, :], acc)


@triton.jit
def rows(a, c, stride, WIDTH: tl.constexpr):
    i, k = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    tl.store(c + i * WIDTH + k, tl.load(a + i * stride + k))


@triton.jit
def unknown_name(a):
    tl.store(a, nothing_of_this_name)


def multiply(size, steps, **options):
    a, b = (torch.empty(4096, 4096, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product[(1,)](a, b, torch.empty(size, size, device="cuda"), size, steps, **options)


def copy(stride, start=0):
    a, c = (torch.empty(8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    rows[(1,)](a[start:], c, stride, 64)


def compile_runs(arch):
    multiply(64, 4)
    yield Run("good")
    multiply(256, 4, num_warps=4)
    yield Run("spills")
    multiply(128, 64, num_stages=12, num_warps=8)
    yield Run("too much shared memory")
    multiply(32, 4)
    yield Run("no tensor cores")
    for name, way, narrow in (
        ("aligned", (64,), 0), ("aligned again", (128,), 0), ("head of 88", (88,), 0), ("odd start", (64, 1), 0),
        ("allowed", (88, 1), 64),
    ):
        copy(*way)
        yield Run(name, narrow)
    unknown_name[(1,)](torch.empty(1, device="cuda"))
    yield Run("does not compile")
"""


COLUMNS = ("registers", "spill", "shared", "HGMMA", "HMMA", "narrow")


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "video_mae.kernels.compile_check", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**env, "TRITON_CACHE_DIR": str(folder / "cache"), **environment},
    )


@pytest.mark.timeout(1800)
def test_every_kernel_compiles_without_spills_within_shared_memory_on_the_tensor_cores(tmp_path):
    finished = run(tmp_path)
    assert finished.returncode == 0, finished.stdout
    lines = finished.stdout.splitlines()
    assert lines[-1].endswith(" good")
    for noun in ("attention", "gather", "reconstruction", "contrastive"):
        assert any(noun in line for line in lines), f"no case of {noun}"
    assert any("sm_90" in line for line in lines)
    assert any("sm_80" in line for line in lines)
    rows = {
        line.split(" sm_90")[0].strip(): dict(
            zip(COLUMNS, line.split(" sm_90")[1].split(), strict=False)
        )
        for line in lines
        if " sm_90" in line
    }
    for name in (
        "N=160 16x80: forward",
        "N=160 16x80: backward",
        "N=208 16x88: forward",
        "N=208 16x88: backward",
        *(
            f"N={shape}: {kernel}"
            for shape in ("1568 16x80", "2048 16x88")
            for kernel in ("forward", "query_gradient", "key_gradient")
        ),
    ):
        row = rows[f"attention bf16 {name}"]
        assert (row["spill"], row["narrow"]) == ("0", "0"), (
            f"{name}: a spill, or values read one by one"
        )


def test_bad_kernels_are_found(tmp_path):
    (tmp_path / "bad_kernels.py").write_text(BAD)
    finished = run(tmp_path, "--modules", "bad_kernels", "--arch", "90", PYTHONPATH=str(tmp_path))
    assert finished.returncode == 1, finished.stdout
    found = {
        line.split(" sm_90")[0].strip(): line
        for line in finished.stdout.splitlines()
        if " sm_90" in line
    }
    for name in ("good: product", "aligned: rows", "allowed: rows"):
        assert found[name].rstrip().split()[-1].isdigit(), name
    assert "aligned again: rows" not in found  # the same compilation
    for name in ("head of 88: rows", "odd start: rows"):
        assert "instructions move values one by one, 0 would do" in found[name]
    assert "bytes on the stack" in found["spills: product"]
    assert "bytes of shared memory, the GPU has 232448" in found["too much shared memory: product"]
    assert "tensor cores" in found["no tensor cores: product"]
    assert "does not compile: CompilationError" in found["does not compile: unknown_name"]
    assert finished.stdout.splitlines()[-1] == "6 of 9 failed"


def test_a_name_that_no_case_has_is_an_error(tmp_path):
    finished = run(tmp_path, "--only", "no kernel is called this")
    assert finished.returncode == 1
    assert "no such case" in finished.stdout


def test_the_interpreter_is_refused(tmp_path):
    finished = run(tmp_path, TRITON_INTERPRET="1")
    assert finished.returncode == 2
    assert "unset TRITON_INTERPRET" in finished.stdout
