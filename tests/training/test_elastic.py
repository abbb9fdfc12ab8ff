"""A run goes on in another mode, split into other micro-batches, and from the checkpoints of earlier
versions, in this process. Other numbers of ranks: test_elastic_worlds.py.
"""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_files import forgotten, losses, save_as_before, saved_state
from safetensors.torch import load_file, save_file

from video_mae.config import PretrainConfig
from video_mae.training import device_step
from video_mae.training.checkpoint import digest, step_name
from video_mae.training.engine import Engine
from video_mae.training.fragments import read
from video_mae.training.loop import DONE
from video_mae.training.pretrain import prepare, run

Tiny = Callable[..., PretrainConfig]

COMMON = ["optim.ema=0.9", "journal.checkpoint_interval=2"]


@pytest.mark.trains_here
@pytest.mark.usefixtures("quiet_process")
class TestRuns:
    """Runs in this process."""

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            (["engine.zero_stage=0"], ["engine.zero_stage=3", "engine.offload=parameters"]),
            (
                ["engine.zero_stage=3"],
                ["engine.zero_stage=2", "optim.micro_batch=1", "optim.accumulation=4"],
            ),
            pytest.param(
                ["engine.zero_stage=1", "engine.offload=optimizer"],
                ["engine.zero_stage=0"],
                marks=pytest.mark.faults,
            ),
        ],
        ids=["0to3", "3to2", "1to0"],
    )
    def test_a_run_goes_on_in_another_mode(
        self, tiny: Tiny, tmp_path: Path, before: list[str], after: list[str]
    ) -> None:
        assert run(prepare(tiny(*COMMON, *before))) == DONE
        whole = tmp_path / "run"
        changed = forgotten(whole, tmp_path / "changed", 2)
        assert run(prepare(tiny(*COMMON, *after, f"output={changed}"))) == DONE
        assert losses(changed) == pytest.approx(losses(whole), rel=1e-4)
        assert losses(changed)[:2] == losses(whole)[:2]
        for name in ("model", "model_ema"):
            ours, theirs = (
                load_file(folder / name / "model.safetensors") for folder in (changed, whole)
            )
            for key, value in ours.items():
                torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e-5)
        ours, theirs = (
            saved_state(folder / "checkpoints" / step_name(4)) for folder in (changed, whole)
        )
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=1e-5)
        stage = before[0][-1]
        assert (
            f"step_00000002: was written with zero_stage = {stage}, this start has"
            in (changed / "log.txt").read_text()
        )

    def test_a_changed_state_is_what_was_written_to_the_bit(
        self, tiny: Tiny, tmp_path: Path
    ) -> None:
        """Nothing is trained: 2 of 2 steps are done."""
        config = tiny(*COMMON, "optim.steps=2", "engine.zero_stage=3", "engine.precision=bf16")
        assert run(prepare(config)) == DONE
        written = saved_state(tmp_path / "run" / "checkpoints" / step_name(2))
        for stage, precision in ((0, "fp32"), (1, "bf16"), (0, "bf16"), (3, "fp32")):
            mode = [f"engine.zero_stage={stage}", f"engine.precision={precision}"]
            training = prepare(tiny(*COMMON, "optim.steps=2", *mode))
            training.engine = engine = Engine(training.make_model()[0], training.config)
            training.begin()
            assert engine.resume(training.tensors())[0] == 2
            engine.save(7, {}, training.tensors(), tuple)
            again = tmp_path / "run" / "checkpoints" / step_name(7)
            found = saved_state(again)
            assert written.keys() == found.keys()
            assert all(torch.equal(written[key], found[key]) for key in written)
            facts, before = (
                json.loads((folder / "MANIFEST.json").read_text())
                for folder in (again, again.with_name(step_name(2)))
            )
            for key in ("counters", "updates", "videos_per_step"):
                assert facts[key] == before[key], key
            shutil.rmtree(again)

    @pytest.mark.parametrize(
        ("stage", "precision"),
        [
            (0, "fp32"),
            pytest.param(0, "bf16", marks=pytest.mark.faults),
            pytest.param(2, "bf16", marks=pytest.mark.faults),
        ],
    )
    def test_a_checkpoint_of_an_earlier_version_goes_on_to_the_same_bits(
        self,
        tiny: Tiny,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        stage: int,
        precision: str,
    ) -> None:
        mode = [f"engine.zero_stage={stage}", f"engine.precision={precision}"]
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "save", save_as_before)
            assert run(prepare(tiny(*COMMON, *mode))) == DONE
        whole = tmp_path / "run"
        again = forgotten(whole, tmp_path / "again", 2)
        other = [f"engine.zero_stage={3 - stage}", "optim.micro_batch=2", "optim.accumulation=2"]
        with pytest.raises(
            ValueError,
            match=rf"step_00000002: was written with zero_stage = {stage}, this start has "
            rf"{3 - stage}; an earlier version wrote it: start as before until there is a newer",
        ):
            prepare(tiny(*COMMON, *mode, *other, f"output={again}"))
        with pytest.raises(ValueError, match=r"with ranks x optim.* = 4, now it is 2;"):
            prepare(tiny(*COMMON, *mode, "optim.micro_batch=2", f"output={again}"))
        assert run(prepare(tiny(*COMMON, *mode, f"output={again}"))) == DONE
        assert losses(again) == losses(whole)
        for name in ("model", "model_ema"):
            ours, theirs = (
                load_file(folder / name / "model.safetensors") for folder in (again, whole)
            )
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        prepare(tiny(*COMMON, *mode, *other, f"output={again}"))  # whose newest is of this version

    def test_what_would_be_another_run_is_refused(self, tiny: Tiny) -> None:
        contrast = ["objective.contrastive_weight=0.1", "objective.negatives=batch"]
        same = ["optim.steps=2", *contrast]
        assert run(prepare(tiny(*same))) == DONE
        for changes, message in (
            (
                ["optim.accumulation=2"],
                r"with ranks x optim.micro_batch x optim.accumulation = 4, now it is 8; set it ba",
            ),
            # negatives come from a micro-batch
            (
                ["optim.micro_batch=2", "optim.accumulation=2"],
                r"started with optim.micro_batch = 4, now it is 2",
            ),
            (["optim.base_lr=0.1"], r"started with optim.base_lr = 0.05, now it is 0.1"),
        ):
            with pytest.raises(ValueError, match=message):
                prepare(tiny(*same, *changes))

    def test_a_checkpoint_without_a_part_of_the_state_is_told(
        self, tiny: Tiny, tmp_path: Path
    ) -> None:
        assert run(prepare(tiny("optim.steps=2"))) == DONE
        folder = tmp_path / "run" / "checkpoints" / step_name(2)
        file = folder / "state_00000.safetensors"
        tensors = load_file(file)
        tensors.pop("exp_avg/encoder.norm.bias/0")
        save_file(tensors, file)
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        manifest["files"][file.name] = digest(file)
        (folder / "MANIFEST.json").write_text(json.dumps(manifest))
        with pytest.raises(
            ValueError, match=r"32 numbers of exp_avg/encoder.norm.bias are in none"
        ):
            run(prepare(tiny("optim.steps=2")))


@pytest.mark.parametrize("cuts", [(0, 10), (0, 4, 10), (0, 1, 1, 7, 10), (0, 5, 10)])
def test_fragments_are_read_by_whoever_wrote_them(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    whole = torch.arange(10.0)
    for rank, (begin, end) in enumerate(pairwise(cuts)):
        part = whole[begin:end]
        state = {f"weight/a.b/{begin}": part, f"exp_avg/a.b/{begin}": -part}
        save_file(state, tmp_path / f"state_{rank:05d}.safetensors")
    for begin, end in ((0, 10), (0, 3), (3, 9), (9, 10), (6, 6)):
        view = torch.full((end - begin,), torch.nan, dtype=torch.bfloat16)
        read(tmp_path, {"weight/a.b": (begin, view)})
        assert torch.equal(view.float(), whole[begin:end])
    with pytest.raises(ValueError, match=r"2 numbers of weight/a.b are in none of its files"):
        read(tmp_path, {"weight/a.b": (8, torch.zeros(4))})
    with pytest.raises(ValueError, match=r"4 numbers of weight/a are in none of its files"):
        read(tmp_path, {"weight/a": (8, torch.zeros(4))})


@pytest.mark.parametrize("attribute", ["loss_scaler", "loss_scale_config"])
def test_the_loss_scale_of_half_precision_is_that_of_either_wrapper(attribute: str) -> None:
    """A stand-in: on a CPU there is no such run."""
    scaler = SimpleNamespace(cur_scale=4.0, cur_iter=7, dtype=torch.half)
    wrapper = SimpleNamespace(**{attribute: scaler})
    deepspeed: Any = SimpleNamespace(optimizer=wrapper, fp16_enabled=lambda: True, global_steps=3)
    device_step.counters(deepspeed)[1]["cur_scale"] = 2.0
    assert scaler.cur_scale == 2
    engine, scale = device_step.counters(deepspeed)
    assert (engine["global_steps"], scale["cur_iter"]) == (3, 7)
    deepspeed.fp16_enabled = lambda: False
    assert device_step.counters(deepspeed) == [vars(deepspeed)]
