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
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as work:
        building = Path(work) / "new"
        write(building)
        if path.is_dir():  # a file is replaced by the rename itself
            os.replace(path, Path(work) / "old")
        os.replace(building, path)
