"""Of one operation: is each provider's result right, and how long does it take.

Whatever goes wrong with a provider is told in its row.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from video_mae.benchmark.clock import Call, Ceilings, Clock, peak_growth
from video_mae.benchmark.kernel_operations import Inputs, Operation, Provider
from video_mae.benchmark.record import Record, dtype_name, reason_of

INPUT_SETS = 3  # that warm calls take in turn
REPEATS = {"cuda": 10, "cpu": 3}  # that must be equal to the bit
REASON_LENGTH = 200
# of an error, over the root mean square of the exact values
RMS_LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}


class Verdict(NamedTuple):
    """The largest and the root-mean-square error, the latter over the exact values' own; failure is
    empty for a right result.
    """

    max_error: float
    rms_error: float
    failure: str


def measure_operation(
    operation: Operation, clock: Clock, ceilings: Ceilings, words: Sequence[str] = ()
) -> list[Record]:
    """A record for each mode of each provider whose name has one of the words; where one is not
    available, the reason.
    """
    providers = {name: run for name, run in operation.providers().items() if matches(name, words)}
    if not providers:
        return []
    record = partial(
        Record,
        benchmark="kernels",
        op=operation.op,
        shape=operation.shape,
        dtype=dtype_name(operation.dtype),
    )
    sets: list[Inputs] = []
    try:
        for seed in range(INPUT_SETS):
            torch.manual_seed(seed)
            sets.append(operation.inputs())
        last = operation.modes[-1]
        low = results(operation, operation.low, checked(operation, sets[0]), last)
        exact_inputs = checked(operation, sets[0], double=True)
        exact = results(operation, operation.definition, exact_inputs, last)
    except torch.OutOfMemoryError:
        reason = "the inputs and their float64 results do not fit the memory"
        return [record(provider="every provider", mode="forward", reason=reason)]
    records: list[Record] = []
    resolved = operation.resolved(sets[0])
    for name, run in providers.items():
        for mode in operation.modes:
            times: dict[str, Any] = {}
            judged = partial(judge_mode, operation, run, sets[0], mode, low, exact)
            measures, reason = attempt(judged)
            has_failed = bool(reason)
            if not has_failed:
                calls = partial(make_calls, operation, run, sets, mode)
                times, reason = measure_calls(calls, clock, name not in operation.waiting)
            told = {
                "peak_mb": times.pop("peak_mb", 0),
                "resolved": resolved.get(name),
                "note": reason,
            }
            if not times:
                records.append(record(provider=name, mode=mode, reason=reason))
                if has_failed and mode == "forward":
                    break
                continue
            work, main_ms = operation.work(mode), next(iter(times.values())).p50
            measures |= {
                **operation.facts(),
                **{key: figure for key, figure in told.items() if figure},
                **work._asdict(),
                "tflops": work.flops / main_ms / 1e9,
                "gbps": work.bytes / main_ms / 1e6,
                "floor_percent": 100 * ceilings.floor_ms(work) / main_ms,
                "is_ours": name.startswith("ours"),
                "is_baseline": name == operation.baseline,
            }
            records.append(record(provider=name, mode=mode, times=times, measures=measures))
    return records


def checked(operation: Operation, x: Inputs, double: bool = False) -> Inputs:
    """The inputs that are checked; for float64, with pixels in [0, 1]."""
    found = {}
    for name, value in vars(x).items():
        sample = operation.sample(value.detach()) if value.ndim else value
        if double and value.dtype == torch.uint8:
            sample = sample.double() / 255
        elif double and value.is_floating_point():
            sample = sample.double()
        found[name] = sample.requires_grad_(value.requires_grad)
    return SimpleNamespace(**found)


def gradients(x: Inputs, out: Tensor, again: bool = False) -> tuple[Tensor, ...]:
    """Of the inputs that need one."""
    leaves = [value for value in vars(x).values() if value.requires_grad]
    return torch.autograd.grad(out, leaves, x.upstream, retain_graph=again)


def results(operation: Operation, run: Provider, x: Inputs, mode: str) -> dict[str, Tensor]:
    """What a mode gives, by name: the result, the gradients, or both."""
    out = run(x)
    found = {"result": out.detach()} if mode != "backward" else {}
    return found if mode == "forward" else found | operation.named(gradients(x, out))


def make_calls(
    operation: Operation, run: Provider, sets: Sequence[Inputs], mode: str
) -> list[Call]:
    """One call an input set; for backward the forward passes are run here."""
    if mode == "forward":
        return [partial(run, x) for x in sets]
    if mode == "backward":
        return [partial(gradients, x, run(x), again=True) for x in sets]
    return [lambda x=x: gradients(x, run(x)) for x in sets]


def measure_calls(
    calls: Callable[[], list[Call]], clock: Clock, can_be_graphed: bool
) -> tuple[dict[str, Any], str]:
    """(every time that can be taken and peak memory, what went wrong with the others)."""
    ways: dict[str, Call] = {
        "cold": lambda: clock.cold(calls()[0]),
        "graph": lambda: clock.graph(calls),
        "wall": lambda: clock.wall(calls()),
        "peak_mb": lambda: peak_growth(calls()[0], clock.device)[1] / 1e6,
    }
    if not clock.on_gpu:
        ways = {"wall": ways["wall"]}
    elif not can_be_graphed:
        del ways["graph"]
    found: dict[str, Any] = {}
    failures: list[str] = []
    for way, take in ways.items():
        figure, reason = attempt(take)
        if reason:
            failures.append(f"no {way}: {reason}")
        else:
            found[way] = figure
    return found, "; ".join(failures)


def attempt(call: Call) -> tuple[Any, str]:
    """(what a call gives, ""), or (None, why it gives nothing). Whatever a competitor or the
    compiler raises is its row's problem.
    """
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            # else a compiled backward pass could not be run twice
            with functorch_config.patch(donated_buffer=False):
                return call(), ""
        except Exception as error:
            reason = reason_of(error)
    for warning in warned:
        # SDPA warns of what each backend does not like, those too that are switched off here
        why = str(warning.message).splitlines()[0].split(" (Triggered")[0]
        is_told = "runtime disabled" in why or "because:" in why
        if issubclass(warning.category, UserWarning) and not is_told:
            reason = f"{reason} [{why}]"
            break
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, reason if len(reason) <= REASON_LENGTH else f"{reason[:REASON_LENGTH]}..."


def judge_mode(
    operation: Operation,
    run: Provider,
    x: Inputs,
    mode: str,
    low: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
) -> dict[str, Any]:
    """What a mode's record says of its results: `gate` is empty where all are right; bit_equal: so
    are repeats.
    """
    first = results(operation, run, x, mode)
    verdicts: dict[str, Verdict] = {}
    for name, ours in first.items():
        limit = operation.loss_limit if ours.ndim == 0 else None
        verdicts[name] = judge(operation.sample(ours), low[name], exact[name], limit)
    bit_equal = True
    for _ in range(REPEATS[operation.device.type] - 1):
        for name, again in results(operation, run, x, mode).items():
            bit_equal = bit_equal and torch.equal(first[name], again)
    errors = {
        "max_error": max(verdict.max_error for verdict in verdicts.values()),
        "rms_error": max(verdict.rms_error for verdict in verdicts.values()),
    }
    return {
        **{name: error for name, error in errors.items() if math.isfinite(error)},
        "gate": "; ".join(f"{name}: {v.failure}" for name, v in verdicts.items() if v.failure),
        "bit_equal": bit_equal,
    }


def judge(ours: Tensor, low: Tensor, exact: Tensor, limit: float | None = None) -> Verdict:
    """The two-sided rule for a result in low precision.

    No value may be further from float64 than twice what `low`, PyTorch's own arithmetic of that
    precision, is (FlashAttention's rule), and the error as a whole must be small
    (flash-linear-attention's rule). For a result of one number both are the same: its relative
    error may be `limit`, or twice that of `low` if that is more.
    """
    if ours.shape != exact.shape:
        return Verdict(math.inf, math.inf, f"has shape {tuple(ours.shape)}")
    if not ours.isfinite().all():
        return Verdict(math.inf, math.inf, f"has {(~ours.isfinite()).sum()} values not finite")
    difference = ours.double() - exact
    error = difference.abs().max().item()
    rms = difference.square().mean().sqrt().item()
    rms /= exact.square().mean().sqrt().item() + 1e-300
    of_low = 2 * (low.double() - exact).abs().max().item()
    if limit is None:
        allowed = of_low + _rounding_noise(exact, ours.dtype)
        if error > allowed:
            return Verdict(error, rms, f"off by up to {error:.1e}, allowed {allowed:.1e}")
        allowed = RMS_LIMIT[ours.dtype]
    else:
        allowed = max(limit, of_low / exact.abs().item())
    failure = f"relative error {rms:.1e}, allowed {allowed:.1e}" if rms > allowed else ""
    return Verdict(error, rms, failure)


def matches(name: str, words: Sequence[str]) -> bool:
    """Has the name one of these words; without words, every name."""
    return not words or any(word in name for word in words)


def _rounding_noise(exact: Tensor, dtype: torch.dtype) -> float:
    """What two roundings to the dtype do to values of this size; 16 units in the last place of
    float32, as 2 ** x is not e ** x there.
    """
    if dtype == torch.float32:
        return 2**-20 * exact.abs().max().item()
    rounded = exact.to(dtype)
    return 2 * ((rounded + 0.3) - 0.3 - rounded).abs().max().item()
