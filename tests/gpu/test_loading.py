"""Batches on their way to a CUDA device: copied ahead of the step on a stream of their own, crops
cut there.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

pytest.importorskip("pytorchvideo")  # of lists, which batches are made of

from video_mae.data import Batch
from video_mae.data.augment import crop_clip
from video_mae.data.device_crop import Crop, CropSize, UncutClips
from video_mae.data.loader import DevicePrefetcher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda", 0)
SLEEP_CYCLES = 10**9  # half a second of a GPU, more or less


def make_batch(number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    clip_BTHWC = torch.randint(256, (8, 16, 112, 112, 3), dtype=torch.uint8, generator=generator)
    seeds_B = torch.randint(2**62, (8,), generator=generator)
    return Batch(
        clip_BTHWC=clip_BTHWC,
        seeds_B=seeds_B,
        label_B=seeds_B % 7,
        index_B=torch.arange(8),
        host_seeds_B=seeds_B,
        failures=(),
    )


def made(num: int, taken: list[int]) -> Iterator[Batch]:
    for number in range(num):
        taken.append(number)
        yield make_batch(number)


def test_all_batches_come_in_order_and_unspoilt_by_the_next_ones() -> None:
    taken: list[int] = []
    sums, copying = [], 0.0
    for number, batch in enumerate(DevicePrefetcher(made(12, taken), DEVICE)):
        assert batch.clip_BTHWC.device == batch.seeds_B.device == batch.label_B.device == DEVICE
        assert (batch.index_B.device.type, batch.host_seeds_B.device.type) == ("cpu", "cpu")
        assert len(taken) <= number + 2  # this one and one ahead
        # the batch is read late, after its tensors have gone here
        torch.cuda._sleep(SLEEP_CYCLES // 20)
        sums.append(batch.clip_BTHWC.long().sum() + batch.seeds_B.sum())
        copying += batch.costs.copying
        del batch
    expected = [make_batch(number) for number in range(12)]
    assert [int(value) for value in sums] == [
        int(batch.clip_BTHWC.long().sum() + batch.seeds_B.sum()) for batch in expected
    ]
    assert copying > 0


def test_the_next_batch_is_copied_while_the_device_still_computes() -> None:
    taken: list[int] = []
    batches = DevicePrefetcher(made(3, taken), DEVICE)
    next(batches)
    torch.cuda._sleep(4 * SLEEP_CYCLES)
    computed = torch.cuda.Event()
    computed.record()
    batch, _, copied = batches._ready.get()
    copied.synchronize()
    assert not computed.query(), "the copy waited for the computation"
    assert torch.equal(batch.clip_BTHWC.cpu(), make_batch(1).clip_BTHWC)
    batches.close()


def test_taking_a_batch_does_not_wait_for_the_device() -> None:
    batches = DevicePrefetcher(made(3, []), DEVICE)
    next(batches)
    torch.cuda._sleep(4 * SLEEP_CYCLES)
    computed = torch.cuda.Event()
    computed.record()
    next(batches)
    assert not computed.query()
    batches.close()


def test_an_error_of_the_loader_and_the_end_are_raised_where_batches_are_taken() -> None:
    def broken() -> Iterator[Batch]:
        yield make_batch(0)
        raise RuntimeError("20 videos in a row cannot be decoded")

    batches = DevicePrefetcher(broken(), DEVICE)
    next(batches)
    with pytest.raises(RuntimeError, match="20 videos in a row"):
        next(batches)
    assert len(list(DevicePrefetcher(made(3, []), DEVICE))) == 3


def test_closing_ends_the_thread() -> None:
    batches = DevicePrefetcher(made(100, []), DEVICE)
    next(batches)
    batches.close()
    assert batches._thread is not None
    assert not batches._thread.is_alive()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_crops_on_the_device_are_those_of_torchvision_and_wait_for_nothing(
    dtype: type[np.generic],
) -> None:
    rng = np.random.default_rng(0)
    frames, crops = [], []
    for height, width in ((256, 340), (256, 340), (240, 427), (57, 91)):
        frames.append(
            torch.from_numpy(
                rng.integers(np.iinfo(dtype).max + 1, size=(16, height, width, 3)).astype(dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
            )
        )  # pyright: ignore
        boxes = [
            (0, 0, height, width),
            (3, 5, height // 2, width // 3),
            (height - 20, width - 30, 20, 30),
        ]
        crops.append([Crop(box, bool(draw & 1)) for draw, box in enumerate(boxes)])
    uncut = UncutClips.gather(
        frames, crops, CropSize(16, 224, 224, dtype == np.uint16)
    ).pin_memory()
    uncut.to(DEVICE)  # libraries are loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        clip_BTHWC = uncut.to(DEVICE)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = torch.stack(
        [
            crop_clip(frames_THWC, crop.box, (224, 224), crop.flip)
            for frames_THWC, of_video in zip(frames, crops, strict=True)
            for crop in of_video
        ]
    )
    assert clip_BTHWC.dtype == expected.dtype
    assert (clip_BTHWC.cpu().int() - expected.int()).abs().max() <= 1
