"""How checkpoints get to the disk: each rank writes its files, and what the disk refuses to one is
told on all.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils._pytree import tree_leaves

from video_mae.files import StorageError, fsync, storing
from video_mae.training.checkpoint import digest


def attempt(work: Callable[[], Any]) -> Any:
    """What work() returns, or the StorageError that it raises: to be gathered, where all ranks are
    to know.
    """
    try:
        return work()
    except StorageError as error:
        return error


def write_files(folder: Path, files: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Writes files of a checkpoint, by name: tensors by name for *.safetensors, else what
    torch.save takes; returns their digests. Raises: StorageError.
    """
    digests = {}
    tensors = filter(torch.is_tensor, tree_leaves(files))
    with storing(folder, sum(tensor.nbytes for tensor in tensors)):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            path = folder / name
            if path.suffix == ".safetensors":
                save_file(content, path)
            else:
                torch.save(content, path)
            fsync(path)
            digests[name] = digest(path)
    return digests


def on_host(content: Any) -> Any:
    """A copy that training does not change, its tensors in page-locked memory of the host."""
    copies = {}
    for tensor in filter(torch.is_tensor, tree_leaves(content)):
        there = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        copies[id(tensor)] = there.copy_(tensor.detach())
    return copy.deepcopy(content, copies)
