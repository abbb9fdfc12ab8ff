"""How much memory a call takes beyond what was there before."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_growth(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes: allocated by PyTorch on a GPU, resident in memory on a CPU, at the worst moment of the
    call; None where Linux does not tell.

    What earlier calls have left in the caches of the allocators is given back first, or it would
    hide some of the growth.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not RESET.exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
    RESET.write_text("5")  # the high-water mark begins anew (man 5 proc_pid_clear_refs)
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def peak_of_children() -> int:
    """Bytes: the largest resident memory that each process started by this one and still there has
    had, in all.
    """
    children = [
        pid
        for file in Path("/proc/self/task").glob("*/children")
        for pid in file.read_text().split()
    ]
    return sum(_status("VmHWM", Path("/proc", pid, "status")) for pid in children)


def _status(key: str, file: Path = STATUS) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])
