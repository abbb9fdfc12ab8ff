"""The contrastive kernels in Triton's interpreter against the reference in float64: value, and
gradients of predictions and tau.

Letters: B clips, M predicted tubelets, P values of a tubelet.
"""

import math
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from video_mae.kernels import contrastive_chunked as chunked
from video_mae.kernels import contrastive_streaming as streaming
from video_mae.kernels import reference
from video_mae.kernels.contrastive import contrastive_forward, contrastive_loss

pytestmark = pytest.mark.usefixtures("interpreted")

OPCHECK: Any = torch.library.opcheck
WAYS = ["fast", "least"]
# Of the largest gradient. Triton's interpreter cuts bfloat16 off instead of rounding, the softmax
# weights and again the gradient.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-5}


def clips(
    B: int, M: int, P: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions that resemble their targets; where there are enough, also empty and very short
    ones, and a flat target.
    """
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(B, M, P, generator=generator)
    predicted = 0.7 * target + torch.randn(B, M, P, generator=generator)
    if M > 3:
        predicted[0, 0], target[-1, 1], target[0, -1] = 0, 0, 0
        predicted[-1, 2] *= 1e-5
    return predicted.to(dtype).requires_grad_(), target.to(dtype)


def loss_and_gradients(function, predicted, target, temperature, dtype, *options):
    """(loss, 5 * d loss / d predicted, 5 * d loss / d tau) in double precision, of a function that
    sees `dtype`.
    """
    given, compute = (
        predicted.detach().to(dtype).requires_grad_(),
        torch.promote_types(dtype, torch.float32),
    )
    tau = torch.tensor(temperature).to(compute).requires_grad_()
    loss = function(given, target.to(dtype), tau, *options)
    assert loss.dtype == compute
    gradients = torch.autograd.grad(5 * loss, (given, tau))
    assert gradients[0].dtype == dtype
    return [x.double() for x in (loss.detach(), *gradients)]


def check(predicted, target, temperature, negatives, **options):
    """No further from float64 than twice what PyTorch's float32 is, and the rounding of the
    products and of the result.
    """

    def ours(predicted, target, tau, negatives):
        return contrastive_loss(predicted, target, tau, negatives, "triton", **options)

    loss, gradient, of_tau = loss_and_gradients(
        ours, predicted, target, temperature, predicted.dtype, negatives
    )
    low = loss_and_gradients(
        reference.contrastive_loss, predicted, target, temperature, torch.float32, negatives
    )
    exact = loss_and_gradients(
        reference.contrastive_loss, predicted, target, temperature, torch.float64, negatives
    )
    off = (gradient - exact[1]).abs().amax(-1)
    allowed = 2 * (low[1] - exact[1]).abs().amax(-1)
    assert loss.item() == pytest.approx(exact[0].item(), rel=1e-5, abs=1e-6)
    assert (
        off
        <= allowed
        + TOLERANCE[predicted.dtype] * exact[1].abs().amax(-1)
        + 1e-7 * exact[1].abs().max()
        + 1e-9
    ).all()
    assert of_tau.item() == pytest.approx(exact[2].item(), rel=2e-5, abs=1e-4)


@pytest.mark.parametrize("memory", WAYS)
@pytest.mark.parametrize(
    ("negatives", "temperature"), [("clip", 0.1), ("batch", 0.3), ("batch", 0.01)]
)
@pytest.mark.parametrize(
    "shape", [(1, 1, 5), (3, 1, 7), (2, 2, 24), (3, 7, 17), (2, 15, 36), (1, 127, 16)]
)
def test_loss_and_gradients_are_those_of_the_reference(shape, negatives, temperature, memory):
    check(*clips(*shape), temperature, negatives, memory=memory)


@pytest.mark.parametrize("memory", WAYS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_loses_no_more_than_its_rounding(dtype, memory):
    check(*clips(2, 15, 40, dtype), 0.07, "clip", memory=memory)


@pytest.mark.parametrize("memory", WAYS)
def test_more_rows_and_values_than_a_block_holds(memory):
    check(*clips(1, 67, 270), 0.1, "clip", memory=memory)


@pytest.mark.parametrize("programs", [1, 12, 1024])  # whole rows, uneven splits, a split a tile
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_streaming_joins_any_number_of_tiles_and_splits(dtype, programs, monkeypatch):
    monkeypatch.setitem(streaming.FORWARD_TILES, dtype.itemsize, (16, 16, 16, 4, 1))
    monkeypatch.setitem(streaming.BACKWARD_TILES, dtype.itemsize, (32, 16, 16, 16, 4, 1))
    monkeypatch.setattr(streaming, "ENOUGH_PROGRAMS", programs)
    check(*clips(2, 37, 21, dtype), 0.05, "clip", memory="least")


# a row, parts of a clip, one clip, all clips at once
@pytest.mark.parametrize("scratch_bytes", [1, 2000, 3100, 4000, 10**6])
def test_fast_result_does_not_depend_on_the_chunks(scratch_bytes, monkeypatch):
    monkeypatch.setattr(chunked, "SOFTMAX_BLOCKS", {False: (8, 4)})
    check(*clips(3, 11, 60), 0.1, "clip", scratch_bytes=scratch_bytes)


def test_chunks_cover_every_row_once_and_fit():
    for B, M, bytes_per_row, scratch in (
        (1, 1, 8, 1),
        (5, 7, 10, 300),
        (32, 1408, 8960, 32 << 20),
        (1, 45056, 270336, 32 << 20),
        (7, 100, 4, 950),
    ):
        num_clips, num_rows = chunked.chunk_size(B, M, bytes_per_row, scratch)
        assert num_clips * num_rows * bytes_per_row <= max(scratch, bytes_per_row)
        assert num_rows == M or num_clips == 1
        seen = torch.zeros(B, M)
        for clip in range(0, B, num_clips):
            for row in range(0, M, num_rows):
                seen[clip : clip + num_clips, row : row + num_rows] += 1
        assert (seen == 1).all()


@pytest.mark.parametrize(
    ("options", "limit"), [({"scratch_bytes": 3000}, 3000), ({"memory": "least"}, 3 * 4 * 48)]
)
def test_no_scratch_is_larger_than_its_bound(options, limit, monkeypatch):
    sizes, empty = [], torch.empty

    def counting(*args, **kwargs):
        made = empty(*args, **kwargs)
        sizes.append(made.numel() * made.element_size())
        return made

    predicted, target = clips(2, 24, 10)
    monkeypatch.setattr(torch, "empty", counting)
    contrastive_loss(predicted, target, 0.1, "batch", "triton", **options).backward()
    assert sizes
    assert max(sizes) <= limit < 4 * 48 * 48


@pytest.mark.parametrize("negatives", ["clip", "batch"])
def test_both_ways_agree(negatives):
    predicted, target = clips(2, 9, 30)
    for tau in (1.0, 0.01):
        fast, least = (
            loss_and_gradients(
                contrastive_loss, predicted, target, tau, torch.float32, negatives, "triton", memory
            )
            for memory in WAYS
        )
        for a, b in zip(fast, least, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("memory", WAYS)
def test_flat_targets_are_no_term_and_predictions_of_zero_no_trouble(memory):
    predicted, target = clips(2, 6, 12)
    check(predicted, target * torch.tensor([1, 0, 0, 1, 1, 0])[:, None], 0.1, "clip", memory=memory)
    check((0 * predicted.detach()).requires_grad_(), target, 0.01, "clip", memory=memory)
    loss = contrastive_loss(predicted, 0 * target, 0.1, "clip", "triton", memory)
    assert loss == 0
    assert (torch.autograd.grad(loss, predicted)[0] == 0).all()


@pytest.mark.parametrize("memory", WAYS)
def test_one_tubelet_has_no_rival_and_no_loss(memory):
    predicted, target = clips(3, 1, 8)
    loss = contrastive_loss(predicted, target, 0.1, "clip", "triton", memory)
    assert loss == 0
    assert torch.autograd.grad(loss, predicted)[0].abs().max() < 1e-6


@pytest.mark.parametrize("memory", WAYS)
def test_coldest_temperature_does_not_overflow_even_in_float16(memory):
    predicted, target = clips(1, 12, 16, torch.float16)
    # of zeros and subnormals: the gradient is at its largest
    short = (predicted.detach() * 2e-5).requires_grad_()
    for given, expected in (
        (short, target),
        ((50 * target).requires_grad_(), target),
        ((-50 * target).requires_grad_(), target),
    ):
        loss = contrastive_loss(given, expected, 0.01, "clip", "triton", memory)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, given)[0].isfinite().all()


# of the empty prediction's gradient, times the loss scale
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("memory", WAYS)
def test_float16_gradients_survive_until_the_loss_scale_is_known(memory):
    predicted, target = clips(4, 10, 300, torch.float16)
    loss = contrastive_loss(predicted, target, 0.1, "batch", "triton", memory)
    exact = predicted.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(
        reference.contrastive_loss(exact, target.double(), 0.1, "batch"), exact
    )
    (gradient,) = torch.autograd.grad(2.0**14 * loss, predicted)
    typical = (expected[0, 1] * 2.0**14).abs().median()
    assert (gradient[0, 1].double() - 2.0**14 * expected[0, 1]).abs().median() < 2**-10 * typical


@pytest.mark.parametrize("memory", WAYS)
def test_nothing_outside_of_the_arguments_is_read_and_everything_inside_of_the_results_written(
    memory, monkeypatch
):
    surrounded, empty = [], torch.empty
    for x in clips(2, 5, 19):
        room = torch.full((x.numel() + 2000,), math.nan)
        room[1000:-1000] = x.detach().flatten()
        surrounded.append(room[1000:-1000].view(x.shape))
    monkeypatch.setattr(
        torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(math.nan)
    )
    monkeypatch.setattr(
        torch, "empty_like", lambda x: empty(x.shape, dtype=x.dtype).fill_(math.nan)
    )
    check(surrounded[0].requires_grad_(), surrounded[1], 0.1, "clip", memory=memory)


@pytest.mark.parametrize("memory", WAYS)
def test_takes_views_and_targets_of_another_precision(memory):
    predicted, target = clips(2, 6, 14)
    expected = contrastive_loss(
        predicted, target.bfloat16().float(), 0.1, "batch", "triton", memory
    )
    strided = predicted.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    loss = contrastive_loss(strided, target.bfloat16(), 0.1, "batch", "triton", memory)
    assert torch.equal(loss, expected)
    assert torch.equal(
        torch.autograd.grad(loss, strided)[0], torch.autograd.grad(expected, predicted)[0]
    )


def unevenly_flat(dtype: torch.dtype, B: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """A full clip (but for one target), a mostly flat and a wholly flat one."""
    predicted, target = (x.detach()[:B] for x in clips(3, 8, 20, dtype))
    target[1, 2:], target[2:] = 0, 0
    return predicted.requires_grad_(), target


@pytest.mark.parametrize("way", [{"memory": "least"}, {"memory": "fast"}, {"scratch_bytes": 300}])
@pytest.mark.parametrize("negatives", ["clip", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unevenly_flat_clips_have_the_loss_and_gradients_of_the_reference(dtype, negatives, way):
    check(*unevenly_flat(dtype), 0.1, negatives, **way)


@pytest.mark.parametrize("memory", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("B", [2, 3])
def test_a_batch_is_the_mean_of_its_clips_however_flat_they_are(B, dtype, memory):
    predicted, target = unevenly_flat(dtype, B)
    tau = torch.tensor(0.1, requires_grad=True)
    alone = [
        contrastive_loss(predicted[b : b + 1], target[b : b + 1], tau, "clip", "triton", memory)
        for b in range(B)
    ]
    together = contrastive_loss(predicted, target, tau, "clip", "triton", memory)
    mean = torch.stack(alone).mean()
    torch.testing.assert_close(together, mean)
    rtol, atol = (2**-9, 1e-6) if dtype == torch.float16 else (1e-5, 1e-7)  # both are rounded
    for ours, expected in zip(
        *(torch.autograd.grad(loss, (predicted, tau)) for loss in (together, mean)), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)
        assert (expected != 0).any()


@pytest.mark.parametrize("memory", WAYS)
def test_compiling_checkpointing_autocast_and_repeating_change_nothing(memory):
    predicted, target = clips(2, 5, 12)
    tau = torch.tensor([0.2], requires_grad=True)

    def loss_of(x, t):
        return contrastive_loss(x, target, t[0], "batch", "triton", memory)

    expected = loss_of(predicted, tau)
    gradients = torch.autograd.grad(expected, (predicted, tau), retain_graph=True)
    for other in (
        loss_of,
        torch.compile(loss_of, fullgraph=True, backend="aot_eager"),
        lambda x, t: checkpoint(loss_of, x, t, use_reentrant=False),
        torch.autocast("cpu", torch.bfloat16)(loss_of),
    ):
        loss = other(predicted, tau)
        assert torch.equal(loss, expected)
        assert all(
            torch.equal(a, b)
            for a, b in zip(torch.autograd.grad(loss, (predicted, tau)), gradients, strict=True)
        )
    again = torch.autograd.grad(expected, (predicted, tau))
    assert all(torch.equal(a, b) for a, b in zip(again, gradients, strict=True))


@pytest.mark.parametrize("memory", WAYS)
def test_only_what_is_wanted_gets_a_gradient(memory):
    predicted, target = clips(1, 6, 9)
    tau = torch.tensor(0.2, requires_grad=True)
    both = torch.autograd.grad(
        contrastive_loss(predicted, target, tau, "clip", "triton", memory), (predicted, tau)
    )
    (of_tau,) = torch.autograd.grad(
        contrastive_loss(predicted.detach(), target, tau, "clip", "triton", memory), tau
    )
    (of_predicted,) = torch.autograd.grad(
        contrastive_loss(predicted, target, 0.2, "clip", "triton", memory), predicted
    )
    assert torch.equal(of_tau, both[1])
    assert torch.equal(of_predicted, both[0])
    with torch.no_grad():
        assert not contrastive_loss(predicted, target, tau, "clip", "triton", memory).requires_grad


@pytest.mark.parametrize("negatives", ["clip", "batch"])
@pytest.mark.parametrize("buffer", [torch.float32, torch.float16])
def test_forward_adds_a_scaled_gradient_to_what_is_there(buffer, negatives, monkeypatch):
    monkeypatch.setattr(chunked, "SCRATCH_BYTES", 1500)
    predicted, target = clips(2, 7, 18)
    target[0, 2:5] = 0  # the clips differ in their number of terms
    tau = torch.tensor(0.3, requires_grad=True)
    loss = contrastive_loss(predicted, target, tau, negatives, "triton")
    gradient, of_tau = torch.autograd.grad(loss, (predicted, tau))
    there = torch.randn(predicted.shape, generator=torch.Generator().manual_seed(3)).to(buffer)
    expected = (there + 7 * gradient).to(buffer)
    ours = contrastive_forward(predicted, target, tau.detach().reshape(1), negatives, there, 7.0)
    torch.testing.assert_close(ours[0], loss.detach())
    torch.testing.assert_close(ours[1], of_tau.reshape(1))
    torch.testing.assert_close(
        there, expected, rtol=2**-9 if buffer == torch.float16 else 1e-5, atol=1e-5
    )
    before = there.clone()
    contrastive_forward(predicted, target, tau.detach().reshape(1), negatives, there, 0.0)
    assert torch.equal(there, before)
    without = contrastive_forward(predicted, target, tau.detach().reshape(1), negatives, None, 7.0)
    torch.testing.assert_close(without, (loss.detach(), of_tau.reshape(1)))


def test_are_proper_torch_operations():
    predicted, target = (x.detach().half() for x in clips(2, 4, 9))
    tau, weight = torch.tensor([0.1]), torch.tensor([0.3, 0.4])  # a weight a clip
    for with_gradient in (True, False):
        OPCHECK(chunked.forward, (predicted, target, tau, with_gradient, 200))
    OPCHECK(streaming.forward, (predicted, target, tau))
    _, _, _, *rows = streaming.forward(predicted, target, tau)
    OPCHECK(streaming.backward, (predicted, target, tau, weight, *rows))


@pytest.mark.parametrize("memory", WAYS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_predicted_costs_nothing(shape, memory):
    predicted = torch.zeros(shape, requires_grad=True)
    loss = contrastive_loss(predicted, torch.zeros(shape), 0.1, "batch", "triton", memory)
    assert loss == 0
    assert torch.autograd.grad(loss, predicted)[0].shape == shape


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"predicted_BMP": torch.zeros(2, 3, 4, dtype=torch.float64)},
            r"bfloat16, float16 or float32, not predicted_BMP of torch.float64",
        ),
        (
            {"target_BMP": torch.zeros(2, 3, 4, dtype=torch.int64)},
            r"target_BMP of torch.int64; use impl reference",
        ),
        (
            {"target_BMP": torch.zeros(2, 3, 4, device="meta")},
            r"predicted_BMP is on cpu, target_BMP on meta",
        ),
        ({"temperature": torch.ones(2)}, r"temperature has shape \(2,\), not one value"),
        ({"memory": "most"}, r"memory most is not one of fast, least"),
    ],
)
def test_argument_that_does_not_fit_is_named(change, named):
    arguments: dict[str, Any] = {
        "predicted_BMP": torch.zeros(2, 3, 4),
        "target_BMP": torch.zeros(2, 3, 4),
        "temperature": 0.1,
    }
    with pytest.raises(ValueError, match=rf"^contrastive_loss: .*{named}"):
        contrastive_loss(**{**arguments, **change}, impl="triton")


def test_reference_gradients():
    predicted, target = (x.detach().double() for x in clips(2, 3, 4))
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, t: reference.contrastive_loss(x, target, t, "batch"),
        (predicted.requires_grad_(), tau),
    )


def test_reference_products_are_float32_under_autocast():
    predicted, target = clips(2, 5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        inside = reference.contrastive_loss(predicted, target, 0.1, "clip")
    assert torch.equal(inside, reference.contrastive_loss(predicted, target, 0.1, "clip"))
