"""The contrastive kernels on a GPU against the reference in float64, by the two-sided rule of
tests/norms.py.

Letters: B clips, M predicted tubelets, P values of a tubelet.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from video_mae.kernels import contrastive_chunked as chunked
from video_mae.kernels import contrastive_streaming as streaming
from video_mae.kernels import reference
from video_mae.kernels.contrastive import contrastive_forward, contrastive_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPCHECK: Any = torch.library.opcheck
norms = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "norms.py")))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WAYS = ["fast", "least"]
SHAPES = [
    (1, 1, 24),
    (3, 2, 1176),
    (5, 15, 37),
    (2, 127, 1536),
    (3, 147, 768),
    (2, 1408, 1536),
    (1, 1840, 1176),
]


def clips(
    B: int, M: int, P: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions that resemble their targets; where there are enough, also an empty one and flat
    targets in the last clip.
    """
    generator = torch.Generator("cuda").manual_seed(seed)
    target = torch.randn(B, M, P, device="cuda", generator=generator)
    predicted = 0.3 * target + torch.randn(B, M, P, device="cuda", generator=generator)
    if M > 3:
        predicted[0, 0], target[-1, 1 : 1 + M // 3] = 0, 0
    return predicted.to(dtype).requires_grad_(), target.to(dtype)


def low_loss(predicted, target, temperature, negatives):
    """The loss as PyTorch computes it in the precision of its arguments, but for the sums of the
    softmax.
    """
    if negatives == "batch":
        predicted, target = predicted.flatten(0, 1)[None], target.flatten(0, 1)[None]
    has_direction = target.any(-1)
    predicted, target = (
        F.normalize(x, dim=-1, eps=reference.NORM_FLOOR) for x in (predicted, target)
    )
    logits = ((predicted @ target.transpose(1, 2)) / temperature.to(predicted.dtype)).float()
    loss = logits.logsumexp(-1) - logits.diagonal(dim1=1, dim2=2)
    return (torch.where(has_direction, loss, 0).sum(1) / has_direction.sum(1).clamp(min=1)).mean()


def with_gradients(function: Any, predicted, target, temperature, dtype, *options):
    given, compute = (
        predicted.detach().to(dtype).requires_grad_(),
        torch.promote_types(dtype, torch.float32),
    )
    tau = torch.tensor(temperature, device="cuda").to(compute).requires_grad_()
    loss = function(given, target.to(dtype), tau, *options)
    scale = predicted.shape[0] * predicted.shape[1]  # a loss scale
    return loss.detach(), *torch.autograd.grad(scale * loss, (given, tau))


@pytest.mark.parametrize("memory", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("negatives", "temperature"), [("clip", 0.1), ("batch", 0.07), ("clip", 0.01)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_are_those_of_the_reference(
    shape, negatives, temperature, dtype, memory
):
    predicted, target = clips(*shape, dtype=dtype)
    loss, gradient, of_tau = with_gradients(
        contrastive_loss, predicted, target, temperature, dtype, negatives, "triton", memory
    )
    low = with_gradients(low_loss, predicted, target, temperature, dtype, negatives)
    exact = with_gradients(
        reference.contrastive_loss, predicted, target, temperature, torch.float64, negatives
    )
    assert loss.item() == pytest.approx(exact[0].item(), rel=1e-4, abs=1e-5)
    assert of_tau.item() == pytest.approx(exact[2].item(), rel=1e-3, abs=1e-3 * shape[0] * shape[1])
    norms.assert_close(gradient, low[1], exact[1], "gradient", slack=1e-7)


@pytest.mark.parametrize("memory", WAYS)
def test_thousands_of_negatives(memory):
    predicted, target = clips(4, 1408, 1536)
    loss = contrastive_loss(predicted, target, 0.1, "batch", "triton", memory)
    exact = predicted.detach().double().requires_grad_()
    expected = reference.contrastive_loss(exact, target.double(), 0.1, "batch")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    ours, theirs = (
        torch.autograd.grad(loss, predicted)[0].double(),
        torch.autograd.grad(expected, exact)[0],
    )
    assert (ours - theirs).square().mean().sqrt() <= 5e-3 * theirs.square().mean().sqrt()


@pytest.mark.parametrize(("memory", "megabytes"), [("fast", 129), ("least", 4)])
def test_memory_is_bounded_by_the_scratch(memory, megabytes):
    predicted, target = clips(4, 1408, 1536)
    # the BLAS takes its workspace once
    contrastive_loss(predicted, target, 0.1, "batch", "triton", memory)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = contrastive_loss(predicted, target, 0.1, "batch", "triton", memory)
    gradient = predicted.numel() * predicted.element_size() if memory == "fast" else 0
    assert torch.cuda.max_memory_allocated() - before <= gradient + (megabytes << 20)
    assert loss.isfinite()


@pytest.mark.parametrize("memory", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_repeats_are_equal_to_the_bit(dtype, memory):
    predicted, target = clips(3, 147, 768, dtype)
    tau = torch.tensor(0.1, device="cuda", requires_grad=True)
    results = []
    for _ in range(10):
        loss = contrastive_loss(predicted, target, tau, "batch", "triton", memory)
        results.append((loss.detach(), *torch.autograd.grad(loss, (predicted, tau))))
    assert all(
        torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True)
    )


@pytest.mark.parametrize("memory", WAYS)
def test_a_cuda_graph_follows_its_inputs(memory):
    predicted, target = clips(2, 147, 768)
    tau = torch.tensor(0.1, device="cuda", requires_grad=True)

    def step():
        loss = contrastive_loss(predicted, target, tau, "clip", "triton", memory)
        return loss, *torch.autograd.grad(loss, (predicted, tau))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        fresh = clips(2, 147, 768, seed=seed)
        with torch.no_grad():
            predicted.copy_(fresh[0])
            target.copy_(fresh[1])
            tau.fill_(0.1 * seed)
        graph.replay()
        replayed = [x.clone() for x in captured]
        for a, b in zip(replayed, step(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("memory", WAYS)
def test_the_host_never_waits_for_the_device(memory):
    predicted, target = clips(2, 147, 768)
    contrastive_loss(predicted, target, 0.1, "clip", "triton", memory).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        contrastive_loss(predicted, target, 0.1, "clip", "triton", memory).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("memory", WAYS)
def test_compiling_changes_nothing(memory):
    predicted, target = clips(2, 147, 768)
    tau = torch.tensor([0.2], device="cuda", requires_grad=True)

    def loss_of(x, t):
        return contrastive_loss(x, target, t[0], "batch", "triton", memory)

    expected = loss_of(predicted, tau)
    loss = torch.compile(loss_of, fullgraph=True)(predicted, tau)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(
        torch.autograd.grad(loss, (predicted, tau)),
        torch.autograd.grad(expected, (predicted, tau)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_adds_a_scaled_gradient_to_what_is_there(dtype):
    predicted, target = clips(3, 147, 768, dtype)
    tau = torch.tensor(0.1, device="cuda")
    (gradient,) = torch.autograd.grad(
        contrastive_loss(predicted, target, tau, "clip", "triton"), predicted
    )
    there = torch.zeros(predicted.shape, device="cuda")
    contrastive_forward(predicted, target, tau.reshape(1), "clip", there, 1000.0)
    torch.testing.assert_close(
        there, 1000 * gradient.float(), rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-4
    )


def test_are_proper_torch_operations():
    predicted, target = (x.detach() for x in clips(2, 15, 40))
    tau, some = torch.tensor([0.1], device="cuda"), torch.tensor([0.3], device="cuda")
    for with_gradient in (True, False):
        OPCHECK(chunked.forward, (predicted, target, tau, with_gradient, 1 << 20))
    OPCHECK(streaming.forward, (predicted, target, tau))
    _, _, _, *rows = streaming.forward(predicted, target, tau)
    OPCHECK(streaming.backward, (predicted, target, tau, some, *rows))
