"""How a configuration is declared as dataclasses, read from YAML, checked key by key, written and explained. config/ has the keys."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

Schema = TypeVar("Schema")


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

    Raises: ValueError with one line that names the file, the key, and the nearest valid key, the type or the range.
    """
    where = f"{path}: " if path else ""
    try:
        from_file = OmegaConf.load(path) if path else OmegaConf.create()
        if not OmegaConf.is_dict(from_file):
            raise ValueError("the file must hold `key: value` lines")
        for override in overrides:
            if not re.match(r"^[\w.]+=", override):
                raise ValueError(f"override `{override}` is not of the form key=value")
        from_user = OmegaConf.merge(from_file, OmegaConf.from_dotlist(
            [f"{override}''" if override.endswith("=") else override for override in overrides]))  # `key=` is the empty text, not null
        if "${" in OmegaConf.to_yaml(from_user):
            raise ValueError("`${...}` is not supported: write the value itself")
        has_preset = bool(presets) and "model" in from_user and OmegaConf.is_dict(from_user.model)
        preset = from_user.model.pop("preset", None) if has_preset else None
        mistake = _first_mistake(from_user, schema, schema)
        if mistake:
            raise ValueError(mistake)
        base = OmegaConf.structured(schema)
        if preset is not None:
            presets = presets or {}
            require(isinstance(preset, str) and preset in presets, "model.preset", preset, f"is not one of {', '.join(presets)}")
            base = OmegaConf.merge(base, {"model": presets[preset]})
        config = OmegaConf.to_object(OmegaConf.merge(base, from_user))
    except OmegaConfBaseException as error:
        reason = str(getattr(error, "msg", None) or error).strip().splitlines()[0]
        key = getattr(error, "full_key", None)
        raise ValueError(f"{where}{f'{key}: ' if key else ''}{reason}") from None
    except (ValueError, YAMLError, OSError) as error:  # OSError: OmegaConf's for a file that holds a bare number
        raise ValueError(f"{where}{' '.join(str(error).split())}") from None
    assert isinstance(config, schema)
    return config


def save_config(config: Any, path: str | Path) -> None:
    """Writes a dataclass of knobs as YAML that `load_config` reads back to an equal object."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


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
    mistake = _first_mistake(OmegaConf.create(values), schema, schema)
    if mistake:
        raise ValueError(f"{where}: {mistake}")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except (OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"{where}: {str(error).strip().splitlines()[0]}") from None
    assert isinstance(config, schema)
    return config


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


def _first_mistake(config: Any, schema: Any, root: type, prefix: str = "") -> str | None:
    """An unknown key or a value of a wrong type. OmegaConf finds these too, but does not name the key of every one."""
    hints = get_type_hints(schema)
    for key in config:
        if key not in hints:
            everywhere = [name for name, _, _ in _walk(root, "")]
            elsewhere = next((f" (did you mean {name}?)" for name in everywhere if name.split(".")[-1] == key), "")
            return f"unknown key {prefix}{key}{elsewhere or _near(str(key), hints) or _near(f'{prefix}{key}', everywhere)}"
        if is_dataclass(hints[key]):
            if not OmegaConf.is_dict(config[key]):
                return f"{prefix}{key}: must hold `key: value` lines"
            found = _first_mistake(config[key], hints[key], root, f"{prefix}{key}.")
            if found:
                return found
            continue
        if named := _named_kind(hints[key]):
            if not OmegaConf.is_dict(config[key]):
                return f"{prefix}{key}: must hold `key: value` lines"
            for name, value in config[key].items():
                if not OmegaConf.is_dict(value):
                    return f"{prefix}{key}.{name}: must hold `key: value` lines"
                found = _first_mistake(value, named, root, f"{prefix}{key}.{name}.")
                if found:
                    return found
            continue
        try:
            OmegaConf.merge(OmegaConf.structured(schema), {key: config[key]})
        except (OmegaConfBaseException, TypeError):
            kind = hints[key].__name__ if isinstance(hints[key], type) else str(hints[key]).replace("typing.", "")
            return f"{prefix}{key}: {config[key]!r} is not of type {kind}"
    return None
