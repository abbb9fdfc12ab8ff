"""Pretraining runs in this process: what a run leaves, how it goes on, what stops it."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import saved_state

from video_mae import load_pretrained
from video_mae.config import ClipsConfig, PretrainConfig, load_config
from video_mae.data import ClipDataset
from video_mae.decoding import resolve_decoder
from video_mae.model.objective import Losses, Objective
from video_mae.report.page import write_report
from video_mae.training import run_page
from video_mae.training.checkpoint import step_name
from video_mae.training.deepspeed_config import deepspeed_config
from video_mae.training.engine import Engine
from video_mae.training.environment import prepare_environment
from video_mae.training.loop import DONE, STOPPED_BY_POLICY
from video_mae.training.pretrain import prepare, run

Tiny = Callable[..., PretrainConfig]
METRICS = {
    "step",
    "epoch",
    "loss",
    "reconstruction_loss",
    "contrastive_loss",
    "lr",
    "grad_norm",
    "clips_per_second",
    "data_wait",
    "mfu",
    "memory_gb",
    "skipped_steps",
}

pytestmark = [pytest.mark.trains_here, pytest.mark.usefixtures("quiet_process")]


def lines(config: PretrainConfig, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.output) / file).read_text().splitlines()]


def losses(config: PretrainConfig) -> list[float]:
    return [line["loss"] for line in lines(config)]


def test_a_run_leaves_the_promised_folder(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_page, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(run_page, "INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(run_page, "MOST_SHARE", 1000.0)
    states: list[bool] = []

    def write(folder: Path, say: Callable[[str], None]) -> None:
        states.append("finished" in json.loads((folder / "run.json").read_text()))
        write_report(folder, say)

    monkeypatch.setattr(run_page, "write_report", write)
    config = tiny(
        "journal.checkpoint_interval=2",
        "journal.picture_interval=3",
        "journal.tensorboard=true",
        "mask.decoder_mask_ratio=0.5",
        "objective.contrastive_weight=0.1",
        "data.clips_per_video=2",
    )
    assert run(prepare(config)) == DONE
    folder = Path(config.output)
    for name in (
        "deepspeed.json",
        "log.txt",
        "report.html",
        "run.json",
        "model/config.json",
        "model/model.safetensors",
        "reconstructions/step_00000003.png",
        "reconstructions/step_00000004.png",
        "reconstructions/step_00000004.webp",
        "checkpoints/step_00000004/MANIFEST.json",
    ):
        assert (folder / name).stat().st_size > 0, name
    decoder = resolve_decoder("auto")
    assert load_config(folder / "config.yaml") == replace(
        config, data=replace(config.data, decoder=decoder)
    )
    model = load_pretrained(folder)
    assert model.clips_config == ClipsConfig(stride=2, mask=config.mask)
    assert (folder / "checkpoints" / "latest").read_text() == "step_00000004\n"
    assert any("tfevents" in file.name for file in (folder / "tensorboard").rglob("*"))
    assert states == [False, False, False, True]  # after each line, and at the end
    written = lines(config)
    assert [line["step"] for line in written] == [1, 2, 3, 4]
    assert all(line.keys() >= METRICS for line in written)
    assert all(
        abs(line["loss"] - line["reconstruction_loss"] - 0.1 * line["contrastive_loss"]) < 1e-5
        for line in written
    )
    assert written[-1]["epoch"] == pytest.approx(4 * 4 / 24)
    assert all(line["grad_norm"] > 0 for line in written)
    log = (folder / "log.txt").read_text()
    assert "0.0007813 = 0.05 x global batch 4 / 256" in log
    assert "gather_tubelets = reference" in log


def test_there_is_room_for_the_gradients_of_the_model_and_no_more(tiny: Tiny) -> None:
    room = "engine.extra={zero_optimization: {reduce_bucket_size: 7000}}"
    for name, overrides in (("own", []), ("given", [room])):
        config = tiny("optim.steps=1", "engine.zero_stage=3", f"output=runs/{name}", *overrides)
        training = prepare(config)
        zero = Engine(training.make_model()[0], config).dictionary["zero_optimization"]
        num_parameters = sum(p.numel() for p in training.make_model()[0].parameters())
        assert zero["reduce_bucket_size"] == (7000 if overrides else num_parameters)


def test_the_model_folder_holds_what_was_trained(tiny: Tiny) -> None:
    config = tiny("optim.steps=2")
    run(prepare(config))
    state = saved_state(Path(config.output) / "checkpoints" / step_name(2))
    loaded = load_pretrained(Path(config.output) / "model").state_dict()
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    kept = {f"{kind}/{name}" for name in loaded for kind in kinds}
    assert kept | {"tensor/usual_loss"} == state.keys()
    assert all(torch.equal(loaded[name].flatten(), state[f"weight/{name}"]) for name in loaded)


def test_the_decoder_of_a_run_can_see_all_that_the_cell_chooses_and_its_model_keeps_that(
    tiny: Tiny,
) -> None:
    config = tiny(
        "optim.steps=2",
        "mask.decoder_mask_ratio=0.5",
        "model.decoder_context=all",
        "journal.picture_interval=2",
    )
    plan = prepare(config)
    assert run(plan) == DONE
    visible = plan.base.num_visible
    assert (
        f"{visible} of 32 tokens visible, 12 predicted, {visible - visible // 2} "
        f"more in the decoder" in (Path(config.output) / "log.txt").read_text()
    )
    assert load_pretrained(Path(config.output) / "model").config.decoder_context == "all"


@pytest.mark.parametrize(
    "changes",
    [
        ["mask.kind=random"],
        [
            "mask.kind=random_kept",
            "mask.ratio=0.8",
            "optim.decay_tokens=true",
            "data.reach_end=false",
        ],
        ["mask.kind=frame", "mask.ratio=0.5"],
        ["model.num_frames=1", "model.tubelet_size=1"],
        ["objective.normalize=tubelet"],
        ["objective.normalize=none", "data.crop=center", "data.flip=true"],
        [
            "objective.contrastive_weight=0.2",
            "objective.learn_temperature=true",
            "objective.negatives=batch",
        ],
        ["engine.zero_stage=2", "engine.offload=optimizer"],
        ["engine.zero_stage=3", "engine.offload=parameters"],
        ["model.drop_path=0.2", "engine.precision=bf16"],
    ],
)
def test_every_mode_trains(tiny: Tiny, changes: list[str]) -> None:
    config = tiny("optim.steps=3", *changes)
    assert run(prepare(config)) == DONE
    assert all(0 < loss < 10 for loss in losses(config))
    assert lines(config)[-1]["skipped_steps"] == 0


@pytest.mark.parametrize("stage", [0, 3])
def test_activation_checkpointing_changes_nothing_but_memory(
    tiny: Tiny, tmp_path: Path, stage: int
) -> None:
    plain, checkpointed = (
        tiny(
            f"engine.zero_stage={stage}",
            f"engine.activation_checkpointing={flag}",
            f"output={tmp_path / flag}",
        )
        for flag in ("false", "true")
    )
    run(prepare(plain))
    run(prepare(checkpointed))
    assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-6)


def test_compiling_changes_the_speed_and_not_the_curve(tiny: Tiny, tmp_path: Path) -> None:
    plain, compiled = (
        tiny(
            f"engine.compile={flag}",
            "optim.steps=2",
            "engine.zero_stage=2",
            f"output={tmp_path / flag}",
        )
        for flag in ("false", "true")
    )
    run(prepare(plain))
    run(prepare(compiled))
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks on GPUs do not share cores out")
@pytest.mark.parametrize("variable", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"])
def test_ranks_of_a_launcher_share_the_cores(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    # the process group of these tests exists, whatever the variables say next
    run(prepare(tiny("optim.steps=1")))
    for name in ("OMP_NUM_THREADS", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "2")
    prepare_environment()
    assert torch.get_num_threads() == max(1, len(os.sched_getaffinity(0)) // 2)


def at_calls(
    monkeypatch: pytest.MonkeyPatch, calls: set[int], happens: Callable[[Losses], Losses]
) -> None:
    """Lets something happen to the losses of some forward passes."""
    healthy, done = Objective.forward, [0]

    def forward(self: Objective, *arguments: torch.Tensor) -> Losses:
        done[0] += 1
        losses = healthy(self, *arguments)
        return happens(losses) if done[0] in calls else losses

    monkeypatch.setattr(Objective, "forward", forward)


def poison(monkeypatch: pytest.MonkeyPatch, bad_calls: set[int]) -> None:
    """Makes the loss of some forward passes NaN, as a broken kernel or an overflow would."""
    at_calls(
        monkeypatch, bad_calls, lambda losses: losses._replace(loss=losses.loss * float("nan"))
    )


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")],
)
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, stage: int, precision: str
) -> None:
    config = tiny(
        f"engine.zero_stage={stage}",
        f"engine.precision={precision}",
        "optim.accumulation=2",
        "optim.micro_batch=2",
    )
    poison(monkeypatch, {3})  # the first micro-batch of step 2
    assert run(prepare(config)) == DONE
    assert [line["skipped_steps"] for line in lines(config)] == [0, 1, 1, 1]
    assert lines(config)[1]["loss"] is None
    assert all(line["loss"] is not None for line in lines(config)[2:])
    state = load_pretrained(Path(config.output) / "model").state_dict()
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert "step 2: skipped" in (Path(config.output) / "log.txt").read_text()


def test_accumulation_does_not_change_the_joint_loss_however_flat_some_clips_are(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = Objective.forward

    def forward(
        self: Objective, predicted: torch.Tensor, clip: torch.Tensor, masked: torch.Tensor
    ) -> Losses:
        """Blackens a part of every clip, by what it shows: none of it, half, nearly all, all."""
        clip = clip.clone()
        for video in clip:
            video[:, : (0, 16, 24, 32)[int(video.sum()) % 4]] = 0
        return healthy(self, predicted, clip, masked)

    monkeypatch.setattr(Objective, "forward", forward)
    curves = []
    for micro_batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        config = tiny(
            f"output={tmp_path / str(accumulation)}",
            f"optim.micro_batch={micro_batch}",
            f"optim.accumulation={accumulation}",
            "objective.contrastive_weight=1",
            "objective.learn_temperature=true",
            "objective.temperature=0.2",
        )
        assert run(prepare(config)) == DONE
        curves.append(
            [
                line[key]
                for line in lines(config)
                for key in ("loss", "contrastive_loss", "grad_norm")
            ]
        )
    assert len(curves[0]) == 12
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[2] == pytest.approx(curves[0], rel=1e-4)


def test_many_bad_steps_in_a_row_stop_the_run_before_a_checkpoint_of_them(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(
        "optim.steps=20", "journal.checkpoint_interval=4", "engine.max_skipped_in_a_row=3"
    )
    poison(monkeypatch, set(range(6, 100)))
    assert run(prepare(config)) == STOPPED_BY_POLICY
    assert "3 steps in a row were not finite" in (Path(config.output) / "log.txt").read_text()
    assert lines(config)[-1]["step"] == 8
    assert (Path(config.output) / "checkpoints" / "latest").read_text() == "step_00000004\n"


def test_between_lines_and_checkpoints_bad_steps_are_known_a_step_late(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(
        "optim.steps=20",
        "journal.log_interval=15",
        "journal.checkpoint_interval=5",
        "engine.max_skipped_in_a_row=3",
    )
    poison(monkeypatch, {2, *range(6, 100)})
    assert run(prepare(config)) == STOPPED_BY_POLICY
    told = [
        line.split("  ", 1)[1]
        for line in (Path(config.output) / "log.txt").read_text().splitlines()
        if "step" in line
    ]
    skipped = [(2, 1), (6, 1), (7, 2), (8, 3)]
    assert told[-5:-1] == [
        f"step {step}: skipped, a loss or gradient was not finite ({row} in a row)"
        for step, row in skipped
    ]
    assert told[-1].startswith("stopped at step 9: 3 steps in a row were not finite")
    assert (Path(config.output) / "checkpoints" / "latest").read_text() == "step_00000005\n"


def test_the_line_of_an_interval_counts_its_skipped_steps_and_the_last_step_is_not_forgotten(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("optim.steps=6", "journal.log_interval=4")
    poison(monkeypatch, {2, 4, 6})
    assert run(prepare(config)) == DONE
    assert [line["skipped_steps"] for line in lines(config)] == [2, 3]
    assert "step 6: skipped" in (Path(config.output) / "log.txt").read_text()


def test_a_signal_stops_the_run_a_step_later_with_a_checkpoint(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(losses: Losses) -> Losses:
        os.kill(os.getpid(), signal.SIGTERM)
        return losses

    whole, config = (
        tiny("journal.log_interval=6", "optim.steps=6", f"output={tmp_path / 'whole'}"),
        tiny("journal.log_interval=6", "optim.steps=6"),
    )
    run(prepare(whole))
    with monkeypatch.context() as patch:
        at_calls(patch, {3}, interrupt)
        assert run(prepare(config)) == 128 + signal.SIGTERM
    assert "stopped by signal 15 after step 4" in (Path(config.output) / "log.txt").read_text()
    assert (Path(config.output) / "checkpoints" / "latest").read_text() == "step_00000004\n"
    assert run(prepare(config)) == DONE
    files = [Path(folder.output) / "model" / "model.safetensors" for folder in (whole, config)]
    assert files[0].read_bytes() == files[1].read_bytes()


def list_with_junk(demo_folder: Path, folder: Path, good: int, bad: int) -> Path:
    videos = [
        demo_folder / line.rsplit(" ", 1)[0]
        for line in (demo_folder / "train.txt").read_text().splitlines()[:good]
    ]
    for number in range(bad):
        junk = folder / f"junk {number}.mp4"
        junk.write_bytes(b"not a video " * 50)
        videos.insert(3 * number, junk)
    (folder / "videos.txt").write_text("".join(f"{video}\n" for video in videos))
    return folder / "videos.txt"


def test_undecodable_videos_are_replaced_and_named_once(
    tiny: Tiny, demo_folder: Path, tmp_path: Path
) -> None:
    videos = list_with_junk(demo_folder, tmp_path, good=9, bad=3)
    config = tiny(
        f"data.source={videos}", "optim.steps=12", "data.max_bad_share=0.3", "data.num_workers=2"
    )
    assert run(prepare(config)) == DONE
    named = [Path(entry["path"]).name for entry in lines(config, "quarantine.jsonl")]
    assert sorted(named) == ["junk 0.mp4", "junk 1.mp4", "junk 2.mp4"]
    assert lines(config)[-1]["bad_videos"] == 3


def test_too_many_undecodable_videos_stop_the_run(
    tiny: Tiny, demo_folder: Path, tmp_path: Path
) -> None:
    videos = list_with_junk(demo_folder, tmp_path, good=9, bad=3)
    config = tiny(f"data.source={videos}", "optim.steps=50")
    assert run(prepare(config)) == STOPPED_BY_POLICY
    log = (Path(config.output) / "log.txt").read_text()
    assert "data.max_bad_share = 0.05" in log
    assert "quarantine.jsonl" in log
    assert lines(config)[-1]["step"] < 50


def test_a_run_folder_belongs_to_one_run(tiny: Tiny, tmp_path: Path) -> None:
    run(prepare(tiny("optim.steps=2")))
    with pytest.raises(
        ValueError, match=r"run: this run was started with optim.steps = 2, now it is 3"
    ):
        prepare(tiny("optim.steps=3"))
    # how it is watched may change
    prepare(tiny("optim.steps=2", "journal.log_interval=7", "data.num_workers=1"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"mine: is not empty and not a run folder"):
        prepare(tiny(f"output={tmp_path / 'mine'}"))
    # a rank that hangs before there is a configuration leaves this
    (tmp_path / "hung" / ".heartbeats").mkdir(parents=True)
    (tmp_path / "hung" / "log.txt").write_text("stalled: rank 0\n")
    prepare(tiny(f"output={tmp_path / 'hung'}"))


def test_a_finished_run_stays_as_it_is(tiny: Tiny) -> None:
    config = tiny("optim.steps=2")
    run(prepare(config))
    files = [
        Path(config.output) / name
        for name in ("metrics.jsonl", "model/model.safetensors", "checkpoints/latest")
    ]
    before = [file.read_bytes() for file in files]
    assert run(prepare(config)) == DONE
    assert [file.read_bytes() for file in files] == before


def test_another_number_of_ranks_keeps_the_global_batch_or_is_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(prepare(tiny("engine.zero_stage=1", "optim.steps=2")))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError,
        match=r"run: this run was started with ranks x optim.micro_batch x optim.accumulation = 4, "
        r"now it is 8; set it back",
    ):
        prepare(tiny("engine.zero_stage=1", "optim.steps=2"))
    training = prepare(tiny("engine.zero_stage=2", "optim.steps=2", "optim.micro_batch=2"))
    told = [line for line in training.introduction if "step_00000002" in line]
    assert [line.split("was written with ")[1] for line in told] == [
        "world_size = 1, this start has 2",
        "zero_stage = 1, this start has 2",
    ]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tiny: Tiny) -> None:
    config = tiny("journal.checkpoint_interval=2")
    run(prepare(config))
    before = losses(config)
    newest = Path(config.output) / "checkpoints" / step_name(4)
    file = newest / "state_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert run(prepare(config)) == DONE
    assert losses(config) == before  # steps 3 and 4 were done again from step 2
    log = Path(config.output) / "log.txt"
    assert "resumed after step 2" in log.read_text()
    assert run(prepare(config)) == DONE
    assert losses(config) == before
    assert "already finished, all of its 4 steps are done" in log.read_text()
    assert "resumed after step 4" not in log.read_text()


def test_a_run_that_drops_last_batches_sees_each_video_once_an_epoch_and_goes_on_exactly(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    original = ClipDataset.__getitem__
    monkeypatch.setattr(
        ClipDataset, "__getitem__", lambda self, key: seen.append(key) or original(self, key)
    )
    config = tiny(
        "optim.steps=null",
        "optim.epochs=3",
        "optim.warmup_epochs=1",
        "optim.micro_batch=7",
        "optim.drop_last_batch=true",
        "journal.checkpoint_interval=4",
        "journal.picture_interval=0",
        "journal.picture_clips=1",
    )
    assert run(prepare(config)) == DONE
    trained = [key for key in seen if key != (0, 0)]  # which the picture shows, too
    assert [line["epoch"] for line in lines(config)] == [(step + 1) / 3 for step in range(9)]
    for epoch in range(3):
        visited = [index for e, index in trained if e == epoch]
        assert len(set(visited)) == len(visited)
        assert len(visited) in (20, 21)  # of 24 videos, without the one that is not counted here
    before = losses(config)
    shutil.rmtree(Path(config.output) / "checkpoints" / step_name(9))
    (Path(config.output) / "checkpoints" / "latest").write_text(step_name(8) + "\n")
    assert run(prepare(config)) == DONE
    assert losses(config) == before
    assert "resumed after step 8" in (Path(config.output) / "log.txt").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.source=/nowhere/list.txt", "no such list file or folder: /nowhere/list.txt"),
        ("mask.ratio=0.01", "mask.ratio: 0.01 of 16 tokens a frame hides 0"),
        (
            "engine.kernels=triton",
            "engine.kernels: gather_tubelets: impl triton needs a CUDA device",
        ),
        (
            "engine.extra={zero_optimisation: {stage: 3}}",
            r"zero_optimisation: DeepSpeed has no such key \(did you mean zero_optimization",
        ),
        (
            "journal.wandb_project=mine",
            r"journal.wandb_project: wandb is not installed; pip install 'video-mae\[wandb\]'",
        ),
        (
            "engine.extra={gradient_clipping: 1.0}",
            "engine.extra.gradient_clipping: is set by this program",
        ),
        (
            "engine.extra={zero_optimization: {stage: 3}}",
            "engine.extra.zero_optimization.stage: is set by this program",
        ),
        (
            "engine.extra={zero_optimization: {reduce_bucket_size: many}}",
            r"engine.extra.zero_optimization: DeepSpeed: 1 .* reduce_bucket_size Input should be a v",
        ),
        (
            "engine.extra={zero_optimization: {reduce_bucket_siz: 7}}",
            r"engine.extra.zero_optimization: DeepSpeed: 1 .* reduce_bucket_siz Extra inputs are no",
        ),
        (
            "engine.extra={flops_profiler: {enabld: true}}",
            r"engine.extra.flops_profiler.enabld: DeepSpeed has no such key \(did you mean enabled",
        ),
        ("engine.extra={checkpoint: {tag_validation: x}}", "engine.extra.checkpoint: DeepSpeed: "),
        ("engine.extra={prescale_gradients: 7}", "engine.extra.prescale_gradients: 7 is not what"),
        ("engine.extra={communication_data_type: fp31}", "communication_data_type: DeepSpeed: Inv"),
        ("engine.extra={bf16: {no: 1}}", "engine.extra.bf16: DeepSpeed: 1 .* no Extra inp"),
        ("engine.extra={timers: 7}", "engine.extra.timers: 7 is not what DeepSpeed takes"),
        ("engine.extra={sparse_gradients: true}", "sparse_gradients: DeepSpeed has no such key"),
    ],
)
def test_what_cannot_run_is_refused_before_it_starts(
    tiny: Tiny, override: str, message: str
) -> None:
    config = tiny(override)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        prepare(config)
    assert len(str(error.value).splitlines()) == 1
    assert not Path(config.output).exists()


def test_extra_reaches_deepspeed_and_defaults_are_written_out(tiny: Tiny) -> None:
    config = tiny(
        "engine.extra={zero_optimization: {reduce_bucket_size: 12345}, prescale_gradients: true}",
        "engine.zero_stage=2",
        "optim.accumulation=3",
        "data.clips_per_video=2",
    )
    made = deepspeed_config(config, 4)
    assert made["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 12345}
    assert made["prescale_gradients"] is True
    assert (
        made["train_micro_batch_size_per_gpu"],
        made["gradient_accumulation_steps"],
        made["train_batch_size"],
    ) == (8, 3, 96)
    assert made["gradient_clipping"] == 0.0  # left out, DeepSpeed would clip at 1
