"""Compiles every kernel and configuration that `auto` can pick, for GPUs that need not be there, and prints what it takes.

    python -m video_mae.kernels.compile_check [--arch 90 80] [--only NAME] [--workers 2] [--modules MODULE ...]

Fails on a spill, on more shared memory than the GPU has, and on a matrix product that does not run on the tensor cores as it should
(HGMMA on sm_90, HMMA on sm_80). Needs no GPU, and TRITON_INTERPRET must not be set.
"""

import argparse
import functools
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MODULES = tuple(f"video_mae.kernels.{noun}" for noun in ("tubelets", "reconstruction", "contrastive", "attention"))
SHARED_MEMORY = {90: 232448, 80: 166912}  # bytes that a block may have


@dataclass(frozen=True)
class Case:
    """One compilation: a jitted kernel, the types of its arguments by name, its constexprs and its launch options.

    types: "*bf16", "*fp32", "*u8", "*i64", "i32", "i64", "fp32" ...; every argument is in `types` or in `constexprs`. Pointers, and
    the arguments named in `aligned`, are taken as multiples of 16. `has_dot`: it must use the tensor cores.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    has_dot: bool = False
    aligned: tuple[str, ...] = ()
    arches: tuple[int, ...] = (90, 80)


@dataclass(frozen=True)
class Result:
    """What a compiled kernel takes; `problems` is empty for a good one."""

    name: str
    arch: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    hgmma: int
    hmma: int
    problems: list[str] = field(default_factory=list)


def compile_case(case: Case, arch: int) -> Result:
    """Compiles one case for sm_ARCH, through ptxas to machine code."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constexprs else case.types[name] for name in names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
             if name in case.aligned or signature[name].startswith("*")}
    compiled = triton.compile(ASTSource(fn=case.kernel, signature=signature, constexprs=case.constexprs, attrs=attrs),
                              target=GPUTarget("cuda", arch, 32), options={"num_warps": case.num_warps, "num_stages": case.num_stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        usage, sass = (subprocess.run([knobs.nvidia.cuobjdump.path, what, cubin.name], capture_output=True, text=True, check=True).stdout
                       for what in ("--dump-resource-usage", "--dump-sass"))
    registers, stack = (int(found.group(1)) if (found := re.search(rf"{what}:(\d+)", usage)) else -1 for what in ("REG", "STACK"))
    result = Result(case.name, arch, registers, stack, compiled.metadata.shared, sass.count("HGMMA."), sass.count("HMMA."))
    if stack != 0:
        result.problems.append(f"{stack} bytes on the stack")
    if result.shared_bytes > SHARED_MEMORY[arch]:
        result.problems.append(f"{result.shared_bytes} bytes of shared memory, the GPU has {SHARED_MEMORY[arch]}")
    if case.has_dot and arch == 90 and (result.hgmma == 0 or result.hmma > 0):
        result.problems.append("a product runs outside the Hopper tensor cores")
    if case.has_dot and arch == 80 and result.hmma == 0:
        result.problems.append("a product runs outside the tensor cores")
    return result


@functools.cache
def cases(only: str = "", modules: tuple[str, ...] = MODULES) -> list[Case]:
    """Every module's `compile_cases()`, those whose name contains `only`."""
    return [case for module in modules for case in importlib.import_module(module).compile_cases() if only in case.name]


def check(task: tuple[str, tuple[str, ...], int, int]) -> Result:
    """Compiles case number i of `cases(only, modules)` for sm_ARCH; task is (only, modules, i, arch), which goes to another process."""
    only, modules, i, arch = task
    case = cases(only, modules)[i]
    try:
        return compile_case(case, arch)
    except Exception as error:  # whatever the compiler raises is this case's problem, and the others should still be seen
        return Result(case.name, arch, 0, 0, 0, 0, 0, [f"does not compile: {type(error).__name__}: {error}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line a case; returns 1 if one has a problem, or if there is none."""
    parser = argparse.ArgumentParser(description="Compile every kernel for GPUs that need not be there.")
    parser.add_argument("--arch", type=int, nargs="+", default=[90, 80], choices=sorted(SHARED_MEMORY))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--workers", type=int, default=min(8, len(os.sched_getaffinity(0))), help="processes")
    parser.add_argument("--modules", nargs="+", default=list(MODULES), help="where to look for `compile_cases()`")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    modules = tuple(options.modules)
    tasks = [(options.only, modules, i, arch) for i, case in enumerate(cases(options.only, modules)) for arch in options.arch
             if arch in case.arches]
    print(f"{'kernel':80} {'arch':>5} {'registers':>9} {'spill B':>8} {'shared B':>9} {'HGMMA':>6} {'HMMA':>6}")
    failed = 0
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        for result in pool.map(check, tasks):
            failed += bool(result.problems)
            print(f"{result.name:80} {'sm_' + str(result.arch):>5} {result.registers:>9} {result.spill_bytes:>8} "
                  f"{result.shared_bytes:>9} {result.hgmma:>6} {result.hmma:>6}  {'; '.join(result.problems)}", flush=True)
    print(f"{failed} of {len(tasks)} failed" if failed else f"all {len(tasks)} good" if tasks else "no such case")
    return int(failed > 0 or not tasks)


if __name__ == "__main__":
    sys.exit(main())
