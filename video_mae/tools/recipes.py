"""`video-mae recipes`: the configuration files that came along, by what their headers say."""

import os
import re
from pathlib import Path
from textwrap import fill

from video_mae.config.schema import Knobs

FOLDER = Path(__file__).parents[1].joinpath("configs").resolve()
TOLD = r"(?m)\A# .*|^# (?:Source|Data|Expected|Hardware): .*"


class RecipesConfig(Knobs):
    """`video-mae recipes`, which has no keys."""


def start(config: RecipesConfig) -> int:
    """Lists the recipes, as the command line starts it."""
    for file in sorted(FOLDER.glob("*/*.yaml")):
        print(os.path.relpath(file))
        # what a line of a header continues is indented
        header = re.sub(r"\n# {2,}", " ", file.read_text())
        for line in re.findall(TOLD, header):
            print(fill(line[2:], 95, initial_indent="  ", subsequent_indent="      "))
    return 0
