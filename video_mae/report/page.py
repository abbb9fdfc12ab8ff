"""RUN/report.html and the page that compares runs: one file each, which asks the network for
nothing. What a page says stands in the templates beside this file.
"""

import base64
import glob
import io
import shlex
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from video_mae.files import JsonObject, draw_or_tell, json_text, unicode_text
from video_mae.report.answers import calibration, confusions, views, worst_mistakes
from video_mae.report.curves import COLORS, draw_curves
from video_mae.report.record import RunRecord, list_settings, read_run, summarize

COLUMNS = 4  # of an animation: original, visible, predicted, difference


def write_report(folder: Path, say: Callable[[str], None] = print) -> Path:
    """Writes report.html into a run folder, or one of an evaluation, and returns its path; where it
    cannot, one line says so: no run depends on its page.

    An earlier start of the run (--from-scratch renamed its folder) is drawn beside it.
    Raises: FileNotFoundError where the folder itself is missing.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run folder")
    before = Path(f"{folder.resolve()}.earlier_")
    earlier = sorted(before.parent.glob(f"{glob.escape(before.name)}*"))
    draw = partial(write_page, template="run.html", folders=[folder, *earlier[-1:]])
    draw_or_tell(folder / "report.html", draw, say)
    return folder / "report.html"


def write_page(page: Path, template: str, folders: Sequence[Path]) -> None:
    """Writes the page of the first of these run folders (run.html), or of them all (compare.html).
    Where two have the same name, they are called by their paths.
    """
    from jinja2 import Environment, FileSystemLoader
    from plotly.offline import get_plotlyjs

    runs = [read_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        runs = [run._replace(name=str(run.folder)) for run in runs]
    # autoescape: names of files and classes are nobody's HTML
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    )
    environment.filters |= {
        "date": lambda seconds: time.strftime("%d %B %Y, %H:%M %Z", time.localtime(seconds)),
        "duration": lambda seconds: str(timedelta(seconds=round(seconds))),
        "number": _number,
        "words": lambda value: value if isinstance(value, str) else json_text(value),
        "shell": shlex.quote,
    }
    text = environment.get_template(template).render(
        plotly=get_plotlyjs(),
        runs=[_told(run) for run in runs],
        curves=partial(draw_curves, runs),
        colors=COLORS,
        now=time.time(),
    )
    page.write_bytes(unicode_text(text).encode())


def _told(run: RunRecord) -> JsonObject:
    """What the templates know of a run."""
    answers = [row for row in run.answers if "predicted" in row]
    mistakes = [
        {**run.answers[number], "picture": _link(run.folder / "mistakes" / f"{number:08d}.jpg")}
        for number in worst_mistakes(run.answers)
    ]
    told: JsonObject = {
        "run": run,
        "sum": summarize(run),
        "settings": list_settings(run),
        "pictures": _pictures(run.folder / "reconstructions"),
        "mistakes": mistakes,
    }
    if answers and run.classes:
        told["confusions"] = confusions(answers, [row["class"] for row in run.classes])
        told["calibration"], told["views"] = calibration(answers), views(answers)
    return told


def _pictures(folder: Path) -> JsonObject:
    """The newest animation of a run, and stills of the middle of each clip: what it was, what was
    visible, and predictions after some steps. Of an earlier version its newest picture.
    """
    animations = sorted(folder.glob("step_*.webp"))
    if not animations:
        return {"whole": [_link(picture) for picture in sorted(folder.glob("*.png"))[-1:]]}
    last = len(animations) - 1
    num = min(6, len(animations))  # as many as fit beside one another
    chosen = [animations[i * last // max(num - 1, 1)] for i in range(num)]
    stills = [("original", animations[last], 0), ("visible", animations[last], 1)]
    stills += [(f"step {int(one.stem.split('_')[1]):,}", one, 2) for one in chosen]
    return {
        "animation": _link(animations[last]),
        "stills": [(title, _still(file, column)) for title, file, column in stills],
    }


def _still(animation: Path, column: int) -> str:
    """A column of an animation, halfway."""
    with Image.open(animation) as picture:
        picture.seek(getattr(picture, "n_frames", 1) // 2)
        width = picture.width // COLUMNS
        still = picture.convert("RGB").crop(
            (column * width, 0, (column + 1) * width, picture.height)
        )
    file = io.BytesIO()
    still.save(file, format="WEBP", quality=85)
    return _data("webp", file.getvalue())


def _link(picture: Path) -> str:
    """A picture as a link that holds it; "" where it is missing."""
    if not picture.is_file():
        return ""
    return _data(picture.suffix[1:].replace("jpg", "jpeg"), picture.read_bytes())


def _data(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _number(value: Any, form: str) -> str:
    """A value of a line of metrics, where null is what was not finite."""
    return "not finite" if value is None else format(value, form)
