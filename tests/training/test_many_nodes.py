"""The same run on 1, 2 and 3 ranks, cut into micro-batches of any size; on two nodes, of which one is lost; and started by
`deepspeed`, `torchrun` and `srun`. The nodes are this machine: each has a launcher and a work directory of its own.
"""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from checkpoint_files import losses
from fake_slurm import make_slurm

from video_mae.files import read_jsonl

FORKED = Path(__file__).parent / "launched" / "forked.py"
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "slurm" / "run.sbatch"
BIN = Path(sys.executable).parent
# every number of ranks and size of a micro-batch, of at most 8, that 24 videos can have
CUTS = [
    (ranks, size)
    for ranks, size in itertools.product((1, 2, 3), range(1, 9))
    if 24 // ranks % size == 0
]
# of 24 videos; lambda is not 0, as negatives are of a clip
CUT = ["optim.global_batch=24", "optim.steps=6", "objective.contrastive_weight=0.1"]
BATCH = [*CUT, "objective.negatives=batch"]
NUM_STEPS = 60
LONG = [
    "optim.global_batch=12",
    f"optim.steps={NUM_STEPS}",
    "optim.clip_grad=0.5",
    "engine.zero_stage=1",
    "engine.stall_seconds=20",
    "journal.checkpoint_interval=5",
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
if not torch.cuda.is_available():
    ENVIRONMENT["DS_ACCELERATOR"] = "cpu"

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2400)]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def config_file(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a tiny run on clips that need no decoding."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for number in range(24):
        np.save(folder / f"{number}.npy", rng.integers(0, 256, (8, 32, 32, 3), np.uint8))
    (folder / "list.txt").write_text("".join(f"{number}.npy\n" for number in range(24)))
    config = yaml.safe_load(tiny_file.read_text())
    config["data"]["source"] = str(folder / "list.txt")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder / "tiny.yaml"


Train = Callable[[dict[str, tuple[int, list[str]]]], Path]
"""Trains {name: (ranks, overrides)}; the folder of the runs."""


@pytest.fixture(scope="module")
def train(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    def train(runs: dict[str, tuple[int, list[str]]]) -> Path:
        folder = tmp_path_factory.mktemp("runs")
        specs = [
            {"name": name, "ranks": ranks, "config": str(config_file), "overrides": changes}
            for name, (ranks, changes) in runs.items()
        ]
        (folder / "runs.yaml").write_text(yaml.safe_dump(specs))
        done = subprocess.run(
            [sys.executable, str(FORKED), str(folder / "runs.yaml"), str(folder)],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return folder

    return train


@pytest.fixture(scope="module")
def curve(train: Train) -> list[float]:
    """Of one node."""
    return losses(train({"long": (1, LONG)}) / "long")


@pytest.fixture(scope="module")
def cuts(train: Train) -> Path:
    """Runs of all numbers of ranks and sizes of micro-batches."""
    runs = {name_of(*cut): (cut[0], [*CUT, f"optim.micro_batch={cut[1]}"]) for cut in CUTS}
    for size in (2, 8):
        runs[f"batch{size}"] = 1, [*BATCH, f"optim.micro_batch={size}"]
    return train(runs)


def name_of(ranks: int, size: int) -> str:
    return f"ranks{ranks}_{size}"


@pytest.mark.parametrize(("ranks", "size"), CUTS)
def test_a_step_is_the_same_however_it_is_cut(cuts: Path, ranks: int, size: int) -> None:
    run, whole = cuts / name_of(ranks, size), cuts / name_of(1, 8)
    assert len(losses(whole)) == 6
    assert losses(whole)[-1] < losses(whole)[0] - 0.02  # it learns, so equality says something
    assert losses(run) == pytest.approx(losses(whole), rel=1e-4)
    line = f"micro-batch {size} x {ranks} ranks x {24 // ranks // size} accumulated;"
    assert line in (run / "log.txt").read_text()
    rates = [
        [line["lr"] for line in read_jsonl(one / "metrics.jsonl") if "lr" in line]
        for one in (run, whole)
    ]
    assert rates[0] == rates[1]


def test_with_negatives_of_the_batch_the_cut_is_part_of_the_loss(cuts: Path) -> None:
    small, large = (losses(cuts / f"batch{size}") for size in (2, 8))
    assert small[0] != pytest.approx(large[0], rel=1e-2)


class Node:
    """A command in a session and a work directory of its own, and what it says."""

    def __init__(self, folder: Path, *command: str, **variables: str) -> None:
        folder.mkdir(exist_ok=True)
        self.said = folder / "said.txt"
        with self.said.open("ab") as said:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT | variables,
                start_new_session=True,
            )

    def lose(self) -> None:
        """As if the machine were gone."""
        top = psutil.Process(self.process.pid)
        for process in [top, *top.children(recursive=True)]:
            process.kill()
        self.process.wait()

    def end(self) -> int:
        return self.process.wait(timeout=1200)

    @property
    def text(self) -> str:
        return self.said.read_text(errors="replace")


def wait_for(condition: Callable[[], object], node: Node) -> None:
    deadline = time.monotonic() + 900
    while not condition():
        assert node.process.poll() is None, node.text[-3000:]
        assert time.monotonic() < deadline, node.text[-3000:]
        time.sleep(0.1)


def num_steps(run: Path) -> int:
    return len(read_jsonl(run / "metrics.jsonl"))


def check_same(run: Path, curve: list[float]) -> None:
    assert len(losses(run)) == NUM_STEPS
    assert losses(run) == pytest.approx(curve, rel=1e-4)
    assert curve[-1] < curve[0] - 0.02


def test_two_nodes_follow_the_curve_of_one_and_survive_the_loss_of_one(
    curve: list[float], config_file: Path, tmp_path: Path
) -> None:
    run, hosts = tmp_path / "run", tmp_path / "hosts"
    hosts.write_text("node0 slots=1\nnode1 slots=1\n")

    def start() -> list[Node]:
        port = free_port()
        launcher = [str(BIN / "deepspeed"), "--hostfile", str(hosts), "--no_ssh"]
        launcher += ["--master_addr", "127.0.0.1", "--master_port", port]
        stage = ["--module", "video_mae", "pretrain", str(config_file), f"output={run}", *LONG]
        return [
            Node(tmp_path / f"node{node}", *launcher, "--node_rank", str(node), *stage)
            for node in (0, 1)
        ]

    first, second = start()
    wait_for(lambda: num_steps(run) >= 8, first)
    second.lose()
    assert first.end() == 75, first.text[-3000:]
    assert "start the same command again" in first.text
    done = num_steps(run)
    assert 8 <= done < NUM_STEPS
    for node in start():
        assert node.end() == 0, node.text[-3000:]
    log = (run / "log.txt").read_text()
    assert "micro-batch 3 x 2 ranks x 2 accumulated" in log
    assert "resumed after step" in log
    check_same(run, curve)


def test_torchrun_starts_the_same_run(
    curve: list[float], config_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    nodes = [
        Node(
            tmp_path / f"node{node}",
            *(str(BIN / "torchrun"), "--nnodes", "2", "--node_rank", str(node)),
            *("--nproc_per_node", "1", "--master_addr", "127.0.0.1"),
            *("--master_port", port, "-m", "video_mae", "pretrain", str(config_file)),
            f"output={run}",
            *LONG,
        )
        for port in [free_port()]
        for node in (0, 1)
    ]
    for node in nodes:
        assert node.end() == 0, node.text[-3000:]
    check_same(run, curve)


def test_a_job_of_slurm_goes_on_after_its_limit(
    curve: list[float], config_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    slurm = make_slurm(tmp_path / "fake") | {
        "PYTHON": sys.executable,
        "RANKS_OF_NODE": "1",
        "MASTER_PORT": free_port(),
    }
    stage = ["pretrain", str(config_file), f"output={run}", *LONG]
    job = Node(tmp_path / "job", str(tmp_path / "fake" / "sbatch"), str(SCRIPT), *stage, **slurm)
    wait_for(lambda: num_steps(run) >= 8, job)
    for pid in (tmp_path / "fake" / "pids").read_text().split():
        os.kill(int(pid), signal.SIGUSR1)
    assert job.end() == 0, job.text[-3000:]
    assert job.text.count("is requeued, and goes on from its last checkpoint") == 1
    assert f"stopped by signal {signal.SIGUSR1.value} after step" in job.text
    assert "0: " in job.text
    logs = tmp_path / "job" / "logs" / "41"
    assert "resumed after step" in (logs / "rank_0.log").read_text()
    assert (logs / "rank_1.log").exists()
    check_same(run, curve)
