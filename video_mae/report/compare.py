"""The stage that lays runs side by side on one page."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from video_mae.config.schema import Knobs, knob, require
from video_mae.files import say, write_whole
from video_mae.report.page import write_page
from video_mae.report.record import read_run


class CompareConfig(Knobs):
    """`video-mae compare RUN RUN ... output=compare.html`."""

    output: str = knob("compare.html", "the page: one file, which may be sent to others")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.output.endswith(".html"), "output", self.output, "must end with .html")


def start(folders: Sequence[str], config: CompareConfig) -> int:
    """Writes the page of run folders, as the command line starts it. Raises: ValueError;
    FileNotFoundError naming a folder that is missing.
    """
    require(len(folders) > 1, "RUN", ", ".join(folders), "is one run: name two or more")
    runs = [read_run(Path(folder)) for folder in folders]
    for run in runs:
        require(
            bool(run.lines or run.metrics),
            "RUN",
            run.folder,
            "holds neither metrics.jsonl nor metrics.json: name run folders",
        )
    if len({run.name for run in runs}) < len(runs):
        runs = [run._replace(name=str(run.folder)) for run in runs]
    write = partial(write_page, template="compare.html", runs=runs)
    write_whole(Path(config.output), write)
    say(f"page {config.output}")
    return 0
