"""The fused operations against their definitions. What runs on a GPU is compared with these
references elsewhere.
"""

import itertools
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from video_mae.config import ModelConfig
from video_mae.kernels import contrastive_chunked as chunked
from video_mae.kernels import contrastive_terms, dispatch, reference
from video_mae.kernels.attention import packed_attention
from video_mae.kernels.contrastive import contrastive_loss
from video_mae.kernels.reconstruction import reconstruction_loss, reconstruction_loss_and_targets
from video_mae.kernels.tubelets import gather_tubelets
from video_mae.model.masking import mask_counts

second = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[1] / "second_implementation.py"))
)
CPU = torch.device("cpu")
TUBELET, MEAN, STD = (2, 4, 3), (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
GRID = (2, 3, 5)  # of the clips below


def clip_of(
    seed: int = 0, batch: int = 2, channels: int = 3, dtype: torch.dtype = torch.uint8
) -> torch.Tensor:
    shape = (batch, *(g * t for g, t in zip(GRID, TUBELET, strict=True)), channels)
    clip = torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return clip if dtype == torch.uint8 else clip.to(dtype) / 255


def some_index(seed: int = 0, count: int = 7, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [torch.randperm(math.prod(GRID), generator=generator)[:count] for _ in range(batch)]
    )


def tubelet_at(clip: torch.Tensor, b: int, token: int) -> torch.Tensor:
    """[t, p, q, C] by plain slicing."""
    (f, h, w), (t, p, q) = (token // 15, token // 5 % 3, token % 5), TUBELET
    return clip[b, f * t : (f + 1) * t, h * p : (h + 1) * p, w * q : (w + 1) * q]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize(
    ("tokens", "heads", "width"), [(1, 1, 1), (2, 3, 5), (17, 2, 16), (65, 5, 8)]
)
@pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
def test_attention_is_its_definition(tokens, heads, width, impl):
    qkv = normal(2, tokens, 3, heads, width, dtype=torch.float64)
    out = packed_attention(qkv, impl)
    assert out.shape == (2, tokens, heads, width)
    for b, h in itertools.product(range(2), range(heads)):
        q, k, v = qkv[b, :, :, h].unbind(1)
        weights = torch.exp(q @ k.T / math.sqrt(width))
        torch.testing.assert_close(
            out[b, :, h], weights / weights.sum(1, keepdim=True) @ v, rtol=1e-12, atol=1e-12
        )


def test_attention_gradients():
    qkv = normal(2, 4, 3, 2, 3, dtype=torch.float64).requires_grad_()
    for impl in ("reference", "sdpa"):
        assert torch.autograd.gradcheck(lambda x, impl=impl: packed_attention(x, impl), qkv)
    ours, theirs = (
        torch.autograd.grad(packed_attention(qkv, impl).square().sum(), qkv)[0]
        for impl in ("reference", "sdpa")
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_attention_does_not_overflow(scale):
    qkv = (scale * normal(1, 33, 3, 2, 16)).requires_grad_()
    for impl in ("reference", "sdpa"):
        out = packed_attention(qkv, impl)
        assert out.isfinite().all()
        assert torch.autograd.grad(out.sum(), qkv)[0].isfinite().all()
        torch.testing.assert_close(
            out.double(), packed_attention(qkv.double(), "reference"), rtol=1e-3, atol=1e-3
        )


# ---------------------------------------------------------------- tubelets


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_gathered_tubelets_are_the_normalised_pixels_in_channel_frame_row_column_order(dtype):
    clip, index = clip_of(dtype=dtype), some_index()
    out = gather_tubelets(clip, index, TUBELET, MEAN, STD, torch.float32)
    assert out.shape == (2, 7, 72)
    assert out.dtype == torch.float32
    for b, i in itertools.product(range(2), range(7)):
        pixels = tubelet_at(clip, b, int(index[b, i])).double() / (
            255 if dtype == torch.uint8 else 1
        )
        expected = (pixels - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
        torch.testing.assert_close(
            out[b, i].double(), expected.permute(3, 0, 1, 2).flatten(), rtol=1e-5, atol=1e-5
        )


def test_gathered_order_is_the_order_of_a_conv3d_weight():
    clip, weight = clip_of(), normal(11, 3, *TUBELET)
    video = ((clip / 255.0 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 4, 1, 2, 3)
    expected = F.conv3d(video, weight, stride=TUBELET).flatten(2).transpose(1, 2)
    everything = torch.arange(math.prod(GRID)).expand(2, -1)
    out = gather_tubelets(clip, everything, TUBELET, MEAN, STD, torch.float32) @ weight.flatten(1).T
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_gather_rounds_once_at_the_end():
    exact = gather_tubelets(clip_of(), some_index(), TUBELET, MEAN, STD, torch.float32)
    assert torch.equal(
        gather_tubelets(clip_of(), some_index(), TUBELET, MEAN, STD, torch.bfloat16),
        exact.bfloat16(),
    )


@pytest.mark.parametrize("channels", [1, 5])
def test_one_mean_serves_all_channels(channels):
    clip = clip_of(channels=channels)
    one = gather_tubelets(clip, some_index(), TUBELET, (0.3,), (0.7,), torch.float32)
    assert torch.equal(
        one,
        gather_tubelets(
            clip, some_index(), TUBELET, (0.3,) * channels, (0.7,) * channels, torch.float32
        ),
    )


# ---------------------------------------------------------------- reconstruction


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", ["channel", "tubelet", "none"])
def test_reconstruction_loss_is_its_definition_in_frame_row_column_channel_order(normalize, dtype):
    clip, index, predicted = clip_of(dtype=dtype), some_index(), normal(2, 7, 72)
    loss, targets = reconstruction_loss_and_targets(predicted, clip, index, TUBELET, normalize)
    errors = []
    for b, i in itertools.product(range(2), range(7)):
        x = tubelet_at(clip, b, int(index[b, i])).double() / (255 if dtype == torch.uint8 else 1)
        if normalize == "channel":
            for c in range(3):
                mean = x[..., c].sum() / 24
                deviation = ((x[..., c] - mean).square().sum() / 23).sqrt()
                x[..., c] = (x[..., c] - mean) / (deviation + 1e-6)
        elif normalize == "tubelet":
            x = (x - x.mean()) / (x.var() + 1e-6).sqrt()
        torch.testing.assert_close(targets[b, i].double(), x.flatten(), rtol=1e-5, atol=1e-5)
        errors.append((predicted[b, i].double() - x.flatten()).square())
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-6)
    assert torch.equal(loss, reconstruction_loss(predicted, clip, index, TUBELET, normalize))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("normalize", ["channel", "tubelet"])
@pytest.mark.parametrize("value", [0, 1, 127, 200, 255])
def test_flat_tubelets_give_exactly_zero_targets(normalize, value, dtype):
    clip = torch.full(
        clip_of().shape,
        {torch.uint8: value, torch.uint16: 257 * value, torch.float32: value / 255}[dtype],
        dtype=dtype,
    )
    loss, targets = reconstruction_loss_and_targets(
        torch.zeros(2, 7, 72), clip, some_index(), TUBELET, normalize
    )
    assert (targets == 0).all()
    assert loss == 0


def test_one_channel_flat_gives_zero_in_that_channel_alone():
    clip = clip_of()
    clip[..., 1] = 77
    targets = reconstruction_loss_and_targets(
        torch.zeros(2, 7, 72), clip, some_index(), TUBELET, "channel"
    )[1].unflatten(2, (24, 3))
    assert (targets[..., 1] == 0).all()
    assert (targets[..., 0] != 0).any()
    assert (targets[..., 2] != 0).any()


@pytest.mark.parametrize("normalize", ["channel", "tubelet", "none"])
def test_reconstruction_gradient(normalize):
    clip, index = clip_of(dtype=torch.float64), some_index(count=2)
    predicted = normal(2, 2, 72, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: reconstruction_loss(x, clip, index, TUBELET, normalize), predicted
    )


def test_low_precision_predictions_are_compared_in_float32():
    predicted = normal(2, 7, 72).bfloat16().requires_grad_()
    loss = reconstruction_loss(predicted, clip_of(), some_index(), TUBELET)
    assert loss.dtype == torch.float32
    assert torch.equal(
        loss, reconstruction_loss(predicted.float(), clip_of(), some_index(), TUBELET)
    )
    assert torch.autograd.grad(loss, predicted)[0].dtype == torch.bfloat16


# ---------------------------------------------------------------- contrastive


@pytest.mark.parametrize("negatives", ["clip", "batch"])
@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0])
def test_contrastive_loss_is_its_definition(negatives, temperature):
    predicted, target = (
        normal(3, 4, 6, seed=1, dtype=torch.float64),
        normal(3, 4, 6, seed=2, dtype=torch.float64),
    )
    terms = []
    for b, i in itertools.product(range(3), range(4)):
        rivals = target[b] if negatives == "clip" else target.flatten(0, 1)
        weights = [
            math.exp(F.cosine_similarity(predicted[b, i], x, dim=0).item() / temperature)
            for x in rivals
        ]
        terms.append(-math.log(weights[i if negatives == "clip" else 4 * b + i] / sum(weights)))
    ours = contrastive_loss(predicted, target, temperature, negatives)
    assert ours.item() == pytest.approx(sum(terms) / 12, rel=1e-12)


def unevenly_flat(clips: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """(predicted_BMP, target_BMP): a full clip, one of two targets, one with none, one of a single
    target.
    """
    predicted, target = (normal(4, 5, 6, seed=seed, dtype=torch.float64) for seed in (1, 2))
    target[1, 2:], target[2], target[3, 1:] = 0, 0, 0
    return predicted[:clips].requires_grad_(), target[:clips]


@pytest.mark.parametrize("clips", [2, 3, 4])
def test_a_batch_is_the_mean_of_its_clips_however_flat_they_are(clips):
    predicted, target = unevenly_flat(clips)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    together = contrastive_loss(predicted, target, tau)
    alone = torch.stack(
        [contrastive_loss(predicted[b : b + 1], target[b : b + 1], tau) for b in range(clips)]
    )
    torch.testing.assert_close(together, alone.mean())
    for ours, expected in zip(
        *(torch.autograd.grad(loss, (predicted, tau)) for loss in (together, alone.mean())),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)
        assert (expected != 0).any()
    assert all((loss == 0) == (target[b].count_nonzero() == 0) for b, loss in enumerate(alone))


@pytest.mark.parametrize("negatives", ["clip", "batch"])
def test_contrastive_loss_of_flat_tubelets_equals_the_second_implementation(negatives):
    predicted, target = unevenly_flat()
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (contrastive_loss, second.contrastive):
        loss = function(predicted, target, tau, negatives)
        results.append((loss.detach(), *torch.autograd.grad(loss, (predicted, tau))))
    torch.testing.assert_close(*results)


class Started(TorchDispatchMode):
    """Names what a GPU would start: kernels and products that take this object's place, and
    operations but for views and allocations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[tuple[int, ...]] = []
        self.products = 0
        self.operations: list[str] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_, **__: self.kernels.append(grid)

    def product(self, *_: torch.Tensor) -> None:
        self.products += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in ("view", "transpose", "slice", "unbind") and not name.startswith("empty"):
            self.operations.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("preset", "dual", "chunks"),
    [("base", 0.0, 4), ("base", 0.5, 2), ("giant", 0.0, 6), ("giant", 0.5, 2)],
)
def test_the_fast_contrastive_loss_of_32_clips_starts_few_kernels(
    preset, dual, chunks, monkeypatch
):
    model, started = ModelConfig.preset(preset), Started()
    for module, name in (
        (contrastive_terms, "inverse_norm_kernel"),
        (chunked, "softmax_gradient_kernel"),
        (chunked, "through_cosine_kernel"),
    ):
        monkeypatch.setattr(module, name, started)
    monkeypatch.setattr(chunked, "matmul", started.product)
    masked, values = (
        mask_counts(model.grid, "tube", 0.9, dual)[1],
        math.prod(model.tubelet) * model.in_channels,
    )
    predicted = torch.empty(32, masked, values, dtype=torch.bfloat16, device="meta")
    gradient, temperature = torch.empty_like(predicted), torch.empty(1, device="meta")
    with started:
        chunked.loss_and_gradient(
            predicted, predicted, temperature, gradient, 1.0, chunked.SCRATCH_BYTES
        )
    assert (len(started.kernels), started.products) == (2 + 2 * chunks, 2 * chunks)
    assert len(started.operations) <= 13, started.operations


def test_batch_negatives_equal_one_long_clip():
    predicted, target = normal(3, 4, 6, seed=1), normal(3, 4, 6, seed=2)
    long = contrastive_loss(predicted.reshape(1, 12, 6), target.reshape(1, 12, 6), 0.1, "clip")
    torch.testing.assert_close(contrastive_loss(predicted, target, 0.1, "batch"), long)


@pytest.mark.parametrize("negatives", ["clip", "batch"])
def test_contrastive_gradients_of_predictions_and_temperature(negatives):
    predicted, target = (
        normal(2, 3, 5, seed=1, dtype=torch.float64).requires_grad_(),
        normal(2, 3, 5, seed=2, dtype=torch.float64),
    )
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, tau: contrastive_loss(x, target, tau, negatives), (predicted, temperature)
    )


def test_contrastive_loss_of_unrelated_predictions_is_the_logarithm_of_their_number():
    num = 256
    loss = contrastive_loss(normal(4, num, 512, seed=1), normal(4, num, 512, seed=2), 1.0)
    assert loss.item() == pytest.approx(math.log(num), rel=0.01)


def test_contrastive_loss_is_small_for_perfect_predictions_and_ignores_length():
    target = normal(2, 16, 64)
    assert contrastive_loss(target, target, 0.05) < 1e-3
    torch.testing.assert_close(
        contrastive_loss(5 * target, 0.1 * target, 0.5), contrastive_loss(target, target, 0.5)
    )


def test_contrastive_loss_is_finite_for_empty_pictures_and_the_coldest_temperature():
    predicted, target = normal(1, 8, 12, seed=1), normal(1, 8, 12, seed=2)
    predicted[0, 0], target[0, :2] = 0, 0
    loss = contrastive_loss(predicted.requires_grad_(), target, 0.01)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, predicted)[0].isfinite().all()


# ---------------------------------------------------------------- arguments

QKV, INDEX, CLIP, PREDICTED = (
    torch.zeros(1, 4, 3, 2, 5),
    some_index(),
    clip_of(),
    torch.zeros(2, 7, 72),
)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: packed_attention(torch.zeros(1, 4, 2, 2, 5)), "(1, 4, 2, 2, 5)"),
        (lambda: packed_attention(torch.zeros(4, 3, 2, 5)), "(4, 3, 2, 5)"),
        (
            lambda: gather_tubelets(CLIP[0], INDEX, TUBELET, MEAN, STD, torch.float32),
            "(4, 12, 15, 3)",
        ),
        (
            lambda: gather_tubelets(CLIP.int(), INDEX, TUBELET, MEAN, STD, torch.float32),
            "torch.int32",
        ),
        (
            lambda: gather_tubelets(CLIP, INDEX.int(), TUBELET, MEAN, STD, torch.float32),
            "torch.int32",
        ),
        (lambda: gather_tubelets(CLIP, INDEX[:1], TUBELET, MEAN, STD, torch.float32), "(1, 7)"),
        (lambda: gather_tubelets(CLIP, INDEX, (2, 4, 4), MEAN, STD, torch.float32), "(2, 4, 4)"),
        (lambda: reconstruction_loss(PREDICTED[:, :6], CLIP, INDEX, TUBELET), "(2, 6, 72)"),
        (lambda: reconstruction_loss(PREDICTED[..., 1:], CLIP, INDEX, TUBELET), "(2, 7, 71)"),
        (lambda: reconstruction_loss(PREDICTED, CLIP, INDEX, TUBELET, "chanel"), "chanel"),  # pyright: ignore[reportArgumentType]
        (lambda: contrastive_loss(PREDICTED, PREDICTED[:, 1:], 0.1), "(2, 6, 72)"),
        (lambda: contrastive_loss(PREDICTED[0], PREDICTED[0], 0.1), "(7, 72)"),
        (lambda: contrastive_loss(PREDICTED, PREDICTED, 0.1, "rank"), "rank"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_argument_that_does_not_fit_is_named(call, named):
    with pytest.raises(
        ValueError,
        match=r"^(packed_attention|gather_tubelets|reconstruction_loss|contrastive_loss): ",
    ) as error:
        call()
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("operation", "call"),
    [
        ("packed_attention", lambda impl: packed_attention(QKV, impl)),
        (
            "gather_tubelets",
            lambda impl: gather_tubelets(CLIP, INDEX, TUBELET, MEAN, STD, torch.float32, impl),
        ),
        (
            "reconstruction_loss",
            lambda impl: reconstruction_loss(PREDICTED, CLIP, INDEX, TUBELET, impl=impl),
        ),
        ("contrastive_loss", lambda impl: contrastive_loss(PREDICTED, PREDICTED, 0.1, impl=impl)),
    ],
)
def test_every_listed_implementation_runs_on_a_cpu_or_says_why_not(operation, call):
    assert torch.equal(torch.as_tensor(call("auto")), call(dispatch.choose(operation, "auto", CPU)))
    call("reference")
    with pytest.raises(
        ValueError, match=rf"^{operation}: impl cuda is not one of auto, .*reference"
    ):
        call("cuda")
    with pytest.raises(
        ValueError, match=rf"^{operation}: impl triton needs a CUDA device, not cpu"
    ):
        call("triton")


def test_description_tells_what_auto_picked():
    line = dispatch.describe("auto", CPU)
    assert "\n" not in line
    for operation in dispatch.IMPLEMENTATIONS:
        assert f"{operation} = {dispatch.choose(operation, 'auto', CPU)}" in line
        assert hasattr(reference, operation)
