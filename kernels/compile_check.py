"""Compiles every kernel as it is launched, for GPUs that need not be there, and prints what it
takes.

    python -m video_mae.kernels.compile_check [--arch 90 80] [--only NAME] [--workers 2] [--modules
    MODULE ...]

The launchers run on fake CUDA tensors (compile_runs.py), so what Triton knows of an argument here,
its type, its value, whether 16 divides it, is what it knows on a GPU. Fails on a spill, on more
shared memory than the GPU has, on a matrix product that does not run on the tensor cores as it
should (HGMMA on sm_90, HMMA on sm_80), and on values of 16 bits that are read or written one by one
where their rows would allow more. Needs no GPU, and TRITON_INTERPRET must not be set.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
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


class Run(NamedTuple):
    """A call of launchers, to be made on fake CUDA tensors. narrow: instructions that may move 1 or
    2 bytes a thread, -1 for any number: 0 where rows are multiples of 16 bytes.
    """

    name: str
    call: Callable[[], Any]
    narrow: int = 0


class Launch(NamedTuple):
    """A launch as it was made; of a tensor there is what Triton reads of it, its dtype and address."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Case(NamedTuple):
    """One compilation, of a launch; see Run."""

    name: str
    launch: Launch
    narrow: int = 0


@dataclass(frozen=True)
class Result:
    """What a compiled kernel takes; `problems` is empty for a good one. narrow: instructions that
    move 1 or 2 bytes a thread.
    """

    name: str
    arch: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    hgmma: int
    hmma: int
    narrow: int
    problems: list[str] = field(default_factory=list)


class _Pointer:
    """Stands in for a fake tensor, which has no address; PyTorch's own start at multiples of 16
    bytes.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype, self.address = (
            tensor.dtype,
            int(tensor.storage_offset()) * tensor.element_size(),
        )

    def data_ptr(self) -> int:
        return self.address


def _held(value: Any) -> Any:
    return _Pointer(value) if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def captured(arch: int = 90) -> Iterator[list[Launch]]:
    """Collects what is launched in here instead of launching it, as if on a GPU of sm_ARCH: for
    CUDA tensors of a FakeTensorMode.
    """
    launches: list[Launch] = []

    def collect(
        kernel: Any, *arguments: Any, grid: Any, warmup: bool = False, **options: Any
    ) -> None:
        launches.append(
            Launch(
                kernel,
                tuple(map(_held, arguments)),
                {name: _held(value) for name, value in options.items()},
            )
        )

    with (
        patch.object(JITFunction, "run", collect),
        patch.object(launch, "launches_on_fakes", True),
        patch.object(torch.cuda, "get_device_capability", lambda device=None: divmod(arch, 10)),
        patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()),
    ):
        yield launches


def specialize(made: Launch, arch: int) -> tuple[ASTSource, dict[str, Any]]:
    """(source, options) of the compilation that Triton itself would start for this launch on a GPU
    of sm_ARCH.
    """
    kernel, backend = made.kernel, make_backend(GPUTarget("cuda", arch, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*made.arguments, **made.options)
    packed, signature, constexprs, attrs = kernel._pack_args(
        backend, made.options, bound, specialization, options
    )
    return ASTSource(
        fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs
    ), packed.__dict__


def compile_case(case: Case, arch: int) -> Result:
    """Compiles one case for sm_ARCH, through ptxas to machine code."""
    source, options = specialize(case.launch, arch)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run(
                [knobs.nvidia.cuobjdump.path, what, cubin.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for what in ("--dump-resource-usage", "--dump-sass")
        )
    registers, stack = (
        int(found.group(1)) if (found := re.search(rf"{what}:(\d+)", usage)) else -1
        for what in ("REG", "STACK")
    )
    narrow = sum(
        1 for access in ACCESS.findall(sass) if set(access.split(".")) & {"U8", "S8", "U16", "S16"}
    )
    result = Result(
        case.name,
        arch,
        registers,
        stack,
        compiled.metadata.shared,
        sass.count("HGMMA."),
        sass.count("HMMA."),
        narrow,
    )
    has_dot = HALF_DOT.search(compiled.asm["ttir"]) is not None
    if stack != 0:
        result.problems.append(f"{stack} bytes on the stack")
    if result.shared_bytes > SHARED_MEMORY[arch]:
        result.problems.append(
            f"{result.shared_bytes} bytes of shared memory, the GPU has {SHARED_MEMORY[arch]}"
        )
    if has_dot and arch == 90 and (result.hgmma == 0 or result.hmma > 0):
        result.problems.append("a product runs outside the Hopper tensor cores")
    if has_dot and arch == 80 and result.hmma == 0:
        result.problems.append("a product runs outside the tensor cores")
    if 0 <= case.narrow < narrow:
        result.problems.append(
            f"{narrow} instructions move values one by one, {case.narrow} would do"
        )
    return result


@functools.cache
def cases(arch: int, only: str = "", modules: tuple[str, ...] = MODULES) -> list[Case]:
    """What the runs of the modules launch on sm_ARCH, each compilation once, those whose name
    contains `only`.
    """
    found: dict[str, Case] = {}
    for module in modules:
        for run in importlib.import_module(module).compile_runs(arch):
            with FakeTensorMode(), captured(arch) as launches:
                run.call()
            for made in launches:
                case = Case(
                    f"{run.name}: {made.kernel.__name__.removesuffix('_kernel')}", made, run.narrow
                )
                source, options = specialize(made, arch)
                found.setdefault(
                    repr(
                        (
                            made.kernel.__module__,
                            made.kernel.__name__,
                            source.signature,
                            source.constants,
                            source.attrs,
                            sorted(options.items()),
                        )
                    ),
                    case,
                )
    return [case for case in found.values() if only in case.name]


def check(task: tuple[int, str, tuple[str, ...], int]) -> Result:
    """Compiles case number i of `cases(arch, only, modules)`; task is (arch, only, modules, i),
    which goes to another process.
    """
    arch, only, modules, i = task
    case = cases(arch, only, modules)[i]
    try:
        return compile_case(case, arch)
    except Exception as error:
        # whatever the compiler raises is this case's problem, and the others should still be seen
        return Result(
            case.name,
            arch,
            0,
            0,
            0,
            0,
            0,
            0,
            [f"does not compile: {type(error).__name__}: {error}"],
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line a case; returns 1 if one has a problem, or if there is none."""
    parser = argparse.ArgumentParser(
        description="Compile every kernel for GPUs that need not be there."
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[90, 80], choices=sorted(SHARED_MEMORY)
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument(
        "--workers", type=int, default=min(8, len(os.sched_getaffinity(0))), help="processes"
    )
    parser.add_argument(
        "--modules", nargs="+", default=list(MODULES), help="where to look for `compile_runs(arch)`"
    )
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    modules = tuple(options.modules)
    tasks = [
        (arch, options.only, modules, i)
        for arch in options.arch
        for i in range(len(cases(arch, options.only, modules)))
    ]
    print(
        f"{'kernel':80} {'arch':>5} {'registers':>9} {'spill B':>8} {'shared B':>9} {'HGMMA':>6} {'HMMA':>6} {'narrow':>6}"
    )
    failed = 0
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        for result in pool.map(check, tasks):
            failed += bool(result.problems)
            print(
                f"{result.name:80} {'sm_' + str(result.arch):>5} {result.registers:>9} {result.spill_bytes:>8} {result.shared_bytes:>9} "
                f"{result.hgmma:>6} {result.hmma:>6} {result.narrow:>6}  {'; '.join(result.problems)}",
                flush=True,
            )
    print(
        f"{failed} of {len(tasks)} failed"
        if failed
        else f"all {len(tasks)} good"
        if tasks
        else "no such case"
    )
    return int(failed > 0 or not tasks)


if __name__ == "__main__":
    sys.exit(main())
