"""What the disk refuses is one line, whichever library writes."""

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from video_mae.files import StorageError, write_whole

TENSORS = {"a": torch.zeros(10_000)}
WRITERS = {
    "torch": lambda path: torch.save(TENSORS, path),
    "safetensors": lambda path: save_file(TENSORS, path),
    "bytes": lambda path: path.write_bytes(bytes(40_000)),
}


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file of this process may have more than 1,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("small_disk")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_the_disk_refuses_is_one_line_and_leaves_nothing(
    tmp_path: Path, writer: str
) -> None:
    write: Callable[[Path], object] = WRITERS[writer]
    with pytest.raises(StorageError, match=f"{tmp_path}/model: cannot be written"):
        write_whole(tmp_path / "model", write)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_copied_is_one_line_and_leaves_nothing(
    tmp_path: Path, small_disk: None
) -> None:
    (tmp_path / "from").mkdir()
    for name in "ab":
        (tmp_path / "from" / name).write_bytes(bytes(500))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(StorageError, match=r"to: cannot be written .*File too large"):
        write_whole(tmp_path / "to", lambda new: shutil.copytree(tmp_path / "from", new))
    assert [one.name for one in tmp_path.iterdir()] == ["from"]


def test_a_file_takes_the_place_of_no_folder_and_no_device(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").touch()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(StorageError, match=f"{name}: is no file, and stays as it is"):
            write_whole(tmp_path / name, Path.touch)
    assert (tmp_path / "folder" / "kept").exists()
    assert (tmp_path / "pipe").is_fifo()
    write_whole(tmp_path / "folder", Path.mkdir)
    assert sorted(one.name for one in tmp_path.rglob("*")) == ["folder", "pipe"]
