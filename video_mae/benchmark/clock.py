"""How benchmarks measure: the time of calls and of their parts, memory, a machine's ceilings.

Three times of a call, in milliseconds. cold: of the device alone, its cache flushed before each
call, and the queue kept full, so that no launch is waited for. graph: of the device alone, calls
over several inputs recorded in a CUDA graph, the cache as they leave it. wall: of back to back
calls over several inputs with all of Python in them. A CPU has wall alone.
"""

import ctypes
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from video_mae.benchmark.record import Percentiles, percentiles
from video_mae.progress_bar import ProgressBar

Call = Callable[[], Any]
Name = TypeVar("Name")
Result = TypeVar("Result")

FLUSH_BYTES = 256 << 20  # more than the cache of any GPU
MIN_SAMPLES, MAX_SAMPLES = 5, 50
GRAPH_MS = 2.0  # of one replay, so that its launch does not count
WALL_SAMPLES = 7
SAMPLE_MS = 100  # of steps between two looks at a GPU, which would wait for the host at each

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Work(NamedTuple):
    """The least that an operation must compute and move: what its roofline floor is made of."""

    flops: float
    bytes: float


class Ceilings(NamedTuple):
    """What the machine reaches with a large matrix product and with a large copy (bytes read and
    written), measured.
    """

    flops_per_second: float
    bytes_per_second: float

    def floor_ms(self, work: Work) -> float:
        """The roofline: no implementation can take less, unless the cache holds what it reads."""
        return 1e3 * max(work.flops / self.flops_per_second, work.bytes / self.bytes_per_second)


class Clock:
    """Takes times on one device, each in about `budget_ms` milliseconds, at least five calls."""

    def __init__(self, device: torch.device, budget_ms: float = 100.0) -> None:
        self.device, self.budget_ms, self.on_gpu = device, budget_ms, device.type == "cuda"
        if self.on_gpu:
            self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
            flushes = [self._device_ms([self._flushed.zero_]) for _ in range(5)]
            self._flush_ms = statistics.median(flushes)

    def milliseconds(self, calls: Sequence[Call], wait: bool = True) -> float:
        """Of all calls, until the device is done; without `wait` until the host is."""
        self._wait()
        start = time.perf_counter()
        for call in calls:
            call()
        if wait:
            self._wait()
        return 1e3 * (time.perf_counter() - start)

    def in_turn(self, calls: Mapping[Name, Call], num_rounds: int) -> dict[Name, list[float]]:
        """Milliseconds of each call, a sample a round, the calls in turn: what a machine does
        besides then falls on all of them. On a GPU a sample is the mean of many calls.
        """
        samples: dict[Name, list[float]] = {name: [] for name in calls}
        repeats = dict.fromkeys(calls, 1)
        for name, call in calls.items():
            call()
            if self.on_gpu:
                repeats[name] = max(1, round(SAMPLE_MS / self.milliseconds([call])))
        for name in turns(calls, num_rounds):
            total = self.milliseconds([calls[name]] * repeats[name])
            samples[name].append(total / repeats[name])
        return samples

    def wall(self, calls: list[Call]) -> Percentiles:
        """Of one call, in turn over `calls`, until the device is done. On a GPU, samples of many
        calls: the host runs ahead.
        """
        self.milliseconds(calls)  # all are warm then
        estimate = min(self.milliseconds([call]) for call in calls)
        if not self.on_gpu:
            rounds = math.ceil(self._num_samples(estimate) / len(calls))
            return percentiles([self.milliseconds([call]) for call in calls * rounds])
        many = calls * math.ceil(self.budget_ms / WALL_SAMPLES / (estimate * len(calls)))
        return percentiles([self.milliseconds(many) / len(many) for _ in range(WALL_SAMPLES)])

    def cold(self, call: Call) -> Percentiles:
        """Device time of one call that finds nothing of its input in the cache.

        triton.testing.do_bench flushes once before each call: a call of many small kernels, which
        the host issues more slowly than the device flushes, is charged with the host's time there,
        which is what `wall` is for. Here the flush is repeated for as long as the host needs to
        issue the whole call.
        """
        flushes = self._num_flushes([call])
        samples = self._num_samples(self._device_ms([call], flushes))
        return percentiles([self._device_ms([call], flushes) for _ in range(samples)])

    def graph(self, make_calls: Callable[[], list[Call]]) -> Percentiles:
        """Device time of one call, recorded and replayed. make_calls is called on the stream that
        records: a backward pass runs where its forward pass ran.
        """
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            calls = make_calls()
            once_ms = self._device_ms(calls, self._num_flushes(calls))
        many = calls * min(math.ceil(GRAPH_MS / once_ms), 100)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in many:
                call()
        graph.replay()
        samples = self._num_samples(self._device_ms([graph.replay]))
        return percentiles([self._device_ms([graph.replay]) / len(many) for _ in range(samples)])

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        """Both ceilings of the roofline, with random data: zeros take less power, are faster."""
        side, count = (8192, 1 << 30) if self.on_gpu else (2048, 1 << 27)
        a, b = (torch.randn(side, side, dtype=dtype, device=self.device) for _ in range(2))
        source = torch.randint(0, 256, (count,), dtype=torch.uint8, device=self.device)
        target, product = torch.empty_like(source), torch.empty_like(a)
        take = self.cold if self.on_gpu else lambda call: self.wall([call])
        return Ceilings(
            2e3 * side**3 / take(lambda: torch.mm(a, b, out=product)).p20,
            2e3 * count / take(lambda: target.copy_(source)).p20,
        )

    def _num_flushes(self, calls: Sequence[Call]) -> int:
        """How many flushes take as long as the host needs to issue the calls, and half as long
        again.
        """
        self.milliseconds(calls)
        host_ms = statistics.median(self.milliseconds(calls, wait=False) for _ in range(5))
        return 1 + math.ceil(1.5 * host_ms / self._flush_ms)

    def _num_samples(self, estimate_ms: float) -> int:
        return max(MIN_SAMPLES, min(MAX_SAMPLES, int(self.budget_ms / max(estimate_ms, 1e-6))))

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def _device_ms(self, calls: Sequence[Call], flushes: int = 0) -> float:
        """Milliseconds of the device between two events around the calls."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(flushes):
            self._flushed.zero_()
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


class Stopwatch:
    """The parts of something that takes time: a lap ends a part, which began where the last lap
    ended. On a GPU a lap is an event in the stream.
    """

    def __init__(self, on_gpu: bool = False) -> None:
        self.on_gpu = on_gpu
        self._laps: list[tuple[str, Any]] = []
        self.lap("")

    def lap(self, part: str) -> None:
        """Until now the time belongs to `part`."""
        moment: Any = time.perf_counter()
        if self.on_gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._laps.append((part, moment))

    def parts(self) -> dict[str, float]:
        """Milliseconds of each part, all its laps together, in the order in which they ended."""
        if self.on_gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (_, start), (part, end) in pairwise(self._laps):
            passed = start.elapsed_time(end) if self.on_gpu else 1e3 * (end - start)
            found[part] = found.get(part, 0.0) + passed
        return found


def turns(names: Iterable[Name], num_rounds: int) -> Iterator[Name]:
    """Every name once a round; every other round goes backwards, so none always follows the same
    other. A bar shows how many are done.
    """
    order = list(names)
    with ProgressBar(num_rounds * len(order), "turn") as bar:
        for _ in range(num_rounds):
            for name in order:
                yield name
                bar.update()
            order.reverse()


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as fast ours is: the median over rounds, each with a sample of both."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def peak_growth(call: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """(what the call gives, bytes that it takes beyond what was there before, results included):
    allocated by PyTorch on a GPU, resident in memory on a CPU, at the worst moment of the call;
    0 where Linux does not tell.

    What earlier calls have left in the caches of the allocators is given back first, or it would
    hide some of the growth.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    if not RESET.exists():
        return call(), 0
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
    RESET.write_text("5")  # the high-water mark begins anew (man 5 proc_pid_clear_refs)
    before = _status("VmRSS")
    return call(), _status("VmHWM") - before


def peak_of_children() -> int:
    """Bytes: the largest resident memory that each process started by this one and still there has
    had, in all.
    """
    children = " ".join(file.read_text() for file in Path("/proc/self/task").glob("*/children"))
    return sum(_status("VmHWM", Path("/proc", pid, "status")) for pid in children.split())


def _status(key: str, file: Path = STATUS) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])
