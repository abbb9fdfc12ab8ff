"""YAML as configurations are written in it: what a plain word means, what is refused, texts that come back as they were."""

import math
import re
from typing import Any

import yaml

TAG = "tag:yaml.org,2002:"


class Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as everybody writes it, a date is a text, and a key stands once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise yaml.constructor.ConstructorError(None, None, f"found duplicate key {key}", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads back."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def to_yaml(values: Any) -> str:
    """Plain data as YAML, in which every text comes back character by character."""
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
    return text.replace("${", r"\x24{")  # where it stands in double quotes, as `_represent_text` sees to


def refuse_interpolation(text: str) -> None:
    """Raises: ValueError for `${...}`, which means something in the files of other projects, and would be taken as a text here."""
    for token in yaml.scan(text, Loader):
        if isinstance(token, yaml.ScalarToken) and "${" in text[token.start_mark.index: token.end_mark.index]:
            raise ValueError(f"line {token.start_mark.line + 1}: `${{...}}` is not supported: write the value itself, or \"\\x24{{\" in "
                             "double quotes for these characters in a text")


def reason(error: yaml.YAMLError) -> str:
    """What is wrong, in one line."""
    mark = getattr(error, "problem_mark", None)
    words = " ".join(str(getattr(error, "problem", None) or error).split())
    return f"line {mark.line + 1}: {words}" if mark else words


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """In double quotes where a character may be changed, or not be held, by other styles."""
    style = '"' if "${" in text or not text.isprintable() else None
    return dumper.represent_scalar(f"{TAG}str", text, style)


_Dumper.add_representer(str, _represent_text)
for _kind in (Loader, _Dumper):
    # YAML 1.1 wants a dot and a sign in 1e-3.
    _kind.add_implicit_resolver(f"{TAG}float", re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
                                list("-+0123456789."))
    _kind.yaml_implicit_resolvers = {letter: [(tag, pattern) for tag, pattern in resolvers if tag != f"{TAG}timestamp"]
                                     for letter, resolvers in _kind.yaml_implicit_resolvers.items()}
