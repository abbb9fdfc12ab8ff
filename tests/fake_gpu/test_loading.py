"""Batches on their way to the GPU: the thread, streams and events of the prefetcher, on fake
tensors.
"""

from collections.abc import Iterator

import pytest
import torch

from video_mae.data import Batch
from video_mae.data.loader import DevicePrefetcher

DEVICE = torch.device("cuda", 0)


def make_batch() -> Batch:
    clip_BTHWC = torch.empty(8, 16, 112, 112, 3, dtype=torch.uint8)
    seeds_B = torch.empty(8, dtype=torch.int64)
    return Batch(
        clip_BTHWC=clip_BTHWC,
        seeds_B=seeds_B,
        label_B=seeds_B % 7,
        index_B=seeds_B + 1,
        host_seeds_B=seeds_B + 2,
        failures=(),
    )


@pytest.mark.usefixtures("fakes")
def test_batches_reach_the_gpu_over_another_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[torch.device] = []
    # fakes have neither pages
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    # nor an allocator
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: recorded.append(tensor.device)
    )
    made = [make_batch() for _ in range(3)]

    def loader() -> Iterator[Batch]:
        yield from made

    batches = DevicePrefetcher(loader(), DEVICE)
    moved = list(batches)
    batches.close()
    assert len(moved) == 3
    for batch in moved:
        assert batch.clip_BTHWC.device == batch.seeds_B.device == batch.label_B.device == DEVICE
        assert (batch.index_B.device.type, batch.host_seeds_B.device.type) == ("cpu", "cpu")
    assert recorded == [DEVICE] * sum(len(batch.on_device) for batch in moved)
    assert sum(batch.costs.copying for batch in moved) > 0
    assert batches._thread is not None
    assert not batches._thread.is_alive()
