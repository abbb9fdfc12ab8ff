"""Several sources in one run: their shares, their order, the files of each, and what is said about
wrong ones.
"""

from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import yaml
from PIL import Image

from video_mae.config import DataConfig, PretrainConfig, load_config
from video_mae.config.data import SourceConfig, WeightedSourceConfig
from video_mae.config.explain import describe
from video_mae.config.schema import save_config
from video_mae.data import (
    ClipDataset,
    Failure,
    StepSampler,
    make_loader,
    read_annotations,
    read_sources,
)
from video_mae.data.sampling import Key, epoch_order
from video_mae.data.sources import BLOCK, Sources

SEED = 5


class Paths:
    """A list of files that nobody opens."""

    def __init__(self, name: str, num_videos: int) -> None:
        self.paths = [(f"{name}{number}", {"label": number}) for number in range(num_videos)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, dict[str, int]]:
        return self.paths[index]


def mixture(*sizes: int, weights: tuple[float | None, ...] | None = None) -> Sources:
    parts: list[Any] = [
        (f"data.sources.s{number}", WeightedSourceConfig(weight=weight), Paths(f"s{number} ", size))
        for number, (size, weight) in enumerate(
            zip(sizes, weights or [None] * len(sizes), strict=True)
        )
    ]
    return Sources(parts)


def drawn(sources: Sources, num_samples: int, seed: int = SEED) -> list[Key]:
    key_at = sources.stream(seed)
    return [key_at(position) for position in range(num_samples)]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ((3, 1, 1), (600, 200, 200)),
        ((1, 1, 1), (334, 333, 333)),
        ((1e-3, 2e-3, 5e-3), (125, 250, 625)),
        ((None, None, None), (70, 30, 900)),
    ],
)  # as many as they have files
def test_every_block_of_samples_holds_each_source_in_its_share(
    weights: Any, shares: tuple[int, ...]
) -> None:
    sources = mixture(7, 3, 90, weights=weights)
    keys = drawn(sources, 3 * BLOCK)
    orders = []
    for block in range(3):
        order = [
            sources.parts.index(sources.at(index))
            for _, index in keys[block * BLOCK : (block + 1) * BLOCK]
        ]
        assert Counter(order) == dict(enumerate(shares))
        orders.append(order)
        places = [place for place, source in enumerate(order) if source == 1]
        assert np.std(places) > BLOCK / 6  # all over the block
    assert orders[0] != orders[1] != orders[2]


def test_each_source_is_gone_through_epoch_after_epoch_in_orders_of_its_own() -> None:
    sources = mixture(7, 3, 7, weights=(2, 1, 1))
    keys = drawn(sources, 2 * BLOCK)
    for number, (first, size) in enumerate(((0, 7), (7, 3), (10, 7))):
        own = [key for key in keys if first <= key[1] < first + size]
        assert [epoch for epoch, _ in own] == [place // size for place in range(len(own))]
        for epoch in range(len(own) // size):
            order = [index - first for _, index in own[epoch * size : (epoch + 1) * size]]
            assert order == epoch_order(SEED, epoch, size, number).tolist()
            assert sorted(order) == list(range(size))
    # Golden: a change here would change every joint run that resumes.
    assert keys[:6] == [(0, 6), (0, 0), (0, 2), (0, 5), (0, 4), (0, 1)]


def test_a_sample_depends_on_seed_and_position_alone() -> None:
    keys, key_at = drawn(mixture(7, 3, 90), 2500), mixture(7, 3, 90).stream(SEED)
    for position in (2400, 3, 1999, 2000, 0, 999, 1000, 2499):
        assert key_at(position) == keys[position]
    assert drawn(mixture(7, 3, 90), 100, seed=SEED + 1) != keys[:100]


def test_ranks_share_the_stream_and_a_run_goes_on_in_it() -> None:
    def batches(
        rank: int = 0, world_size: int = 1, micro_batch: int = 4, first: int = 0
    ) -> list[list[Key]]:
        return list(
            StepSampler(
                100,
                micro_batch,
                3,
                rank,
                world_size,
                SEED,
                first,
                99,
                mixture(7, 3, 90).stream(SEED),
            )
        )

    one = batches()
    assert list(chain(*one)) == drawn(mixture(7, 3, 90), 4 * 3 * 99)
    assert [
        left + right for left, right in zip(batches(0, 2, 2), batches(1, 2, 2), strict=True)
    ] == one
    assert batches(first=90) == one[90 * 3 :]


def test_one_source_is_the_stream_that_it_always_was() -> None:
    alone = mixture(7)
    assert drawn(alone, 30) == list(chain(*StepSampler(7, 3, 1, 0, 1, SEED, 0, 10)))
    assert (len(alone), alone[3], alone.describe()) == (7, ("s0 3", {"label": 3}), "")


def test_the_list_of_all_is_the_lists_one_after_another() -> None:
    sources = mixture(2, 1, 3)
    assert [path for path, _ in sources] == ["s0 0", "s0 1", "s1 0", "s2 0", "s2 1", "s2 2"]  # pyright: ignore[reportGeneralTypeIssues]
    assert [sources.at(index).key[-1] for index in range(6)] == list("001222")
    assert sources.describe() == (
        "33.3% of the samples from data.sources.s0 (2 files), 16.7% of the samples from "
        "data.sources.s1 "
        "(1 files), 50.0% of the samples from data.sources.s2 (3 files)"
    )


def test_a_source_that_would_give_nothing_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"data\.sources\.s1\.weight: gives it less than 1 of 1000 samples"
    ):
        mixture(4, 4, weights=(1, 1e-4)).stream(SEED)


def load(tmp_path: Path, data: dict[str, Any], *overrides: str) -> DataConfig:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"data": data}))
    return load_config(path, overrides).data


def test_sources_are_named_read_written_and_changed_by_their_names(tmp_path: Path) -> None:
    written = {
        "web": {"source": "w", "weight": 2, "value_range": [0, 9]},
        "own": {"source": "o", "weight": 1},
    }
    data = load(
        tmp_path,
        {"flip": True, "sources": written},
        "data.sources.own.weight=3",
        "data.sources.web.channels=[2, 0]",
    )
    assert data.sources == {
        "own": WeightedSourceConfig(source="o", weight=3),
        "web": WeightedSourceConfig(source="w", weight=2, value_range=(0, 9), channels=(2, 0)),
    }
    # whatever their order in the file
    assert list(data.by_name) == ["data.sources.own", "data.sources.web"]
    assert data.sixteen_bit
    config = PretrainConfig(data=data)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert list(DataConfig(source="alone").by_name.items()) == [
        ("data", DataConfig(source="alone"))
    ]
    assert "data.sources.NAME.weight = null" in describe(PretrainConfig)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            {"sources": {"a": {"sorce": "x"}}},
            r"unknown key data\.sources\.a\.sorce \(did you mean source\?\)",
        ),
        (
            {"sources": {"a": {"flip": True}}},
            r"unknown key data\.sources\.a\.flip \(did you mean data\.flip\?\)",
        ),
        (
            {"sources": {"a": {"weight": "much"}}},
            r"data\.sources\.a\.weight: 'much' is not a number, or null",
        ),
        ({"sources": {"a": 3}}, r"data\.sources\.a: must hold `key: value` lines"),
        ({"sources": [{"source": "x"}]}, r"data\.sources: must hold `key: value` lines"),
        (
            {"sources": {"a": {"source": "x", "weight": 0}}},
            r"data\.sources\.a\.weight: 0\.0 must be above 0",
        ),
        (
            {"sources": {"a": {"source": "x", "stride": 0}}},
            r"data\.sources\.a\.stride: 0 must be at least 1",
        ),
        (
            {"sources": {"a": {"source": "x", "weight": 1}, "b": {"source": "y"}}},
            r"sources\.a\.weight: 1\.0 give every source a weight",
        ),
        (
            {"source": "z", "sources": {"a": {"source": "x"}}},
            r"data\.source: z does not reach data\.sources",
        ),
        (
            {"stride": 2, "sources": {"a": {"source": "x"}}},
            r"data\.stride: 2 does not reach data\.sources",
        ),
        ({"axes": "HH"}, r"data\.axes: HH must hold H and W"),
        ({"axes": "TCH"}, r"data\.axes"),
        ({"axes": "ZTHW"}, r"data\.axes"),
        ({"axes": "THWN"}, r"data\.axes"),
        ({"channels": [0, -1]}, r"data\.channels"),
        ({"value_range": [3, 3]}, r"data\.value_range"),
        ({"value_range": [0, float("inf")]}, r"data\.value_range"),
    ],
)
def test_a_wrong_source_is_named_with_its_key(
    tmp_path: Path, data: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said) as error:
        load(tmp_path, data)
    assert "\n" not in str(error.value)


# A joint run: two videos of 16 frames, three pictures, two volumes of 16 bits. A frame or slice k
# is as bright as its number tells.
@pytest.fixture
def joint(tmp_path: Path) -> DataConfig:
    for name in ("videos", "pictures", "volumes"):
        (tmp_path / name).mkdir()
    for number in range(2):
        np.save(
            tmp_path / "videos" / f"{number}.npy",
            np.tile(np.arange(40, dtype=np.uint8)[:, None, None, None], (1, 30, 36, 3)),
        )
        slices = np.tile(np.arange(1000, 1040, dtype=np.int16)[:, None, None], (1, 20, 24))
        tifffile.imwrite(
            tmp_path / "volumes" / f"{number}.tif",
            np.stack([slices] * 3, axis=-1),
            photometric="rgb",
        )
    for number in range(3):
        Image.new("RGB", (50 + number, 40), (10 * number, 20, 30)).save(
            tmp_path / "pictures" / f"{number}.png"
        )
    return DataConfig(
        num_workers=0,
        flip=True,
        sources={
            "videos": WeightedSourceConfig(source=str(tmp_path / "videos"), stride=3, weight=2),
            "pictures": WeightedSourceConfig(source=str(tmp_path / "pictures"), weight=1),
            "volumes": WeightedSourceConfig(
                source=str(tmp_path / "volumes"), stride=5, value_range=(1000, 1255), weight=1
            ),
        },
    )


def dataset(data: DataConfig) -> ClipDataset:
    return ClipDataset(read_sources(data, 3), data, num_frames=4, height=16, width=16, seed=SEED)


def test_every_sample_is_read_as_its_source_says(joint: DataConfig) -> None:
    clips = dataset(joint)
    for epoch in range(4):
        for index in range(len(clips)):
            source, sample = clips.paths.at(index), clips[epoch, index]
            clip_THWC = sample.clips[0]
            assert clip_THWC.shape == (4, 16, 16, 3)
            assert clip_THWC.dtype == torch.uint16  # all of a run, since one source has 16 bits
            shown = clip_THWC.float().mean(dim=(1, 2)) / 257
            if source.key == "data.sources.pictures":
                assert shown.tolist() == [[10.0 * (index - source.first), 20, 30]] * 4
            else:
                stride = {"data.sources.videos": 3, "data.sources.volumes": 5}[source.key]
                assert (shown[1:] - shown[:-1]).round(decimals=3).unique().tolist() == [stride]


def test_without_a_range_the_clips_of_all_sources_have_eight_bits(joint: DataConfig) -> None:
    data = DataConfig(
        num_workers=0, sources={name: joint.sources[name] for name in ("videos", "pictures")}
    )
    assert {torch.stack(dataset(data)[0, index].clips).dtype for index in range(5)} == {torch.uint8}


def test_a_broken_file_is_replaced_within_its_source(joint: DataConfig) -> None:
    broken = Path(joint.sources["pictures"].source) / "1.png"
    broken.write_bytes(b"no picture")
    clips = dataset(joint)
    first = next(
        source.first for source in clips.paths.parts if source.key == "data.sources.pictures"
    )
    replaced = [clips[epoch, first + 1] for epoch in range(12)]
    assert {sample.index for sample in replaced} == {first, first + 2}
    assert all(
        set(sample.failures)
        == {Failure(str(broken), "pillow", "cannot identify image file 'the file'")}
        for sample in replaced
    )


def test_joint_batches_do_not_depend_on_workers_or_ranks(joint: DataConfig) -> None:
    def batches(
        num_workers: int, rank: int = 0, world_size: int = 1, micro_batch: int = 4
    ) -> list[Any]:
        data, clips = DataConfig(num_workers=num_workers, sources=joint.sources), dataset(joint)
        sampler = StepSampler(
            len(clips), micro_batch, 1, rank, world_size, SEED, 0, 4, clips.paths.stream(SEED)
        )
        return list(make_loader(clips, sampler, data))

    alone, helped, left, right = batches(0), batches(2), batches(0, 0, 2, 2), batches(2, 1, 2, 2)
    for one, other, *halves in zip(alone, helped, left, right, strict=True):
        for name in ("clip_BTHWC", "seeds_B", "index_B"):
            assert torch.equal(getattr(one, name), getattr(other, name))
            assert torch.equal(
                getattr(one, name), torch.cat([getattr(half, name) for half in halves])
            )
    assert len({clips for batch in alone for clips in batch.index_B.tolist()}) > 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"axes": "TCHW"},
            r"data\.source: no file can be used of the first 2: .*0\.npy: numpy: gives 30 "
            r"channels of 3 x 36 pixels, "
            r"model\.in_channels is 3; change it, data\.channels, or data\.axes",
        ),
        (
            {"axes": "THW"},
            r"0\.npy: numpy: the array has 4 axes \(40, 30, 36, 3\), data\.axes names THW",
        ),
        ({"channels": (0, 1)}, "gives 2 channels"),
        ({"channels": (0, 1, 7)}, r"has 3 channels, data\.channels asks for 7"),
    ],
)
def test_a_source_that_does_not_fit_the_model_is_refused_at_the_start(
    joint: DataConfig, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        read_sources(DataConfig(source=joint.sources["videos"].source, **change), 3)


def test_the_key_of_a_named_source_is_in_what_is_said_about_it(
    joint: DataConfig, tmp_path: Path
) -> None:
    def refused(model_channels: int = 3, **change: Any) -> str:
        sources = {
            "good": joint.sources["pictures"],
            "bad": WeightedSourceConfig(weight=1, **change),
        }
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            read_sources(DataConfig(sources=sources), model_channels)
        return str(error.value)

    assert refused(source="nowhere").startswith(
        "data.sources.bad.source: no such list file or folder: nowhere"
    )
    assert refused().startswith("data.sources.bad.source: (empty)")
    volumes = joint.sources["volumes"].source
    assert "data.sources.bad.source: no file can be used of the first 2: " in (
        said := refused(source=volumes)
    )
    assert "holds int16; set data.sources.bad.value_range" in said
    (tmp_path / "list").write_text("0.mp4")
    (tmp_path / "0.mp4").write_bytes(b"x")
    assert refused(source=str(tmp_path / "list"), root="nowhere").startswith(
        "data.sources.bad.root: no such folder: nowhere"
    )
    with pytest.raises(
        ValueError,
        match=r"data\.source: .*0\.mp4 is a video of 3 channels, model\.in_channels is 1; "
        r".*choose 1",
    ):
        read_sources(DataConfig(source=str(tmp_path / "list")), 1)
    assert len(read_sources(DataConfig(source=str(tmp_path / "list"), channels=(1,)), 1)) == 1


def test_one_broken_file_at_the_head_of_a_list_is_no_reason_to_refuse_it(joint: DataConfig) -> None:
    (Path(joint.sources["pictures"].source) / "0.png").write_bytes(b"no picture")
    assert len(read_sources(joint, 3)) == 7


def test_a_folder_of_files_without_classes_has_no_labels(joint: DataConfig) -> None:
    paths = read_annotations(SourceConfig(source=joint.sources["pictures"].source))
    assert [paths[i][1] for i in range(3)] == [{"label": -1}] * 3
    assert [Path(paths[i][0]).name for i in range(3)] == ["0.png", "1.png", "2.png"]


def test_a_folder_is_read_for_one_kind_of_file(tmp_path: Path) -> None:
    for name in (
        "ant/a.mp4",
        "ant/thumbnail.jpg",
        "ant/features.npy",
        "preview.png",
        "bee/deep/b.MOV",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    paths = read_annotations(SourceConfig(source=str(tmp_path)))
    assert [Path(paths[i][0]).name for i in range(len(paths))] == ["a.mp4", "b.MOV"]
    for name in ("ant/a.mp4", "bee/deep/b.MOV"):
        (tmp_path / name).unlink()
    with pytest.raises(
        ValueError,
        match=r"holds pictures and arrays \(\.jpg \.npy \.png\), name those to use in a list file",
    ):
        read_annotations(SourceConfig(source=str(tmp_path)))
    (tmp_path / "ant" / "features.npy").unlink()
    labels = read_annotations(SourceConfig(source=str(tmp_path))).label_M
    assert labels.tolist() == [0, -1]
