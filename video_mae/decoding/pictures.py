"""Pictures as clips: one of Pillow's formats is a frame, the pages of a TIFF file are frames
(slices) or channels, the bands of a page are channels.

H W pixels, T frames, C channels.
"""

import logging
import math
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from video_mae.config.data import ZYX_IS_THW, FileConfig
from video_mae.decoding.arrays import frames_first
from video_mae.decoding.media import MAX_CLIP_BYTES, Array, Frames, Indices
from video_mae.extras import require_package

if TYPE_CHECKING:
    from tifffile import TiffFile

STILLS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
STILL_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
"""Whatever the name says, and no others: Pillow would start Ghostscript for an EPS."""
STACKS = (".tif", ".tiff")
MAX_PAGES, MAX_TAGS = 2**20, 4096
NONE, LZW, DEFLATE = 1, 5, (8, 32946)  # LZW needs imagecodecs, and tifffile says so
PALETTE = 3
MAX_UNCHECKED_COUNT = 2**18
"""Bytes of deflate, which can unpack to 1032 times as many, before they are unpacked twice, first
to be counted.
"""
CHUNK = 2**20


def open_still(path: str, source: FileConfig, in_channels: int) -> Frames:
    """The one frame of a picture, turned upright as its EXIF tag says; of an animation the first.

    8-bit pictures become grey, RGB or RGBA, as many channels as the model takes (RGB where it takes
    another number, or where data.channels chooses); 16-bit grey stays as stored. A picture of more
    pixels than Pillow's limit is refused. Through Pillow, since torchvision's own decoder fails
    once decord is loaded.
    """
    mode = {1: "L", 4: "RGBA"}.get(in_channels, "RGB")
    if mode == "L" and source.channels:
        mode = "RGB"
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(path, formats=STILL_FORMATS)
    with image:
        ImageOps.exif_transpose(image, in_place=True)
        # integers of 16 and 32 bits, floats
        if not image.mode.startswith(("I", "F")):
            image = image.convert(mode)
        frame_HWC = np.atleast_3d(np.asarray(image))
    return Frames(1, lambda _: iter([frame_HWC]))


def open_tiff(path: str, source: FileConfig, in_channels: int) -> Frames:
    """The pages of a TIFF or BigTIFF file as frames, only the wanted ones read; of an ImageJ stack
    with channels, groups of pages.

    tifffile parses and decodes, behind checks of our own: it is forgiving, fills what is missing
    with zeros, follows a chain of pages for ever, and unpacks whatever a small segment unpacks to.
    data.axes names the axis of the pages, then those of a page: CYX are pages of channels. Empty:
    frames, and a page as its tags say.
    Raises: ValueError, also for a file that does not hold all that it describes.
    """
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    with _open(path) as tiff:
        num_pages = _count_pages(tiff)
        page = tiff.pages.first
        own_axes = page.axes.replace("S", "C").translate(ZYX_IS_THW)
        if set(own_axes) - set("HWC"):
            raise ValueError(
                f"a page has the axes {page.axes}; save the volume as one page a slice, or "
                "with np.save"
            )
        group = _pages_per_frame(page.description, num_pages)
    axes = source.axes_thwc or ("TC" if group > 1 else "T") + own_axes
    if len(axes) == 1 + len(own_axes):
        group = 1
    elif group == 1 or len(axes) != 2 + len(own_axes) or not axes.startswith("TC"):
        raise ValueError(
            f"a page has the axes {page.axes}: data.axes {source.axes} must name the pages' "
            "axis, then these"
        )
    if not axes.startswith("T"):  # all pages are one frame
        group, axes = num_pages, f"T{axes}"

    def read(wanted: Indices) -> Iterator[Array]:
        with _open(path) as tiff:
            for index in wanted.tolist():
                first = index * group
                pages = [_decode(tiff, number, group) for number in range(first, first + group)]
                frame = pages[0] if len(axes) == pages[0].ndim + 1 else np.stack(pages)
                yield frames_first(frame[None], axes)[0]

    return Frames(num_pages // group, read)


def _open(path: str) -> "TiffFile":
    require_package("tifffile")
    import tifffile

    # Without the dialects that keep lists of pages of their own, and the one that names other
    # files.
    return tifffile.TiffFile(
        path, is_lsm=False, is_ndpi=False, is_scanimage=False, is_ome=False, _multifile=False
    )


def _count_pages(tiff: "TiffFile") -> int:
    """Walks the chain of directories."""
    file, form, seen = tiff.filehandle, tiff.tiff, set[int]()

    def integer(at: int, form: str) -> int:
        file.seek(at)
        raw = file.read(struct.calcsize(form))
        if len(raw) < struct.calcsize(form):
            raise ValueError("the file is cut off within its list of pages")
        return struct.unpack(form, raw)[0]

    place = integer(8 if tiff.is_bigtiff else 4, form.offsetformat)
    while place:
        if place in seen:
            raise ValueError("its pages go round in a circle")
        seen.add(place)
        num_tags = integer(place, form.tagnoformat)
        if num_tags > MAX_TAGS or len(seen) > MAX_PAGES:
            raise ValueError(f"page {len(seen)} has {num_tags} tags")
        place = integer(place + form.tagnosize + num_tags * form.tagsize, form.offsetformat)
    if not seen:
        raise ValueError("has no pages")
    return len(seen)


def _pages_per_frame(description: str, num_pages: int) -> int:
    """The channels of an ImageJ stack, which are pages in turn. Raises: ValueError for a stack that
    is not one page a plane.
    """
    if '"truncated": true' in description:
        raise ValueError("a stack behind one page: write it without `truncate`")
    if re.search(r'<Pixels\b[^>]*\bSizeC="(?!1")', description):
        raise ValueError(
            "an OME-TIFF with channels as pages: save it as an ImageJ stack, or with np.save "
            "and data.axes"
        )
    if not description.startswith("ImageJ="):
        return 1
    fields = dict(re.findall(r"^(images|channels)=(\d{1,9})$", description, re.MULTILINE))
    images, channels = int(fields.get("images", 1)), max(int(fields.get("channels", 1)), 1)
    if images > num_pages or num_pages % channels:
        raise ValueError(
            f"an ImageJ stack of {images} images, {channels} channels, in {num_pages} pages: "
            "save it as BigTIFF, or with np.save"
        )
    return channels


def _decode(tiff: "TiffFile", index: int, num_pages: int) -> Array:
    """A page, of which all parts are in the file and unpack to no more than they should; num_pages
    like it are to be kept.
    """
    from tifffile import TiffPage

    page = tiff.pages[index]
    assert isinstance(page, TiffPage)
    if page.photometric == PALETTE:
        raise ValueError(f"page {index} holds places in a palette; save the colours themselves")
    if page.dtype is None or page.dtype.kind not in "uif":
        raise ValueError(
            f"page {index} holds {page.dtype or 'values of an unknown type'}, not integers or "
            "floats"
        )
    if page.compression not in (NONE, LZW, *DEFLATE):
        raise ValueError(
            f"page {index} has the compression {page.compression!r}; save it with deflate or none"
        )
    part_bytes = math.prod(page.chunks) * page.dtype.itemsize
    if max(page.nbytes * num_pages, part_bytes) > MAX_CLIP_BYTES:
        raise ValueError(
            f"{num_pages} pages of {page.imagewidth} x {page.imagelength} pixels are more than 2 GB"
        )
    parts = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    num_parts = math.prod(page.chunked)
    if page.is_contiguous and parts:
        parts, num_parts = [(parts[0][0], page.nbytes)], 1
    size = os.fstat(tiff.filehandle.fileno()).st_size
    is_whole = len(parts) == num_parts
    for offset, count in parts:
        is_whole &= offset >= 8 and count >= 1 and offset + count <= size
    if not is_whole:
        raise ValueError(f"the file is cut off: parts of page {index} are not in it")
    for offset, count in parts:
        if page.compression in DEFLATE and count > MAX_UNCHECKED_COUNT:
            _check_inflated(tiff.filehandle, offset, count, part_bytes)
    return page.asarray(maxworkers=1)


def _check_inflated(file: Any, offset: int, count: int, limit: int) -> None:
    engine = zlib.decompressobj()
    file.seek(offset)
    inflated, data = 0, b""
    while (data or count) and inflated <= limit and not engine.eof:
        if not data:
            data = file.read(min(count, CHUNK))
            count -= len(data)
        inflated += len(engine.decompress(data, CHUNK))
        data = engine.unconsumed_tail
    if inflated > limit:
        raise ValueError(f"a part of {limit} bytes unpacks to more")
