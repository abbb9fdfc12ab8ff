"""Many kinds of damage to a run folder: the run goes on from what is whole and says so, or it is
refused in one line; it never begins anew by itself.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from video_mae.config import PretrainConfig, load_config
from video_mae.training.checkpoint import MANIFEST, folders
from video_mae.training.loop import DONE
from video_mae.training.pretrain import prepare, run

pytestmark = [
    pytest.mark.faults,
    pytest.mark.trains_here,
    pytest.mark.usefixtures("quiet_process"),
]


def state_file(folder: Path) -> Path:
    return max(
        (path for path in folder.iterdir() if path.name != MANIFEST),
        key=lambda path: path.stat().st_size,
    )


def flip(position: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = state_file(folder)
        content = bytearray(file.read_bytes())
        content[int(position * (len(content) - 1))] ^= 1
        file.write_bytes(content)

    return damage


def content(new: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = state_file(folder)
        file.write_bytes(new(file.read_bytes()))

    return damage


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        there = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(change(there)))

    return damage


def text(new: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / MANIFEST).write_bytes(new)

    return damage


def without(key: str) -> Callable[[Path], None]:
    return manifest(lambda there: {name: there[name] for name in there if name != key})


def become(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = state_file(folder)
        file.unlink()
        make(file)

    return damage


DAMAGE = {
    "first bit": flip(0.0),
    "a bit": flip(0.4),
    "last bit": flip(1.0),
    "cut": content(lambda data: data[:-1]),
    "longer": content(lambda data: data + b"0"),
    "empty": content(lambda data: b""),
    "zeros": content(lambda data: bytes(len(data))),
    "gone": become(lambda file: None),
    "a folder": become(Path.mkdir),
    "a broken link": become(lambda file: file.symlink_to("nowhere")),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "empty manifest": text(b""),
    "binary manifest": text(b"\xff\x00\xfe"),
    "a list": text(b"[]"),
    "nothing in it": text(b"{}"),
    "torn manifest": lambda folder: text((folder / MANIFEST).read_bytes()[:40])(folder),
    "another step": manifest(lambda there: {**there, "step": 3}),
    "no step": without("step"),
    "a step that is none": manifest(lambda there: {**there, "step": "4"}),
    "no facts": without("world_size"),
    "no stage": without("zero_stage"),
    "no files": manifest(lambda there: {**there, "files": {}}),
    "files that are none": manifest(lambda there: {**there, "files": ["a"]}),
    "no sizes": manifest(lambda there: {**there, "files": dict.fromkeys(there["files"])}),
    "a file more": manifest(lambda t: {**t, "files": {**t["files"], "x": {"size": 1, "crc32": 1}}}),
    "no checkpoint but a file": lambda folder: (shutil.rmtree(folder), folder.write_text("x"))[0],
}
OF_RUN = {
    "no checkpoints": lambda run: shutil.rmtree(run / "checkpoints"),
    "all removed": lambda run: [shutil.rmtree(one) for one in folders(run / "checkpoints")],
    "empty configuration": lambda run: (run / "config.yaml").write_text(""),
    "torn configuration": lambda run: (run / "config.yaml").write_text(
        (run / "config.yaml").read_text()[:300]
    ),
    "binary configuration": lambda run: (run / "config.yaml").write_bytes(b"\0\xff\0"),
    "no configuration": lambda run: (run / "config.yaml").unlink(),
    "damaged lists": lambda run: (run / "lists.json").write_text("{"),
}


@pytest.fixture(scope="module")
def config_of(tiny_file: Path) -> Callable[[Path], PretrainConfig]:
    return lambda output: load_config(
        tiny_file, [f"output={output}", "journal.checkpoint_interval=2"]
    )


@pytest.fixture(scope="module")
def finished(
    config_of: Callable[[Path], PretrainConfig], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run(prepare(config_of(folder))) == DONE
    torch.set_num_threads(threads)
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_refused(config: PretrainConfig) -> str:
    """The one line of a start that changes nothing."""
    before = bytes_of(Path(config.output))
    with pytest.raises(ValueError, match=str(config.output)) as error:
        run(prepare(config))
    assert bytes_of(Path(config.output)) == before
    line = str(error.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_costs_its_steps_and_two_of_them_end_in_a_refusal(
    config_of, finished: Path, tmp_path: Path, kind: str
) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    newest, older = folders(copy / "checkpoints")
    DAMAGE[kind](newest)
    assert run(prepare(config_of(copy))) == DONE
    log = (copy / "log.txt").read_text()
    assert f"passed over: {newest.name}: " in log
    assert "resumed after step 2" in log
    ours, theirs = (load_file(one / "model" / "model.safetensors") for one in (copy, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len((copy / "metrics.jsonl").read_text().splitlines()) == 4
    for folder in (newest, older):
        DAMAGE[kind](folder)
    line = is_refused(config_of(copy))
    assert "no checkpoint can be used" in line
    assert "--from-scratch" in line
    assert newest.name in line
    assert older.name in line


@pytest.mark.parametrize("kind", OF_RUN)
def test_a_damaged_run_folder_is_refused_with_a_remedy_that_is_one(
    config_of, finished: Path, tmp_path: Path, kind: str
) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    OF_RUN[kind](copy)
    line = is_refused(config_of(copy))
    assert any(
        word in line
        for word in ("--from-scratch", "put it back", "choose another output", "remove it")
    )
