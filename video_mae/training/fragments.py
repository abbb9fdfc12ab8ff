"""The state of training in fragments: stretches of flattened tensors, which the ranks that hold
them write, by KIND/NAME/START, and any others read, of whatever number and ZeRO stage.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from video_mae.files import FolderError

Fragments = dict[str, tuple[int, torch.Tensor]]
"""Of a flattened tensor, by KIND/NAME (weight/NAME: of a parameter, in float32), the first of its
numbers that is here, and a flat view of all that are.
"""


def whole(kind: str, tensors: Mapping[str, torch.Tensor]) -> Fragments:
    """Tensors by name as fragments that have all of them."""
    return {f"{kind}/{name}": (0, tensor.view(-1)) for name, tensor in tensors.items()}


@torch.no_grad()
def read(folder: Path, fragments: Fragments) -> None:
    """Copies into fragments what the files of a checkpoint hold of them.

    Raises: FolderError where they do not hold all of it.
    """
    missing = {key: len(view) for key, (_, view) in fragments.items()}
    for file in sorted(folder.glob("state_*.safetensors")):
        with safe_open(file, framework="pt") as saved:
            for place in saved.keys():  # noqa: SIM118
                key, _, start = place.rpartition("/")
                if key not in fragments:
                    continue
                first, view = fragments[key]
                part = saved.get_slice(place)
                shift = int(start) - first
                begin, end = max(0, shift), min(len(view), shift + part.get_shape()[0])
                if begin < end:
                    view[begin:end].copy_(part[begin - shift : end - shift])
                    missing[key] -= end - begin
    for key, num in missing.items():
        if num:
            raise FolderError(f"{folder}: {num} numbers of {key} are in none of its files")
