"""Which frames, which videos, which random numbers."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from video_mae.data.sampling import (
    ShardStream,
    StepSampler,
    epoch_order,
    sample_rng,
    sample_seed,
)
from video_mae.decoding.choices import clip_indices, dense_indices, part_indices, uniform_indices


def sampler(
    rank: int = 0,
    world_size: int = 1,
    micro_batch: int = 4,
    first: int = 0,
    last: int = 9,
    num_videos: int = 7,
) -> list:
    return list(
        StepSampler(
            num_videos, micro_batch, 3, rank, world_size, seed=5, first_step=first, last_step=last
        )
    )


def test_a_clip_starts_anywhere_it_fits_and_steps_by_the_stride():
    starts = set()
    for index in range(300):
        indices_T = clip_indices(30, 5, 4, sample_rng(0, 0, index, 0))
        assert indices_T.dtype == np.int64
        assert (np.diff(indices_T) == 4).all()
        starts.add(int(indices_T[0]))
    assert starts == set(range(30 - 5 * 4 + 1))


@pytest.mark.parametrize(
    ("num_video_frames", "expected"),
    [
        (1, [0, 0, 0, 0, 0]),
        (2, [0, 0, 0, 0, 0]),
        (4, [0, 3, 3, 3, 3]),
        (11, [0, 3, 6, 9, 9]),
        (15, [0, 3, 6, 9, 12]),
    ],
)
def test_a_short_video_starts_at_zero_and_stops_at_its_end(num_video_frames, expected):
    assert clip_indices(num_video_frames, 5, 3, sample_rng(0, 0, 0, 0)).tolist() == expected


def test_a_clip_of_one_frame_may_be_any_frame():
    assert {int(clip_indices(6, 1, 1, sample_rng(0, 0, i, 0))[0]) for i in range(200)} == set(
        range(6)
    )


def test_random_numbers_depend_on_seed_epoch_index_and_draw_alone():
    keys = list(itertools.product((0, 1, 2**32, 2**32 + 1, 2**63 - 1), (0, 1), (0, 1), (0, 1, 2)))
    seeds = [sample_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [sample_seed(*key) for key in keys]
    assert len({sample_rng(*key).random() for key in keys}) == len(keys)
    # Golden: a change here would change every run that resumes.
    assert sample_seed(0, 0, 0, 0) == 2094613214458313471
    assert epoch_order(1, 2, 6).tolist() == [0, 2, 1, 4, 5, 3]


def test_every_epoch_visits_every_video_once_in_its_own_order():
    positions = [key for batch in sampler(last=7) for key in batch]  # 7 steps x 12 = 12 epochs of 7
    for epoch in range(12):
        visited = positions[epoch * 7 : (epoch + 1) * 7]
        assert [e for e, _ in visited] == [epoch] * 7
        assert sorted(i for _, i in visited) == list(range(7))
    assert positions[:7] != [(0, i) for _, i in positions[7:14]]


def test_the_length_is_that_of_the_stream():
    micro_batches = StepSampler(7, 4, 3, 0, 1, seed=5, first_step=2, last_step=9)
    assert len(micro_batches) == len(list(micro_batches)) == 21
    assert list(micro_batches) == list(micro_batches)


def test_resuming_at_a_step_gives_the_tail_of_the_stream():
    for step in (0, 1, 4, 9):
        assert sampler(first=step) == sampler()[step * 3 :]


def test_two_ranks_share_the_micro_batches_of_one():
    one = sampler(micro_batch=4)
    two = [sampler(rank, 2, micro_batch=2) for rank in (0, 1)]
    assert [first + second for first, second in zip(*two, strict=True)] == one


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_a_step_has_the_same_videos_however_it_comes_apart(ranks, accumulation):
    """And so an epoch has each once: 90 videos, of which a step takes 72."""
    shares = []
    for rank in range(ranks):
        micro_batch = 72 // ranks // accumulation
        taken = list(StepSampler(90, micro_batch, accumulation, rank, ranks, 5, 0, 5))
        starts = range(0, len(taken), accumulation)
        shares.append([taken[start : start + accumulation] for start in starts])
    steps = [
        sorted(itertools.chain(*itertools.chain(*parts))) for parts in zip(*shares, strict=True)
    ]
    whole = list(StepSampler(90, 72, 1, 0, 1, 5, 0, 5))
    assert steps == [sorted(step) for step in whole]
    everything = [(epoch, index) for epoch in range(4) for index in range(90)]
    assert sorted(key for step in whole for key in step) == everything


def test_fewer_videos_than_a_micro_batch_come_again_in_the_next_epoch():
    assert [epoch for epoch, _ in sampler(num_videos=2, last=1)[0]] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("num_videos", "ranks", "micro_batch", "accumulation"),
    [(10, 2, 2, 1), (1000, 4, 8, 8), (12, 1, 3, 2), (7, 1, 1, 7)],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_dropped_last_batch_is_dropped_in_every_epoch_and_resumes_exactly(
    num_videos, ranks, micro_batch, accumulation, packed
):
    batch = ranks * micro_batch * accumulation
    steps_an_epoch, key_at = num_videos // batch, None
    if packed:
        key_at = ShardStream(
            [num_videos // 2, num_videos - num_videos // 2], num_videos // 4, 5
        ).key_at

    def micro_batches(rank: int, first_step: int) -> list:
        return list(
            StepSampler(
                num_videos,
                micro_batch,
                accumulation,
                rank,
                ranks,
                5,
                first_step,
                4 * steps_an_epoch,
                key_at,
                epoch_videos=steps_an_epoch * batch,
            )
        )

    of_rank = [micro_batches(rank, 0) for rank in range(ranks)]
    stream = [key for together in zip(*of_rank, strict=True) for some in together for key in some]
    for epoch in range(4):
        visited = stream[epoch * steps_an_epoch * batch : (epoch + 1) * steps_an_epoch * batch]
        assert {e for e, _ in visited} == {epoch}
        assert len({i for _, i in visited}) == len(visited) == num_videos // batch * batch
        if not packed:
            assert [i for _, i in visited] == epoch_order(5, epoch, num_videos)[
                : len(visited)
            ].tolist()
    for first_step in range(4 * steps_an_epoch + 1):
        assert micro_batches(0, first_step) == of_rank[0][first_step * accumulation :]


def test_a_dense_clip_has_the_published_indices():
    # 16 points from 0 to 64 are 64 / 15 = 4.27 apart; rounded down by hand.
    by_hand = [0, 4, 8, 12, 17, 21, 25, 29, 34, 38, 42, 46, 51, 55, 59, 63]
    # (101 - 64) // 2: the middle
    assert dense_indices(101, 16, 4).tolist() == [18 + index for index in by_hand]
    assert dense_indices(65, 16, 4, sample_rng(0, 0, 0, 0)).tolist() == by_hand  # one place only
    assert dense_indices(12, 1, 4).tolist() == [4]
    starts = {int(dense_indices(80, 16, 4, sample_rng(0, 0, index, 0))[0]) for index in range(300)}
    assert starts == set(range(80 - 64))


@pytest.mark.parametrize(
    ("num_video_frames", "expected"),
    [
        # 10 points from 0 to 40, 4.44 apart, then the last frame
        (40, [0, 4, 8, 13, 17, 22, 26, 31, 35, 39, 39, 39, 39, 39, 39, 39]),
        (64, [0, 4, 8, 12, 17, 21, 25, 29, 34, 38, 42, 46, 51, 55, 59, 63]),
        (9, [0, 8] + 14 * [8]),
        (3, 16 * [2]),
        (1, 16 * [0]),
    ],
)
def test_a_video_not_longer_than_a_dense_clip_repeats_its_last_frame(num_video_frames, expected):
    assert dense_indices(num_video_frames, 16, 4, sample_rng(0, 0, 0, 0)).tolist() == expected
    assert dense_indices(num_video_frames, 16, 4).tolist() == expected


def test_uniform_frames_are_one_of_each_equal_part():
    assert uniform_indices(80, 8).tolist() == [5, 15, 25, 35, 45, 55, 65, 75]
    # parts of 9.25 frames: 4.6, 13.9, 23.1, 32.4
    assert uniform_indices(37, 4).tolist() == [4, 13, 23, 32]
    assert uniform_indices(3, 8).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]  # parts of 0.375 frames
    drawn = np.stack([uniform_indices(80, 8, sample_rng(0, 0, index, 0)) for index in range(400)])
    for part in range(8):
        assert set(drawn[:, part].tolist()) == set(range(10 * part, 10 * part + 10))
    assert uniform_indices(1, 8, sample_rng(0, 0, 0, 0)).tolist() == 8 * [0]
    assert all(
        0 <= uniform_indices(n, 5, sample_rng(0, 0, n, 0)).min() <= uniform_indices(n, 5).max() < n
        for n in range(1, 40)
    )


def extreme(share: int) -> Any:
    """Stands for a generator whose every whole number is the smallest (0), or the largest (1), that
    it may be.
    """
    return SimpleNamespace(
        integers=lambda high, size=None: (
            share * (high - 1) if size is None else np.full(size, share * (high - 1))
        )
    )


@pytest.mark.parametrize("num_frames", [4, 16])
def test_parts_of_whole_frames_are_those_of_the_sources_for_every_length(num_frames):
    differing = 0
    for length in range(1, 301):
        part = length // num_frames
        if part:  # of each part: its first, its middle, its last frame
            low, middle, high = (
                [i * part + within for i in range(num_frames)]
                for within in (0, part // 2, part - 1)
            )
            first, every = (low, middle, high), (low, middle, high)
        else:
            first = 3 * ([0] * num_frames,)
            every = 3 * ([0] * (num_frames - length) + list(range(length)),)
        choices: Any = (("first", first), ("all", every))
        for short, expected in choices:
            drawn = [
                part_indices(length, num_frames, short, rng)
                for rng in (extreme(0), None, extreme(1))
            ]
            assert all(indices.dtype == np.int64 for indices in drawn)
            assert tuple(indices.tolist() for indices in drawn) == expected, (length, short)
        differing += length >= 5 and every[1] != uniform_indices(length, num_frames).tolist()
    assert num_frames != 16 or differing == 269  # of the 296 lengths from 5 to 300


def test_frames_drawn_of_whole_parts_are_all_of_them():
    drawn = np.stack(
        [part_indices(87, 8, "first", sample_rng(0, 0, index, 0)) for index in range(400)]
    )
    for part in range(8):
        # 80 to 86 are left over
        assert set(drawn[:, part].tolist()) == set(range(10 * part, 10 * part + 10))


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_a_clip_that_does_not_reach_the_end_is_that_of_videomae_for_every_length(stride):
    """Its frames count from 1; one moves on while the next is below the number of frames, not up to
    it.
    """
    differing = []
    for length in range(1, 301):
        free = max(length - 16 * stride, 0)
        for start, rng in ((0, extreme(0)), (free, extreme(1))):
            place, expected = start + 1, []
            for _ in range(16):
                expected.append(place - 1)
                place += stride if place + stride < length else 0
            assert clip_indices(length, 16, stride, rng, reach_end=False).tolist() == expected, (
                length,
                start,
            )
            if clip_indices(length, 16, stride, rng).tolist() != expected:
                differing.append(length)
    if stride == 1:  # of every video that its last clip is taken from
        assert set(differing) == set(range(2, 301))
        assert clip_indices(40, 16, 1, extreme(1), reach_end=False).tolist() == [*range(24, 39), 38]
    else:
        assert set(differing) == {
            length for length in range(2, 16 * stride) if length % stride == 1
        }
