"""Every kernel compiles for GPUs that are not here without a spill, and the check would say so if one did not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BAD = '''
import triton
import triton.language as tl
from video_mae.kernels.compile_check import Case


@triton.jit
def product(a, b, c, SIZE: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr):
    i, k = tl.arange(0, SIZE)[:, None], tl.arange(0, 64)
    acc = tl.zeros([SIZE, SIZE], tl.float32)
    for step in range(STEPS):
        x = tl.load(a + i * 64 * STEPS + step * 64 + k[None, :])
        y = tl.load(b + (step * 64 + k[:, None]) * SIZE + tl.arange(0, SIZE)[None, :])
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    tl.store(c + i * SIZE + tl.arange(0, SIZE)[None, :], acc)


@triton.jit
def unknown_name(a):
    tl.store(a, nothing_of_this_name)


def compile_cases():
    def case(name, size, steps, dtype="bf16", kernel=product, **more):
        types = {"a": f"*{dtype}", "b": f"*{dtype}", "c": "*fp32"}
        consts = {"SIZE": size, "STEPS": steps, "PRECISION": "ieee"}
        return Case(name, kernel, types, consts, has_dot=True, **more)

    return [case("good", 64, 4), case("spills", 256, 4, num_warps=4), case("too much shared memory", 128, 64, num_stages=12, num_warps=8),
            case("no tensor cores", 32, 4, dtype="fp32", num_warps=8), Case("does not compile", unknown_name, {"a": "*fp32"}, {})]
'''


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-m", "video_mae.kernels.compile_check", *arguments], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, env={**env, "TRITON_CACHE_DIR": str(folder / "cache"), **environment})


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


def test_bad_kernels_are_found(tmp_path):
    (tmp_path / "bad_kernels.py").write_text(BAD)
    finished = run(tmp_path, "--modules", "bad_kernels", "--arch", "90", PYTHONPATH=str(tmp_path))
    assert finished.returncode == 1, finished.stdout
    found = {line.split(" sm_90")[0].strip(): line for line in finished.stdout.splitlines() if " sm_90" in line}
    assert found["good"].rstrip().split()[-1].isdigit()
    assert "bytes on the stack" in found["spills"]
    assert "bytes of shared memory, the GPU has 232448" in found["too much shared memory"]
    assert "tensor cores" in found["no tensor cores"]
    assert "does not compile: CompilationError" in found["does not compile"]
    assert finished.stdout.splitlines()[-1] == "4 of 5 failed"


def test_a_name_that_no_case_has_is_an_error(tmp_path):
    finished = run(tmp_path, "--only", "no kernel is called this")
    assert finished.returncode == 1
    assert "no such case" in finished.stdout


def test_the_interpreter_is_refused(tmp_path):
    finished = run(tmp_path, TRITON_INTERPRET="1")
    assert finished.returncode == 2
    assert "unset TRITON_INTERPRET" in finished.stdout
