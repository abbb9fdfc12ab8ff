"""How a project names its tensors: tables from our names to theirs, read in both directions.

The letters of a shape are solved for over all tensors of a file. That infers the architecture, and
a tensor that does not agree with the others is found by name. Letters: D encoder width, E decoder
width, H and G their MLP widths, C channels, t p p tubelet, P outputs of the decoder's head,
K classes. `*` in a name is the number of a block.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from video_mae.convert.foreign_files import Source

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Shapes by our names: of a layer that of its weight, whose first dimension is the bias's. "3D" is
# three times D, "a|b" either.
LAYERS = {
    "encoder.patch_embed": "D C t p p|D C p p",
    "encoder.norm": "D",
    "decoder.encoder_to_decoder": "E D",
    "decoder.norm": "E",
    "decoder.head": "P E",
    "fc_norm": "D",
    "head": "K D",
}
TOKENS = {
    "encoder.class_token": "1 1 D",
    "decoder.mask_token": "1 1 E",
    "decoder.class_token": "1 1 E",
}
BLOCK_LAYERS = {"norm1": "D", "attn.proj": "D D", "norm2": "D", "mlp.0": "H D", "mlp.2": "D H"}
BLOCK_VECTORS = ("attn.qkv.q_bias", "attn.qkv.k_bias", "attn.qkv.v_bias", "gamma_1", "gamma_2")
# Queries, keys and values: weights are together in our models, biases apart; files have both ways.
PACKED = {"attn.qkv.weight": "3D D", "attn.qkv.bias": "3D"}
APART = ("attn.qkv.q_weight", "attn.qkv.k_weight", "attn.qkv.v_weight")
OF_A_BLOCK = re.compile(r"(.+?)\.(0|[1-9]\d*)\.(.+)")


def _with_bias(layers: Mapping[str, str]) -> dict[str, str]:
    shapes = {f"{name}.weight": shape for name, shape in layers.items()}
    return {**shapes, **{f"{name}.bias": shape[0] for name, shape in layers.items()}}


def _all_shapes() -> dict[str, str]:
    shapes = {**_with_bias(LAYERS), **TOKENS}
    block = {**_with_bias(BLOCK_LAYERS), **PACKED}
    block.update(dict.fromkeys(BLOCK_VECTORS, "D"))
    block.update(dict.fromkeys(APART, "D D"))
    for name, shape in block.items():
        shapes[f"encoder.blocks.*.{name}"] = shape
        shapes[f"decoder.blocks.*.{name}"] = shape.replace("D", "E").replace("H", "G")
    return shapes


SHAPES = _all_shapes()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A project's names, by ours: of layers and tokens outside of blocks, of the lists of blocks,
    and of what is inside a block. `also`: other names inside, that are read.

    `spellings` brings the variants of a name to the one of the tables, one regular expression after
    another; `positions` are tables that may be there.
    """

    project: str
    outside: dict[str, str]
    blocks: dict[str, str]
    inside: dict[str, str]
    also: dict[str, str] = field(default_factory=dict)
    spellings: tuple[tuple[str, str], ...] = ()
    positions: tuple[str, ...] = ()

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
        ours = _translate(plain, *self._inverted)
        return ours if ours and shape_of(ours) else None

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
    if name in table or layer not in table:
        return table.get(name)
    return f"{table[layer]}.{part}"


def apart(query: str, key: str, value: str) -> dict[str, str]:
    """The table of layers that make queries, keys and values one by one."""
    table = {}
    for letter, layer in zip("qkv", (query, key, value), strict=True):
        table[f"attn.qkv.{letter}_weight"] = f"{layer}.weight"
        table[f"attn.qkv.{letter}_bias"] = f"{layer}.bias"
    return table


def shape_of(ours: str) -> str:
    """The letters of a tensor of ours; "" for what is none."""
    return SHAPES.get(OF_A_BLOCK.sub(r"\1.*.\3", ours), "")


def recognise(tensors: Iterable[str], layouts: Iterable[Layout], where: str) -> Layout:
    """The layout that explains most tensors. Raises: ValueError where none knows a block of the
    file.
    """
    most, best = 0, None
    for layout in layouts:
        names = [layout.plain(name) for name in tensors]
        known = [ours for ours in map(layout.to_ours, names) if ours]
        count = len(known) + sum(name in layout.positions for name in names)
        if count > most and any(".blocks." in ours for ours in known):
            most, best = count, layout
    if best is None:
        first = ", ".join(sorted(tensors)[:3])
        raise ValueError(
            f"{where}: holds no model that is known here; its first tensors are {first}"
        )
    return best


def _solve(tensor: torch.Tensor, shapes: str, sizes: dict[str, int], where: str) -> None:
    """Gives letters that are new their size, and holds the others against theirs. Raises:
    ValueError.
    """
    options = [shape.split() for shape in shapes.split("|")]
    letters = next((option for option in options if len(option) == tensor.dim()), [])
    for letter, size in zip(letters, tensor.shape, strict=False):
        factor = 3 if letter.startswith("3") else 1
        if letter != "1" and size % factor == 0:
            sizes.setdefault(letter[-1], size // factor)
    if not letters or not tensor.numel() or tuple(tensor.shape) != _shape(letters, sizes):
        letters = letters or options[0]
        pairs = zip(_shape(letters, sizes), letters, strict=True)
        expected = " x ".join(str(size or letter) for size, letter in pairs)
        raise ValueError(
            f"{where}: has shape {tuple(tensor.shape)}, which does not fit the other tensors: "
            f"{expected} is expected"
        )


def _shape(letters: Iterable[str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The sizes of dimensions; 0 where a letter is not known."""
    known = {"1": 1, **sizes}
    return tuple(known.get(x[-1], 0) * (3 if x.startswith("3") else 1) for x in letters)


@dataclass(kw_only=True)
class NamedTensors:
    """The tensors of a file by our names (their shapes still those of the file), sizes by letter,
    and what no table knows, by its plain name.
    """

    source: Source
    layout: Layout
    ours: dict[str, torch.Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, torch.Tensor] = field(default_factory=dict)
    # our name, or a plain name that is none -> name in the file
    spelled: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises: ValueError naming a tensor whose shape or values cannot be, or that is missing
        beside its likes.
        """
        for name, tensor in self.source.tensors.items():
            plain = self.layout.plain(name)
            ours = self.layout.to_ours(plain)
            key = ours or plain
            if key in self.spelled:
                raise self.wrong(f"{name} and {self.spelled[key]} are two tensors for one thing")
            self.spelled[key] = name
            if ours is None:
                self.unknown[plain] = tensor
                continue
            _solve(tensor, shape_of(ours), self.sizes, f"{self.source.path}: {name}")
            self.ours[ours] = self.values(tensor, name)
        for name in [name for name in self.ours if name.endswith(("_weight", "qkv.bias"))]:
            if name in self.ours:
                self._regroup(name.rpartition(".")[0])
        for side in ("encoder", "decoder"):
            blocks = self.blocks(side)
            for number in range(max(blocks, default=-1)):
                if number not in blocks:
                    raise self.wrong(
                        f"block {number} of the {side} is missing, but there is a block {max(blocks)}"
                    )

    def _regroup(self, qkv: str) -> None:
        """Weights of queries, keys and values together, biases apart."""
        weights = [f"{qkv}.{letter}_weight" for letter in "qkv"]
        biases = [f"{qkv}.{letter}_bias" for letter in "qkv"]
        missing = [name for name in weights if name not in self.ours]
        if len(missing) < 3:
            if missing:
                raise self.wrong(f"{self.called(missing[0])} is missing")
            self.ours[f"{qkv}.weight"] = torch.cat([self.ours.pop(name) for name in weights])
        together = self.ours.pop(f"{qkv}.bias", None)
        if together is not None:
            if any(name in self.ours for name in biases):
                raise self.wrong(f"{self.spelled[f'{qkv}.bias']} comes on top of another bias")
            self.ours.update(zip(biases, together.chunk(3), strict=True))

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
        return self.spelled.get(ours) or self.layout.to_theirs(ours) or ours

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
