"""The state of training in fragments: stretches of flattened tensors, which the ranks that hold
them write and any others read, of whatever number and ZeRO stage.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from video_mae.files import DamagedRunError


class Fragment(NamedTuple):
    """A stretch of a flattened tensor: what it is of, as KIND/NAME (weight/NAME: of a parameter, in
    float32), the first of its numbers that is here, and a flat view of all that are.
    """

    key: str
    start: int
    view: torch.Tensor


def whole(kind: str, tensors: Mapping[str, torch.Tensor]) -> list[Fragment]:
    """Tensors by name as fragments that have all of them."""
    return [Fragment(f"{kind}/{name}", 0, tensor.view(-1)) for name, tensor in tensors.items()]


def named(fragments: Iterable[Fragment]) -> dict[str, torch.Tensor]:
    """Tensors by KIND/NAME/START, as a file has them."""
    return {f"{key}/{start}": view.detach() for key, start, view in fragments}


@torch.no_grad()
def read(folder: Path, fragments: Iterable[Fragment]) -> None:
    """Copies into fragments what the files of a checkpoint hold of them.

    Raises: DamagedRunError where they do not hold all of it.
    """
    wanted = {fragment.key: fragment for fragment in fragments}
    missing = {key: fragment.view.numel() for key, fragment in wanted.items()}
    for file in sorted(folder.glob("state_*.safetensors")):
        with safe_open(file, framework="pt") as saved:
            for place in saved.keys():  # noqa: SIM118
                key, _, start = place.rpartition("/")
                if key not in wanted:
                    continue
                _, first, view = wanted[key]
                part = saved.get_slice(place)
                shift = int(start) - first
                begin, end = max(0, shift), min(len(view), shift + part.get_shape()[0])
                if begin < end:
                    view[begin:end].copy_(part[begin - shift : end - shift])
                    missing[key] -= end - begin
    for key, num in missing.items():
        if num:
            raise DamagedRunError(f"{folder}: {num} numbers of {key} are in none of its files")
