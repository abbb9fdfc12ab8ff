"""How a configuration is declared as dataclasses, read from YAML, checked key by key, written and explained. config/ has the keys."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from video_mae.text import read_text
from video_mae.yaml_text import TAG, Loader, reason, refuse_interpolation, to_yaml

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


def parse(path: Path | None, overrides: Sequence[str], schema: type[Schema],
          presets: Mapping[str, Mapping[str, Any]] | None = None) -> Schema:
    """Defaults < `model.preset` (one of `presets`) < the file < dotted overrides, checked key by key.

    A text is what follows the = of an override, character by character; any other value is YAML. In YAML, too, what stands where a text
    belongs is one: no, 007, 1e3.
    Raises: ValueError with one line that names the file, the key, and the nearest valid key, the type or the range.
    """
    text = read_text(path) if path else ""
    try:
        values = _read_file(text, schema)
        for override in overrides:
            values = _merge(values, _read_override(override, schema))
        model = values.get("model")
        if presets and isinstance(model, dict) and (preset := model.pop("preset", None)) is not None:
            require(isinstance(preset, str) and preset in presets, "model.preset", preset, f"is not one of {', '.join(presets)}")
            values["model"] = {**presets[preset], **model}
        return _build(values, schema)
    except ValueError as error:
        raise ValueError(f"{f'{path}: ' if path else ''}{error}") from None


def read_keys(path: Path) -> dict[str, Any]:
    """What a configuration file says, whatever it is for. Raises: ValueError naming the file."""
    try:
        return _read_file(read_text(path), Any)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def save_config(config: Any, path: str | Path) -> None:
    """Writes a dataclass of knobs as YAML that `load_config` reads back to an equal object."""
    Path(path).write_text(to_yaml(asdict(config)), encoding="utf-8")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass of knobs as plain JSON-ready data (tuples as lists)."""
    return {f.name: to_dict(value) if is_dataclass(value) else list(value) if isinstance(value, tuple) else value
            for f in fields(config) for value in [getattr(config, f.name)]}


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"optim.micro_batch": 32, ...}: every knob with its dotted key."""
    flat: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        flat.update(flatten(value, f"{prefix}{f.name}.") if is_dataclass(value) else {f"{prefix}{f.name}": value})
    return flat


def from_dict(schema: type[Schema], values: dict[str, Any], where: str) -> Schema:
    """The inverse of `to_dict` for one flat section, as config.json stores it. Raises: ValueError naming `where` and the key."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {values!r} is not a mapping")
    try:
        return _build(values, schema)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def describe(schema: type) -> str:
    """Every key with its default and meaning, as `--help` prints it."""
    lines: list[str] = []
    for key, kind, f in _walk(schema, ""):
        if is_dataclass(kind):
            lines.append(f"\n{key}: {f.metadata['meaning']}")
        else:
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            choices = f" {{{' | '.join(str(a) for a in kind.__args__)}}}" if get_origin(kind) is Literal else ""
            lines.append(f"  {key} = {_yaml(default)}{choices}\n      {f.metadata['meaning']}")
    return "\n".join(lines)


def _walk(schema: type, prefix: str) -> Iterable[tuple[str, Any, dataclasses.Field[Any]]]:
    hints = get_type_hints(schema)
    for f in fields(schema):
        yield f"{prefix}{f.name}", hints[f.name], f
        if is_dataclass(hints[f.name]):
            yield from _walk(hints[f.name], f"{prefix}{f.name}.")  # pyright: ignore[reportArgumentType]
        elif named := _named_kind(hints[f.name]):
            yield from _walk(named, f"{prefix}{f.name}.NAME.")


def _named_kind(hint: Any) -> Any:
    """What a knob of type dict[str, dataclass] holds under each name, else None."""
    return get_args(hint)[1] if get_origin(hint) is dict and is_dataclass(get_args(hint)[1]) else None


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_yaml(item) for item in value)}]"
    if isinstance(value, str):
        return value or '""'
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _near(key: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(key, list(known), n=1)
    return f" (did you mean {match[0]}?)" if match else ""


def _build(values: dict[str, Any], schema: Any) -> Any:
    """The dataclass that the values of a section describe. Raises: ValueError for an unknown key, a wrong type, and then for a range."""
    return _make(_typed(values, schema, schema), schema)


def _make(knobs: dict[str, Any], schema: Any) -> Any:
    hints, made = get_type_hints(schema), dict[str, Any]()
    for key, value in knobs.items():
        if is_dataclass(hints[key]):
            made[key] = _make(value, hints[key])
        elif named := _named_kind(hints[key]):
            made[key] = {name: _make(part, named) for name, part in value.items()}
        else:
            made[key] = value
    return schema(**made)


def _typed(values: Any, schema: Any, root: type, prefix: str = "") -> dict[str, Any]:
    """The values with the types of their knobs. Raises: ValueError for an unknown key or a wrong type."""
    if not isinstance(values, dict):
        raise ValueError(f"{prefix[:-1]}: {_MAPPING}")
    hints, knobs = get_type_hints(schema), dict[str, Any]()
    for key, value in values.items():
        if key not in hints:
            everywhere = [name for name, _, _ in _walk(root, "")]
            elsewhere = next((f" (did you mean {name}?)" for name in everywhere if name.split(".")[-1] == key), "")
            raise ValueError(f"unknown key {prefix}{key}{elsewhere or _near(str(key), hints) or _near(f'{prefix}{key}', everywhere)}")
        hint, where = hints[key], f"{prefix}{key}"
        if is_dataclass(hint):
            knobs[key] = _typed(value, hint, root, f"{where}.")
        elif named := _named_kind(hint):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {_MAPPING}")
            knobs[key] = {str(name): _typed(part, named, root, f"{where}.{name}.") for name, part in value.items()}
        else:
            try:
                knobs[key] = _convert(value, hint)
            except (TypeError, ValueError, OverflowError):
                kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
                raise ValueError(f"{where}: {value!r} is not of type {kind}") from None
    return knobs


def _convert(value: Any, hint: Any) -> Any:
    """The value of a knob. Raises: TypeError, ValueError or OverflowError where it is of another type."""
    origin, of = get_origin(hint), get_args(hint)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in of):
            return value
    elif NoneType in of:
        return None if value is None else _convert(value, next(kind for kind in of if kind is not NoneType))
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = of[:1] * len(value) if of[-1] is Ellipsis else of
        return tuple(_convert(item, kind) for item, kind in zip(value, kinds, strict=True))
    elif origin is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return value
    elif hint is bool and value in (0, 1):
        return bool(value)
    elif hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return float(value)
    elif hint is int and isinstance(value, int | str) and not isinstance(value, bool):
        return int(value)
    elif hint is Any or (hint is str and isinstance(value, str)):
        return value
    raise TypeError


def _merge(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The values with those of `more`, which win; mappings are merged key by key."""
    merged = {**values}
    for key, value in more.items():
        before = values.get(key)
        merged[key] = _merge(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def _read_file(text: str, schema: Any) -> dict[str, Any]:
    """The keys of a file. Raises: ValueError."""
    try:
        refuse_interpolation(text)
        values = _load(text, schema, {})
    except yaml.YAMLError as error:
        raise ValueError(reason(error)) from None
    if not isinstance(values, dict):
        raise ValueError(f"the file {_MAPPING}, not {str(values)[:60]!r}")
    return values


def _read_override(override: str, schema: Any) -> dict[str, Any]:
    """{"optim": {"steps": 5}} of `optim.steps=5`. Raises: ValueError."""
    key, is_given, text = override.partition("=")
    names = key.split(".")
    if not is_given or not all(re.fullmatch(r"\w+", name) for name in names):
        raise ValueError(f"override `{override}` is not of the form key=value")
    hint = schema
    for name in names:
        hint = _inside(hint, name)
    try:
        value = text if hint is None or _is_text(hint) else _load(text, hint, "")
    except yaml.YAMLError as error:
        raise ValueError(f"{key}: {text[:100]!r} cannot be read as a value ({reason(error)}); put texts in it into quotes") from None
    if text == "null" and hint is not str and _is_text(hint):
        value = None
    for name in reversed(names[1:]):
        value = {name: value}
    return {names[0]: value}


def _load(text: str, hint: Any, empty: Any) -> Any:
    """A value of YAML for a knob or a section; `empty` where there is none. Raises: YAMLError."""
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return empty
        _keep_text(node, hint)
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("brackets in brackets without end") from None
    finally:
        loader.dispose()


def _keep_text(node: Any, hint: Any) -> None:
    """What YAML would take for a truth or a number stays as it is written where a text belongs."""
    if isinstance(node, yaml.ScalarNode):
        is_text = _is_text(hint) or (get_origin(hint) is Literal and isinstance(get_args(hint)[0], str))
        if is_text and node.tag in (f"{TAG}bool", f"{TAG}int", f"{TAG}float"):
            node.tag = f"{TAG}str"
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _keep_text(item, _inside(hint, ""))
    else:
        for key, value in node.value:
            _keep_text(value, _inside(hint, key.value))


def _is_text(hint: Any) -> bool:
    return hint is str or set(get_args(hint)) == {str, NoneType}


def _inside(hint: Any, name: str) -> Any:
    """The type of what a section, a dictionary or a list holds under a name; None where it holds nothing of that name."""
    if is_dataclass(hint):
        return get_type_hints(hint).get(name)
    if hint is Any:
        return Any
    of = get_args(hint)
    if NoneType in of:
        return _inside(next(kind for kind in of if kind is not NoneType), name)
    return {dict: of[-1:], tuple: of[:1]}.get(get_origin(hint), (None,))[0]  # pyright: ignore[reportArgumentType, reportCallIssue]
