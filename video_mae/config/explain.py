"""The keys of a stage, explained: what `video-mae STAGE --help` prints."""

import json
from dataclasses import is_dataclass
from typing import Literal, get_args, get_origin

from video_mae.config.schema import Knobs, knobs_of, require, told_range, walk_keys


def describe(schema: type[Knobs], part: str = "all") -> str:
    """Keys with their defaults, choices or ranges, and meanings, as `--help` prints them: of all,
    of a section, of one key, or, where `part` is empty, of the ten that matter first. Raises:
    ValueError.
    """
    keys = list(knobs_of(schema))
    sections = dict.fromkeys(key.rpartition(".")[0] for key in keys)
    told = [key for key in keys if part in ("all", key) or key.startswith(f"{part}.")]
    if not part:
        told = schema.first_keys.split() or keys[:10]
    lines = list[str]()
    for key, hint, f, default in walk_keys(schema):
        if is_dataclass(hint) and part == "all":
            lines.append(f"\n{key}: {f.metadata['meaning']}")
        if key not in told:
            continue
        is_word = isinstance(default, str) and default
        line = f"  {key} = {default if is_word else json.dumps(default)}"
        if get_origin(hint) is Literal:
            line += f" {{{' | '.join(str(choice) for choice in get_args(hint))}}}"
        if limits := told_range(f):
            line += f" ({limits})"
        lines += [line, f"      {f.metadata['meaning']}"]
    more = ", ".join(["all", *filter(None, sections)])
    require(told != [] or not keys, "--help", part, f"is no key and no section; there are: {more}")
    lines.append(f"\n{len(told)} of {len(keys)} keys; --help with: {more}")
    return "\n".join(lines)
