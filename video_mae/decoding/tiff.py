"""TIFF files as clips: pages are frames (slices), or channels; the bands of a page are channels.

tifffile parses and decodes, behind checks of our own: it is forgiving, fills what is missing with
zeros, follows a chain of pages for ever, and unpacks whatever a small segment unpacks to. T frames,
H W pixels, C channels.
"""

import logging
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import tifffile
from numpy.typing import NDArray

from video_mae.config.data import ZYX_IS_THW, FileConfig
from video_mae.decoding.arrays import frames_first
from video_mae.decoding.reading import MAX_CLIP_BYTES, Frames, untimed

EXTENSIONS = (".tif", ".tiff")
MAX_PAGES, MAX_TAGS = 2**20, 4096
NONE, LZW, DEFLATE = 1, 5, (8, 32946)  # LZW needs imagecodecs, and tifffile says so
PALETTE = 3
# bytes of deflate, which can unpack to 1032 times as many, before they are unpacked twice, first to
# be counted
MAX_UNCHECKED_COUNT = 2**18
CHUNK = 2**20


def open_tiff(path: str, source: FileConfig, in_channels: int) -> Frames:
    """The pages of a TIFF or BigTIFF file as frames, only the wanted ones read; of an ImageJ stack
    with channels, groups of pages.

    data.axes names the axis of the pages, then those of a page: CYX are pages of channels. Empty:
    frames, and a page as its tags say.
    Raises: ValueError, also for a file that does not hold all that it describes.
    """
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    num_pages = _count_pages(path)
    with _open(path) as tiff:
        page = tiff.pages.first
        own_axes = page.axes.replace("S", "C").translate(ZYX_IS_THW)
        if set(own_axes) - set("HWC"):
            raise ValueError(
                f"a page has the axes {page.axes}; save the volume as one page a slice, or with np.save"
            )
        group = _pages_per_frame(page.description, num_pages)
    axes = source.axes_thwc or ("TC" if group > 1 else "T") + own_axes
    if len(axes) == 1 + len(own_axes):
        group = 1
    elif group == 1 or len(axes) != 2 + len(own_axes) or not axes.startswith("TC"):
        raise ValueError(
            f"a page has the axes {page.axes}: data.axes {source.axes} must name the pages' axis, then these"
        )
    if not axes.startswith("T"):  # all pages are one frame
        group, axes = num_pages, f"T{axes}"
    return Frames(
        num_pages // group,
        lambda wanted: _read(path, group, wanted, axes),
        untimed(num_pages // group),
    )


def _read(path: str, group: int, wanted: NDArray[np.int64], axes: str) -> Iterator[NDArray[Any]]:
    with _open(path) as tiff:
        for index in wanted:
            pages = [_decode(tiff, int(index) * group + i, group) for i in range(group)]
            frame = np.stack(pages) if len(axes) == pages[0].ndim + 2 else pages[0]
            yield frames_first(frame[None], axes)[0]


def _open(path: str) -> tifffile.TiffFile:
    # Without the dialects that keep lists of pages of their own, and the one that names other
    # files.
    return tifffile.TiffFile(
        path, is_lsm=False, is_ndpi=False, is_scanimage=False, is_ome=False, _multifile=False
    )


def _count_pages(path: str) -> int:
    """Walks the chain of directories."""
    with open(path, "rb") as file:
        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
        if not order or len(head) < 16:
            raise ValueError("not a TIFF file")
        is_big = struct.unpack(order + "H", head[2:4]) == (43,)
        count, offset, tag_bytes = (
            (order + "Q", order + "Q", 20) if is_big else (order + "H", order + "I", 12)
        )
        (place,) = struct.unpack_from(offset, head, 8 if is_big else 4)
        seen: set[int] = set()
        while place:
            if place in seen:
                raise ValueError("its pages go round in a circle")
            seen.add(place)
            num_tags = _integer(file, place, count)
            if num_tags > MAX_TAGS or len(seen) > MAX_PAGES:
                raise ValueError(f"page {len(seen)} has {num_tags} tags")
            place = _integer(file, place + struct.calcsize(count) + num_tags * tag_bytes, offset)
    if not seen:
        raise ValueError("has no pages")
    return len(seen)


def _integer(file: BinaryIO, place: int, form: str) -> int:
    file.seek(place)
    raw = file.read(struct.calcsize(form))
    if len(raw) < struct.calcsize(form):
        raise ValueError("the file is cut off within its list of pages")
    return struct.unpack(form, raw)[0]


def _pages_per_frame(description: str, num_pages: int) -> int:
    """The channels of an ImageJ stack, which are pages in turn. Raises: ValueError for a stack that
    is not one page a plane.
    """
    if '"truncated": true' in description:
        raise ValueError("a stack behind one page: write it without `truncate`")
    if description.startswith("ImageJ="):
        images, channels = (
            int(match[1])
            if (match := re.search(rf"^{name}=(\d{{1,9}})$", description, re.MULTILINE))
            else 1
            for name in ("images", "channels")
        )
        if images > num_pages or num_pages % max(channels, 1):
            raise ValueError(
                f"an ImageJ stack of {images} images, {channels} channels, in {num_pages} pages: save it as BigTIFF, or with "
                "np.save"
            )
        return max(channels, 1)
    if re.search(r'<Pixels\b[^>]*\bSizeC="(?!1")', description):
        raise ValueError(
            "an OME-TIFF with channels as pages: save it as an ImageJ stack, or with np.save and data.axes"
        )
    return 1


def _decode(tiff: tifffile.TiffFile, index: int, num_pages: int) -> NDArray[Any]:
    """A page, of which all parts are in the file and unpack to no more than they should; num_pages
    like it are to be kept.
    """
    page = tiff.pages[index]
    assert isinstance(page, tifffile.TiffPage)
    if page.photometric == PALETTE:
        raise ValueError(f"page {index} holds places in a palette; save the colours themselves")
    if page.dtype is None or page.dtype.kind not in "uif":
        raise ValueError(
            f"page {index} holds {page.dtype or 'values of an unknown type'}, not integers or floats"
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
    if len(parts) != num_parts or any(
        offset < 8 or count < 1 or offset + count > size for offset, count in parts
    ):
        raise ValueError(f"the file is cut off: parts of page {index} are not in it")
    if page.compression in DEFLATE:
        for offset, count in parts:
            if count > MAX_UNCHECKED_COUNT:
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
