"""The attention kernels on a GPU against the reference in float64, by the two-sided rule of
tests/norms.py.
"""

import runpy
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from video_mae.kernels import attention, attention_long, attention_short, reference
from video_mae.kernels.attention import packed_attention
from video_mae.kernels.preset_shapes import attention_shapes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
norms = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "norms.py")))
OPCHECK: Any = torch.library.opcheck
HALF = [torch.bfloat16, torch.float16]
TOKENS = [1, 2, 15, 16, 17, 63, 64, 65, 97, 127, 128, 129, 157, 160, 161, 196, 256]
LONG_TOKENS = [257, 785]
WIDTHS = [16, 24, 32, 40, 64, 72, 80, 88, 96, 128]
CASES = [
    *(
        (program, (3, tokens, 5, 64), dtype)
        for program in (attention_short, attention_long)
        for tokens in TOKENS
        for dtype in HALF
    ),
    *(
        (program, (2, tokens, 3, width), torch.bfloat16)
        for program in (attention_short, attention_long)
        for tokens in (97, 160, 256)
        for width in WIDTHS
    ),
    *(
        (attention_long, (2, tokens, 3, width), dtype)
        for tokens in LONG_TOKENS
        for width in (64, 80, 88, 128)
        for dtype in HALF
    ),
    *(
        (program, (2, shape.tokens, shape.heads, shape.width), torch.bfloat16)
        for shape in attention_shapes()
        for program in (attention_short, attention_long)
        if program is attention_long or shape.tokens <= attention_short.MAX_TOKENS
    ),
    *(
        (attention_long, (2, tokens, 3, width), torch.float32)
        for tokens in (17, 160, 257)
        for width in (24, 64, 80, 128)
    ),
]


def inputs(shape, dtype, seed=0):
    """(qkv, dout)."""
    batch, tokens, heads, width = shape
    generator = torch.Generator("cuda").manual_seed(seed)
    qkv = torch.randn(batch, tokens, 3, heads, width, generator=generator, device="cuda")
    return qkv.to(dtype), torch.randn(
        batch, tokens, heads, width, generator=generator, device="cuda"
    ).to(dtype)


def reference_of(qkv, dout):
    """(out, dqkv) of the reference in this dtype."""
    x = qkv.detach().clone().requires_grad_()
    out = reference.packed_attention(x)
    return out.detach(), torch.autograd.grad(out, x, dout)[0]


def run(program: ModuleType, qkv, dout):
    """(out, dqkv) of one of the programs."""
    out, lse = program.forward(qkv)
    return out, program.backward(qkv, out, lse, dout)


def check(program, qkv, dout, **rule):
    ours, low, exact = (
        run(program, qkv, dout),
        reference_of(qkv, dout),
        reference_of(qkv.double(), dout.double()),
    )
    # for float32: what `low` is off by there is one processor's luck
    bounds = norms.attention_bounds(qkv, dout)
    in_float32 = 1.0 if qkv.dtype == torch.float32 else 0.0
    norms.assert_close(
        ours[0],
        low[0],
        exact[0],
        "out",
        slack=in_float32 * bounds[0].max().item(),
        rmse=rule.get("rmse"),
    )
    for i, name in enumerate(("dq", "dk", "dv")):
        parts = [gradient[:, :, i] for gradient in (ours[1], low[1], exact[1])]
        is_zero = qkv.shape[1] == 1 and name != "dv"  # but for the rounding of sums in float32
        slack = max(in_float32, float(is_zero)) * bounds[1][:, :, i].max().item()
        norms.assert_close(
            *parts, name, **{"slack": slack, "rmse": float("inf") if is_zero else None, **rule}
        )


@pytest.mark.parametrize(
    ("program", "shape", "dtype"),
    CASES,
    ids=lambda value: (
        value.__name__.split("_")[-1] if isinstance(value, ModuleType) else str(value)
    ),
)
def test_attention_and_its_gradient_are_their_definition(program, shape, dtype):
    check(program, *inputs(shape, dtype))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("program", "tokens"), [(attention_short, 160), (attention_long, 160), (attention_long, 785)]
)
def test_extreme_logits_neither_overflow_nor_lose_the_gradient(program, tokens, dtype):
    qkv, dout = inputs((2, tokens, 3, 64), dtype)
    qkv[:, :, 0] *= 5
    qkv[:, :, 1] *= 3
    check(program, qkv, dout, times=5, slack=1e-3, rmse=5 * norms.RMSE[dtype])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("program", "tokens"), [(attention_short, 160), (attention_long, 161), (attention_long, 864)]
)
def test_results_repeat_bit_for_bit_and_do_not_depend_on_the_batch(program, tokens, dtype):
    qkv, dout = inputs((4, tokens, 6, 64), dtype)
    together = run(program, qkv, dout)
    for _ in range(10):
        assert all(map(torch.equal, run(program, qkv, dout), together))
    alone = run(program, qkv[1:2], dout[1:2])
    assert all(torch.equal(a[0], t[1]) for a, t in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    ("program", "tokens"), [(attention_short, 157), (attention_long, 157), (attention_long, 300)]
)
def test_nothing_beyond_the_input_is_read(program, tokens):
    qkv, dout = inputs((2, tokens, 3, 72), torch.bfloat16)
    around = torch.full(
        (3, tokens + 70, 4, 4, 80), float("nan"), dtype=torch.bfloat16, device="cuda"
    )
    dout_around = torch.full(
        (3, tokens + 70, 4, 80), float("nan"), dtype=torch.bfloat16, device="cuda"
    )
    inside = (
        around[:2, :tokens, :3, :3, :72].copy_(qkv),
        dout_around[:2, :tokens, :3, :72].copy_(dout),
    )
    assert all(map(torch.equal, run(program, *inside), run(program, qkv, dout)))


@pytest.mark.parametrize("tokens", [160, 257])
def test_a_recorded_graph_follows_its_inputs(tokens):
    qkv, dout = inputs((2, tokens, 3, 64), torch.bfloat16)
    qkv.requires_grad_()

    def step():
        out = packed_attention(qkv, "triton")
        return out, torch.autograd.grad(out, qkv, dout)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    for seed in (1, 2):
        new_qkv, new_dout = inputs((2, tokens, 3, 64), torch.bfloat16, seed)
        with torch.no_grad():
            qkv.copy_(new_qkv)
            dout.copy_(new_dout)
        graph.replay()
        program = attention_short if tokens <= 256 else attention_long
        assert all(
            map(torch.equal, [x.detach() for x in recorded], run(program, new_qkv, new_dout))
        )


@pytest.mark.parametrize("tokens", [160, 257])
def test_operations_are_registered_as_torch_demands(tokens):
    qkv, dout = inputs((2, tokens, 3, 80), torch.bfloat16)
    out, lse = attention._forward(qkv)
    for x in (qkv, qkv.permute(2, 3, 0, 1, 4).contiguous().permute(2, 3, 0, 1, 4)):
        OPCHECK(attention._forward, (x,))
        OPCHECK(attention._backward, (x, out, lse, dout))


@pytest.mark.parametrize("tokens", [160, 257])
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_compiles_into_one_graph(impl, tokens):
    qkv, dout = inputs((2, tokens, 3, 64), torch.bfloat16)
    results = []
    for function in (packed_attention, torch.compile(packed_attention, fullgraph=True)):
        x = qkv.clone().requires_grad_()
        out = function(x, impl)
        results.append((out.detach(), torch.autograd.grad(out, x, dout)[0]))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=2e-2)


def test_autocast_decides_the_dtype():
    qkv, _ = inputs((2, 160, 3, 64), torch.float32)
    qkv.requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        out = packed_attention(qkv, "triton")
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.sum(), qkv)[0].dtype == torch.float32


def test_more_than_2_to_the_31_values_are_addressed():
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    qkv = torch.zeros(6000, 160, 3, 12, 64, dtype=torch.bfloat16, device="cuda")
    last, dout = inputs((1, 160, 12, 64), torch.bfloat16)
    qkv[-1:] = last
    out, lse = attention_short.forward(qkv)
    gradient = attention_short.backward(qkv, out, lse, dout.expand(6000, -1, -1, -1))
    expected = run(attention_short, last, dout)
    assert torch.equal(out[-1:], expected[0])
    assert torch.equal(gradient[-1:], expected[1])
