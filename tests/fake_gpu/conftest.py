"""These tests run in a process that is told of a GPU which can do nothing (gpu.c).

test_fake_gpu.py starts it.

Models live on fake CUDA tensors: shapes, dtypes, devices, which kernel is chosen, and every wait of
the host for the device, which raises, as a fake tensor has no value.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

if os.environ.get("FAKE_GPU") != "1":
    collect_ignore = ["test_engine.py", "test_loading.py", "test_models.py"]


class Dispatched(TorchDispatchMode):
    """Counts the operations that reach the device, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.num: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removesuffix(".default")
        # neither where a fake is, nor what only the host does
        if not name.startswith("prim.") and not func.is_view:
            self.num[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fakes() -> Iterator[None]:
    """Tensors that are made within a test have no values."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.fixture
def on_gpu() -> Callable[..., Any]:
    """on_gpu(lambda: VideoMAE(...), dtype): the model on the GPU, its weights fakes."""

    def move(make: Callable[[], nn.Module], dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        # weights are never filled: a giant model takes as long as a small one
        with torch.device("meta"):
            model = make()
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                setattr(
                    module,
                    name,
                    nn.Parameter(torch.empty(weight.shape, dtype=dtype, device="cuda")),
                )
            for name, buffer in module.named_buffers(recurse=False):
                kind = dtype if buffer.is_floating_point() else buffer.dtype
                setattr(module, name, torch.empty(buffer.shape, dtype=kind, device="cuda"))
        return model

    return move
