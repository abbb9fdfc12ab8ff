"""The gather kernel in Triton's interpreter against the reference in float64."""

import math
from typing import Any

import pytest
import torch

from video_mae.kernels import reference, tubelets
from video_mae.kernels.tubelets import gather_tubelets

pytestmark = pytest.mark.usefixtures("interpreted")

OPCHECK: Any = torch.library.opcheck
# (tubelet, grid, channels): odd sizes, patch 14, the default tubelet, one channel, many channels, a
# tubelet of one pixel
SHAPES = [
    ((2, 4, 3), (2, 3, 5), 3),
    ((2, 14, 14), (1, 2, 2), 3),
    ((2, 16, 16), (1, 2, 1), 3),
    ((1, 5, 7), (3, 1, 2), 1),
    ((3, 2, 5), (1, 2, 2), 5),
    ((1, 1, 1), (2, 2, 3), 2),
]
MEAN, STD = (0.1, 0.5, 0.9, 0.2, 0.3), (0.2, 0.3, 0.4, 0.5, 0.6)
# Triton's interpreter cuts bfloat16 off instead of rounding
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def clip_of(tubelet, grid, channels, dtype=torch.uint8, batch=2):
    shape = (batch, *(g * t for g, t in zip(grid, tubelet, strict=True)), channels)
    clip = torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    if dtype == torch.uint8:
        return clip
    return (clip.int() * 257).to(dtype) if dtype == torch.uint16 else (clip / 255).to(dtype)


def index_of(grid, count=5, batch=2):
    return torch.randint(
        0, math.prod(grid), (batch, count), generator=torch.Generator().manual_seed(1)
    )


def arguments(shape=SHAPES[0], dtype=torch.uint8, out=torch.float32) -> Any:
    tubelet, grid, channels = shape
    return (
        clip_of(tubelet, grid, channels, dtype),
        index_of(grid),
        tubelet,
        MEAN[:channels],
        STD[:channels],
        out,
    )


def check(out, clip, index, tubelet, mean, std, dtype):
    exact = clip if clip.dtype in (torch.uint8, torch.uint16) else clip.double()
    expected = reference.gather_tubelets(exact, index, tubelet, mean, std, torch.float64)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("out", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_gathers_what_the_reference_does_for_any_tubelet_and_number_of_channels(shape, out):
    given = arguments(shape, out=out)
    check(gather_tubelets(*given, impl="triton"), *given)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float16, torch.bfloat16, torch.float32])
def test_takes_clips_of_any_type(dtype):
    given = arguments(dtype=dtype)
    check(gather_tubelets(*given, impl="triton"), *given)


def test_one_value_serves_all_channels():
    clip, index, tubelet, _, std, dtype = arguments()
    one = gather_tubelets(clip, index, tubelet, (0.3,), std, dtype, "triton")
    assert torch.equal(one, gather_tubelets(clip, index, tubelet, (0.3,) * 3, std, dtype, "triton"))


@pytest.mark.parametrize("batch", [1, 2])
def test_one_visible_token(batch):
    clip, index, *rest = arguments()
    clip, index = clip[:batch], index[:batch, :1]
    check(gather_tubelets(clip, index, *rest, impl="triton"), clip, index, *rest)


def test_reads_nothing_beyond_a_crop_and_writes_every_value(monkeypatch):
    clip, *rest = arguments(dtype=torch.float32)
    expected = gather_tubelets(clip, *rest, impl="triton")
    b, t, h, w, c = clip.shape
    around = torch.full((b, t + 2, h + 3, w, c), math.nan)
    around[:, 1 : t + 1, 2 : h + 2] = clip
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    assert torch.equal(
        gather_tubelets(around[:, 1 : t + 1, 2 : h + 2], *rest, impl="triton"), expected
    )


def test_takes_any_strides():
    clip, index, *rest = arguments()
    expected = gather_tubelets(clip, index, *rest, impl="triton")
    planar = clip.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    assert torch.equal(
        gather_tubelets(planar, index.T.contiguous().T, *rest, impl="triton"), expected
    )


@pytest.mark.parametrize("size", [(0, 5), (2, 0)])
def test_nothing_visible_gives_nothing(size):
    clip, _, *rest = arguments()
    out = gather_tubelets(
        clip[: size[0]], torch.zeros(size, dtype=torch.int64), *rest, impl="triton"
    )
    assert out.shape == (*size, 72)


@pytest.mark.parametrize("bad", [-1, 30])
def test_an_index_outside_the_grid_is_named_or_makes_its_tubelet_nan(bad):
    clip, index, tubelet, mean, std, dtype = arguments()
    index[1, 2] = bad
    for impl in ("triton", "reference"):
        with pytest.raises(
            ValueError, match=rf"gather_tubelets: index holds {bad}, the clip has tokens 0 to 29"
        ):
            gather_tubelets(clip, index, tubelet, mean, std, dtype, impl)
    # what a GPU does, where raising would wait for it
    out = tubelets._gather_op(clip, index, tubelet, mean, std, dtype)
    nan = torch.zeros(2, 5, dtype=torch.bool)
    nan[1, 2] = True
    assert torch.equal(out.isnan(), nan[..., None].expand_as(out))


def test_what_the_kernel_cannot_compute_is_named():
    clip, *rest = arguments()
    with pytest.raises(
        ValueError,
        match=r"gather_tubelets: impl triton takes no torch.float32 with a clip of torch.float64",
    ):
        gather_tubelets(clip.double(), *rest, impl="triton")
    with pytest.raises(
        ValueError, match=r"gather_tubelets: std has 2 values, not 1 or one for each of 3 channels"
    ):
        gather_tubelets(clip, rest[0], rest[1], rest[2], (0.1, 0.2), torch.float32, "triton")


def test_a_clip_gives_the_same_alone_and_again():
    clip, index, *rest = arguments()
    out = gather_tubelets(clip, index, *rest, impl="triton")
    assert torch.equal(gather_tubelets(clip[1:], index[1:], *rest, impl="triton"), out[1:])
    assert all(
        torch.equal(gather_tubelets(clip, index, *rest, impl="triton"), out) for _ in range(3)
    )


def test_is_a_proper_torch_operation():
    given = arguments(out=torch.float16)
    OPCHECK(tubelets._gather_op, given)

    def gather(clip, index):
        return gather_tubelets(clip, index, *given[2:], impl="triton")

    assert torch.equal(
        torch.compile(gather, fullgraph=True, backend="aot_eager")(*given[:2]),
        gather_tubelets(*given, impl="triton"),
    )


def poisoned(empty):
    """torch.empty whose floating point memory is NaN."""

    def nan(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(math.nan) if out.is_floating_point() else out

    return nan
