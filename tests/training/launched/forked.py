"""Runs of several ranks each, forks of this process, because a start is mostly imports.

Arguments: a YAML file of [{name, ranks, config, overrides}, ...], and the folder of the runs. A run ends with its last
step: no checkpoint, picture or report.
"""

import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  (before the fork)
import torch
import yaml

from video_mae.config import load_config
from video_mae.training import loop, pretrain
from video_mae.training.engine import leave


def train(spec: dict[str, Any], folder: Path, rank: int, port: int) -> None:
    """A rank of a run."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(spec["ranks"]),
        LOCAL_WORLD_SIZE=str(spec["ranks"]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    for of, name in (
        (loop, "save_run"),
        (loop.RunPage, "finish"),
        (pretrain.Pretraining, "_draw"),
    ):
        setattr(of, name, lambda *_: True)
    changes = [*spec["overrides"], f"output={folder / spec['name']}"]
    assert pretrain.run(pretrain.prepare(load_config(spec["config"], changes))) == 0
    leave()


def main() -> None:
    """One run after another."""
    specs, folder = map(Path, sys.argv[1:])
    fork = multiprocessing.get_context("fork")
    for spec in yaml.safe_load(specs.read_text()):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = [
            fork.Process(target=train, args=(spec, folder, rank, port))
            for rank in range(spec["ranks"])
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert [rank.exitcode for rank in ranks] == [0] * spec["ranks"], spec


if __name__ == "__main__":
    main()
