"""Runs whose clips, or whose length, change on the way: stages, and schedules with a cooldown."""

import json
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from video_mae import ModelConfig, load_pretrained
from video_mae.config import PretrainConfig
from video_mae.data import ClipDataset, StepSampler, read_annotations
from video_mae.data.sampling import epoch_order
from video_mae.model.vit import VideoMAE
from video_mae.training.checkpoint import step_name
from video_mae.training.engine import Engine
from video_mae.training.loop import DONE
from video_mae.training.pretrain import prepare, run
from video_mae.training.stages import StageSampler, clip_stages

Tiny = Callable[..., PretrainConfig]
pytestmark = [pytest.mark.trains_here, pytest.mark.usefixtures("quiet_process")]

CONSTANT = "optim.schedule=constant_cooldown"
# (time, height, width) in tokens: 2 x 4 x 4 at first, then 1 x 2 x 3, then 3 x 4 x 4.
STAGED = [
    "optim.steps=6",
    "journal.checkpoint_interval=1",
    "journal.keep_checkpoints=9",
    "stages.small={from_step: 2, num_frames: 2, height: 16, width: 24, mask_ratio: 0.5, "
    "micro_batch: 7}",
    "stages.long={from_step: 4, num_frames: 6, stride: 1, micro_batch: 2}",
]
SHAPES = [(4, 4, 32, 32, 3)] * 2 + [(7, 2, 16, 24, 3)] * 2 + [(2, 6, 32, 32, 3)] * 2
VIDEOS = [0, 4, 8, 15, 22, 24, 26]  # before each step, and in all


def metrics(folder: Path, *keys: str) -> list[tuple[Any, ...]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [tuple(line[key] for key in keys) for line in lines]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def forget_after(folder: Path, step: int) -> None:
    """As if the machine had failed after the checkpoint of a step."""
    for checkpoint in (folder / "checkpoints").glob("step_*"):
        if checkpoint.name > step_name(step):
            shutil.rmtree(checkpoint)


def refused(config: PretrainConfig) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        prepare(config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def staged(tiny: Tiny, tmp_path: Path) -> PretrainConfig:
    config = tiny(*STAGED, f"output={tmp_path / 'staged'}")
    assert run(prepare(config)) == DONE
    return config


def test_a_step_has_clips_of_its_stage_and_takes_up_the_videos_where_the_last_one_stopped(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(*STAGED, "data.num_workers=2")
    seen: list[tuple[torch.Tensor, tuple[int, ...]]] = []
    forward, steps = VideoMAE.forward, Engine.step
    samples: list[int] = []

    def watched(self: VideoMAE, clip_BTHWC: torch.Tensor, mask: Any, *grid: Any) -> Any:
        if self.training:
            seen.append((clip_BTHWC, (mask.visible_BV.shape[1], mask.masked_BM.shape[1])))
        return forward(self, clip_BTHWC, mask, *grid)

    def step(self: Engine, lr: float) -> Any:
        norm = steps(self, lr)
        samples.append(self.deepspeed.global_samples)
        return norm

    monkeypatch.setattr(VideoMAE, "forward", watched)
    monkeypatch.setattr(Engine, "step", step)
    assert run(prepare(config)) == DONE
    assert [tuple(clip.shape) for clip, _ in seen] == SHAPES
    # int(ratio * tokens a frame) hidden in each of 2, 1 and 3 frames of tokens
    assert [counts for _, counts in seen] == [(8, 24)] * 2 + [(3, 3)] * 2 + [(12, 36)] * 2
    # What DeepSpeed counts is what was seen.
    assert samples == VIDEOS[1:]

    videos = read_annotations(config.data, "data.source")
    order = [(e, int(i)) for e in (0, 1) for i in epoch_order(config.seed, e, len(videos))]
    for number, (clip_BTHWC, _) in enumerate(seen):
        _, num_frames, height, width, _ = clip_BTHWC.shape
        data = tiny("data.stride=1").data if number >= 4 else config.data
        clips = ClipDataset(videos, data, num_frames, height, width, config.seed)
        keys = order[VIDEOS[number] : VIDEOS[number + 1]]
        expected = torch.stack([clips[key].clips[0] for key in keys])
        assert torch.equal(clip_BTHWC, expected), number


def test_journal_log_and_model_tell_what_each_stage_was(staged: PretrainConfig) -> None:
    folder = Path(staged.output)
    epochs = [epoch for (epoch,) in metrics(folder, "epoch")]
    assert epochs == [videos / 24 for videos in VIDEOS[1:]]
    rates = {lr for (lr,) in metrics(folder, "lr")}
    assert max(rates) == 0.05 * 4 / 256  # of the configuration's own micro-batch
    log = (folder / "log.txt").read_text()
    assert "clips of 4 x 32 x 32, 8 of 32 tokens visible, 24 predicted" in log
    assert "after step 2: 7 videos a step, clips of 2 x 16 x 24, 3 of 6 tokens visible" in log
    assert "after step 4: 2 videos a step, clips of 6 x 32 x 32, 12 of 48 tokens visible" in log
    assert load_pretrained(folder / "model").config == staged.model


def test_pictures_are_of_the_models_own_size(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    evaluate = Engine.evaluate

    def watched(self: Engine, *inputs: Any) -> Any:
        shapes.append(tuple(inputs[0].shape))
        return evaluate(self, *inputs)

    monkeypatch.setattr(Engine, "evaluate", watched)
    config = tiny(*STAGED, "journal.picture_interval=3", "optim.steps=5")
    assert run(prepare(config)) == DONE
    assert shapes == [(4, 4, 32, 32, 3)] * 2


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_run_that_stops_at_before_and_after_a_border_ends_with_the_same_bits(
    staged: PretrainConfig, stop: int
) -> None:
    folder, keys = Path(staged.output), ("step", "epoch", "loss", "lr", "grad_norm")
    before, undisturbed = metrics(folder, *keys), weights(folder)
    forget_after(folder, stop)
    assert run(prepare(staged)) == DONE
    assert f"resumed after step {stop}" in (folder / "log.txt").read_text()
    assert metrics(folder, *keys) == before
    assert weights(folder) == undisturbed


def test_a_stage_like_the_configuration_changes_no_bit(tiny: Tiny, tmp_path: Path) -> None:
    plain = tiny(f"output={tmp_path / 'plain'}", "data.clips_per_video=2")
    like = tiny(
        f"output={tmp_path / 'like'}",
        "data.clips_per_video=2",
        "stages.like={from_step: 0, num_frames: 4, height: 32, width: 32, mask_ratio: 0.75, "
        "micro_batch: 4, stride: 2}",
        "stages.null={from_step: 2}",
    )
    assert run(prepare(plain)) == run(prepare(like)) == DONE
    keys = ("step", "epoch", "loss", "lr", "grad_norm")
    assert metrics(Path(plain.output), *keys) == metrics(Path(like.output), *keys)
    assert weights(Path(plain.output)) == weights(Path(like.output))


@pytest.mark.parametrize(
    "changes",
    [
        ["model.positions=learned", "engine.zero_stage=3", "engine.precision=bf16"],
        ["model.positions=separate", "model.predicted_frames=2", "mask.decoder_mask_ratio=0.5"],
        ["model.positions=sincos", "model.class_tokens=1", "data.crop_where=device"],
    ],
)
def test_every_kind_of_model_trains_in_stages(tiny: Tiny, changes: list[str]) -> None:
    config = tiny(*STAGED, *changes)
    assert run(prepare(config)) == DONE
    folder = Path(config.output)
    assert all(0 < loss < 10 for (loss,) in metrics(folder, "loss"))
    assert load_pretrained(folder / "model").config == config.model


def test_whole_steps_an_epoch_and_lengths_in_epochs_go_with_stages_of_one_micro_batch(
    tiny: Tiny,
) -> None:
    config = tiny(
        "optim.steps=null",
        "optim.epochs=2",
        "optim.warmup_epochs=0",
        "optim.micro_batch=7",
        "optim.drop_last_batch=true",
        "stages.small={from_step: 4, height: 16}",
    )
    assert run(prepare(config)) == DONE
    epochs = [epoch for (epoch,) in metrics(Path(config.output), "epoch")]
    assert epochs == [(step + 1) / 3 for step in range(6)]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_each_video_of_an_epoch_comes_once_and_in_order_across_borders_on_two_ranks(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    config = tiny(*STAGED, f"optim.accumulation={accumulation}")
    stages = clip_stages(config, 6)

    def batches(rank: int, first_step: int = 0) -> list[list[tuple[int, int, int]]]:
        def key_at(position: int) -> tuple[int, int]:
            return divmod(position, 11)

        plain = StepSampler(11, 4, accumulation, rank, 2, 0, first_step, 6, key_at)
        sampler = StageSampler(plain, stages)
        assert list(sampler) == list(sampler)  # a loader whose workers die starts it again
        return list(sampler)

    both = list(zip(batches(0), batches(1), strict=True))
    keys = list(chain(*chain(*both)))
    assert [11 * epoch + index for _, epoch, index in keys] == list(range(len(keys)))
    sizes = [4] * 2 * accumulation + [7] * 2 * accumulation + [2] * 2 * accumulation
    assert [len(batch) for batch, _ in both] == [len(batch) for _, batch in both] == sizes
    numbers = [{stage for stage, _, _ in one + other} for one, other in both]
    assert numbers == [{number} for number in (0, 1, 2) for _ in range(2 * accumulation)]
    for step in range(7):
        assert batches(1, step) == batches(1)[accumulation * step :]
        taken = prepared_videos(stages, step)
        assert taken == len(list(chain(*chain(*both[: accumulation * step]))))


def prepared_videos(stages: Any, step: int) -> int:
    stage = [stage for stage in stages if stage.first_step <= step][-1]
    return stage.shift + step * stage.step_videos


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["stages.a={from_step: 1, height: 36}"], "stages.a.height: 36 is not a multiple"),
        (["stages.a={from_step: 1, num_frames: 3}"], "stages.a.num_frames: 3 is not a multiple"),
        (["stages.a={from_step: 1, mask_ratio: 0.01}"], "stages.a.mask_ratio: 0.01 of 16"),
        (["stages.a={height: 8, width: 8}"], "stages.a.mask_ratio: 0.75 of 1 tokens a frame hides"),
        (["stages.a={from_step: 4}"], "stages.a.from_step: 4 must be below the number of steps"),
        (["stages.a={from_step: 2}", "stages.b={from_step: 2}"], "stages.b.from_step: 2 must"),
        (
            [
                "stages.a={num_frames: 2, height: 16, width: 8, mask_ratio: 0.5}",
                "objective.contrastive_weight=1",
            ],
            "stages.a.mask_ratio: hides 1 tubelet of a clip",
        ),
        (
            ["stages.a={micro_batch: 2}", "optim.drop_last_batch=true"],
            "stages.a.micro_batch: 2 needs optim.steps, optim.drop_last_batch = false and no optim.global_batch",
        ),
        (
            ["stages.a={micro_batch: 2}", "optim.steps=null", "optim.epochs=50"],
            "stages.a.micro_batch: 2 needs optim.steps",
        ),
    ],
)
def test_a_stage_that_cannot_be_is_refused_before_any_work(
    tiny: Tiny, changes: list[str], said: str
) -> None:
    config = tiny(*changes)
    assert refused(config).startswith(said)
    assert not Path(config.output).exists()


def test_a_stage_does_not_change_the_stride_of_several_sources(tiny: Tiny) -> None:
    source = tiny().data.source
    config = tiny(
        "data.source=", "data.stride=4", f"data.sources.a.source={source}", "stages.a.stride=4"
    )
    assert refused(config).startswith("stages.a.stride: 4 does not reach data.sources")


def test_a_run_at_a_constant_rate_grows_and_cools_down_as_if_it_had_been_meant_to(
    tiny: Tiny, tmp_path: Path
) -> None:
    keys = ("step", "epoch", "loss", "lr", "grad_norm")
    cooled = ["optim.steps=6", "optim.cooldown_steps=2"]
    meant = tiny(CONSTANT, *cooled, f"output={tmp_path / 'meant'}")
    assert run(prepare(meant)) == DONE
    folder = Path(meant.output)
    peak, final = 0.05 * 4 / 256, 1e-5 * 4 / 256
    rates = [lr for (lr,) in metrics(folder, "lr")]
    # a warm-up of 1 step; 1 - sqrt(0 / 2), 1 - sqrt(1 / 2)
    assert rates == pytest.approx([peak] * 5 + [peak - (peak - final) * 0.5**0.5])
    line = "1 warm-up steps of 6, then constant, the last 2 a cooldown (1 - sqrt) to 1.563e-07"
    assert line in (folder / "log.txt").read_text()

    grown = tiny(CONSTANT, "optim.steps=2")
    assert run(prepare(grown)) == DONE
    longer = tiny(CONSTANT, "optim.steps=9", "optim.cooldown_steps=5", "journal.log_interval=1")
    prepare(longer)  # and then thought better of: the cooldown begins at the newest checkpoint
    assert run(prepare(tiny(CONSTANT, "optim.steps=4"))) == DONE
    assert run(prepare(tiny(CONSTANT, *cooled))) == DONE
    assert metrics(Path(grown.output), *keys) == metrics(folder, *keys)
    assert weights(Path(grown.output)) == weights(folder)


def test_steps_that_are_done_keep_their_rates(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(CONSTANT, "optim.steps=6", "optim.cooldown_steps=3", *STAGED[1:3])
    assert run(prepare(config)) == DONE
    # after step 4 the rates left the peak; the step before was at it in either case
    said = refused(tiny(CONSTANT, "optim.steps=8", "optim.cooldown_steps=3", *STAGED[1:3]))
    assert "6 steps are done, of which this start would leave 4 at their learning rates" in said
    assert "without the checkpoints after step 4" in said
    shorter = [CONSTANT, "optim.steps=5", "optim.cooldown_steps=2"]
    assert "would leave 4 at" in refused(tiny(*shorter))
    assert "would leave 0 at" in refused(tiny(CONSTANT, "optim.steps=6", "optim.warmup_steps=3"))
    assert "optim.schedule = constant_cooldown, now it is cosine" in refused(tiny("optim.steps=6"))
    assert "optim.micro_batch" in refused(tiny(CONSTANT, "optim.steps=6", "optim.micro_batch=2"))

    # A branch, as the README has it: another end for an older checkpoint, in a copy of the folder.
    branch = tmp_path / "branch"
    shutil.copytree(config.output, branch)
    for step in (5, 6):
        shutil.rmtree(branch / "checkpoints" / step_name(step))
    prepare(tiny(f"output={branch}", CONSTANT, "optim.steps=9", "optim.cooldown_steps=5"))
    shutil.rmtree(branch / "checkpoints" / step_name(4))
    ends = ["optim.steps=5", "optim.cooldown_steps=2", "journal.checkpoint_interval=1"]
    branched = tiny(f"output={branch}", CONSTANT, *ends)
    assert run(prepare(branched)) == DONE
    straight = tiny(f"output={tmp_path / 'straight'}", CONSTANT, *ends)
    assert run(prepare(straight)) == DONE
    keys = ("step", "epoch", "loss", "lr", "grad_norm")
    assert metrics(branch, *keys) == metrics(tmp_path / "straight", *keys)
    assert weights(branch) == weights(tmp_path / "straight")


def test_stages_that_have_not_begun_may_change_with_the_length(tiny: Tiny) -> None:
    def config(*changes: str) -> PretrainConfig:
        return tiny(CONSTANT, "stages.a={from_step: 1, height: 16}", *changes)

    assert run(prepare(config("optim.steps=3"))) == DONE
    later = "stages.b={from_step: 3, height: 24, micro_batch: 2}"
    assert "started with stages" in refused(config("optim.steps=5", "stages.b={from_step: 2}"))
    assert "started with stages" in refused(config("optim.steps=5", "stages.a.height=24"))
    assert run(prepare(config("optim.steps=5", "optim.cooldown_steps=2", later))) == DONE


def test_under_a_cosine_nothing_changes_on_the_way(tiny: Tiny) -> None:
    assert run(prepare(tiny("optim.steps=2"))) == DONE
    assert "started with optim.steps = 2, now it is 3" in refused(tiny("optim.steps=3"))
    assert "optim.schedule" in refused(tiny("optim.steps=2", CONSTANT))
    assert "stages" in refused(tiny("optim.steps=2", "stages.a.from_step=1"))


def test_a_stage_of_a_model_that_predicts_some_frames_keeps_its_head(tiny: Tiny) -> None:
    config = tiny("model.predicted_frames=2", "stages.a={num_frames: 8}")
    base, longer = clip_stages(config)
    own = ModelConfig(**{**vars(config.model), "num_frames": 8, "predicted_frames": 4})
    assert longer.config.model == own
    assert own.predicted_tubelet == base.config.model.predicted_tubelet == (1, 8, 8)
    assert longer.macs > base.macs
