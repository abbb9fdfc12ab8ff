"""What every Triton kernel here shares: the interpreter's switch, a product that it computes
rightly, registration with torch.

Triton's interpreter (TRITON_INTERPRET=1 when the kernels are imported) computes bf16 products and
sums wrongly: loads go up to float32 before any arithmetic, and products through `dot`.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMESPACE = "video_mae"

_INTERPRETED = tl.constexpr(INTERPRETED)
# compile_check: fake tensors go through the launchers, whose launches it collects
launches_on_fakes = False


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32; PRECISION is "ieee" for float32 operands that must not be rounded to
    tf32, else "tf32".
    """
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


def register(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Makes an opaque torch operation of a launcher, e.g. register("gather(Tensor clip, Tensor
    index) -> Tensor", ...).

    It has no gradient and no autocast: the public function casts, and an autograd.Function outside
    calls two such operations. `fake` returns empty tensors of the shapes, strides and dtypes that
    `implementation` returns.
    """

    def shapes(*arguments: Any) -> Any:
        return (implementation if launches_on_fakes else fake)(*arguments)

    name = f"{NAMESPACE}::{schema.split('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :])
    torch.library.impl(name, ("cuda", "cpu"))(implementation)
    torch.library.register_fake(name)(shapes)
    return getattr(getattr(torch.ops, NAMESPACE), schema.split("(")[0]).default


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels start on the device of their tensors, not on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
