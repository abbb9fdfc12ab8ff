"""The benchmark of the loader: the competing pipelines make the same clips, their stages are all of
their time, failures are rows.
"""

import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from video_mae.benchmark import data, pipelines
from video_mae.benchmark.clock import Stopwatch
from video_mae.benchmark.data import (
    DataBenchConfig,
    ask,
    make_record,
    measure,
    measure_task,
    tables,
)
from video_mae.benchmark.pipelines import (
    PIPELINES,
    STAGES,
    ClipTask,
    Pipeline,
    bare,
    ours,
    run_epoch,
)
from video_mae.benchmark.record import Results
from video_mae.config import IMAGENET_MEAN, IMAGENET_STD
from video_mae.data import ClipDataset, decode, read_annotations
from video_mae.data.augment import crop_clip
from video_mae.decoding import decoders
from video_mae.tools.demo import DemoConfig, make_demo_data

BY_NAME = {pipeline.name: pipeline for pipeline in PIPELINES}
OURS, (*_, OFFICIAL, PYTORCHVIDEO) = PIPELINES[0], PIPELINES
HERE = [pipeline for pipeline in PIPELINES if not decoders.problem(pipeline.decoder)]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> ClipTask:
    """7 videos in batches of 4: the last one is not full. 64 pixels wide: at 48 decord mistakes the
    padding of rows for a channel.
    """
    folder = tmp_path_factory.mktemp("data") / "videos"
    make_demo_data(
        folder, DemoConfig(train_clips=56, validation_clips=8, num_frames=16, height=48, width=64)
    )
    lines = (folder / "train.txt").read_text().splitlines()[::8]  # of seven photographs
    (folder / "seven.txt").write_text("".join(f"{line}\n" for line in lines))
    sources, _ = data.make_forms(str(folder / "seven.txt"), folder.parent, 3, ("video", "frames"))
    return ClipTask(sources, num_frames=4, stride=3, side=32, batch=4)


def clips_of(pipeline: Pipeline, task: ClipTask, epoch: int = 1) -> torch.Tensor:
    batches = list(pipeline.make(pipeline, task, epoch, Stopwatch()))
    expected = [1] * 7 if pipeline.make is bare else [4] * 7 if pipeline.crops == 4 else [4, 3]
    assert [num_clips for _, num_clips in batches] == expected
    pixels = [clips for clips, _ in batches]
    return torch.stack(pixels) if pipeline.make is bare else torch.cat(pixels)


@pytest.mark.parametrize(
    "pipeline",
    [row for row in HERE if row.make is ours and row.crop_where == "worker"],
    ids=lambda row: row.name,
)
def test_ours_is_the_data_set_that_trains(task, pipeline):
    config = pipeline.data(task)
    assert (config.source, config.clips_per_video) == (task.sources[pipeline.form], pipeline.crops)
    dataset = ClipDataset(read_annotations(config), config, 4, 32, 32, seed=0)
    clips = clips_of(pipeline, task, epoch=2)
    assert torch.equal(
        clips, torch.cat([torch.stack(dataset[2, index].clips) for index in range(7)])
    )
    if pipeline.form != "frames":  # of which other frames can be chosen
        plain = ClipDataset(read_annotations(OURS.data(task)), OURS.data(task), 4, 32, 32, seed=0)
        alike = torch.cat([torch.stack(plain[2, index].clips) for index in range(7)])
        # packing is a second compression
        assert (clips[:: pipeline.crops].float() - alike.float()).abs().mean() < 4


@pytest.mark.parametrize(
    "pipeline",
    [pipeline for pipeline in HERE if pipeline.make is bare],
    ids=lambda row: row.name,
)
def test_decoding_alone_reads_the_frames_that_ours_does(task, pipeline):
    frames = clips_of(pipeline, task, epoch=2)
    config = replace(OURS.data(task), crop="center")
    dataset = ClipDataset(read_annotations(config), config, 4, 48, 64, seed=0)
    assert (
        frames.float()
        - torch.cat([torch.stack(dataset[2, index].clips) for index in range(7)]).float()
    ).abs().mean() < 0.1


def test_the_official_pipeline_makes_our_clips_as_normalised_floats(task):
    ours, theirs = clips_of(OURS, task), clips_of(OFFICIAL, task)
    assert theirs.shape == (7, 3, 4, 32, 32)
    assert theirs.dtype == torch.float32
    mean, std = (
        torch.tensor(values)[:, None, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    values = ((theirs * std + mean) * 255).permute(0, 2, 3, 4, 1)
    assert (values - values.round()).abs().max() < 1e-3
    difference = (values - ours).abs()
    assert difference.max() <= 3  # two ways to round the weights of a resize
    assert difference.mean() < 0.3
    # other frames, other boxes
    assert (clips_of(OFFICIAL, task, epoch=3) - theirs).abs().max() > 0.5


def test_pytorchvideo_clips_are_normalised_frames_of_their_videos_in_order_of_time(
    task, monkeypatch
):
    clips = clips_of(PYTORCHVIDEO, task)
    assert clips.shape == (7, 3, 4, 32, 32)
    assert clips.dtype == torch.float32
    # other frames, other boxes
    assert (clips_of(PYTORCHVIDEO, task, epoch=2) - clips).abs().max() > 0.5
    monkeypatch.setattr(
        pipelines.v2,
        "RandomResizedCrop",
        lambda side, antialias: pipelines.v2.Resize((side, side), antialias=antialias),
    )
    mean, std = (
        torch.tensor(values)[:, None, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    values = ((clips_of(PYTORCHVIDEO, task) * std + mean) * 255).permute(0, 2, 3, 4, 1)
    videos = read_annotations(OURS.data(task))
    for index, clip_THWC in enumerate(values):
        frames_THWC = crop_clip(
            torch.from_numpy(decode(videos[index][0], np.arange)),
            (0, 0, 48, 64),
            (32, 32),
            flip=False,
        ).float()
        distance_TF = (clip_THWC[:, None] - frames_THWC[None]).abs().mean(dim=(2, 3, 4))
        nearest_T = distance_TF.argmin(dim=1)
        assert distance_TF.amin(dim=1).max() < 1
        assert (nearest_T.diff() > 0).all()
        # of the 12 frames that 4 frames with a stride of 3 span
        assert nearest_T[-1] - nearest_T[0] >= 10


@pytest.mark.parametrize(
    "pipeline",
    [OURS, BY_NAME["ours, packed frames, 4 crops"], BY_NAME["pyav alone"], OFFICIAL, PYTORCHVIDEO],
    ids=lambda row: row.name,
)
def test_stages_are_all_of_the_time(task, pipeline):
    shares = []
    for epoch in range(5):  # other processes may take the core between two laps
        start, watch = time.perf_counter(), Stopwatch()
        list(pipeline.make(pipeline, task, epoch, watch))
        parts = watch.parts()
        shares.append(sum(parts.values()) / 1e3 / (time.perf_counter() - start))
        made = {ours: {"decode", "crop", "collate"}, bare: {"decode"}}.get(
            pipeline.make, set(STAGES)
        )
        assert {stage for stage, milliseconds in parts.items() if milliseconds > 0} == made
    assert 0.85 < max(shares) <= 1


def test_all_are_measured_in_turn_in_processes_of_their_own(task):
    rows = [
        OURS,
        BY_NAME["ours, decord"],
        BY_NAME["ours, packed video, 4 crops on the device"],
        BY_NAME["decord alone"],
        OFFICIAL,
        PYTORCHVIDEO,
    ]
    records = measure_task(task, rows, 2, "7 videos", appetite=1000)
    assert [record.provider for record in records] == [row.name for row in rows]
    for record, row in zip(records, rows, strict=True):
        assert record.reason == ""
        assert (record.benchmark, record.op) == ("data", "loader")
        assert record.shape == "7 videos, clips of 4x32x32, stride 3, batches of 4"
        assert set(record.times) == {"clip", *STAGES}
        assert record.measures["clips_per_second"] == pytest.approx(
            1e3 / record.times["clip"].p50, rel=1e-6
        )
        assert 0 < float(record.measures["peak_mb"]) < 800
        assert "x official" in record.measures
        # pyav alone was not measured
        assert ("x alone" in record.measures) == (row.name == "ours, decord")
        assert row.make is bare or record.measures["gpu_cores"] == pytest.approx(
            record.times["clip"].p50
        )
    assert records[4].measures["x official"] == 1
    assert [record.dtype for record in records] == ["uint8"] * 4 + ["float32"] * 2
    assert [record.measures["bytes_a_clip"] for record in records] == [
        4 * size
        for size in (
            32 * 32 * 3,
            32 * 32 * 3,
            48 * 64 * 3 // 4,
            48 * 64 * 3,
            32 * 32 * 3 * 4,
            32 * 32 * 3 * 4,
        )
    ]
    (table,) = tables(Results({}, records))
    assert [row[0] for row in table.rows] == [row.name for row in rows]
    assert all(len(row) == len(table.columns) for row in table.rows)


@pytest.mark.usefixtures("quiet_process")
def test_a_library_that_is_missing_and_a_broken_video_are_rows_that_say_so(
    task, tmp_path, monkeypatch
):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"\x00\x00\x00\x20ftypisom" + bytes(100))
    (tmp_path / "list.txt").write_text(f"{broken}\n")
    unreadable = ClipTask({"plain": str(tmp_path / "list.txt")}, 4, 3, 32, 4)
    assert isinstance(run_epoch(OFFICIAL, unreadable, 0), str)
    monkeypatch.setitem(sys.modules, "pytorchvideo.data", None)
    reason = run_epoch(PYTORCHVIDEO, task, 0)
    assert isinstance(reason, str)
    assert "pytorchvideo.data" in reason
    record = make_record("7 videos", task, PYTORCHVIDEO, {PYTORCHVIDEO.name: reason}, 1000)
    (table,) = tables(Results({}, [record]))
    assert f"not available: {reason}" in table.text()


def test_a_process_that_dies_or_hangs_is_a_row_that_says_so(monkeypatch):
    context = get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        assert ask(pool, os._exit, 1) == "its process died"
    monkeypatch.setattr(data, "PATIENCE_SECONDS", 0.01)
    with ProcessPoolExecutor(1, context) as pool:
        assert ask(pool, time.sleep, 0.5) == "no answer for 0.01 seconds"


def test_a_source_may_be_named_and_without_one_videos_are_rendered(
    demo_folder, tmp_path, monkeypatch
):
    seen: list[tuple[ClipTask, str]] = []
    monkeypatch.setattr(
        data,
        "measure_task",
        lambda task, pipelines, rounds, name, appetite: seen.append((task, name)) or [],
    )
    rendered: list[Path] = []

    def render(folder: Path, config: object) -> None:
        rendered.append(folder)
        shutil.copytree(demo_folder, folder)

    monkeypatch.setattr(data, "make_demo_data", render)
    list(measure(DataBenchConfig(source=str(demo_folder / "val.txt"), rows=(OURS.name,))))
    list(measure(DataBenchConfig(side=112, rows=(OURS.name,))))
    assert (seen[0][0].sources, seen[0][1]) == (
        {"plain": str(demo_folder / "val.txt")},
        "8 videos of val.txt",
    )
    assert seen[1][0].sources["plain"] == str(rendered[0] / "train.txt")
    assert not rendered[0].exists()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(measure(DataBenchConfig(source=str(tmp_path / "nowhere"))))
    with pytest.raises(ValueError, match=r"^rows: none is no row; there are: ours; "):
        list(measure(DataBenchConfig(rows=("none",))))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rounds", 1),
        ("stride", 0),
        ("batch", 0),
        ("side", 0),
        ("num_frames", 0),
        ("output", ""),
        ("appetite", 0),
    ],
)
def test_settings_that_make_no_sense_are_refused(key, value):
    with pytest.raises(ValueError, match=f"^{key}: "):
        DataBenchConfig(**{key: value})
