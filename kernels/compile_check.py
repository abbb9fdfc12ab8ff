"""Compiles every kernel as it is launched, for GPUs that need not be there.

    python -m video_mae.kernels.compile_check [--arch 90 80] [--only NAME] [--modules MODULE ...]

Prints what each takes. The launchers run on fake CUDA tensors (compile_runs.py), so what Triton
knows of an argument here, its type, its value, whether 16 divides it, is what it knows on a GPU.
Fails on a spill, on more shared memory than the GPU has, on a matrix product that does not run on
the tensor cores as it should (HGMMA on sm_90, HMMA on sm_80), and on values of 16 bits that are
read or written one by one where their rows would allow more. Needs no GPU, and TRITON_INTERPRET
must not be set.
"""

import argparse
import contextlib
import functools
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from . import launch

MODULES = ("video_mae.kernels.compile_runs",)
SHARED_MEMORY = {90: 232448, 80: 166912}  # bytes that a block may have
ACCESS = re.compile(r"\b(?:LDG|STG|LDGSTS)\.E(?:\.\w+)*")
# of float32, products are exact and so not on the tensor cores
HALF_DOT = re.compile(r"tt\.dot .*x(?:bf16|f16)[,>]")
COLUMNS = "{:80} {:>5} {:>9} {:>8} {:>9} {:>6} {:>6} {:>6}  {}"
TITLES = "kernel", "arch", "registers", "spill B", "shared B", "HGMMA", "HMMA", "narrow", ""


class Run(NamedTuple):
    """What launchers have just been called for, with fake CUDA tensors.

    narrow: instructions that may move 1 or 2 bytes a thread, -1 for any number: 0 where rows are
    multiples of 16 bytes.
    """

    name: str
    narrow: int = 0


class Case(NamedTuple):
    """One compilation; `narrow` as of its Run."""

    name: str
    narrow: int
    source: ASTSource
    options: dict[str, Any]


def pointer(tensor: torch.Tensor) -> Any:
    """Stands in for a fake tensor, which has no address: PyTorch's own start at multiples of 16."""
    address = int(tensor.storage_offset()) * tensor.element_size()
    return SimpleNamespace(dtype=tensor.dtype, data_ptr=lambda: address)


@functools.cache
def cases(arch: int, only: str, modules: Sequence[str]) -> list[Case]:
    """What Triton would compile for the runs of the modules on a GPU of sm_ARCH, each compilation
    once, those whose name contains `only`; none is made.
    """
    backend = make_backend(GPUTarget("cuda", arch, 32))
    found: dict[str, Case] = {}
    launches: list[tuple[Any, ...]] = []

    def collect(
        kernel: Any, *arguments: Any, grid: Any, warmup: bool = False, **options: Any
    ) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        held = [pointer(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        bound, specialization, bound_options = bind(*held, **options)
        packed, *known = kernel._pack_args(backend, options, bound, specialization, bound_options)
        launches.append((kernel, known, packed.__dict__))

    with (
        FakeTensorMode(),
        patch.object(JITFunction, "run", collect),
        patch.object(launch, "launches_on_fakes", True),
        patch.object(torch.cuda, "get_device_capability", lambda device=None: divmod(arch, 10)),
        patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()),
    ):
        for module in modules:
            for run in importlib.import_module(module).compile_runs(arch):
                for kernel, known, options in launches:
                    name = f"{run.name}: {kernel.__name__.removesuffix('_kernel')}"
                    case = Case(name, run.narrow, ASTSource(kernel, *known), options)
                    key = kernel.__module__, kernel.__name__, known, sorted(options.items())
                    found.setdefault(repr(key), case)
                launches.clear()
    return [case for case in found.values() if only in case.name]


def compiled(case: Case, arch: int) -> tuple[list[int], list[str]]:
    """(the figures of the last six TITLES but one, problems) of a case, from its machine code."""
    made = triton.compile(case.source, GPUTarget("cuda", arch, 32), case.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(made.asm["cubin"])
        dump = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", cubin.name]
        told = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"\b{what}:(\d+)", told)[0]) for what in ("REG", "STACK"))
    shared, hgmma, hmma = made.metadata.shared, told.count("HGMMA."), told.count("HMMA.")
    one_by_one = [access for access in ACCESS.findall(told) if re.search(r"\.[US](8|16)\b", access)]
    narrow = len(one_by_one)
    has_dot = HALF_DOT.search(made.asm["ttir"]) is not None
    checks = {
        f"{stack} bytes on the stack": stack != 0,
        f"{shared} bytes of shared memory, the GPU has {SHARED_MEMORY[arch]}": shared
        > SHARED_MEMORY[arch],
        "a product runs outside the Hopper tensor cores": has_dot
        and arch == 90
        and (hgmma == 0 or hmma > 0),
        "a product runs outside the tensor cores": has_dot and arch == 80 and hmma == 0,
        f"{narrow} instructions move values one by one, {case.narrow} would do": 0
        <= case.narrow
        < narrow,
    }
    problems = [problem for problem, is_there in checks.items() if is_there]
    return [registers, stack, shared, hgmma, hmma, narrow], problems


def check(task: tuple[int, str, Sequence[str], int]) -> tuple[str, bool]:
    """(its line, whether it is good) of case number i; task, which goes to another process, is
    (arch, only, modules, i).
    """
    arch, only, modules, i = task
    case = cases(arch, only, modules)[i]
    try:
        figures, problems = compiled(case, arch)
    except Exception as error:
        # whatever the compiler raises is this case's problem, and the others should still be seen
        figures, problems = [0] * 6, [f"does not compile: {type(error).__name__}: {error}"]
    return COLUMNS.format(case.name, f"sm_{arch}", *figures, "; ".join(problems)), not problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line a case; returns 1 if one has a problem, or if there is none."""
    parser = argparse.ArgumentParser(
        description="Compile every kernel for GPUs that need not be there."
    )
    archs = list(SHARED_MEMORY)
    parser.add_argument("--arch", type=int, nargs="+", default=archs, choices=archs)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument(
        "--modules", nargs="+", default=MODULES, help="where to look for `compile_runs(arch)`"
    )
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    what = options.only, tuple(options.modules)
    tasks = [(arch, *what, i) for arch in options.arch for i in range(len(cases(arch, *what)))]
    if not tasks:
        print("no such case")
        return 1
    print(COLUMNS.format(*TITLES))
    failed = 0
    workers = min(8, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for line, is_good in pool.map(check, tasks):
            failed += not is_good
            print(line, flush=True)
    print(f"{failed} of {len(tasks)} failed" if failed else f"all {len(tasks)} good")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
