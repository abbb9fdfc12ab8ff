"""The attention kernels in Triton's interpreter against the reference in float64, forward and
gradient.
"""

import runpy
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from video_mae.kernels import attention, attention_long, attention_short, dispatch, reference
from video_mae.kernels.attention import packed_attention
from video_mae.kernels.attention_tiles import parts as parts_of
from video_mae.kernels.preset_shapes import attention_shapes

pytestmark = pytest.mark.usefixtures("interpreted")

norms = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "norms.py")))
OPCHECK: Any = torch.library.opcheck
PROGRAMS = [pytest.param(attention_short, id="short"), pytest.param(attention_long, id="long")]
# (clips, tokens, heads, width): a row before, on and after every edge of a tile, and every way to
# cut a head
SHAPES = [
    (2, 1, 3, 64),
    (2, 2, 3, 16),
    (3, 15, 1, 80),
    (1, 16, 2, 24),
    (2, 17, 3, 88),
    (1, 63, 1, 32),
    (1, 64, 3, 72),
    (1, 65, 2, 40),
    (1, 97, 1, 96),
    (1, 127, 1, 128),
    (1, 128, 1, 8),
    (1, 129, 1, 64),
    (1, 157, 1, 88),
    (1, 160, 2, 64),
    (1, 161, 1, 80),
    (1, 196, 1, 48),
    (1, 256, 1, 128),
]
HALF_SHAPES = [
    (1, 1, 1, 16),
    (2, 17, 3, 88),
    (1, 64, 1, 72),
    (1, 97, 1, 128),
    (1, 160, 1, 80),
    (1, 161, 1, 64),
]
LONG_SHAPES = [(1, 257, 1, 80), (1, 300, 1, 64)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def inputs(shape=(2, 37, 3, 24), dtype=torch.float32, seed=0):
    """(qkv, dout)."""
    batch, tokens, heads, width = shape
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, tokens, 3, heads, width, generator=generator)
    return qkv.to(dtype), torch.randn(batch, tokens, heads, width, generator=generator).to(dtype)


def reference_of(qkv, dout):
    """(out, dqkv) of the reference in this dtype."""
    x = qkv.detach().clone().requires_grad_()
    out = reference.packed_attention(x)
    return out.detach(), torch.autograd.grad(out, x, dout)[0]


def run(program: ModuleType, qkv, dout):
    """(out, dqkv) of one of the programs."""
    out, lse = program.forward(qkv)
    return out, program.backward(qkv, out, lse, dout)


def check(program, qkv, dout, exact_products=False, **rule):
    ours, low, exact = (
        run(program, qkv, dout),
        reference_of(qkv, dout),
        reference_of(qkv.double(), dout.double()),
    )
    # for float32: what `low` is off by there is one processor's luck
    bounds = norms.attention_bounds(qkv, dout, exact_products)
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
    [
        *(
            (program, shape, torch.float32)
            for program in (attention_short, attention_long)
            for shape in SHAPES
        ),
        *(
            (program, shape, torch.float16)
            for program in (attention_short, attention_long)
            for shape in HALF_SHAPES
        ),
        *(
            (attention_long, shape, dtype)
            for shape in LONG_SHAPES
            for dtype in (torch.float32, torch.float16)
        ),
    ],
    ids=lambda value: (
        value.__name__.split("_")[-1] if isinstance(value, ModuleType) else str(value)
    ),
)
def test_attention_and_its_gradient_are_their_definition(program, shape, dtype):
    check(program, *inputs(shape, dtype))


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extreme_logits_neither_overflow_nor_lose_the_gradient(program, dtype):
    qkv, dout = inputs((1, 66, 2, 64), dtype)
    qkv[:, :, 0] *= 5
    qkv[:, :, 1] *= 3
    check(program, qkv, dout, times=5, slack=1e-3, rmse=5 * norms.RMSE[dtype])
    out, gradient = run(program, 30 * qkv, dout)
    assert out.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_far_from_zero_leave_the_keys_that_do_not_exist_alone(program, sign):
    qkv, dout = inputs((1, 66, 2, 64))
    qkv = qkv.round()
    qkv[:, :, 0] = sign * 8
    qkv[:, :, 1] += 8  # lse is near -740 or 740: 2 ** 740 would be the weight of a score of 0
    # A score of 512 and so a weight is known to 4 * 512 * 2 ** -24 = 1.2e-4; dq has 8 times that:
    # the deviations of keys about 8
    check(program, qkv, dout, exact_products=True, rmse=1e-3)


@pytest.mark.parametrize("program", PROGRAMS)
def test_bfloat16_works_as_far_as_the_interpreter_can_round(program):
    qkv, dout = inputs((1, 70, 2, 40), torch.bfloat16)
    out, gradient = run(program, qkv, dout)
    exact_out, exact_gradient = reference_of(qkv.double(), dout.double())
    torch.testing.assert_close(out.double(), exact_out, rtol=2**-6, atol=2**-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=2**-5, atol=2**-5)


@pytest.mark.parametrize("program", PROGRAMS)
def test_lse_is_the_base_2_logarithm_of_the_sum_of_exponentials(program):
    qkv, _ = inputs((2, 37, 3, 24))
    q, k, _ = qkv.double().permute(2, 0, 3, 1, 4)
    expected = (q @ k.transpose(-1, -2) * 24**-0.5).logsumexp(-1) / torch.tensor(2.0).log()
    torch.testing.assert_close(program.forward(qkv)[1], expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_beyond_the_input_is_read_or_beyond_the_output_written(program, dtype, monkeypatch):
    shape = (2, 37, 3, 24)
    qkv, dout = inputs(shape, dtype)
    plain = run(program, qkv, dout)
    around = torch.full((3, 50, 4, 4, 40), float("nan"), dtype=dtype)
    dout_around = torch.full((3, 50, 4, 40), float("nan"), dtype=dtype)
    qkv_inside, dout_inside = (
        around[:2, :37, :3, :3, :24].copy_(qkv),
        dout_around[:2, :37, :3, :24].copy_(dout),
    )
    guards = []
    real_empty = torch.empty

    def poisoned(*size, **options):
        size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        values = torch.Size(size).numel()
        buffer = real_empty(values + 512, **options).fill_(float("nan"))
        guards.append(buffer[values:])
        return buffer[:values].view(size)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x: poisoned(x.shape, dtype=x.dtype))
    results = run(program, qkv_inside, dout_inside)
    assert len(guards) >= 3
    assert all(guard.isnan().all() for guard in guards)
    assert all(torch.equal(ours, expected) for ours, expected in zip(results, plain, strict=True))


@pytest.mark.parametrize("program", PROGRAMS)
def test_results_repeat_bit_for_bit_and_do_not_depend_on_the_batch(program):
    qkv, dout = inputs((3, 37, 2, 16))
    together = run(program, qkv, dout)
    for _ in range(2):
        assert all(map(torch.equal, run(program, qkv, dout), together))
    alone = run(program, qkv[1:2], dout[1:2])
    assert all(torch.equal(a[0], t[1]) for a, t in zip(alone, together, strict=True))


@pytest.mark.parametrize("program", PROGRAMS)
def test_any_strides_are_read_and_gradients_are_packed(program):
    qkv, dout = inputs((2, 19, 3, 16))
    out, gradient = run(program, qkv, dout)
    # [3, heads, B, N, D] in memory
    heads_first = qkv.permute(2, 3, 0, 1, 4).contiguous().permute(2, 3, 0, 1, 4)
    width_first = qkv.transpose(1, 4).contiguous().transpose(1, 4)
    for same in (heads_first, width_first):
        for same_dout in (
            dout,
            dout.transpose(1, 2).contiguous().transpose(1, 2),
            dout.transpose(1, 3).contiguous().transpose(1, 3),
        ):
            again = run(program, same, same_dout)
            assert torch.equal(again[0], out)
            assert torch.equal(again[1], gradient)
            assert again[1].is_contiguous()


# ---------------------------------------------------------------- the public function


def test_a_sum_sends_an_expanded_gradient():
    qkv, _ = inputs()
    ours, expected = (
        torch.autograd.grad(packed_attention(x, impl).sum(), x)[0]
        for x, impl in (
            (qkv.clone().requires_grad_(), "triton"),
            (qkv.clone().requires_grad_(), "reference"),
        )
    )
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 17, 2, 24), (1, 257, 1, 16)])
def test_operations_are_registered_as_torch_demands(shape, dtype):
    qkv, dout = inputs(shape, dtype)
    out, lse = attention._forward(qkv)
    permuted = qkv.permute(2, 3, 0, 1, 4).contiguous().permute(2, 3, 0, 1, 4)
    for x in (qkv, permuted):
        OPCHECK(attention._forward, (x,))
        OPCHECK(attention._backward, (x, out, lse, dout))


@pytest.mark.parametrize("shape", [(2, 17, 2, 24), (1, 257, 1, 16)])
def test_compiles_into_one_graph(shape):
    qkv, dout = inputs(shape)

    def step(x):
        return packed_attention(2 * x, "triton").flatten(2)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = qkv.clone().requires_grad_()
        out = function(x)
        results.append((out.detach(), torch.autograd.grad(out, x, dout.flatten(2))[0]))
    assert all(map(torch.equal, *results))


def test_the_choice_is_a_constant_of_a_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    compiled = torch.compile(
        lambda x: x * dispatch.attention_limit(torch.device("cuda", 0), 64),
        fullgraph=True,
        backend="aot_eager",
    )
    assert compiled(torch.ones(1)).item() == 256


def test_recomputation_gives_the_same_gradient():
    qkv, dout = inputs()
    plain, again = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    (expected,) = torch.autograd.grad(packed_attention(plain, "triton"), plain, dout)
    out = checkpoint(lambda x: packed_attention(1 * x, "triton"), again, use_reentrant=False)
    assert isinstance(out, torch.Tensor)
    assert torch.equal(torch.autograd.grad(out, again, dout)[0], expected)


@pytest.mark.parametrize("impl", ["triton", "sdpa", "reference"])
def test_autocast_decides_the_dtype(impl):
    qkv, _ = inputs()
    qkv.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        out = packed_attention(qkv, impl)
        compiled = torch.compile(packed_attention, fullgraph=True, backend="aot_eager")(qkv, impl)
    (gradient,) = torch.autograd.grad(out.sum(), qkv)
    assert out.dtype == compiled.dtype == torch.float16
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(out.float(), reference.packed_attention(qkv), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [(0, 4, 3, 2, 8), (2, 0, 3, 2, 8), (2, 4, 3, 0, 8)])
@pytest.mark.parametrize("impl", ["triton", "sdpa", "reference"])
def test_nothing_gives_nothing(shape, impl):
    qkv = torch.zeros(shape, requires_grad=True)
    out = packed_attention(qkv, impl)
    assert out.shape == (*shape[:2], *shape[3:])
    assert torch.autograd.grad(out.sum(), qkv)[0].shape == shape


@pytest.mark.parametrize(
    ("qkv", "named"),
    [
        (torch.zeros(1, 4, 3, 2, 8, dtype=torch.float64), "torch.float64"),
        (torch.zeros(1, 4, 3, 2, 129), "of 129"),
        (torch.zeros(1, 4, 3, 2, 8, dtype=torch.int32), "torch.int32"),
        (torch.zeros(1, 4, 2, 2, 8), "(1, 4, 2, 2, 8)"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(qkv, named):
    with pytest.raises(ValueError, match=r"^packed_attention: ") as error:
        packed_attention(qkv, "triton")
    assert named in str(error.value)


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("tokens", "width", "dtype", "capability", "expected"),
    [
        (160, 64, torch.bfloat16, (9, 0), "triton"),
        (256, 64, torch.float16, (8, 0), "triton"),
        (256, 40, torch.float16, (9, 0), "triton"),
        (257, 64, torch.bfloat16, (9, 0), "sdpa"),
        (160, 80, torch.bfloat16, (9, 0), "sdpa"),
        (160, 88, torch.bfloat16, (8, 0), "sdpa"),
        (16, 128, torch.bfloat16, (9, 0), "sdpa"),
        (160, 64, torch.float32, (9, 0), "sdpa"),
        (160, 136, torch.bfloat16, (9, 0), "sdpa"),
        (160, 64, torch.bfloat16, (7, 5), "sdpa"),
        (160, 64, torch.bfloat16, (9, 1), "sdpa"),
    ],
)
def test_auto_takes_the_kernel_where_it_should_be_faster(
    tokens, width, dtype, capability, expected, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention.pick((2, tokens, 3, 4, width), dtype, "auto", torch.device("cuda")) == expected
    assert attention.pick((2, tokens, 3, 4, width), dtype, "auto", torch.device("cpu")) == "sdpa"


@pytest.mark.parametrize("shape", attention_shapes(), ids=lambda shape: shape.name)
def test_auto_takes_the_kernel_for_narrow_encoders_alone(shape, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    chosen = attention.pick(
        (32, shape.tokens, 3, shape.heads, shape.width),
        torch.bfloat16,
        "auto",
        torch.device("cuda"),
    )
    assert chosen == (
        "triton" if shape.name in ("encoder small", "encoder base", "encoder large") else "sdpa"
    )


def test_what_auto_will_run_is_told_for_each_width(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def told():
        return (
            dispatch.describe("auto", torch.device("cuda"))
            .split("packed_attention = ")[1]
            .split(", ")[0]
        )

    assert told() == "triton for 16-bit heads of width up to 64 and 256 tokens else sdpa"
    monkeypatch.setitem(dispatch.AUTO_MAX_TOKENS, ((9, 0), 96), 192)
    assert told() == (
        "triton for 16-bit heads of width up to 64 and 256 tokens else "
        "triton for 16-bit heads of width up to 96 and 192 tokens else sdpa"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert told() == "sdpa"


@pytest.mark.parametrize(
    ("width", "parts"),
    [
        (1, (16,)),
        (8, (16,)),
        (16, (16,)),
        (24, (32,)),
        (32, (32,)),
        (40, (32, 16)),
        (64, (64,)),
        (72, (64, 16)),
        (80, (64, 16)),
        (88, (64, 32)),
        (96, (64, 32)),
        (104, (128,)),
        (128, (128,)),
        (160, (128, 32)),
        (161, (128, 64)),
        (196, (256,)),
    ],
)
def test_widths_are_cut_into_two_powers_of_two_with_little_padding(width, parts):
    assert parts_of(width) == parts
