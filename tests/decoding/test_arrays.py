"""Files that are no videos: arrays, TIFF stacks and pictures become the same clips whatever they
are stored as.
"""

import itertools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import tifffile
import torch
from PIL import Image

from video_mae.config.data import SourceConfig
from video_mae.data.augment import crop_clip
from video_mae.decoding import Reading, VideoDecodeError, decode
from video_mae.decoding.pictures import STILLS

FULL = (0.0, 65535.0)  # of uint16: values stay as they are
T, H, W, C = 5, 7, 9, 2


def read(path: Path, in_channels: int = 1, choose: Any = np.arange, **source: Any) -> np.ndarray:
    return decode(
        str(path), choose, Reading(source=SourceConfig(**source), in_channels=in_channels)
    )


def noise(shape: tuple[int, ...], dtype: str = "u2") -> np.ndarray:
    return (
        np.random.default_rng(0).integers(0, 250 if dtype == "u1" else 65000, shape).astype(dtype)
    )


@pytest.mark.parametrize("axes", ["".join(order) for order in itertools.permutations("THWC")])
def test_any_order_of_axes_gives_the_same_clip(tmp_path: Path, axes: str) -> None:
    clip_THWC = noise((T, H, W, C))
    stored = clip_THWC.transpose(["THWC".index(axis) for axis in axes])
    for name, array in (
        ("c", np.ascontiguousarray(stored)),
        ("fortran", np.asfortranarray(stored)),
        ("big", stored.astype(">u2")),
    ):
        np.save(tmp_path / f"{name}.npy", array)
        np.savez(tmp_path / f"{name}.npz", array)
        np.savez_compressed(tmp_path / f"{name}_small.npz", array)
        for file in (f"{name}.npy", f"{name}.npz", f"{name}_small.npz"):
            for names in (axes, axes.translate(str.maketrans("THW", "ZYX"))):
                found = read(
                    tmp_path / file,
                    C,
                    [4, 0, 0, 2],
                    axes=names,
                    value_range=FULL,
                )
                assert np.array_equal(found, clip_THWC[[4, 0, 0, 2]]), (file, names)
                assert found.dtype == np.uint16
                assert found.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        ("", (H, W), (1, H, W, 1)),
        ("", (T, H, W), (T, H, W, 1)),
        ("", (T, H, W, C), (T, H, W, C)),
        ("CHW", (C, H, W), (1, H, W, C)),
        ("HWC", (H, W, C), (1, H, W, C)),
        ("WZY", (W, T, H), (T, H, W, 1)),
        ("XY", (W, H), (1, H, W, 1)),
    ],
)
def test_axes_that_an_array_lacks_have_length_one(
    tmp_path: Path, axes: str, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    np.save(tmp_path / "a.npy", noise(shape, "u1"))
    assert read(tmp_path / "a.npy", expected[3], axes=axes).shape == expected


def test_only_the_wanted_slices_of_a_large_array_are_read(tmp_path: Path) -> None:
    path, side, num_slices = tmp_path / "large.npy", 512, 250_000
    np.save(path, np.zeros((1, side, side), np.uint8))
    head = (
        path.read_bytes()[: -side * side]
        .replace(b"(1,", b"(%d," % num_slices)
        .replace(b" " * 6, b" ", 1)
    )
    head = head[:8] + struct.pack("<H", len(head) - 10) + head[10:]
    with path.open("wb") as file:  # 65 GB, of which the disk has one slice
        file.write(head)
        file.seek(200_000 * side * side, 1)
        file.write(bytes([7]) * side * side)
        file.truncate(len(head) + num_slices * side * side)
    clip_THWC = read(path, choose=[0, 200_000, -1])
    assert [int(frame.max()) for frame in clip_THWC] == [0, 7, 0]
    assert clip_THWC.shape == (3, side, side, 1)


@pytest.mark.parametrize(
    "dtype", ["u1", "u2", "i1", "i2", "i4", "u4", "u8", "f2", "f4", "f8", ">i2", ">f4"]
)
@pytest.mark.parametrize("value_range", [(-1000.0, 400.0), (0.0, 250.0), (90.0, 10.0)])
def test_values_are_scaled_to_sixteen_bits_as_defined(
    tmp_path: Path, dtype: str, value_range: tuple[float, float]
) -> None:
    kind, low, high = np.dtype(dtype), *value_range
    stored = np.random.default_rng(1).uniform(
        min(value_range) - 50, max(value_range) + 50, (8, H, W)
    )
    stored = np.clip(
        stored, *((np.iinfo(kind).min, np.iinfo(kind).max) if kind.kind in "ui" else (-2e4, 2e4))
    ).astype(kind)
    np.save(tmp_path / "a.npy", stored)
    expected = np.clip((stored.astype(np.longdouble) - low) / (high - low), 0, 1)[..., None] * 65535
    clip_THWC = read(tmp_path / "a.npy", value_range=value_range)
    assert clip_THWC.dtype == np.uint16
    assert np.abs(clip_THWC - expected).max() <= 0.51
    assert len(np.unique(clip_THWC)) > 20


def test_a_narrow_range_of_large_values_keeps_its_steps(tmp_path: Path) -> None:
    for dtype in ("i4", "u4", "i8", "f8"):
        np.save(tmp_path / "a.npy", 2**30 + np.arange(101, dtype=dtype)[None])
        assert read(tmp_path / "a.npy", value_range=(2.0**30, 2.0**30 + 100)).ravel().tolist() == [
            round(655.35 * k) for k in range(101)
        ]


@pytest.mark.filterwarnings("error")
def test_what_is_no_number_is_black_and_what_has_no_end_is_clipped(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[np.nan, np.inf, -np.inf, 3e38, 0.25]], np.float32))
    assert read(tmp_path / "a.npy", value_range=(0, 1)).ravel().tolist() == [
        0,
        65535,
        0,
        65535,
        16384,
    ]


def test_eight_bits_stay_as_they_are_and_other_values_need_a_range(tmp_path: Path) -> None:
    stored = noise((T, H, W), "u1")
    np.save(tmp_path / "u1.npy", stored)
    found = read(tmp_path / "u1.npy")
    assert found.dtype == np.uint8
    assert np.array_equal(found[..., 0], stored)
    for dtype in ("u2", "i2", "f4"):
        np.save(tmp_path / "other.npy", stored.astype(dtype))
        with pytest.raises(
            VideoDecodeError, match=rf"holds {np.dtype(dtype)}; set data\.value_range"
        ):
            read(tmp_path / "other.npy")


def test_channels_are_chosen_by_number_and_must_be_those_of_the_model(tmp_path: Path) -> None:
    stored = noise((6, H, W), "u1")
    np.save(tmp_path / "bands.npy", stored)
    found = read(tmp_path / "bands.npy", 3, axes="CHW", channels=(4, 0, 5))
    assert np.array_equal(found[0], stored[[4, 0, 5]].transpose(1, 2, 0))
    with pytest.raises(
        VideoDecodeError, match=r"gives 6 channels of 9 x 7 pixels, model\.in_channels is 3"
    ):
        read(tmp_path / "bands.npy", 3, axes="CHW")
    with pytest.raises(
        VideoDecodeError, match=r"has 6 channels, data\.channels asks for 6, counted from 0"
    ):
        read(tmp_path / "bands.npy", 3, axes="CHW", channels=(4, 0, 6))
    with pytest.raises(VideoDecodeError, match=r"3 axes \(6, 7, 9\), data\.axes names THWC"):
        read(tmp_path / "bands.npy", axes="THWC")


def test_an_archive_of_several_arrays_wants_a_name(tmp_path: Path) -> None:
    one, other = noise((T, H, W), "u1"), noise((2, H, W), "u1")
    np.savez_compressed(tmp_path / "two.npz", one=one, other=other)
    assert np.array_equal(read(tmp_path / "two.npz", array="other")[..., 0], other)
    with pytest.raises(VideoDecodeError, match=r"holds 2 arrays \(one, other\), set data\.array"):
        read(tmp_path / "two.npz")
    with pytest.raises(VideoDecodeError, match=r"has no array third, only one, other"):
        read(tmp_path / "two.npz", array="third")


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"bigtiff": True},
    {"byteorder": ">"},
    {"compression": "zlib"},
    {"tile": (16, 16)},
    {"rowsperstrip": 3},
    {"compression": "zlib", "predictor": True, "rowsperstrip": 3},
]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (dtype, options)
        for dtype in ("u1", "u2", "i2", "f4")
        for options in LAYOUTS
        # that of floats needs imagecodecs
        if dtype != "f4" or "predictor" not in options
    ],
)
def test_pages_of_a_tiff_are_frames(tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    stored = noise((T, H, W), dtype)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", **options)
    chosen = np.array([3, 0, 4])
    clip_THWC = read(tmp_path / "a.tif", choose=chosen, value_range=(-32768, 32767))
    np.save(tmp_path / "a.npy", stored)
    assert np.array_equal(
        clip_THWC, read(tmp_path / "a.npy", choose=chosen, value_range=(-32768, 32767))
    )


def test_a_stack_that_another_program_wrote_is_read_as_pillow_reads_it() -> None:
    path = Path(skimage.data_dir) / "multipage.tif"
    with Image.open(path) as image:
        pages = [np.asarray(image.copy()) for page in range(2) if image.seek(page) is None]
    assert np.array_equal(read(path)[..., 0], np.stack(pages))


@pytest.mark.parametrize("compression", [None, "tiff_adobe_deflate"])
def test_what_pillow_writes_is_read(tmp_path: Path, compression: str | None) -> None:
    for mode, stored in (
        ("L", noise((3, H, W), "u1")),
        ("I;16", noise((3, H, W))),
        ("RGB", noise((3, H, W, 3), "u1")),
    ):
        first, *others = [Image.fromarray(page) for page in stored]
        first.save(tmp_path / "a.tif", save_all=True, append_images=others, compression=compression)
        assert first.mode == mode
        source = {"value_range": FULL} if mode == "I;16" else {}
        assert np.array_equal(
            read(tmp_path / "a.tif", 3 if mode == "RGB" else 1, **source).squeeze(), stored
        )


def test_bands_of_a_tiff_are_channels_however_they_are_stored(tmp_path: Path) -> None:
    bands_HWC, bands_CHW = (stored := noise((H, W, 13))), stored.transpose(2, 0, 1)
    tifffile.imwrite(
        tmp_path / "contig.tif", bands_HWC, planarconfig="contig", photometric="minisblack"
    )
    tifffile.imwrite(
        tmp_path / "planes.tif", bands_CHW, planarconfig="separate", photometric="minisblack"
    )
    tifffile.imwrite(tmp_path / "pages.tif", bands_CHW, photometric="minisblack")
    for name, axes in (("contig", ""), ("planes", ""), ("pages", "CYX"), ("contig", "TYXC")):
        assert np.array_equal(
            read(tmp_path / f"{name}.tif", 13, axes=axes, value_range=FULL)[0], bands_HWC
        ), (name, axes)
    assert read(tmp_path / "pages.tif", value_range=FULL).shape == (13, H, W, 1)
    with pytest.raises(
        VideoDecodeError, match=r"a page has the axes YX: data\.axes TCYX must name the pages' axis"
    ):
        read(tmp_path / "pages.tif", 13, axes="TCYX")


def test_an_imagej_stack_of_channels_has_a_frame_for_each_group_of_pages(tmp_path: Path) -> None:
    stored = noise((T, C, H, W))
    tifffile.imwrite(tmp_path / "stack.tif", stored, imagej=True)
    clip_THWC = read(tmp_path / "stack.tif", C, [-1, 1], value_range=FULL)
    assert np.array_equal(clip_THWC, stored[[T - 1, 1]].transpose(0, 2, 3, 1))
    assert np.array_equal(
        read(tmp_path / "stack.tif", 1, value_range=FULL, axes="ZYX").ravel(), stored.ravel()
    )


def test_stacks_whose_pages_do_not_tell_what_they_are_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "behind.tif", noise((T, H, W), "u1"), photometric="minisblack", truncate=True
    )
    tifffile.imwrite(
        tmp_path / "ome.tif",
        noise((T, C, H, W), "u1"),
        photometric="minisblack",
        metadata={"axes": "TCYX"},
        ome=True,
    )
    tifffile.imwrite(
        tmp_path / "palette.tif",
        noise((H, W), "u1"),
        photometric="palette",
        colormap=np.zeros((3, 256), np.uint16),
    )
    tifffile.imwrite(tmp_path / "mask.tif", noise((H, W), "u1") > 100)
    for name, reason in (
        ("behind", "behind one page"),
        ("ome", "OME-TIFF with channels"),
        ("palette", "palette"),
        ("mask", "bool"),
    ):
        with pytest.raises(VideoDecodeError, match=reason):
            read(tmp_path / f"{name}.tif")


PHOTO = np.kron(noise((4, 6, 3), "u1"), np.ones((8, 8, 1), np.uint8))


@pytest.mark.parametrize("ending", STILLS)
def test_a_picture_is_a_video_of_one_frame(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"photo{ending.upper()}"
    Image.fromarray(PHOTO).save(path, quality=95, lossless=True)
    clip_THWC = read(path, 3, [0, 0, 0, 0])
    assert clip_THWC.shape == (4, *PHOTO.shape)
    assert clip_THWC.strides[0] == 0  # not four copies
    assert np.abs(clip_THWC.astype(int) - PHOTO).mean() < (8 if "j" in ending else 1e-9)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_kind_of_picture_has_the_channels_of_the_model(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.fromarray(PHOTO).convert(mode).save(path)
    with Image.open(path) as image:
        for in_channels, name in ((1, "L"), (3, "RGB"), (4, "RGBA")):
            assert np.array_equal(
                read(path, in_channels)[0], np.atleast_3d(np.asarray(image.convert(name)))
            ), name
        assert np.array_equal(
            read(path, 1, channels=(2,))[0], np.asarray(image.convert("RGB"))[:, :, 2:]
        )
    with pytest.raises(
        VideoDecodeError, match=r"gives 3 channels of 48 x 32 pixels, model\.in_channels is 5"
    ):
        read(path, 5)


def test_deep_grey_pictures_keep_their_bits(tmp_path: Path) -> None:
    stored = noise((H, W))
    Image.fromarray(stored).save(tmp_path / "deep.png")
    assert np.array_equal(read(tmp_path / "deep.png", value_range=FULL)[0, :, :, 0], stored)
    with pytest.raises(VideoDecodeError, match=r"data\.value_range"):
        read(tmp_path / "deep.png")


# what undoes each orientation of the EXIF standard, on rows and columns
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x[::-1].transpose(1, 0, 2),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: x[:, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_picture_stands_as_its_exif_tag_says(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PHOTO).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read(tmp_path / "turned.png", 3)[0], UPRIGHT[orientation](PHOTO))


def test_pictures_are_read_after_a_video_was(tmp_path: Path, demo_folder: Path) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "a.jpg")
    before = read(tmp_path / "a.jpg", 3)
    decode(str(next(demo_folder.rglob("*.mp4"))), [0])
    assert np.array_equal(read(tmp_path / "a.jpg", 3), before)


@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_of_sixteen_bits_is_that_of_its_real_values(flip: bool) -> None:
    clip_THWC = torch.from_numpy(noise((3, 40, 50, 5)))
    box = clip_THWC[:, 5:37, 9:41]
    assert torch.equal(
        crop_clip(clip_THWC, (5, 9, 32, 32), (32, 32), flip), box.flip(2) if flip else box
    )
    shrunk = crop_clip(clip_THWC, (3, 2, 33, 44), (16, 24), flip)
    assert shrunk.dtype == torch.uint16
    assert shrunk.is_contiguous()
    real = crop_clip(clip_THWC.double(), (3, 2, 33, 44), (16, 24), flip)
    assert (shrunk.double() - real).abs().max() <= 0.55  # torch resizes it as float32
    white = torch.from_numpy(np.full((1, 9, 9, 1), 65535, np.uint16))
    assert crop_clip(white, (1, 1, 7, 8), (16, 16), flip).int().unique().tolist() == [65535]


@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_a_picture_shown_several_times_is_cropped_as_its_copies_are(dtype: str) -> None:
    frame_HWC = torch.from_numpy(noise((40, 50, 3), dtype))
    shown, copies = (
        frame_HWC.expand(4, -1, -1, -1),
        torch.from_numpy(np.stack([noise((40, 50, 3), dtype)] * 4)),
    )
    assert torch.equal(
        crop_clip(shown, (3, 2, 33, 44), (16, 24), True),
        crop_clip(copies, (3, 2, 33, 44), (16, 24), True),
    )
    assert crop_clip(shown, (3, 2, 33, 44), (16, 24), True).is_contiguous()
