"""Every recipe runs two steps: its own masks, losses, layers, augmentation and optimization, on a model
and clips that are as small as they can be; those of tests and probes give figures.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from video_mae import VideoClassifier, VideoMAE, save_model_folder
from video_mae.config import (
    ClassifierConfig,
    FinetuneConfig,
    LoraConfig,
    ModelConfig,
    PretrainConfig,
    load_config,
)
from video_mae.config.evaluation import EvaluateConfig, ProbeConfig
from video_mae.evaluation import evaluate, probe
from video_mae.training import finetune, pretrain
from video_mae.training.loop import DONE
from video_mae.training.pretrain import Pretraining
from video_mae.training.run_page import RunPage

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STAGES = {"pretrain": (pretrain, PretrainConfig), "finetune": (finetune, FinetuneConfig)}
RECIPES = [
    pytest.param(path, id=f"{stage}_{path.stem}")
    for stage in STAGES
    for path in sorted((CONFIGS / stage).glob("*.yaml"))
]
VIEWS = sorted((CONFIGS / "evaluate").glob("*.yaml"))
PROBES = sorted((CONFIGS / "probe").glob("*.yaml"))
SIDE, NUM_VIDEOS = 16, 8
# What costs time and is none of a recipe's business; accumulation is made by the batch.
COMMON = [
    "optim.global_batch=4",
    "optim.micro_batch=2",
    "optim.steps=2",
    "optim.warmup_steps=1",
    "engine.precision=fp32",
    "data.num_workers=0",
    "journal.log_interval=1",
    "journal.checkpoint_interval=0",
    f"model.height={SIDE}",
    f"model.width={SIDE}",
    "model.patch_size=4",
    "model.embed_dim=16",
    "model.depth=2",
    "model.num_heads=2",
    "model.decoder_embed_dim=16",
    "model.decoder_depth=1",
    "model.decoder_num_heads=2",
]

pytestmark = [pytest.mark.trains_here, pytest.mark.usefixtures("quiet_process")]


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of noise [T, H, W, C], of 3 and of 13 channels, and volumes [Z, Y, X], with labels."""
    folder = tmp_path_factory.mktemp("arrays")
    rng = np.random.default_rng(0)
    shapes = {"rgb": (8, 20, 20, 3), "bands": (1, 20, 20, 13), "volume": (8, 20, 20)}
    for name, shape in shapes.items():
        rows = ""
        kind = np.uint8 if name == "rgb" else np.int16
        for number in range(NUM_VIDEOS):
            np.save(folder / f"{name}_{number}.npy", rng.integers(0, 256, shape).astype(kind))
            rows += f"{name}_{number}.npy {number % 2}\n"
        (folder / f"{name}.txt").write_text(rows)
    return folder


def reduced(path: Path, arrays: Path, output: Path) -> list[str]:
    """What makes a recipe small."""
    stage = path.parent.name
    config = load_config(path, schema=STAGES[stage][1])
    model, data, source = config.model, config.data, "rgb"
    tubelet = min(model.tubelet_size, 2)
    frames = 2 * tubelet if model.num_frames > 1 else 1
    changes = [
        *COMMON,
        f"output={output}",
        f"model.tubelet_size={tubelet}",
        f"model.num_frames={frames}",
    ]
    if model.predicted_frames is not None:
        changes.append(f"model.predicted_frames={frames // 2}")
    if model.in_channels == 1:
        source = "volume"
    elif model.in_channels == 10:
        source = "bands"
    if data.sources:
        changes += [f"data.sources.{name}.source={arrays / 'rgb.txt'}" for name in data.sources]
    else:
        changes.append(f"data.source={arrays / source}.txt")
    if stage == "pretrain":
        changes += ["journal.picture_interval=0", "probe.train=", "probe.validation="]
    else:
        changes += ["validation.source=", "classifier.num_classes=2"]
    if config.checkpoint:
        changes.append(f"checkpoint={output}_before")
    return changes


def make_models(path: Path, changes: list[str], output: Path) -> list[str]:
    """The models that a recipe starts from, or learns from, as small as its own; what names them."""
    config = load_config(path, changes, STAGES[path.parent.name][1])
    torch.manual_seed(0)
    if config.checkpoint:
        save_model_folder(Path(config.checkpoint), VideoMAE(config.model))
    if isinstance(config, PretrainConfig) and config.objective.target == "features":
        save_model_folder(output.with_name("teacher"), VideoMAE(config.model))
        return [f"objective.teacher={output.with_name('teacher')}"]
    return []


@pytest.mark.parametrize("path", RECIPES)
def test_two_steps_of_a_recipe(
    path: Path, arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, (stage, schema) = tmp_path / "run", STAGES[path.parent.name]
    changes = reduced(path, arrays, output)
    changes += make_models(path, changes, output)
    config: Any = load_config(path, changes, schema)
    # what is written at the end is the same for all
    monkeypatch.setattr("video_mae.training.loop.save_run", lambda training, done: True)
    monkeypatch.setattr(RunPage, "finish", lambda page, reason: None)
    monkeypatch.setattr(Pretraining, "_draw", lambda training, picture: None)
    training = stage.prepare(config)
    assert (training.config.optim.micro_batch, training.config.optim.accumulation) == (2, 2)
    torch.manual_seed(config.seed)
    model = training.make_model()[0]
    model.load_state_dict(training.weights.tensors, strict=False)
    assert stage.run(training) == DONE
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    assert [line["skipped_steps"] for line in lines if "loss" in line] == [0, 0]
    assert isinstance(training.model, VideoMAE | VideoClassifier)
    pairs = zip(model.parameters(), training.model.parameters(), strict=True)
    changed = [not torch.equal(before, after) for before, after in pairs]
    assert sum(changed) > len(changed) / 2 or getattr(config, "lora", None) != LoraConfig()
    assert any(changed)
    whole = load_config(output / "config.yaml", schema=schema)
    assert whole.optim == training.config.optim


@pytest.fixture
def classifier(tmp_path: Path) -> str:
    """A model folder."""
    torch.manual_seed(0)
    model = ModelConfig(
        num_frames=4,
        height=SIDE,
        width=SIDE,
        patch_size=8,
        embed_dim=16,
        depth=1,
        num_heads=2,
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
    )
    save_model_folder(tmp_path / "model", VideoClassifier(model, ClassifierConfig(num_classes=2)))
    return str(tmp_path / "model")


@pytest.mark.parametrize("path", VIEWS, ids=lambda path: path.stem)
def test_the_views_of_a_test(path: Path, classifier: str, arrays: Path, tmp_path: Path) -> None:
    changes = [f"output={tmp_path / 'results'}", "num_workers=0"]
    config = load_config(path, changes, EvaluateConfig)
    assert evaluate.start(classifier, str(arrays / "rgb.txt"), config)() == DONE
    metrics = json.loads((tmp_path / "results" / "metrics.json").read_text())
    assert metrics["views"] == (config.num_clips or 0) * config.num_crops
    assert metrics["videos"] == NUM_VIDEOS


@pytest.mark.parametrize("path", PROBES, ids=lambda path: path.stem)
def test_two_steps_of_a_probe(path: Path, classifier: str, arrays: Path, tmp_path: Path) -> None:
    changes = [f"output={tmp_path / 'results'}", "num_workers=0", "epochs=1", "batch_size=4"]
    changes += [f"{name}={arrays / 'rgb.txt'}" for name in ("train", "validation")]
    config = load_config(path, changes, ProbeConfig)
    assert probe.start(classifier, config)() == DONE
    metrics = json.loads((tmp_path / "results" / "metrics.json").read_text())
    grid = metrics["probes"]["attentive"]["grid"]
    assert metrics["probes"].keys() == {"attentive"}
    assert len(grid) == len(config.lrs) * len(config.weight_decays)
