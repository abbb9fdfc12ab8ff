"""Folders of results: where they are, and with which settings they were made."""

import json
from pathlib import Path

from video_mae.files import JsonObject, as_read_back, check_folder, write_json

METRICS_FILE = "metrics.json"
LIST_DIGEST = "list_sha256"
"""The setting that tells one list from another under the same name; earlier versions did not write
it.
"""


def choose_folder(output: str, model: str, name: str = "") -> Path:
    """The folder of the results: `output`, else the run folder that `model` is or lies in (and
    `name` there).

    Raises: ValueError where there is none.
    """
    if output:
        return Path(output)
    for folder in (Path(model), Path(model).absolute().parent):
        if (folder / "config.yaml").is_file():
            return folder / name
    raise ValueError(
        f"output: (empty), name a folder for the results, {model} is not part of a run folder"
    )


def check_made_with(
    file: Path, settings: JsonObject, earlier: JsonObject | None = None, section: str = ""
) -> None:
    """A folder that a stage writes is new, or `file` in it holds these very settings.

    earlier: what earlier versions did, and had no setting for. section: of the file, which holds
    the settings; "" is all of it.
    Raises: ValueError naming what is there, and the remedy.
    """
    folder = file.parent
    check_folder(folder)
    if file.is_file():
        remedy = "choose another folder, or remove this one"
        _check_settings(file, settings, earlier or {}, section, remedy)
    # What a stopped writer leaves is hidden.
    elif folder.exists() and any(path.name[0] != "." for path in folder.iterdir()):
        raise ValueError(f"{folder}: is not empty and has no {file.name}; choose another folder")


def check_results(folder: Path, settings: JsonObject) -> None:
    """Raises: ValueError where the folder has a metrics.json that was made with other settings."""
    check_folder(folder)
    file = folder / METRICS_FILE
    if file.exists():
        # what earlier versions did, and had no setting for
        earlier = {"antialias": True, LIST_DIGEST: settings.get(LIST_DIGEST)}
        remedy = "choose another output, or remove it"
        _check_settings(file, settings, earlier, "settings", remedy)


def _check_settings(
    file: Path, settings: JsonObject, earlier: JsonObject, section: str, remedy: str
) -> None:
    """Compares the settings that a folder's `file` holds with those of now, as JSON keeps them.

    Raises: ValueError naming the first setting that is another, and the remedy.
    """
    try:
        there = json.loads(file.read_bytes())
        before = {**earlier, **(there[section] if section else there)}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file}: is not readable; {remedy}") from None
    for key, value in as_read_back(settings).items():
        if before.get(key) == value:
            continue
        change = f"{key} = {before.get(key)}, now {value}"
        if key == LIST_DIGEST:
            change = "another list of this name"
        raise ValueError(f"{file}: was made with {change}; {remedy}")


def write_metrics(folder: Path, settings: JsonObject, metrics: JsonObject) -> None:
    """Writes metrics.json: the settings, then the metrics. The same results give the same bytes."""
    write_json(folder / METRICS_FILE, {"settings": settings, **metrics})
