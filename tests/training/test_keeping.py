"""What a run keeps, and what it makes of a folder that holds less than it should."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import saved_state
from safetensors.torch import load_file

from video_mae import files
from video_mae.config import PretrainConfig, load_config
from video_mae.files import FolderError, StorageError
from video_mae.model.objective import Losses, Objective
from video_mae.processes import _status, hold_folder, identity
from video_mae.training import heartbeat, loop, saving
from video_mae.training.checkpoint import MANIFEST, step_name
from video_mae.training.journal import Journal
from video_mae.training.loop import DONE, STOPPED_BY_POLICY
from video_mae.training.pretrain import Pretraining, prepare, run

pytestmark = [pytest.mark.trains_here, pytest.mark.usefixtures("quiet_process")]

CHANGES = ["journal.checkpoint_interval=2", "journal.log_interval=3", "optim.steps=7"]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics as far as an undisturbed run has the same."""
    names = ("step", "epoch", "loss", "reconstruction_loss", "lr", "grad_norm", "bad_videos")
    return [{name: line[name] for name in names} for line in metrics(folder)]


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def is_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.fixture(scope="module")
def make(tiny_file: Path) -> Callable[..., PretrainConfig]:
    return lambda output, *changes: load_config(tiny_file, [f"output={output}", *CHANGES, *changes])


@pytest.fixture(scope="module")
def undisturbed(
    make: Callable[..., PretrainConfig], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run(prepare(make(folder))) == DONE
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def copy(undisturbed: Path, tmp_path: Path) -> Path:
    """Of a finished run, whose last checkpoint is that of step 7, the one before of step 6."""
    return Path(shutil.copytree(undisturbed, tmp_path / "run"))


def test_a_thread_writes_the_same_checkpoints_and_a_slow_disk_is_not_waited_for(
    make, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way, steps = [], []
    write, step = saving.fsync, Journal.step

    def slow(path: Path) -> None:
        under_way.append(path)
        while len(steps) < 4 and path.parent.name == ".step_00000002":
            pass  # the disk takes until step 4 is under way
        write(path)

    def count(self: Journal, number: int, *values: Any) -> None:
        steps.append(number)
        step(self, number, *values)

    monkeypatch.setattr(saving, "fsync", slow)
    monkeypatch.setattr(Journal, "step", count)
    folder = tmp_path / "run"
    assert run(prepare(make(folder, "journal.checkpoint_async=true"))) == DONE
    assert under_way
    assert timeless(folder) == timeless(undisturbed)
    assert is_same(weights(folder), weights(undisturbed))
    for number in (6, 7):
        ours, theirs = (
            saved_state(one / "checkpoints" / step_name(number)) for one in (folder, undisturbed)
        )
        assert is_same(ours, theirs)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint_and_nothing_else(
    is_async: bool, make, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, folder = saving.write_state, tmp_path / "run"

    def refuse(file: Path, state: dict[str, torch.Tensor]) -> Any:
        if file.parent.name == ".step_00000004":
            state = {**state, "too_large": torch.empty(2**50, device="meta")}
        return write(file, state)

    monkeypatch.setattr(saving, "write_state", refuse)
    config = make(folder, f"journal.checkpoint_async={str(is_async).lower()}")
    assert run(prepare(config)) == DONE
    assert timeless(folder) == timeless(undisturbed)
    assert is_same(weights(folder), weights(undisturbed))
    (line,) = [line for line in log(folder).splitlines() if "cannot be written" in line]
    assert "step_00000004" in line
    assert "No space left on device" in line
    assert "needed are 4503" in line
    assert "are free; make room" in line
    assert not list((folder / "checkpoints").glob(".*"))


@pytest.mark.faults
def test_lines_that_the_disk_refuses_are_written_later_and_in_their_order(
    make, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    folder, sizes = tmp_path / "run", []

    def append(path: Path, data: bytes) -> None:
        if b'"step": 3,' in data and not sizes:
            sizes.append(len(data))
            with files.storing(path, len(data)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        files.append(path, data)

    monkeypatch.setattr("video_mae.training.journal.append", append)
    assert run(prepare(make(folder))) == DONE
    assert timeless(folder) == timeless(undisturbed)
    assert (
        f"metrics.jsonl: cannot be written ([Errno 28] No space left on device): needed are {sizes[0]}"
        in capfd.readouterr().out
    )


def test_lines_that_the_disk_refused_are_there_before_a_checkpoint_is(
    make, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, append = tmp_path / "run", files.append

    def refuse(path: Path, data: bytes) -> None:
        if data.startswith(b'{"step": 6,'):
            patch.setattr("video_mae.training.journal.append", append)  # there is room again
            with files.storing(path, len(data)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(path, data)

    def end(run: Any, done: int) -> bool:
        assert save_run(run, done)
        assert done < 6, "killed"
        return True

    save_run = loop.save_run
    with monkeypatch.context() as patch:
        patch.setattr("video_mae.training.journal.append", refuse)
        patch.setattr(loop, "save_run", end)
        patch.setattr(Journal, "close", lambda self: None)
        with pytest.raises(AssertionError, match="killed"):
            run(prepare(make(folder)))
    assert run(prepare(make(folder))) == DONE
    assert timeless(folder) == timeless(undisturbed)


def test_a_last_save_that_the_disk_refuses_ends_the_run_with_an_error_of_one_line(
    make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Path, state: dict[str, torch.Tensor]) -> Any:
        with files.storing(file):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(saving, "write_state", refuse)
    with pytest.raises(StorageError, match=r"step_00000002.*: cannot be written .*Read-only file"):
        run(prepare(make(tmp_path / "run", "optim.steps=2")))
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


def test_a_run_folder_that_is_gone_ends_the_run_and_is_not_made_again(
    make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, step = tmp_path / "run", Journal.step

    def remove(self: Journal, number: int, *values: Any) -> None:
        if number == 3:
            shutil.rmtree(folder)
        step(self, number, *values)

    monkeypatch.setattr(Journal, "step", remove)
    with pytest.raises(StorageError, match=r"run: cannot be written, it was removed"):
        run(prepare(make(folder, "optim.steps=1000", "journal.checkpoint_interval=0")))
    assert not (folder / "config.yaml").exists()


def test_what_cannot_be_a_file_of_metrics_is_an_error_of_one_line(make, copy: Path) -> None:
    (copy / "metrics.jsonl").unlink()
    (copy / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"run: cannot be written .*directory: .*metrics.jsonl"):
        run(prepare(make(copy)))


def test_a_picture_takes_as_long_as_it_takes(
    make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = list[str]()
    monkeypatch.setattr(
        Pretraining, "_draw", lambda self, picture: stages.append(heartbeat.progress.stage)
    )
    assert (
        run(prepare(make(tmp_path / "run", "optim.steps=2", "journal.picture_interval=1"))) == DONE
    )
    assert stages == ["measuring"] * 2
    assert "measuring" not in heartbeat.TIMED


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Makes the loss of these steps (the first is 1) not finite."""
    forward, counter = Objective.forward, iter(range(1, 10**6))

    def poisoned(self: Objective, *arguments: Any) -> Losses:
        output = forward(self, *arguments)
        if next(counter) in steps:
            output = output._replace(loss=output.loss * float("nan"))
        return output

    monkeypatch.setattr(Objective, "forward", poisoned)


@pytest.mark.faults
def test_nothing_is_kept_of_skipped_steps_and_the_save_is_made_up_for(
    make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    poison(monkeypatch, {2, 3})
    config = make(folder, "journal.keep_checkpoints=9")
    assert run(prepare(config)) == DONE
    names = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    assert names == [step_name(step) for step in (4, 6, 7)]
    assert log(folder).count("not saved, it was skipped") == 2


@pytest.mark.faults
def test_a_learning_rate_out_of_all_bounds_publishes_nothing_and_stops_at_each_start(
    make, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    config = make(
        folder,
        "optim.base_lr=1e30",
        "optim.warmup_steps=0",
        "engine.precision=bf16",
        "journal.checkpoint_interval=3",
        "optim.steps=20",
    )
    steps = []
    for _ in range(2):
        assert run(prepare(config)) == STOPPED_BY_POLICY
        steps.append(metrics(folder)[-1]["step"])
        assert not (folder / "model").exists()
        assert not list((folder / "checkpoints").glob("step_*"))
    assert steps[0] == steps[1]


@pytest.mark.faults
def test_a_signal_among_skipped_steps_saves_nothing_and_the_steps_are_done_again(
    make, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, step = tmp_path / "run", Journal.step

    def stop(self: Journal, number: int, *values: Any) -> None:
        if number == 3:
            signal.raise_signal(signal.SIGTERM)
        step(self, number, *values)

    with monkeypatch.context() as patch:
        poison(patch, {3, 4})
        patch.setattr(Journal, "step", stop)
        assert run(prepare(make(folder))) == 128 + signal.SIGTERM
    assert (folder / "checkpoints" / "latest").read_text() == "step_00000002\n"
    assert run(prepare(make(folder))) == DONE
    assert timeless(folder) == timeless(undisturbed)
    assert is_same(weights(folder), weights(undisturbed))


def test_what_a_killed_start_did_not_come_to_is_made_good(
    make, copy: Path, undisturbed: Path
) -> None:
    shutil.rmtree(copy / "model")
    left = (
        ".unfinished-x",
        ".model-x",
        "checkpoints/.step_00000009",
        "reconstructions/.unfinished-y",
    )
    for name in (*left, "checkpoints/.damaged_step_00000001"):
        (copy / name).mkdir(parents=True)
        (copy / name / "file").write_text("half")
    # lines between the last one and the checkpoint: its sums are in it
    shutil.rmtree(copy / "checkpoints" / step_name(7))
    with (copy / "metrics.jsonl").open("ab") as stream:
        stream.write(b"garbage\n[]\n{}\n" + b'{"step": 99, "lo')
    (copy / "quarantine.jsonl").write_text('{"path": "x"}\n{"path": [], "decoder"\n')
    training = prepare(make(copy))
    with hold_folder(copy) as told:
        training.introduction += told
        assert run(training) == DONE
    assert is_same(weights(copy), weights(undisturbed))
    assert timeless(copy) == timeless(undisturbed)
    text = log(copy)
    for name in (*left, "checkpoints/.damaged_step_00000001"):
        assert f"removed what an earlier start left behind: {copy / name}" in text
        assert not (copy / name).exists()
    assert "metrics.jsonl: 3 damaged lines are left out, metrics.jsonl.damaged has them" in text
    assert b"garbage\n" in (copy / "metrics.jsonl.damaged").read_bytes()
    assert "quarantine.jsonl: 2 damaged lines" in text


def test_a_line_averages_all_its_steps_and_bad_videos_are_those_of_the_steps_that_count(
    make, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, step = tmp_path / "run", Journal.step

    class DeadError(Exception):
        pass

    class Failure:
        path, decoder, reason = "lost.mp4", "av", "torn"

    def die(self: Journal, number: int, *values: Any) -> None:
        if number == 5:
            self.quarantine.add([Failure()], 5)
            raise DeadError
        step(self, number, *values)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "step", die)
        with pytest.raises(DeadError):
            run(prepare(make(folder)))
    assert (folder / "checkpoints" / "latest").read_text() == "step_00000004\n"
    assert "lost.mp4" in (folder / "quarantine.jsonl").read_text()
    assert run(prepare(make(folder))) == DONE  # the line of step 6 is about 4, 5 and 6
    assert timeless(folder) == timeless(undisturbed)
    assert (folder / "quarantine.jsonl").read_text() == ""


def test_every_fallback_is_told_and_none_usable_is_refused_until_the_run_is_set_aside(
    make, copy: Path, undisturbed: Path
) -> None:
    checkpoints = copy / "checkpoints"
    (checkpoints / step_name(7) / MANIFEST).write_text('{"step": 7, "files": {"x": {}}}')
    assert run(prepare(make(copy))) == DONE
    assert "passed over: step_00000007: it cannot be read (KeyError('world_size'))" in log(copy)
    assert is_same(weights(copy), weights(undisturbed))
    for step in (6, 7):
        (checkpoints / step_name(step) / MANIFEST).unlink()
    message = r"no checkpoint can be used: step_00000007: MANIFEST.json is missing; step_00000006: "
    with pytest.raises(FolderError, match=message):
        run(prepare(make(copy)))
    shutil.rmtree(checkpoints)
    with pytest.raises(FolderError, match=r"used: there was one; .*--from-scratch"):
        run(prepare(make(copy)))
    (copy / "config.yaml").write_text("")
    with pytest.raises(
        ValueError,
        match=r"config.yaml: is not whole: damaged, .* or begin anew with --from-scratch",
    ):
        prepare(make(copy))
    assert run(prepare(make(copy, "from_scratch=true", "seed=3"))) == DONE
    (aside,) = copy.parent.glob("run.earlier_*")
    assert {"config.yaml", "model", "metrics.jsonl"} <= {path.name for path in aside.iterdir()}
    assert "run: begins with the first step" in log(copy)
    assert "from_scratch: false" in (copy / "config.yaml").read_text()
    assert run(prepare(make(copy, "seed=3"))) == DONE


def test_a_run_that_is_at_work_is_not_set_aside(make, tmp_path: Path) -> None:
    folder, parent = tmp_path / "run", os.getppid()
    folder.mkdir()
    (folder / "config.yaml").write_text("")
    holder = {**identity(), "pid": parent, "start": _status(parent)[-1]}
    (folder / ".lock").write_bytes(files.json_line(holder))
    with pytest.raises(ValueError, match=rf"run: process {parent} on .* is at work in it"):
        prepare(make(folder, "from_scratch=true"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_rank_that_does_not_see_the_folder_of_the_first_one_is_refused(
    make: Callable[..., PretrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "save_config", lambda config, path: None)
    with pytest.raises(StorageError, match=r"rank 0 on .* does not see what the first rank wrote"):
        run(prepare(make(tmp_path / "run")))
    assert not (tmp_path / "run" / "checkpoints").exists()
