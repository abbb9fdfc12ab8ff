"""engine.compile through the engine: one graph without a break, and the training of the eager
model.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import fake_tensor

from video_mae import ModelConfig, ObjectiveConfig, VideoClassifier, VideoMAE, token_mask
from video_mae.config import EngineConfig, OptimConfig, RunConfig
from video_mae.training.engine import Engine

MODEL = ModelConfig(
    num_frames=4,
    height=32,
    width=32,
    patch_size=8,
    embed_dim=32,
    depth=2,
    num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
)
JOINT = ObjectiveConfig(contrastive_weight=0.1, learn_temperature=True)
# the model, and the share that its decoder leaves out, -1 for a classifier
CASES: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "full": (lambda: VideoMAE(MODEL), 0.0),
    "dual, joint": (lambda: VideoMAE(MODEL, JOINT), 0.5),
    "checkpointing": (lambda: VideoMAE(MODEL, checkpointing=True), 0.0),
    "classifier": (lambda: VideoClassifier(replace(MODEL, drop_path=0.1), 5), -1.0),
}
pytestmark = [pytest.mark.trains_here, pytest.mark.usefixtures("quiet_process")]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def losses(case: str, folder: Path, **engine: object) -> list[float]:
    """Of three steps of two micro-batches, by an engine of one process."""
    make, skipped = CASES[case]
    torch.manual_seed(0)
    config = RunConfig(
        output=str(folder),
        engine=EngineConfig(**engine),  # pyright: ignore[reportArgumentType]
        optim=OptimConfig(micro_batch=2, accumulation=2, clip_grad=1.0),
    )
    model = make()
    started = Engine(model, config)
    started.deepspeed.train()
    found: list[float] = []
    for number in range(6):
        torch.manual_seed(number)  # of dropped paths, too
        clip = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
        if skipped < 0:
            loss = nn.functional.cross_entropy(started(clip).float(), torch.tensor([number % 5, 1]))
        else:
            loss = started(
                clip, token_mask(torch.tensor([number, 7]), MODEL.grid, "tube", 0.75, skipped)
            ).loss
        started.backward(loss, last=number % 2 == 1)
        found.append(loss.item())
        if number % 2 == 1:
            started.step(1e-2)
    return found


@pytest.mark.parametrize(
    ("case", "stage", "precision"), [*((case, 2, "fp32") for case in CASES), ("full", 0, "bf16")]
)
def test_a_compiled_model_is_one_graph_and_trains_as_the_eager_one(
    case: str, stage: int, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepspeed

    # The knob's own backend makes kernels of the graph, which takes minutes; whether there is one
    # graph does not depend on it.
    compiled = partialmethod(
        deepspeed.DeepSpeedEngine.compile, backend="aot_eager", compile_kwargs={"fullgraph": True}
    )
    monkeypatch.setattr(deepspeed.DeepSpeedEngine, "compile", compiled)
    eager = losses(case, tmp_path, zero_stage=stage, precision=precision)
    assert not torch._dynamo.utils.counters["stats"]
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    assert losses(
        case, tmp_path, zero_stage=stage, precision=precision, compile=True
    ) == pytest.approx(eager, rel=tolerance)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("case", CASES)
def test_what_a_gpu_would_compile_is_one_graph(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors with a CUDA device and no content: as far as it goes without a driver, which a
    backward pass asks for.
    """
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    make, skipped = CASES[case]
    captured: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        captured.append(graph)
        return graph.forward

    model = make().bfloat16()
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    setattr(
                        module,
                        name,
                        nn.Parameter(
                            torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                        ),
                    )
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    setattr(
                        module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
                    )
        clip = torch.empty(2, 4, 32, 32, 3, dtype=torch.uint8, device="cuda")
        mask = token_mask(
            torch.arange(2, device="cuda"), MODEL.grid, "tube", 0.75, max(skipped, 0.0)
        )
        output = torch.compile(model, fullgraph=True, backend=backend)(
            *((clip,) if skipped < 0 else (clip, mask))
        )
    assert (output if skipped < 0 else output.loss).device.type == "cuda"
    graphs = [
        part
        for graph in captured
        for part in graph.modules()
        if isinstance(part, torch.fx.GraphModule)
    ]
    operations = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert len(captured) == 1
    assert "video_mae.gather_tubelets.default" in operations
    assert skipped < 0 or operations & {
        "video_mae.token_errors.default",
        "video_mae.joint_loss.default",
    }
