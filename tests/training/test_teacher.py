"""Targets made of features: what a teacher gives, by a second implementation; the losses, by their
definition; what cannot teach.
"""

import json
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from video_mae import (
    ModelConfig,
    ObjectiveConfig,
    VideoClassifier,
    VideoMAE,
    deflated,
    inflated,
    load_pretrained,
    random_mask,
    save_model_folder,
)
from video_mae.config import PretrainConfig, load_config
from video_mae.convert.export import export_hugging_face, export_official
from video_mae.tools import reconstruct
from video_mae.training.loop import DONE
from video_mae.training.pretrain import prepare, run
from video_mae.training.teacher import EncoderTeacher, load_teacher

transformers = pytest.importorskip("transformers")
second = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[1] / "second_implementation.py"))
)

Tiny = Callable[..., PretrainConfig]
TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 2e-5}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
WIDTH = 24
SIX = ["stages.a.num_frames=2", "model.num_frames=6", "stages.b={from_step: 1, num_frames: 12}"]
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
}
# 3 x 4 places where the preprocessor asks for 24 x 32
IMAGE: dict[str, Any] = {**SIZES, "image_size": 40, "patch_size": 8}
# name: class, its configuration, tokens before the patches
IMAGE_MODELS = {
    "dinov2": ("Dinov2Model", "Dinov2Config", 1),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", 5),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", 1),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", 1),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", 0),
}


def weights_of(old: int, new: int) -> torch.Tensor:
    """[new, old]: triangles around the new places, as wide as these are apart, at least as the old
    are.
    """
    scale = old / new
    rows = []
    for i in range(new):
        center = (i + 0.5) * scale
        row = [max(0.0, 1 - abs(j + 0.5 - center) / max(scale, 1.0)) for j in range(old)]
        rows.append([weight / sum(row) for weight in row])
    return torch.tensor(rows)


def at_size(clip_BTHWC: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    rows, columns = (
        weights_of(old, new) for old, new in zip(clip_BTHWC.shape[2:4], size, strict=True)
    )
    return torch.einsum("bthwc,ih,jw->btijc", clip_BTHWC / 255, rows, columns)


def expected_targets(tokens_BthwF: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    times, rows, columns = (
        weights_of(old, new) for old, new in zip(tokens_BthwF.shape[1:4], grid, strict=True)
    )
    x = torch.einsum("bthwf,kt,ih,jw->bkijf", tokens_BthwF, times, rows, columns).flatten(1, 3)
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def a_clip(num_clips: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (num_clips, 4, 32, 32, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def shaken(model: Any) -> Any:
    """Weights far from their start: some start at 0."""
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def their_folder(folder: Path, theirs: Any) -> str:
    theirs.save_pretrained(folder)
    processor = {
        "image_mean": MEAN,
        "image_std": STD,
        "size": {"shortest_edge": 64},
        "crop_size": {"height": 24, "width": 32},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return f"hf:{folder}"


def pixels_of(clip_BTHWC: torch.Tensor) -> torch.Tensor:
    return ((clip_BTHWC - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 1, 4, 2, 3)


@pytest.fixture
def teacher_folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A model of other frames, places and width than the student, in a run folder."""
    torch.manual_seed(1)
    config = replace(
        tiny().model, height=48, width=24, tubelet_size=1, embed_dim=WIDTH, mean=(0.3,)
    )
    save_model_folder(tmp_path / "teacher" / "model", shaken(VideoMAE(config)))
    return tmp_path / "teacher"


def features(tiny: Tiny, teacher: object, *more: str) -> PretrainConfig:
    return tiny("objective.target=features", f"objective.teacher={teacher}", *more)


def test_a_model_of_ours_gives_its_tokens_on_the_grid_of_the_student(
    tiny: Tiny, teacher_folder: Path
) -> None:
    teacher, clip = load_teacher(features(tiny, teacher_folder)), a_clip()
    source = load_pretrained(teacher_folder / "model")
    c = source.config
    state = second.official_state(source, (3, *c.tubelet))
    video = ((at_size(clip, (48, 24)) - 0.3) / torch.tensor(c.std)).permute(0, 4, 1, 2, 3)
    with torch.no_grad():
        x = second.blocks(second.embed(video, state), state, "encoder.blocks", c.depth, c.num_heads)
        tokens = second.norm(x, state, "encoder.norm").unflatten(1, (4, 6, 3))
    targets = teacher(clip)
    torch.testing.assert_close(targets, expected_targets(tokens, (2, 4, 4)), **TOLERANCE)
    assert targets.shape == (2, 32, WIDTH)
    assert not targets.requires_grad
    assert teacher(a_clip(1)).dtype == torch.float32
    half = load_teacher(features(tiny, teacher_folder, "engine.precision=bf16"))(clip)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), targets, rtol=0, atol=0.15)


def test_a_teacher_of_the_size_of_the_student_reads_the_clip_as_it_is(tiny: Tiny) -> None:
    torch.manual_seed(1)
    model = VideoClassifier(replace(tiny().model, class_tokens=1, drop_path=0.5), 3)
    teacher, clip = EncoderTeacher(model.encoder, (2, 4, 4)), a_clip()
    with torch.no_grad():
        tokens = model.eval().encoder(clip)[:, 1:].unflatten(1, (2, 4, 4))
    torch.testing.assert_close(teacher(clip), expected_targets(tokens, (2, 4, 4)), **TOLERANCE)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_a_model_of_images_sees_the_first_frame_of_every_tubelet(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    kind, config, num_before = IMAGE_MODELS[name]
    theirs = shaken(getattr(transformers, kind)(getattr(transformers, config)(**IMAGE)))
    teacher = load_teacher(features(tiny, their_folder(tmp_path / name, theirs)))
    clip = a_clip()
    pixels = pixels_of(at_size(clip[:, [0, 2]], (24, 32))).flatten(0, 1)
    more = {} if name.startswith("dino") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        states = theirs(pixel_values=pixels, **more).last_hidden_state
    tokens = states[:, num_before:].reshape(2, 2, 3, 4, WIDTH)
    torch.testing.assert_close(teacher(clip), expected_targets(tokens, (2, 4, 4)), **TOLERANCE)


def test_vitmae_hides_nothing_from_its_student(tiny: Tiny, tmp_path: Path) -> None:
    theirs = shaken(transformers.ViTMAEModel(transformers.ViTMAEConfig(**IMAGE)))
    teacher = load_teacher(features(tiny, their_folder(tmp_path / "mae", theirs)))
    clip = a_clip()
    pixels = pixels_of(at_size(clip[:, [0, 2]], (24, 32))).flatten(0, 1)
    theirs.config.mask_ratio = 0.0
    with torch.no_grad():
        output = theirs(pixel_values=pixels, interpolate_pos_encoding=True)
    order = output.ids_restore[:, :, None].expand(-1, -1, WIDTH)  # it shuffles them
    tokens = output.last_hidden_state[:, 1:].gather(1, order).reshape(2, 2, 3, 4, WIDTH)
    torch.testing.assert_close(teacher(clip), expected_targets(tokens, (2, 4, 4)), **TOLERANCE)


def test_videomae_of_transformers_sees_the_clip(tiny: Tiny, tmp_path: Path) -> None:
    config = transformers.VideoMAEConfig(
        **SIZES, image_size=[24, 40], patch_size=8, num_frames=4, use_mean_pooling=False
    )
    theirs = shaken(transformers.VideoMAEModel(config))
    teacher, clip = load_teacher(features(tiny, their_folder(tmp_path / "v", theirs))), a_clip()
    with torch.no_grad():
        states = theirs(pixel_values=pixels_of(at_size(clip, (24, 40)))).last_hidden_state
    tokens = states.unflatten(1, (2, 3, 5))
    torch.testing.assert_close(teacher(clip), expected_targets(tokens, (2, 4, 4)), **TOLERANCE)


@pytest.mark.parametrize("negatives", ["clip", "batch"])
@pytest.mark.parametrize("feature_loss", ["smooth_l1", "squared"])
def test_the_losses_are_their_definitions_and_only_the_student_learns(
    tiny: Tiny, feature_loss: Any, negatives: Any
) -> None:
    torch.manual_seed(2)
    objective = ObjectiveConfig(
        target="features",
        teacher="x",
        feature_loss=feature_loss,
        contrastive_weight=0.3,
        temperature=0.2,
        learn_temperature=True,
        negatives=negatives,
    )
    model = shaken(VideoMAE(replace(tiny().model, target_width=WIDTH), objective))
    teacher = EncoderTeacher(VideoMAE(replace(tiny().model, embed_dim=WIDTH)).encoder, (2, 4, 4))
    clip, mask = a_clip(3), random_mask(torch.tensor([5, 6, 7]), model.grid, 0.7)
    target_BNF = teacher(clip)
    output = model(clip, mask, None, target_BNF)
    picked = torch.stack([target_BNF[b, mask.masked_BM[b]] for b in range(3)])
    error = (output.predicted_BMP - picked).abs()
    values = error**2
    if feature_loss == "smooth_l1":
        values = torch.where(error < 1, error**2 / 2, error - 0.5)
        assert (error > 1).any()
    temperature = model.objective.temperature()
    contrastive = second.contrastive(output.predicted_BMP, picked, temperature, negatives)
    torch.testing.assert_close(output.reconstruction_loss, values.mean())
    torch.testing.assert_close(output.contrastive_loss, contrastive)
    torch.testing.assert_close(output.loss, values.mean() + 0.3 * contrastive)
    output.loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_model_of_features_round_trips_and_other_projects_have_no_place_for_it(
    tiny: Tiny, tmp_path: Path
) -> None:
    objective = ObjectiveConfig(target="features", teacher="x")
    config = replace(tiny().model, target_width=WIDTH, num_frames=1, tubelet_size=1)
    model = VideoMAE(config, objective)
    save_model_folder(tmp_path / "model", model)
    loaded = load_pretrained(tmp_path / "model", VideoMAE)
    assert (loaded.config, loaded.objective_config) == (config, objective)
    clip, mask = a_clip()[:, :1], random_mask(torch.tensor([1, 2]), model.grid, 0.6)
    expected = model.predict(clip, mask)
    assert expected.shape == (2, mask.masked_BM.shape[1], WIDTH)
    assert torch.equal(loaded.predict(clip, mask), expected)
    assert torch.equal(deflated(inflated(loaded, 4)).decoder.head.weight, model.decoder.head.weight)
    for export in (export_official, export_hugging_face):
        with pytest.raises(ValueError, match=r"has no model\.target_width = 24"):
            export(model, tmp_path / "theirs")
    with pytest.raises(ValueError, match="predicts features, there are no pixels to draw"):
        reconstruct.start(str(tmp_path / "model"), ["a.mp4"], reconstruct.ReconstructConfig())
    with pytest.raises(ValueError, match=r"target_BNF: is \(2, 16, 7\); .* needs 24 features"):
        model(clip, mask, None, torch.zeros(2, 16, 7))
    with pytest.raises(ValueError, match=r"do not belong together"):
        VideoMAE(ModelConfig(target_width=WIDTH))
    with pytest.raises(ValueError, match=r"predicted_frames: 8 is of pixels"):
        ModelConfig(target_width=WIDTH, predicted_frames=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["objective.target=features"], r"objective\.teacher: \(empty\) belongs to"),
        (["objective.teacher=x"], r"objective\.teacher: x belongs to objective\.target = features"),
        (
            ["objective.target=features", "objective.teacher=x", "objective.normalize=none"],
            r"objective\.target: features leaves nothing for objective\.normalize",
        ),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(
    tiny: Tiny, changes: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(*changes)


def test_who_cannot_teach_is_told_in_one_line(
    tiny: Tiny, teacher_folder: Path, tmp_path: Path
) -> None:
    bert = transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=9))
    resnet = transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    )
    video = transformers.VideoMAEModel(
        transformers.VideoMAEConfig(**SIZES, image_size=32, num_frames=6)
    )
    thirds = tmp_path / "thirds"
    save_model_folder(thirds, VideoMAE(replace(tiny().model, num_frames=3, tubelet_size=3)))
    bare = transformers.Dinov2Model(transformers.Dinov2Config(**IMAGE))
    bare.save_pretrained(tmp_path / "bare")
    bert.save_pretrained(tmp_path / "bert")
    for teacher, more, message in (
        ("/no/model", [], r"objective\.teacher: /no/model: "),
        ("hf:/no/model", [], r"objective\.teacher: hf:/no/model: no such file or folder"),
        (f"hf:{tmp_path / 'bare'}", [], r"bare is not a model with .*preprocessor_config\.json"),
        (f"hf:{tmp_path / 'bert'}", [], r"bert is not a model with"),
        (their_folder(tmp_path / "r", resnet), [], r"is of type resnet .* known are clip_vision"),
        (their_folder(tmp_path / "v", video), [], r"^model\.num_frames: 4 is .* takes: 6$"),
        (f"hf:{tmp_path / 'v'}", SIX[1:], r"^stages\.b\.num_frames: 12 is .* takes: 6$"),
        (thirds, SIX[:2], r"^stages\.a\.num_frames: 2 is .* takes: multiples of 3$"),
        (teacher_folder, ["model.in_channels=1"], r"model\.in_channels = 3, this run 1"),
    ):
        changes = ["model.mean=[0.5]", "model.std=[0.5]", *more]
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            load_teacher(features(tiny, teacher, *changes))
        assert "\n" not in str(error.value)


@pytest.mark.trains_here
@pytest.mark.usefixtures("quiet_process")
def test_a_run_of_features_settles_their_width_and_draws_nothing(
    tiny: Tiny, teacher_folder: Path
) -> None:
    config = features(
        tiny,
        teacher_folder,
        "objective.contrastive_weight=0.1",
        "objective.learn_temperature=true",
        "journal.picture_interval=1",
        "optim.steps=2",
    )
    with pytest.raises(ValueError, match=r"model\.target_width: 7 is not that of the targets"):
        prepare(replace(config, model=replace(config.model, target_width=7)))
    with pytest.raises(ValueError, match=r"model\.target_width: 7 is not that of the targets"):
        prepare(tiny("model.target_width=7"))
    plan = prepare(config)
    assert plan.config.model.target_width == WIDTH
    assert run(plan) == DONE
    folder = Path(config.output)
    assert load_config(folder / "config.yaml") == plan.config == prepare(config).config
    assert load_pretrained(folder / "model").config == plan.config.model
    assert not (folder / "reconstructions").exists()
    told = f"targets are 24 features of {teacher_folder}; no pictures are drawn"
    assert (folder / "log.txt").read_text().count(told) == 1
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        total = line["reconstruction_loss"] + 0.1 * line["contrastive_loss"]
        assert line["loss"] == pytest.approx(total, abs=1e-5)
        assert line["contrastive_loss"] > 0
    assert plan.teacher is not None
    kept = load_pretrained(teacher_folder / "model").encoder.state_dict()
    for name, tensor in plan.teacher.network.state_dict().items():
        assert torch.equal(tensor, kept[name])
