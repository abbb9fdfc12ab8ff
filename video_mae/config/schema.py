"""How a configuration is declared as dataclasses, read from YAML, checked key by key, written and
explained. config/ has the keys.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from video_mae.config.yaml_text import (
    inside,
    is_text,
    load,
    refuse_interpolation,
    to_yaml,
    without_none,
)
from video_mae.files import one_line, read_text

Schema = TypeVar("Schema")
_MAPPING = "must hold `key: value` lines"


def knob(default: Any, meaning: str) -> Any:
    """A field with its one-line meaning, which `video-mae STAGE --help` prints."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"meaning": meaning})
    return field(default=default, metadata={"meaning": meaning})


def section(kind: type, meaning: str) -> Any:
    """A field that holds another dataclass of knobs."""
    return field(default_factory=kind, metadata={"meaning": meaning})


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raises: ValueError `key: value remedy` unless the condition holds."""
    if not condition:
        raise ValueError(f"{key}: {value} {remedy}")


def parse(
    path: Path | None,
    overrides: Sequence[str],
    schema: type[Schema],
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Schema:
    """Defaults < `model.preset` (one of `presets`) < the file < dotted overrides, checked key by
    key.

    A text is what follows the = of an override, character by character; any other value is YAML. In
    YAML, too, what stands where a text belongs is one: no, 007, 1e3.
    Raises: ValueError with one line that names the file, the key, and the nearest valid key, the
    type or the range.
    """
    text = read_text(path) if path else ""
    with _naming(f"{path}: " if path else ""):
        values = _read_file(text, schema)
        for override in overrides:
            values = _merge(values, _read_override(override, schema))
        model = values.get("model")
        if (
            presets
            and isinstance(model, dict)
            and (preset := model.pop("preset", None)) is not None
        ):
            require(
                isinstance(preset, str) and preset in presets,
                "model.preset",
                preset,
                f"is not one of {', '.join(presets)}",
            )
            values["model"] = {**presets[preset], **model}
        return _build(values, schema, schema)


def read_keys(path: Path) -> dict[str, Any]:
    """What a configuration file says, whatever it is for. Raises: ValueError naming the file."""
    text = read_text(path)
    with _naming(f"{path}: "):
        return _read_file(text, Any)


def save_config(config: Any, path: str | Path) -> None:
    """Writes a dataclass of knobs as YAML that `load_config` reads back to an equal object."""
    Path(path).write_text(to_yaml(asdict(config)), encoding="utf-8")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass of knobs as plain JSON-ready data (tuples as lists)."""
    return json.loads(json.dumps(asdict(config)))


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"optim.micro_batch": 32, ...}: every knob with its dotted key."""
    flat: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        flat.update(
            flatten(value, f"{prefix}{f.name}.")
            if is_dataclass(value)
            else {f"{prefix}{f.name}": value}
        )
    return flat


def from_dict(schema: type[Schema], values: dict[str, Any], where: str) -> Schema:
    """The inverse of `to_dict` for one flat section, as config.json stores it. Raises: ValueError
    naming `where` and the key.
    """
    with _naming(f"{where}: "):
        return _build(values, schema, schema)


def describe(schema: type) -> str:
    """Every key with its default and meaning, as `--help` prints it."""
    lines: list[str] = []
    for key, kind, f in _walk(schema, ""):
        if is_dataclass(kind):
            lines.append(f"\n{key}: {f.metadata['meaning']}")
        else:
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            shown = default if default and isinstance(default, str) else json.dumps(default)
            choices = (
                f" {{{' | '.join(str(a) for a in kind.__args__)}}}"
                if get_origin(kind) is Literal
                else ""
            )
            lines.append(f"  {key} = {shown}{choices}\n      {f.metadata['meaning']}")
    return "\n".join(lines)


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Puts `where` before what is wrong inside, which is one line then."""
    try:
        yield
    except ValueError as error:
        raise ValueError(one_line(f"{where}{error}")) from None


def _walk(schema: Any, prefix: str) -> Iterable[tuple[str, Any, dataclasses.Field[Any]]]:
    """Every key, its type and its field; NAME stands for the names of a dictionary of sections."""
    hints = get_type_hints(schema)
    for f in fields(schema):
        key, hint = f"{prefix}{f.name}", hints[f.name]
        yield key, hint, f
        if get_origin(hint) is dict:
            key, hint = f"{key}.NAME", inside(hint, "NAME")
        if is_dataclass(hint):
            yield from _walk(hint, f"{key}.")


def _build(values: Any, schema: Any, root: Any, where: str = "") -> Any:
    """The dataclass that the values of the section `where` describe. Raises: ValueError for an
    unknown key, a wrong type, a range.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where and f'{where}: '}{_MAPPING}")
    hints, prefix = get_type_hints(schema), f"{where}." if where else ""
    for key in values:
        if key not in hints:
            everywhere = [name for name, _, _ in _walk(root, "")]
            near = (
                [name for name in everywhere if name.split(".")[-1] == key]
                or get_close_matches(key, hints, 1)
                or get_close_matches(f"{prefix}{key}", everywhere, 1)
            )
            raise ValueError(
                f"unknown key {prefix}{key}" + (f" (did you mean {near[0]}?)" if near else "")
            )
    return schema(
        **{
            key: _convert(value, hints[key], root, f"{prefix}{key}")
            for key, value in values.items()
        }
    )


def _convert(value: Any, hint: Any, root: Any, where: str) -> Any:
    """The value as the type of the knob `where` has it. Raises: ValueError where it is of another
    type.
    """
    origin, of = get_origin(hint), get_args(hint)
    if NoneType in of:
        return None if value is None else _convert(value, without_none(hint), root, where)
    if is_dataclass(hint):
        return _build(value, hint, root, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {_MAPPING}")
        return {
            name: _convert(part, of[1], root, f"{where}.{name}") for name, part in value.items()
        }
    if origin is tuple and isinstance(value, list | tuple):
        kinds = of[:1] * len(value) if of[-1] is Ellipsis else of
        if len(kinds) == len(value):
            return tuple(
                _convert(item, kind, root, where) for item, kind in zip(value, kinds, strict=True)
            )
    is_choice = origin is Literal and any(
        type(value) is type(choice) and value == choice for choice in of
    )
    if is_choice or hint is Any or (hint is str and isinstance(value, str)):
        return value
    if hint is bool and value in (0, 1):
        return bool(value)
    if hint in (int, float) and isinstance(value, int | str | hint) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            return hint(value)
    kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise ValueError(f"{where}: {value!r:.100} is not of type {kind}")


def _merge(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The values with those of `more`, which win; mappings are merged key by key."""
    merged = {**values, **more}
    for key in values.keys() & more.keys():
        if isinstance(values[key], dict) and isinstance(more[key], dict):
            merged[key] = _merge(values[key], more[key])
    return merged


def _read_file(text: str, schema: Any) -> dict[str, Any]:
    """The keys of a file. Raises: ValueError."""
    values = load(text, schema, {})
    refuse_interpolation(text)
    if not isinstance(values, dict):
        raise ValueError(f"the file {_MAPPING}, not {str(values)[:60]!r}")
    return values


def _read_override(override: str, schema: Any) -> dict[str, Any]:
    """{"optim": {"steps": 5}} of `optim.steps=5`. Raises: ValueError."""
    key, is_given, text = override.partition("=")
    names = key.split(".")
    if not is_given or not all(re.fullmatch(r"\S+", name) for name in names):
        raise ValueError(f"override `{override}` is not of the form key=value")
    hint = schema
    for name in names:
        hint = inside(hint, name)
    value: Any = text
    if text == "null" and hint is not str and is_text(hint):
        value = None
    elif hint is not None and not is_text(hint):
        try:
            value = load(text, hint, "")
        except ValueError as error:
            raise ValueError(
                f"{key}: {text[:100]!r} cannot be read as a value ({error}); put texts in it into quotes"
            ) from None
    for name in reversed(names[1:]):
        value = {name: value}
    return {names[0]: value}
