"""Every key of every stage refuses what makes no sense, in one line that names it: derived from the
schemas, so that a new key is tried too.
"""

from collections.abc import Iterator
from typing import Literal, get_args, get_origin

import pytest

from video_mae.cli import STAGES, _schema
from video_mae.config.schema import MOST, Knobs, _walk, _without_none, parse

HUGE = str(10**30)
ABSURD = {
    bool: ("7", "maybe", "1e30", "[true]"),
    int: (HUGE, f"-{HUGE}", "1.5", "nan", ".inf", "many", "[1]", "{a: 1}"),
    float: ("1e39", "-1e39", "1" + "0" * 400, ".nan", "-.inf", "much", "[1.0]", "{a: 1}"),
    str: (),
    Literal: ("7", "no such choice", "[auto]", ""),
    tuple: ("much", "[[1]]", "[.nan]", "[1e39]", "{a: 1}", f"[{HUGE}]"),
    dict: ("7", "text", "[1]"),
}


def schemas() -> dict[str, type[Knobs]]:
    return {stage.schema: _schema(stage) for stage in STAGES.values()}


def absurd(schema: type[Knobs]) -> Iterator[tuple[str, str]]:
    """(key, text) of all that must be refused."""
    for key, hint, _, _ in _walk(schema):
        kind = _without_none(hint)
        origin = get_origin(kind) or kind
        if isinstance(origin, type) and issubclass(origin, Knobs):
            yield from ((key, text) for text in ("7", "text", "[1]"))
            continue
        if origin is tuple and get_args(kind)[0] is str:
            yield from ((key, text) for text in ("text", "[[a]]", "{a: 1}"))
            continue
        yield from ((key.replace("NAME", "one"), text) for text in ABSURD[origin])


@pytest.mark.parametrize("name", sorted(schemas()))
def test_absurd_values_of_every_key_are_refused_in_one_line(name: str) -> None:
    schema, accepted = schemas()[name], list[str]()
    needed = [
        f"{key}=x"
        for key, _, f, default in _walk(schema)
        if f.metadata.get("filled") and default == ""
    ]
    for key, text in absurd(schema):
        try:
            parse(None, [*needed, f"{key}={text}"], schema)
            accepted.append(f"{key}={text[:40]}")
        except ValueError as error:
            said = str(error)
            assert key.split(".")[-1] in said, (key, text[:40], said)
            assert len(said.splitlines()) == 1
            assert len(said) < 700, said
    assert accepted == []


@pytest.mark.parametrize("name", sorted(schemas()))
def test_no_number_has_room_without_end(name: str) -> None:
    for key, hint, field, _ in _walk(schemas()[name]):
        bounds = field.metadata.get("bounds", {})
        if bounds.get("high", bounds.get("below", MOST)) > 2**63:
            assert hint in (float, tuple[float, float] | None), key
