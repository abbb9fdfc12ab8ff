"""Hostile and damaged arrays, TIFF stacks and pictures: one error, little memory, nothing executed."""

import multiprocessing
import pickle
import random
import resource
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from video_mae.config.data import SourceConfig
from video_mae.decoding import Reading, VideoDecodeError, decode
from video_mae.decoding.pictures import STILLS


def read(path: Path, in_channels: int = 1, **source: Any) -> np.ndarray:
    return decode(
        str(path), np.arange, Reading(source=SourceConfig(**source), in_channels=in_channels)
    )


class Bomb:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, ("executed", "w")


ZEROS = bytes(2**20)


def npy_header(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def tiff_page(
    width: int, height: int, count: int, compression: int = 1, offset: int = 8, following: int = 0
) -> bytes:
    tags = [
        (256, width),
        (257, height),
        (258, 8),
        (259, compression),
        (262, 1),
        (273, offset),
        (278, height),
        (279, count),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)


def tiff(content: bytes, *page: int) -> bytes:
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + tiff_page(*page)


def circle(num_pages: int) -> bytes:
    size, first = len(tiff_page(4, 4, 16)), 24
    places = [first + size * (i + 1) for i in range(num_pages - 1)] + [first + size * 3]
    return (
        b"II*\0"
        + struct.pack("<I", first)
        + bytes(16)
        + b"".join(tiff_page(4, 4, 16, following=place) for place in places)
    )


def zipped(content: list[bytes], method: int = zipfile.ZIP_DEFLATED) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with (
            zipfile.ZipFile(path, "w", method, compresslevel=1) as archive,
            archive.open("a.npy", "w", force_zip64=True) as file,
        ):
            file.writelines(content)

    return write


def deflate(num_megabytes: int) -> bytes:
    engine = zlib.compressobj(9)
    head = engine.compress(b"") + engine.flush(zlib.Z_FULL_FLUSH)
    # knows of nothing before it, so it can be repeated
    block = engine.compress(ZEROS) + engine.flush(zlib.Z_FULL_FLUSH)
    return head + block * num_megabytes + engine.flush()


def evil_pickle() -> bytes:
    return pickle.dumps(Bomb())


def save_objects(path: Path) -> None:
    (np.save if path.suffix == ".npy" else np.savez)(path, np.array([Bomb()], dtype=object))


HOSTILE: dict[str, tuple[str, bytes | Callable[[Path], None], str]] = {
    "objects": (".npy", save_objects, "Python objects"),
    "objects in an archive": (".npz", save_objects, "Python objects"),
    "a pickle": (".npy", evil_pickle(), "magic string"),
    "a pickle in an archive": (".npz", zipped([evil_pickle()]), "magic string"),
    "a pickle as archive": (".npz", evil_pickle(), "not a zip file"),
    "an empty array file": (".npy", b"", "EOF|empty"),
    "a header that claims a petabyte": (
        ".npy",
        npy_header((2**40, 2**10)) + bytes(64),
        "cut off: it has 64 bytes of data",
    ),
    "a header beyond 64 bits": (".npy", npy_header((2**62, 2**62, 2)) + bytes(64), "cut off"),
    "a header of negative sides": (".npy", npy_header((-4, -4)) + bytes(64), "shape"),
    "a header of no sides": (".npy", npy_header((0, 4, 4)) + bytes(64), "empty"),
    "a header of thirty axes": (".npy", npy_header((1,) * 30) + bytes(64), "30 axes"),
    "a header with code": (
        ".npy",
        npy_header((4, 4)).replace(b"(4, 4)", b"open(4)") + bytes(64),
        "header|malformed",
    ),
    "a header of structures": (
        ".npy",
        npy_header((4, 4), "|S4") + bytes(64),
        "not integers or floats",
    ),
    "complex numbers": (".npy", npy_header((4, 4), "<c8") + bytes(128), "not integers or floats"),
    "a long header": (
        ".npy",
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b" " * 100,
        "header claims to have 4294967295",
    ),
    "a long header in an archive": (
        ".npz",
        zipped([b"\x93NUMPY\x02\x00", struct.pack("<I", 2**32 - 1), *[b" " * 2**20] * 400]),
        "header claims to have 4294967295",
    ),
    "a bomb": (".npz", zipped([npy_header((3000, 1024, 1024)), ZEROS]), "more than 2 GB"),
    "a bomb behind a small header": (
        ".npz",
        zipped([npy_header((4, 4)), *[ZEROS] * 400]),
        "not the 16 bytes",
    ),
    "less than the header says": (
        ".npz",
        zipped([npy_header((512, 1024)), bytes(1000)]),
        "not the 524288 bytes",
    ),
    "less, stored": (
        ".npz",
        zipped([npy_header((512, 1024)), bytes(1000)], zipfile.ZIP_STORED),
        "cut off",
    ),
    "an archive of another kind": (
        ".npz",
        zipped([npy_header((4, 4)), bytes(16)], zipfile.ZIP_LZMA),
        "compressed in another way",
    ),
    "a TIFF that is none": (".tif", b"hello" * 9, "not a TIFF"),
    "an empty TIFF": (".tif", b"", "not a TIFF"),
    "pages in a circle": (".tif", circle(150), "circle"),
    "a page on itself": (".tif", circle(4), "circle"),
    "a huge page": (".tif", tiff(bytes(16), 2**31 - 1, 2**31 - 1, 16), "more than 2 GB"),
    "a page that is cut off": (".tif", tiff(bytes(16), 64, 64, 4096), "cut off"),
    "a page at another place": (".tif", tiff(bytes(16), 4, 4, 16, 1, 10**6), "cut off"),
    "a small page that unpacks to 4 GB": (
        ".tif",
        tiff(DEFLATED := deflate(4000), 4, 4, len(DEFLATED), 8),
        "unpacks to more",
    ),
    "an unknown compression": (".tif", tiff(bytes(16), 4, 4, 16, 34712), "compression"),
    "a picture that is none": (
        ".png",
        b"\x89PNG\r\n\x1a\n" + bytes(40),
        "broken|cannot identify|truncated",
    ),
    "an EPS, for Ghostscript": (
        ".jpg",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(executed) (w) file\n",
        "cannot identify",
    ),
    "a picture of 100 million pixels": (
        ".png",
        lambda path: Image.new("1", (12_000, 9_000)).save(path),
        "exceeds limit",
    ),
    "a picture of 400 million pixels": (
        ".png",
        lambda path: Image.new("1", (20_000, 20_000)).save(path),
        "exceeds limit",
    ),
    "an empty picture": (".webp", b"", "cannot identify"),
}


def verdict(path: Path, limit: int, sender: Any) -> None:
    """In a process of its own, which may take `limit` bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * resource.getpagesize() + limit, resource.RLIM_INFINITY)
    )
    try:
        read(path, 3 if path.suffix in STILLS else 1)
        sender.send("decoded")
    except VideoDecodeError as error:
        sender.send((error.path, str(error)))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_costs_little_runs_nothing_and_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ending, content, reason = HOSTILE[name]
    path = tmp_path / f"hostile{ending}"
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=verdict, args=(path, 256 * 2**20, sender)
    )
    process.start()
    try:
        assert receiver.poll(20), "it hangs"
        answer = receiver.recv()
    finally:
        process.kill()
        process.join()
    assert answer[0] == str(path)
    assert "\n" not in answer[1]
    with pytest.raises(VideoDecodeError, match=reason):
        raise VideoDecodeError(*answer[1].split(": ", 2))
    assert not (tmp_path / "executed").exists()


def spoilt(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    kind = rng.choice(["flip", "head", "cut", "number"])
    if kind == "cut":
        return bytes(data[: rng.randrange(len(data))])
    if kind == "number":
        place = rng.randrange(min(600, len(data) - 8))
        data[place : place + 4] = rng.choice(
            [b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80"]
        )
    else:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(min(400, len(data)) if kind == "head" else len(data))] = (
                rng.randrange(256)
            )
    return bytes(data)


def test_damaged_files_decode_or_raise_the_one_error(tmp_path: Path) -> None:
    stack = np.random.default_rng(0).integers(0, 65000, (4, 7, 9)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "plain.tif", stack, photometric="minisblack")
    tifffile.imwrite(
        tmp_path / "tiled.tif", stack, tile=(16, 16), compression="zlib", photometric="minisblack"
    )
    tifffile.imwrite(
        tmp_path / "strips.tif",
        stack,
        rowsperstrip=2,
        bigtiff=True,
        compression="zlib",
        photometric="minisblack",
    )
    tifffile.imwrite(tmp_path / "stack.tif", stack.reshape(2, 2, 7, 9), imagej=True)
    np.save(tmp_path / "a.npy", stack)
    np.savez(tmp_path / "a.npz", stack)
    np.savez_compressed(tmp_path / "b.npz", stack)
    for ending in STILLS:
        Image.fromarray(np.kron(stack[0, :, :, None], np.ones((8, 8, 3))).astype(np.uint8)).save(
            tmp_path / f"a{ending}"
        )
    for file in sorted(tmp_path.iterdir()):
        content, rng, reasons = file.read_bytes(), random.Random(file.name), list[str]()
        for _ in range(60):
            file.write_bytes(spoilt(content, rng))
            in_channels = 3 if file.suffix in STILLS else 2 if file.stem == "stack" else 1
            try:
                read(file, in_channels, value_range=(0, 65535))
            except VideoDecodeError as error:
                reasons.append(error.reason)
        assert 0 < len(reasons) < 60, file.name
        assert all("\n" not in reason and len(reason) > 3 for reason in reasons), file.name
