"""What every Triton kernel here shares: how it is started, its numbers, registration with torch.

In device code names in capitals are known when a kernel is compiled; only kernels, which are called
from Python, have to say that they are tl.constexpr.

Triton's interpreter (TRITON_INTERPRET=1 when the kernels are imported) computes bf16 products and
sums wrongly: loads go up to float32 before any arithmetic, and products through `dot`.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMESPACE = "video_mae"
VECTOR = 8  # values that a thread can read at once, of 16 bits each

_INTERPRETED = tl.constexpr(INTERPRETED)
# compile_check: fake tensors are launched on, too, and it collects these launches
launches_on_fakes = False


@triton.jit
def dot(a, b, acc, PRECISION):
    """acc + a @ b in float32; PRECISION as `precision` has it."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


def precision(x: Tensor) -> str:
    """float32 products are not rounded to tf32: whoever trains in float32 asked for it."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def in_units(*lengths: int) -> tuple[int, ...]:
    """(unit, each length in these units), the unit as many values as may be read at once.

    Triton knows by itself of multiples of 16 alone: a row of 1176 values (giant), or clips of odd
    numbers of tokens and heads, which start at multiples of 8, would be read value by value.
    """
    unit = math.gcd(VECTOR, *lengths)
    return unit, *(length // unit for length in lengths)


def floats(like: Tensor, *shape: int) -> Tensor:
    """Empty float32 memory on the device of another tensor."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def runs(tensor: Tensor) -> bool:
    """Whether kernels run on this tensor: on fakes, which torch.compile traces with, none do."""
    return launches_on_fakes or not isinstance(tensor, FakeTensor)


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Starts a kernel on the device of its first argument, which need not be the current one."""
    tensor = arguments[0]
    if not runs(tensor) or programs == 0:
        return
    on = torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
    with on:
        kernel[(programs,)](*arguments, **options)


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
    keeps: Callable[[Any, Any], Iterable[Tensor]] | None = None,
    backward: Callable[..., tuple[Tensor | None, ...]] | None = None,
) -> Callable[..., Any]:
    """Makes an opaque torch operation, e.g. register("gather(Tensor clip) -> Tensor", ...).

    fake: makes empty results, where `implementation` does not do well with symbolic shapes.
    keeps(inputs, results): the tensors that are kept for `backward`, which gets a context (they are
    its saved_tensors, and `dtype` is that of the first input) and the gradient of the first result,
    and returns the gradients of the first inputs. No other result has a gradient.
    """
    name, signature = schema.split("(", 1)
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, f"({signature}")
    torch.library.impl(qualified, ("cuda", "cpu"))(implementation)

    def shapes(*arguments: Any) -> Any:
        made = implementation if fake is None or launches_on_fakes else fake
        return made(*arguments)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        assert keeps is not None
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else zeros are made for the other results
        ctx.save_for_backward(*keeps(inputs, output))
        ctx.dtype = inputs[0].dtype

    def all_gradients(ctx: Any, gradient: Tensor, *_: None) -> tuple[Any, ...]:
        assert backward is not None
        found = backward(ctx, gradient)
        return *found, *[None] * (len(ctx.needs_input_grad) - len(found))

    torch.library.register_fake(qualified)(shapes)
    if backward is not None:
        torch.library.register_autograd(qualified, all_gradients, setup_context=setup_context)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
