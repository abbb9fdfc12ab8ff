"""Boxes and crops of uint8 clips; what makes them harder to recognise; mixtures of a batch."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import nn

from video_mae.config import AugmentConfig, DataConfig
from video_mae.data.augment import OPERATIONS, crop_box, crop_clip, mix_batch, strengthen_clip

SIZES = [
    (256, 340, 224, 224),
    (340, 256, 224, 224),
    (50, 50, 224, 224),
    (77, 101, 32, 48),
    (1, 1, 16, 16),
    (3, 400, 224, 112),
]


def boxes(
    config: DataConfig, sizes: tuple[int, int, int, int], count: int = 300
) -> list[tuple[int, int, int, int]]:
    rng = np.random.default_rng(0)
    return [crop_box(config, *sizes, rng) for _ in range(count)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    "config",
    [
        DataConfig(),
        DataConfig(crop="random_resized", crop_scales=(0.2, 1.0)),
        DataConfig(crop="center"),
    ],
)
def test_every_box_lies_in_the_picture(config, sizes):
    for top, left, height, width in boxes(config, sizes):
        assert height >= 1
        assert width >= 1
        assert 0 <= top <= sizes[0] - height
        assert 0 <= left <= sizes[1] - width


def test_multiscale_boxes_have_neighbouring_scales_and_thirteen_places():
    scales = DataConfig().crop_scales
    sides = [int(256 * scale) for scale in scales]
    seen_sizes, seen_places = set(), set()
    for top, left, height, width in boxes(DataConfig(), (256, 340, 224, 224), 3000):
        assert abs(sides.index(height) - sides.index(width)) <= 1
        seen_sizes.add((height, width))
        if height == 168:
            seen_places.add((top, left, width))
    assert len(seen_sizes) == 4 + 2 * 3
    places = {
        (down * (256 - 168) // 4, right * (340 - 168) // 4)
        for down, right in [
            (0, 0),
            (0, 4),
            (4, 0),
            (4, 4),
            (2, 2),
            (0, 2),
            (2, 0),
            (2, 4),
            (4, 2),
            (1, 1),
            (1, 3),
            (3, 1),
            (3, 3),
        ]
    }
    assert {(top, left) for top, left, width in seen_places if width == 168} == places
    assert {(0, 0), (0, 340 - 168), (256 - 168, 0), (256 - 168, 340 - 168)} <= places


@pytest.mark.parametrize(
    ("height", "width"),
    [
        (256, 340),
        (340, 256),
        (240, 320),
        (259, 327),
        (221, 300),
        (224, 225),
        (226, 226),
        (227, 400),
        (297, 301),
        (298, 500),
        (301, 302),
        (338, 601),
        (342, 343),
    ],
)
def test_multiscale_boxes_are_those_of_the_source(height, width):
    """Side by side with what GroupMultiScaleCrop may draw: sides that snap to 224, places that are
    whole quarters.
    """
    short = min(height, width)
    sides = [
        224 if abs(int(short * scale) - 224) < 3 else int(short * scale)
        for scale in (1, 0.875, 0.75, 0.66)
    ]
    places = [
        (0, 0),
        (4, 0),
        (0, 4),
        (4, 4),
        (2, 2),
        (0, 2),
        (4, 2),
        (2, 4),
        (2, 0),
        (1, 1),
        (3, 1),
        (1, 3),
        (3, 3),
    ]
    expected = set()
    for i, rows in enumerate(sides):
        for columns in sides[max(i - 1, 0) : i + 2]:
            down, right = (height - rows) // 4, (width - columns) // 4
            expected |= {(k * down, j * right, rows, columns) for j, k in places}
    assert set(boxes(DataConfig(), (height, width, 224, 224), 3000)) == expected


def test_a_side_does_not_snap_beyond_the_picture():
    for top, left, rows, columns in boxes(
        DataConfig(crop_scales=(1.0,)), (222, 223, 224, 224), 100
    ):
        assert (top, left, rows, columns) in {(0, 0, 222, 222)}


def test_multiscale_follows_the_shape_of_the_target():
    config = DataConfig(crop_scales=(1.0, 0.5))
    assert {(h, w) for _, _, h, w in boxes(config, (100, 400, 64, 128))} == {
        (100, 200),
        (100, 100),
        (50, 200),
        (50, 100),
    }


def test_random_resized_boxes_have_the_asked_areas_and_ratios():
    config = DataConfig(crop="random_resized", crop_scales=(0.3, 0.5))
    found = boxes(config, (300, 400, 224, 224))
    areas = [h * w / (300 * 400) for _, _, h, w in found]
    ratios = [w / h for _, _, h, w in found]
    assert 0.29 < min(areas) < 0.33
    assert 0.47 < max(areas) < 0.51
    assert 0.74 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.35
    assert len(set(found)) > 250


def test_the_central_box_is_the_largest_in_the_middle():
    assert boxes(DataConfig(crop="center"), (256, 340, 224, 224), 2) == [(0, 42, 256, 256)] * 2
    assert boxes(DataConfig(crop="center"), (100, 400, 64, 128), 1) == [(0, 100, 100, 200)]


def test_a_box_of_the_target_size_is_copied_bit_for_bit_and_mirrored_on_demand():
    clip_THWC = torch.randint(256, (3, 40, 50, 3), dtype=torch.uint8)
    box = clip_THWC[:, 5:37, 9:41]
    assert torch.equal(crop_clip(clip_THWC, (5, 9, 32, 32), (32, 32), flip=False), box)
    assert torch.equal(crop_clip(clip_THWC, (5, 9, 32, 32), (32, 32), flip=True), box.flip(2))


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (3, 4, 11, 17), (0, 0, 120, 160)])
@pytest.mark.parametrize("flip", [False, True])
def test_all_frames_get_the_same_box_as_contiguous_uint8(box, flip):
    frame_HWC = torch.randint(256, (120, 160, 3), dtype=torch.uint8)
    clip_THWC = crop_clip(frame_HWC.expand(5, -1, -1, -1), box, (32, 48), flip)
    assert clip_THWC.shape == (5, 32, 48, 3)
    assert clip_THWC.dtype == torch.uint8
    assert type(clip_THWC) is torch.Tensor
    assert clip_THWC.is_contiguous()
    assert all(torch.equal(clip_THWC[0], frame) for frame in clip_THWC)


def test_shrinking_averages_what_it_leaves_out():
    stripes_THWC = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    stripes_THWC[:, :, ::2] = 200
    shrunk = crop_clip(stripes_THWC, (0, 0, 64, 64), (16, 16), flip=False)[:, :, 2:-2].int()
    assert (shrunk - 100).abs().max() <= 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0, 0, 120, 160), (16, 24)),
        ((3, 4, 111, 17), (32, 48)),
        ((7, 5, 64, 96), (32, 48)),
        ((0, 0, 1, 2), (8, 8)),
    ],
)
def test_without_antialiasing_four_pixels_make_one(dtype, flip, box, size):
    white = torch.iinfo(dtype).max
    clip_THWC = torch.from_numpy(
        np.random.default_rng(0).integers(white + 1, size=(2, 120, 160, 3))
    ).to(dtype)
    top, left, height, width = box
    region_TCHW = clip_THWC[:, top : top + height, left : left + width].double().permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(
        region_TCHW, size, mode="bilinear", align_corners=False
    ).permute(0, 2, 3, 1)
    found = crop_clip(clip_THWC, box, size, flip, antialias=False)
    assert found.dtype == dtype
    assert (found.double() - (expected.flip(2) if flip else expected).round()).abs().max() <= 1
    if height > size[0]:
        assert (
            found.double() - crop_clip(clip_THWC, box, size, flip).double()
        ).abs().mean() > white / 50


def picture(height: int = 37, width: int = 53, seed: int = 0) -> torch.Tensor:
    """A smooth picture with noise on it, HWC."""
    rng = np.random.default_rng(seed)
    ramp = np.add.outer(np.linspace(20, 120, height), np.linspace(0, 90, width))[
        :, :, None
    ] * np.array([1.0, 0.7, 0.9])
    return torch.from_numpy(
        (ramp + rng.normal(0, 12, (height, width, 3))).clip(0, 255).astype(np.uint8)
    )


# What Pillow does where timm calls it, from a strength in [0, 1] and a sign: the second
# implementation.
PILLOW: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "autocontrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "invert": lambda image, level, sign: ImageOps.invert(image),
    "rotate": lambda image, level, sign: image.rotate(
        sign * 30 * level, Image.Resampling.BILINEAR, fillcolor=(124, 116, 104)
    ),
    "posterize": lambda image, level, sign: ImageOps.posterize(image, 4 - int(level * 4)),
    "solarize": lambda image, level, sign: ImageOps.solarize(image, 256 - int(level * 256)),
    "solarize_add": lambda image, level, sign: image.point(
        [min(255, value + int(level * 110)) if value < 128 else value for value in range(256)] * 3
    ),
    "color": lambda image, level, sign: ImageEnhance.Color(image).enhance(1 + sign * 0.9 * level),
    "contrast": lambda image, level, sign: ImageEnhance.Contrast(image).enhance(
        1 + sign * 0.9 * level
    ),
    "brightness": lambda image, level, sign: ImageEnhance.Brightness(image).enhance(
        1 + sign * 0.9 * level
    ),
    "sharpness": lambda image, level, sign: ImageEnhance.Sharpness(image).enhance(
        1 + sign * 0.9 * level
    ),
    "shear_x": lambda image, level, sign: shifted(image, (1, sign * 0.3 * level, 0, 0, 1, 0)),
    "shear_y": lambda image, level, sign: shifted(image, (1, 0, 0, sign * 0.3 * level, 1, 0)),
    "translate_x": lambda image, level, sign: shifted(
        image, (1, 0, -sign * 0.45 * level * image.width, 0, 1, 0)
    ),
    "translate_y": lambda image, level, sign: shifted(
        image, (1, 0, 0, 0, 1, -sign * 0.45 * level * image.height)
    ),
}


def shifted(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        Image.Resampling.BILINEAR,
        fillcolor=(124, 116, 104),
    )


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("level", [0.25, 0.7])
@pytest.mark.parametrize("sign", [-1, 1])
def test_an_operation_does_to_every_frame_what_pillow_does_to_a_picture(name, level, sign):
    frames_THWC = torch.stack([picture(seed=0), picture(seed=1)])
    video_TCHW = frames_THWC.permute(0, 3, 1, 2)
    ours_TCHW = OPERATIONS[name](video_TCHW, sign * level, [124.0, 116.0, 104.0])
    ours_THWC = ours_TCHW.permute(0, 2, 3, 1)
    assert ours_THWC.dtype == torch.uint8
    for frame_HWC, ours_HWC in zip(frames_THWC, ours_THWC, strict=True):
        theirs_HWC = np.asarray(
            PILLOW[name](Image.fromarray(frame_HWC.numpy()), level, sign)
        ).astype(int)
        difference = np.abs(ours_HWC.numpy().astype(int) - theirs_HWC)
        # the edge to the filling is blended in one of them
        if name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
            assert np.quantile(difference, 0.9) <= 2
            assert difference.mean() < 3
            # a mirrored or missing operation would show
            assert np.abs(frame_HWC.numpy().astype(int) - theirs_HWC).mean() > 6
        else:
            assert difference.max() <= (
                2
                if name in ("autocontrast", "contrast", "color", "sharpness")
                else 1
                if name != "equalize"
                else 8
            )


def test_strengths_are_normal_operations_uniform_and_half_of_them_done(monkeypatch):
    done: list[tuple[str, float, int]] = []
    for name in OPERATIONS:
        monkeypatch.setitem(
            OPERATIONS,
            name,
            lambda video, level, fill, name=name: (
                done.append((name, abs(level), 1 if level > 0 else -1)) or video
            ),
        )
    config = AugmentConfig(erasing=0.0)
    clip_THWC = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    for seed in range(1500):
        strengthen_clip(clip_THWC, config, (0.5,), (0.2,), seed)
    assert len(done) / (4 * 1500) == pytest.approx(0.5, abs=0.03)
    levels = np.array([level for _, level, _ in done])
    assert (levels.mean(), levels.std()) == (
        pytest.approx(0.7, abs=0.005),
        pytest.approx(0.05, abs=0.005),
    )
    assert np.mean([sign for _, _, sign in done]) == pytest.approx(0, abs=0.06)
    counts = np.array([sum(name == other for other, _, _ in done) for name in OPERATIONS]) / len(
        done
    )
    assert counts == pytest.approx(1 / 15, abs=0.02)
    done.clear()
    config = replace(config, randaugment_magnitude=10.0, randaugment_std=2.0, randaugment_ops=1)
    for seed in range(200):
        strengthen_clip(clip_THWC, config, (0.5,), (0.2,), seed)
    assert max(level for _, level, _ in done) == 1.0


def test_all_frames_are_strengthened_alike_by_the_seed_alone():
    config = AugmentConfig(erasing=0.0)
    clip_THWC = picture(32, 32).expand(3, -1, -1, -1)
    clips = [
        strengthen_clip(clip_THWC, config, (0.485, 0.456, 0.406), (0.229,), seed)
        for seed in range(40)
    ]
    assert all(torch.equal(clip[0], frame) for clip in clips for frame in clip)
    assert all(
        clip.is_contiguous() and clip.dtype == torch.uint8 and clip.shape == clip_THWC.shape
        for clip in clips
    )
    assert len({clip.numpy().tobytes() for clip in clips}) > 35
    torch.manual_seed(3)
    np.random.seed(3)
    assert torch.equal(
        clips[7], strengthen_clip(clip_THWC.clone(), config, (0.485, 0.456, 0.406), (0.229,), 7)
    )
    assert (
        strengthen_clip(clip_THWC, replace(config, randaugment_ops=0), (0.5,), (0.2,), 0)
        is clip_THWC
    )


def test_randaugment_refuses_what_it_cannot_do_with_the_key_to_turn_it_off():
    for clip_THWC in (torch.zeros(1, 4, 4, 2, dtype=torch.uint8), torch.zeros(1, 4, 4, 3)):
        with pytest.raises(
            ValueError,
            match=r"augment\.randaugment_ops: 4 operations need uint8 clips of 1 or 3 "
            r"channels.*set it to 0",
        ):
            strengthen_clip(clip_THWC, AugmentConfig(), (0.5,), (0.2,), 0)


def test_a_box_of_all_frames_becomes_noise_a_quarter_of_the_time():
    config, mean, std = AugmentConfig(randaugment_ops=0), (0.3, 0.5, 0.6), (0.05, 0.1, 0.2)
    clip_THWC = torch.zeros(3, 40, 60, 3, dtype=torch.uint8)
    clips = [strengthen_clip(clip_THWC, config, mean, std, seed) for seed in range(800)]
    erased = [clip for clip in clips if clip.any()]
    assert len(erased) / 800 == pytest.approx(0.25, abs=0.05)
    areas, noise = [], []
    for clip in erased:
        is_noise_HW = (clip > 0).any(dim=3).any(dim=0)
        rows, columns = (is_noise_HW.any(dim=d).nonzero() for d in (1, 0))
        (top, bottom), (left, right) = ((int(x.min()), int(x.max()) + 1) for x in (rows, columns))
        assert not clip[:, :top].any()
        assert not clip[:, bottom:].any()
        assert not clip[:, :, :left].any()
        assert not clip[:, :, right:].any()
        box_THWC = clip[:, top:bottom, left:right].float() / 255
        assert not torch.equal(box_THWC[0], box_THWC[1])  # new noise in each frame
        areas.append(box_THWC[0, ..., 0].numel() / 2400)
        noise.append(box_THWC.flatten(0, 2))
    assert 0.015 < min(areas) < 0.06
    assert 0.28 < max(areas) < 0.35
    drawn = torch.cat(noise)
    assert drawn.mean(dim=0).tolist() == pytest.approx(mean, abs=0.01)
    assert drawn.std(dim=0).tolist() == pytest.approx(std, rel=0.05)
    assert not clip_THWC.any()  # the clip itself stays


BATCH, EYE = torch.tensor([0, 100, 200, 40], dtype=torch.uint8), torch.eye(4)


def constant_clips(height: int = 8, width: int = 8) -> torch.Tensor:
    return BATCH[:, None, None, None, None].expand(-1, 3, height, width, 2).contiguous()


def test_mixup_mixes_pixels_and_targets_by_the_same_share(monkeypatch):
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self, *_: torch.tensor([0.75]))
    clip_BTHWC, target_BK = mix_batch(constant_clips(), EYE, AugmentConfig(cutmix=0.0), 0)
    # 0.75 x [0, 100, 200, 40] + 0.25 x [40, 0, 100, 200]
    assert clip_BTHWC[:, 0, 0, 0, 0].tolist() == [10, 75, 175, 80]
    assert (clip_BTHWC == clip_BTHWC[:, :1, :1, :1, :1]).all()
    assert clip_BTHWC.dtype == torch.uint8
    assert target_BK.tolist() == [
        [0.75, 0, 0, 0.25],
        [0.25, 0.75, 0, 0],
        [0, 0.25, 0.75, 0],
        [0, 0, 0.25, 0.75],
    ]


@pytest.mark.parametrize(
    ("centre", "box", "share"),
    [(4, (slice(2, 6), slice(2, 6)), 0.25), (0, (slice(0, 2), slice(0, 2)), 4 / 64)],
)
def test_cutmix_counts_the_area_that_is_really_cut(monkeypatch, centre, box, share):
    # A share of 0.25 of 8 x 8 is a box of 4 x 4; in the corner a quarter of it lies inside the
    # picture.
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self, *_: torch.tensor([0.75]))
    monkeypatch.setattr(torch, "randint", lambda high, size: torch.full(size, centre))
    clip_BTHWC, target_BK = mix_batch(constant_clips(), EYE, AugmentConfig(mixup=0.0), 0)
    expected_BTHWC = constant_clips()
    expected_BTHWC[:, :, box[0], box[1]] = BATCH.roll(1)[:, None, None, None, None]
    assert torch.equal(clip_BTHWC, expected_BTHWC)
    assert target_BK.tolist() == [
        [1 - share, 0, 0, share],
        [share, 1 - share, 0, 0],
        [0, share, 1 - share, 0],
        [0, 0, share, 1 - share],
    ]
    # With smoothing 0.1 of 4 classes each target is 0.9 of that plus 0.025; the loss is the cross
    # entropy with it.
    logits_BK = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    smooth = [[0.9 * value + 0.025 for value in row] for row in target_BK.tolist()]
    loss = -(torch.tensor(smooth) * logits_BK.log_softmax(dim=1)).sum(dim=1).mean()
    assert torch.nn.functional.cross_entropy(
        logits_BK, target_BK, label_smoothing=0.1
    ).item() == pytest.approx(loss.item(), rel=1e-6)


def test_the_shares_are_drawn_as_published():
    config, shares, cut = AugmentConfig(), [], 0
    for seed in range(600):
        clip_BTHWC, target_BK = mix_batch(constant_clips(16, 16), EYE, config, seed)
        assert (target_BK.sum(dim=1) - 1).abs().max() < 1e-6
        cut_pixels = (clip_BTHWC[1, 0, :, :, 0] == 0).sum().item()
        if cut_pixels == pytest.approx(256 * target_BK[1, 0].item(), abs=1e-3):
            cut += 1
            assert set(clip_BTHWC.unique().tolist()) <= set(BATCH.tolist())
        else:
            shares.append(target_BK[0, 0].item())
            assert clip_BTHWC[1, 0, 0, 0, 0].item() == round(100 * target_BK[1, 1].item())
    assert cut / 600 == pytest.approx(0.5, abs=0.06)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.015)  # of Beta(0.8, 0.8)
    untouched = [
        mix_batch(constant_clips(), EYE, replace(config, mix_probability=0.3), seed)[1].equal(EYE)
        for seed in range(400)
    ]
    assert np.mean(untouched) == pytest.approx(0.7, abs=0.07)
    cutmix_only = mix_batch(constant_clips(), EYE, replace(config, switch_probability=1.0), 3)[0]
    assert set(cutmix_only.unique().tolist()) <= set(BATCH.tolist())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_mixing_is_a_function_of_the_seed_and_disturbs_no_other_draw(dtype):
    clip_BTHWC = constant_clips().to(dtype)
    torch.manual_seed(1)
    first = mix_batch(clip_BTHWC, EYE, AugmentConfig(), 5)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    again = mix_batch(clip_BTHWC, EYE, AugmentConfig(), 5)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert first[0].dtype == dtype
    assert first[0].is_contiguous()
    assert not torch.equal(first[1], mix_batch(clip_BTHWC, EYE, AugmentConfig(), 6)[1])
