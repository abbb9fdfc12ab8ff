"""Models of ours as files of others, and what these cannot hold; checkpoints of a run as a model
folder.
"""

import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from video_mae import (
    ClassifierConfig,
    ModelConfig,
    ObjectiveConfig,
    VideoClassifier,
    VideoMAE,
    load_pretrained,
    random_mask,
    resized,
    save_model_folder,
)
from video_mae.cli import main
from video_mae.convert.facts import Facts
from video_mae.convert.importing import import_model
from video_mae.evaluation.predict import views_of
from video_mae.kernels.tubelets import gather_tubelets
from video_mae.tools.convert import ConvertConfig, convert
from video_mae.training.pretrain import prepare, run

pytestmark = pytest.mark.trains_here

official = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "second_official.py")))
SIZE = official.Size()
MODEL = ModelConfig(
    num_frames=6,
    height=16,
    width=24,
    patch_size=8,
    embed_dim=24,
    depth=3,
    num_heads=3,
    mlp_ratio=40 / 24,
    decoder_embed_dim=16,
    decoder_depth=2,
    decoder_num_heads=2,
    decoder_mlp_ratio=1.5,
)
IMAGE = replace(
    MODEL,
    num_frames=1,
    tubelet_size=1,
    width=16,
    class_tokens=1,
    positions="sincos",
    qkv_bias="qkv",
    decoder_embed_bias=True,
)
TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}


def randomized(model: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def a_clip(config: ModelConfig, batch: int = 2) -> torch.Tensor:
    shape = (batch, config.num_frames, config.height, config.width, config.in_channels)
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def video_of(clip: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    return ((clip / 255 - torch.tensor(config.mean)) / torch.tensor(config.std)).permute(
        0, 4, 1, 2, 3
    )


def same(a: Any, b: Any) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
    )


def test_the_official_file_of_a_pretrained_model_computes_the_same(tmp_path):
    model = randomized(VideoMAE(MODEL))
    save_model_folder(tmp_path / "model", model)
    assert (
        len(convert(tmp_path / "model", tmp_path / "x.pth", ConvertConfig(format="official"))) == 1
    )
    state = torch.load(tmp_path / "x.pth", weights_only=True)["model"]
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in official.videomae_pretraining(SIZE).items()
    }
    clip, mask = a_clip(MODEL), random_mask(torch.tensor([1, 2]), MODEL.grid, 0.6)
    hidden = torch.zeros(2, MODEL.num_tokens, dtype=torch.bool).scatter(1, mask.masked_BM, True)
    expected = official.pretraining_forward(video_of(clip, MODEL), state, hidden, SIZE)
    torch.testing.assert_close(model.predict(clip, mask), expected, **TOLERANCE)
    back, report = import_model(tmp_path / "x.pth")
    assert same(back, model)
    assert back.config == MODEL
    assert set(report.left_out) == {"args"}


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_the_official_file_of_a_classifier_computes_the_same(pooling, tmp_path):
    model = randomized(VideoClassifier(MODEL, ClassifierConfig(num_classes=5, pooling=pooling)))
    save_model_folder(tmp_path / "model", model)
    convert(tmp_path / "model", tmp_path / "x.pth", ConvertConfig(format="official"))
    state = torch.load(tmp_path / "x.pth", weights_only=True)["model"]
    assert state.keys() == official.videomae_finetuned(SIZE, pooling=pooling).keys()
    clip = a_clip(MODEL)
    torch.testing.assert_close(
        model(clip), official.finetuned_forward(video_of(clip, MODEL), state, SIZE), **TOLERANCE
    )
    assert same(import_model(tmp_path / "x.pth")[0], model)


@pytest.mark.parametrize("name", ["pretraining", "fine-tuned", "image"])
def test_official_files_come_back_with_every_bit(name, tmp_path):
    size = official.Size(frames=1, tubelet=1, height=24) if name == "image" else SIZE
    state = (
        official.videomae_finetuned(size)
        if name == "fine-tuned"
        else official.videomae_pretraining(size, image=name == "image")
    )
    torch.save({"model": state}, tmp_path / "theirs.pth")
    facts: dict[str, Any] = {
        "num_heads": 3,
        "decoder_num_heads": 2,
        "num_frames": size.frames,
        "height": size.height,
        "width": size.width,
    }
    convert(tmp_path / "theirs.pth", tmp_path / "ours", ConvertConfig(**facts))
    convert(tmp_path / "ours", tmp_path / "back.pth", ConvertConfig(format="official"))
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert back.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())


@pytest.mark.parametrize("kind", ["pretrained", "classifier"])
def test_an_image_model_is_written_for_a_conv2d_and_read_back(kind, tmp_path):
    config = replace(MODEL, num_frames=1, tubelet_size=1)
    model = randomized(VideoMAE(config) if kind == "pretrained" else VideoClassifier(config, 5))
    save_model_folder(tmp_path / "model", model)
    lines = convert(tmp_path / "model", tmp_path / "x.pth", ConvertConfig(format="official"))
    assert any("Conv2d, which MAE-pytorch loads" in line for line in lines)
    state = torch.load(tmp_path / "x.pth", weights_only=True)["model"]
    (embed,) = [
        tensor for name, tensor in state.items() if name.endswith("patch_embed.proj.weight")
    ]
    conv = torch.nn.Conv2d(3, 24, 8, 8)
    conv.load_state_dict({"weight": embed, "bias": torch.zeros(24)})
    clip = a_clip(config)
    patches = conv(video_of(clip, config)[:, :, 0]).flatten(2).transpose(1, 2)
    ours = model.encoder.patch_embed
    tubelets = gather_tubelets(
        clip, torch.arange(6).expand(2, -1), config.tubelet, config.mean, config.std, torch.float32
    )
    torch.testing.assert_close(patches, ours(tubelets) - ours.bias, **TOLERANCE)
    back, _ = import_model(tmp_path / "x.pth")
    assert same(back, model)
    assert back.config.num_frames == back.config.tubelet_size == 1


def test_a_video_whose_tubelets_are_frames_keeps_its_conv3d(tmp_path):
    model = randomized(VideoMAE(replace(MODEL, num_frames=3, tubelet_size=1)))
    save_model_folder(tmp_path / "model", model)
    convert(tmp_path / "model", tmp_path / "x.pth", ConvertConfig(format="official"))
    assert torch.load(tmp_path / "x.pth", weights_only=True)["model"][
        "encoder.patch_embed.proj.weight"
    ].shape == (24, 3, 1, 8, 8)
    assert same(import_model(tmp_path / "x.pth")[0], model)


def test_a_classifier_with_learned_positions_is_written_as_the_official_class_keeps_them(tmp_path):
    model = randomized(VideoClassifier(replace(MODEL, positions="learned"), 5))
    save_model_folder(tmp_path / "model", model)
    lines = convert(tmp_path / "model", tmp_path / "x.pth", ConvertConfig(format="official"))
    assert any("use_learnable_pos_emb=True" in line for line in lines)
    state = torch.load(tmp_path / "x.pth", weights_only=True)["model"]
    assert torch.equal(state["pos_embed"], model.encoder.positions.table[None])
    assert state.keys() - {"pos_embed"} == official.videomae_finetuned(SIZE).keys()
    back, _ = import_model(tmp_path / "x.pth")
    assert back.config.positions == "learned"
    assert same(back, model)


@pytest.mark.parametrize(("sampling", "stride"), [("uniform", 4), ("dense", 2)])
def test_how_frames_are_chosen_goes_into_an_official_file_and_is_remarked_for_transformers(
    sampling, stride, tmp_path
):
    model = randomized(
        VideoClassifier(MODEL, ClassifierConfig(num_classes=5, sampling=sampling, stride=stride))
    )
    save_model_folder(tmp_path / "model", model)
    convert(tmp_path / "model", tmp_path / "x.pth", ConvertConfig(format="official"))
    back, report = import_model(tmp_path / "x.pth")
    assert isinstance(back, VideoClassifier)
    assert (back.classifier_config.sampling, back.classifier_config.stride) == (sampling, stride)
    assert not [note for note in report.notes if note.startswith(("sampling", "stride"))]
    lines = convert(tmp_path / "model", tmp_path / "hub", ConvertConfig(format="hugging_face"))
    assert any(
        line.startswith(f"classifier.sampling = {sampling}, stride = {stride}: ") for line in lines
    )


@pytest.mark.parametrize("sampling", ["parts", "parts_v2"])
def test_a_model_of_parts_comes_back_with_the_same_frames_in_tests(sampling, tmp_path):
    model = randomized(VideoClassifier(MODEL, ClassifierConfig(num_classes=174, sampling=sampling)))
    save_model_folder(tmp_path / "model", model)
    convert(tmp_path / "model", tmp_path / "x.pth", ConvertConfig(format="official"))
    lines = convert(tmp_path / "model", tmp_path / "hub", ConvertConfig(format="hugging_face"))
    assert not [line for line in lines if line.startswith("classifier.sampling")]
    for source in ("x.pth", "hub"):
        back, _ = import_model(tmp_path / source)
        assert isinstance(back, VideoClassifier)
        ours, theirs = (
            views_of(each.config, each.classifier_config, 2, 3) for each in (model, back)
        )
        for num_video_frames in range(1, 200):
            assert np.array_equal(ours.frames(num_video_frames), theirs.frames(num_video_frames))


@pytest.mark.parametrize("form", ["official", "hugging_face"])
def test_a_mean_that_leaves_out_a_patch_has_no_place_elsewhere(form, tmp_path):
    save_model_folder(
        tmp_path / "model", VideoClassifier(MODEL, ClassifierConfig(num_classes=5, pooling="rest"))
    )
    with pytest.raises(ValueError, match=r"^format: .* has no classifier\.pooling = rest$"):
        convert(tmp_path / "model", tmp_path / "out", ConvertConfig(format=form))  # pyright: ignore[reportArgumentType]


def test_a_file_of_one_project_becomes_a_folder_of_another_in_one_step(tmp_path):
    state = official.videomae_finetuned(SIZE)
    torch.save({"module": state}, tmp_path / "x.pth")
    facts: dict[str, Any] = {"num_heads": 3, "num_frames": 6, "height": 16, "width": 24}
    lines = convert(
        tmp_path / "x.pth", tmp_path / "hub", ConvertConfig(format="hugging_face", **facts)
    )
    assert any(
        "head_norm_eps = 1e-06: Hugging Face's VideoMAE computes with 1e-05" in line
        for line in lines
    )
    assert same(
        load_pretrained(tmp_path / "hub"), import_model(tmp_path / "x.pth", Facts(**facts))[0]
    )


def test_a_key_bias_is_left_out_where_it_has_no_place_and_no_effect(tmp_path):
    model = randomized(VideoMAE(replace(MODEL, qkv_bias="qkv")))
    save_model_folder(tmp_path / "model", model)
    lines = convert(tmp_path / "model", tmp_path / "x.pth", ConvertConfig(format="official"))
    assert sum("k_bias: left out" in line for line in lines) == 5
    back, mask = (
        load_pretrained(tmp_path / "x.pth", VideoMAE),
        random_mask(torch.tensor([1, 2]), MODEL.grid, 0.6),
    )
    torch.testing.assert_close(
        back.predict(a_clip(MODEL), mask), model.predict(a_clip(MODEL), mask), **TOLERANCE
    )


@pytest.mark.parametrize("bias", ["qkv", "qv", "none"])
def test_an_image_mae_becomes_a_vit_mae_with_its_computed_positions(bias, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = randomized(
        VideoMAE(
            replace(IMAGE, qkv_bias=bias), ObjectiveConfig(normalize="tubelet", pixels="normalized")
        )
    )
    save_model_folder(tmp_path / "model", model)
    assert (
        len(convert(tmp_path / "model", tmp_path / "hub", ConvertConfig(format="hugging_face")))
        == 1
    )
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "hub").eval()
    clip, mask = a_clip(IMAGE), random_mask(torch.tensor([1, 2]), IMAGE.grid, 0.5)
    theirs.config.mask_ratio = theirs.vit.embeddings.config.mask_ratio = 0.5
    with torch.no_grad():
        expected = theirs(
            video_of(clip, IMAGE)[:, :, 0], noise=torch.zeros(2, 4).scatter(1, mask.masked_BM, 1.0)
        )
        torch.testing.assert_close(model(clip, mask).loss, expected.loss, **TOLERANCE)
    back = load_pretrained(tmp_path / "hub", VideoMAE)
    assert back.config.positions == "sincos"
    torch.testing.assert_close(back.predict(clip, mask), model.predict(clip, mask), **TOLERANCE)


@pytest.mark.parametrize("choice", ["compute", "interpolate"])
def test_a_model_of_another_size_than_it_was_pretrained_at_is_written(choice, tmp_path):
    """Computed anew its positions are those of every format; interpolated, the official classifier
    keeps them as a table.
    """
    small = replace(MODEL, num_frames=4, height=8, resize_positions=choice)
    made: list[Any] = [VideoClassifier(small, 5), VideoMAE(small)]
    for one in made:
        model = randomized(resized(one, num_frames=6, height=16))
        assert (model.config.grid, model.config.position_grid) == (MODEL.grid, (2, 1, 3))
        folder = tmp_path / type(model).__name__
        save_model_folder(folder, model)
        for form in ("official", "hugging_face"):
            config = ConvertConfig(format=form)
            if choice == "interpolate" and (form, folder.name) != ("official", "VideoClassifier"):
                with pytest.raises(
                    ValueError, match=r"\(2, 1, 3\)\); those of .* = compute it has$"
                ):
                    convert(folder, tmp_path / "no", config)
                continue
            convert(folder, tmp_path / f"{folder.name}.{form}", config)
            back, clip = load_pretrained(tmp_path / f"{folder.name}.{form}"), a_clip(MODEL)
            with torch.no_grad():
                ours, theirs = (each.encoder(clip) for each in (model, back))
            torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_transformers_computes_what_a_model_of_another_size_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = replace(MODEL, num_frames=4, width=16, height=16, resize_positions="compute")
    model = randomized(resized(VideoClassifier(small, 5), num_frames=6, width=24, height=24))
    save_model_folder(tmp_path / "model", model)
    convert(tmp_path / "model", tmp_path / "hub", ConvertConfig(format="hugging_face"))
    theirs = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path / "hub").eval()
    clip = a_clip(model.config)
    with torch.no_grad():
        expected = theirs(video_of(clip, model.config).transpose(1, 2)).logits
        torch.testing.assert_close(model(clip), expected, rtol=0, atol=1e-4)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("official", {"class_tokens": 1}, "no model.class_tokens = 1"),
    ("official", {"positions": "learned"}, "in its classifiers alone"),
    ("official", {"positions": "sincos"}, "no model.positions = sincos"),
    ("official", {"positions": "separate"}, "no model.positions"),
    ("official", {"decoder_embed_bias": True}, "no model.decoder_embed_bias"),
    ("official", {"predicted_frames": 3}, "no model.predicted"),
    ("official", {"encoder_norm": False}, "no model.encoder_norm = False"),
    ("official", {"position_grid": (2, 2, 2)}, "interpolated"),
    ("hugging_face", {"layer_scale": 0.1}, "no model.layer_scale"),
    ("hugging_face", {"positions": "sincos"}, "no model.positions"),
    (
        "hugging_face",
        {"class_tokens": 1, "decoder_embed_bias": True},
        "ViTMAE has no model.num_frames = 6",
    ),
    (
        "hugging_face",
        {
            "positions": "separate",
            "class_tokens": 1,
            "num_frames": 1,
            "tubelet_size": 1,
            "width": 16,
        },
        "ViTMAE has no model.positions = separate",
    ),
    ("torch_export", {}, "for classifiers"),
    ("onnx", {}, "for classifiers"),
]


@pytest.mark.parametrize(("form", "changes", "said"), REFUSED)
def test_what_a_format_cannot_hold_is_refused(form, changes, said, tmp_path):
    save_model_folder(tmp_path / "model", VideoMAE(replace(MODEL, **changes)))
    with pytest.raises(ValueError, match=r"^format: [^\n]*$") as error:
        convert(tmp_path / "model", tmp_path / "out", ConvertConfig(format=form))  # pyright: ignore[reportArgumentType]
    assert said in str(error.value)
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


def test_what_a_format_does_not_say_is_remarked(tmp_path):
    objective = ObjectiveConfig(contrastive_weight=0.1, learn_temperature=True, normalize="tubelet")
    save_model_folder(
        tmp_path / "model",
        VideoMAE(replace(MODEL, mean=(0.5,), std=(0.5,), drop_path=0.1), objective),
    )
    text = "\n".join(
        convert(tmp_path / "model", tmp_path / "hub", ConvertConfig(format="hugging_face"))
    )
    for remark in (
        "head_norm_eps",
        "drop_path",
        "contrastive_weight",
        "normalize = tubelet",
        "targets: ",
        "temperature_logit: left out",
    ):
        assert remark in text
    assert load_pretrained(tmp_path / "hub").config.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "changes",
    [{}, {"class_tokens": 1, "positions": "learned", "qkv_bias": "qkv"}],
    ids=["videomae", "class token"],
)
def test_the_program_of_a_classifier_runs_without_this_package_for_any_batch(changes, tmp_path):
    config = replace(MODEL, **changes)
    model = randomized(VideoClassifier(config, 5))
    save_model_folder(tmp_path / "model", model)
    convert(tmp_path / "model", tmp_path / "x.pt2", ConvertConfig(format="torch_export"))
    clip = a_clip(config, 3)
    torch.save(clip, tmp_path / "clip.pt")
    code = (
        "import sys, torch; program = torch.export.load('x.pt2').module();"
        "clip = torch.load('clip.pt');"
        "torch.save([program(clip[:n]) for n in (1, 2, 3)], 'logits.pt');"
        "assert 'video_mae' not in sys.modules"
    )
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True, timeout=300)
    for number, logits in enumerate(torch.load(tmp_path / "logits.pt"), start=1):
        torch.testing.assert_close(logits, model(clip[:number]).detach(), **TOLERANCE)
    assert model.encoder.impl == "auto"


@pytest.mark.slow
def test_onnxruntime_computes_what_the_model_does_for_any_number_of_clips(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    config = replace(MODEL, class_tokens=1)
    model = randomized(VideoClassifier(config, 5))
    save_model_folder(tmp_path / "model", model)
    convert(tmp_path / "model", tmp_path / "x.onnx", ConvertConfig(format="onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    (given,) = session.get_inputs()
    assert (given.name, given.type) == ("clip", "tensor(uint8)")
    clip = a_clip(config, 3)
    for number in (1, 2, 3):
        (logits,) = session.run(["logits"], {"clip": clip[:number].numpy()})
        expected = model(clip[:number]).detach()
        torch.testing.assert_close(torch.from_numpy(logits), expected, **TOLERANCE)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "x.onnx"}


# Stage, precision, and which checkpoints are of an earlier version.
RUNS = ("0_fp32", "2_bf16", "3_fp32", "0_fp32_old", "0_bf16_old", "2_bf16_old", "3_fp32_old")


@pytest.fixture(scope="module")
def finished_runs(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Little runs whose model folders are put aside."""
    from checkpoint_files import save_as_before

    from video_mae.config import load_config
    from video_mae.training.engine import Engine

    folder = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in RUNS:
        output, (stage, precision, *old) = folder / name, name.split("_")
        config = load_config(
            tiny_file,
            [
                f"output={output}",
                "optim.steps=2",
                f"engine.zero_stage={stage}",
                f"engine.precision={precision}",
                f"optim.decay_tokens={stage == '0'}",
                "objective.contrastive_weight=0.1",
                "objective.learn_temperature=true",
            ],
        )
        with pytest.MonkeyPatch.context() as patch:
            if old:
                patch.setattr(Engine, "save", save_as_before)
            run(prepare(config))
        (output / "model").rename(output / "put_aside")
    torch.set_num_threads(threads)
    return folder


@pytest.mark.usefixtures("quiet_process")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_without_a_model_folder_is_converted_from_its_checkpoint(
    finished_runs, name, tmp_path
):
    source = finished_runs / name
    is_old = name.endswith("old")
    if is_old:
        with pytest.raises(
            ValueError, match=r"step_00000002: holds pickles of DeepSpeed, .*trust=true"
        ):
            convert(source, tmp_path / "model", ConvertConfig())
        assert not (tmp_path / "model").exists()
    for path in (source, source / "checkpoints" / "step_00000002"):
        convert(path, tmp_path / "model", ConvertConfig(trust=is_old, overwrite=True))
        ours, theirs = (
            load_file(folder / "model.safetensors")
            for folder in (tmp_path / "model", source / "put_aside")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
        assert (tmp_path / "model" / "config.json").read_text() == (
            source / "put_aside" / "config.json"
        ).read_text()


@pytest.mark.usefixtures("quiet_process")
def test_a_damaged_or_half_checkpoint_is_refused(finished_runs, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished_runs / "0_fp32", copy)
    file = copy / "checkpoints" / "step_00000002" / "state_00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    with pytest.raises(ValueError, match=r"state_00000\.safetensors is not what was written"):
        convert(copy, tmp_path / "model", ConvertConfig(trust=True))
    file.unlink()
    with pytest.raises(
        ValueError,
        match=r"step_00000002: is no whole checkpoint \(state_00000.safetensors is missing\)",
    ):
        convert(file.parent, tmp_path / "model", ConvertConfig(trust=True))
    with pytest.raises(FileNotFoundError, match="run: neither a model folder"):
        convert(copy, tmp_path / "model", ConvertConfig(trust=True))


def test_a_run_folder_is_converted_from_its_model(tmp_path):
    model = randomized(VideoMAE(MODEL))
    save_model_folder(tmp_path / "run" / "model", model)
    with pytest.raises(SystemExit) as exit_:
        main(
            [
                "convert",
                str(tmp_path / "run"),
                str(tmp_path / "hub"),
                "format=hugging_face",
            ]
        )
    assert exit_.value.code == 0
    assert same(load_pretrained(tmp_path / "hub"), model)
