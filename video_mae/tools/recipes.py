"""`video-mae recipes`: the configuration files that came along, by what their headers say."""

import os
import re
from pathlib import Path
from textwrap import fill

from video_mae.config.tools import NoKeys

FOLDER = Path(__file__).parents[1].joinpath("configs").resolve()


def start(config: NoKeys) -> int:
    """Lists the recipes, as the command line starts it."""
    for file in sorted(FOLDER.glob("*/*.yaml")):
        print(os.path.relpath(file))
        items = header(file)
        texts = [items[""]]
        for name in ("Source", "Data", "Expected", "Hardware", "Status"):
            texts.append(f"{name}: {items[name]}")
        for text in texts:
            print(fill(text, 95, initial_indent="  ", subsequent_indent="      "))
    return 0


def header(file: Path) -> dict[str, str]:
    """What the header of a recipe says: its title, under "", and its items, each on one line."""
    head = file.read_text().split("\n\n")[0]
    # what a line continues is indented
    lines = re.sub(r"\n# {2,}", " ", head)
    # of what has no name, the title comes first
    return dict(reversed(re.findall(r"(?m)^# (?:([A-Z]\w+): )?(.*)", lines)))
