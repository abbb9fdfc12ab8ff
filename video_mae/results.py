"""Where the results of a stage go: a folder with metrics.json, never written over results that were made in another way."""

import json
from pathlib import Path
from typing import Any

from video_mae.atomic import write_whole
from video_mae.text import as_read_back, json_text, unicode_text

METRICS_FILE = "metrics.json"
LIST_DIGEST = "list_sha256"
"""The setting that tells one list from another under the same name; earlier versions did not write it."""
AS_EARLIER = {"antialias": True}
"""What earlier versions did, and had no setting for."""


def choose_folder(output: str, model: str, name: str = "") -> Path:
    """The folder of the results: `output`, else the run folder that `model` is or lies in (and `name` there).

    Raises: ValueError where there is none.
    """
    if output:
        return Path(output)
    for folder in (Path(model), Path(model).absolute().parent):
        if (folder / "config.yaml").is_file():
            return folder / name
    raise ValueError(f"output: (empty), name a folder for the results, {model} is not part of a run folder")


def check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Raises: ValueError where the folder has results that were made with other settings (as `write_metrics` keeps them)."""
    file = folder / METRICS_FILE
    if not file.exists():
        return
    try:
        before = {**AS_EARLIER, LIST_DIGEST: settings.get(LIST_DIGEST), **json.loads(file.read_bytes())["settings"]}
        changes = ["another list of this name" if key == LIST_DIGEST else f"{key} = {before.get(key)}, now {value}"
                   for key, value in as_read_back(settings).items() if before.get(key) != value]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file}: is no result of this program; choose another output") from None
    if changes:
        raise ValueError(f"{file}: was made with {changes[0]}; choose another output, or remove it")


def write_metrics(folder: Path, settings: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Writes metrics.json: the settings, then the metrics. The same results give the same bytes."""
    write_text(folder / METRICS_FILE, json_text({"settings": settings, **metrics}, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""

    def write(unfinished: Path) -> None:
        unfinished.write_text(unicode_text(text), encoding="utf-8")

    write_whole(path, write)
