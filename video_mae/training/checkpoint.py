"""Checkpoints that are either complete or not there: written aside, checked, renamed; `latest`
follows last.
"""

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

from video_mae.config import RunConfig
from video_mae.config.training import CHECKPOINTS
from video_mae.config.world import World
from video_mae.files import fsync, write_json, write_text

MANIFEST = "MANIFEST.json"


def step_name(step: int) -> str:
    """The folder of a checkpoint."""
    return f"step_{step:08d}"


def facts(config: RunConfig) -> dict[str, Any]:
    """How the ranks of this start share the state of training, which a manifest tells."""
    engine = config.engine
    return {
        "world_size": World.from_environment().size,
        "zero_stage": engine.zero_stage,
        "precision": engine.precision,
        "offload": engine.offload,
    }


def digest(path: Path) -> dict[str, int]:
    """{"size", "crc32"} of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return {"size": path.stat().st_size, "crc32": crc}


def publish(building: Path, manifest: dict[str, Any], keep: int, keep_every: int = 0) -> None:
    """Makes a finished folder the newest checkpoint: manifest, rename, `latest`, then all go but
    the `keep` newest and those whose step is a multiple of keep_every (0: none).

    An incomplete checkpoint counts for nothing: resuming passed it over, so it may even carry a
    later step.
    """
    final = building.with_name(step_name(manifest["step"]))
    write_json(building / MANIFEST, manifest)
    fsync(building)
    shutil.rmtree(final, ignore_errors=True)  # an incomplete one that resuming passed over
    os.replace(building, final)
    fsync(final.parent)
    write_text(final.parent / "latest", final.name + "\n")
    complete = [folder for folder in folders(final.parent) if not fault(folder)]
    kept = {final, *complete[:keep]}
    kept |= {one for one in complete if keep_every and int(one.name[5:]) % keep_every == 0}
    for folder in folders(final.parent):
        if folder not in kept:
            shutil.rmtree(folder)


def folders(checkpoints: Path) -> list[Path]:
    """Of all checkpoints, complete or not, newest first; what a person has copied is none."""
    return sorted(checkpoints.glob(CHECKPOINTS), reverse=True)


def fault(folder: Path, part: slice = slice(0)) -> str:
    """What keeps a checkpoint from being what was written, "" for nothing: as far as the lengths of
    its files tell, and the content of a part of them, in the order of their names.
    """
    try:
        manifest = read_manifest(folder)
        files = manifest["files"]
        facts = manifest["world_size"], manifest["zero_stage"]
        is_half = len({"memory", "updates", "counters"} & manifest.keys()) % 3  # DeepSpeed's: none
        if step_name(manifest["step"]) != folder.name or not files or None in facts or is_half:
            return f"its {MANIFEST} is not of it"
        for name, written in files.items():
            size = (folder / name).stat().st_size
            if size != written["size"]:
                return f"{name} has {size} bytes, {written['size']} were written"
        for name in sorted(files)[part]:
            if digest(folder / name) != files[name]:
                return f"{name} is not what was written (its checksum is another)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except Exception as error:  # whatever a manifest may hold
        return f"it cannot be read ({error!r:.100})"
    return ""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint without a fault. It has `memory` unless an earlier version had
    DeepSpeed write the state.
    """
    return json.loads((folder / MANIFEST).read_bytes())


def newest(checkpoints: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint and its manifest; incomplete ones are passed over."""
    for folder in folders(checkpoints):
        if not fault(folder):
            return folder, read_manifest(folder)
    return None


def steps_done(run_folder: Path) -> int:
    """Of the newest complete checkpoint of a run; 0 where there is none."""
    found = newest(run_folder / "checkpoints")
    return 0 if found is None else found[1]["step"]
