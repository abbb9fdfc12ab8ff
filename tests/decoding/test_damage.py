"""A run over 500 files of which 100 are damaged: it finishes, names each bad one once, loses no
good one, and leaves no process.

What is bad? A file whose frames cannot all be decoded: each clip of these tests reads all frames of
a file. A damaged file that is still read whole is good by definition: a changed bit may change
nothing but a picture. Of files that have more frames than a clip some cannot be told: whether a
clip meets the damage depends on where it starts.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import yaml

from video_mae.config import DataConfig
from video_mae.data import ClipDataset, StepSampler, make_loader, read_annotations
from video_mae.decoding import Reading, VideoDecodeError, read_clip, times_and_start
from video_mae.decoding.isolation import decoder_process
from video_mae.files import Register

GOOD, BAD = 400, 100
FRAMES = 8  # of each rendered video, and of each clip
SHARED = Path(__file__).resolve().parents[3] / "shared" / "videos"
MARK = "VIDEO_MAE_TEST_OF_DAMAGE"


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    """One bit of a hundred bytes, or of one in a thousand, or of one alone."""
    changed = bytearray(data)
    for place in rng.integers(
        len(data), size=max(int(len(data) * rng.choice([0, 0.001, 0.01])), 1)
    ):
        changed[place] ^= 1 << rng.integers(8)
    return bytes(changed)


def truncated(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(len(data))]


def beheaded(data: bytes, rng: np.random.Generator) -> bytes:
    return data[rng.integers(1, len(data)) :]


def swapped(data: bytes, rng: np.random.Generator) -> bytes:
    """Two stretches change places."""
    length = int(rng.integers(1, len(data) // 4))
    first, second = sorted(rng.integers(len(data) - length, size=2))
    changed = bytearray(data)
    changed[first : first + length], changed[second : second + length] = (
        data[second : second + length],
        data[first : first + length],
    )
    return bytes(changed)


def zeroed(data: bytes, rng: np.random.Generator) -> bytes:
    first, last = sorted(rng.integers(len(data), size=2))
    return data[:first] + bytes(int(last - first)) + data[last:]


def noise(data: bytes, rng: np.random.Generator) -> bytes:
    return rng.bytes(len(data))


def playlist(data: bytes, rng: np.random.Generator) -> bytes:
    return b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"


def header_only(data: bytes, rng: np.random.Generator) -> bytes:
    return data[:48]


DAMAGES = (
    flipped,
    truncated,
    swapped,
    zeroed,
    beheaded,
    flipped,
    truncated,
    swapped,
    noise,
    playlist,
    header_only,
)


@dataclass(frozen=True)
class Collection:
    """The list, and the places in it of files that are read whole, of those that are not, and of
    those that cannot be told.
    """

    source: str
    whole: frozenset[int]
    bad: frozenset[int]
    unclear: frozenset[int]
    names: tuple[str, ...]


def render(path: Path, seed: int) -> bytes:
    """A small video, also with frames that refer to later ones."""
    rng = np.random.default_rng(seed)
    codec = "mpeg4" if path.suffix == ".avi" else "libx264"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            codec, rate=25, options={"g": "5", "bf": "0" if codec == "mpeg4" else "2"}
        )
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        picture = rng.integers(256, size=(32, 48 + FRAMES, 3), dtype=np.uint8)
        for index in range(FRAMES):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(
                        np.ascontiguousarray(picture[:, index : index + 48]), format="rgb24"
                    )
                )
            )
        container.mux(stream.encode())
    return path.read_bytes()


def read_whole(path: str, decoder: str) -> tuple[bool, int]:
    """Whether all frames of a file are decoded, and how many it is opened with."""
    reading = Reading(decoder=decoder, seconds=20)  # pyright: ignore[reportArgumentType]
    try:
        return True, read_clip(path, np.arange, reading).num_frames
    except VideoDecodeError:
        pass
    try:
        return False, len(times_and_start(path, reading)[0])
    except VideoDecodeError:
        return False, 0


@pytest.fixture(scope="module")
def collect(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, int], Collection]:
    """collect(decoder, good, bad): files, and what they are to that decoder."""
    folder = tmp_path_factory.mktemp("damage")
    originals = [
        (ending, render(folder / f"original {seed}{ending}", seed))
        for seed in range(6)
        for ending in (".mp4", ".mkv", ".avi", ".mov")
    ]

    def make(decoder: str, good: int, bad: int) -> Collection:
        rng = np.random.default_rng(0)
        place = folder / decoder
        place.mkdir()
        files: list[Path] = []
        given = (
            [*(SHARED / "broken").iterdir(), *(SHARED / "hostile").iterdir()]
            if SHARED.is_dir()
            else []
        )
        files += sorted(path for path in given if path.suffix != ".mp3")[:bad]
        for number in range(bad - len(files)):
            ending, data = originals[int(rng.integers(len(originals)))]
            damage = DAMAGES[number % len(DAMAGES)]
            files.append(place / f"{damage.__name__} {number}{ending}")
            files[-1].write_bytes(damage(data, rng))
        for number in range(good):
            ending, data = originals[number % len(originals)]
            files.append(place / f"good {number}{ending}")
            files[-1].write_bytes(data)
        order = rng.permutation(len(files)).tolist()
        names = tuple(str(files[number]) for number in order)
        (place / "list.txt").write_text("".join(f"{name}\n" for name in names))
        known = {name: (True, FRAMES) for name in names if "/good " in name}
        found = [known.get(name) or read_whole(name, decoder) for name in names]
        whole = frozenset(number for number, (is_whole, _) in enumerate(found) if is_whole)
        unclear = frozenset(
            number
            for number, (is_whole, num_frames) in enumerate(found)
            if not is_whole and num_frames > FRAMES
        )
        return Collection(
            str(place / "list.txt"),
            whole,
            frozenset(range(len(names))) - whole - unclear,
            unclear,
            names,
        )

    return make


def children() -> set[int]:
    return {
        child.pid
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE
    }


def settled(find: Callable[[], set[int]], expected: set[int], seconds: float = 5.0) -> set[int]:
    """What is found at last: processes take a moment to leave."""
    end = time.monotonic() + seconds
    while (found := find()) - expected and time.monotonic() < end:
        time.sleep(0.05)
    return found - expected


def test_an_epoch_over_500_files_names_the_bad_ones_and_sees_the_good_ones(
    collect, tmp_path: Path
) -> None:
    collection = collect("pyav", GOOD, BAD)
    assert len(collection.bad) >= BAD // 2
    assert GOOD <= len(collection.whole) < GOOD + BAD // 2
    data = DataConfig(
        source=collection.source,
        stride=1,
        num_workers=2,
        crop_scales=(1.0,),
        decoder="pyav",
        decode_seconds=20,
    )
    decoder_process().call(os.getpid, seconds=60)
    before, handles = children(), len(os.listdir("/proc/self/fd"))
    dataset = ClipDataset(
        read_annotations(data), data, num_frames=FRAMES, height=32, width=32, seed=0
    )
    loader = make_loader(
        dataset, StepSampler(len(dataset), 10, 1, 0, 1, 0, 0, (GOOD + BAD) // 10), data
    )
    (tmp_path / "run").mkdir()
    quarantine, seen, tried = (
        Register(tmp_path / "run" / "quarantine.jsonl"),
        Counter[int](),
        Counter[str](),
    )
    for batch in loader:
        seen.update(batch.index_B.tolist())
        tried.update(failure.path for failure in batch.failures)
        quarantine.add(batch.failures, 1)
    assert seen.total() == GOOD + BAD
    assert collection.whole <= set(seen)
    assert not collection.bad & set(seen)
    entries = [json.loads(line) for line in quarantine.file.read_text().splitlines()]
    named = Counter(entry["path"] for entry in entries)
    assert max(named.values()) == 1
    assert {collection.names[number] for number in collection.bad} <= set(named)
    assert not {collection.names[number] for number in collection.whole} & set(named)
    assert set(tried) == set(named)
    assert all(5 < len(entry["reason"]) <= 300 and "\n" not in entry["reason"] for entry in entries)
    del loader, batch  # pyright: ignore[reportPossiblyUnboundVariable]
    assert settled(children, before) == set()
    end = time.monotonic() + 5.0  # the queues' pipes are closed by their threads
    while (open_now := len(os.listdir("/proc/self/fd"))) > handles + 2 and time.monotonic() < end:
        gc.collect()
        time.sleep(0.05)
    assert open_now <= handles + 2


def marked() -> set[int]:
    """The processes that were started under a mark in their environment."""

    def all_of_them() -> Iterator[int]:
        for process in psutil.process_iter():
            try:
                if MARK in process.environ():
                    yield process.pid
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue

    return set(all_of_them())


def test_a_pretraining_run_goes_on_past_damaged_files(
    collect, tiny_file: Path, tmp_path: Path
) -> None:
    """With decord, whose library is the most easily upset, as a user starts it."""
    collection = collect("decord", 40, 40)
    config = yaml.safe_load(tiny_file.read_text())
    config["data"] |= {
        "source": collection.source,
        "num_workers": 2,
        "stride": 1,
        "decoder": "decord",
        "max_bad_share": 0.9,
        "decode_seconds": 20,
    }
    config["model"] |= {"num_frames": FRAMES}
    config["optim"] |= {"micro_batch": 8, "steps": 20}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "video_mae",
            "pretrain",
            str(tmp_path / "run.yaml"),
            f"output={tmp_path / 'run'}",
        ],
        env={**os.environ, MARK: "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    named = [
        json.loads(line)["path"]
        for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    ]
    assert len(named) == len(set(named))
    assert {collection.names[number] for number in collection.bad} <= set(named)
    assert not {collection.names[number] for number in collection.whole} & set(named)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["bad_videos"]) == (20, len(named))
    assert settled(marked, set()) == set()
