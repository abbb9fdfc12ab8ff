"""Reading packed folders: what they hold, in which order training sees it, and what is refused."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from video_mae.config import DataConfig, FinetuneConfig, PretrainConfig
from video_mae.config.data import SourceConfig, WeightedSourceConfig
from video_mae.config.pack import PackConfig
from video_mae.data import ClipDataset, StepSampler, make_loader, read_annotations, read_sources
from video_mae.data.sampling import Key, ShardStream, epoch_order
from video_mae.data.shards import ROW, Members
from video_mae.data.videos import (
    VideoList,
    read_labeled,
    read_training_videos,
    read_validation_videos,
)
from video_mae.data.views import Views, Windows, load_views
from video_mae.decoding import Member, Reading, VideoDecodeError, decode, read_clip
from video_mae.evaluation.extract import file_name
from video_mae.tools import pack
from video_mae.training import pretrain
from video_mae.training.checkpoint import step_name

SEED = 5


@pytest.fixture(scope="module")
def folders(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same 24 videos in both forms, in shards of a few."""
    found = {}
    for form in ("video", "frames"):
        found[form] = tmp_path_factory.mktemp("packed") / form
        _pack(
            str(demo_folder / "train.txt"),
            found[form],
            200_000 if form == "frames" else 30_000,
            form=form,
        )
    return found


def _pack(source: str, folder: Path, shard_bytes: int = 10**6, **knobs: Any) -> None:
    config = PackConfig(num_workers=1, **knobs)
    # smaller than anybody would want them
    object.__setattr__(config, "shard_mb", shard_bytes / 1e6)
    assert pack.start(source, str(folder), config) == 0


def videos_of(source: Path | str, **keys: Any) -> VideoList:
    videos = read_annotations(SourceConfig(source=str(source), **keys))
    assert isinstance(videos.paths, Members)
    return videos


def members_of(source: Path) -> Members:
    members = videos_of(source).paths
    assert isinstance(members, Members)
    return members


def rewrite(folder: Path, change: Callable[[list[dict[str, Any]], dict[str, Any]], object]) -> None:
    """Changes the rows and the manifest of a folder, checksums made right again."""
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    manifest = json.loads((folder / "manifest.json").read_text())
    change(rows, manifest)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "manifest.jsonl").write_text(text)
    (folder / "manifest.json").write_text(
        json.dumps({**manifest, "rows_sha256": sha256(text.encode()).hexdigest()})
    )


def copied(folder: Path, to: Path) -> Path:
    to.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize("form", ["video", "frames"])
def test_a_packed_folder_is_a_source_like_its_list(
    form: str, folders: dict[str, Path], demo_folder: Path
) -> None:
    videos, plain = (
        videos_of(folders[form]),
        read_annotations(SourceConfig(source=str(demo_folder / "train.txt"))),
    )
    assert len(videos) == len(plain) == 24
    assert len(list(folders[form].glob("*.tar"))) >= 3
    assert sum(members_of(folders[form]).shard_sizes()) == 24
    for index in range(24):
        place, about = videos[index]
        assert about == plain[index][1]
        assert str(place).startswith(f"{folders[form]}/shard-")
        found, wanted = decode(place, np.arange), decode(plain[index][0], np.arange)
        assert found.shape == wanted.shape
        assert np.abs(found.astype(int) - wanted).mean() < (6 if form == "video" else 1e-9)
    assert len(list(videos)) == 24  # pyright: ignore[reportArgumentType]  (as pytorchvideo's)


def test_millions_of_videos_take_a_few_bytes_each(tmp_path: Path) -> None:
    columns = [np.zeros(10_000, np.int64), *(np.arange(10_000) for _ in range(3))]
    rows_M = np.rec.fromarrays(columns, dtype=ROW)
    members = Members("folder", ["shard-000000.tar"], ".mp4", rows_M)
    assert rows_M.nbytes <= 28 * len(members)
    assert sys.getsizeof(members) < 100
    assert members[9_999] == Member("folder/shard-000000.tar", "000009999.mp4", 9_999, 9_999)
    with pytest.raises(IndexError):
        members[10_000]


def test_only_the_wanted_frames_are_read_in_this_process(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    member, _ = videos_of(folders["frames"])[3]
    whole, reads = decode(member, np.arange), []
    preadv = pack.os.preadv
    monkeypatch.setattr(pack.os, "preadv", lambda *words: reads.append(words[2]) or preadv(*words))
    monkeypatch.setattr(
        "video_mae.decoding.frames.decoder_process", lambda: pytest.fail("a process is asked")
    )
    found = read_clip(member, [2, 7, 7, 5], Reading())
    assert np.array_equal(found.clip_THWC, whole[[2, 7, 7, 5]])
    assert found.decoder == "numpy"
    assert reads == [member.offset + 128 + frame * 48 * 48 * 3 for frame in (2, 5, 7)]


@pytest.mark.parametrize("form", ["video", "frames"])
@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_a_folder_behind_a_url_is_a_source(
    protocol: str, form: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    url = f"file://{folders[form]}"
    if protocol == "memory":
        url = f"memory://test/{form}"
        fsspec.filesystem("memory").put(f"{folders[form]}/", f"/test/{form}/", recursive=True)
    videos, local = videos_of(url), videos_of(folders[form])
    assert videos[2][0].archive.startswith(url)
    for index in (0, 13, 23):
        for wanted in ([0, 1, 2, 3, 9], [15], [1, 15]):
            found, expected = (decode(either[index][0], wanted) for either in (videos, local))
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("url", ["nonsense://bucket/x", "s3://bucket/x", "memory://absent"])
def test_a_url_that_cannot_be_opened_is_told_in_a_line(url: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=f"data.source: {url}: ") as error:
        read_annotations(SourceConfig(source=url))
    assert "\n" not in str(error.value)


def test_what_is_missing_cut_or_unfinished_is_told_before_anything_starts(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    def refuses(message: str, damage: Callable[[Path], object]) -> None:
        folder = copied(folders["video"], tmp_path / str(len(list(tmp_path.iterdir()))))
        damage(folder)
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            read_annotations(SourceConfig(source=str(folder)), "data.sources.packed.source")
        assert str(error.value).startswith("data.sources.packed.source: ")
        assert "\n" not in str(error.value)

    def cut(folder: Path) -> None:
        content = (folder / "shard-000001.tar").read_bytes()
        (folder / "shard-000001.tar").write_bytes(content[:-512])

    refuses(
        "no such shard: .*shard-000002.tar, copy the folder again",
        lambda folder: (folder / "shard-000002.tar").unlink(),
    )
    refuses(r"shard-000001.tar has \d+ bytes, its manifest says \d+; copy the folder again", cut)
    refuses(
        "its packing is not finished, start the same `video-mae pack` again",
        lambda folder: (folder / "manifest.json").unlink(),
    )
    refuses(
        "is not what manifest.json describes",
        lambda folder: (folder / "manifest.jsonl").write_bytes(
            (folder / "manifest.jsonl").read_bytes().replace(b"shard-000001", b"shard-000002")
        ),
    )
    refuses(
        "manifest.jsonl:3: is no row of a packed folder",
        lambda folder: (folder / "manifest.jsonl").write_bytes(
            b"".join((folder / "manifest.jsonl").read_bytes().splitlines(keepends=True)[:2])
            + b'{"key": "0000'
        ),
    )
    refuses(
        "is not of `video-mae pack 1`",
        lambda folder: (folder / "manifest.json").write_text('{"format": "video-mae pack 9"}'),
    )
    refuses(
        "is not of `video-mae pack 1`",
        lambda folder: (folder / "manifest.json").write_text("[1, 2"),
    )


def test_all_refused_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "junk.mp4").write_bytes(b"junk")
    (tmp_path / "list.txt").write_text("junk.mp4 0\n")
    assert (
        pack.start(str(tmp_path / "list.txt"), str(tmp_path / "out"), PackConfig(num_workers=1))
        == 3
    )
    with pytest.raises(
        ValueError, match=r"holds no videos, all were refused: refused\.jsonl says why"
    ):
        videos_of(tmp_path / "out")


HOSTILE: dict[str, Callable[[list[dict[str, Any]], dict[str, Any]], object]] = {
    "outside": lambda rows, _: rows[4].update(offset=10**9),
    "over the end": lambda rows, _: rows[-1].update(size=10**7),
    "negative offset": lambda rows, _: rows[0].update(offset=-512),
    "negative size": lambda rows, _: rows[0].update(size=-1),
    "no size": lambda rows, _: rows[0].update(size=0),
    "a sum beyond 64 bits": lambda rows, _: rows[0].update(offset=2**63 - 1, size=2**63 - 1),
    "beyond 64 bits": lambda rows, _: rows[0].update(offset=2**64),
    "a fraction": lambda rows, _: rows[0].update(offset=512.5),
    "a text": lambda rows, _: rows[0].update(size="7"),
    "another shard": lambda rows, _: rows[0].update(shard="../../etc/passwd"),
    "a parent folder": lambda rows, manifest: (
        rows[0].update(shard="../x.tar"),
        manifest["shards"][0].update(name="../x.tar"),
    ),
    "an absolute path": lambda rows, manifest: (
        rows[0].update(shard="/etc/passwd"),
        manifest["shards"][0].update(name="/etc/passwd"),
    ),
    "a url": lambda rows, manifest: manifest["shards"][0].update(
        name="http://host/shard-000000.tar"
    ),
    "a shard twice": lambda rows, manifest: manifest["shards"].append(manifest["shards"][0]),
    "a negative shard": lambda rows, manifest: manifest["shards"][0].update(bytes=-1),
    "shards out of order": lambda rows, _: rows[0].update(
        shard="shard-000001.tar", offset=512, size=1
    ),
    "a key of another row": lambda rows, _: rows[3].update(key="000000004"),
    "a path as key": lambda rows, _: rows[3].update(key="../000000003"),
    "a form": lambda rows, manifest: manifest.update(form="pickle"),
    "no shards": lambda rows, manifest: manifest.update(shards=None),
    "a list for a row": lambda rows, _: rows.__setitem__(2, []),  # pyright: ignore
    "a label without name": lambda rows, manifest: manifest.update(class_names=["one"]),
    "names that are none": lambda rows, manifest: manifest.update(class_names=[1, 2, 3]),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_rows_that_lie_are_refused(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["video"], tmp_path / "copy")
    rewrite(folder, lambda *_: None)
    videos_of(folder)
    rewrite(folder, HOSTILE[case])
    with pytest.raises(ValueError, match=r"data\.source: .*manifest\.json.*; (pack|copy)") as error:
        videos_of(folder)
    assert "\n" not in str(error.value)


def test_a_member_that_lies_costs_one_sample(folders: dict[str, Path], tmp_path: Path) -> None:
    member, _ = videos_of(folders["frames"])[0]
    for wrong in (
        member._replace(size=member.size - 1),
        member._replace(offset=member.offset + 512),
        member._replace(size=60),
        member._replace(archive=str(tmp_path / "absent.tar")),
        member._replace(offset=10**12),
    ):
        with pytest.raises(VideoDecodeError) as error:
            decode(wrong, np.arange)
        assert error.value.path == str(wrong)
    video, _ = videos_of(folders["video"])[0]
    with pytest.raises(VideoDecodeError, match=f"{video.archive}/{video.name}"):
        decode(video._replace(offset=video.offset + 8), np.arange)


def stream(
    sizes: list[int], window: int, seed: int = SEED, source: int | None = None
) -> ShardStream:
    return ShardStream(sizes, window, seed, source)


def test_an_epoch_of_shards_visits_every_video_once_within_bounds() -> None:
    sizes = [3, 1, 7, 2, 9, 4, 4, 6, 1, 5, 8, 3]
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    keys = stream(sizes, 10)
    orders = []
    for epoch in range(4):
        found = [keys.key_at(epoch * 53 + place) for place in range(53)]
        assert {e for e, _ in found} == {epoch}
        order = [index for _, index in found]
        assert sorted(order) == list(range(53))
        first, last = (
            {
                shard: pick(place for place, index in enumerate(order) if shard_of[index] == shard)
                for shard in range(12)
            }
            for pick in (min, max)
        )
        # a window, and what a shard goes beyond it
        assert all(last[shard] - first[shard] < 20 + 9 for shard in range(12))
        open_at = [
            sum(first[shard] <= place <= last[shard] for shard in range(12)) for place in range(53)
        ]
        assert max(open_at) < 12
        assert sum(a + 1 == b for a, b in pairwise(order)) < 15  # nor in the order of the files
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]
    # Golden: a change here would change every run that resumes.
    assert orders[0][:8] == [27, 29, 42, 50, 46, 44, 52, 28]


def test_the_place_in_an_epoch_alone_decides() -> None:
    keys = stream([5, 8, 2, 9, 9, 4], 9)
    wanted = [keys.key_at(position) for position in range(150)]
    for position in (149, 0, 77, 40, 41, 3, 111):
        assert (
            stream([5, 8, 2, 9, 9, 4], 9).key_at(position)
            == keys.key_at(position)
            == wanted[position]
        )
    assert wanted != [
        stream([5, 8, 2, 9, 9, 4], 9, SEED + 1).key_at(position) for position in range(150)
    ]
    assert wanted != [
        stream([5, 8, 2, 9, 9, 4], 9, SEED, 1).key_at(position) for position in range(150)
    ]


def test_a_set_smaller_than_a_window_is_shuffled_whole_as_a_eitheris() -> None:
    for epoch in range(3):
        order = [stream([4, 4, 4], 7).key_at(epoch * 12 + place)[1] for place in range(12)]
        assert order == epoch_order(SEED, epoch, 12).tolist()
    assert sorted(stream([4, 4, 4], 6).key_at(place)[1] for place in range(12)) == list(range(12))


def test_windows_hold_as_many_as_asked_for() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes, window = rng.integers(1, 30, rng.integers(1, 20)).tolist(), int(rng.integers(1, 60))
        keys = stream(sizes, window)
        keys.key_at(0)
        widths = np.diff([*keys._begins, sum(sizes)])
        assert all(width >= min(window, sum(sizes)) for width in widths)
        assert all(width < window + max(sizes) for width in widths[:-1])
        assert widths[-1] < 2 * window + max(sizes)


def test_ranks_share_what_one_reads_and_a_partial_epoch_goes_on_at_its_sample(
    folders: dict[str, Path],
) -> None:
    data = DataConfig(source=str(folders["frames"]), shuffle_window=5)

    def keys(rank: int, world_size: int, first_step: int = 0) -> list[list[Key]]:
        sources = read_sources(data, 3)
        return list(
            StepSampler(
                len(sources),
                4 // world_size,
                2,
                rank,
                world_size,
                SEED,
                first_step,
                9,
                sources.stream(SEED),
            )
        )

    one = keys(0, 1)
    assert [a + b for a, b in zip(keys(0, 2), keys(1, 2), strict=True)] == one
    assert keys(0, 1, first_step=4) == one[8:]
    assert sorted(index for batch in one[:6] for _, index in batch) == list(range(24))


@pytest.mark.parametrize("form", ["video", "frames"])
def test_workers_change_nothing(form: str, folders: dict[str, Path]) -> None:
    batches = []
    for num_workers in (0, 1, 3):
        data = DataConfig(
            source=str(folders[form]), shuffle_window=5, stride=2, num_workers=num_workers
        )
        sources = read_sources(data, 3)
        sampler = StepSampler(len(sources), 4, 1, 0, 1, SEED, 1, 4, sources.stream(SEED))
        batches.append(
            list(make_loader(ClipDataset(sources, data, 4, 32, 32, SEED), sampler, data))
        )
    for other in batches[1:]:
        for wanted, found in zip(batches[0], other, strict=True):
            assert torch.equal(wanted.clip_BTHWC, found.clip_BTHWC)
            assert torch.equal(wanted.label_B, found.label_B)
            assert not found.failures


def test_packed_frames_give_the_clips_of_the_files(
    folders: dict[str, Path], demo_folder: Path
) -> None:
    found = []
    for source in (folders["frames"], demo_folder / "train.txt"):
        data = DataConfig(source=str(source), stride=2)
        sources = read_sources(data, 3)
        dataset, key_at = ClipDataset(sources, data, 4, 32, 32, SEED), sources.stream(SEED)
        found.append([dataset[key_at(position)] for position in range(6)])
    for packed, plain in zip(*found, strict=True):
        assert torch.equal(torch.stack(packed.clips), torch.stack(plain.clips))
        assert (packed.label, packed.index) == (plain.label, plain.index)


def test_packed_and_plain_sources_mix(folders: dict[str, Path], demo_folder: Path) -> None:
    packed = WeightedSourceConfig(source=str(folders["frames"]), shuffle_window=5, weight=1)
    plain = WeightedSourceConfig(source=str(demo_folder / "val.txt"), weight=3)
    data = DataConfig(sources={"packed": packed, "plain": plain})
    sources = read_sources(data, 3)
    key_at = sources.stream(SEED)
    own = [index for _, index in (key_at(position) for position in range(1000)) if index < 24]
    assert len(own) == 250
    wanted = ShardStream(members_of(folders["frames"]).shard_sizes(), 5, SEED, 0)
    assert own == [wanted.key_at(position)[1] for position in range(250)]
    dataset = ClipDataset(sources, data, 4, 32, 32, SEED)
    assert {torch.stack(dataset[key_at(position)].clips).shape for position in range(6)} == {
        (1, 4, 32, 32, 3)
    }


def test_a_damaged_member_is_replaced_and_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["video"], tmp_path / "copy")
    member, _ = videos_of(folder)[7]
    shard = bytearray(Path(member.archive).read_bytes())
    shard[member.offset : member.offset + member.size] = bytes(member.size)
    Path(member.archive).write_bytes(shard)
    sample = ClipDataset(videos_of(folder), DataConfig(source=str(folder)), 4, 32, 32, SEED)[0, 7]
    assert sample.index != 7
    assert [failure.path for failure in sample.failures] == [str(member)]


@pytest.fixture(scope="module")
def classes(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes, packed."""
    folder = tmp_path_factory.mktemp("classes")
    videos = sorted((demo_folder / "val.txt").read_text().splitlines())
    for number, line in enumerate(videos[:6]):
        name = ("zebra", "ant")[number % 2]
        (folder / "plain" / name).mkdir(parents=True, exist_ok=True)
        (folder / "plain" / name / f"{number}.mp4").write_bytes(
            (demo_folder / line.rsplit(" ", 1)[0]).read_bytes()
        )
    _pack(str(folder / "plain"), folder / "packed", form="frames")
    return folder


def test_labels_and_names_of_classes_are_those_of_the_folder(classes: Path) -> None:
    packed, plain = (read_labeled("LIST", str(classes / name)) for name in ("packed", "plain"))
    assert packed.class_names == plain.class_names == ("ant", "zebra")
    assert packed.label_M.tolist() == plain.label_M.tolist() == [0, 0, 0, 1, 1, 1]
    mapped = read_labeled(
        "LIST", str(classes / "packed"), num_classes=3, names=("zebra", "bee", "ant")
    )
    assert mapped.label_M.tolist() == [2, 2, 2, 0, 0, 0]
    assert isinstance(mapped.paths, Members)
    assert [mapped[index][1]["label"] for index in range(6)] == [2, 2, 2, 0, 0, 0]
    assert mapped[4][0] == packed.paths[4]
    with pytest.raises(ValueError, match="the folder zebra is none of the model's 1 classes"):
        read_labeled("LIST", str(classes / "packed"), names=("ant",))


def test_finetuning_takes_packed_lists(
    classes: Path, tiny_finetune: Callable[..., FinetuneConfig]
) -> None:
    config = tiny_finetune(
        f"data.source={classes / 'packed'}",
        f"validation.source={classes / 'packed'}",
        "classifier.num_classes=2",
    )
    videos, classifier = read_training_videos(config)
    assert isinstance(videos.paths, Members)
    assert classifier.class_names == ("ant", "zebra")
    assert len(read_validation_videos(replace(config, classifier=classifier))) == 6


def test_views_windows_and_names_of_feature_files_know_members(
    classes: Path, folders: dict[str, Path]
) -> None:
    videos = read_labeled("LIST", str(classes / "packed"))
    views = Views(
        num_frames=4, height=32, width=32, sampling="dense", stride=2, num_clips=2, num_crops=3
    )
    ((video, viewed, failure),) = load_views(videos.paths, [2], views, 0)
    assert (video, failure) == (2, None)
    assert viewed.clips().shape == (6, 4, 32, 32, 3)
    windows = Windows(
        num_frames=4, height=32, width=32, stride=2, hop=8, crop="whole", reading=Reading()
    )
    member, _ = videos_of(folders["video"])[0]
    times, clips = windows.read(member)
    assert len(list(clips)) == 2
    assert np.isfinite(times.end_seconds_C).all()
    paths = tuple(read_annotations(SourceConfig(source=str(folders["video"]))).paths)
    names = [file_name(path, "npz") for path in paths]
    assert len(set(names)) == 24
    assert names[0].startswith("000000000-")


@pytest.mark.trains_here
@pytest.mark.usefixtures("quiet_process")
def test_a_run_on_shards_resumes_bit_for_bit_in_the_middle_of_an_epoch(
    folders: dict[str, Path], tiny: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    def trained(name: str) -> PretrainConfig:
        return tiny(
            f"output={tmp_path / name}",
            f"data.source={folders['video']}",
            "data.shuffle_window=5",
            "data.num_workers=1",
            "journal.checkpoint_interval=2",
        )  # 4 steps of 4 videos: an epoch has 24

    whole, resumed = trained("whole"), trained("resumed")
    for config in (whole, resumed):
        assert pretrain.run(pretrain.prepare(config)) == 0
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / step_name(4))
    assert pretrain.run(pretrain.prepare(resumed)) == 0
    assert "resumed after step 2" in (tmp_path / "resumed" / "log.txt").read_text()
    first, second = (
        (tmp_path / name / "model" / "model.safetensors").read_bytes()
        for name in ("whole", "resumed")
    )
    assert first == second
