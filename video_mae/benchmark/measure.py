"""How benchmarks measure: times, memory, the ceilings of the machine, and whether a result is
right.

Three times, in milliseconds. cold: of the device alone, its cache flushed before each call, and the
queue kept full, so that no launch is waited for. graph: of the device alone, calls over several
inputs recorded in a CUDA graph, the cache as they leave it. wall: of back to back calls over
several inputs with all of Python in them. A CPU has wall alone.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from video_mae.benchmark.records_base import Times

Call = Callable[[], Any]

FLUSH_BYTES = 256 << 20  # more than the cache of any GPU
MIN_SAMPLES, MAX_SAMPLES = 5, 50
GRAPH_MS = 2.0  # of one replay, so that its launch does not count
WALL_SAMPLES = 7
# of an error, over the root mean square of the exact values
RMS_LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}


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


class Verdict(NamedTuple):
    """The largest and the root-mean-square error, the latter over the exact values' own; failure is
    empty for a right result.
    """

    max_error: float
    rms_error: float
    failure: str


def judge(
    ours: torch.Tensor, low: torch.Tensor, exact: torch.Tensor, limit: float | None = None
) -> Verdict:
    """The two-sided rule for a result in low precision.

    No value may be further from float64 than twice what `low`, PyTorch's own arithmetic of that
    precision, is (FlashAttention's rule), and the error as a whole must be small
    (flash-linear-attention's rule). For a result of one number both are the same: its relative
    error may be `limit`, or twice that of `low` if that is more.
    """
    if ours.shape != exact.shape or not ours.isfinite().all():
        what = (
            f"has shape {tuple(ours.shape)}"
            if ours.shape != exact.shape
            else f"has {int((~ours.isfinite()).sum())} values not finite"
        )
        return Verdict(math.inf, math.inf, what)
    difference = ours.double() - exact
    error, rms = (
        difference.abs().max().item(),
        difference.square().mean().sqrt().item() / (exact.square().mean().sqrt().item() + 1e-300),
    )
    of_low = (low.double() - exact).abs().max().item()
    if limit is None and error > (allowed := 2 * of_low + _rounding_noise(exact, ours.dtype)):
        return Verdict(error, rms, f"off by up to {error:.1e}, allowed {allowed:.1e}")
    allowed = (
        RMS_LIMIT[ours.dtype] if limit is None else max(limit, 2 * of_low / exact.abs().item())
    )
    return Verdict(
        error, rms, f"relative error {rms:.1e}, allowed {allowed:.1e}" if rms > allowed else ""
    )


def _rounding_noise(exact: torch.Tensor, dtype: torch.dtype) -> float:
    """What two roundings to the dtype do to values of this size; 16 units in the last place of
    float32, as 2 ** x is not e ** x there.
    """
    if dtype == torch.float32:
        return 2**-20 * exact.abs().max().item()
    rounded = exact.to(dtype)
    return 2 * ((rounded + 0.3) - 0.3 - rounded).abs().max().item()


def quantiles(samples: Sequence[float]) -> Times:
    """Median, p20 and p80 of at least two samples."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Times(statistics.median(samples), fifths[0], fifths[3])


class Clock:
    """Takes times on one device, each in about `budget_ms` milliseconds (and at least five calls)."""

    def __init__(self, device: torch.device, budget_ms: float = 100.0) -> None:
        self.device, self.budget_ms = device, budget_ms
        if device.type == "cuda":
            self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
            self._flush_ms = statistics.median(
                self._between_events(self._flushed.zero_) for _ in range(5)
            )

    def wall(self, calls: list[Call]) -> Times:
        """Of one call, in turn over `calls`, until the device is done. On a GPU, samples of many
        calls: the host runs ahead.
        """
        estimate = max(self._seconds(call) for call in calls)  # and all are warm
        estimate = min(estimate, *(self._seconds(call) for call in calls))
        if self.device.type == "cpu":
            rounds = math.ceil(self._samples(1e3 * estimate) / len(calls))
            return quantiles([1e3 * self._seconds(call) for _ in range(rounds) for call in calls])
        rounds = math.ceil(self.budget_ms / WALL_SAMPLES / (1e3 * estimate * len(calls)))
        return quantiles(
            [
                1e3 * self._seconds(*calls * rounds) / (rounds * len(calls))
                for _ in range(WALL_SAMPLES)
            ]
        )

    def cold(self, call: Call) -> Times:
        """Device time of one call that finds nothing of its input in the cache.

        triton.testing.do_bench flushes once before each call: a call of many small kernels, which
        the host issues more slowly than the device flushes, is charged with the host's time there,
        which is what `wall` is for. Here the flush is repeated for as long as the host needs to
        issue the whole call.
        """
        flushes = self._flushes(call)
        samples = self._samples(self._between_events(call, flushes))
        return quantiles([self._between_events(call, flushes) for _ in range(samples)])

    def graph(self, make_calls: Callable[[], list[Call]]) -> Times:
        """Device time of one call, recorded and replayed. make_calls is called on the stream that
        records: a backward pass runs where its forward pass ran.
        """
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            calls = make_calls()

            def in_turn() -> None:
                for call in calls:
                    call()

            rounds = min(
                math.ceil(GRAPH_MS / self._between_events(in_turn, self._flushes(in_turn))), 100
            )
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                in_turn()
        graph.replay()
        samples = self._samples(self._between_events(graph.replay))
        return quantiles(
            [self._between_events(graph.replay) / (rounds * len(calls)) for _ in range(samples)]
        )

    def peak_mb(self, call: Call) -> float:
        """Megabytes that one call takes beyond what was there before, results included; of a GPU."""
        call()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        kept = call()
        torch.cuda.synchronize(self.device)
        del kept
        return (torch.cuda.max_memory_allocated(self.device) - before) / 1e6

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        """Both ceilings of the roofline, with random data: zeros take less power, and are faster."""
        on_gpu = self.device.type == "cuda"
        side, count = (8192, 1 << 30) if on_gpu else (2048, 1 << 27)
        a, b = (torch.randn(side, side, dtype=dtype, device=self.device) for _ in range(2))
        source = torch.randint(0, 256, (count,), dtype=torch.uint8, device=self.device)
        target, product = torch.empty_like(source), torch.empty_like(a)
        take = self.cold if on_gpu else lambda call: self.wall([call])
        return Ceilings(
            2e3 * side**3 / take(lambda: torch.mm(a, b, out=product)).p20,
            2e3 * count / take(lambda: target.copy_(source)).p20,
        )

    def _flushes(self, call: Call) -> int:
        """How many flushes take as long as the host needs to issue the call, and half as long
        again.
        """
        call()
        host_ms = 1e3 * statistics.median(self._seconds(call, issue_only=True) for _ in range(5))
        return 1 + math.ceil(1.5 * host_ms / self._flush_ms)

    def _samples(self, estimate_ms: float) -> int:
        return max(MIN_SAMPLES, min(MAX_SAMPLES, int(self.budget_ms / max(estimate_ms, 1e-6))))

    def _seconds(self, *calls: Call, issue_only: bool = False) -> float:
        self._wait()
        start = time.perf_counter()
        for call in calls:
            call()
        if not issue_only:
            self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _between_events(self, call: Call, flushes: int = 0) -> float:
        """Milliseconds of the device between two events around a call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(flushes):
            self._flushed.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
