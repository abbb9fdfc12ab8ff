"""What a project always has: names of tensors, in tables from ours to theirs that are read in both
directions, and what no file says; and the tensors of a file by our names.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from video_mae.config import IMAGENET_MEAN, IMAGENET_STD
from video_mae.convert.facts import Tensors
from video_mae.convert.foreign_files import ForeignModel

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OF_A_BLOCK = re.compile(r"(.+?)\.(0|[1-9]\d*)\.(.+)")


@dataclass(frozen=True, kw_only=True, eq=False)
class Project:
    """A project's names, by ours: of layers and tokens outside of blocks, of the lists of blocks,
    and of what is inside a block. `also`: other names inside, that are read.

    `spellings` brings the variants of a name to the one of the tables, one regular expression after
    another. `positions` are tables that may be there, by side or by our name; `computed` says which
    ones they are, to a tolerance (None: they are learned).
    """

    name: str
    outside: dict[str, str]
    blocks: dict[str, str]
    inside: dict[str, str]
    also: dict[str, str] = field(default_factory=dict)
    spellings: tuple[tuple[str, str], ...] = ()
    positions: dict[str, str] = field(default_factory=dict)
    computed: Literal["sinusoid", "sincos"] = "sinusoid"
    tolerance: float | None = 0.0
    is_mae: bool = False
    """MAE and its kin: positions are in the file, the decoder's embedding has a bias, targets are
    normalised by tubelet, and are of the normalised input.
    """
    is_unit_in_rgb_alone: bool = False
    """Targets of other channels are of the normalised input too."""
    decoder_heads: dict[int, int] = field(default_factory=dict)
    """Of the published decoders, by width."""
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = (IMAGENET_MEAN, IMAGENET_STD)

    @property
    def normalize(self) -> Literal["channel", "tubelet"]:
        """What the targets of pretraining are normalised by, where they are."""
        return "tubelet" if self.is_mae else "channel"

    def pixels(self, channels: int) -> Literal["unit", "normalized"]:
        """What the targets of pretraining are of."""
        is_normalized = self.is_mae or (self.is_unit_in_rgb_alone and channels != 3)
        return "normalized" if is_normalized else "unit"

    def plain(self, name: str) -> str:
        """A name in the file as the tables have it."""
        for pattern, replacement in self.spellings:
            name = re.sub(pattern, replacement, name)
        return name

    def to_theirs(self, ours: str) -> str | None:
        """Their name of one of our tensors, where they have one."""
        return _translate(ours, self.outside, self.blocks, self.inside)

    def to_ours(self, plain: str) -> str | None:
        """Our name of one of their tensors; None for what no table knows."""
        return _translate(plain, *self._inverted)

    @cached_property
    def _inverted(self) -> tuple[dict[str, str], ...]:
        inside = _inverse(self.also) | _inverse(self.inside)
        return _inverse(self.outside), _inverse(self.blocks), inside


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}


def _translate(
    name: str, outside: Mapping[str, str], blocks: Mapping[str, str], inside: Mapping[str, str]
) -> str | None:
    match = OF_A_BLOCK.fullmatch(name)
    if match is None:
        return _look_up(outside, name)
    inner = _look_up(inside, match[3])
    return f"{blocks[match[1]]}.{match[2]}.{inner}" if inner and match[1] in blocks else None


def _look_up(table: Mapping[str, str], name: str) -> str | None:
    """A table has tensors, and layers of a weight and a bias."""
    layer, _, part = name.rpartition(".")
    if layer in table and part in ("weight", "bias"):
        return f"{table[layer]}.{part}"
    return table.get(name)


def apart(query: str, key: str, value: str) -> dict[str, str]:
    """The table of layers that make queries, keys and values one by one."""
    table = {}
    for letter, layer in zip("qkv", (query, key, value), strict=True):
        table[f"attn.qkv.{letter}_weight"] = f"{layer}.weight"
        table[f"attn.qkv.{letter}_bias"] = f"{layer}.bias"
    return table


def recognise(tensors: Iterable[str], projects: Iterable[Project], where: str) -> Project:
    """The project whose names explain most tensors. Raises: ValueError where none knows a block."""
    most, best = 0, None
    for project in projects:
        names = [project.plain(name) for name in tensors]
        known = [ours for ours in map(project.to_ours, names) if ours]
        count = len(known) + sum(name in project.positions.values() for name in names)
        if count > most and any(".blocks." in ours for ours in known):
            most, best = count, project
    if best is None:
        first = ", ".join(sorted(tensors)[:3])
        raise ValueError(
            f"{where}: holds no model that is known here; its first tensors are {first}"
        )
    return best


@dataclass(kw_only=True)
class NamedTensors:
    """The tensors of a file by our names, and what no table knows, by its plain name.

    Queries, keys and values have their weights together and their biases apart, as in our models;
    a file may have either.
    """

    source: ForeignModel
    project: Project
    ours: Tensors = field(default_factory=dict)
    unknown: Tensors = field(default_factory=dict)
    # our name, or a plain name that is none -> name in the file
    spelled: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises: ValueError naming a tensor whose values cannot be, or that is missing beside its
        likes.
        """
        for name, tensor in self.source.tensors.items():
            plain = self.project.plain(name)
            ours = self.project.to_ours(plain)
            key = ours or plain
            if key in self.spelled:
                raise self.wrong(f"{name} and {self.spelled[key]} are two tensors for one thing")
            self.spelled[key] = name
            if ours is None:
                self.unknown[plain] = tensor
                continue
            values = self.values(tensor, name)
            self.ours[ours] = values.flatten() if ours.endswith("_token") else values
        for qkv in {name.rpartition(".")[0] for name in self.ours if ".attn.qkv." in name}:
            try:
                self._regroup(qkv)
            except RuntimeError as error:
                where = self.called(f"{qkv}.q_weight")
                raise self.wrong(f"{where}: does not fit its neighbours ({error})") from None
        for side in ("encoder", "decoder"):
            blocks = self.blocks(side)
            for number in range(max(blocks, default=-1)):
                if number not in blocks:
                    raise self.wrong(
                        f"block {number} of the {side} is missing, but block {max(blocks)} is there"
                    )

    def _regroup(self, qkv: str) -> None:
        weights = [f"{qkv}.{letter}_weight" for letter in "qkv"]
        if any(name in self.ours for name in weights):
            self.ours[f"{qkv}.weight"] = torch.cat([self.tensor(name) for name in weights])
        for name in weights:
            self.ours.pop(name, None)
        together = self.ours.pop(f"{qkv}.bias", None)
        if together is None:
            return
        spelled = self.spelled[f"{qkv}.bias"]
        for letter, part in zip("qkv", together.chunk(3), strict=False):
            name = f"{qkv}.{letter}_bias"
            if name in self.ours:
                raise self.wrong(
                    f"{spelled} and {self.spelled[name]} are two tensors for one thing"
                )
            self.ours[name], self.spelled[name] = part, spelled

    def tensor(self, ours: str) -> torch.Tensor:
        """One that must be there. Raises: ValueError naming it."""
        if ours not in self.ours:
            raise self.wrong(f"{self.called(ours)} is missing")
        return self.ours[ours]

    def length(self, ours: str) -> int:
        """Of the first dimension of one that must be there."""
        tensor = self.tensor(ours)
        if not tensor.numel() or not tensor.dim():
            raise self.wrong(f"{self.called(ours)}: has shape {tuple(tensor.shape)}")
        return len(tensor)

    def values(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """In float32. Raises: ValueError where they are no weights: integers, NaN, infinite."""
        if tensor.dtype not in FLOATS:
            raise self.wrong(f"{name}: is of {tensor.dtype}, not of floating point numbers")
        values = tensor.float()
        if not bool(values.isfinite().all()):
            raise self.wrong(f"{name}: holds values that are NaN or infinite")
        return values

    def blocks(self, side: str) -> set[int]:
        return {int(name.split(".")[2]) for name in self.ours if name.startswith(f"{side}.blocks.")}

    def has(self, prefix: str) -> bool:
        """Whether the file holds anything of ours under a prefix."""
        return any(name.startswith(prefix) for name in self.ours)

    def called(self, ours: str) -> str:
        """What the file calls a tensor of ours, as far as that can be said."""
        return self.spelled.get(ours) or self.project.to_theirs(ours) or ours

    @property
    def has_decoder(self) -> bool:
        return self.has("decoder.blocks.")

    @property
    def sides(self) -> tuple[str, ...]:
        return ("encoder", "decoder") if self.has_decoder else ("encoder",)

    @property
    def is_classifier(self) -> bool:
        return self.has("head.") and not self.has_decoder

    def table(self, name: str) -> torch.Tensor | None:
        """A table [1, A + N, D] of the file by its plain name, as [A + N, D]. Raises: ValueError
        for another shape.
        """
        if name not in self.unknown:
            return None
        spelled = self.spelled[name]
        table = self.values(self.unknown[name], spelled)
        if table.dim() != 3 or len(table) != 1 or not table.numel():
            raise self.wrong(f"{spelled}: has shape {tuple(table.shape)}, no table of positions")
        return table[0]

    def wrong(self, text: str) -> ValueError:
        """The error that names the source."""
        return ValueError(f"{self.source.path}: {text}")
