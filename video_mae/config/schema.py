"""How a configuration is declared as dataclasses, read from YAML, checked key by key, written and
explained. config/ has the keys.
"""

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import NoneType
from typing import (
    Any,
    ClassVar,
    Literal,
    TypeVar,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from video_mae.config.yaml_text import (
    MAX_VALUES,
    ScalarNode,
    load,
    read_word,
    refuse_interpolation,
    to_yaml,
)
from video_mae.files import JsonObject, as_read_back, one_line, read_text, write_text

Schema = TypeVar("Schema")
BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "low": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "high": (operator.le, "at most"),
    "below": (operator.lt, "below"),
    "multiple_of": (lambda value, unit: value % unit == 0, "a multiple of"),
}
"""How the range of a knob is written in Python, what it asks, and how it is told."""
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
"""How the types of values are told to people."""
MOST = 10**9
"""What no number is above whose range does not say more: no count, interval or factor is."""
MOST_SIZE = 65_536
"""Of a batch in clips or videos, of a picture in pixels, of a video in frames."""


def knob(default: Any, meaning: str, *, filled: bool = False, **bounds: float) -> Any:
    """A field with its one-line meaning, which `video-mae STAGE --help` prints, and its range.

    bounds: of BOUNDS, `low=1`; for each value where there are several. filled: it must not be
    empty.
    """
    metadata = {"meaning": meaning, "filled": filled, "bounds": bounds}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type, meaning: str, **defaults: Any) -> Any:
    """A field that holds other knobs; `defaults` are those that are not as the section has them."""
    return field(default_factory=partial(kind, **defaults), metadata={"meaning": meaning})


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raises: ValueError `key: value remedy` unless the condition holds."""
    if not condition:
        raise ValueError(f"{key}: {value!s:.300} {remedy}")


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Knobs:
    """The knobs of a stage, or of a section of it: what derives from this is a dataclass, frozen
    and keyword-only.

    Each value is within its knob's range; what ties two knobs is checked in a `__post_init__` of
    their class. A section's errors name its own keys: what reads a file puts the section before
    them.
    """

    first_keys: ClassVar[str] = ""
    """Those that `--help` explains; empty: the first ten."""
    preset_values: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """{name: {knob: value}}: what the key `preset` of a section sets that the file does not."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        """Raises: ValueError naming a knob out of its range."""
        for f in fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, f.name)
            if f.metadata.get("filled"):
                require(value not in ("", ()), f.name, "(empty)", "must be given")
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float):
                    bounds = f.metadata["bounds"]
                    for name, bound in bounds.items():
                        is_met, _ = BOUNDS[name]
                        require(is_met(number, bound), f.name, value, f"must be {told_range(f)}")
                    most = max([MOST, *bounds.values()])
                    remedy = f"must be finite, and at most {most:.0e} in size"
                    require(abs(number) <= most, f.name, value, remedy)


def told_range(f: Field[Any]) -> str:
    """The range of a knob as people are told it, "" where there is none."""
    parts = [f"{BOUNDS[name][1]} {bound}" for name, bound in f.metadata["bounds"].items()]
    if parts and f.default is None:
        parts.append("or null")
    return ", ".join(parts)


def parse(
    path: str | Path | None,
    overrides: Sequence[str],
    schema: type[Schema],
) -> Schema:
    """Defaults < a section's `preset` < the file's `base` < the file < dotted overrides, checked
    key by key.

    base: another file, named from the folder of this one, which has none itself.
    A text is what follows the = of an override, character by character; any other value is YAML. In
    YAML, too, what stands where a text belongs is one: no, 007, 1e3.
    Raises: FileNotFoundError; ValueError with one line that names the file, the key, and the
    nearest valid key, the type or the range.
    """
    text, of_file, of_command = "", "", ""
    if path is not None:
        text, of_file, of_command = _text_of(Path(path)), f"{path}: ", "command line: "
    with _naming(of_file):
        values = _read_file(text)
        if path is not None and "base" in values:
            values = _over_base(values, Path(path), schema)
    written = values
    with _naming(of_command):
        for override in overrides:
            values = _merge(values, _read_override(override, schema))
    try:
        return _typed(values, schema, "")
    except ValueError as error:
        # the file is to blame for what is wrong without the overrides as well
        is_of_file = not overrides or _complaint(written, schema) == str(error)
        raise ValueError(one_line(f"{of_file if is_of_file else of_command}{error}")) from None


def _complaint(values: JsonObject, schema: Any) -> str:
    try:
        _typed(values, schema, "")
    except ValueError as error:
        return str(error)
    return ""


def read_keys(path: Path) -> JsonObject:
    """What a configuration file says, whatever it is for. Raises: ValueError naming the file."""
    text = _text_of(path)
    with _naming(f"{path}: "):
        return _typed(_read_file(text), Any, "")


def save_config(config: Any, path: str | Path) -> None:
    """Writes a dataclass of knobs, whole or not at all, as YAML that `load_config` reads back to an
    equal object.
    """
    write_text(Path(path), to_yaml(asdict(config)))


def to_dict(config: Any) -> JsonObject:
    """A dataclass of knobs as plain JSON-ready data (tuples as lists)."""
    return as_read_back(asdict(config))


def from_dict(schema: type[Schema], values: JsonObject, where: str, section: str = "") -> Schema:
    """The inverse of `to_dict`, as config.json stores it, of one of its sections. Raises:
    ValueError naming `where` and the key.
    """
    with _naming(f"{where}: "):
        return _typed(values, schema, section)


def flatten(config: Any, prefix: str = "") -> JsonObject:
    """{"optim.micro_batch": 32, ...}: every knob with its dotted key."""
    flat: JsonObject = {}
    for f in fields(config):
        key, value = f"{prefix}{f.name}", getattr(config, f.name)
        if is_dataclass(value):
            flat.update(flatten(value, f"{key}."))
        else:
            flat[key] = value
    return flat


def knobs_of(schema: type) -> dict[str, tuple[Any, str]]:
    """{"optim.micro_batch": (32, "videos that ..."), ...}: every knob's default and meaning."""
    return {
        key: (default, f.metadata["meaning"])
        for key, hint, f, default in walk_keys(schema)
        if not is_dataclass(hint)
    }


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Puts `where` before what is wrong inside, which is one line then."""
    try:
        yield
    except ValueError as error:
        raise ValueError(one_line(f"{where}{error}")) from None


def walk_keys(
    schema: Any, prefix: str = "", made: Any = None
) -> Iterator[tuple[str, Any, Field[Any], Any]]:
    """Every key, its type, field and default, which a section that is `made` may have changed; NAME
    stands for the names of a dictionary of sections.
    """
    hints = get_type_hints(schema)
    for f in fields(schema):
        key, hint = f"{prefix}{f.name}", hints[f.name]
        default = f.default if f.default_factory is MISSING else f.default_factory()
        yield key, hint, f, getattr(made, f.name, default)
        if is_dataclass(hint):
            yield from walk_keys(hint, f"{key}.", default)
        elif get_origin(hint) is dict and is_dataclass(get_args(hint)[1]):
            yield from walk_keys(get_args(hint)[1], f"{key}.NAME.")


def _typed(value: Any, hint: Any, where: str, root: Any = None, make: Any = None) -> Any:
    """What a file says about the section or knob `where`, as its type has it.

    root: the schema of the whole file, whose keys are searched for one that is meant. make: makes
    a section of its values.
    Raises: ValueError for an unknown key, a wrong type, a range.
    """
    kind = _without_none(hint)
    origin, parts = get_origin(kind), get_args(kind)
    if isinstance(value, ScalarNode):
        is_text = kind is str or (origin is Literal and isinstance(parts[0], str))
        with _naming(f"{where}: "):
            value = read_word(value, is_text=is_text)
    if isinstance(value, list) and len(value) > MAX_VALUES:
        raise ValueError(f"{where}: holds more than {MAX_VALUES} values")
    if value is None and kind is not hint:
        return None
    if is_dataclass(kind):
        return _section(value, kind, where, root or kind, make or kind)
    if isinstance(value, dict) and (origin is dict or kind is Any):
        of = parts[1] if parts else Any
        return {name: _typed(item, of, f"{where}.{name}", root) for name, item in value.items()}
    if origin is dict:
        raise ValueError(f"{where}: must hold `key: value` lines")
    if isinstance(value, list) and kind is Any:
        return [_typed(item, Any, where) for item in value]
    if origin is tuple and isinstance(value, list | tuple):
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        if len(kinds) == len(value):
            pairs = zip(value, kinds, strict=True)
            return tuple(_typed(item, of, where) for item, of in pairs)
    if kind is Any or (kind is str and isinstance(value, str)):
        return value
    if origin is Literal and value in parts and type(value) in map(type, parts):
        return value
    if kind is bool and value in (0, 1):
        return bool(value)
    if kind in (int, float) and isinstance(value, int | str | kind) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            return kind(value)
    said = _typed(value, Any, where)
    raise ValueError(
        f"{where}: {'null' if said is None else repr(said):.100} is not {_in_words(hint)}"
    )


def _in_words(hint: Any) -> str:
    """A type as people call it."""
    kind = _without_none(hint)
    said = KINDS.get(kind, "a list like [1, 2]")
    if get_origin(kind) is Literal:
        said = f"one of {', '.join(map(str, get_args(kind)))}"
    return said if kind is hint else f"{said}, or null"


def _section(values: Any, schema: Any, where: str, root: Any, make: Any) -> Any:
    prefix = f"{where}." if where else ""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: must hold `key: value` lines")
    if "preset" in values and schema.preset_values:
        names = Literal[(*schema.preset_values, None)]
        name = _typed(values["preset"], names, f"{prefix}preset")
        values = {**schema.preset_values.get(name, {}), **values}
        del values["preset"]
    hints = get_type_hints(schema)
    by_name = {f.name: f for f in fields(schema)}
    for key in values:
        if key not in by_name:
            # the same name in another section, else a similar one
            everywhere = [known for known, *_ in walk_keys(root)]
            near = [known for known in everywhere if known.split(".")[-1] == key]
            near += get_close_matches(key, by_name, 1)
            near += get_close_matches(f"{prefix}{key}", everywhere, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            # of another stage, which shares a base as pretrain and finetune do
            if not prefix and schema.__base__ is not Knobs:
                for stage in schema.__base__.__subclasses__():
                    if key in stage.__dataclass_fields__ and stage.first_keys:
                        hint = f" (it is one of `video-mae {stage.__name__[:-6].lower()}`)"
            raise ValueError(f"unknown key {prefix}{key}{hint}")
    made = {}
    for key, value in values.items():
        factory = by_name[key].default_factory
        make_part = None if factory is MISSING else factory
        made[key] = _typed(value, hints[key], f"{prefix}{key}", root, make_part)
    with _naming(prefix):
        return make(**made)


def _without_none(hint: Any) -> Any:
    """X of X | None, any other type itself."""
    parts = get_args(hint)
    return parts[0] if NoneType in parts else hint


def _type_of(schema: Any, names: Sequence[str]) -> Any:
    """The type of the knob of a dotted key; None where there is no such knob."""
    hint = schema
    for name in names:
        if is_dataclass(hint):
            hint = get_type_hints(hint).get(name)
        elif get_origin(hint) is dict:
            hint = get_args(hint)[1]
        elif hint is not Any:
            return None
    return hint


def _merge(values: JsonObject, more: JsonObject) -> JsonObject:
    """The values with those of `more`, which win; mappings are merged key by key."""
    merged = {**values, **more}
    for key in values.keys() & more.keys():
        if isinstance(values[key], dict) and isinstance(more[key], dict):
            merged[key] = _merge(values[key], more[key])
    return merged


def _read_file(text: str) -> JsonObject:
    """The keys of a file. Raises: ValueError."""
    values = load(text)
    refuse_interpolation(text)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"the file must hold `key: value` lines, not {text.strip()[:60]!r}")
    return values


def _text_of(file: Path) -> str:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such configuration file")
    return read_text(file)


def _over_base(values: JsonObject, file: Path, schema: Any) -> JsonObject:
    """The keys of a file over those of the one that it names as its `base`. Raises:
    FileNotFoundError; ValueError.
    """
    base = file.parent / _typed(values.pop("base"), str, "base")
    with _naming(f"{base}: "):
        below = _read_file(_text_of(base))
        if "base" in below:
            raise ValueError(f"base: is itself the base of {file}, and may not have another one")
    parse(base, (), schema)  # what is wrong in it is told by its name
    return _merge(below, values)


def _read_override(override: str, schema: Any) -> JsonObject:
    """{"optim": {"steps": 5}} of `optim.steps=5`. Raises: ValueError."""
    key, is_given, text = override.partition("=")
    names = key.split(".")
    if not is_given or not all(re.fullmatch(r"\S+", name) for name in names):
        raise ValueError(f"override `{override}` is not of the form key=value")
    hint = _type_of(schema, names)
    is_text = hint is None or _without_none(hint) is str
    value: Any = text
    if is_text and text == "null" and hint is not str:
        value = None
    elif not is_text:
        with _naming(f"{key}: {text[:100]!r} cannot be read, put texts in it into quotes: "):
            tree = load(text)
        value = text if tree is None else tree
    for name in reversed(names):
        value = {name: value}
    return value
