"""What `video-mae look` draws: the components and the attention that numpy computes, of any model
and file, the same each time.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from video_mae import (
    ClassifierConfig,
    ModelConfig,
    VideoClassifier,
    VideoMAE,
    save_model_folder,
)
from video_mae.cli import main
from video_mae.evaluation.look import look, pooled_attention, principal_components

MODEL = ModelConfig(
    num_frames=4,
    height=16,
    width=24,
    patch_size=8,
    embed_dim=24,
    depth=2,
    num_heads=3,
    decoder_embed_dim=8,
    decoder_depth=1,
    decoder_num_heads=2,
)


def shaken(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def a_clip(config: ModelConfig, batch: int = 2) -> torch.Tensor:
    shape = (batch, config.num_frames, config.height, config.width, config.in_channels)
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as exit_of:
        main(words)
    return int(exit_of.value.code or 0)


def test_colours_are_the_components_that_numpy_finds():
    tokens = torch.randn(3, 10, 7, generator=torch.Generator().manual_seed(2)) + 5
    rows = tokens.flatten(0, 1).double().numpy()
    rows = rows - rows.mean(axis=0)
    _, _, axes = np.linalg.svd(rows, full_matrices=False)
    signs = np.sign((axes[:3] ** 3).sum(axis=1))
    expected = rows @ (axes[:3] * signs[:, None]).T
    values = principal_components(tokens)
    assert values.shape == (3, 10, 3)
    np.testing.assert_allclose(values.flatten(0, 1).numpy(), expected, atol=1e-9)
    assert torch.equal(values, principal_components(tokens))


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "no class token": ({}, "mean"),
    "class token": ({"class_tokens": 1}, "first"),
    "copies of it": ({"class_tokens": 2, "qkv_bias": "qkv"}, "first"),
    "a mean beside a class token": ({"class_tokens": 1}, "classifier, mean"),
    "a classifier of it": ({"class_tokens": 1}, "classifier, first"),
    "a classifier of the first patch": ({}, "classifier, first"),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_attention_is_a_plain_softmax_over_the_keys_of_the_last_block(case: str):
    changes, asked = CASES[case]
    config = replace(MODEL, **changes)
    kind, _, pooling = asked.partition(", ")
    model = shaken(VideoMAE(config))
    if kind == "classifier":
        model = shaken(
            VideoClassifier(config, ClassifierConfig(num_classes=3, pooling=pooling))  # pyright: ignore[reportArgumentType]
        )
    clip, inputs = a_clip(config), []
    hook = model.encoder.blocks[1].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    expected_tokens = model.encoder(clip)[:, config.class_tokens :]
    hook.remove()
    block, first = model.encoder.blocks[1], config.class_tokens
    qkv = block.attn.qkv(block.norm1(inputs[0])).numpy()
    num_tokens = first + config.num_tokens
    expected = np.zeros((2, num_tokens))
    for b in range(2):
        for head in range(3):
            query, key = (qkv[b, :, part + 8 * head : part + 8 * head + 8] for part in (0, 24))
            mean = query[first:].mean(axis=0)
            if asked.endswith("first"):
                mean = query[: max(first, 1)].mean(axis=0)
            scores = np.exp(key @ mean / np.sqrt(8))
            expected[b] += scores / scores.sum() / 3
    tokens, weight = pooled_attention(model, clip)
    assert torch.equal(tokens, expected_tokens)
    np.testing.assert_allclose(weight.numpy(), expected[:, first:], atol=1e-6)
    if first == 0:
        np.testing.assert_allclose(weight.sum(dim=1).numpy(), 1, atol=1e-6)


@torch.no_grad()
def test_a_picture_shows_components_and_attention_where_they_are():
    model, clip = shaken(VideoMAE(MODEL)), a_clip(MODEL)
    tokens, weight = pooled_attention(model, clip)
    maps = torch.cat([principal_components(tokens), weight[..., None]], dim=2).flatten(0, 1)
    maps = (maps - maps.amin(dim=0)) / (maps.amax(dim=0) - maps.amin(dim=0))
    frames = look(model, clip)
    assert torch.equal(frames.video, clip)
    assert frames.notes.count("\n") == 1
    heat = (frames.attention - 0.4 * clip / 255).mean(dim=4, keepdim=True)
    shown = torch.cat([frames.features, heat], dim=4)
    # what is shown of a token: the mean of its pixels
    means = shown.unfold(1, 2, 2).unfold(2, 8, 8).unfold(3, 8, 8).mean(dim=(5, 6, 7))
    for channel, expected in zip(means.flatten(0, 3).T, maps.T, strict=True):
        assert np.corrcoef(channel.numpy(), expected.numpy())[0, 1] > 0.9
    assert 0 <= shown.min() < 0.1
    assert 0.8 < frames.features.max() <= 1
    still = look(model, torch.zeros_like(clip))
    assert all(row.float().isfinite().all() for row in still[:3])


@pytest.mark.parametrize("kind", ["pretrained", "uniform classifier"])
def test_look_writes_a_picture_and_a_film_the_same_each_time(
    kind: str, tmp_path: Path, write_video: Callable[..., Path]
):
    model = shaken(VideoMAE(MODEL))
    if kind != "pretrained":
        head = ClassifierConfig(num_classes=3, sampling="uniform")
        model = shaken(VideoClassifier(MODEL, head))
    save_model_folder(tmp_path / "run" / "best", model)
    frames = np.random.default_rng(0).integers(0, 256, (40, 32, 48, 3), dtype=np.uint8)
    videos = [
        write_video(tmp_path / name / "a=b.mp4", frames[start:])
        for name, start in (("x", 0), ("y", 8))
    ]
    for output in ("one", "two"):
        words = ["look", str(tmp_path / "run"), *map(str, videos), f"output={tmp_path / output}"]
        assert run(*words, "num_clips=2", "stride=3") == 0
    first, again = (sorted((tmp_path / output).iterdir()) for output in ("one", "two"))
    # of two videos of one name
    assert [file.suffix for file in first] == [".mp4", ".png"] * 2
    assert [file.name for file in first] == [file.name for file in again]
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in again]
    assert first[1].read_bytes() != first[3].read_bytes()
    with av.open(str(first[0])) as container:
        film = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(film) == MODEL.num_frames
    picture = np.asarray(Image.open(first[1]))
    # 3 tiles of 24 x 16 pixels, enlarged 6 times, beside each other; two clips below each other
    assert film[0].shape[1] >= 84 + 3 * 144
    assert picture.shape[0] > 2 * 3 * 96
    assert film[0].shape[0] > 2 * 96


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_volumes_of_any_depth_and_number_of_channels_are_drawn(channels: int, tmp_path: Path):
    config = replace(MODEL, in_channels=channels, mean=(0.5,), std=(0.5,))
    save_model_folder(tmp_path / "model", shaken(VideoMAE(config)))
    values = np.random.default_rng(0).normal(size=(9, 20, 30, channels)).astype(np.float32)
    np.save(tmp_path / "scan.npy", values)
    for stage in ("look", "reconstruct"):
        words = [stage, str(tmp_path / "model"), str(tmp_path / "scan.npy")]
        words += [f"output={tmp_path / stage}", "data.value_range=[-2,2]", "data.axes=ZYXC"]
        assert run(*words, "stride=1") == 0
        assert sorted(file.suffix for file in (tmp_path / stage).iterdir()) == [".mp4", ".png"]


def test_an_image_has_no_film(tmp_path: Path):
    config = replace(MODEL, num_frames=1, tubelet_size=1)
    save_model_folder(tmp_path / "model", shaken(VideoMAE(config)))
    Image.fromarray(np.full((20, 30, 3), 99, dtype=np.uint8)).save(tmp_path / "a.png")
    assert (
        run("look", str(tmp_path / "model"), str(tmp_path / "a.png"), f"output={tmp_path / 'o'}")
        == 0
    )
    assert [file.suffix for file in (tmp_path / "o").iterdir()] == [".png"]


def test_a_video_that_cannot_be_decoded_is_told_before_anything_is_drawn(
    tmp_path: Path, write_video: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    save_model_folder(tmp_path / "model", shaken(VideoMAE(MODEL)))
    good = write_video(tmp_path / "good.mp4", np.zeros((9, 16, 16, 3), dtype=np.uint8))
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    for bad in (tmp_path / "bad.mp4", tmp_path / "none.mp4"):
        words = [str(tmp_path / "model"), str(good), str(bad), f"output={tmp_path / 'o'}"]
        assert run("look", *words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert bad.name in error
    assert not (tmp_path / "o").exists()
