"""The environment of a launcher: what a process takes it for, half of one, and what a job script
left of another.
"""

import os
import socket
from pathlib import Path

import pytest
import torch

from video_mae.cli import main
from video_mae.config.world import NAMES, World, ranks_here
from video_mae.data.workers import plan_workers
from video_mae.training.environment import prepare_environment

WHOLE = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "")  # so that what the code sets is taken back
        monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "left",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"LOCAL_RANK": "3"},
        {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
        {"WORLD_SIZE": "", "RANK": ""},
        {"WORLD_SIZE": "1", "MASTER_ADDR": "10.0.0.1"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"},
    ],
)
def test_one_process_is_one_whatever_a_job_script_has_left(monkeypatch, left):
    set_all(monkeypatch, left)
    assert World.from_environment() == World(0, 1, 0)
    threads = torch.get_num_threads()
    try:
        prepare_environment()
    finally:
        torch.set_num_threads(threads)
    assert [os.environ[name] for name in NAMES[:4]] == ["0", "1", "0", "127.0.0.1"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
    assert World.from_environment() == World(0, 1, 0)  # also when it is asked again


def test_a_launcher_is_believed(monkeypatch):
    set_all(monkeypatch, WHOLE)
    assert World.from_environment() == World(1, 4, 1)


def test_tasks_of_slurm_that_know_nothing_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert World.from_environment() == World(0, 1, 0)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(ValueError, match=r"SLURM_NTASKS: .* unset SLURM_NTASKS for one process"):
        World.from_environment()
    set_all(monkeypatch, WHOLE)  # by a launcher that srun has started
    assert World.from_environment() == World(1, 4, 1)


HALF = [
    *({name: value for name, value in WHOLE.items() if name != left_out} for left_out in WHOLE),
    {"WORLD_SIZE": "8"},
    {"RANK": "0"},
    {"RANK": "3"},
    {"RANK": "0", "WORLD_SIZE": "2"},
    {**WHOLE, "RANK": ""},
]
WRONG = [
    {**WHOLE, name: value}
    for name, value in (
        ("RANK", "4"),
        ("RANK", "-1"),
        ("RANK", "one"),
        ("RANK", "1.0"),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "many"),
        ("WORLD_SIZE", "-2"),
        ("LOCAL_RANK", "x"),
        ("MASTER_PORT", "http"),
        ("MASTER_PORT", "70000"),
        ("RANK", "\u0663"),
        ("RANK", "1" * 5000),
    )
]


@pytest.mark.parametrize("left", [*HALF, *WRONG])
@pytest.mark.parametrize("stage", ["pretrain", "evaluate", "extract", "probe"])
def test_half_an_environment_is_one_line_before_anything_starts(
    monkeypatch, capsys, left, stage, tiny_file, tmp_path: Path
):
    monkeypatch.setattr("video_mae.cli.PATIENCE_SECONDS", 0)
    set_all(monkeypatch, left)
    words = {
        "pretrain": [str(tiny_file), f"output={tmp_path / 'run'}"],
        "evaluate": ["model", "list"],
        "extract": ["model", "list", "out"],
        "probe": ["model", "train=a", "validation=b"],
    }
    with pytest.raises(SystemExit) as exit_of:
        main([stage, *words[stage]])
    assert exit_of.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert any(name in said.split(": ")[1] for name in NAMES)
    assert "unset" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_the_number_of_ranks_here_is_a_number(monkeypatch, name):
    assert ranks_here() == 1
    monkeypatch.setenv(name, "2")
    assert ranks_here() == plan_workers(None, None).ranks == 2
    monkeypatch.setenv(name, "two")
    with pytest.raises(ValueError, match=f"{name}: two in the environment"):
        ranks_here()


def test_a_rank_without_a_gpu_of_its_own_says_so(monkeypatch):
    set_all(monkeypatch, WHOLE)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match="LOCAL_RANK: 1 has no GPU, there are 1 here"):
        prepare_environment()
