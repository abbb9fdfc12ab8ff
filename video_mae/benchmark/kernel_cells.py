"""One cell of the benchmark after another: is a provider's result right, and how long does it take.

Whatever goes wrong with a provider is told in its row.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._functorch import config as functorch_config

from video_mae.benchmark.kernel_problems import Problem, Provider
from video_mae.benchmark.measure import Call, Ceilings, Clock, Verdict, judge
from video_mae.benchmark.records_base import Record, Times

BENCHMARK = "kernels"
INPUT_SETS = 3  # that warm calls take in turn
REPEATS = {"cuda": 10, "cpu": 3}  # that must be equal to the bit
REASON_LENGTH = 200


def measure_problem(
    problem: Problem, clock: Clock, ceilings: Ceilings, words: Sequence[str] = ()
) -> list[Record]:
    """A record for each provider and mode of a problem; where one is not available, the reason."""
    providers = [provider for provider in problem.providers() if matches(provider.name, words)]
    if not providers:
        return []
    try:
        sets = [problem.inputs(seed) for seed in range(INPUT_SETS)]
        low = _results(problem, problem.low, _checked(problem, sets[0], double=False))
        exact = _results(problem, problem.definition, _checked(problem, sets[0], double=True))
    except torch.OutOfMemoryError:
        return [
            _record(
                problem,
                "every provider",
                "forward",
                reason="the inputs and their float64 results do not fit the memory",
            )
        ]
    records: list[Record] = []
    for provider in providers:
        # else a compiled backward pass could not be run twice
        with functorch_config.patch(donated_buffer=False):
            records += _measure_provider(problem, provider, sets, low, exact, clock, ceilings)
    return records


def _measure_provider(
    problem: Problem,
    provider: Provider,
    sets: Sequence[Any],
    low: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
    clock: Clock,
    ceilings: Ceilings,
) -> list[Record]:
    verdicts, reason = _attempt(lambda: _judge(problem, provider, sets[0], low, exact, "forward"))
    if verdicts is None:
        return [_record(problem, provider.name, "forward", reason=reason)]
    if problem.modes != ("forward",):
        all_verdicts, reason = _attempt(
            lambda: _judge(problem, provider, sets[0], low, exact, "both")
        )
        verdicts = all_verdicts or verdicts
    records: list[Record] = []
    for mode in problem.modes:
        times, memory, failures = {}, {}, reason
        if mode == "forward" or not reason:
            times, memory, failures = _measure_mode(problem, provider, mode, sets, clock)
        if not times:
            records.append(_record(problem, provider.name, mode, reason=failures))
            continue
        work, main = problem.work(mode), next(iter(times.values())).p50
        measures = {
            **problem.facts(),
            **memory,
            **_correctness(mode, verdicts),
            "flops": work.flops,
            "bytes": work.bytes,
            "tflops": work.flops / main / 1e9,
            "gbps": work.bytes / main / 1e6,
            "floor_percent": 100 * ceilings.floor_ms(work) / main,
            "is_ours": provider.is_ours,
            "is_baseline": provider.name == problem.baseline,
        }
        notes = {"resolved": provider.resolved, "note": failures}
        measures |= {name: text for name, text in notes.items() if text}
        records.append(_record(problem, provider.name, mode, times=times, measures=measures))
    return records


def _record(problem: Problem, provider: str, mode: str, **found: Any) -> Record:
    return Record(
        benchmark=BENCHMARK,
        op=problem.op,
        shape=problem.shape,
        dtype=dtype_name(problem.dtype),
        provider=provider,
        mode=mode,
        **found,
    )


def _measure_mode(
    problem: Problem, provider: Provider, mode: str, sets: Sequence[Any], clock: Clock
) -> tuple[dict[str, Times], dict[str, float], str]:
    """Every time that can be taken, peak memory, and what went wrong with the others."""
    on_gpu, failures = problem.device.type == "cuda", []
    take: dict[str, Callable[[list[Call]], Any]] = {"wall": clock.wall}
    if on_gpu:
        take = {
            "cold": lambda calls: clock.cold(calls[0]),
            **take,
            "peak_mb": lambda calls: clock.peak_mb(calls[0]),
        }
    calls, reason = _attempt(lambda: _calls(problem, provider, mode, sets))
    if calls is None:
        return {}, {}, reason
    found: dict[str, Any] = {}
    for name, way in take.items():
        found[name], reason = _attempt(lambda way=way, calls=calls: way(calls))
        failures += [f"no {name}: {reason}"] if reason else []
    del calls  # a backward pass holds what its forward pass saved
    if on_gpu and provider.graphable:
        found["graph"], reason = _attempt(
            lambda: clock.graph(lambda: _calls(problem, provider, mode, sets))
        )
        failures += [f"no graph: {reason}"] if reason else []
    times = {way: found[way] for way in ("cold", "graph", "wall") if found.get(way) is not None}
    memory = {"peak_mb": found["peak_mb"]} if found.get("peak_mb") is not None else {}
    return times, memory, "; ".join(failures)


def _calls(problem: Problem, provider: Provider, mode: str, sets: Sequence[Any]) -> list[Call]:
    """One call an input set; for backward the forward passes are run here."""
    if mode == "forward":
        return [lambda x=x: provider.run(x) for x in sets]
    if mode == "both":
        return [lambda x=x: _gradients(problem, x, provider.run(x)) for x in sets]
    done = [(x, provider.run(x)) for x in sets]
    return [lambda x=x, out=out: _gradients(problem, x, out, again=True) for x, out in done]


def _gradients(
    problem: Problem, x: Any, out: torch.Tensor, again: bool = False
) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(out, problem.leaves(x), problem.upstream(x, out), retain_graph=again)


def _results(
    problem: Problem, run: Callable[[Any], torch.Tensor], x: Any, mode: str = "both"
) -> dict[str, torch.Tensor]:
    """What is checked, by name: the result, and but for `forward` the gradients."""
    out = run(x)
    gradients = (
        _gradients(problem, x, out) if mode != "forward" and problem.modes != ("forward",) else ()
    )
    return problem.named(out.detach(), gradients)


def _checked(problem: Problem, x: Any, double: bool) -> Any:
    """The inputs that are checked; for float64, with pixels in [0, 1]."""

    def one(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        sample = problem.sample(value.detach())
        if double and value.dtype == torch.uint8:
            sample = sample.double() / 255
        elif double and value.is_floating_point():
            sample = sample.double()
        return sample.requires_grad_(value.requires_grad)

    return type(x)(*map(one, x))


def _judge(
    problem: Problem,
    provider: Provider,
    x: Any,
    low: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
    mode: str,
) -> dict[str, tuple[Verdict, bool]]:
    """For each result by name: is it right, and are repeats equal to the bit."""
    first = _results(problem, provider.run, x, mode)
    equal = dict.fromkeys(first, True)
    for _ in range(REPEATS[problem.device.type] - 1):
        again = _results(problem, provider.run, x, mode)
        equal = {
            name: equal[name] and torch.equal(ours, again[name]) for name, ours in first.items()
        }
    return {
        name: (
            judge(
                problem.sample(ours),
                low[name],
                exact[name],
                problem.loss_limit if ours.ndim == 0 else None,
            ),
            equal[name],
        )
        for name, ours in first.items()
    }


def _correctness(mode: str, verdicts: dict[str, tuple[Verdict, bool]]) -> dict[str, Any]:
    """What a mode's record says of its results: `gate` is empty where all are right."""
    chosen = {
        name: found
        for name, found in verdicts.items()
        if mode == "both" or (name == "result") == (mode == "forward")
    }
    errors = {
        f"{kind}_error": max(getattr(verdict, f"{kind}_error") for verdict, _ in chosen.values())
        for kind in ("max", "rms")
    }
    gate = "; ".join(
        f"{name}: {verdict.failure}" for name, (verdict, _) in chosen.items() if verdict.failure
    )
    return {
        **{name: error for name, error in errors.items() if math.isfinite(error)},
        "gate": gate,
        "bit_equal": all(equal for _, equal in chosen.values()),
    }


def _attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """(what a call gives, ""), or (None, why it gives nothing). Whatever a competitor or the
    compiler raises is its row's problem.
    """
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            return call(), ""
        except Exception as error:
            message = next(
                (line.strip() for line in str(error).splitlines() if line.strip()), "no message"
            )
            reason = f"{type(error).__name__}: {message}"
    # SDPA warns of what each backend does not like, those too that are switched off here
    why = [
        str(warning.message).splitlines()[0]
        for warning in warned
        if issubclass(warning.category, UserWarning)
    ]
    why = [
        text.split(" (Triggered")[0]
        for text in why
        if "runtime disabled" not in text and "because:" not in text
    ]
    reason = f"{reason} [{why[0]}]" if why else reason
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, reason if len(reason) <= REASON_LENGTH else f"{reason[:REASON_LENGTH]}..."


def matches(name: str, words: Sequence[str]) -> bool:
    """Has the name one of these words; without words, every name."""
    return not words or any(word in name for word in words)


def dtype_name(dtype: torch.dtype) -> str:
    """E.g. bfloat16."""
    return str(dtype).removeprefix("torch.")
