"""A run that starts from another model: what it takes, what it leaves, what it refuses; and that it
then goes on without it.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from video_mae import (
    ObjectiveConfig,
    VideoClassifier,
    VideoMAE,
    load_pretrained,
    resized,
    save_model_folder,
    tube_mask,
)
from video_mae.config import FinetuneConfig, PretrainConfig
from video_mae.data import Batch, collate
from video_mae.training import finetune, pretrain
from video_mae.training.loop import DONE
from video_mae.training.pretrain import Pretraining, prepare, run

Tiny = Callable[..., PretrainConfig]

pytestmark = [pytest.mark.trains_here, pytest.mark.usefixtures("quiet_process")]


def lines(config: Any) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (Path(config.output) / "metrics.jsonl").read_text().split("\n")[:-1]
    ]


def saved(folder: Path, model: VideoMAE | VideoClassifier) -> Path:
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_model_folder(folder, model)
    return folder


def learning(**more: Any) -> ObjectiveConfig:
    return ObjectiveConfig(contrastive_weight=0.1, learn_temperature=True, **more)


def test_a_whole_model_is_taken_and_all_of_it_accounted_for(tiny: Tiny, tmp_path: Path) -> None:
    model = VideoMAE(tiny().model, learning())
    folder = saved(tmp_path / "model", model)
    plan = prepare(
        tiny(
            f"checkpoint={folder}",
            "objective.contrastive_weight=0.1",
            "objective.learn_temperature=true",
            "optim.steps=1",
            "optim.base_lr=1e-9",
            "optim.min_lr=0",
        )
    )
    num, state = len(model.state_dict()), load_pretrained(folder).state_dict()
    line = f"starts from {folder}: {num} of its {num} tensors; new: nothing; left over: nothing"
    assert plan.weights.lines == [line]
    assert run(plan) == DONE
    after = load_pretrained(plan.folder / "model").state_dict()
    for name, tensor in state.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)
    assert line in (plan.folder / "log.txt").read_text()


def test_what_does_not_fit_starts_anew_and_says_why(tiny: Tiny, tmp_path: Path) -> None:
    model = VideoMAE(replace(tiny().model, decoder_num_heads=4), learning())
    num = len(model.state_dict())
    num_decoder = sum(name.startswith("decoder.") for name in model.state_dict())
    other_heads = saved(tmp_path / "heads", model)
    (line,) = prepare(tiny(f"checkpoint={other_heads}")).weights.lines
    why = f"decoder ({num_decoder}: that has model.decoder_num_heads=4)"
    assert line.endswith(
        f"{num - num_decoder - 1} of its {num} tensors; new: {why}; "
        f"left over: {why}, objective (1: not in this model)"
    )
    # As many numbers as pixels, and yet no pixels.
    model = VideoMAE(
        replace(tiny().model, target_width=384), ObjectiveConfig(target="features", teacher="x")
    )
    plan = prepare(tiny(f"checkpoint={saved(tmp_path / 'features', model)}"))
    (line,) = plan.weights.lines
    assert "new: decoder.head (2: it predicts something else); left over: decoder.head" in line
    assert "decoder.norm.weight" in plan.weights.tensors
    classifier = VideoClassifier(tiny().model, 3)
    plan = prepare(tiny(f"checkpoint={saved(tmp_path / 'classifier', classifier)}"))
    (line,) = plan.weights.lines
    assert f"new: encoder.norm (2: not in it), decoder ({num_decoder}: not in it); " in line
    assert line.endswith("left over: fc_norm (2: not in this model), head (2: not in this model)")
    encoder = {name for name in classifier.state_dict() if name.startswith("encoder.")}
    assert plan.weights.tensors.keys() == encoder


@pytest.mark.parametrize("positions", ["sinusoid", "learned"])
def test_another_size_is_interpolated_as_resized_does(
    tiny: Tiny, tmp_path: Path, positions: Any
) -> None:
    model = VideoMAE(replace(tiny().model, positions=positions))
    folder = saved(tmp_path / "model", model)
    config = tiny(
        f"checkpoint={folder}",
        f"model.positions={positions}",
        "model.num_frames=6",
        "model.width=48",
        "optim.steps=1",
        "optim.base_lr=1e-9",
        "optim.min_lr=0",
    )
    plan = prepare(config)
    assert plan.config.model.position_grid == (2, 4, 4)
    told = [line for line in plan.weights.lines if "resize_positions=compute" in line]
    assert len(told) == (positions == "sinusoid")
    anew = prepare(replace(config, model=replace(config.model, resize_positions="compute")))
    assert len(anew.weights.lines) == 1
    assert run(plan) == DONE
    clip = torch.randint(0, 256, (2, 6, 32, 48, 3), dtype=torch.uint8)
    ours, expected = load_pretrained(plan.folder / "model"), resized(model, num_frames=6, width=48)
    with torch.no_grad():
        torch.testing.assert_close(ours.encoder(clip), expected.encoder(clip), rtol=0, atol=1e-5)
    follows = tiny(
        f"checkpoint={folder}",
        f"model.positions={positions}",
        "model.width=48",
        "objective.target=features",
        "objective.teacher=ema",
        f"output={tmp_path / 'follows'}",
    )
    teacher = prepare(follows).teacher
    assert teacher is not None
    assert teacher.network.config.position_grid == (2, 4, 4)
    shutil.rmtree(folder)
    assert prepare(config).config == plan.config  # of the run itself


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_run_that_goes_on_needs_what_it_started_from_no_more(
    tiny: Tiny, tiny_finetune: Callable[..., FinetuneConfig], tmp_path: Path, stage: str
) -> None:
    module: Any = finetune if stage == "finetune" else pretrain
    make = tiny_finetune if stage == "finetune" else tiny
    folder = saved(tmp_path / "model", VideoMAE(tiny().model))
    config = make(f"checkpoint={folder}", "journal.checkpoint_interval=2")
    assert module.run(module.prepare(config)) == DONE
    before = lines(config)
    output = Path(config.output)
    state = load_pretrained(output / "model").state_dict()
    shutil.rmtree(folder)
    shutil.rmtree(output / "checkpoints" / "step_00000004")
    again = module.prepare(config)
    assert again.weights.lines == [f"started from {folder}, which is not read again"]
    assert module.run(again) == DONE
    assert [line.get("loss") for line in lines(config)] == [line.get("loss") for line in before]
    after = load_pretrained(output / "model").state_dict()
    assert all(torch.equal(after[name], state[name]) for name in state)
    with pytest.raises(ValueError, match=r"started with checkpoint = .*model, now it is ;"):
        module.prepare(make("journal.checkpoint_interval=2"))
    with pytest.raises(ValueError, match=r"started with checkpoint = .*, now it is /other;"):
        module.prepare(make("checkpoint=/other", "journal.checkpoint_interval=2"))


def test_damaged_checkpoints_do_not_begin_again_with_random_weights(
    tiny: Tiny, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "model", VideoMAE(tiny().model))
    config = tiny(f"checkpoint={folder}", "optim.steps=2")
    assert run(prepare(config)) == DONE
    file = next((Path(config.output) / "checkpoints").glob("step_*/state_*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    message = r"no checkpoint can be used: step_00000002: state_.* was written .*--from-scratch"
    with pytest.raises(ValueError, match=message):
        run(prepare(config))
    assert run(prepare(replace(config, from_scratch=True))) == DONE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["checkpoint=/no/model"], r"checkpoint: /no/model: no such file or folder"),
        (
            ["checkpoint=MODEL", "model.depth=3", "model.mean=[0.5]", "model.head_norm_eps=1e-5"],
            r"checkpoint: .*model has another architecture than model of this run; "
            r"model\.depth=2 model\.mean=\[0\.485, 0\.456, 0\.406\] model\.head_norm_eps=1e-06 "
            r"would be the same",
        ),
    ],
)
def test_what_cannot_be_a_start_is_refused_before_any_work(
    tiny: Tiny, tmp_path: Path, changes: list[str], message: str
) -> None:
    folder = str(saved(tmp_path / "model", VideoMAE(tiny().model)))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        prepare(tiny(*(change.replace("MODEL", folder) for change in changes)))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_transformers_goes_on_with_the_loss_that_transformers_has(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = {f"decoder_{key}": value for key, value in sizes.items()}
    config = transformers.VideoMAEConfig(
        **sizes,
        **{**decoder, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1},
        intermediate_size=128,
        decoder_intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_frames=4,
        use_mean_pooling=False,
    )
    torch.manual_seed(0)
    theirs = transformers.VideoMAEForPreTraining(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    healthy = Pretraining.losses

    def losses(self: Pretraining, batch: Batch, step: int, micro: int) -> Any:
        seen.append((batch.clip_BTHWC, self.base.mask(batch.seeds_B, 0.0).masked_BM))
        return healthy(self, batch, step, micro)

    monkeypatch.setattr(Pretraining, "losses", losses)
    same = ["model.norm_eps=1e-12", "model.head_norm_eps=1e-5"]
    ours = tiny(f"checkpoint={tmp_path / 'theirs'}", "optim.steps=1", *same)
    assert run(prepare(ours)) == DONE
    clip, masked_BM = seen[0]
    mean, std = torch.tensor(ours.model.mean), torch.tensor(ours.model.std)
    pixels = ((clip / 255 - mean) / std).permute(0, 1, 4, 2, 3)
    hidden = torch.zeros(len(clip), 32, dtype=torch.bool).scatter(1, masked_BM, True)
    with torch.no_grad():
        assert lines(ours)[0]["loss"] == pytest.approx(theirs(pixels, hidden).loss.item(), rel=1e-5)


def test_half_of_the_remaining_steps_reach_what_the_uninterrupted_run_reaches(
    tiny: Tiny, tmp_path: Path
) -> None:
    common = [
        "objective.normalize=none",
        "optim.base_lr=0.5",
        "optim.min_lr=0.5",
        "optim.warmup_steps=5",
        "journal.picture_clips=1",
    ]
    found: dict[str, float] = {}
    for name, steps, more in (
        ("part", 24, []),
        ("whole", 48, []),
        ("continued", 12, [f"checkpoint={tmp_path / 'part'}"]),
    ):
        plan = prepare(tiny(*common, *more, f"optim.steps={steps}", f"output={tmp_path / name}"))
        assert run(plan) == DONE
        clips = plan.make_dataset()
        batch = collate([clips[0, 7, index] for index in range(24)])
        model = load_pretrained(tmp_path / name / "model", VideoMAE)
        with torch.no_grad():
            mask = tube_mask(batch.seeds_B, model.grid, 0.75)
            found[name] = model(batch.clip_BTHWC, mask).loss.item()
    assert found["whole"] < 0.96 * found["part"]  # there was something left to learn
    assert found["continued"] < 1.02 * found["whole"]
