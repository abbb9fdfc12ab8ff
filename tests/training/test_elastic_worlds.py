"""Runs of 1, 2 and 3 ranks go on with another number of them, in another ZeRO stage, precision,
offload, micro-batch and accumulation.
"""

import os
import shutil
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_files import forgotten, losses, saved_state
from safetensors.torch import load_file

from video_mae import VideoClassifier, save_model_folder
from video_mae.config import FinetuneConfig, load_config
from video_mae.training.checkpoint import step_name

RUNS = Path(__file__).parent / "launched" / "runs.py"
GLOBAL_BATCH = 12  # of 24 videos: an epoch is two steps
COMMON = [
    "optim.steps=6",
    "optim.ema=0.9",
    "optim.clip_grad=0.05",
    "journal.checkpoint_interval=3",
]
World = tuple[int, int, int]
"""(ranks, ZeRO stage, accumulation)."""

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2400)]


def mode(world: World, *more: str) -> list[str]:
    ranks, stage, accumulation = world
    return [
        f"engine.zero_stage={stage}",
        f"optim.accumulation={accumulation}",
        f"optim.micro_batch={GLOBAL_BATCH // accumulation // ranks}",
        *more,
    ]


WORLDS: dict[World, list[World]] = {
    (ranks, stage, 3 - ranks): [
        (3 - ranks, (stage + 1) % 4, 1),
        (ranks, (stage + 2) % 4, 3),
        (3, stage, 2),
    ]
    for ranks, stage in product((1, 2), range(4))
}
TEACHER = ["objective.target=features", "objective.teacher=ema", "objective.teacher_momentum=0.5"]
CUT = ["optim.schedule=constant_cooldown"]
STAGES = "stages.small={{from_step: 1, height: 16, micro_batch: {}}}"
PLAIN = ["augment.mix_probability=0"]  # else what is drawn belongs to a rank
LORA = [*PLAIN, "lora.rank=2", "lora.targets=attention_mlp", "freeze_blocks=1"]
# name: (before, after, how near the losses are)
MORE: dict[str, tuple[World, list[str], World, list[str], float]] = {
    "to_bf16": ((2, 1, 1), [], (1, 2, 1), ["engine.precision=bf16"], 1e-2),
    "from_bf16": ((1, 0, 1), ["engine.precision=bf16"], (2, 1, 1), [], 1e-2),
    "all_bf16": (
        (1, 2, 2),
        ["engine.precision=bf16"],
        (2, 3, 1),
        ["engine.precision=bf16"],
        1e-2,
    ),
    "from_offload": ((2, 3, 1), ["engine.offload=parameters"], (1, 0, 2), [], 1e-4),
    "to_offload": ((1, 0, 1), [], (2, 2, 1), ["engine.offload=optimizer"], 1e-4),
    "teacher": ((1, 0, 2), TEACHER, (2, 3, 1), TEACHER, 1e-4),
    "stages": ((1, 1, 1), [STAGES.format(8)], (2, 0, 1), [STAGES.format(4)], 1e-4),
    "longer": ((2, 3, 1), CUT, (1, 2, 3), [*CUT, "optim.steps=8", "optim.cooldown_steps=2"], 1e-4),
    "lora_wider": ((1, 0, 1), LORA, (2, 3, 1), LORA, 1e-4),
    "lora_narrower": (
        (2, 3, 1),
        [*LORA, "engine.precision=bf16"],
        (1, 1, 2),
        [*LORA, "engine.precision=bf16"],
        2e-2,
    ),
    "classifier": ((2, 2, 1), PLAIN, (1, 3, 2), PLAIN, 1e-4),
}


def name_of(world: World) -> str:
    return "ranks{}_stage{}_of{}".format(*world)


def launch(folder: Path, ranks: int, specs: list[dict[str, Any]]) -> None:
    file = folder / "runs.yaml"
    file.write_text(yaml.safe_dump(specs))
    command = [sys.executable]
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        command = [str(Path(sys.executable).with_name("deepspeed"))]
        command += ["--num_accelerators", str(ranks), "--master_port", port]
    result = subprocess.run(
        [*command, str(RUNS), str(file), str(folder)],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | ({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}),
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"


@pytest.fixture(scope="module")
def runs(
    tiny_file: Path, tiny_finetune_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """All runs as they were, then copies that have gone on from step 3 as others, in a launch for
    each number of ranks.
    """
    folder = tmp_path_factory.mktemp("worlds")
    tuned = load_config(tiny_finetune_file, schema=FinetuneConfig)
    torch.manual_seed(5)
    save_model_folder(folder / "pretrained", VideoClassifier(tuned.model, tuned.classifier))
    starts: dict[int, list[dict[str, Any]]] = {1: [], 2: [], 3: []}
    ends: dict[int, list[dict[str, Any]]] = {1: [], 2: [], 3: []}

    def spec(name: str, world: World, *more: str) -> dict[str, Any]:
        is_tuned = "augment.mix_probability=0" in more
        changes = [*COMMON, *mode(world, *more)]
        if is_tuned:
            changes.append(f"checkpoint={folder / 'pretrained'}")
        return {
            "name": name,
            "stage": "finetune" if is_tuned else "pretrain",
            "config": str(tiny_finetune_file if is_tuned else tiny_file),
            "overrides": changes,
        }

    copies = {}
    for before, afters in WORLDS.items():
        starts[before[0]].append(spec(name_of(before), before))
        for after in afters:
            name = f"{name_of(before)}_to_{name_of(after)}"
            ends[after[0]].append(spec(name, after))
            copies[name] = name_of(before)
    for name, (before, changes, after, others, _) in MORE.items():
        starts[before[0]].append(spec(name, before, *changes))
        ends[after[0]].append(spec(f"{name}_changed", after, *others))
        copies[f"{name}_changed"] = name
    for ranks, specs in starts.items():
        if specs:
            launch(folder, ranks, specs)
    for copy, of in copies.items():
        forgotten(folder / of, folder / copy, 3)
    for ranks, specs in ends.items():
        launch(folder, ranks, specs)
    return folder


def check_went_on(runs: Path, name: str, before: str, near: float, steps: int = 6) -> None:
    changed, whole = runs / name, runs / before
    found, expected = losses(changed), losses(whole)
    assert found[:3] == expected[:3]
    assert len(found) == steps
    assert found[3:6] == pytest.approx(expected[3:6], rel=near)
    assert expected[0] != pytest.approx(expected[-1], rel=3e-3)  # it learns
    log = (changed / "log.txt").read_text()
    assert log.count("resumed after step 3") == 1
    first = expected[3] / found[3] - 1
    assert abs(first) < near / 10 or near > 1e-3, "the state was read, and before any update"
    if steps == 6 and near < 1e-3:
        for model in ("model", "model_ema"):
            ours, theirs = (load_file(at / model / "model.safetensors") for at in (changed, whole))
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e-4)
        ours, theirs = (saved_state(at / "checkpoints" / step_name(6)) for at in (changed, whole))
        assert {key: len(ours[key]) for key in ours} == {key: len(theirs[key]) for key in theirs}
    shutil.rmtree(changed / "checkpoints")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(before, after, id=f"{name_of(before)}_to_{name_of(after)}")
        for before, afters in WORLDS.items()
        for after in afters
    ],
)
def test_another_world_goes_on_with_the_same_losses(
    runs: Path, before: World, after: World
) -> None:
    check_went_on(runs, f"{name_of(before)}_to_{name_of(after)}", name_of(before), 1e-4)


@pytest.mark.parametrize("name", MORE)
def test_another_world_of_another_run_goes_on_with_the_same_losses(runs: Path, name: str) -> None:
    steps = 8 if name == "longer" else 6
    check_went_on(runs, f"{name}_changed", name, MORE[name][-1], steps)
