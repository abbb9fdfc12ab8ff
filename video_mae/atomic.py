"""Files and folders that are written whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` make a file or folder aside, then puts it in its place, instead of an earlier one.

    Where `write` raises, what was there before is left as it is, and nothing else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=path.parent) as work:  # short: a name has 255 bytes
        building = Path(work) / "new"
        write(building)
        if path.is_dir():  # a file is replaced by the rename itself
            os.replace(path, Path(work) / "old")
        os.replace(building, path)


def draw_or_tell(path: Path, draw: Callable[[Path], None], say: Callable[[str], None] = print) -> None:
    """Lets `draw` write a picture, whole or not at all; where it cannot, one line says so: no figure and no run depends on a picture."""
    try:
        write_whole(path, draw)
    except Exception as error:  # of a library that draws, or the disk
        say(f"{path}: could not be drawn, all else is there ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
