"""YAML as configurations are written in it: what a plain word means, what is refused, texts that
come back as they were.
"""

import math
import re
from dataclasses import is_dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from yaml.constructor import ConstructorError

TAG = "tag:yaml.org,2002:"
UNUSED = (f"{TAG}timestamp", f"{TAG}value")
TAGS = {
    yaml.ScalarNode: [f"{TAG}{name}" for name in ("str", "null", "bool", "int", "float")],
    yaml.SequenceNode: [f"{TAG}seq"],
    yaml.MappingNode: [f"{TAG}map"],
}
MAX_DEPTH, MAX_VALUES = 50, 100_000
"""Of a file; the same values count again where an alias stands for them."""


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as everybody writes it, a date is a text, and a key is a text
    that stands once.
    """

    left = MAX_VALUES

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set[str]()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConstructorError(None, None, "found a key that is no text", key.start_mark)
            if key.value in seen:
                raise ConstructorError(
                    None, None, f"found duplicate key {key.value}", key.start_mark
                )
            seen.add(key.value)
        self.flatten_mapping(node)  # what << merges comes first, so that the mapping's own keys win
        return node

    def value(self, node: Any, hint: Any, depth: int = 0) -> Any:
        """What a node says to a section, a knob or an item of this type: a text stays as it is
        written, 007 or no.
        """
        self.left -= 1
        if depth > MAX_DEPTH or self.left < 0:
            raise ConstructorError(None, None, "brackets in brackets without end", node.start_mark)
        if node.tag not in TAGS[type(node)]:
            raise ConstructorError(None, None, f"{node.tag} is not supported here", node.start_mark)
        if isinstance(node, yaml.MappingNode):
            return {
                key.value: self.value(item, inside(hint, key.value), depth + 1)
                for key, item in node.value
            }
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, inside(hint, ""), depth + 1) for item in node.value]
        if node.tag != f"{TAG}null" and (
            is_text(hint) or (get_origin(hint) is Literal and isinstance(get_args(hint)[0], str))
        ):
            return node.value
        try:
            return self.construct_object(node)
        except (ValueError, KeyError):
            raise ConstructorError(
                None, None, f"{node.value[:50]} is no {node.tag.removeprefix(TAG)}", node.start_mark
            ) from None


class _Dumper(yaml.SafeDumper):
    """Writes what `load` reads back."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def is_text(hint: Any) -> bool:
    """Whether this type is that of a text, or null."""
    return without_none(hint) is str


def without_none(hint: Any) -> Any:
    """X of X | None, any other type itself."""
    return (
        next(kind for kind in get_args(hint) if kind is not NoneType)
        if NoneType in get_args(hint)
        else hint
    )


def inside(hint: Any, name: str) -> Any:
    """The type of what a section, a dictionary or a list holds under a name; None where it holds
    nothing of that name.
    """
    hint = without_none(hint)
    if is_dataclass(hint):
        return get_type_hints(hint).get(name)
    of = get_args(hint)
    if get_origin(hint) is dict:
        return of[1]
    return of[0] if get_origin(hint) is tuple else Any if hint is Any else None


def load(text: str, hint: Any, empty: Any) -> Any:
    """A value of YAML for a section or a knob of this type; `empty` where there is none. Raises:
    ValueError with one line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return empty if node is None else loader.value(node, hint)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        words = " ".join(str(getattr(error, "problem", None) or error).split()).replace(
            "'\\t'", "'\\t' (a tab: write blanks)"
        )
        raise ValueError(f"line {mark.line + 1}: {words}" if mark else words) from None
    except (OverflowError, RecursionError) as error:
        raise ValueError(f"not YAML: {error}") from None


def to_yaml(values: Any) -> str:
    """Plain data as YAML, in which every text comes back character by character."""
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
    # where it stands in double quotes, as `_represent_text` sees to
    return text.replace("${", r"\x24{")


def refuse_interpolation(text: str) -> None:
    """Raises: ValueError for `${...}`, which means something in the files of other projects, and
    would be taken as a text here.
    """
    for token in yaml.scan(text, _Loader):
        if (
            isinstance(token, yaml.ScalarToken)
            and "${" in text[token.start_mark.index : token.end_mark.index]
        ):
            raise ValueError(
                f'line {token.start_mark.line + 1}: `${{...}}` is not supported: write the value itself, or "\\x24{{" in '
                "double quotes for these characters in a text"
            )


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """In double quotes where a character may be changed, or not be held, by other styles."""
    style = '"' if "${" in text or not text.isprintable() else None
    return dumper.represent_scalar(f"{TAG}str", text, style)


_Dumper.add_representer(str, _represent_text)
for _kind in (_Loader, _Dumper):
    # YAML 1.1 wants a dot and a sign in 1e-3, and takes = for a word of its own.
    _kind.add_implicit_resolver(
        f"{TAG}float",
        re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
        list("-+0123456789."),
    )
    _kind.yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag not in UNUSED]
        for letter, resolvers in _kind.yaml_implicit_resolvers.items()
    }
