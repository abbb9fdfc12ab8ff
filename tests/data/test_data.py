"""From video files to batches: decoding, substitutes, workers, ranks."""

import contextlib
import multiprocessing
import os
import pickle
import subprocess
import threading
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from video_mae.config import DataConfig
from video_mae.data import (
    Batch,
    ClipDataset,
    StepSampler,
    VideoDecodeError,
    clip_indices,
    decode,
    make_loader,
    read_annotations,
)
from video_mae.data.dataset import UndecodableError
from video_mae.data.sampling import sample_seed
from video_mae.decoding.choices import uniform_indices

VIDEOS = Path(__file__).resolve().parents[3] / "shared" / "videos"
needs_videos = pytest.mark.skipif(
    not VIDEOS.is_dir(), reason="the collection of real and broken videos is not here"
)
BRIGHTNESS_STEP = 5  # of one frame to the next


def render(path: Path, num_frames: int, height: int = 48, width: int = 64) -> Path:
    """An H.264 clip whose frame i has the gray value 20 + 5 * i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "10", "g": "12"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(num_frames):
            picture = np.full((height, width, 3), 20 + BRIGHTNESS_STEP * index, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def frames_shown(clip_THWC: np.ndarray | torch.Tensor) -> list[int]:
    return [
        round((float(frame.reshape(-1).max()) - 20) / BRIGHTNESS_STEP)
        for frame in np.asarray(clip_THWC)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six good clips of 1, 2, 9, 20, 30, 40 frames, and one that is cut off."""
    root = tmp_path_factory.mktemp("videos")
    for num_frames in (1, 2, 9, 20, 30, 40):
        render(root / f"clip of {num_frames}.mp4", num_frames)
    whole = (root / "clip of 40.mp4").read_bytes()
    (root / "broken.mp4").write_bytes(whole[: len(whole) // 2])
    return root


def write_list(path: Path, *lines: str) -> DataConfig:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return DataConfig(source=str(path), stride=2, num_workers=0)


@pytest.fixture
def data(folder: Path) -> DataConfig:
    return write_list(
        folder / "all.txt", *(f"clip of {n}.mp4 {n}" for n in (1, 2, 9, 20, 30, 40)), "broken.mp4 7"
    )


def dataset(data: DataConfig, seed: int = 3) -> ClipDataset:
    return ClipDataset(read_annotations(data), data, num_frames=4, height=32, width=32, seed=seed)


def test_exactly_the_wanted_frames_are_read_in_the_wanted_order(folder):
    wanted = np.array([39, 0, 13, 13, 25, 1])
    clip_THWC = decode(str(folder / "clip of 40.mp4"), wanted)
    assert clip_THWC.shape == (6, 48, 64, 3)
    assert clip_THWC.dtype == np.uint8
    assert frames_shown(clip_THWC) == wanted.tolist()
    assert frames_shown(decode(str(folder / "clip of 2.mp4"), np.arange)) == [0, 1]


@pytest.mark.parametrize(("height", "width"), [(48, 48), (32, 34), (50, 50), (64, 16), (64, 66)])
def test_rows_that_the_decoder_pads_are_read_right(tmp_path: Path, height: int, width: int) -> None:
    path = tmp_path / "ramp.mp4"
    ramp_HWC = np.broadcast_to(
        np.linspace(0, 255, width)[None, :, None], (height, width, 3)
    ).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        container.mux(
            stream.encode(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(ramp_HWC), format="rgb24")
            )
        )
        container.mux(stream.encode())
    frame_HWC = decode(str(path), [0])[0]
    assert frame_HWC.shape == ramp_HWC.shape
    assert np.abs(frame_HWC.astype(int) - ramp_HWC).max() <= 6  # colour conversion and compression


def test_what_is_no_video_is_refused_with_path_decoder_and_reason(folder, tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is not a video\n")
    (tmp_path / "playlist.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{folder}/clip of 40.mp4\n")
    os.mkfifo(tmp_path / "pipe.mp4")
    for path, reason in (
        (folder / "broken.mp4", "cut off"),
        (tmp_path / "empty.mp4", "empty"),
        (tmp_path / "text.mp4", "container"),
        (tmp_path / "playlist.mp4", "container"),
        (tmp_path / "pipe.mp4", "regular"),
        (tmp_path, "regular"),
        (tmp_path / "absent.mp4", "No such file"),
    ):
        with pytest.raises(VideoDecodeError, match=reason) as caught:
            decode(str(path), np.arange)
        copy = pickle.loads(pickle.dumps(caught.value))
        assert (copy.path, copy.decoder, copy.reason) == (str(path), "pyav", caught.value.reason)
        assert "\n" not in str(copy)


def test_an_error_of_the_caller_is_not_called_a_broken_video(folder):
    with pytest.raises(ZeroDivisionError):
        decode(str(folder / "clip of 2.mp4"), partial(uniform_indices, num_frames=0))


@needs_videos
def test_every_broken_file_raises_or_decodes_and_never_in_part():
    decoded, reasons = set(), []
    for path in sorted((VIDEOS / "broken").iterdir()):
        try:
            decode(str(path), np.arange)
            decoded.add(path.name)
        except VideoDecodeError as error:
            reasons.append(error.reason)
    assert all(5 < len(reason) < 201 for reason in reasons)
    assert not any(
        word in reason
        for reason in reasons
        for word in ("\n", ".cc:", "Stack trace", "Check failed", str(VIDEOS))
    )
    # The first two have damaged bits that the codec conceals, with all frames there; the third is
    # whole.
    assert decoded == {"flip_mp4_03.mp4", "noise.mp4", "unordered.mov"}


@needs_videos
def test_every_real_file_gives_clips():
    for path in sorted((VIDEOS / "real").iterdir()):
        assert (
            len(
                decode(
                    str(path),
                    partial(clip_indices, num_frames=16, stride=4, rng=np.random.default_rng(0)),
                )
            )
            == 16
        )


def test_a_sample_shows_the_frames_its_random_numbers_choose(data):
    sample = dataset(data)[2, 5]
    shown = frames_shown(sample.clips[0])
    assert shown[0] + 6 == shown[3] <= 39
    assert (sample.label, sample.index, sample.failures) == (40, 5, ())
    assert sample.seeds_R.tolist() == [sample_seed(3, 2, 5, 0)]
    assert torch.equal(torch.stack(sample.clips), torch.stack(dataset(data)[2, 5].clips))
    assert len({tuple(frames_shown(dataset(data)[epoch, 5].clips[0])) for epoch in range(8)}) > 3
    assert [frames_shown(dataset(data)[0, short].clips[0]) for short in (0, 1)] == [
        [0, 0, 0, 0],
        [0, 0, 0, 0],
    ]


def test_crops_of_a_video_share_frames_and_differ_in_box_and_mask(tmp_path):
    path = tmp_path / "noise.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        picture = np.random.default_rng(0).integers(256, size=(48, 64, 3), dtype=np.uint8)
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    config = DataConfig(source=str(tmp_path / "list"), clips_per_video=5, flip=True, stride=1)
    (tmp_path / "list").write_text("noise.mp4")
    sample = dataset(config)[0, 0]
    assert torch.stack(sample.clips).shape == (5, 4, 32, 32, 3)
    assert len(set(sample.seeds_R.tolist())) == 5
    assert len({clip.numpy().tobytes() for clip in torch.stack(sample.clips)}) >= 4
    assert torch.equal(
        sample.clips[0],
        dataset(DataConfig(source=config.source, flip=True, stride=1))[0, 0].clips[0],
    )


def test_a_broken_video_gives_way_to_the_same_other_video_each_time(data):
    first, again = dataset(data)[1, 6], dataset(data)[1, 6]
    assert first.index != 6
    assert first.label == (1, 2, 9, 20, 30, 40)[first.index]
    assert Path(first.failures[0].path).name == "broken.mp4"
    assert "cut off" in first.failures[0].reason
    assert (first.index, first.failures) == (again.index, again.failures)
    assert torch.equal(torch.stack(first.clips), torch.stack(again.clips))
    assert len({dataset(data)[epoch, 6].index for epoch in range(12)}) > 2
    # The mask belongs to the place in the stream, whichever video fills it.
    assert first.seeds_R.tolist() == [sample_seed(3, 1, 6, 0)]


def test_a_list_of_broken_videos_ends_the_run_with_a_reason(folder):
    with pytest.raises(
        UndecodableError,
        match=r"data\.source: 20 videos in a row .*broken\.mp4: pyav: the file is cut off",
    ):
        dataset(write_list(folder / "broken.txt", "broken.mp4 0"))[0, 0]


def batches(
    data: DataConfig, rank: int = 0, world_size: int = 1, micro_batch: int = 4, first_step: int = 0
) -> list[Batch]:
    clips = dataset(data)
    return list(
        make_loader(
            clips, StepSampler(len(clips), micro_batch, 2, rank, world_size, 3, first_step, 3), data
        )
    )


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.failures == other.failures
        for name in ("clip_BTHWC", "seeds_B", "label_B", "index_B"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def with_workers(data: DataConfig, num_workers: int) -> DataConfig:
    return DataConfig(
        source=data.source, stride=data.stride, clips_per_video=2, num_workers=num_workers
    )


def test_batches_do_not_depend_on_workers_and_resume_where_they_stopped(data):
    alone, helped = (batches(with_workers(data, n)) for n in (0, 2))
    assert alone[0].clip_BTHWC.shape == (8, 4, 32, 32, 3)
    assert (alone[0].clip_BTHWC.dtype, alone[0].seeds_B.dtype, alone[0].label_B.dtype) == (
        torch.uint8,
        torch.int64,
        torch.int64,
    )
    assert alone[0].index_B[::2].equal(alone[0].index_B[1::2])
    assert_same(alone, helped)
    assert_same(batches(with_workers(data, 2), first_step=1), alone[2:])
    assert any(batch.failures for batch in alone)


def test_two_ranks_read_what_one_would(data):
    one, first, second = batches(data), *(batches(data, rank, 2, micro_batch=2) for rank in (0, 1))
    for whole, left, right in zip(one, first, second, strict=True):
        assert torch.equal(whole.clip_BTHWC, torch.cat([left.clip_BTHWC, right.clip_BTHWC]))
        assert torch.equal(whole.seeds_B, torch.cat([left.seeds_B, right.seeds_B]))


def test_a_batch_moves_to_a_device_and_keeps_its_failures(data):
    batch = next(batch for batch in batches(data) if batch.failures)
    moved = batch.to("cpu")
    assert_same([batch], [moved])
    assert batch.to("meta").clip_BTHWC.is_meta


def test_workers_survive_the_signals_of_others_and_leave_with_the_trainer(data):
    clips = dataset(with_workers(data, 1))
    loader = iter(make_loader(clips, StepSampler(len(clips), 4, 2, 0, 1, 3, 0, 8), clips.data))
    next(loader)
    (worker,) = multiprocessing.active_children()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    subprocess.run(["kill", "-INT", str(worker.pid)], check=True)
    assert len(list(loader)) == 15
    worker.terminate()
    worker.join(timeout=10)
    assert worker.exitcode == 0


def test_decoding_leaves_no_thread_and_no_file_open(folder):
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    decode(str(folder / "clip of 9.mp4"), np.arange)
    for path in ("clip of 9.mp4", "broken.mp4"):
        before = count()
        for _ in range(12):
            with contextlib.suppress(VideoDecodeError):
                decode(str(folder / path), np.arange)
        assert count() <= before
    assert threading.active_count() < 10
