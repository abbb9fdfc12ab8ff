"""The reconstruction kernels in Triton's interpreter against the reference in float64, forward and
gradient.
"""

import math
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from video_mae.kernels import reconstruction, reference
from video_mae.kernels.reconstruction import reconstruction_loss, reconstruction_loss_and_targets
from video_mae.kernels.scaling import scale_tokens

pytestmark = pytest.mark.usefixtures("interpreted")

OPCHECK: Any = torch.library.opcheck
# (tubelet, grid, channels): odd sizes, patch 14, the default tubelet, one channel, many channels
SHAPES = [
    ((2, 4, 3), (2, 3, 5), 3),
    ((2, 14, 14), (1, 2, 2), 3),
    ((2, 16, 16), (1, 2, 1), 3),
    ((1, 5, 7), (3, 1, 2), 1),
    ((3, 2, 5), (1, 2, 2), 5),
]
WAYS = ["channel", "tubelet", "none"]
# Triton's interpreter cuts bfloat16 off instead of rounding, here twice
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def clip_of(tubelet, grid, channels, dtype=torch.uint8, batch=2):
    shape = (batch, *(g * t for g, t in zip(grid, tubelet, strict=True)), channels)
    clip = torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    if dtype == torch.uint8:
        return clip
    return (clip.int() * 257).to(dtype) if dtype == torch.uint16 else (clip / 255).to(dtype)


def arguments(shape=SHAPES[0], dtype=torch.float32, clip_dtype=torch.uint8, count=5):
    tubelet, grid, channels = shape
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(0, math.prod(grid), (2, count), generator=generator)
    predicted = (
        torch.randn(2, count, math.prod(tubelet) * channels, generator=generator)
        .to(dtype)
        .requires_grad_()
    )
    return predicted, clip_of(tubelet, grid, channels, clip_dtype), index, tubelet


def check(predicted, clip, index, tubelet, normalize, scale=1.0):
    loss, targets = reconstruction_loss_and_targets(
        predicted, clip, index, tubelet, normalize, "triton"
    )
    (gradient,) = torch.autograd.grad(scale * loss, predicted)
    exact_clip = clip.double() / reference.pixel_range(clip.dtype)
    exact = predicted.detach().double().requires_grad_()
    expected_loss, expected_targets = reference.reconstruction_loss(
        exact, exact_clip, index, tubelet, normalize
    )
    (expected,) = torch.autograd.grad(scale * expected_loss, exact)
    assert (loss.dtype, targets.dtype, gradient.dtype) == (
        torch.float32,
        torch.float32,
        predicted.dtype,
    )
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-6)
    torch.testing.assert_close(targets.double(), expected_targets.double(), rtol=1e-5, atol=1e-5)
    assert (gradient.double() - expected).abs().max() <= TOLERANCE[
        predicted.dtype
    ] * expected.abs().max()


@pytest.mark.parametrize("normalize", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_targets_and_gradient_are_those_of_the_reference(shape, normalize):
    check(*arguments(shape), normalize)


@pytest.mark.parametrize("normalize", WAYS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_takes_predictions_of_low_precision(dtype, normalize):
    check(*arguments(dtype=dtype), normalize)


@pytest.mark.parametrize("normalize", ["channel", "tubelet"])
@pytest.mark.parametrize("clip_dtype", [torch.uint16, torch.float16, torch.bfloat16, torch.float32])
def test_takes_clips_of_any_type(clip_dtype, normalize):
    check(*arguments(clip_dtype=clip_dtype), normalize)


@pytest.mark.parametrize("count", [1, 2, 29])
def test_any_number_of_masked_tokens(count):
    check(*arguments(count=count), "channel")


def test_float16_gradients_survive_under_a_loss_scale():
    # the unscaled ones would be subnormal
    predicted, clip, index, tubelet = arguments(SHAPES[2], torch.float16, count=64)
    check(predicted, clip, index, tubelet, "channel", scale=2.0**14)


@pytest.mark.parametrize("normalize", ["channel", "tubelet"])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.uint8, 77),
        (torch.uint8, 255),
        (torch.uint16, 65535),
        (torch.uint16, 12345),
        (torch.float32, 0.1),
        (torch.float16, 0.7),
    ],
)
def test_flat_tubelets_give_exactly_zero(dtype, value, normalize):
    predicted, clip, index, tubelet = arguments(SHAPES[1], clip_dtype=dtype)
    clip = torch.full(clip.shape, value, dtype=torch.float64).to(dtype)
    loss, targets = reconstruction_loss_and_targets(
        torch.zeros_like(predicted), clip, index, tubelet, normalize, "triton"
    )
    assert (targets == 0).all()
    assert loss == 0


def test_one_flat_channel_gives_zero_in_that_channel_alone():
    predicted, clip, index, tubelet = arguments()
    clip[..., 1] = 200
    targets = reconstruction_loss_and_targets(predicted, clip, index, tubelet, "channel", "triton")[
        1
    ].unflatten(2, (-1, 3))
    assert (targets[..., 1] == 0).all()
    assert (targets[..., 0] != 0).any()
    assert (targets[..., 2] != 0).any()


def test_a_faint_texture_on_white_keeps_its_digits():
    predicted, clip, index, tubelet = arguments(clip_dtype=torch.uint16)
    check(predicted, (65535 - clip.int() % 3).to(torch.uint16), index, tubelet, "channel")


@pytest.mark.parametrize("target_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_targets_come_in_the_dtype_wanted(target_dtype):
    given = arguments()
    ours, theirs = (
        reconstruction_loss_and_targets(*given, "channel", impl, target_dtype=target_dtype)[1]
        for impl in ("triton", "reference")
    )
    assert ours.dtype == theirs.dtype == target_dtype
    assert not ours.requires_grad
    torch.testing.assert_close(
        ours.float(),
        theirs.float(),
        rtol=2**-7 if target_dtype == torch.bfloat16 else 2**-10,
        atol=1e-5,
    )


def test_reads_nothing_beyond_prediction_and_clip_and_writes_every_value(monkeypatch):
    predicted, clip, index, tubelet = arguments(clip_dtype=torch.float32)

    def both(predicted, clip):
        loss, targets = reconstruction_loss_and_targets(
            predicted, clip, index, tubelet, "channel", "triton"
        )
        return loss, targets, torch.autograd.grad(loss, predicted)[0]

    expected = both(predicted, clip)
    b, t, h, w, c = clip.shape
    around_clip = torch.full((b, t + 2, h + 3, w, c), math.nan)
    around_clip[:, 1 : t + 1, 2 : h + 2] = clip
    around = torch.full((b, 7, 100), math.nan)
    around[:, 1:6, 20:92] = predicted.detach()
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    found = both(around[:, 1:6, 20:92].requires_grad_(), around_clip[:, 1 : t + 1, 2 : h + 2])
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_takes_predictions_and_incoming_gradients_of_any_strides():
    predicted, clip, index, tubelet = arguments()
    transposed = predicted.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    check(transposed, clip, index, tubelet, "channel")


@pytest.mark.filterwarnings("ignore:var_mean")
@pytest.mark.parametrize("size", [(0, 5), (2, 0)])
def test_nothing_masked_costs_nothing(size):
    _, clip, _, tubelet = arguments()
    predicted, index = (
        torch.zeros(*size, 72, requires_grad=True),
        torch.zeros(size, dtype=torch.int64),
    )
    for impl in ("triton", "reference"):
        loss, targets = reconstruction_loss_and_targets(
            predicted, clip[: size[0]], index, tubelet, "channel", impl
        )
        assert loss == 0
        assert targets.shape == predicted.shape
        assert torch.autograd.grad(loss, predicted)[0].shape == predicted.shape


def test_an_index_outside_the_grid_is_named_or_makes_the_loss_nan():
    predicted, clip, index, tubelet = arguments()
    index[0, 3] = 30
    with pytest.raises(
        ValueError, match=r"reconstruction_loss: index holds 30, the clip has tokens 0 to 29"
    ):
        reconstruction_loss(predicted, clip, index, tubelet, impl="triton")
    for normalize in WAYS:
        error, *tensors = reconstruction.token_errors(
            predicted.detach(), clip, index, tubelet, normalize, torch.float32, torch.float32
        )
        nan = torch.zeros(2, 5, dtype=torch.bool)
        nan[0, 3] = True
        assert torch.equal(error.isnan(), nan)
        assert all(torch.equal(x.isnan(), nan[..., None].expand_as(x)) for x in tensors)


def test_arguments_that_do_not_fit_are_named():
    predicted, clip, index, tubelet = arguments()
    with pytest.raises(ValueError, match=r"predicted_BMP is torch.int64"):
        reconstruction_loss(predicted.long(), clip, index, tubelet, impl="triton")
    with pytest.raises(ValueError, match=r"takes no torch.float64 with a clip of torch.uint8"):
        reconstruction_loss(predicted.double(), clip, index, tubelet, impl="triton")
    with pytest.raises(ValueError, match=r"normalize channel needs more than one value a channel"):
        reconstruction_loss(torch.zeros(2, 5, 3), clip, index, (1, 1, 1), impl="triton")


def test_forward_keeps_one_tensor_of_the_size_of_the_prediction_and_none_without_gradient():
    given = arguments(dtype=torch.float16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        reconstruction_loss_and_targets(*given, "channel", "triton")
        large = [x for x in saved if x.numel() > 10]
        assert [(x.shape, x.dtype) for x in large] == [(given[0].shape, torch.float16)]
        saved.clear()
        with torch.no_grad():
            reconstruction_loss(*given, "channel", "triton")
        assert not saved


def test_a_clip_gives_the_same_alone_and_again():
    predicted, clip, index, tubelet = arguments()
    first = reconstruction.token_errors(
        predicted.detach(), clip, index, tubelet, "channel", torch.float32, torch.float32
    )
    alone = reconstruction.token_errors(
        predicted.detach()[1:],
        clip[1:],
        index[1:],
        tubelet,
        "channel",
        torch.float32,
        torch.float32,
    )
    assert all(torch.equal(x[1:], y) for x, y in zip(first, alone, strict=True))
    losses = [
        reconstruction_loss(predicted, clip, index, tubelet, "channel", "triton") for _ in range(3)
    ]
    assert all(torch.equal(losses[0], loss) for loss in losses)


def test_compiling_and_checkpointing_change_nothing():
    predicted, clip, index, tubelet = arguments(dtype=torch.float16)

    def loss_of(predicted):
        return reconstruction_loss_and_targets(
            predicted, clip, index, tubelet, "channel", "triton"
        )[0]

    expected = loss_of(predicted)
    (gradient,) = torch.autograd.grad(expected, predicted)
    for other in (
        torch.compile(loss_of, fullgraph=True, backend="aot_eager"),
        lambda x: checkpoint(loss_of, x, use_reentrant=False),
    ):
        loss = other(predicted)
        assert torch.equal(loss, expected)
        assert torch.equal(torch.autograd.grad(loss, predicted)[0], gradient)


def test_autocast_changes_nothing():
    given = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        loss = reconstruction_loss(*given, "channel", "triton")
    assert torch.equal(loss, reconstruction_loss(*given, "channel", "triton"))


def test_is_a_proper_torch_operation():
    predicted, clip, index, tubelet = arguments()
    for residual, target in ((torch.float32, torch.bfloat16), (None, None), (torch.float16, None)):
        OPCHECK(
            reconstruction.token_errors,
            (predicted.detach(), clip, index, tubelet, "channel", residual, target),
        )
    transposed = predicted.detach().transpose(1, 2).contiguous().transpose(1, 2)
    OPCHECK(
        reconstruction.token_errors, (transposed, clip, index, tubelet, "none", torch.float32, None)
    )
    OPCHECK(scale_tokens, (transposed, torch.ones(()).expand(2, 5), 0.5, torch.float16))


def test_reference_gradient():
    predicted, clip, index, tubelet = arguments(count=2)
    predicted = predicted.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: reconstruction_loss(
            x, clip.double() / 255, index, tubelet, "channel", "reference"
        ),
        predicted,
    )


def poisoned(empty):
    """torch.empty whose floating point memory is NaN."""

    def nan(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(math.nan) if out.is_floating_point() else out

    return nan
