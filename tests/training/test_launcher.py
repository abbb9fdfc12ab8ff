"""Real processes: the deepspeed launcher with two ranks on this machine, and signals to a run."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_files import saved_state
from safetensors.torch import load_file

from video_mae import VideoClassifier, VideoMAE, save_model_folder
from video_mae.config import FinetuneConfig, load_config
from video_mae.config.schema import save_config

RUNS = Path(__file__).parent / "launched" / "runs.py"
LAUNCHER = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
CURVE = ["optim.steps=30", "optim.warmup_steps=5", "objective.contrastive_weight=0.1"]
RESUMED = [
    "optim.steps=5",
    "journal.checkpoint_interval=3",
    "optim.clip_grad=0.5",
    "optim.accumulation=2",
]
MOVING_TEACHER = [
    "objective.target=features",
    "objective.teacher=ema",
    "objective.teacher_momentum=0.5",
    "optim.ema=0.9",
]
FEATURES = [
    *CURVE,
    "objective.target=features",
    "objective.learn_temperature=true",
    "optim.steps=10",
]
STAGED = [
    "optim.steps=5",
    "optim.micro_batch=2",
    "engine.zero_stage=2",
    "data.num_workers=1",
    "stages.small={from_step: 1, height: 16, mask_ratio: 0.5}",
    "stages.many={from_step: 2, num_frames: 2, micro_batch: 5}",
]
GLOBAL_BATCH = 8
MODES = [(0.0, 1), (0.5, 4)]
"""(mask.decoder_mask_ratio, optim.accumulation) of the curves."""
# Nothing is drawn for a rank or a batch, everything for a video: the curve is that of one process.
FINETUNE_CURVE = [
    "optim.steps=20",
    "optim.warmup_steps=5",
    "data.clips_per_video=2",
    "augment.mix_probability=0",
    "validation.interval=6",
    "model.depth=3",
    "optim.layer_decay=0.7",
    "optim.ema=0.9",
    "journal.log_interval=2",
]
# Fine-tuning in which something of the encoder stays as it is.
PARTS = {
    "lora2": [
        "lora.rank=3",
        "lora.targets=attention_mlp",
        "engine.zero_stage=2",
        "engine.precision=bf16",
    ],
    "lora3": ["lora.rank=3", "engine.zero_stage=3"],
    "frozen1": ["freeze_blocks=2", "engine.zero_stage=1", "engine.precision=bf16"],
    "frozen3": ["freeze_blocks=1", "engine.zero_stage=3", "engine.precision=bf16"],
}

pytestmark = pytest.mark.launcher


def launch(
    *command: str,
    status: int = 0,
    launcher: bool = True,
    seconds: int = 420,
    variables: dict[str, str] | None = None,
) -> str:
    environment = {
        **os.environ,
        **(variables or {}),
        **({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}),
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    start = [*LAUNCHER, "--master_port", port] if launcher else [sys.executable]
    result = subprocess.run(
        [*start, *command],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=environment,
        check=False,
    )
    assert result.returncode == status, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout + result.stderr


def lines(run: Path, key: str, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a journal that have a key."""
    return [line for line in map(json.loads, (run / file).read_text().splitlines()) if key in line]


def losses(run: Path, file: str = "metrics.jsonl") -> list[float]:
    return [line["loss"] for line in lines(run, "loss", file)]


def batch(accumulation: int, ranks: int) -> list[str]:
    return [
        f"optim.accumulation={accumulation}",
        f"optim.micro_batch={GLOBAL_BATCH // accumulation // ranks}",
    ]


@pytest.fixture(scope="module")
def finished(demo_folder: Path, tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pretraining runs of two ranks in one launch, their single-process twins in another."""
    single = [
        {
            "name": f"single_{dual}_{accumulation}",
            "overrides": [*CURVE, *batch(accumulation, 1), f"mask.decoder_mask_ratio={dual}"],
        }
        for dual, accumulation in MODES
    ]
    double = [
        {
            "name": f"stage{stage}_{dual}_{accumulation}",
            "overrides": [
                *CURVE,
                *batch(accumulation, 2),
                f"mask.decoder_mask_ratio={dual}",
                f"engine.zero_stage={stage}",
            ],
        }
        for stage in range(4)
        for dual, accumulation in MODES
    ]
    double += [
        {
            "name": f"resumed{stage}_{precision}",
            "crash_after": 3,
            "overrides": [
                *RESUMED,
                "optim.ema=0.9",
                f"engine.zero_stage={stage}",
                f"engine.precision={precision}",
            ],
        }
        for stage in range(4)
        for precision in ("fp32", "bf16")
    ]
    probe = [
        f"probe.train={demo_folder / 'train.txt'}",
        f"probe.validation={demo_folder / 'val.txt'}",
        "probe.num_videos=7",  # an odd number for two ranks
        "probe.interval=4",
        "probe.max_share=1",
    ]
    # compared with runs above: all come after one of stage 3, which changes torch's linear layers
    double += [
        {
            "name": f"probed{stage}",
            "crash_after": 3,
            "overrides": [
                *RESUMED,
                *probe,
                f"engine.zero_stage={stage}",
                f"engine.precision={('fp32', 'bf16')[stage % 2]}",
            ],
        }
        for stage in range(4)
    ]
    double += [
        {
            "name": f"teacher{stage}",
            "crash_after": 3,
            "overrides": [*RESUMED, *MOVING_TEACHER, f"engine.zero_stage={stage}"],
        }
        for stage in (1, 3)
    ]
    double += [
        {
            "name": f"staged{step}",
            "crash_after": step,
            "overrides": [*STAGED, "journal.checkpoint_interval=1", "journal.keep_checkpoints=9"],
        }
        for step in (2, 3)
    ]
    more = ["optim.micro_batch=4", "stages.many.micro_batch=10"]
    single.append({"name": "single_staged", "overrides": [*STAGED, *more]})
    double += [
        {
            "name": f"poisoned{stage}_{precision}",
            "poison": True,
            "overrides": [*RESUMED, f"engine.zero_stage={stage}", f"engine.precision={precision}"],
        }
        for stage in range(4)
        for precision in ("fp32", "bf16")
    ]
    folder = tmp_path_factory.mktemp("runs")
    tiny = load_config(tiny_file).model
    torch.manual_seed(1)
    save_model_folder(folder / "teacher", VideoMAE(replace(tiny, height=48, embed_dim=24)))
    features = [*FEATURES, f"objective.teacher={folder / 'teacher'}"]
    single.append({"name": "features_single", "overrides": [*features, *batch(1, 1)]})
    for stage in range(4):
        engine = [
            f"engine.zero_stage={stage}",
            f"engine.activation_checkpointing={str(stage > 1).lower()}",
        ]
        double += [
            {"name": f"features{stage}", "overrides": [*features, *batch(2, 2), *engine]},
            {
                "name": f"features_resumed{stage}",
                "crash_after": 3,
                "overrides": [
                    *features,
                    *RESUMED,
                    *engine,
                    f"engine.precision={('fp32', 'bf16')[stage % 2]}",
                ],
            },
        ]
    return launch_runs(
        folder,
        {"stage": "pretrain", "config": str(tiny_file)},
        single,
        double,
    )


@pytest.fixture(scope="module")
def finetuned(tiny_finetune_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `finished`, for fine-tuning."""
    single = [{"name": "single", "overrides": [*FINETUNE_CURVE, *batch(1, 1)]}]
    double = [
        {
            "name": f"stage{stage}",
            "overrides": [*FINETUNE_CURVE, *batch(2, 2), f"engine.zero_stage={stage}"],
        }
        for stage in range(4)
    ]
    double += [
        {
            "name": f"resumed{stage}",
            "crash_after": 3,
            "overrides": [
                *RESUMED,
                "model.drop_path=0.3",
                "classifier.head_dropout=0.3",
                "optim.micro_batch=2",
                f"engine.zero_stage={stage}",
                f"engine.precision={('fp32', 'bf16')[stage % 2]}",
            ],
        }
        for stage in range(4)
    ]
    folder = tmp_path_factory.mktemp("finetuned")
    config = load_config(tiny_finetune_file, schema=FinetuneConfig)
    torch.manual_seed(5)
    save_model_folder(folder / "pretrained", VideoClassifier(config.model, config.classifier))
    double += [
        {
            "name": name,
            "crash_after": 3,
            "overrides": [
                *RESUMED,
                *changes,
                f"checkpoint={folder / 'pretrained'}",
                "model.drop_path=0.3",
                "optim.micro_batch=2",
            ],
        }
        for name, changes in PARTS.items()
    ]
    return launch_runs(
        folder,
        {"stage": "finetune", "config": str(tiny_finetune_file)},
        single,
        double,
    )


def launch_runs(
    folder: Path, common: dict[str, str], single: list[dict[str, Any]], double: list[dict[str, Any]]
) -> Path:
    for name, specs, launcher in (("single", single, False), ("double", double, True)):
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump([{**common, **spec} for spec in specs]))
        launch(str(RUNS), str(file), str(folder), launcher=launcher, seconds=600)
    return folder


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("dual", "accumulation"), MODES)
def test_two_ranks_follow_the_curve_of_one_process(
    finished: Path, stage: int, dual: float, accumulation: int
) -> None:
    one, two = (
        losses(finished / f"single_{dual}_{accumulation}"),
        losses(finished / f"stage{stage}_{dual}_{accumulation}"),
    )
    assert len(one) == len(two) == 30
    assert one[-1] < one[0] - 0.02  # it learns, so that equality says something
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_learn_features_as_one_process_does(finished: Path, stage: int) -> None:
    one, two = losses(finished / "features_single"), losses(finished / f"features{stage}")
    assert len(one) == len(two) == 10
    assert one[-1] < one[0] - 0.02
    assert two == pytest.approx(one, rel=1e-4)
    state = load_file(finished / f"features{stage}" / "model" / "model.safetensors")
    assert state["decoder.head.weight"].shape == (24, 16)  # and nothing of the teacher
    assert {name.split(".")[0] for name in state} == {"encoder", "decoder", "objective"}


@pytest.mark.parametrize("stage", range(4))
def test_a_resumed_run_of_features_ends_with_the_same_bits(finished: Path, stage: int) -> None:
    check_same_bits(finished / f"features_resumed{stage}", "model")


@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_fine_tune_as_one_process_does(finetuned: Path, stage: int) -> None:
    one, two = finetuned / "single", finetuned / f"stage{stage}"
    assert len(losses(one)) == len(losses(two)) == 10
    assert losses(one)[-1] < losses(one)[0] - 0.5
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert [line["accuracy"] for line in lines(two, "accuracy")] == [
        line["accuracy"] for line in lines(one, "accuracy")
    ]
    # 8 videos in batches of 3: some are fillers
    for ours, theirs in zip(lines(two, "val_loss"), lines(one, "val_loss"), strict=True):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-4)
        assert ours["val_ema_loss"] == pytest.approx(theirs["val_ema_loss"], rel=1e-4)
        assert [ours[key] for key in ("step", "val_top1", "val_top5", "val_videos")] == [
            theirs[key] for key in ("step", "val_top1", "val_top5", "val_videos")
        ]


@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_average_weights_as_one_process_does(finetuned: Path, stage: int) -> None:
    one, two, trained = (
        load_file(finetuned / run / name / "model.safetensors")
        for run, name in (
            ("single", "model_ema"),
            (f"stage{stage}", "model_ema"),
            (f"stage{stage}", "model"),
        )
    )
    assert one.keys() == two.keys() == trained.keys()
    for name, value in two.items():
        torch.testing.assert_close(value, one[name], rtol=0, atol=1e-5)
    assert max((two[name] - trained[name]).abs().max() for name in two) > 3e-4


@pytest.mark.parametrize("stage", range(4))
def test_a_resumed_fine_tuning_mixes_drops_and_validates_the_same(
    finetuned: Path, stage: int
) -> None:
    run = finetuned / f"resumed{stage}"
    for name in ("model", "best"):
        resumed, uninterrupted = (
            load_file(run / folder / "model.safetensors")
            for folder in (name, f"{name}_uninterrupted")
        )
        assert resumed.keys() == uninterrupted.keys()
        assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)
    assert losses(run) == losses(run, "metrics_uninterrupted.jsonl")
    scores = [
        [{**line, "time": 0} for line in lines(run, "val_loss", file)]
        for file in ("metrics.jsonl", "metrics_uninterrupted.jsonl")
    ]
    assert scores[0] == scores[1]
    assert [line["step"] for line in scores[0]] == [2, 4, 5]


@pytest.mark.parametrize("name", PARTS)
def test_what_is_frozen_keeps_its_bits_and_the_rest_resumes_with_the_same(
    finetuned: Path, name: str
) -> None:
    before, resumed, uninterrupted = (
        load_file(finetuned / folder / "model.safetensors")
        for folder in ("pretrained", f"{name}/model", f"{name}/model_uninterrupted")
    )
    assert before.keys() == resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(resumed[key], uninterrupted[key]) for key in resumed)
    assert losses(finetuned / name) == losses(finetuned / name, "metrics_uninterrupted.jsonl")
    changed = {key for key in before if not torch.equal(before[key], resumed[key])}
    blocks = {key for key in before if key.startswith("encoder.blocks.")}
    expected = {
        "lora2": {key for key in blocks if re.search(r"(qkv|proj|mlp\.\d)\.weight$", key)},
        "lora3": {key for key in blocks if re.search(r"(qkv|proj)\.weight$", key)},
        "frozen1": set(),
        "frozen3": {key for key in blocks if key.startswith("encoder.blocks.1.")},
    }
    assert changed == expected[name] | {
        "fc_norm.weight",
        "fc_norm.bias",
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_ends_with_the_same_bits(finished: Path, stage: int, precision: str) -> None:
    check_same_bits(finished / f"resumed{stage}_{precision}", "model", "model_ema")


def check_same_bits(run: Path, *models: str) -> None:
    for model in models:
        resumed, uninterrupted = (
            load_file(run / name / "model.safetensors")
            for name in (model, f"{model}_uninterrupted")
        )
        assert resumed.keys() == uninterrupted.keys()
        assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)
    assert losses(run) == losses(run, "metrics_uninterrupted.jsonl")
    assert (run / "checkpoints" / "latest").read_text() == "step_00000005\n"


@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_resume_one_teacher(finished: Path, stage: int) -> None:
    run = finished / f"teacher{stage}"
    check_same_bits(run, "model", "model_ema")
    for key in ("loss", "feature_rank"):
        now, before = (
            [line[key] for line in lines(run, key, file)]
            for file in ("metrics.jsonl", "metrics_uninterrupted.jsonl")
        )
        assert now == before
        assert len(now) == 5
    checkpoint = run / "checkpoints" / "step_00000005"
    files = [load_file(checkpoint / f"state_0000{rank}.safetensors") for rank in (0, 1)]
    # each number is written once, by either rank its share
    assert not files[0].keys() & files[1].keys()
    kinds = [{name.split("/")[0] for name in file} for file in files]
    assert kinds[0] == kinds[1] == {"weight", "exp_avg", "exp_avg_sq", "average", "tensor"}
    first, second = (sum(tensor.numel() for tensor in file.values()) for file in files)
    largest = max(tensor.numel() for file in files for tensor in file.values())
    assert abs(first - second) <= largest
    assert sum(name.startswith("tensor/teacher.") for name in saved_state(checkpoint)) > 20
    # stages differ in where weights are, not in what they are
    other = load_file(finished / "teacher3" / "model_ema" / "model.safetensors")
    for name, value in load_file(run / "model_ema" / "model.safetensors").items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("step", [2, 3])
def test_a_run_in_stages_is_resumed_by_two_ranks_at_a_border_and_behind_it(
    finished: Path, step: int
) -> None:
    run = finished / f"staged{step}"
    resumed, uninterrupted = (
        load_file(run / name / "model.safetensors") for name in ("model", "model_uninterrupted")
    )
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)
    assert losses(run) == losses(run, "metrics_uninterrupted.jsonl")
    # videos of both ranks over those of the list
    epochs = [line["epoch"] for line in lines(run, "loss")]
    assert epochs == [videos / 24 for videos in (4, 8, 18, 28, 38)]
    assert losses(run) == pytest.approx(losses(finished / "single_staged"), rel=1e-4)


@pytest.mark.parametrize("stage", range(4))
def test_a_probe_changes_no_bit_and_finds_the_same_again(finished: Path, stage: int) -> None:
    run = finished / f"probed{stage}"
    plain = finished / f"resumed{stage}_{('fp32', 'bf16')[stage % 2]}"
    probed, without = (load_file(at / "model" / "model.safetensors") for at in (run, plain))
    assert all(torch.equal(probed[name], without[name]) for name in without)
    assert losses(run) == losses(plain)
    found, before = (
        [{**line, "time": 0} for line in lines(run, "probe_loss", file)]
        for file in ("metrics.jsonl", "metrics_uninterrupted.jsonl")
    )
    assert found == before
    assert [line["step"] for line in found] == [4, 5]
    assert all(1 < line["probe_rank"] <= 7 for line in found)
    one = lines(finished / "probed0", "probe_loss")[-1]
    # bf16 rounds
    assert found[-1]["probe_loss"] == pytest.approx(one["probe_loss"], rel=1e-4 * 50 ** (stage % 2))


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_not_finite_on_one_rank_is_skipped_on_all(
    finished: Path, stage: int, precision: str
) -> None:
    assert [
        line["skipped_steps"] for line in lines(finished / f"poisoned{stage}_{precision}", "loss")
    ] == [0, 1, 1, 2, 2]


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/gpu trains with the kernels themselves"
)
def test_the_kernels_in_the_interpreter_follow_the_reference_under_zero(
    tiny_file: Path, tmp_path: Path
) -> None:
    common = [
        "optim.steps=3",
        "optim.micro_batch=2",
        "optim.accumulation=2",
        "objective.contrastive_weight=0.1",
        "objective.learn_temperature=true",
        "mask.decoder_mask_ratio=0.5",
        "engine.activation_checkpointing=true",
    ]
    for kernels, variables in (("reference", {}), ("triton", {"TRITON_INTERPRET": "1"})):
        runs = [
            {
                "name": f"{kernels}{stage}",
                "stage": "pretrain",
                "config": str(tiny_file),
                "overrides": [*common, f"engine.zero_stage={stage}", f"engine.kernels={kernels}"],
            }
            for stage in (2, 3)
        ]
        (tmp_path / f"{kernels}.yaml").write_text(yaml.safe_dump(runs))
        launch(str(RUNS), str(tmp_path / f"{kernels}.yaml"), str(tmp_path), variables=variables)
    for stage in (2, 3):
        reference, kernels = (
            losses(tmp_path / f"reference{stage}"),
            losses(tmp_path / f"triton{stage}"),
        )
        assert reference[-1] < reference[0]
        assert kernels == pytest.approx(reference, rel=1e-4)


def test_real_and_broken_videos_train_and_every_unreadable_one_is_named(
    shared_videos: Path, tiny_file: Path, tmp_path: Path
) -> None:
    files = sorted([*(shared_videos / "real").iterdir(), *(shared_videos / "broken").iterdir()])
    videos = tmp_path / "videos.txt"
    videos.write_text("".join(f"{file}\n" for file in files))
    launch(
        "--module",
        "video_mae",
        "pretrain",
        str(tiny_file),
        f"data.source={videos}",
        f"output={tmp_path / 'run'}",
        "optim.steps=24",
        "engine.zero_stage=2",
        "data.max_bad_share=0.6",
        "data.num_workers=1",
        "data.clips_per_video=2",
        "optim.warmup_steps=2",
    )
    entries = [
        json.loads(line)
        for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    ]
    named = [Path(entry["path"]).name for entry in entries]
    assert len(named) == len(set(named))
    # Of broken/, flip_mp4_03 and noise decode to the last frame (the codec conceals the damage) and
    # unordered.mov is whole.
    readable = {"flip_mp4_03.mp4", "noise.mp4", "unordered.mov"}
    partly = {"zeroed_mid.mp4", "reschange.ts"}  # clips from their intact start decode
    must = {file.name for file in (shared_videos / "broken").iterdir()} - readable - partly
    assert must <= set(named)
    assert set(named) <= must | partly
    assert all(entry["reason"] and entry["decoder"] == "pyav" for entry in entries)


def test_a_wrong_key_under_the_launcher_is_one_line_and_status_2(tiny_file: Path) -> None:
    output = launch("--module", "video_mae", "pretrain", str(tiny_file), "model.dept=3", status=2)
    lines = [line for line in output.splitlines() if line.startswith("video-mae")]
    assert lines == [
        "video-mae pretrain: command line: unknown key model.dept (did you mean depth?)"
    ]
    assert "Traceback" not in output


def test_sigterm_saves_and_the_same_command_goes_on(tiny_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "video_mae",
        "pretrain",
        str(tiny_file),
        f"output={run}",
        "optim.steps=100000",
        "data.num_workers=1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "start the same command again" in output
    done = len(losses(run))
    checkpoint = (run / "checkpoints" / "latest").read_text().strip()
    assert checkpoint == f"step_{done:08d}"
    changed = load_config(run / "config.yaml", [f"optim.steps={done + 2}"])
    save_config(changed, run / "config.yaml")  # a shorter run, so that the test ends
    launch("-m", "video_mae", "pretrain", str(run / "config.yaml"), launcher=False)
    assert len(losses(run)) == done + 2
    assert (run / "model" / "model.safetensors").is_file()
