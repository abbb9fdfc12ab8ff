"""Boxes and crops of uint8 clips."""

import numpy as np
import pytest
import torch

from video_mae.augment import crop_box, crop_clip
from video_mae.config import DataConfig

SIZES = [(256, 340, 224, 224), (340, 256, 224, 224), (50, 50, 224, 224), (77, 101, 32, 48), (1, 1, 16, 16), (3, 400, 224, 112)]


def boxes(config: DataConfig, sizes: tuple[int, int, int, int], count: int = 300) -> list[tuple[int, int, int, int]]:
    rng = np.random.default_rng(0)
    return [crop_box(config, *sizes, rng) for _ in range(count)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("config", [DataConfig(), DataConfig(crop="random_resized", crop_scales=(0.2, 1.0)), DataConfig(crop="center")])
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
    places = {(down * (256 - 168) // 4, right * (340 - 168) // 4) for down, right in
              [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (0, 2), (2, 0), (2, 4), (4, 2), (1, 1), (1, 3), (3, 1), (3, 3)]}
    assert {(top, left) for top, left, width in seen_places if width == 168} == places
    assert {(0, 0), (0, 340 - 168), (256 - 168, 0), (256 - 168, 340 - 168)} <= places


def test_multiscale_follows_the_shape_of_the_target():
    config = DataConfig(crop_scales=(1.0, 0.5))
    assert {(h, w) for _, _, h, w in boxes(config, (100, 400, 64, 128))} == {(100, 200), (100, 100), (50, 200), (50, 100)}


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
