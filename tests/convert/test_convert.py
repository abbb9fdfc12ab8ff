"""Files of other projects: what is imported computes what they compute, and every tensor is
accounted for.
"""

import argparse
import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from video_mae import VideoClassifier, VideoMAE, load_pretrained, random_mask, token_mask
from video_mae.cli import main
from video_mae.convert.facts import Facts
from video_mae.convert.importing import ImportReport, import_model
from video_mae.evaluation.features import FrozenEncoder
from video_mae.model.masking import ContextMask
from video_mae.tools.convert import ConvertConfig, convert

official = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "second_official.py")))
second = official.second
Size = official.Size
State = dict[str, torch.Tensor]

SIZE = Size()
IMAGE = Size(frames=1, height=24, tubelet=1)
FACTS: dict[str, Any] = {
    "num_heads": 3,
    "decoder_num_heads": 2,
    "num_frames": 6,
    "height": 16,
    "width": 24,
}
IMAGE_FACTS: dict[str, Any] = {**FACTS, "num_frames": 1, "height": 24}
TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}

LAYOUTS: dict[str, tuple[State, dict[str, Any]]] = {
    "videomae": (official.videomae_pretraining(SIZE), FACTS),
    "videomae, layer scale": (official.videomae_pretraining(SIZE, layer_scale=True), FACTS),
    "videomae, no biases": (official.videomae_pretraining(SIZE, attention="none"), FACTS),
    "videomae, timm's attention": (official.videomae_pretraining(SIZE, attention="packed"), FACTS),
    "MAE-pytorch": (official.videomae_pretraining(IMAGE, image=True), IMAGE_FACTS),
    "videomae, fine-tuned": (official.videomae_finetuned(SIZE), FACTS),
    "videomae, fine-tuned, first token": (
        official.videomae_finetuned(SIZE, pooling="first"),
        FACTS,
    ),
    "mmaction2": (official.mmaction_finetuned(SIZE), FACTS),
    "mae": (official.mae(IMAGE), IMAGE_FACTS),
    "mae, trained positions": (official.mae(IMAGE, fixed_positions=False), IMAGE_FACTS),
    "mae, encoder": (official.mae(IMAGE, part="encoder"), IMAGE_FACTS),
    "mae, fine-tuned": (official.mae(IMAGE, part="classifier", fixed_positions=False), IMAGE_FACTS),
    "mae, fine-tuned, class token": (
        official.mae(IMAGE, part="classifier", fixed_positions=False, pooling="first"),
        IMAGE_FACTS,
    ),
    "mae_st": (official.mae_st(SIZE), FACTS),
    "mae_st, joint positions": (official.mae_st(SIZE, separate=False), FACTS),
    "mae_st, no class token": (official.mae_st(SIZE, class_token=False), FACTS),
    "mae_st, all frames": (
        official.mae_st(SIZE, predicted=2, separate=False, class_token=False),
        FACTS,
    ),
    "mae_st, fine-tuned": (official.mae_st(SIZE, part="classifier"), FACTS),
    "mae_st, fine-tuned, no class token": (
        official.mae_st(SIZE, part="classifier", class_token=False),
        FACTS,
    ),
    "mae_st, fine-tuned, no class token, norm": (
        official.mae_st(
            SIZE, part="classifier", class_token=False, norm="norm", head="head.projection"
        ),
        FACTS,
    ),
    "mae_st, fine-tuned, norm": (
        official.mae_st(SIZE, part="classifier", norm="norm", head="head.projection"),
        FACTS,
    ),
}


def write(path: Path, state: State, wrapper: str = "model", prefix: str = "", **more: Any) -> Path:
    state = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    torch.save({wrapper: state, **more} if wrapper else state, path)
    return path


def imported(path: Path, **facts: Any) -> tuple[VideoMAE | VideoClassifier, ImportReport]:
    return import_model(path, Facts(**facts))


def a_clip(model: VideoMAE | VideoClassifier) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 clip_BTHWC, the same as their float video_BCTHW)."""
    c = model.config
    clip = torch.randint(
        0,
        256,
        (2, c.num_frames, c.height, c.width, c.in_channels),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(1),
    )
    return clip, ((clip / 255 - torch.tensor(c.mean)) / torch.tensor(c.std)).permute(0, 4, 1, 2, 3)


def a_mask(model: VideoMAE) -> tuple[Any, torch.Tensor]:
    """(our mask, the hidden tokens as booleans)."""
    mask = random_mask(torch.tensor([1, 2]), model.grid, 0.6)
    return mask, torch.zeros(2, model.config.num_tokens, dtype=torch.bool).scatter(
        1, mask.masked_BM, True
    )


def theirs(
    state: State, video: torch.Tensor, size: Any, hidden: torch.Tensor | None
) -> torch.Tensor:
    """What the project's own model computes, in float32: predictions, or logits where `hidden` is
    None.
    """
    depths, heads = (size.depth, size.decoder_depth), (size.heads, size.decoder_heads)
    if hidden is not None:
        return (
            official.pretraining_forward(video, state, hidden, size)
            if "encoder_to_decoder.weight" in state
            else second.mae_forward(video, state, hidden, depths, heads)
        )
    if "cls_head.fc_cls.weight" in state:
        state = official.as_finetuned(state)
    if "pos_embed_spatial" not in state and "cls_token" not in state:
        return official.finetuned_forward(video, state, size)
    if "head.projection.weight" in state:
        state = {
            name.replace("head.projection", "head").replace("norm.", "fc_norm.")
            if name.startswith(("head", "norm"))
            else name: tensor
            for name, tensor in state.items()
        }
    return second.mae_classify(video, state, size.tokens, size.depth, size.heads)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "mae, encoder"])
def test_every_layout_computes_what_its_project_does(name, tmp_path):
    state, facts = LAYOUTS[name]
    model, _ = imported(write(tmp_path / "x.pth", state), **facts)
    clip, video = a_clip(model)
    size = IMAGE if facts is IMAGE_FACTS else SIZE
    if isinstance(model, VideoMAE):
        mask, hidden = a_mask(model)
        torch.testing.assert_close(
            model.predict(clip, mask), theirs(state, video, size, hidden), **TOLERANCE
        )
    else:
        torch.testing.assert_close(model(clip), theirs(state, video, size, None), **TOLERANCE)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_is_used_or_named(name, tmp_path):
    state, facts = LAYOUTS[name]
    extra = {**state, "something.else": torch.zeros(3), "epochs_seen": torch.tensor(7)}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2), "step": torch.tensor(1.0)}}}
    model, report = imported(
        write(tmp_path / "x.pth", extra, optimizer=optimizer, epoch=3), **facts
    )
    named = set(report.left_out) - {"optimizer", "epoch"}
    assert named <= set(extra)
    assert {"something.else", "epochs_seen"} <= named
    assert report.used + len(named) == len(extra)
    assert "2 tensors" in report.left_out["optimizer"]
    fixed = (
        {name for name in state if "pos_embed" in name}
        if model.config.positions in ("sinusoid", "sincos")
        else set()
    )
    assert named == {"something.else", "epochs_seen"} | fixed
    assert bool(report.new) == (name == "mae, encoder")


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", "model_state", ""])
@pytest.mark.parametrize(
    "prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "backbone.", "model."]
)
@pytest.mark.parametrize("name", ["videomae", "videomae, fine-tuned"])
def test_wrappers_and_prefixes_fall_off(name, wrapper, prefix, tmp_path):
    state, facts = LAYOUTS[name]
    plain, _ = imported(write(tmp_path / "plain.pth", state), **facts)
    model, report = imported(write(tmp_path / "x.pth", state, wrapper, prefix), **facts)
    assert report.used == len(state)
    assert all(
        torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items()
    )


@pytest.mark.parametrize("wrapper", ["model", "module"])
def test_a_fine_tuned_file_may_keep_the_prefix_of_the_encoder(wrapper, tmp_path):
    state, facts = LAYOUTS["videomae, fine-tuned"]
    plain, _ = imported(write(tmp_path / "plain.pth", state), **facts)
    model, _ = imported(write(tmp_path / "x.pth", state, wrapper, "encoder."), **facts)
    assert all(
        torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items()
    )


def test_safetensors_and_the_old_format_of_torch_are_read_too(tmp_path):
    state, facts = LAYOUTS["videomae"]
    save_file(state, tmp_path / "x.safetensors")
    torch.save({"model": state}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    new, old = (
        imported(tmp_path / name, **facts)[0].state_dict() for name in ("x.safetensors", "old.pth")
    )
    assert all(torch.equal(tensor, old[name]) for name, tensor in new.items())


def test_an_encoder_alone_has_its_features_and_a_new_decoder_that_is_announced(tmp_path):
    state, facts = LAYOUTS["mae, encoder"]
    model, report = imported(write(tmp_path / "x.pth", state), **facts)
    assert isinstance(model, VideoMAE)
    assert list(report.new) == ["decoder"]
    assert "random" in report.new["decoder"]
    clip, video = a_clip(model)
    hidden = torch.zeros(2, IMAGE.tokens, dtype=torch.bool)
    encoded = second.norm(
        second.mae_encode(video, state, hidden, IMAGE.depth, IMAGE.heads, 1e-6), state, "norm"
    )
    torch.testing.assert_close(model.encoder(clip), encoded, **TOLERANCE)
    again, _ = imported(tmp_path / "x.pth", **facts)
    assert all(
        torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items()
    )


def test_an_encoder_without_its_norm_stays_without(tmp_path):
    state, facts = LAYOUTS["videomae, fine-tuned"]
    state = {name: tensor for name, tensor in state.items() if not name.startswith("head")}
    model, report = imported(write(tmp_path / "x.pth", state), **facts)
    assert isinstance(model, VideoMAE)
    assert set(report.left_out) == {"fc_norm.weight", "fc_norm.bias"}
    clip, video = a_clip(model)
    prefixed = {f"encoder.{name}": tensor for name, tensor in state.items()}
    expected = second.blocks(second.embed(video, prefixed), state, "blocks", SIZE.depth, SIZE.heads)
    torch.testing.assert_close(model.encoder(clip), expected, **TOLERANCE)


def test_objectives_and_statistics_are_those_of_the_projects(tmp_path):
    def of(name: str, **arguments: Any) -> tuple[Any, ...]:
        state, facts = LAYOUTS[name]
        model, _ = imported(
            write(tmp_path / "x.pth", state, args=argparse.Namespace(**arguments)), **facts
        )
        assert isinstance(model, VideoMAE)
        return (
            model.objective_config.normalize,
            model.objective_config.pixels,
            round(model.config.mean[0], 3),
        )

    assert of("videomae") == of("MAE-pytorch") == ("channel", "unit", 0.485)
    assert of("videomae", normlize_target=False) == ("none", "unit", 0.485)
    assert of("mae") == ("tubelet", "normalized", 0.485)
    assert of("mae", norm_pix_loss=False) == ("none", "normalized", 0.485)
    assert of("mae_st") == ("tubelet", "normalized", 0.45)


def test_a_table_of_mmaction_is_checked_against_the_computed_one(tmp_path):
    state, facts = LAYOUTS["mmaction2"]
    model, report = imported(write(tmp_path / "x.pth", state), **facts)
    assert model.config.positions == "sinusoid"
    assert "computed" in report.left_out["backbone.pos_embed"]
    table = state["backbone.pos_embed"].clone()
    table[0, 3, 2] += 0.01
    model, report = imported(
        write(tmp_path / "x.pth", {**state, "backbone.pos_embed": table}), **facts
    )
    assert model.config.positions == "learned"
    assert torch.equal(model.state_dict()["encoder.positions.table"], table[0])
    assert any("0.01" in note or "1.0e-02" in note for note in report.notes)


@pytest.mark.parametrize(
    ("width", "decoder", "heads"),
    [(384, 192, (6, 3)), (768, 384, (12, 6)), (1280, 640, (16, 8)), (1408, 512, (16, 8))],
)
def test_published_widths_have_the_published_heads(width, decoder, heads, tmp_path):
    size = Size(
        embed=width,
        depth=1,
        hidden=8,
        decoder_embed=decoder,
        decoder_depth=1,
        decoder_hidden=8,
        patch=2,
        frames=2,
    )
    model, report = imported(
        write(tmp_path / "x.pth", official.videomae_pretraining(size)),
        num_frames=2,
        height=4,
        width=4,
    )
    assert (model.config.num_heads, model.config.decoder_num_heads) == heads
    assert any(note.startswith(f"num_heads = {heads[0]}: ") for note in report.notes)
    given, report = imported(tmp_path / "x.pth", num_frames=2, height=4, width=4, num_heads=4)
    assert given.config.num_heads == 4
    assert not any(note.startswith("num_heads") for note in report.notes)


def test_the_decoder_of_mae_has_heads_of_32(tmp_path):
    size = Size(
        frames=1,
        tubelet=1,
        embed=768,
        depth=1,
        hidden=8,
        decoder_embed=512,
        decoder_depth=1,
        decoder_hidden=8,
        patch=4,
        height=8,
        width=8,
    )
    model, _ = imported(write(tmp_path / "x.pth", official.mae(size)))
    assert (model.config.num_heads, model.config.decoder_num_heads, model.config.grid) == (
        12,
        16,
        (1, 2, 2),
    )
    assert model.config.positions == "sincos"


def test_options_of_the_training_tell_what_tensors_do_not(tmp_path):
    arguments = argparse.Namespace(
        input_size=32,
        num_frames=8,
        model="x",
        device="cuda",
        lr=np.float64(0.1),
        clip_grad=None,
        opt_betas=[0.9],
    )
    state, _ = LAYOUTS["videomae"]
    path = write(
        tmp_path / "x.pth", state, args=arguments, max_accuracy=np.float64(0.5), epoch=np.int64(7)
    )
    model, report = imported(path, num_heads=3, decoder_num_heads=2)
    assert (model.config.num_frames, model.config.height, model.config.width) == (8, 32, 32)
    assert set(report.left_out) == {"args", "max_accuracy", "epoch"}
    with pytest.raises(ValueError, match=r"x\.pth: is of num_frames = 8, not 6"):
        imported(path, num_heads=3, decoder_num_heads=2, num_frames=6)
    state, facts = LAYOUTS["videomae, fine-tuned"]
    model, _ = imported(
        write(tmp_path / "x.pth", state, args=argparse.Namespace(data_set="SSV2", sampling_rate=2)),
        **facts,
    )
    assert isinstance(model, VideoClassifier)
    assert (model.classifier_config.sampling, model.classifier_config.stride) == ("uniform", 2)
    assert not model.classifier_config.antialias  # as its own test resizes


@pytest.mark.parametrize("name", ["videomae", "mae", "mae_st"])
def test_heads_are_those_of_the_training_where_it_tells_them(name, tmp_path):
    state, facts = LAYOUTS[name]
    size = replace(IMAGE if facts is IMAGE_FACTS else SIZE, heads=6, decoder_heads=4)
    facts = {key: value for key, value in facts.items() if not key.endswith("heads")}
    path = write(
        tmp_path / "x.pth", state, args=argparse.Namespace(num_heads=6, decoder_num_heads=4)
    )
    model, report = imported(path, **facts)
    assert isinstance(model, VideoMAE)
    assert (model.config.num_heads, model.config.decoder_num_heads) == (6, 4)
    assert not [note for note in report.notes if "heads" in note]
    clip, video = a_clip(model)
    mask, hidden = a_mask(model)
    torch.testing.assert_close(
        model.predict(clip, mask), theirs(state, video, size, hidden), **TOLERANCE
    )


V2 = Size(frames=16, height=32, width=48)


def dual_case(tmp_path: Path, skipped: float, **facts: Any) -> tuple[Any, ...]:
    """(model, its predictions and loss with the mask of a V2 training, theirs, what is hidden and
    decoded).
    """
    state = official.videomae_pretraining(V2)
    path = write(
        tmp_path / "x.pth",
        state,
        args=argparse.Namespace(decoder_mask_ratio=skipped, decoder_mask_type="run_cell"),
    )
    model, report = imported(
        path, num_heads=3, decoder_num_heads=2, num_frames=16, height=32, width=48, **facts
    )
    assert isinstance(model, VideoMAE)
    clip, video = a_clip(model)
    mask = token_mask(torch.tensor([1, 2]), model.grid, "tube", 0.75, skipped, "all")
    assert isinstance(mask, ContextMask)
    hidden = torch.ones(2, model.config.num_tokens, dtype=torch.bool).scatter(
        1, mask.visible_BV, False
    )
    decoded = torch.zeros_like(hidden).scatter(
        1, torch.cat([mask.masked_BM, mask.context_BX], dim=1), True
    )
    expected = second.dual_forward(
        video, state, hidden, decoded, (V2.depth, V2.decoder_depth), (V2.heads, V2.decoder_heads)
    )
    scored = expected[hidden[decoded].reshape(2, -1)].reshape(2, mask.masked_BM.shape[1], -1)
    return model, report, clip, mask, scored


@pytest.mark.parametrize("skipped", [0.25, 0.5, 0.75])
def test_dual_masking_of_v2_predicts_exactly_what_theirs_does(skipped, tmp_path):
    model, report, clip, mask, expected = dual_case(tmp_path, skipped)
    assert model.config.decoder_context == "all"
    assert any(
        note.startswith("decoder_context = all: as in its training") for note in report.notes
    )
    torch.testing.assert_close(model.predict(clip, mask), expected, rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match=r"mask: leaves tokens out, .*decoder_context=\"all\""):
        model(clip, token_mask(torch.tensor([1, 2]), model.grid, "tube", 0.75, skipped))
    convert(
        tmp_path / "x.pth",
        tmp_path / "model",
        ConvertConfig(num_heads=3, decoder_num_heads=2, num_frames=16, height=32, width=48),
    )
    convert(tmp_path / "model", tmp_path / "back.pth", ConvertConfig(format="official"))
    for path in ("model", "back.pth"):
        again = load_pretrained(tmp_path / path, VideoMAE)
        assert again.config == model.config
        assert torch.equal(again.predict(clip, mask), model.predict(clip, mask))


def test_leaving_out_what_is_not_scored_changes_predictions(tmp_path):
    model, _, clip, mask, expected = dual_case(tmp_path, 0.5, decoder_context="scored")
    assert model.config.decoder_context == "scored"
    shorter = model.predict(clip, token_mask(torch.tensor([1, 2]), model.grid, "tube", 0.75, 0.5))
    assert torch.equal(model.predict(clip, mask), shorter)  # what it has no use for does not matter
    assert (shorter - expected).abs().max() > 1e-4


def test_the_first_patch_is_left_out_of_the_features_of_such_a_classifier_too(tmp_path):
    state, facts = LAYOUTS["mae_st, fine-tuned, no class token"]
    model, _ = imported(write(tmp_path / "x.pth", state), **facts)
    assert isinstance(model, VideoClassifier)
    assert model.classifier_config.pooling == "rest"
    clip, _ = a_clip(model)
    pooled = FrozenEncoder(model, torch.device("cpu"))(clip).pooled_BD
    torch.testing.assert_close(model.head(pooled), model(clip), **TOLERANCE)
    tokens = model.encoder(clip)
    torch.testing.assert_close(pooled, model.fc_norm(tokens[:, 1:].mean(1)).detach(), **TOLERANCE)


def test_a_folder_of_videomae_v2_on_the_hub_is_read_by_the_official_names(tmp_path):
    size = Size(height=16, width=16)
    state = official.videomae_finetuned(size)
    del state["head.weight"], state["head.bias"]
    (tmp_path / "hub").mkdir()
    save_file(
        {f"model.{name}": tensor for name, tensor in state.items()},
        tmp_path / "hub" / "model.safetensors",
    )
    told = {"img_size": 16, "num_frames": 6, "num_heads": 3, "embed_dim": 24}
    (tmp_path / "hub" / "config.json").write_text(
        json.dumps({"model_type": "VideoMAEv2_Base", "model_config": told})
    )
    model = load_pretrained(tmp_path / "hub", VideoMAE)
    assert (model.config.num_heads, model.grid) == (3, (3, 2, 2))
    clip, video = a_clip(model)
    prefixed = {f"encoder.{name}": tensor for name, tensor in state.items()}
    expected = second.blocks(second.embed(video, prefixed), state, "blocks", size.depth, size.heads)
    torch.testing.assert_close(model.encoder(clip), expected, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read_as_float32(dtype, tmp_path):
    state, facts = LAYOUTS["videomae"]
    model, _ = imported(
        write(tmp_path / "x.pth", {name: tensor.to(dtype) for name, tensor in state.items()}),
        **facts,
    )
    assert torch.equal(
        model.state_dict()["encoder.blocks.1.attn.qkv.weight"],
        state["encoder.blocks.1.attn.qkv.weight"].to(dtype).float(),
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_converted_folder_and_the_file_itself_load_the_same(name, tmp_path, capsys):
    state, facts = LAYOUTS[name]
    path = write(tmp_path / "x.pth", state)
    with pytest.raises(SystemExit) as exit_:
        main(
            [
                "convert",
                str(path),
                str(tmp_path / "model"),
                *(f"{key}={value}" for key, value in facts.items()),
            ]
        )
    assert exit_.value.code == 0
    assert (
        f"{len(state)} tensors used" in capsys.readouterr().out
        or "computed here" in (tmp_path / "model" / "import.json").read_text()
    )
    folder, file = load_pretrained(tmp_path / "model"), load_pretrained(path, facts=Facts(**facts))
    assert (type(folder), folder.config) == (type(file), file.config)
    assert all(
        torch.equal(tensor, file.state_dict()[name]) for name, tensor in folder.state_dict().items()
    )
    report = json.loads((tmp_path / "model" / "import.json").read_text())
    assert report["used"] + len(report["left_out"]) == len(state)
    assert sorted(child.name for child in (tmp_path / "model").iterdir()) == [
        "config.json",
        "import.json",
        "model.safetensors",
    ]
    convert(tmp_path / "model", tmp_path / "copy", ConvertConfig())
    assert json.loads((tmp_path / "copy" / "import.json").read_text()) == report


def test_a_destination_is_not_overwritten_unless_asked(tmp_path):
    path = write(tmp_path / "x.pth", LAYOUTS["videomae"][0])
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("")
    with pytest.raises(ValueError, match=r"there: exists; .*overwrite=true"):
        convert(path, tmp_path / "there", ConvertConfig(**FACTS))
    assert [child.name for child in (tmp_path / "there").iterdir()] == ["mine"]
    (tmp_path / "there" / "mine").rename(tmp_path / "there" / "config.json")
    convert(path, tmp_path / "there", ConvertConfig(**FACTS, overwrite=True))
    assert load_pretrained(tmp_path / "there", VideoMAE).config.num_heads == 3
    with pytest.raises(ValueError, match="holds the source"):
        convert(path, tmp_path, ConvertConfig(**FACTS, overwrite=True))
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"a video")
    for _ in range(2):  # also beside a config.json
        with pytest.raises(ValueError, match=r"videos: holds more than a model \(a\.mp4\)"):
            convert(path, tmp_path / "videos", ConvertConfig(**FACTS, overwrite=True))
        assert (tmp_path / "videos" / "a.mp4").read_bytes() == b"a video"
        (tmp_path / "videos" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    convert(path, tmp_path / "file", ConvertConfig(**FACTS, overwrite=True))
    assert load_pretrained(tmp_path / "file", VideoMAE).config.num_heads == 3
    (tmp_path / "empty").mkdir()
    convert(path, tmp_path / "empty", ConvertConfig(**FACTS, overwrite=True))
    assert load_pretrained(tmp_path / "empty", VideoMAE).config.num_heads == 3


def test_loading_warns_of_what_was_assumed_and_refuses_another_kind(tmp_path, caplog):
    state, facts = LAYOUTS["mae, encoder"]
    path = write(tmp_path / "x.pth", state)
    load_pretrained(path, VideoMAE, facts=Facts(**facts))
    assert any("decoder: new" in message for message in caplog.messages)
    with pytest.raises(ValueError, match=r"x\.pth: holds a VideoMAE, a VideoClassifier is wanted"):
        load_pretrained(path, VideoClassifier, facts=Facts(**facts))
    convert(path, tmp_path / "model", ConvertConfig(**facts))
    with pytest.raises(ValueError, match="leaves nothing open"):
        load_pretrained(tmp_path / "model", facts=Facts(num_heads=3))
    with pytest.raises(ValueError, match="num_heads: is for files of other projects"):
        convert(tmp_path / "model", tmp_path / "copy", ConvertConfig(num_heads=3))
