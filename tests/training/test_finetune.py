"""Fine-tuning runs in this process: what they start from, learn, leave and refuse."""

import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoint_files import saved_memory, saved_state

from video_mae import (
    ClassifierConfig,
    ModelConfig,
    VideoClassifier,
    VideoMAE,
    load_config,
    load_pretrained,
    save_model_folder,
)
from video_mae.config import FinetuneConfig
from video_mae.data.dataset import Batch, ValidationClips, collate
from video_mae.data.videos import read_validation_videos
from video_mae.data.workers import Costs
from video_mae.decoding import resolve_decoder
from video_mae.model.vit import encoder_macs
from video_mae.training import finetune
from video_mae.training.dry_run import dry_run
from video_mae.training.finetune import prepare, run
from video_mae.training.loop import DONE, STOPPED_BY_POLICY

Tiny = Callable[..., FinetuneConfig]
NO_AUGMENTATION = (
    "augment.mix_probability=0",
    "augment.randaugment_ops=0",
    "augment.erasing=0",
    "data.crop=center",
)

pytestmark = [pytest.mark.trains_here, pytest.mark.usefixtures("quiet_process")]


def lines(config: FinetuneConfig, key: str = "loss") -> list[dict[str, Any]]:
    written = map(json.loads, (Path(config.output) / "metrics.jsonl").read_text().splitlines())
    return [line for line in written if key in line]


def log(config: FinetuneConfig) -> str:
    return (Path(config.output) / "log.txt").read_text()


def state(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_pretrained(folder).state_dict()


@pytest.fixture
def pretrained(tiny_finetune: Tiny, tmp_path: Path) -> Path:
    """A pretrained model of the tiny run's architecture, its last norm far from a fresh one."""
    torch.manual_seed(5)
    model = VideoMAE(
        replace(tiny_finetune().model, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    )
    model.get_parameter("encoder.norm.weight").data.fill_(3.0)
    save_model_folder(tmp_path / "pretrained" / "model", model)
    return tmp_path / "pretrained"


def test_a_run_leaves_the_promised_folder_and_goes_on_as_if_it_had_not_stopped(
    tiny_finetune: Tiny,
) -> None:
    config = tiny_finetune(
        "journal.log_interval=2", "data.clips_per_video=2", "journal.tensorboard=true"
    )
    assert run(prepare(config)) == DONE
    folder = Path(config.output)
    for name in (
        "config.yaml",
        "deepspeed.json",
        "log.txt",
        "report.html",
        "run.json",
        "model/model.safetensors",
        "best/model.safetensors",
        "checkpoints/step_00000004/MANIFEST.json",
    ):
        assert (folder / name).stat().st_size > 0, name
    decoder = resolve_decoder("auto")
    assert load_config(folder / "config.yaml", schema=FinetuneConfig) == replace(
        config, data=replace(config.data, decoder=decoder)
    )
    assert [list(line) for line in lines(config)] == [
        [
            "step",
            "epoch",
            "loss",
            "lr",
            "grad_norm",
            "clips_per_second",
            "data_wait",
            *(f"{stage}_ms" for stage in Costs._fields),
            "mfu",
            "memory_gb",
            "skipped_steps",
            "bad_videos",
            "time",
        ]
    ] * 2
    assert [list(line) for line in lines(config, "val_loss")] == [
        ["step", "epoch", "val_loss", "val_top1", "val_top5", "val_videos", "time"]
    ] * 2
    assert [(line["step"], line["val_videos"]) for line in lines(config, "val_loss")] == [
        (2, 8),
        (4, 8),
    ]
    # the 2 clips of a video do not count
    assert "0.001563 = 0.1 x global batch 4 / 256" in log(config)
    assert "8 classes, dense clips of stride 2, 8 validation videos" in log(config)
    assert "starts from random weights" in log(config)
    page = (folder / "report.html").read_text()
    assert "<h3>Validation top-1</h3>" in page
    before = [
        (folder / name).read_bytes()
        for name in ("metrics.jsonl", "model/model.safetensors", "best/model.safetensors")
    ]
    assert run(prepare(config)) == DONE
    assert [
        (folder / name).read_bytes()
        for name in ("metrics.jsonl", "model/model.safetensors", "best/model.safetensors")
    ] == before


@pytest.mark.parametrize(
    "changes",
    [
        ["classifier.pooling=first", "model.class_tokens=1", "augment.cutmix=0"],
        [
            "engine.zero_stage=3",
            "engine.activation_checkpointing=true",
            "model.drop_path=0.5",
            "classifier.head_dropout=0.5",
        ],
        [
            "engine.precision=bf16",
            "engine.zero_stage=2",
            "engine.offload=optimizer",
            "augment.mixup=0",
            "augment.where=device",
        ],
        [
            "data.crop=multiscale",
            "data.crop_scales=[1.0, 0.75]",
            "data.flip=true",
            "augment.mix_probability=0",
            "data.num_workers=1",
        ],
    ],
)
def test_every_mode_trains(tiny_finetune: Tiny, changes: list[str]) -> None:
    config = tiny_finetune("optim.steps=3", *changes)
    assert run(prepare(config)) == DONE
    assert all(0 < line["loss"] < 10 for line in lines(config))
    assert lines(config)[-1]["skipped_steps"] == 0
    assert [line["val_videos"] for line in lines(config, "val_loss")] == [8, 8]


def test_validation_follows_each_epoch_and_the_last_step(tiny_finetune: Tiny) -> None:
    # an epoch: 24 videos
    config = tiny_finetune(
        "validation.interval=0", "optim.micro_batch=5", "optim.steps=11", *NO_AUGMENTATION
    )
    run(prepare(config))
    assert [line["step"] for line in lines(config, "val_loss")] == [5, 10, 11]
    assert lines(config)[4]["epoch"] == pytest.approx(25 / 24)


def test_an_epoch_without_its_last_batch_ends_with_a_step(tiny_finetune: Tiny) -> None:
    config = tiny_finetune(
        "validation.interval=0",
        "optim.micro_batch=5",
        "optim.steps=null",
        "optim.epochs=2",
        "optim.warmup_epochs=0",
        "optim.drop_last_batch=true",
        *NO_AUGMENTATION,
    )  # 4 steps of 24 videos
    run(prepare(config))
    assert [line["step"] for line in lines(config, "val_loss")] == [4, 8]
    assert [line["epoch"] for line in lines(config)] == [(step + 1) / 4 for step in range(8)]
    assert "0 warm-up steps of 8" in log(config)
    assert "an epoch is 4 steps, 4 of its videos are left out" in log(config)


@pytest.mark.parametrize("sampling", ["dense", "uniform"])
def test_validation_scores_are_those_of_the_model_on_every_video_once(
    tiny_finetune: Tiny, sampling: str
) -> None:
    config = tiny_finetune(
        f"classifier.sampling={sampling}", "validation.interval=4", "validation.batch=5"
    )
    run(prepare(config))
    model, clips = (
        load_pretrained(Path(config.output) / "model", VideoClassifier),
        ValidationClips(read_validation_videos(config), config),
    )
    batch = collate([clips[index] for index in range(8)])
    with torch.no_grad():
        logits_BK = model(batch.clip_BTHWC)
    ranks_B = (logits_BK > logits_BK.gather(1, batch.label_B[:, None])).sum(dim=1)
    (line,) = lines(config, "val_loss")
    assert line["val_loss"] == pytest.approx(
        F.cross_entropy(logits_BK, batch.label_B).item(), rel=1e-5
    )
    assert (line["val_top1"], line["val_top5"]) == (
        (ranks_B < 1).sum() / 8,
        (ranks_B < 5).sum() / 8,
    )


def test_the_best_model_is_kept_beside_the_last(
    tiny_finetune: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.25, 0.75, 0.5, float("nan")])
    original = finetune.Finetuning._validate
    monkeypatch.setattr(
        finetune.Finetuning,
        "_validate",
        lambda self, videos: {**original(self, videos), "val_top1": next(scores)},
    )
    saved = {}
    config = tiny_finetune(
        "validation.interval=1", "journal.checkpoint_interval=1", "journal.keep_checkpoints=4"
    )
    run(prepare(config))
    for step in (1, 2, 3, 4):
        saved[step] = Path(config.output) / "checkpoints" / f"step_{step:08d}"
    best, last = state(Path(config.output) / "best"), state(Path(config.output) / "model")
    for weights, step in ((best, 2), (last, 4)):
        there = saved_state(saved[step])
        assert all(torch.equal(weights[name].flatten(), there[f"weight/{name}"]) for name in best)
    assert not torch.equal(best["head.weight"], last["head.weight"])
    assert [saved_memory(saved[step])["best"]["step"] for step in saved] == [1, 2, 2, 2]
    assert lines(config, "val_loss")[3]["val_top1"] is None


def test_a_run_ends_where_validations_have_not_improved_for_so_long(
    tiny_finetune: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 4 is as good as the best, and no better; a lower loss makes step 8 the best."""
    top1 = [0.25, 0.75, 0.5, 0.75, 0.5, 0.5, 0.5, 0.75]
    losses, asked = [3.0, 2.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0], list[int]()

    def validate(self: finetune.Finetuning, videos: object) -> dict[str, float]:
        step = len(lines(config))
        asked.append(step)
        scores = {"val_loss": losses[step - 1], "val_top1": top1[step - 1]}
        return {**scores, "val_top5": 1.0, "val_videos": 8}

    def rest(patience: int) -> list[int]:
        """The steps after which a start validates."""
        asked.clear()
        assert (
            run(prepare(replace(config, validation=replace(config.validation, patience=patience))))
            == DONE
        )
        return list(asked)

    monkeypatch.setattr(finetune.Finetuning, "_validate", validate)
    config = tiny_finetune(
        "optim.steps=8", "validation.interval=1", "journal.checkpoint_interval=1"
    )
    folder = Path(config.output)
    said = "stopped early at step 4: best was step 2"
    assert rest(2) == [1, 2, 3, 4]
    assert json.loads((folder / "run.json").read_text())["ended"] == said
    assert said in (folder / "report.html").read_text()
    assert log(config).splitlines()[-1].endswith(said)
    assert saved_memory(folder / "checkpoints" / "step_00000004")["best"]["step"] == 2
    # it stays so; one that was stopped in between counts on; one with more patience goes on
    assert rest(2) == []
    assert f"already finished, {said}" in log(config)
    patient = replace(config.validation, patience=2)
    assert dry_run(prepare(replace(config, validation=patient, dry_run=True))) == DONE
    assert f"already finished, {said}; a checkpoint" in capsys.readouterr().out
    shutil.rmtree(folder / "checkpoints" / "step_00000004")
    assert rest(2) == [4]
    assert rest(6) == [5, 6, 7, 8]
    assert json.loads((folder / "run.json").read_text())["ended"] == "all of its 8 steps are done"
    with pytest.raises(ValueError, match=r"validation\.source: \(empty\), name a list"):
        prepare(tiny_finetune("validation.source=", "validation.patience=2"))


@pytest.mark.parametrize("videos_per_step", [4, 7, 32, 70])
def test_validations_are_counted_as_they_are_done(
    tiny_finetune: Tiny, videos_per_step: int
) -> None:
    """A step may take more videos than there are in an epoch, 24 here."""
    config = tiny_finetune(
        "validation.interval=0", f"optim.micro_batch={videos_per_step}", "optim.steps=40"
    )
    training = prepare(config)
    done = [training.is_measured(step, 0) for step in range(1, 40)]
    counts = [training.num_measures(step, 0) for step in range(40)]
    assert [after - before for before, after in itertools.pairwise(counts)] == done


def test_augmenting_on_the_device_draws_what_the_workers_draw(
    tiny_finetune: Tiny, tmp_path: Path
) -> None:
    curves = []
    for where in ("worker", "device"):
        config = tiny_finetune(
            f"augment.where={where}",
            f"output={tmp_path / where}",
            "data.clips_per_video=2",
            "validation.source=",
        )
        run(prepare(config))
        curves.append([line["loss"] for line in lines(config)])
    assert curves[0] == curves[1]
    assert not (tmp_path / "device" / "best").exists()  # nothing was validated


def test_a_learning_rate_falls_from_layer_to_layer(tiny_finetune: Tiny) -> None:
    config = tiny_finetune(
        "optim.steps=1",
        "optim.warmup_steps=0",
        "optim.layer_decay=0.1",
        "optim.weight_decay=0",
        "validation.source=",
    )
    run(prepare(config))
    torch.manual_seed(config.seed)
    before, after = (
        VideoClassifier(config.model, config.classifier).state_dict(),
        state(Path(config.output) / "model"),
    )
    lr = lines(config)[0]["lr"]
    assert lr == pytest.approx(0.1 * 4 / 256)
    for name, layer in (
        ("encoder.patch_embed.weight", 0),
        ("encoder.blocks.0.mlp.0.weight", 1),
        ("encoder.blocks.1.attn.qkv.weight", 2),
        ("fc_norm.weight", 3),
        ("head.weight", 3),
    ):
        # The first step of Adam is one learning rate long wherever there is a gradient.
        assert (after[name] - before[name]).abs().max().item() == pytest.approx(
            lr * 0.1 ** (3 - layer), rel=0.02
        ), name


def test_a_pretrained_encoder_is_taken_over_without_its_last_norm(
    tiny_finetune: Tiny, pretrained: Path
) -> None:
    plan = prepare(tiny_finetune(f"checkpoint={pretrained}"))
    source = state(pretrained / "model")
    taken = plan.weights.tensors
    assert taken.keys() == {
        name
        for name in source
        if name.startswith("encoder.") and not name.startswith("encoder.norm.")
    }
    assert all(torch.equal(taken[name], source[name]) for name in taken)
    num_decoder = sum(name.startswith("decoder.") for name in source)
    assert plan.weights.lines == [
        f"starts from {pretrained / 'model'}: {len(taken)} of its {len(source)} tensors; "
        "new: fc_norm (2: not in it), head (2: not in it); left over: "
        f"encoder.norm (2: not in this model), decoder ({num_decoder}: not in this model)"
    ]
    config = tiny_finetune(
        f"checkpoint={pretrained / 'model'}",
        "optim.steps=1",
        "optim.base_lr=1e-9",
        "optim.min_lr=0",
    )
    run(prepare(config))
    after = state(Path(config.output) / "model")
    assert torch.allclose(
        after["encoder.blocks.1.mlp.0.weight"], source["encoder.blocks.1.mlp.0.weight"], atol=1e-6
    )
    assert torch.allclose(after["fc_norm.weight"], torch.ones(32), atol=1e-6)
    assert "encoder.norm.weight" not in after


@pytest.mark.parametrize(
    ("ours", "theirs", "num", "same"),
    [
        ("", "", 8, True),
        ("", "abcdefgh", 8, True),
        ("abcdefgh", "", 8, True),
        ("abcdefgh", "abcdefgh", 8, True),
        ("bacdefgh", "abcdefgh", 8, False),
        ("", "", 3, False),
    ],
)
def test_a_head_is_taken_over_where_the_classes_agree(
    tiny_finetune: Tiny, tmp_path: Path, ours: str, theirs: str, num: int, same: bool
) -> None:
    model = VideoClassifier(
        tiny_finetune().model,
        ClassifierConfig(num_classes=num, class_names=tuple(theirs), head_init_scale=1.0),
    )
    model.get_parameter("fc_norm.bias").data.fill_(0.5)
    save_model_folder(tmp_path / "old" / "best", model)
    plan = prepare(
        tiny_finetune(
            f"checkpoint={tmp_path / 'old'}", f"classifier.class_names=[{','.join(ours)}]"
        )
    )
    taken, (line,) = plan.weights.tensors, plan.weights.lines
    assert torch.equal(taken["fc_norm.bias"], torch.full((32,), 0.5))
    assert ("head.weight" in taken) == same
    told = "nothing" if same else f"head (2: its {num} classes are others)"
    assert line.endswith(f" tensors; new: {told}; left over: {told}")


def test_a_larger_picture_keeps_the_weights_and_interpolates_the_positions(
    tiny_finetune: Tiny, pretrained: Path
) -> None:
    config = tiny_finetune(
        f"checkpoint={pretrained}", "model.height=48", "model.num_frames=8", "optim.steps=2"
    )
    plan = prepare(config)
    assert plan.config.model.position_grid == (2, 4, 4)
    assert run(plan) == DONE
    assert load_pretrained(Path(config.output) / "model").config == plan.config.model
    assert prepare(config).config == plan.config  # and goes on


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.source=LIST a.mp4 0"], "no such file"),
        (["data.source=LIST"], "the list is empty"),
        (
            ["data.source=LIST VIDEO 8"],
            r"data\.source: .* has the label 8, classifier\.num_classes = 8 allows 0 to "
            r"7; .*num_classes=9",
        ),
        (["data.source=LIST VIDEO"], r"data\.source: .* has no label"),
        (
            ["data.source=FOLDER", "classifier.num_classes=400"],
            r"classifier\.num_classes: 400 is not the number of classes .*num_classes=8",
        ),
        (
            ["data.source=FOLDER", "classifier.class_names=[a,b,c,d,e,f,g,h]"],
            r"the folder down is none of the model's 8 classes",
        ),
        (
            ["validation.source=LIST VIDEO 9"],
            r"validation\.source: .* has the label 9, there are 8 classes",
        ),
        (["checkpoint=/no/model"], r"checkpoint: /no/model: "),
        (
            ["checkpoint=MODEL", "model.depth=3", "model.qkv_bias=none"],
            r"checkpoint: .* has another architecture than model of this run; "
            r"model\.depth=2 model\.qkv_bias=qv would be the same",
        ),
        (
            ["output=OTHER"],
            r"unknown key .*: damaged, or of a run of another kind; put it back",
        ),
    ],
)
def test_what_cannot_run_is_refused_in_one_line_before_it_starts(
    tiny_finetune: Tiny,
    tiny_file: Path,
    pretrained: Path,
    demo_folder: Path,
    tmp_path: Path,
    changes: list[str],
    message: str,
) -> None:
    video = demo_folder / (demo_folder / "train.txt").read_text().split(" ")[0]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text(tiny_file.read_text())
    words = {"FOLDER": demo_folder / "train", "MODEL": pretrained, "OTHER": tmp_path / "other"}
    overrides = []
    for change in changes:
        key, _, value = change.partition("=")
        if value.startswith("LIST"):
            (tmp_path / "list.txt").write_text(
                value.removeprefix("LIST").strip().replace("VIDEO", str(video)) + "\n"
            )
            value = str(tmp_path / "list.txt")
        overrides.append(f"{key}={words.get(value, value)}")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        prepare(tiny_finetune(*overrides))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_override_with_nothing_behind_it_is_the_empty_text(tiny_finetune: Tiny) -> None:
    config = tiny_finetune("checkpoint=", "validation.source=")
    assert (config.checkpoint, config.validation.source) == ("", "")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.stride=3",
            "data.stride: 3 is not used in fine-tuning: set classifier.stride (it is 2)",
        ),
        (
            "data.reach_end=false",
            "data.reach_end: False is for pretraining: set classifier.sampling",
        ),
        ("optim.micro_batch=1", "optim.micro_batch: 1 clip has no other to be mixed with"),
        ("augment.erasing=1.5", "augment.erasing: 1.5 must be at least 0, at most 1"),
        ("augment.label_smoothing=1", "augment.label_smoothing: 1.0 must be at least 0, below 1"),
        (
            "augment.randaugment_magnitude=11",
            "augment.randaugment_magnitude: 11.0 must be at least 0, at most 10",
        ),
        ("optim.layer_decay=0", "optim.layer_decay: 0.0 must be above 0, at most 1"),
        ("validation.batch=0", "validation.batch: 0 must be at least 1"),
        ("journal.picture_interval=3", "unknown key journal.picture_interval"),
    ],
)
def test_a_wrong_value_is_named(tiny_finetune: Tiny, override: str, message: str) -> None:
    with pytest.raises(ValueError, match="command line: ") as error:
        tiny_finetune(override)
    assert message in str(error.value)


def test_names_of_class_folders_reach_the_model_folder(
    tiny_finetune: Tiny, demo_folder: Path
) -> None:
    config = tiny_finetune(
        f"data.source={demo_folder / 'train'}",
        f"validation.source={demo_folder / 'val'}",
        "optim.steps=1",
    )
    assert run(prepare(config)) == DONE
    model = load_pretrained(Path(config.output) / "best", VideoClassifier)
    assert model.classifier_config.class_names == tuple(
        sorted(path.name for path in (demo_folder / "train").iterdir())
    )
    assert model.classifier_config.sampling == "dense"
    assert run(prepare(config)) == DONE


def test_a_video_shorter_than_a_clip_is_trained_on_and_a_broken_one_is_replaced_or_does_not_count(
    tiny_finetune: Tiny, demo_folder: Path, tmp_path: Path
) -> None:
    videos = [
        demo_folder / line.split(" ")[0]
        for line in (demo_folder / "train.txt").read_text().splitlines()[:7]
    ]
    (tmp_path / "junk.mp4").write_bytes(b"not a video " * 50)
    (tmp_path / "list.txt").write_text(
        "".join(f"{video} {i}\n" for i, video in enumerate([*videos, tmp_path / "junk.mp4"]))
    )
    config = tiny_finetune(
        f"data.source={tmp_path / 'list.txt'}",
        f"validation.source={tmp_path / 'list.txt'}",
        "classifier.stride=9",
        "data.max_bad_share=0.2",
    )
    assert run(prepare(config)) == DONE
    assert [line["val_videos"] for line in lines(config, "val_loss")] == [7, 7]
    assert (
        f"validation: {tmp_path / 'junk.mp4'} does not count: pyav: not a video container"
        in log(config)
    )
    assert [
        json.loads(line)["path"]
        for line in (Path(config.output) / "quarantine.jsonl").read_text().splitlines()
    ] == [str(tmp_path / "junk.mp4")]
    assert (
        run(
            prepare(
                tiny_finetune(
                    f"data.source={tmp_path / 'list.txt'}", f"output={tmp_path / 'strict'}"
                )
            )
        )
        == STOPPED_BY_POLICY
    )


def losses_of(
    config: FinetuneConfig, logits_BK: torch.Tensor, label_B: torch.Tensor, seeds_B: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What the stage measures where the model says `logits_BK`, and the clips that it is shown."""
    shown: list[torch.Tensor] = []

    class Engine(SimpleNamespace):
        def __call__(self, clip_BTHWC: torch.Tensor) -> torch.Tensor:
            shown.append(clip_BTHWC)
            return logits_BK

    stage: Any = prepare(config)
    stage.engine = Engine(rank=0)
    clip_BTHWC = (
        torch.arange(len(label_B), dtype=torch.uint8)[:, None, None, None, None].expand(
            -1, 4, 32, 32, 3
        )
        * 10
    )
    batch = Batch(
        clip_BTHWC=clip_BTHWC,
        seeds_B=seeds_B,
        host_seeds_B=seeds_B,
        label_B=label_B,
        index_B=torch.zeros_like(label_B),
        failures=(),
    )
    return {**stage.losses(batch, 3, 0), "shown": shown[0]}


def test_the_loss_smooths_the_labels_as_published(tiny_finetune: Tiny) -> None:
    logits_BK = torch.tensor([[3.0] + 7 * [0.0], [0.0, 1.0] + 6 * [0.0]])
    config = tiny_finetune(*NO_AUGMENTATION, "augment.label_smoothing=0.2")
    values = losses_of(config, logits_BK, torch.tensor([0, 4]), torch.tensor([1, 2]))
    # Target of 8 classes: 0.8 + 0.025 at the label, 0.025 elsewhere. log Z = ln(e^3 + 7) and ln(e +
    # 7).
    first = math.log(math.exp(3) + 7) - 0.825 * 3
    second = math.log(math.e + 7) - 0.025 * 1
    assert values["loss"].item() == pytest.approx((first + second) / 2, rel=1e-6)
    assert values["accuracy"].item() == 0.5


def test_clips_of_one_video_are_mixed_with_those_of_others(
    tiny_finetune: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self, *_: torch.tensor([0.5]))
    config = tiny_finetune(
        *NO_AUGMENTATION[1:],
        "data.clips_per_video=2",
        "augment.cutmix=0",
        "augment.label_smoothing=0.2",
    )
    # two clips each of three videos, with pixels 0, 10, ... 50
    labels_B = torch.tensor([0, 0, 1, 1, 2, 2])
    values = losses_of(config, torch.tensor([[2.0] + 7 * [0.0]] * 6), labels_B, torch.arange(6))
    # Order 0 20 40, 10 30 50; each with the one before it.
    assert values["shown"][:, 0, 0, 0, 0].tolist() == [25, 10, 30, 25, 20, 40]
    # Label 0 has half of four of the six targets, smoothed 0.8 x 0.5 + 0.025, and 0.025 of the
    # others.
    assert values["loss"].item() == pytest.approx(
        math.log(math.exp(2) + 7) - 2 * (4 * 0.425 + 2 * 0.025) / 6, rel=1e-6
    )
    assert "accuracy" not in values


def test_drop_path_grows_linearly_to_the_rate_of_the_last_block(tiny_finetune: Tiny) -> None:
    model = VideoClassifier(replace(tiny_finetune().model, depth=4, drop_path=0.3), 5)
    rates = [getattr(block.drop_path, "p", 0.0) for block in model.encoder.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    # A dropped branch adds nothing, a kept one is scaled by 1 / (1 - p): the mean stays.
    drop_path, ones = model.get_submodule("encoder.blocks.3.drop_path"), torch.ones(4000, 2, 3)
    torch.manual_seed(0)
    dropped = drop_path(ones)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert (dropped[:, :1, :1] == dropped).all()
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(drop_path.eval()(ones), ones)


def test_an_encoder_of_all_tokens_costs_what_its_products_cost() -> None:
    config = ModelConfig(
        num_frames=4,
        height=32,
        width=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        mlp_ratio=3.0,
    )
    embed, qkv, attention, proj, mlp = (
        32 * 384 * 32,
        32 * 32 * 96,
        2 * 32 * 32 * 32,
        32 * 32 * 32,
        2 * 32 * 32 * 96,
    )
    assert encoder_macs(config, config.num_tokens) == embed + 2 * (qkv + attention + proj + mlp)


def test_twenty_real_clips_are_learned_by_heart(
    tiny_finetune: Tiny, shared_videos: Path, tmp_path: Path
) -> None:
    no_decoder, same_again = (
        ("av1_video.mkv", "editlist.mp4"),
        ("one.mp4", "two.mp4", "video_90.mov", "video_180.mov", "video_270.mov"),
    )
    videos = [
        path
        for path in sorted((shared_videos / "real").iterdir())
        if path.name not in no_decoder + same_again
    ]
    assert len(videos) == 20
    (tmp_path / "list.txt").write_text(
        "".join(f"{video} {i % 7}\n" for i, video in enumerate(videos))
    )
    # A clip of 4 frames, 90 apart, spans each of these videos whole: training and validation see
    # the same frames.
    config = tiny_finetune(
        *NO_AUGMENTATION,
        f"data.source={tmp_path / 'list.txt'}",
        f"validation.source={tmp_path / 'list.txt'}",
        "classifier.num_classes=7",
        "classifier.stride=90",
        "validation.batch=20",
        "validation.interval=16",
        "optim.micro_batch=20",
        "optim.steps=16",
        "optim.warmup_steps=3",
        "optim.base_lr=0.04",
        "optim.layer_decay=1",
        "optim.weight_decay=0",
        "augment.label_smoothing=0",
        "model.embed_dim=128",
        "model.depth=3",
        "model.num_heads=4",
    )
    assert run(prepare(config)) == DONE
    (line,) = lines(config, "val_loss")
    assert (line["val_top1"], line["val_videos"]) == (1.0, 20)
    assert lines(config)[-1]["accuracy"] == 1.0
