"""The documents as tests read them: pages, their blocks, the commands in these.

A block whose line before has `<!-- needs: what -->` wants what tests lack, and is parsed; any other
is run.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from video_mae.cli import ANSWERS, STAGES, _parse, schema_of
from video_mae.config.schema import knobs_of, parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("[be]*/README.md"),
    ]
)
BY_STRANGER = "docs/getting_started.md"  # whose blocks tests/test_stranger.py runs
BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>.+) -->\n)?^```(?P<language>.*)\n(?P<text>(?:.*\n)*?)^```$", re.M
)
INLINE = re.compile(r"(?<!`)`(video-mae [^`]+)`(?!`)")
OURS = re.compile(
    r"(?:(?:^|[;&|(] *)video-mae|-m video_mae|--module video_mae|slurm/run\.sbatch)(?=[\s)]|$)"
)


class MissingWordError(ValueError):
    """A command that is cut short, as texts have them."""


class Block(NamedTuple):
    """A fenced block: `needs` is what its mark says, "" where it has none."""

    page: str
    line: int
    language: str
    text: str
    needs: str

    @property
    def lines(self) -> list[str]:
        """The lines of a shell, continued ones joined, empty ones left out."""
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("language")) + 1
        needs = found["needs"] or ""
        yield Block(name_of(page), line, found["language"], found["text"], needs)


def words_of(command: str) -> list[list[str]]:
    """The arguments of each of our commands in a line of a shell."""
    found = []
    for start in OURS.finditer(command):
        lexer = shlex.shlex(command[start.end() :], posix=True, punctuation_chars=";&|()<>")
        lexer.whitespace_split = True
        words = list[str]()
        for word in lexer:
            if set(word) <= set(";&|()<>"):
                break
            words.append(word)
        found.append(words)
    return found


def check(words: list[str]) -> None:
    """Parses a command and resolves its configuration. Raises: ValueError for a mistake in it; with
    a file that is not one of the repository, only keys are known.
    """
    is_help = bool({"--help", "-h"} & set(words)) or not words or words[0] in ANSWERS
    if is_help:
        assert not words or words[0] in ANSWERS or words[0] in STAGES, words
        return
    try:
        name, path, _, overrides = _parse(words)
    except ValueError as error:
        kind = MissingWordError if " is missing; " in str(error) else ValueError
        raise kind(str(error)) from None
    is_ours = path is None or path.startswith("configs/")
    schema = schema_of(STAGES[name], str(ROOT / path) if path and is_ours else "")
    if not is_ours:
        for override in overrides:
            key, is_given, _ = override.partition("=")
            if not is_given or key not in knobs_of(schema):
                raise ValueError(f"{override} is no key of {name}")
        return
    parse(ROOT / path if path else None, overrides, schema)
