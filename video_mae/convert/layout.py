"""How a project names its tensors, as rules that are read in both directions: their file to our
state dict, and back.

The letters of a rule's shape are solved for over all tensors of a file. That infers the
architecture, and a tensor that does not agree with the others is found by name. Letters: D encoder
width, E decoder width, H and G their MLP widths, C channels, t p p tubelet, P outputs of the
decoder's head, K classes. `*` in a name is the number of a block.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Rule(NamedTuple):
    """Tensors of ours and of theirs that hold the same values, one after the other along the first
    dimension.

    shape: of each of theirs, letters as above, "3D" for three times D, "a|b" for either; `reads`
    alone is not written on export.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    shape: str
    reads: bool = False


@dataclass(frozen=True, kw_only=True)
class Words:
    """A project's names inside a block. qkv and bias: one packed name, or those of query, key and
    value ("" has none).
    """

    norm1: str = "norm1"
    norm2: str = "norm2"
    qkv: tuple[str, ...] = ("attn.qkv.weight",)
    bias: tuple[str, ...] = ("attn.q_bias", "", "attn.v_bias")
    proj: str = "attn.proj"
    fc1: str = "mlp.fc1"
    fc2: str = "mlp.fc2"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A project's names. `spellings` brings the variants of a name to the one that the rules use,
    one regular expression after another.
    """

    project: str
    rules: tuple[Rule, ...]
    spellings: tuple[tuple[str, str], ...] = ()
    positions: tuple[str, ...] = ()

    def plain(self, name: str) -> str:
        """A name in the file as the rules have it."""
        for pattern, replacement in self.spellings:
            name = re.sub(pattern, replacement, name)
        return name


def same(ours: str, theirs: str, shape: str, reads: bool = False) -> Iterator[Rule]:
    """The rules of a layer's weight and bias; shape is the weight's, its first dimension the
    bias's.
    """
    yield Rule((f"{ours}.weight",), (f"{theirs}.weight",), shape, reads)
    yield Rule((f"{ours}.bias",), (f"{theirs}.bias",), shape.split()[0], reads)


def block_rules(
    ours: str, theirs: str, width: str, hidden: str, words: Words, *also: Words
) -> Iterator[Rule]:
    """The rules of all blocks under two prefixes; `also` are other spellings that are read, but not
    written.
    """
    biases = tuple(f"{ours}.attn.qkv.{part}_bias" for part in "qkv")
    for spelling in (words, *also):
        reads = spelling is not words
        yield from same(f"{ours}.norm1", f"{theirs}.{spelling.norm1}", width, reads)
        rows = width if len(spelling.qkv) == 3 else f"3{width}"
        yield Rule(
            (f"{ours}.attn.qkv.weight",),
            tuple(f"{theirs}.{name}" for name in spelling.qkv),
            f"{rows} {width}",
            reads,
        )
        if len(spelling.bias) == 1:
            yield Rule(biases, (f"{theirs}.{spelling.bias[0]}",), f"3{width}", reads)
        else:
            pairs = zip(biases, spelling.bias, strict=True)
            yield from (
                Rule((mine,), (f"{theirs}.{other}",), width, reads)
                for mine, other in pairs
                if other
            )
        yield from same(f"{ours}.attn.proj", f"{theirs}.{spelling.proj}", f"{width} {width}", reads)
        yield from same(f"{ours}.norm2", f"{theirs}.{spelling.norm2}", width, reads)
        yield from same(f"{ours}.mlp.0", f"{theirs}.{spelling.fc1}", f"{hidden} {width}", reads)
        yield from same(f"{ours}.mlp.2", f"{theirs}.{spelling.fc2}", f"{width} {hidden}", reads)
        yield from (
            Rule((f"{ours}.gamma_{number}",), (f"{theirs}.gamma_{number}",), width, reads)
            for number in "12"
        )


@dataclass(kw_only=True)
class Found:
    """What a layout makes of a file: our tensors (shapes still theirs), sizes by letter, and what
    no rule knows.
    """

    layout: Layout
    ours: dict[str, torch.Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    rest: dict[str, torch.Tensor] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)  # plain name -> name in the file
    used: int = 0

    def depth(self, blocks: str) -> int:
        """How many blocks there are under a prefix of ours."""
        return len(
            {
                name[len(blocks) :].split(".")[1]
                for name in self.ours
                if name.startswith(f"{blocks}.")
            }
        )

    def has(self, prefix: str) -> bool:
        """Whether the file holds anything of ours under a prefix."""
        return any(name.startswith(prefix) for name in self.ours)


def recognise(tensors: Mapping[str, torch.Tensor], layouts: Iterable[Layout], where: str) -> Layout:
    """The layout that explains most tensors. Raises: ValueError where none knows a block of the
    file.
    """
    best: tuple[int, Layout | None] = (0, None)
    for layout in layouts:
        known = {name for rule in layout.rules for name in rule.theirs}
        generic = [_generic(layout.plain(name)) for name in tensors]
        count = sum(name in known or name in layout.positions for name, _ in generic)
        if count > best[0] and any(number and name in known for name, number in generic):
            best = (count, layout)
    if best[1] is None:
        raise ValueError(
            f"{where}: holds no model that is known here; its first tensors are {', '.join(sorted(tensors)[:3])}"
        )
    return best[1]


def find(tensors: Mapping[str, torch.Tensor], layout: Layout, where: str) -> Found:
    """Applies the rules. Raises: ValueError naming a tensor whose shape or values cannot be, or
    that is missing beside its likes.
    """
    found = Found(layout=layout)
    numbers: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        plain = layout.plain(name)
        if plain in found.rest:
            raise ValueError(
                f"{where}: {name} and {found.spelled[plain]} are two tensors for one thing"
            )
        found.rest[plain], found.spelled[plain] = tensor, name
        generic, number = _generic(plain)
        numbers.setdefault(generic, []).append(number)
    for rule in layout.rules:
        for number in sorted(
            {number for name in rule.theirs for number in numbers.get(name, ())},
            key=lambda text: int(text or 0),
        ):
            _apply(rule, number, found, where)
    for side in ("encoder", "decoder"):
        blocks = {
            int(name.split(".")[2]) for name in found.ours if name.startswith(f"{side}.blocks.")
        }
        if blocks and max(blocks) >= len(blocks):
            gap = next(i for i in range(len(blocks) + 1) if i not in blocks)
            raise ValueError(
                f"{where}: block {gap} of the {side} is missing, but there is a block {max(blocks)}"
            )
    return found


def _apply(rule: Rule, number: str, found: Found, where: str) -> None:
    ours, theirs = (
        [name.replace("*", number) for name in names] for names in (rule.ours, rule.theirs)
    )
    missing = [name for name in theirs if name not in found.rest]
    if len(missing) == len(theirs):
        return  # another spelling of this rule has taken them
    if missing:
        there = next(name for name in theirs if name in found.rest)
        raise ValueError(f"{where}: {missing[0]} is missing, but {found.spelled[there]} is there")
    if any(name in found.ours for name in ours):
        raise ValueError(
            f"{where}: {found.spelled[theirs[0]]} comes on top of another tensor for the same thing"
        )
    values = []
    for name in theirs:
        here = f"{where}: {found.spelled[name]}"
        _solve(found.rest[name], rule.shape, found.sizes, here)
        values.append(readable(found.rest.pop(name), here))
    together = values[0] if len(values) == 1 else torch.cat(values)
    found.ours.update(zip(ours, together.chunk(len(ours)), strict=True))
    found.used += len(theirs)


def readable(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """The values in float32. Raises: ValueError where they are no weights: integers, NaN, infinite."""
    if tensor.dtype not in FLOATS:
        raise ValueError(
            f"{where}: is of {tensor.dtype}, not of floating point numbers that are read here"
        )
    values = tensor.float()
    if not bool(values.isfinite().all()):
        raise ValueError(f"{where}: holds values that are NaN or infinite")
    return values


def write(
    state: Mapping[str, torch.Tensor], rules: Iterable[Rule], sizes: Mapping[str, int]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(tensors by their names, our names that no rule writes)."""
    theirs: dict[str, torch.Tensor] = {}
    left = dict(state)
    numbers: dict[str, list[str]] = {}
    for name in state:
        generic, number = _generic(name)
        numbers.setdefault(generic, []).append(number)
    for rule in rules:
        for number in () if rule.reads else numbers.get(rule.ours[0], ()):
            ours = [name.replace("*", number) for name in rule.ours]
            if all(name in left for name in ours):
                values = torch.cat([left.pop(name).detach().flatten() for name in ours]).chunk(
                    len(rule.theirs)
                )
                shape = [_size(token, sizes) for token in rule.shape.split("|")[0].split()]
                theirs.update(
                    (name.replace("*", number), part.reshape(shape))
                    for name, part in zip(rule.theirs, values, strict=True)
                )
    return theirs, list(left)


def their_name(ours: str, layout: Layout) -> str:
    """What a project calls one of our tensors, for a message."""
    generic, number = _generic(ours)
    names = [rule.theirs[0] for rule in layout.rules if generic in rule.ours]
    return names[0].replace("*", number) if names else ours


def _generic(name: str) -> tuple[str, str]:
    """A name with * for the number of its block, and that number: `blocks.3.norm1.bias` is
    `blocks.*.norm1.bias`, "3".
    """
    match = re.search(r"\.(0|[1-9]\d*)\.", name)
    return (f"{name[: match.start(1)]}*{name[match.end(1) :]}", match[1]) if match else (name, "")


def _solve(tensor: torch.Tensor, shapes: str, sizes: dict[str, int], where: str) -> None:
    """Gives letters that are new their size, and holds the others against theirs."""
    options = [shape.split() for shape in shapes.split("|")]
    tokens = next((option for option in options if len(option) == tensor.dim()), None)
    agrees = tokens is not None and tensor.numel() > 0
    for token, size in zip(tokens or (), tensor.shape, strict=False):
        factor, letter = _parse(token)
        if letter and size % factor == 0:
            sizes.setdefault(letter, size // factor)
        agrees = agrees and size == _size(token, sizes)
    if not agrees:
        expected = " x ".join(str(_size(token, sizes) or token) for token in tokens or options[0])
        raise ValueError(
            f"{where}: has shape {tuple(tensor.shape)}, which does not fit the other tensors: {expected} is expected"
        )


def _parse(token: str) -> tuple[int, str]:
    """ "3D" as (3, "D"), "D" as (1, "D"), "1" as (1, "")."""
    digits = token.rstrip("DEHGCtpPK")
    return int(digits or 1), token[len(digits) :]


def _size(token: str, sizes: Mapping[str, int]) -> int:
    """The size of one dimension; 0 where its letter is not known."""
    factor, letter = _parse(token)
    return factor * sizes.get(letter, 0) if letter else factor
