"""The reconstruction and joint losses on a GPU against the references in float64, by the two-sided
rule: no value is further off than twice what PyTorch's own arithmetic of that precision is, and the
error as a whole is small.
"""

import math
from typing import Any

import pytest
import torch

from video_mae.kernels import reconstruction, reference
from video_mae.kernels.joint import joint_loss
from video_mae.kernels.reconstruction import reconstruction_loss, reconstruction_loss_and_targets
from video_mae.kernels.scaling import scale_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPCHECK: Any = torch.library.opcheck
SHAPES = [
    ((2, 16, 16), (8, 14, 14), 3),
    ((2, 14, 14), (8, 16, 16), 3),
    ((1, 16, 16), (1, 14, 14), 3),
    ((2, 16, 16), (2, 3, 5), 1),
    ((3, 10, 6), (2, 3, 5), 5),
]
WAYS = ["channel", "tubelet", "none"]
RMSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}


def arguments(shape=SHAPES[0], dtype=torch.bfloat16, clip_dtype=torch.uint8, batch=3, count=37):
    tubelet, grid, channels = shape
    generator = torch.Generator("cuda").manual_seed(0)
    size = (batch, *(g * t for g, t in zip(grid, tubelet, strict=True)), channels)
    clip = torch.randint(0, 256, size, dtype=torch.uint8, device="cuda", generator=generator)
    if clip_dtype != torch.uint8:
        clip = (
            (clip.int() * 257).to(clip_dtype)
            if clip_dtype == torch.uint16
            else (clip / 255).to(clip_dtype)
        )
    index = torch.stack(
        [
            torch.randperm(math.prod(grid), device="cuda", generator=generator)[:count]
            for _ in range(batch)
        ]
    )
    values = math.prod(tubelet) * channels
    predicted = (
        torch.randn(batch, index.shape[1], values, device="cuda", generator=generator)
        .to(dtype)
        .requires_grad_()
    )
    return predicted, clip, index, tubelet


def check(ours, low, exact, dtype, rounds=1):
    """ours, low: of that precision; exact: float64; rounds: how many products and sums of that
    precision there are.
    """
    ours, low, exact = (x.double().flatten() for x in (ours, low, exact))
    noise = (
        (((exact.to(dtype) + 0.3) - 0.3).double() - exact).abs().max()
        if dtype != torch.float32
        else 1e-6 * exact.abs().max()
    )
    assert (ours - exact).abs().max() <= 2 * rounds * ((low - exact).abs().max() + noise)
    assert (ours - exact).square().mean().sqrt() <= rounds * RMSE[
        dtype
    ] * exact.square().mean().sqrt()


@pytest.mark.parametrize("dtype", list(RMSE))
@pytest.mark.parametrize("normalize", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_targets_and_gradient_are_those_of_the_reference(shape, normalize, dtype):
    predicted, clip, index, tubelet = arguments(shape, dtype)
    scale = predicted.numel()  # a loss scale that brings the gradient near 1
    loss, target = reconstruction_loss_and_targets(
        predicted, clip, index, tubelet, normalize, target_dtype=dtype
    )
    (gradient,) = torch.autograd.grad(scale * loss, predicted)
    low, _ = reference.reconstruction_loss(predicted, clip, index, tubelet, normalize)
    (low_gradient,) = torch.autograd.grad(scale * low, predicted)
    exact = predicted.detach().double().requires_grad_()
    expected, expected_target = reference.reconstruction_loss(
        exact, clip.double() / 255, index, tubelet, normalize
    )
    (expected_gradient,) = torch.autograd.grad(scale * expected, exact)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    check(target, expected_target.to(dtype), expected_target, dtype)
    check(gradient, low_gradient, expected_gradient, dtype)


@pytest.mark.parametrize("clip_dtype", [torch.uint16, torch.float16, torch.bfloat16, torch.float32])
def test_takes_clips_of_any_type(clip_dtype):
    predicted, clip, index, tubelet = arguments(clip_dtype=clip_dtype)
    exact = clip.double() / reference.pixel_range(clip.dtype)
    expected = reference.reconstruction_loss(predicted.double(), exact, index, tubelet, "channel")[
        0
    ]
    assert reconstruction_loss(predicted, clip, index, tubelet).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


@pytest.mark.parametrize("normalize", ["channel", "tubelet"])
@pytest.mark.parametrize("shape", SHAPES)
def test_flat_tubelets_give_exactly_zero(shape, normalize):
    predicted, clip, index, tubelet = arguments(shape)
    for value in (1, 127, 200, 255):
        loss, target = reconstruction_loss_and_targets(
            torch.zeros_like(predicted), clip.fill_(value), index, tubelet, normalize
        )
        assert loss == 0
        assert (target == 0).all()


@pytest.mark.parametrize("dtype", list(RMSE))
@pytest.mark.parametrize("memory", ["fast", "least"])
@pytest.mark.parametrize("negatives", ["clip", "batch"])
def test_joint_loss_and_gradients_are_those_of_the_references(negatives, memory, dtype):
    predicted, clip, index, tubelet = arguments(dtype=dtype)
    tau = torch.tensor(0.1, device="cuda", requires_grad=True)
    scale = predicted.numel()
    losses = joint_loss(
        predicted, clip, index, tubelet, "channel", tau, negatives, 0.5, memory=memory
    )
    gradient, tau_gradient = torch.autograd.grad(scale * losses[0], (predicted, tau))
    exact, exact_tau = (
        predicted.detach().double().requires_grad_(),
        tau.detach().double().requires_grad_(),
    )
    expected = joint_loss(
        exact,
        clip.double() / 255,
        index,
        tubelet,
        "channel",
        exact_tau,
        negatives,
        0.5,
        "reference",
    )
    expected_gradient, expected_tau = torch.autograd.grad(scale * expected[0], (exact, exact_tau))
    assert losses[1].item() == pytest.approx(expected[1].item(), rel=1e-5)
    assert losses[2].item() == pytest.approx(expected[2].item(), rel=RMSE[dtype])
    assert tau_gradient.item() == pytest.approx(expected_tau.item(), rel=10 * RMSE[dtype])
    check(gradient, expected_gradient.to(dtype), expected_gradient, dtype, rounds=3)


@pytest.mark.parametrize("normalize", WAYS)
def test_ten_repeats_are_equal_bit_for_bit_and_wait_for_nothing(normalize):
    given = arguments()

    def run():
        losses = [
            reconstruction_loss(*given, normalize),
            joint_loss(*given, normalize, 0.1, "clip", 0.5)[0],
        ]
        return [*losses, *(torch.autograd.grad(loss, given[0])[0] for loss in losses)]

    first = run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        repeats = [run() for _ in range(10)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) for again in repeats for x, y in zip(first, again, strict=True))


def test_a_graph_replays_with_changed_inputs():
    predicted, clip, index, tubelet = arguments()

    def run():
        given = predicted, clip, index, tubelet
        losses = [reconstruction_loss(*given), joint_loss(*given, "channel", 0.1, "clip", 0.5)[0]]
        return [*losses, *(torch.autograd.grad(loss, predicted)[0] for loss in losses)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    with torch.no_grad():
        predicted.mul_(0.5)
    clip.copy_(clip.flip(2))
    index.copy_(index.flip(1))
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(out, run(), strict=True))


def test_compiles_into_one_graph():
    predicted, clip, index, tubelet = arguments()

    def losses_of(predicted):
        return joint_loss(predicted, clip, index, tubelet, "channel", 0.1, "clip", 0.5)

    eager, compiled = losses_of(predicted), torch.compile(losses_of, fullgraph=True)(predicted)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(
        torch.autograd.grad(compiled[0], predicted)[0], torch.autograd.grad(eager[0], predicted)[0]
    )


def test_are_proper_torch_operations():
    predicted, clip, index, tubelet = arguments()
    for residual, target in ((torch.bfloat16, torch.bfloat16), (None, None)):
        OPCHECK(
            reconstruction.token_errors,
            (predicted.detach(), clip, index, tubelet, "channel", residual, target),
        )
    OPCHECK(
        scale_tokens,
        (predicted.detach(), torch.ones((), device="cuda").expand(3, 37), 0.5, torch.bfloat16),
    )


def test_an_index_outside_the_grid_makes_the_loss_nan():
    predicted, clip, index, tubelet = arguments()
    index[1, 2] = 10**12
    assert reconstruction_loss(predicted, clip, index, tubelet).isnan()


def test_predictions_of_more_than_two_billion_values():
    predicted, clip, index, tubelet = arguments(batch=1, count=1400)
    batch = 2**31 // predicted.numel() + 2
    many = torch.zeros(batch, *predicted.shape[1:], dtype=predicted.dtype, device="cuda")
    many[-1:] = predicted.detach()
    clips, indices = clip.expand(batch, -1, -1, -1, -1), index.expand(batch, -1)
    error, _, residual = reconstruction.token_errors(
        many, clips, indices, tubelet, "channel", torch.bfloat16, None
    )
    alone, _, residual_alone = reconstruction.token_errors(
        predicted.detach(), clip, index, tubelet, "channel", torch.bfloat16, None
    )
    assert torch.equal(error[-1:], alone)
    assert torch.equal(residual[-1:], residual_alone)
    scale = torch.full((), 3.0, device="cuda")
    scaled = scale_tokens(residual, scale.expand(error.shape), 0.5, torch.bfloat16)
    assert torch.equal(
        scaled[-1:],
        scale_tokens(residual_alone, scale.expand(alone.shape), 0.5, torch.bfloat16),
    )
