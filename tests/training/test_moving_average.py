"""Averages of weights: by their definition, whatever holds the weights, and without a trace in
what is trained. Two ranks: test_launcher.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from video_mae import load_pretrained
from video_mae.config import FinetuneConfig, PretrainConfig
from video_mae.training import finetune
from video_mae.training.engine import Engine
from video_mae.training.loop import DONE
from video_mae.training.moving_average import warmed_decay
from video_mae.training.pretrain import prepare, run

Tiny = Callable[..., PretrainConfig]
State = dict[str, torch.Tensor]

pytestmark = [pytest.mark.trains_here, pytest.mark.usefixtures("quiet_process")]


def weights(config: PretrainConfig | FinetuneConfig, name: str) -> State:
    return load_file(Path(config.output) / name / "model.safetensors")


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch) -> list[State]:
    """The master weights at the start and after each step of the run of a test."""
    states: list[State] = []
    step = Engine.step

    def observed(self: Engine, lr: float) -> Any:
        if not states:
            states.append(self.full_state())
        result = step(self, lr)
        states.append(self.full_state())
        return result

    monkeypatch.setattr(Engine, "step", observed)
    return states


@pytest.mark.parametrize(
    ("stage", "precision", "more"),
    [
        (0, "fp32", []),
        (0, "bf16", ["optim.clip_grad=0.1"]),
        (1, "bf16", []),
        (2, "fp32", ["optim.accumulation=2"]),
        (2, "bf16", ["engine.offload=optimizer"]),
        (3, "fp32", []),
        (3, "bf16", ["objective.contrastive_weight=0.1", "objective.learn_temperature=true"]),
        (3, "bf16", ["engine.offload=parameters"]),
    ],
)
def test_the_average_is_that_of_its_definition(
    tiny: Tiny, history: list[State], stage: int, precision: str, more: list[str]
) -> None:
    config = tiny(
        "optim.ema=0.3",
        "journal.checkpoint_interval=2",  # weights are exchanged while the run goes on
        f"engine.zero_stage={stage}",
        f"engine.precision={precision}",
        *more,
    )
    assert run(prepare(config)) == DONE
    assert len(history) == 5
    expected = {name: value.double() for name, value in history[0].items()}
    for step, state in enumerate(history[1:]):
        decay = [0.1, 2 / 11, 3 / 12, 0.3][step]
        for name, value in state.items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    averages, trained = weights(config, "model_ema"), weights(config, "model")
    assert averages.keys() == trained.keys() == expected.keys()
    for name, value in averages.items():
        assert torch.equal(trained[name], history[-1][name])
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7)
    apart = [(averages[name] - trained[name]).abs().max() for name in trained]
    assert max(apart) > 1e-4
    load_pretrained(Path(config.output) / "model_ema")  # a model folder as any


def test_the_decay_grows_to_the_configured_one() -> None:
    decays = [warmed_decay(0.999, step) for step in range(10000)]
    assert decays[:2] == [0.1, 2 / 11]
    assert decays == sorted(decays)
    assert decays[8980] < decays[8990] == decays[-1] == 0.999


@pytest.mark.parametrize("stage", range(4))
def test_averages_leave_no_trace_in_what_is_trained(tiny_finetune: Any, stage: int) -> None:
    """They are validated in the middle of the run, by weights that take the place of others."""
    runs = []
    for ema in (0, 0.9):
        config = tiny_finetune(
            f"optim.ema={ema}",
            f"output={tiny_finetune().output}_{ema}",
            f"engine.zero_stage={stage}",
            "engine.precision=bf16",
        )
        assert finetune.run(finetune.prepare(config)) == DONE
        runs.append(config)
    without, averaged = runs
    for name in ("model", "best"):
        ours, theirs = weights(averaged, name), weights(without, name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not (Path(without.output) / "model_ema").exists()
    written = [
        [json.loads(line) for line in (Path(c.output) / "metrics.jsonl").read_text().splitlines()]
        for c in runs
    ]
    before, after = ([line for line in lines if "val_loss" in line] for lines in written)
    assert [line["val_loss"] for line in before] == [line["val_loss"] for line in after]
    assert [line["val_ema_loss"] != line["val_loss"] for line in after] == [True, True]
    assert all("val_ema_loss" not in line for line in before)


def test_a_run_that_had_no_averages_does_not_get_them_later(tiny: Tiny) -> None:
    assert run(prepare(tiny("optim.steps=1", "optim.warmup_steps=0"))) == DONE
    with pytest.raises(ValueError, match=r"started with optim.ema = 0.0, now it is 0.5; set it"):
        prepare(tiny("optim.steps=1", "optim.warmup_steps=0", "optim.ema=0.5"))
