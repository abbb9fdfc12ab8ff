"""Checkpoints are complete or not there, and the newest complete one is found."""

import json
import os
import shutil
from pathlib import Path

import pytest

from video_mae.config import PretrainConfig
from video_mae.training.checkpoint import (
    MANIFEST,
    digest,
    fault,
    folders,
    newest,
    publish,
    read_manifest,
    step_name,
)

FACTS = {"world_size": 2, "zero_stage": 1}


def write(checkpoints: Path, step: int, keep: int = 10, keep_every: int = 0) -> Path:
    building = checkpoints / f".{step_name(step)}"
    (building / "rank").mkdir(parents=True)
    (building / "model.pt").write_bytes(os.urandom(3000) + bytes([step % 256]))
    (building / "rank" / "0.pt").write_bytes(b"state" * 100)
    files = {str(path.relative_to(building)): digest(path) for path in building.rglob("*.pt")}
    publish(building, {"step": step, **FACTS, "files": files}, keep, keep_every)
    return checkpoints / step_name(step)


def found(checkpoints: Path) -> int | None:
    result = newest(checkpoints)
    return None if result is None else result[1]["step"]


def test_published_checkpoint_is_whole_and_is_the_latest(tmp_path):
    folder = write(tmp_path, 500)
    assert folder.name == "step_00000500"
    assert not (tmp_path / ".step_00000500").exists()
    result = newest(tmp_path)
    assert result is not None
    assert result[0] == folder
    assert {key: result[1][key] for key in ("step", *FACTS)} == {"step": 500, **FACTS}
    assert set(result[1]["files"]) == {"model.pt", "rank/0.pt"}
    assert fault(folder, slice(None)) == ""
    assert read_manifest(folder) == result[1]
    assert (tmp_path / "latest").read_text().strip() == folder.name


def test_no_checkpoints_are_none(tmp_path):
    assert newest(tmp_path) is None
    assert newest(tmp_path / "missing") is None


def test_steps_sort_by_number(tmp_path):
    for step in (9, 10, 2, 1000, 999):
        write(tmp_path, step)
    assert found(tmp_path) == 1000


def test_a_copy_that_a_person_keeps_is_none_of_them_and_stays(tmp_path):
    copy = Path(shutil.copytree(write(tmp_path, 1), tmp_path / "step_00000001_good"))
    write(tmp_path, 2, keep=1)
    write(tmp_path, 3, keep=1)
    assert [one.name for one in folders(tmp_path)] == ["step_00000003"]
    assert copy.exists()


def test_a_copy_alone_is_no_run_that_has_begun(tmp_path):
    config = PretrainConfig(output=str(tmp_path))
    kept = write(tmp_path / "checkpoints", 1)
    assert config.has_begun
    kept.rename(kept.with_name(f"{kept.name}_good"))
    assert not config.has_begun


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def torn(path: Path) -> None:
    path.write_text(path.read_text()[:30])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.pt", Path.unlink),
        ("rank/0.pt", Path.unlink),
        ("model.pt", truncate),
        ("rank/0.pt", lambda path: path.write_bytes(b"")),
        (MANIFEST, Path.unlink),
        (MANIFEST, torn),
        (MANIFEST, lambda path: path.write_bytes(b"\xff\x00")),
        (MANIFEST, lambda path: path.write_text("[]")),
        (MANIFEST, lambda path: path.write_text("{}")),
        # of what this version writes: else DeepSpeed would be asked for the rest
        (
            MANIFEST,
            lambda path: path.write_text(
                path.read_text().replace('"step"', '"memory": {}, "step"')
            ),
        ),
    ],
)
def test_incomplete_checkpoint_is_passed_over(tmp_path, name, damage):
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    damage(folder / name)
    assert fault(folder)
    assert found(tmp_path) == 1


def test_folder_that_was_never_finished_is_passed_over(tmp_path):
    write(tmp_path, 1)
    (tmp_path / step_name(3)).mkdir()
    (tmp_path / ".step_00000004").mkdir()
    assert found(tmp_path) == 1


@pytest.mark.parametrize("position", [0, 1500, -1])
def test_flipped_bit_is_found(tmp_path, position):
    folder = write(tmp_path, 2)
    content = bytearray((folder / "model.pt").read_bytes())
    content[position] ^= 1
    (folder / "model.pt").write_bytes(content)
    assert fault(folder) == ""  # sizes are right: only reading tells
    assert fault(folder, slice(None)).startswith("model.pt is not what was written")
    assert fault(folder, slice(1, None)) == ""


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_pruning_keeps_the_newest(tmp_path, keep):
    for step in (1, 2, 10, 11, 100):
        write(tmp_path, step, keep)
    left = [path.name for path in sorted(tmp_path.glob("step_*"))]
    assert left == [step_name(step) for step in (1, 2, 10, 11, 100)][-keep:]


def test_pruning_leaves_those_that_are_kept_for_ever(tmp_path):
    for step in (5, 10, 15, 20, 25, 30, 32):
        write(tmp_path, step, 2, 10)
    left = [path.name for path in sorted(tmp_path.glob("step_*"))]
    assert left == [step_name(step) for step in (10, 20, 30, 32)]


@pytest.mark.parametrize("keep", [1, 2])
def test_pruning_never_counts_an_incomplete_checkpoint(tmp_path, keep):
    for step in (30, 40, 50, 90):
        write(tmp_path, step)
    (tmp_path / step_name(90) / "model.pt").unlink()
    write(tmp_path, 60, keep)  # resumed from 50
    complete = [folder.name for folder in sorted(tmp_path.glob("step_*")) if not fault(folder)]
    assert complete == [step_name(step) for step in (50, 60)][-keep:]
    assert found(tmp_path) == 60


def test_incomplete_checkpoint_of_the_same_step_is_replaced(tmp_path):
    folder = write(tmp_path, 5)
    (folder / "model.pt").unlink()
    (folder / "old").write_text("left over")
    write(tmp_path, 5)
    assert found(tmp_path) == 5
    assert not (folder / "old").exists()


@pytest.mark.parametrize("moment", ["manifest", "rename", "pointer"])
def test_crash_at_any_moment_leaves_a_checkpoint_to_resume_from(tmp_path, monkeypatch, moment):
    write(tmp_path, 1)
    replace = os.replace
    moments = {"manifest": MANIFEST, "rename": step_name(2), "pointer": "latest"}

    def crash(source: Path, target: Path) -> None:
        if target.name == moments[moment]:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert found(tmp_path) == (2 if moment == "pointer" else 1)
    assert (tmp_path / "latest").read_text().strip() == step_name(1)


def test_manifest_is_readable_by_a_person(tmp_path):
    text = (write(tmp_path, 7) / MANIFEST).read_text()
    assert json.loads(text)["step"] == 7
    assert len(text.splitlines()) > 5
