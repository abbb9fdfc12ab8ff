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

from video_mae.files import StorageError, storing
from video_mae.training import checkpoint


def together(work: Callable[[], Any], gather: Callable[[Any], list[Any]]) -> list[Any]:
    """What work() returns on each rank; every rank must call it. Raises: StorageError, on all ranks
    where it does on one.
    """
    try:
        result = work()
    except StorageError as error:
        result = error
    results = gather(result)
    for result in results:
        if isinstance(result, StorageError):
            raise result
    return results


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
                try:
                    torch.save(content, path)
                except RuntimeError as error:  # PyTorch's writer knows no other
                    raise OSError(f"PyTorch: {error!s:.60}") from None
            checkpoint.fsync(path)
            digests[name] = checkpoint.digest(path)
    return digests


def on_host(content: Any) -> Any:
    """A copy that training does not change, its tensors in page-locked memory of the host."""
    copies = {}
    for tensor in filter(torch.is_tensor, tree_leaves(content)):
        there = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        copies[id(tensor)] = there.copy_(tensor.detach(), non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copy.deepcopy(content, copies)
