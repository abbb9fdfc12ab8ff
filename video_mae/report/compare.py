"""The stage that lays runs side by side on one page."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from video_mae.config.schema import Knobs, knob, require
from video_mae.files import say, write_whole
from video_mae.report.page import write_page
from video_mae.results import METRICS_FILE


class CompareConfig(Knobs):
    """`video-mae compare RUN RUN ... output=compare.html`."""

    output: str = knob("compare.html", "the page: one file, which may be sent to others")


def start(folders: Sequence[str], config: CompareConfig) -> int:
    """Writes the page of run folders, as the command line starts it. Raises: ValueError."""
    # which no run folder does, that it would replace
    require(config.output.endswith(".html"), "output", config.output, "must end with .html")
    require(len(folders) > 1, "RUN", ", ".join(folders), "is one run: name two or more")
    for folder in folders:
        files = [Path(folder, name).is_file() for name in ("metrics.jsonl", METRICS_FILE)]
        remedy = "holds neither metrics.jsonl nor metrics.json: name run folders"
        require(any(files), "RUN", folder, remedy)
    write = partial(write_page, template="compare.html", folders=list(map(Path, folders)))
    write_whole(Path(config.output), write)
    say(f"page {config.output}")
    return 0
