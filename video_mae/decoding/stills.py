"""Still images as clips of one frame, through Pillow: torchvision's own decoder fails once decord
is loaded.

H W pixels, C channels.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from video_mae.config.data import FileConfig
from video_mae.decoding.reading import Frames, untimed

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
# whatever the name says, and no others: Pillow would start Ghostscript for an EPS
FORMATS = ("BMP", "JPEG", "PNG", "WEBP")


def open_still(path: str, source: FileConfig, in_channels: int) -> Frames:
    """The one frame of a picture, turned upright as its EXIF tag says; of an animation the first.

    8-bit pictures become grey, RGB or RGBA, as many channels as the model takes (RGB where it takes
    another number, or where data.channels chooses); 16-bit grey stays as stored. A picture of more
    pixels than Pillow's limit is refused.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(path, formats=FORMATS)
    with image:
        ImageOps.exif_transpose(image, in_place=True)
        mode = (
            "L"
            if in_channels == 1 and not source.channels
            else "RGBA"
            if in_channels == 4
            else "RGB"
        )
        # integers of 16 and 32 bits, floats
        if image.mode != mode and not image.mode.startswith(("I", "F")):
            image = image.convert(mode)
        frame_HWC = np.atleast_3d(np.asarray(image))

    def read(_: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        yield frame_HWC

    return Frames(1, read, untimed(1))
