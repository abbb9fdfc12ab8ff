"""A loss that leaps: what is a spike by definition, that its step changes nothing, and that a run
goes on or stops as it was told.
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import saved_state
from safetensors.torch import load_file

from video_mae.config import PretrainConfig
from video_mae.files import StorageError
from video_mae.training.engine import Engine
from video_mae.training.loop import DONE, STOPPED_BY_POLICY
from video_mae.training.pretrain import prepare, run
from video_mae.training.spikes import LEAP, SHARE, SpikeWatch

Tiny = Callable[..., PretrainConfig]

pytestmark = [pytest.mark.trains_here, pytest.mark.usefixtures("quiet_process")]


def judged(losses: list[float], watch: SpikeWatch | None = None) -> list[bool]:
    """Which of the losses are spikes; the others come through bit for bit."""
    watch = watch or SpikeWatch(lambda loss: loss, torch.device("cpu"), is_on=True)
    found = []
    for loss in losses:
        value = torch.tensor(loss, requires_grad=True)
        result = watch.judged(value)
        result.backward()
        assert value.grad is not None
        is_spike = math.isfinite(loss) and not math.isfinite(float(result.detach()))
        if is_spike:
            assert not math.isfinite(float(value.grad))  # or the step would be taken
        elif math.isfinite(loss):
            assert (float(result.detach()), float(value.grad)) == (float(torch.tensor(loss)), 1.0)
        found.append(is_spike)
    return found


def test_a_spike_is_ten_times_the_running_mean_of_what_was_none() -> None:
    assert judged([1.0, 9.9, 1.0, 10.1, 1.0]) == [False, False, False, False, False]
    assert judged([1.0, 10.1, 1.0]) == [False, True, False]
    assert judged([4e9, 1.0, 4e9]) == [False, False, False]  # the first is all that is known
    assert judged([1.0, math.nan, math.inf, 11.0]) == [False, False, False, True]
    assert judged([0.0, 5.0, 51.0]) == [False, False, True]
    mean, losses = 1.0, [1.0]
    for _ in range(40):  # spikes do not count, others by SHARE
        losses += [0.5, 99.0]
        mean += SHARE * (0.5 - mean)
    losses += [0.99 * LEAP * mean]
    assert judged(losses) == [False, *[False, True] * 40, False]
    assert judged([*losses[:-1], 1.01 * LEAP * mean])[-1]


def test_nothing_is_judged_where_it_is_off() -> None:
    watch = SpikeWatch(lambda loss: loss, torch.device("cpu"), is_on=False)
    assert judged([1.0, 4e9], watch) == [False, False]
    assert watch.tensors == {"usual_loss": torch.tensor(0.0)}


def leap(monkeypatch: pytest.MonkeyPatch, steps: set[int], factor: float = 100.0) -> None:
    """The loss of these steps, from 1 on, is so many times larger."""
    healthy = SpikeWatch.judged

    def judge(self: SpikeWatch, loss: torch.Tensor) -> torch.Tensor:
        counts[id(self)] = counts.get(id(self), 0) + 1
        return healthy(self, loss * factor if counts[id(self)] in steps else loss)

    counts: dict[int, int] = {}
    monkeypatch.setattr(SpikeWatch, "judged", judge)


def log(config: PretrainConfig) -> str:
    return (Path(config.output) / "log.txt").read_text()


def lines(config: PretrainConfig) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


def weights(config: PretrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output) / "model" / "model.safetensors")


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="fp32"),
        pytest.param(
            ["engine.precision=bf16", "engine.zero_stage=2"], id="bf16", marks=pytest.mark.faults
        ),
        pytest.param(["engine.offload=optimizer"], id="offloaded", marks=pytest.mark.faults),
    ],
)
def test_a_step_with_a_spike_is_skipped_and_counted(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, overrides: list[str], tmp_path: Path
) -> None:
    if "engine.offload=optimizer" in overrides:
        overrides = [*overrides, "engine.zero_stage=1"]
    leap(monkeypatch, {3})
    config = tiny("engine.on_spike=skip", "journal.checkpoint_interval=2", *overrides)
    before: list[dict[str, torch.Tensor]] = []
    healthy = Engine.step

    def step(self: Engine, lr: float) -> torch.Tensor | float:
        state = self.full_state()
        result = healthy(self, lr)
        after = self.full_state()
        before.append({"same": torch.tensor(all(torch.equal(state[k], after[k]) for k in state))})
        return result

    monkeypatch.setattr(Engine, "step", step)
    assert run(prepare(config)) == DONE
    assert [bool(x["same"]) for x in before] == [False, False, True, False]
    assert lines(config)[-1]["skipped_steps"] == 1
    assert all(math.isfinite(line["loss"]) for line in lines(config))  # what was measured
    assert "step 3: skipped, a loss or gradient was not finite or a spike (1 in a row)" in log(
        config
    )
    assert all(tensor.isfinite().all() for tensor in weights(config).values())


def test_a_run_that_is_told_to_stop_does_so_at_once_and_goes_on_without_it(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("optim.steps=8", "journal.checkpoint_interval=2")
    config = tiny(*overrides, "engine.on_spike=stop")
    leap(monkeypatch, {5})
    assert run(prepare(config)) == STOPPED_BY_POLICY
    assert "1 steps in a row were not finite or a spike" in log(config)
    latest = (Path(config.output) / "checkpoints" / "latest").read_text()
    assert latest == "step_00000004\n"
    monkeypatch.undo()
    leap(monkeypatch, {1})  # that step again, the first of this start
    assert run(prepare(tiny(*overrides, "engine.on_spike=skip"))) == DONE
    assert lines(config)[-1]["skipped_steps"] == 1


def test_a_run_goes_back_to_its_checkpoint_and_leaves_out_what_led_to_a_spike(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    overrides = ("optim.steps=8", "journal.checkpoint_interval=3")
    config = tiny(*overrides, "engine.on_spike=rollback")
    leap(monkeypatch, {5})
    assert run(prepare(config)) == os.EX_TEMPFAIL
    assert "goes back to step_00000003 and leaves out the steps since then" in log(config)
    monkeypatch.undo()
    assert run(prepare(config)) == DONE
    assert "resumed after step 5" in log(config)
    assert [line["step"] for line in lines(config)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert lines(config)[-1]["skipped_steps"] == 2
    leap(monkeypatch, {4, 5})  # as if both had been skipped in the first place
    skipped = tiny(*overrides, "engine.on_spike=skip", f"output={tmp_path / 'skipped'}")
    assert run(prepare(skipped)) == DONE
    ours, theirs = (
        saved_state(Path(one.output) / "checkpoints" / "step_00000008") for one in (config, skipped)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_disk_that_is_full_when_a_run_goes_back_costs_one_line(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("journal.checkpoint_interval=2", "engine.on_spike=rollback")
    leap(monkeypatch, {3})

    def refuse(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)

    monkeypatch.setattr(shutil, "copy2", refuse)
    monkeypatch.setattr(shutil.copytree, "__defaults__", (False, None, refuse, False, False))
    with pytest.raises(StorageError, match=r"step_0000000\d: cannot be written .*No space left"):
        run(prepare(config))
    checkpoints = Path(config.output) / "checkpoints"
    assert sorted(one.name for one in checkpoints.iterdir()) == ["latest", "step_00000002"]


@pytest.mark.faults
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_does_not_go_back_for_ever(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    config = tiny(
        "optim.steps=20",
        "journal.checkpoint_interval=3",
        "journal.keep_every=3",
        "engine.max_skipped_in_a_row=2",
        "engine.on_spike=rollback",
        f"engine.precision={precision}",
    )
    checkpoints = Path(config.output) / "checkpoints"
    starts = [
        (2, STOPPED_BY_POLICY, ""),  # no checkpoint yet
        (5, os.EX_TEMPFAIL, "step_00000005"),
        (1, os.EX_TEMPFAIL, "step_00000006"),
        (1, STOPPED_BY_POLICY, "step_00000006"),  # for the third time
        (4, os.EX_TEMPFAIL, "step_00000010"),  # there was one after step 9
        (99, DONE, "step_00000020"),
    ]
    for step, status, latest in starts:
        with monkeypatch.context() as patch:
            leap(patch, {step})
            assert run(prepare(config)) == status
        found = max((one.name for one in checkpoints.glob("step_*")), default="")
        assert found == latest
    kept = [checkpoints / f"step_{step:08d}" for step in (3, 6, 9, 12, 15, 18)]
    assert all(one.exists() for one in kept)
    assert [line["step"] for line in lines(config)] == list(range(1, 21))
    # 4 and 5, then 6, then 10
    assert lines(config)[-1]["skipped_steps"] == 4
    usual = saved_state(checkpoints / "step_00000020")
    assert all(tensor.isfinite().all() for tensor in usual.values())


@pytest.mark.faults
def test_the_usual_loss_is_remembered_over_a_restart_bit_for_bit(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    overrides = ("optim.steps=6", "journal.checkpoint_interval=3", "engine.on_spike=skip")
    whole = tiny(*overrides, f"output={tmp_path / 'whole'}")
    assert run(prepare(whole)) == DONE
    checkpoints = Path(whole.output) / "checkpoints"
    usual = saved_state(checkpoints / "step_00000006")["tensor/usual_loss"]
    assert usual > 0
    for path in checkpoints.glob("step_00000006/*"):
        path.unlink()
    assert run(prepare(whole)) == DONE
    again = saved_state(checkpoints / "step_00000006")["tensor/usual_loss"]
    assert torch.equal(again, usual)


def test_a_run_that_began_unwatched_is_watched_when_it_goes_on(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("optim.steps=4", "journal.checkpoint_interval=2")
    config = tiny(*overrides)
    assert run(prepare(config)) == DONE
    shutil.rmtree(Path(config.output) / "checkpoints" / "step_00000004")
    leap(monkeypatch, {2})  # the first that is judged is all that is known
    assert run(prepare(tiny(*overrides, "engine.on_spike=skip"))) == DONE
    assert lines(config)[-1]["skipped_steps"] == 1


@pytest.mark.faults
def test_watching_changes_no_bit_of_a_run_without_spikes(tiny: Tiny, tmp_path: Path) -> None:
    found = []
    for on_spike in ("ignore", "skip"):
        config = tiny(f"engine.on_spike={on_spike}", f"output={tmp_path / on_spike}")
        assert run(prepare(config)) == DONE
        found.append(weights(config))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_learning_rate_that_explodes_is_stopped_before_its_weights_are_saved(tiny: Tiny) -> None:
    config = tiny(
        "optim.base_lr=1e4",
        "optim.warmup_steps=0",
        "optim.steps=40",
        "journal.checkpoint_interval=1",
        "engine.on_spike=stop",
    )
    assert run(prepare(config)) == STOPPED_BY_POLICY
    assert lines(config)[-1]["step"] < 20


@pytest.mark.parametrize("on_spike", ["stop", "rollback"])
def test_fp16_skips_steps_by_itself(tiny: Tiny, on_spike: str) -> None:
    with pytest.raises(ValueError, match=f"engine.on_spike: {on_spike} does not fit fp16"):
        tiny(f"engine.on_spike={on_spike}", "engine.precision=fp16")
