"""Both losses in one operation, in Triton's interpreter against the sum of the references in
float64.
"""

import math
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from video_mae.config import ObjectiveConfig
from video_mae.kernels import contrastive_streaming, joint
from video_mae.kernels.joint import joint_loss
from video_mae.kernels.reconstruction import reconstruction_loss
from video_mae.model.objective import Objective

pytestmark = pytest.mark.usefixtures("interpreted")

OPCHECK: Any = torch.library.opcheck
TUBELET, GRID = (2, 4, 3), (2, 3, 5)
# of the largest gradient; bfloat16 is cut off thrice
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-8, torch.bfloat16: 2**-5}


def arguments(dtype=torch.float32, count=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, *(g * t for g, t in zip(GRID, TUBELET, strict=True)), 3)
    clip = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    clip[1, :, 4:] = 99  # two thirds of the second clip are flat
    index = torch.stack(
        [torch.randperm(math.prod(GRID), generator=generator)[:count] for _ in range(2)]
    )
    predicted = torch.randn(2, count, 72, generator=generator).to(dtype).requires_grad_()
    return predicted, clip, index, TUBELET


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory", ["fast", "least"])
@pytest.mark.parametrize("negatives", ["clip", "batch"])
@pytest.mark.parametrize(
    ("normalize", "temperature"), [("channel", 0.1), ("tubelet", 1.0), ("none", 0.05)]
)
def test_losses_and_gradients_are_those_of_the_references(
    normalize, temperature, negatives, memory, dtype
):
    predicted, clip, index, tubelet = arguments(dtype)
    tau = torch.tensor([temperature], requires_grad=True)
    losses = joint_loss(
        predicted, clip, index, tubelet, normalize, tau, negatives, 0.7, "triton", memory
    )
    gradient, tau_gradient = torch.autograd.grad(1000 * losses[0], (predicted, tau))
    exact, exact_tau = (
        predicted.detach().double().requires_grad_(),
        tau.detach().double().requires_grad_(),
    )
    expected = joint_loss(
        exact, clip, index, tubelet, normalize, exact_tau[0], negatives, 0.7, "reference"
    )
    expected_gradient, expected_tau = torch.autograd.grad(1000 * expected[0], (exact, exact_tau))
    # the products are of this precision
    loose = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert [x.item() for x in losses] == pytest.approx([x.item() for x in expected], rel=loose)
    assert losses[1].item() == pytest.approx(expected[1].item(), rel=2e-6)
    assert gradient.dtype == dtype
    assert (gradient.double() - expected_gradient).abs().max() <= TOLERANCE[
        dtype
    ] * expected_gradient.abs().max()
    assert tau_gradient.shape == tau.shape
    assert tau_gradient.item() == pytest.approx(expected_tau.item(), rel=20 * loose, abs=loose)


@pytest.mark.parametrize(
    ("impl", "memory"), [("triton", "fast"), ("triton", "least"), ("reference", "fast")]
)
def test_a_batch_is_the_mean_of_its_clips_however_flat_they_are(impl, memory):
    predicted, clip, index, tubelet = arguments()
    clip[:, :, 8:] = 0
    # about a third of the first is flat, two thirds of the second, the third
    clip = torch.cat([clip, torch.zeros_like(clip[:1])])
    index, predicted = index[[0, 1, 0]], predicted.detach()[[0, 1, 0]].requires_grad_()
    tau = torch.tensor(0.2, requires_grad=True)
    alone = [
        joint_loss(
            predicted[b : b + 1],
            clip[b : b + 1],
            index[b : b + 1],
            tubelet,
            "channel",
            tau,
            "clip",
            0.7,
            impl,
            memory,
        )
        for b in range(3)
    ]
    together = joint_loss(
        predicted, clip, index, tubelet, "channel", tau, "clip", 0.7, impl, memory
    )
    means = [torch.stack(parts).mean() for parts in zip(*alone, strict=True)]
    torch.testing.assert_close(together, tuple(means))
    for ours, expected in zip(
        *(torch.autograd.grad(losses[0], (predicted, tau)) for losses in (together, means)),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
    assert alone[2][2] == 0
    assert alone[1][2] > 0


def test_only_the_sum_has_a_gradient_and_it_is_the_sum():
    for losses in (
        joint_loss(*arguments(), "channel", 0.1, "clip", 0.3, "triton", "fast"),
        joint_loss(*arguments(), "channel", 0.1, "clip", 0.3, "triton", "least"),
        joint_loss(*arguments(), "channel", 0.1, "clip", 0.3, "reference"),
    ):
        assert [x.requires_grad for x in losses] == [True, False, False]
        torch.testing.assert_close(losses[0].detach(), losses[1] + 0.3 * losses[2])


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_weight_zero_is_the_reconstruction_alone(impl):
    given = arguments()
    loss, reconstruction, contrastive = joint_loss(*given, "channel", 0.1, "clip", 0.0, impl)
    expected = reconstruction_loss(*given, "channel", impl)
    assert torch.equal(loss, expected)
    assert torch.equal(reconstruction, expected)
    assert contrastive == 0
    assert torch.equal(
        torch.autograd.grad(loss, given[0])[0], torch.autograd.grad(expected, given[0])[0]
    )


def test_forward_keeps_one_tensor_of_the_size_of_the_prediction():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        joint_loss(*arguments(torch.bfloat16), "channel", 0.1, "clip", 0.3, "triton")
    assert [(x.shape, x.dtype) for x in saved if x.numel() > 1] == [((2, 7, 72), torch.bfloat16)]


def test_float16_gradients_of_short_predictions_do_not_overflow():
    predicted, clip, index, tubelet = arguments(torch.float16)
    predicted = (1e-3 * predicted.detach()).requires_grad_()
    loss = joint_loss(predicted, clip, index, tubelet, "channel", 0.01, "clip", 10.0, "triton")[0]
    assert torch.autograd.grad(loss, predicted)[0].isfinite().all()


def test_without_gradient_the_losses_are_the_same():
    given = arguments()
    with torch.no_grad():
        losses = joint_loss(*given, "channel", 0.1, "clip", 0.3, "triton")
    torch.testing.assert_close(
        losses, tuple(x.detach() for x in joint_loss(*given, "channel", 0.1, "clip", 0.3, "triton"))
    )


def test_a_frozen_prediction_still_teaches_the_temperature():
    predicted, clip, index, tubelet = arguments()
    gradients = []
    for given in (predicted, predicted.detach()):
        tau = torch.tensor(0.2, requires_grad=True)
        gradients.append(
            torch.autograd.grad(
                joint_loss(given, clip, index, tubelet, "channel", tau, "clip", 0.3, "triton")[0],
                tau,
            )[0]
        )
    assert torch.equal(*gradients)


@pytest.mark.filterwarnings("ignore:var_mean")
@pytest.mark.parametrize("size", [(0, 5), (2, 0)])
@pytest.mark.parametrize(
    ("impl", "memory"), [("triton", "fast"), ("triton", "least"), ("reference", "fast")]
)
def test_nothing_masked_costs_nothing(size, impl, memory):
    _, clip, _, tubelet = arguments()
    predicted, index = (
        torch.zeros(*size, 72, requires_grad=True),
        torch.zeros(size, dtype=torch.int64),
    )
    losses = joint_loss(
        predicted, clip[: size[0]], index, tubelet, "channel", 0.1, "clip", 0.3, impl, memory
    )
    assert [x.item() for x in losses] == [0, 0, 0]
    assert torch.autograd.grad(losses[0], predicted)[0].shape == predicted.shape


@pytest.mark.parametrize("memory", ["fast", "least"])
def test_compiling_checkpointing_and_repeating_change_nothing(memory):
    predicted, clip, index, tubelet = arguments()
    tau = torch.tensor(0.2, requires_grad=True)

    def losses_of(predicted, tau):
        return joint_loss(
            predicted, clip, index, tubelet, "channel", tau, "clip", 0.3, "triton", memory
        )

    expected = losses_of(predicted, tau)
    gradients = torch.autograd.grad(expected[0], (predicted, tau))
    for other in (
        losses_of,
        torch.compile(losses_of, fullgraph=True, backend="aot_eager"),
        lambda x, t: checkpoint(losses_of, x, t, use_reentrant=False),
    ):
        losses = other(predicted, tau)
        assert all(torch.equal(x, y) for x, y in zip(losses, expected, strict=True))
        assert all(
            torch.equal(x, y)
            for x, y in zip(
                torch.autograd.grad(losses[0], (predicted, tau)), gradients, strict=True
            )
        )


@pytest.mark.parametrize(("memory", "streams"), [("fast", 0), ("least", 1)])
def test_the_configuration_chooses_how_the_contrastive_loss_is_computed(
    memory, streams, monkeypatch
):
    calls, forward = [], contrastive_streaming.forward
    monkeypatch.setattr(
        contrastive_streaming, "forward", lambda *given: calls.append(given) or forward(*given)
    )
    predicted, clip, index, tubelet = arguments()
    objective = Objective(
        ObjectiveConfig(contrastive_weight=0.3, contrastive_memory=memory), tubelet, "triton"
    )
    losses = objective(predicted, clip, index)
    expected = joint_loss(predicted, clip, index, tubelet, "channel", 0.1, "clip", 0.3, "reference")
    assert [x.item() for x in losses] == pytest.approx([x.item() for x in expected], rel=1e-5)
    assert len(calls) == streams


def test_is_a_proper_torch_operation():
    predicted, clip, index, tubelet = arguments()
    for dtype, with_gradient in (
        (torch.float32, True),
        (torch.float16, True),
        (torch.float32, False),
    ):
        given = predicted.detach().to(dtype)
        OPCHECK(
            joint._joint_op,
            (
                given,
                torch.tensor([0.1]),
                clip,
                index,
                tubelet,
                "channel",
                "batch",
                0.5,
                with_gradient,
            ),
        )


def test_arguments_that_do_not_fit_are_named():
    predicted, clip, index, tubelet = arguments()
    with pytest.raises(ValueError, match=r"joint_loss: negatives rank is not one of clip, batch"):
        joint_loss(predicted, clip, index, tubelet, "channel", 0.1, "rank", 0.3, "triton")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"joint_loss: memory little is not one of fast, least"):
        joint_loss(predicted, clip, index, tubelet, "channel", 0.1, "clip", 0.3, "triton", "little")  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ValueError, match=r"joint_loss: predicted_BMP has shape \(2, 6, 72\), not \(2, 7, 72\)"
    ):
        joint_loss(predicted[:, 1:], clip, index, tubelet, "channel", 0.1, "clip", 0.3, "triton")
    with pytest.raises(ValueError, match=r"joint_loss: temperature has shape \(2,\)"):
        joint_loss(predicted, clip, index, tubelet, "channel", torch.ones(2), "clip", 0.3, "triton")
    index[0, 0] = -1
    with pytest.raises(
        ValueError, match=r"joint_loss: index holds -1, the clip has tokens 0 to 29"
    ):
        joint_loss(predicted, clip, index, tubelet, "channel", 0.1, "clip", 0.3, "triton")


def test_reference_gradients():
    predicted, clip, index, tubelet = arguments(torch.float64, count=2)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, t: joint_loss(
            x, clip.double() / 255, index, tubelet, "channel", t, "clip", 0.3, "reference"
        )[0],
        (predicted, tau),
    )
