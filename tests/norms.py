"""The two-sided rule for what a kernel computes in low precision; test files load this with runpy.

No value may be further from float64 than twice what PyTorch's own arithmetic of that precision is
(FlashAttention's rule: catches single wrong rows), and the error as a whole must be small
(flash-linear-attention's rule: does not depend on luck in tiny tensors).
"""

import torch
from einops import rearrange

# of the root mean square of the exact values
RMSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}


def rounding_noise(exact: torch.Tensor, dtype: torch.dtype) -> float:
    """What two roundings to the dtype do to values of this size; 16 units in the last place of
    float32, as 2 ** x is not e ** x there.
    """
    if dtype == torch.float32:
        return 2**-20 * exact.abs().max().item()
    rounded = exact.to(dtype)
    return 2 * ((rounded + 0.3) - 0.3 - rounded).abs().max().item()


def assert_close(
    ours: torch.Tensor,
    low: torch.Tensor,
    exact: torch.Tensor,
    what: str = "",
    times: float = 2.0,
    slack: float = 0.0,
    rmse: float | None = None,
) -> None:
    """ours and low: two results in the same dtype (for float32, low may be exact.float()); exact:
    float64.
    """
    assert ours.dtype == low.dtype
    assert ours.shape == exact.shape
    assert ours.isfinite().all(), f"{what}: {(~ours.isfinite()).sum()} values are not finite"
    error, noise = (ours - exact).abs().max().item(), rounding_noise(exact, ours.dtype)
    allowed = times * (low - exact).abs().max().item() + noise + slack
    assert error <= allowed, f"{what}: off by up to {error:.2e}, allowed {allowed:.2e}"
    size = exact.square().mean().sqrt().item()
    ratio = (ours - exact).square().mean().sqrt().item() / (size + 1e-300)
    limit = RMSE[ours.dtype] if rmse is None else rmse
    assert ratio <= limit or error <= noise, (
        f"{what}: relative error {ratio:.2e}, allowed {limit:.2e}"
    )


def attention_bounds(
    qkv_BN3HD: torch.Tensor, dout_BNHD: torch.Tensor, exact_products: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far float32 can take each value of packed attention's (out, dqkv) from the exact one, in
    whatever order a processor sums.

    A sum of n products is off by at most n * 2 ** -24 of the sum of their sizes; an error of a
    score is a relative one of its weight. exact_products: float32 holds q k^T, as of small
    integers.
    """
    unit, tokens, width = 2.0**-24, qkv_BN3HD.shape[1], qkv_BN3HD.shape[-1]
    q, k, v = rearrange(qkv_BN3HD.double(), "b n three h d -> three b h n d")
    dout = rearrange(dout_BNHD.double(), "b n h d -> b h n d").abs()
    weights = (q @ k.mT * width**-0.5).softmax(-1)
    q, k, v = q.abs(), k.abs(), v.abs()
    # 4: the scale, its product, the lse, a weight's exponent
    roundings = 4 if exact_products else 4 + width
    of_scores = roundings * unit * (q @ k.mT * width**-0.5)
    # 2: a weight and the sum of all
    of_weights = torch.expm1(2 * of_scores.amax(-1, keepdim=True)) + (tokens + 4) * unit
    products = dout @ v.mT
    products = weights * (products + (weights * products).sum(-1, keepdim=True))
    of_dscores = (2 * of_weights + (width + tokens) * unit) * products
    out = of_weights * (weights @ v)
    dq, dk, dv = (
        of_dscores @ k * width**-0.5,
        of_dscores.mT @ q * width**-0.5,
        (of_weights * weights).mT @ dout,
    )
    return rearrange(out, "b h n d -> b n h d"), rearrange(
        [dq, dk, dv], "three b h n d -> b n three h d"
    )
