"""Checkpoints that are either complete or not there: written aside, checked, renamed; `latest`
follows last.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from video_mae.files import write_json, write_text

MANIFEST = "MANIFEST.json"


def step_name(step: int) -> str:
    """The folder of a checkpoint."""
    return f"step_{step:08d}"


def fsync(path: Path) -> None:
    """Waits until a file's, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> dict[str, int]:
    """{"size", "crc32"} of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return {"size": path.stat().st_size, "crc32": crc}


def files_of(folder: Path) -> list[Path]:
    """Every file of a checkpoint but its manifest, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def publish(
    building: Path, final: Path, files: dict[str, dict[str, int]], facts: dict[str, Any], keep: int
) -> None:
    """Makes a finished folder the newest checkpoint: manifest, rename, `latest`, then all but the
    `keep` newest go.

    An incomplete checkpoint counts for nothing: resuming passed it over, so it may even carry a
    later step.
    """
    write_json(building / MANIFEST, {**facts, "files": files})
    fsync(building)
    if final.exists():  # an incomplete one that resuming passed over
        shutil.rmtree(final)
    os.replace(building, final)
    fsync(final.parent)
    write_text(final.parent / "latest", final.name + "\n")
    folders = sorted(final.parent.glob("step_*"), reverse=True)
    kept = [folder for folder in folders if read_manifest(folder) is not None][:keep]
    for folder in folders:
        if folder not in (*kept, final):
            shutil.rmtree(folder)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint whose files are all there in full length, or None. It has
    `memory` unless an earlier version had DeepSpeed write the state.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        complete = all(
            (folder / name).stat().st_size == facts["size"]
            for name, facts in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if complete else None


def damaged_files(folder: Path, manifest: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Those of `names` whose content is not what was written."""
    return [name for name in names if digest(folder / name) != manifest["files"][name]]


def newest(checkpoints: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint and its manifest; incomplete ones are passed over."""
    for folder in sorted(checkpoints.glob("step_*"), reverse=True):
        manifest = read_manifest(folder)
        if manifest is not None:
            return folder, manifest
    return None


def steps_done(run_folder: Path) -> int:
    """Of the newest complete checkpoint of a run; 0 where there is none."""
    found = newest(run_folder / "checkpoints")
    return 0 if found is None else found[1]["step"]
