"""The gather kernel on a GPU against the reference in float64."""

import math
from typing import Any

import pytest
import torch

from video_mae.kernels import reference, tubelets
from video_mae.kernels.tubelets import gather_tubelets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPCHECK: Any = torch.library.opcheck
SHAPES = [
    ((2, 16, 16), (8, 14, 14), 3),
    ((2, 14, 14), (8, 16, 16), 3),
    ((1, 16, 16), (1, 14, 14), 3),
    ((2, 16, 16), (2, 3, 5), 1),
    ((3, 10, 6), (2, 3, 5), 5),
    ((2, 32, 32), (2, 3, 3), 3),
]
MEAN, STD = (0.1, 0.5, 0.9, 0.2, 0.3), (0.2, 0.3, 0.4, 0.5, 0.6)
ULP = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def arguments(shape=SHAPES[0], dtype=torch.uint8, out=torch.bfloat16, batch=3, count=37) -> Any:
    tubelet, grid, channels = shape
    size = (batch, *(g * t for g, t in zip(grid, tubelet, strict=True)), channels)
    clip = torch.randint(
        0,
        256,
        size,
        dtype=torch.uint8,
        device="cuda",
        generator=torch.Generator("cuda").manual_seed(0),
    )
    if dtype != torch.uint8:
        clip = (clip.int() * 257).to(dtype) if dtype == torch.uint16 else (clip / 255).to(dtype)
    index = torch.randint(
        0,
        math.prod(grid),
        (batch, count),
        device="cuda",
        generator=torch.Generator("cuda").manual_seed(1),
    )
    return clip, index, tubelet, MEAN[:channels], STD[:channels], out


def exact(clip, index, tubelet, mean, std):
    return reference.gather_tubelets(
        clip.double() / reference.pixel_range(clip.dtype), index, tubelet, mean, std, torch.float64
    )


@pytest.mark.parametrize("out", list(ULP))
@pytest.mark.parametrize("shape", SHAPES)
def test_rounds_once(shape, out):
    given = arguments(shape, out=out)
    torch.testing.assert_close(
        gather_tubelets(*given).double(), exact(*given[:-1]), rtol=1.01 * ULP[out], atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float16, torch.bfloat16, torch.float32])
def test_takes_clips_of_any_type(dtype):
    given = arguments(dtype=dtype)
    torch.testing.assert_close(
        gather_tubelets(*given).double(),
        exact(*given[:-1]),
        rtol=1.01 * ULP[torch.bfloat16],
        atol=1e-6,
    )


def test_ten_repeats_are_equal_bit_for_bit_and_wait_for_nothing():
    given = arguments()
    first = gather_tubelets(*given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        repeats = [gather_tubelets(*given) for _ in range(10)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first, again) for again in repeats)


def test_a_graph_replays_with_changed_inputs():
    clip, index, *rest = arguments()
    gather_tubelets(clip, index, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gather_tubelets(clip, index, *rest)
    clip.copy_(255 - clip)
    index.copy_(index.flip(1))
    graph.replay()
    assert torch.equal(out, gather_tubelets(clip, index, *rest))


def test_is_a_proper_torch_operation():
    OPCHECK(tubelets._gather_op, arguments())


def test_an_index_outside_the_grid_makes_its_tubelet_nan():
    clip, index, *rest = arguments()
    index[1, 2] = 10**12
    out = gather_tubelets(clip, index, *rest)
    assert out[1, 2].isnan().all()
    assert int(out.isnan().any(-1).sum()) == 1


def test_clips_of_more_than_two_gigabytes():
    clip = torch.zeros(1000, 16, 224, 224, 3, dtype=torch.uint8, device="cuda")
    (last, index, *rest) = arguments(batch=1)
    clip[-1:] = last
    assert torch.equal(
        gather_tubelets(clip, index.expand(1000, -1), *rest)[-1:],
        gather_tubelets(last, index, *rest),
    )
