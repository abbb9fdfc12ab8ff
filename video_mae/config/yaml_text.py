"""YAML as configurations are written in it: what a plain word means, what is refused, texts that
come back as they were.
"""

import math
import re
from typing import Any

import yaml
from yaml import ScalarNode
from yaml.constructor import ConstructorError, SafeConstructor

TAG = "tag:yaml.org,2002:"
UNUSED = (f"{TAG}timestamp", f"{TAG}value")
TAGS = {
    ScalarNode: [f"{TAG}{name}" for name in ("str", "null", "bool", "int", "float")],
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
            if not isinstance(key, ScalarNode):
                raise _wrong("found a key that is no text", key)
            if key.value in seen:
                raise _wrong(f"found duplicate key {key.value}", key)
            seen.add(key.value)
        self.flatten_mapping(node)  # what << merges comes first, so that the mapping's own keys win
        return node

    def tree(self, node: Any, depth: int = 0) -> Any:
        """A node as dictionaries and lists, whose words are nodes still."""
        self.left -= 1
        if depth > MAX_DEPTH or self.left < 0:
            raise _wrong("brackets in brackets without end", node)
        if node.tag not in TAGS[type(node)]:
            raise _wrong(f"{node.tag} is not supported here", node)
        if isinstance(node, yaml.MappingNode):
            return {key.value: self.tree(item, depth + 1) for key, item in node.value}
        if isinstance(node, yaml.SequenceNode):
            return [self.tree(item, depth + 1) for item in node.value]
        return node


def _wrong(problem: str, node: yaml.Node) -> ConstructorError:
    return ConstructorError(None, None, problem, node.start_mark)


class _Dumper(yaml.SafeDumper):
    """Writes what `load` reads back."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def load(text: str) -> Any:
    """YAML as dictionaries and lists of words (`read_word`); None where there is nothing. Raises:
    ValueError with one line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else loader.tree(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        problem = problem.replace("'\\t'", "'\\t' (a tab: write blanks)")
        raise ValueError(f"line {mark.line + 1}: {problem}" if mark else problem) from None
    except (OverflowError, RecursionError) as error:
        raise ValueError(f"not YAML: {error}") from None


def read_word(word: ScalarNode, *, is_text: bool) -> Any:
    """What a word means: to a text it stays as it is written, 007 or no. Raises: ValueError."""
    if is_text and word.tag != f"{TAG}null":
        return word.value
    try:
        return SafeConstructor().construct_object(word)
    except (ValueError, KeyError):
        kind = word.tag.removeprefix(TAG)
        line = word.start_mark.line + 1
        raise ValueError(f"line {line}: {word.value[:50]} is no {kind}") from None


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
        written = text[token.start_mark.index : token.end_mark.index]
        if isinstance(token, yaml.ScalarToken) and "${" in written:
            raise ValueError(
                f"line {token.start_mark.line + 1}: `${{...}}` is not supported: write the value "
                'itself, or "\\x24{" in double quotes for these characters in a text'
            )


def _represent_text(dumper: yaml.SafeDumper, text: str) -> ScalarNode:
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
