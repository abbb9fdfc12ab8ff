"""What a reconstruction picture shows, and what it must not know."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from video_mae.training.picture import (
    GREY,
    NOTES,
    Normalize,
    Tubelet,
    draw_reconstruction,
    reconstruction_frames,
    tokenize,
    untokenize,
)

SHAPES = [
    ((2, 4, 12, 8, 3), (2, 4, 4)),
    ((1, 1, 10, 15, 3), (1, 5, 5)),
    ((1, 6, 6, 9, 1), (3, 3, 3)),
    ((1, 2, 8, 8, 4), (1, 4, 2)),
]


def make_clip(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def split(
    clip_BTHWC: torch.Tensor, tubelet: Tubelet, num_visible: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A different random mask for each clip."""
    generator = torch.Generator().manual_seed(1)
    num_tokens = tokenize(clip_BTHWC, tubelet).shape[1]
    order_BN = torch.stack([torch.randperm(num_tokens, generator=generator) for _ in clip_BTHWC])
    return order_BN[:, :num_visible].sort(1).values, order_BN[:, num_visible:].sort(1).values


def targets(
    clip_BTHWC: torch.Tensor, masked_BM: torch.Tensor, tubelet: Tubelet, normalize: Normalize
) -> torch.Tensor:
    """The definition, one tubelet at a time."""
    p, q, r = tubelet
    _, T, H, W, C = clip_BTHWC.shape
    result = []
    for clip_THWC, masked_M in zip(clip_BTHWC.double() / 255, masked_BM.tolist(), strict=True):
        rows = []
        for index in masked_M:
            t, h, w = np.unravel_index(index, (T // p, H // q, W // r))
            x = clip_THWC[t * p : (t + 1) * p, h * q : (h + 1) * q, w * r : (w + 1) * r]
            if normalize == "channel":
                pixels = x.reshape(-1, C)
                x = ((pixels - pixels.mean(0)) / (pixels.std(0) + 1e-6)).reshape(x.shape)
            elif normalize == "tubelet":
                x = (x - x.mean()) / (x.var() + 1e-6).sqrt()
            rows.append(x.flatten())
        result.append(torch.stack(rows))
    return torch.stack(result).float()


def places(index_BV: torch.Tensor, clip_BTHWC: torch.Tensor, tubelet: Tubelet) -> torch.Tensor:
    """True where a pixel belongs to one of the tokens."""
    tubelets_BNP = torch.zeros_like(tokenize(clip_BTHWC, tubelet), dtype=torch.bool)
    for tubelets_NP, index_V in zip(tubelets_BNP, index_BV, strict=True):
        tubelets_NP[index_V] = True
    _, T, H, W, _ = clip_BTHWC.shape
    return untokenize(tubelets_BNP, (T // tubelet[0], H // tubelet[1], W // tubelet[2]), tubelet)


@pytest.mark.parametrize(("shape", "tubelet"), SHAPES)
def test_untokenize_undoes_tokenize(shape: tuple[int, ...], tubelet: Tubelet):
    clip_BTHWC = make_clip(shape)
    grid = shape[1] // tubelet[0], shape[2] // tubelet[1], shape[3] // tubelet[2]
    assert torch.equal(untokenize(tokenize(clip_BTHWC, tubelet), grid, tubelet), clip_BTHWC)


@pytest.mark.parametrize("normalize", ["channel", "tubelet", "none"])
@pytest.mark.parametrize(("shape", "tubelet"), SHAPES)
def test_perfect_predictions_with_true_statistics_give_the_clip_back(
    shape: tuple[int, ...], tubelet: Tubelet, normalize: Normalize
):
    clip_BTHWC = make_clip(shape)
    clip_BTHWC[:, :, : tubelet[1], : tubelet[2]] = 77  # flat tubelets have no deviation
    visible_BV, masked_BM = split(clip_BTHWC, tubelet, 2)
    predicted_BMP = targets(clip_BTHWC, masked_BM, tubelet, normalize)
    frames = reconstruction_frames(
        clip_BTHWC, visible_BV, masked_BM, predicted_BMP, tubelet, normalize, "truth"
    )
    assert frames.predicted.dtype == torch.uint8
    assert torch.equal(frames.original, clip_BTHWC)
    assert torch.equal(frames.predicted, clip_BTHWC)


@pytest.mark.parametrize("normalize", ["channel", "tubelet", "none"])
def test_hidden_pixels_never_reach_the_prediction(normalize: Normalize):
    shape, tubelet = SHAPES[0]
    clip_BTHWC, other_BTHWC = make_clip(shape), make_clip(shape, seed=5) // 3
    visible_BV, masked_BM = split(clip_BTHWC, tubelet, 3)
    is_visible = places(visible_BV, clip_BTHWC, tubelet)
    other_BTHWC = torch.where(is_visible, clip_BTHWC, other_BTHWC)
    predicted_BMP = torch.randn(
        2,
        masked_BM.shape[1],
        tokenize(clip_BTHWC, tubelet).shape[2],
        generator=torch.Generator().manual_seed(2),
    )
    frames, others = (
        reconstruction_frames(clip, visible_BV, masked_BM, predicted_BMP, tubelet, normalize)
        for clip in (clip_BTHWC, other_BTHWC)
    )
    assert torch.equal(frames.predicted, others.predicted)
    assert torch.equal(frames.visible, others.visible)
    assert torch.equal(frames.predicted[is_visible], clip_BTHWC[is_visible])


def test_visible_statistics_are_those_of_the_nearest_visible_tubelets():
    clip_BTHWC = torch.zeros(1, 2, 4, 40, 3, dtype=torch.uint8)
    # left half one colour, right half another
    clip_BTHWC[:, :, :, :20] = torch.tensor([200, 100, 50], dtype=torch.uint8)
    clip_BTHWC[:, :, :, 20:] = torch.tensor([20, 40, 240], dtype=torch.uint8)
    visible_BV, masked_BM = torch.tensor([[0, 9]]), torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    frames = reconstruction_frames(
        clip_BTHWC, visible_BV, masked_BM, torch.zeros(1, 8, 2 * 4 * 4 * 3), (2, 4, 4), "channel"
    )
    left, right = frames.predicted[0, 0, 0, 4], frames.predicted[0, 0, 0, 35]
    assert (left.int() - torch.tensor([200, 100, 50])).abs().max() <= 1
    assert (right.int() - torch.tensor([20, 40, 240])).abs().max() <= 1
    red = frames.predicted[0, 0, 0, :, 0].int()
    assert (red.diff() <= 0).all()  # a mean of both in between, weighted by distance


def test_tokens_that_nobody_sees_or_predicts_are_grey():
    shape, tubelet = SHAPES[0]
    clip_BTHWC = make_clip(shape)
    visible_BV, masked_BM = split(clip_BTHWC, tubelet, 3)
    masked_BM = masked_BM[:, ::2]  # dual masking predicts some of the hidden tokens only
    predicted_BMP = targets(clip_BTHWC, masked_BM, tubelet, "channel")
    frames = reconstruction_frames(
        clip_BTHWC, visible_BV, masked_BM, predicted_BMP, tubelet, "channel", "truth"
    )
    is_visible, is_predicted = (
        places(visible_BV, clip_BTHWC, tubelet),
        places(masked_BM, clip_BTHWC, tubelet),
    )
    grey_BTHWC = torch.full_like(clip_BTHWC, GREY)
    assert torch.equal(frames.visible, torch.where(is_visible, clip_BTHWC, grey_BTHWC))
    assert torch.equal(
        frames.predicted, torch.where(is_visible | is_predicted, clip_BTHWC, grey_BTHWC)
    )


def test_predictions_beyond_black_and_white_or_not_finite_are_still_drawn():
    clip_BTHWC = make_clip((1, 1, 4, 12, 3))
    predicted_BMP = torch.stack(
        [torch.full((48,), -9.0), torch.full((48,), 9.0), torch.full((48,), float("nan"))]
    )[None, 1:].half()
    frames = reconstruction_frames(
        clip_BTHWC, torch.tensor([[0]]), torch.tensor([[1, 2]]), predicted_BMP, (1, 4, 4), "none"
    )
    assert frames.predicted[0, 0, 0, 4].tolist() == [255] * 3
    assert frames.predicted[0, 0, 0, 8].tolist() == [0] * 3


@pytest.mark.parametrize(
    ("shape", "tubelet"),
    [
        ((2, 16, 64, 64, 3), (2, 16, 16)),
        ((1, 4, 224, 224, 3), (2, 16, 16)),
        ((1, 3, 20, 30, 1), (1, 10, 10)),
        ((1, 2, 32, 32, 5), (2, 8, 8)),
        ((1, 2, 32, 32, 2), (2, 8, 8)),
    ],
)
def test_a_picture_of_any_shape_fits_a_screen_and_leaves_no_other_file(
    tmp_path: Path, shape: tuple[int, ...], tubelet: Tubelet
):
    clip_BTHWC = make_clip(shape)
    visible_BV, masked_BM = split(clip_BTHWC, tubelet, 2)
    path = tmp_path / "reconstructions" / "step_00000010.png"
    predicted_BMP = targets(clip_BTHWC, masked_BM, tubelet, "channel")
    frames = reconstruction_frames(
        clip_BTHWC, visible_BV, masked_BM, predicted_BMP, tubelet, "channel"
    )
    draw_reconstruction(path, frames, ["a very long title / " * 30] * shape[0])
    assert list(path.parent.iterdir()) == [path]
    with Image.open(path) as picture:
        assert 100 < picture.width <= 1600


def test_small_frames_are_enlarged_pixel_by_pixel(tmp_path: Path):
    clip_BTHWC = make_clip((1, 2, 64, 64, 3))
    visible_BV, masked_BM = split(clip_BTHWC, (2, 16, 16), 4)
    frames = reconstruction_frames(
        clip_BTHWC, visible_BV, masked_BM, torch.zeros(1, 12, 1536), (2, 16, 16), "channel"
    )
    draw_reconstruction(tmp_path / "p.png", frames, ["dog.mp4"])
    pixels = np.asarray(Image.open(tmp_path / "p.png"))
    twice = clip_BTHWC[0, 0].numpy().repeat(2, axis=0).repeat(2, axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(pixels[:, :, 0], twice.shape[:2])
    corners = np.argwhere((windows[:, :, 0, :] == twice[0, :, 0]).all(-1))
    assert any(np.array_equal(pixels[y : y + 128, x : x + 128], twice) for y, x in corners)


@pytest.mark.parametrize(
    ("normalize", "statistics", "note"),
    [("channel", "visible", "visible"), ("tubelet", "truth", "truth"), ("none", "visible", "raw")],
)
def test_a_picture_says_whose_statistics_were_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, normalize: Normalize, statistics, note: str
):
    texts: list[str] = []
    monkeypatch.setattr(
        "PIL.ImageDraw.ImageDraw.text", lambda self, xy, text, **style: texts.append(text)
    )
    clip_BTHWC = make_clip((1, 2, 32, 32, 3))
    visible_BV, masked_BM = split(clip_BTHWC, (2, 16, 16), 1)
    frames = reconstruction_frames(
        clip_BTHWC,
        visible_BV,
        masked_BM,
        torch.zeros(1, 3, 1536),
        (2, 16, 16),
        normalize,
        statistics,
    )
    draw_reconstruction(tmp_path / "p.png", frames, ["dog.mp4"])
    assert texts[0] == NOTES[note]
    assert {"dog.mp4", "original", "visible", "predicted"} <= set(texts)
