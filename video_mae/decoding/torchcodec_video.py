"""Videos by torchcodec, on a CPU or by a GPU's decoder; it needs FFmpeg's libraries from the
system.
"""

import os
from collections.abc import Iterator
from importlib.metadata import version

from video_mae.decoding.media import Array, Indices, Read, Reading, scaled_size
from video_mae.extras import require_package

NVDEC = "cuda"


def load() -> str:
    """Loads the library, and torch with it; returns its version."""
    require_package("torchcodec")
    found = version("torchcodec")  # before torch is loaded, which takes seconds
    import torch
    import torchcodec.decoders  # noqa: F401  # pyright: ignore[reportMissingImports]  (optional)

    torch.set_num_threads(1)
    return found


def open_video(path: str, reading: Reading, size: tuple[int, int]) -> tuple[int, Read]:
    """Opens a file whose frames are shown in this (height, width): how many there are, and what
    reads them.

    Raises: what torchcodec does, which is of many types.
    """
    from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]
    from torchcodec.transforms import Resize  # pyright: ignore[reportMissingImports]

    # A rank's processes decode on its own GPU, which is the one that its number among the ranks of
    # the machine says.
    device = (
        f"{NVDEC}:{os.environ.get('LOCAL_RANK', '0')}"
        if reading.device == NVDEC
        else reading.device
    )
    smaller = scaled_size(*size, reading.short_side)
    decoder = VideoDecoder(
        path,
        dimension_order="NHWC",
        num_ffmpeg_threads=reading.threads,
        device=device,
        seek_mode="exact",
        transforms=[] if smaller == size else [Resize(smaller)],
    )

    def read(wanted: Indices) -> Iterator[Array]:
        for index in wanted:
            yield decoder.get_frame_at(int(index)).data.cpu().numpy()

    return len(decoder), read
