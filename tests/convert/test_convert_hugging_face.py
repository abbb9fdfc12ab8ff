"""Folders of the installed transformers: the same outputs, and there and back without a changed
bit.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from video_mae import VideoClassifier, VideoMAE, load_pretrained, random_mask
from video_mae.convert.facts import Facts
from video_mae.convert.importing import import_model
from video_mae.tools.convert import ConvertConfig, convert

transformers = pytest.importorskip("transformers")

TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
SMALL: dict[str, Any] = {
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 40,
}
VIDEO: dict[str, Any] = {**SMALL, "image_size": [16, 24], "num_frames": 6}
# heads of 88
GIANT: dict[str, Any] = {
    **VIDEO,
    "hidden_size": 176,
    "num_attention_heads": 2,
    "intermediate_size": 352,
}
IMAGE: dict[str, Any] = {**SMALL, "image_size": 32}


def random_model(kind: str, config: Any, seed: int = 0) -> Any:
    """Random weights and biases, none of them 0: transformers starts biases, and ViTMAE's tables,
    at 0.
    """
    model, generator = getattr(transformers, kind)(config), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = around + 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def pixels(clip: torch.Tensor) -> torch.Tensor:
    """A uint8 clip as transformers takes it: float, frames before channels."""
    return ((clip / 255 - MEAN) / STD).permute(0, 1, 4, 2, 3)


def a_clip(model: VideoMAE | VideoClassifier) -> torch.Tensor:
    c = model.config
    return torch.randint(
        0,
        256,
        (2, c.num_frames, c.height, c.width, c.in_channels),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(1),
    )


def same(a: Any, b: Any) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
    )


def open_theirs(kind: str, folder: Path) -> Any:
    """from_pretrained, with nothing missing and nothing left."""
    model, told = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


@pytest.mark.parametrize("sizes", [VIDEO, GIANT], ids=["base", "giant"])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("use_mean_pooling", [True, False])
@pytest.mark.parametrize("original_names", [True, False], ids=["v4", "v5"])
def test_videomae_pretraining_has_the_same_tokens_logits_and_loss(
    sizes, normalized, use_mean_pooling, original_names, tmp_path
):
    config = transformers.VideoMAEConfig(
        **sizes, norm_pix_loss=normalized, use_mean_pooling=use_mean_pooling
    )
    theirs = random_model("VideoMAEForPreTraining", config)
    theirs.save_pretrained(tmp_path / "theirs", save_original_format=original_names)
    model, report = import_model(tmp_path / "theirs")
    assert isinstance(model, VideoMAE)
    assert not report.left_out
    assert not report.new
    clip, mask = a_clip(model), random_mask(torch.tensor([1, 2]), model.grid, 0.6)
    hidden = torch.zeros(2, model.config.num_tokens, dtype=torch.bool).scatter(
        1, mask.masked_BM, True
    )
    with torch.no_grad():
        output, expected = model(clip, mask), theirs(pixels(clip), hidden)
        torch.testing.assert_close(output.predicted_BMP, expected.logits, **TOLERANCE)
        torch.testing.assert_close(output.loss, expected.loss, **TOLERANCE)
        torch.testing.assert_close(
            model.encoder(clip), theirs.videomae(pixels(clip)).last_hidden_state, **TOLERANCE
        )
        visible = theirs.videomae(pixels(clip), hidden).last_hidden_state
        torch.testing.assert_close(model.encoder(clip, mask.visible_BV), visible, **TOLERANCE)


def test_channels_other_than_rgb_have_the_loss_of_transformers(tmp_path):
    theirs = random_model(
        "VideoMAEForPreTraining", transformers.VideoMAEConfig(**VIDEO, num_channels=5)
    )
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs", VideoMAE)
    assert (model.config.mean, model.config.std) == ((0.0,), (1.0,))
    clip, mask = a_clip(model), random_mask(torch.tensor([1, 2]), model.grid, 0.6)
    hidden = torch.zeros(2, model.config.num_tokens, dtype=torch.bool).scatter(
        1, mask.masked_BM, True
    )
    with torch.no_grad():
        expected = theirs((clip / 255).permute(0, 1, 4, 2, 3), hidden)
        torch.testing.assert_close(model(clip, mask).loss, expected.loss, **TOLERANCE)


@pytest.mark.parametrize("sizes", [VIDEO, GIANT], ids=["base", "giant"])
@pytest.mark.parametrize("use_mean_pooling", [True, False])
def test_videomae_classification_has_the_same_logits_and_names(sizes, use_mean_pooling, tmp_path):
    names = {0: "run", 1: "swim", 2: "fly"}
    theirs = random_model(
        "VideoMAEForVideoClassification",
        transformers.VideoMAEConfig(
            **sizes, use_mean_pooling=use_mean_pooling, num_labels=3, id2label=names
        ),
    )
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs", VideoClassifier)
    assert model.classifier_config.class_names == tuple(names.values())
    clip = a_clip(model)
    with torch.no_grad():
        torch.testing.assert_close(model(clip), theirs(pixels(clip)).logits, **TOLERANCE)


@pytest.mark.parametrize("use_mean_pooling", [True, False])
def test_a_videomae_model_has_the_same_tokens_and_a_new_decoder(use_mean_pooling, tmp_path):
    theirs = random_model(
        "VideoMAEModel", transformers.VideoMAEConfig(**VIDEO, use_mean_pooling=use_mean_pooling)
    )
    theirs.save_pretrained(tmp_path / "theirs")
    model, report = import_model(tmp_path / "theirs")
    assert list(report.new) == ["decoder"]
    with torch.no_grad():
        torch.testing.assert_close(
            model.encoder(a_clip(model)),
            theirs(pixels(a_clip(model))).last_hidden_state,
            **TOLERANCE,
        )
    convert(tmp_path / "theirs", tmp_path / "again", ConvertConfig(format="hugging_face"))
    again, _ = transformers.VideoMAEModel.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert same(again, theirs)


def vit_mae(tmp_path: Path, original_names: bool = True, **more: Any) -> Any:
    theirs = random_model("ViTMAEForPreTraining", transformers.ViTMAEConfig(**IMAGE, **more))
    theirs.save_pretrained(tmp_path / "theirs", save_original_format=original_names)
    return theirs


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("original_names", [True, False], ids=["v4", "v5"])
def test_vit_mae_has_the_same_tokens_logits_and_loss(normalized, original_names, tmp_path):
    theirs = vit_mae(tmp_path, original_names, norm_pix_loss=normalized, mask_ratio=0.5)
    model, report = import_model(tmp_path / "theirs")
    assert isinstance(model, VideoMAE)
    assert not report.left_out
    clip, noise = a_clip(model), torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    images = pixels(clip)[:, 0]
    mask = random_mask(torch.tensor([1, 2]), model.grid, 0.5)
    noise = noise.scatter(1, mask.masked_BM, 2.0)  # the largest half is hidden
    with torch.no_grad():
        output, expected = model(clip, mask), theirs(images, noise=noise)
        hidden = expected.mask.bool()
        torch.testing.assert_close(
            output.predicted_BMP, expected.logits[hidden].reshape(2, 8, -1), **TOLERANCE
        )
        torch.testing.assert_close(output.loss, expected.loss, **TOLERANCE)
        order = noise.argsort(dim=1)[:, :8]
        tokens = theirs.vit(images, noise=noise).last_hidden_state
        torch.testing.assert_close(model.encoder(clip, order), tokens, **TOLERANCE)


def test_a_vit_mae_model_without_decoder_and_without_biases_is_read(tmp_path):
    theirs = random_model(
        "ViTMAEModel", transformers.ViTMAEConfig(**IMAGE, qkv_bias=False, mask_ratio=0.0)
    )
    theirs.save_pretrained(tmp_path / "theirs")
    model, report = import_model(tmp_path / "theirs")
    assert model.config.qkv_bias == "none"
    assert list(report.new) == ["decoder"]
    noise = torch.arange(16.0).expand(2, -1)
    with torch.no_grad():
        expected = theirs(pixels(a_clip(model))[:, 0], noise=noise).last_hidden_state
        torch.testing.assert_close(model.encoder(a_clip(model)), expected, **TOLERANCE)


@pytest.mark.parametrize(
    "kind", ["VideoMAEForPreTraining", "VideoMAEForVideoClassification", "ViTMAEForPreTraining"]
)
@pytest.mark.parametrize("bias", [True, False])
def test_there_and_back_changes_no_bit(kind, bias, tmp_path):
    if kind.startswith("ViTMAE"):
        config = transformers.ViTMAEConfig(
            **IMAGE, qkv_bias=bias, norm_pix_loss=True, layer_norm_eps=1e-7
        )
    else:
        config = transformers.VideoMAEConfig(
            **VIDEO,
            qv_bias=bias,
            num_labels=3,
            norm_pix_loss=False,
            use_mean_pooling=bias,
            layer_norm_eps=1e-7,
        )
    theirs = random_model(kind, config)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", ConvertConfig())
    lines = convert(tmp_path / "ours", tmp_path / "back", ConvertConfig(format="hugging_face"))
    assert len(lines) == 1, lines  # nothing to remark
    back = open_theirs(kind, tmp_path / "back")
    assert same(back, theirs)
    kept = [
        "layer_norm_eps",
        "image_size",
        "num_labels" if kind == "VideoMAEForVideoClassification" else "norm_pix_loss",
    ]
    assert [getattr(back.config, key) for key in kept] == [getattr(config, key) for key in kept]
    assert same(load_pretrained(tmp_path / "back"), load_pretrained(tmp_path / "ours"))
    if not kind.startswith("ViTMAE"):  # the very file
        written, read = (
            load_file(tmp_path / name / "model.safetensors") for name in ("back", "theirs")
        )
        assert written.keys() == read.keys()
        assert all(torch.equal(tensor, read[name]) for name, tensor in written.items())


def test_the_names_that_version_4_gave_to_vit_mae_are_read_and_written(tmp_path):
    theirs = vit_mae(tmp_path)
    file = tmp_path / "theirs" / "model.safetensors"
    save_file(
        {
            name.replace("decoder_encoder.layer", "decoder_layers"): tensor
            for name, tensor in load_file(file).items()
        },
        file,
    )
    convert(tmp_path / "theirs", tmp_path / "back", ConvertConfig(format="hugging_face"))
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == load_file(file).keys()
    assert same(open_theirs("ViTMAEForPreTraining", tmp_path / "back"), theirs)


@pytest.mark.parametrize("form", ["bin", "shards", "bin shards"])
def test_pickles_and_shards_are_read_like_one_file(form, tmp_path):
    theirs = random_model("VideoMAEForPreTraining", transformers.VideoMAEConfig(**VIDEO))
    theirs.save_pretrained(
        tmp_path / "theirs", max_shard_size="40KB" if form == "shards" else "5GB"
    )
    folder = tmp_path / "theirs"
    if form == "shards":
        assert len(list(folder.glob("*.safetensors"))) > 2
    else:
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        halves = (
            [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
            if form == "bin shards"
            else [state]
        )
        names = (
            [f"pytorch_model-{i}.bin" for i in range(2)]
            if form == "bin shards"
            else ["pytorch_model.bin"]
        )
        for name, half in zip(names, halves, strict=True):
            torch.save(half, folder / name)
        if form == "bin shards":
            places = {key: name for name, half in zip(names, halves, strict=True) for key in half}
            (folder / "pytorch_model.bin.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": places})
            )
    model, report = import_model(folder)
    assert not report.left_out
    convert(folder, tmp_path / "back", ConvertConfig(format="hugging_face"))
    assert same(open_theirs("VideoMAEForPreTraining", tmp_path / "back"), theirs)
    assert report.used == len(load_file(tmp_path / "back" / "model.safetensors"))
    assert model.config.norm_eps == 1e-12
    assert model.config.head_norm_eps == 1e-5


def test_statistics_come_from_the_preprocessor(tmp_path):
    random_model("VideoMAEModel", transformers.VideoMAEConfig(**VIDEO)).save_pretrained(
        tmp_path / "theirs"
    )
    _, report = import_model(tmp_path / "theirs")
    assert any(note.startswith("mean = (0.485") for note in report.notes)
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]})
    )
    model, report = import_model(tmp_path / "theirs")
    assert (model.config.mean, model.config.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert not any(note.startswith("mean") for note in report.notes)


def test_sixteen_heads_of_the_small_model_are_kept_but_remarked_and_can_be_changed(tmp_path):
    sizes = {**VIDEO, "hidden_size": 384, "num_attention_heads": 16, "num_hidden_layers": 1}
    random_model("VideoMAEModel", transformers.VideoMAEConfig(**sizes)).save_pretrained(
        tmp_path / "theirs"
    )
    model, report = import_model(tmp_path / "theirs")
    assert model.config.num_heads == 16
    assert any("num_heads=6" in note for note in report.notes)
    model, report = import_model(tmp_path / "theirs", Facts(num_heads=6, decoder_num_heads=3))
    assert model.config.num_heads == 6
    assert any("given, though the source says 16" in note for note in report.notes)


def test_biases_that_an_early_version_5_lost_are_remarked(tmp_path):
    theirs = random_model("VideoMAEModel", transformers.VideoMAEConfig(**VIDEO))
    theirs.save_pretrained(tmp_path / "theirs")
    assert not any("lost" in note for note in import_model(tmp_path / "theirs")[1].notes)
    file = tmp_path / "theirs" / "model.safetensors"
    save_file(
        {
            name: tensor * (not name.endswith(("q_bias", "v_bias")))
            for name, tensor in load_file(file).items()
        },
        file,
    )
    assert any("lost" in note for note in import_model(tmp_path / "theirs")[1].notes)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_size", 32, "hidden_size is 32, not the 48 that the weights have"),
        ("num_hidden_layers", 3, "num_hidden_layers is 3"),
        (
            "decoder_num_hidden_layers",
            12,
            "decoder_num_hidden_layers is 12, not the 2 that the weights have",
        ),
        ("intermediate_size", 3072, "intermediate_size"),
        ("patch_size", 16, "patch_size is 16"),
        ("patch_size", [8, 4], "patch_size"),
        ("tubelet_size", 1, "tubelet_size"),
        ("num_channels", 1, "num_channels"),
        ("num_attention_heads", 5, "num_heads = 5 does not divide"),
        ("num_attention_heads", "4", "num_attention_heads is '4'"),
        ("num_attention_heads", True, "num_attention_heads is True"),
        ("image_size", [16], "image_size"),
        ("image_size", 20, "no multiple"),
        ("image_size", 10**6, "not believed"),
        ("num_frames", 5, "no multiple"),
        ("num_frames", -2, "num_frames is -2"),
        ("hidden_act", "relu", "hidden_act is 'relu'"),
        ("layer_norm_eps", 0, "layer_norm_eps is 0"),
        ("layer_norm_eps", "small", "layer_norm_eps"),
        ("norm_pix_loss", 1, "norm_pix_loss is 1"),
        ("use_mean_pooling", "yes", "use_mean_pooling"),
        ("use_mean_pooling", False, "layernorm"),
        ("model_type", "bert", "model_type is 'bert'"),
        ("model_type", ["videomae"], "model_type"),
        ("model_type", "vit_mae", "not known here"),
    ],
)
def test_a_config_that_is_not_that_of_the_weights_is_refused(key, value, said, tmp_path):
    random_model("VideoMAEForPreTraining", transformers.VideoMAEConfig(**VIDEO)).save_pretrained(
        tmp_path / "theirs"
    )
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ValueError, match=r"^[^\n]*theirs[^\n]*$") as error:
        convert(tmp_path / "theirs", tmp_path / "ours", ConvertConfig())
    assert said in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_names_of_classes_must_be_those_of_the_head(tmp_path):
    random_model(
        "VideoMAEForVideoClassification", transformers.VideoMAEConfig(**VIDEO, num_labels=3)
    ).save_pretrained(tmp_path / "theirs")
    assert load_pretrained(tmp_path / "theirs", VideoClassifier).classifier_config.class_names == ()
    file = tmp_path / "theirs" / "config.json"
    for names in ({"0": "run"}, ["run", "swim", "fly"], {"0": "a", "1": "b", "3": "c"}):
        file.write_text(json.dumps({**json.loads(file.read_text()), "id2label": names}))
        with pytest.raises(ValueError, match=r"config\.json: id2label"):
            import_model(tmp_path / "theirs")


def test_weights_without_their_config_are_refused(tmp_path):
    random_model("VideoMAEModel", transformers.VideoMAEConfig(**VIDEO)).save_pretrained(
        tmp_path / "theirs"
    )
    shutil.copy(tmp_path / "theirs" / "model.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match=r"alone\.safetensors: has no config\.json beside it"):
        import_model(tmp_path / "alone.safetensors")
