"""Steps of ViT-B through `Engine` on fake CUDA tensors, as one of two ranks: what the GPU is asked,
and that nobody waits for it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from video_mae import ModelConfig, ObjectiveConfig, VideoMAE, token_mask
from video_mae.config import EngineConfig, OptimConfig, RunConfig
from video_mae.training.engine import Engine
from video_mae.training.moving_average import WeightAverage

from .conftest import Dispatched

RANKS, B = 2, 8
MOST_OPERATIONS = 600
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def one_of_two_ranks() -> Iterator[None]:
    """A process group in which the other rank is made up; DeepSpeed keeps it until the process
    ends.
    """
    environment = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        # fakes have no allocator
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        # ZeRO 3 has the ranks compare the order of layers in its first step, on the host.
        patch.setattr(
            "deepspeed.runtime.zero.partitioned_param_coordinator.assert_ints_same_as_other_ranks",
            lambda ints: None,
        )
        # DeepSpeed moves the model to where it is; torch would exchange each weight with a copy of
        # itself, which fakes do not allow.
        patch.setattr(torch.utils, "swap_tensors", lambda here, there: None)
        dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
        yield


@pytest.mark.usefixtures("fakes", "one_of_two_ranks")
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("stage", range(4))
def test_a_step_asks_little_of_the_gpu_and_never_waits_for_it(
    stage: Any, precision: Any, on_gpu: Callable[..., Any], tmp_path: Path
) -> None:
    model_config = ModelConfig.preset("base")
    model = on_gpu(
        lambda: VideoMAE(model_config, ObjectiveConfig(contrastive_weight=0.1)), DTYPES[precision]
    )
    config = RunConfig(
        output=str(tmp_path),
        engine=EngineConfig(zero_stage=stage, precision=precision),
        optim=OptimConfig(micro_batch=B, accumulation=2),
    )
    engine = Engine(model, config)
    clip_BTHWC = torch.empty(
        B,
        model_config.num_frames,
        model_config.height,
        model_config.width,
        3,
        dtype=torch.uint8,
        device="cuda",
    )
    mask = token_mask(torch.arange(B, device="cuda"), model_config.grid, "tube", 0.9, 0.5)

    def accumulate() -> None:
        for last in (False, True):
            engine.backward(engine(clip_BTHWC, mask).loss, last=last)

    accumulate()
    engine.step(1e-4)  # makes the optimizer's state
    accumulate()
    average = WeightAverage(engine, 0.999)
    with Dispatched() as dispatched:  # to ask a fake tensor for its value raises
        grad_norm = engine.step(1e-4)
        average.update(1)
    assert isinstance(grad_norm, torch.Tensor)
    assert (grad_norm.device.type, engine.skipped_steps.device.type) == ("cuda", "cuda")
    assert dispatched.num.total() <= MOST_OPERATIONS
    assert sum(num for name, num in dispatched.num.items() if "_fused_adamw_" in name) <= 2
