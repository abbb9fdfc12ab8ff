"""Forward and backward of every model on fake CUDA tensors: all presets at their real size, eager
and compiled into one graph.

Letters: B clips.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from video_mae import ModelConfig, ObjectiveConfig, VideoClassifier, VideoMAE, token_mask
from video_mae.config import PRESETS

from .conftest import Dispatched

B = 32
SHALLOW = {"depth": 2, "decoder_depth": 2}
JOINT = ObjectiveConfig(contrastive_weight=0.1, learn_temperature=True)
STREAMED = ObjectiveConfig(contrastive_weight=0.1, contrastive_memory="least", negatives="batch")
WAITS = (
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.is_nonzero",
    "aten.equal",
    "aten.masked_select",
)


def clips(config: ModelConfig, batch: int = B) -> torch.Tensor:
    return torch.empty(
        batch, config.num_frames, config.height, config.width, 3, dtype=torch.uint8, device="cuda"
    )


def masked_loss(model: Any, config: ModelConfig, decoder_mask_ratio: float = 0.0) -> torch.Tensor:
    """The loss of a step, masks included."""
    mask = token_mask(torch.arange(B, device="cuda"), config.grid, "tube", 0.9, decoder_mask_ratio)
    return model(clips(config), mask).loss


def class_loss(model: Any, config: ModelConfig) -> torch.Tensor:
    return F.cross_entropy(
        model(clips(config, 8)).float(), torch.zeros(8, dtype=torch.int64, device="cuda")
    )


def check_gradients(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Every weight has one of its own dtype, on the GPU."""
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert (weight.grad.dtype, weight.grad.device.type) == (dtype, "cuda"), name


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("decoder_mask_ratio", [0.0, 0.5])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_of_every_preset_runs_our_kernels_and_never_waits(
    preset: str, decoder_mask_ratio: float, on_gpu: Callable[..., Any]
) -> None:
    """At full depth once; the other ratio changes what a block sees, not how many there are."""
    config = ModelConfig.preset(preset, **(SHALLOW if decoder_mask_ratio == 0 else {}))
    model = on_gpu(lambda: VideoMAE(config, JOINT))
    with Dispatched() as dispatched:
        loss = masked_loss(model, config, decoder_mask_ratio)
        loss.backward()
    assert (loss.dtype, loss.device.type) == (torch.float32, "cuda")
    check_gradients(model, torch.bfloat16)
    assert not [name for name in WAITS if dispatched.num[name]]
    for operation in ("gather_tubelets", "joint_loss", "scale_tokens"):
        assert dispatched.num[f"video_mae.{operation}"] == 1, operation
    attentions = [num for name, num in dispatched.num.items() if name.endswith("attention")]
    assert sum(attentions) == config.depth + config.decoder_depth
    slow = (
        "aten._scaled_dot_product_attention_math",
        "aten._scaled_dot_product_efficient_attention",
    )
    assert not [name for name in slow if dispatched.num[name]]


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_step_runs_in_every_dtype(
    dtype: torch.dtype, impl: str, on_gpu: Callable[..., Any]
) -> None:
    config = ModelConfig.preset("base", **SHALLOW)
    for objective in (ObjectiveConfig(), JOINT, STREAMED):
        model = on_gpu(
            lambda objective=objective: VideoMAE(config, objective, impl=impl, checkpointing=True),
            dtype,
        )
        masked_loss(model, config).backward()
        check_gradients(model, dtype)


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_a_classifier_trains(impl: str, on_gpu: Callable[..., Any]) -> None:
    config = ModelConfig.preset("base", drop_path=0.1)
    model = on_gpu(lambda: VideoClassifier(config, 400, impl=impl))
    with Dispatched() as dispatched:
        class_loss(model, config).backward()
    check_gradients(model, torch.bfloat16)
    assert not [name for name in WAITS if dispatched.num[name]]


MODELS: dict[str, tuple[Callable[[ModelConfig], torch.nn.Module], Callable[..., torch.Tensor]]] = {
    "full": (lambda config: VideoMAE(config), masked_loss),
    "joint, dual": (
        lambda config: VideoMAE(config, JOINT),
        lambda model, config: masked_loss(model, config, 0.5),
    ),
    "joint, streamed": (lambda config: VideoMAE(config, STREAMED), masked_loss),
    "triton": (lambda config: VideoMAE(config, JOINT, impl="triton"), masked_loss),
    "checkpointing": (lambda config: VideoMAE(config, checkpointing=True), masked_loss),
    "classifier": (lambda config: VideoClassifier(config, 400), class_loss),
    "classifier, checkpointing": (
        lambda config: VideoClassifier(config, 400, checkpointing=True),
        class_loss,
    ),
}


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(
    ("what", "preset"), [*((what, "base") for what in MODELS), ("joint, dual", "giant")]
)
def test_compiles_into_one_graph(what: str, preset: str, on_gpu: Callable[..., Any]) -> None:
    make, loss_of = MODELS[what]
    config = ModelConfig.preset(
        preset, **SHALLOW, drop_path=0.1 if make is MODELS["classifier"][0] else 0.0
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = on_gpu(lambda: make(config))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss_of(compiled, config).backward()
    check_gradients(model, torch.bfloat16)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
