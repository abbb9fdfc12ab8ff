"""The job script, with a slurm of shell scripts: who is started how, what is requeued, which logs there are, what is staged.

Real runs of many nodes: training/test_many_nodes.py.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_slurm import SRUN, make_slurm

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "slurm" / "run.sbatch"


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    return make_slurm(tmp_path / "fake")


def submit(slurm: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sbatch", str(SCRIPT), *words],
        env=slurm,
        cwd=Path(slurm["FAKE"]).parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def statuses(slurm: dict[str, str], rank: int, *numbers: int) -> None:
    Path(slurm["FAKE"], f"statuses_{rank}").write_text("".join(f"{n}\n" for n in numbers))


def test_every_rank_is_told_its_number_and_the_first_host(slurm, tmp_path):
    done = submit(slurm, "pretrain", "run.yaml", "optim.steps=3")
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(4):
        line = (
            f"-m video_mae pretrain run.yaml optim.steps=3 at 127.0.0.1:20041, {rank} of 4, "
            f"here {rank % 2} of 2\n"
        )
        assert (tmp_path / "logs" / "41" / f"rank_{rank}.log").read_text() == line
        assert f"{rank}: {line}" in done.stdout


@pytest.mark.parametrize(
    ("stage", "status"), [("pretrain", 75), ("finetune", 137), ("extract", 138)]
)
def test_what_goes_on_is_requeued_until_it_is_done(slurm, tmp_path, stage, status):
    statuses(slurm, 0, 75, 138)
    statuses(slurm, 3, status, 138)
    done = submit(slurm, stage, "run.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("is requeued, and goes on") == 2
    assert (tmp_path / "logs" / "41" / "rank_2.log").read_text().count("2 of 4") == 3


@pytest.mark.parametrize(
    ("stage", "status", "more"),
    [
        ("evaluate", 138, {}),  # it would begin anew
        ("pretrain", 2, {}),
        ("pretrain", 3, {}),
        ("pretrain", 74, {}),
        ("pretrain", 75, {"MOST_RESTARTS": "0"}),
        ("pretrain", 75, {"LEAST_SECONDS": "60"}),  # it fails at once
    ],
)
def test_what_another_start_does_not_help_is_not_requeued(slurm, stage, status, more):
    statuses(slurm, 1, status, 0)
    done = submit(slurm | more, stage, "run.yaml")
    assert done.returncode == status
    assert "requeued" not in done.stdout


def test_each_node_copies_shards_in_an_order_of_its_own_and_links_the_rest(slurm, tmp_path):
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "pack.json").write_text("{}")
    for number in range(4):
        with (packed / f"shard-{number:06d}.tar").open("wb") as file:
            file.truncate(400_000_000)  # of holes
    # both nodes are this machine: each has a folder by its number
    staged = tmp_path / "node$SLURM_NODEID"
    more = {"STAGE_FROM": str(packed), "STAGE_GB": "1", "STAGE_TO": str(staged)}
    srun = Path(slurm["FAKE"], "srun")
    srun.write_text(
        SRUN.replace(
            "SLURM_STEP_NUM_TASKS=$tasks\n",
            "SLURM_STEP_NUM_TASKS=$tasks\n    "
            'export STAGE_TO="${HERE:=$STAGE_TO}" && STAGE_TO=${HERE/\\$SLURM_NODEID/$SLURM_NODEID}\n',
        )
    )
    Path(slurm["FAKE"], "program").write_text("#!/usr/bin/env bash\nsleep 3\necho $*\n")
    done = submit(slurm | more, "pretrain", "run.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"run.yaml data.source={staged}" in done.stdout
    for node, copied in ((0, {0, 1}), (1, {2, 3})):
        folder = tmp_path / f"node{node}"
        assert (folder / "pack.json").read_text() == "{}"
        shards = sorted(folder.glob("*.tar"))
        assert [shard.stat().st_size for shard in shards] == [400_000_000] * 4
        assert {n for n, shard in enumerate(shards) if not shard.is_symlink()} == copied
    again = submit(slurm | more, "pretrain", "run.yaml")
    assert "2 of 4 shards" in again.stdout


def test_the_job_script_is_sound():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SCRIPT], check=True)
    words = [word for word in SCRIPT.read_text().split() if word.startswith("--")]
    assert {"--requeue", "--signal=USR1@300", "--open-mode=append"} <= set(words)


def test_srun_alone_makes_ranks_where_the_job_names_the_first_host(tmp_path):
    slurm = make_slurm(tmp_path / "fake") | {
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NTASKS_PER_NODE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }
    program = (
        "from video_mae.config.world import World; import os; "
        "print(*World.from_environment(), os.environ['RANK'])"
    )
    done = subprocess.run(
        ["srun", sys.executable, "-c", program],
        env=slurm,
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(done.stdout.splitlines()) == ["0 2 0 0", "1 2 1 1"]
