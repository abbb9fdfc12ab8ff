"""Which frames of a video are wanted, as functions of how many it has.

They are called where the file is open, in the process that decodes: a choice is data, a `partial`
of a function of a module without torch, its random numbers included. T frames of a clip, S clips of
a video.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np

from video_mae.config.model import Sampling
from video_mae.decoding.media import Indices

Choose = Callable[[int], Indices]
"""From the number of frames of a video to the indices of the wanted ones, in any shape."""
Wanted = Choose | Indices | Sequence[int] | slice
"""A function that can be sent to another process; or the indices, from the end where negative."""


def is_sent(wanted: Wanted) -> bool:
    """Whether another process can be given it: not a lambda or a function of a script."""
    while isinstance(wanted, partial):
        wanted = wanted.func
    home, name = getattr(wanted, "__module__", ""), getattr(wanted, "__qualname__", "")
    return home != "__main__" and "<" not in name


def chosen(wanted: Wanted, num_video_frames: int) -> Indices:
    """The indices of the wanted frames. Raises: what the function does; IndexError."""
    if callable(wanted):
        return wanted(num_video_frames)
    return np.arange(num_video_frames)[wanted]


def clip_indices(
    num_video_frames: int,
    num_frames: int,
    stride: int,
    rng: np.random.Generator,
    *,
    reach_end: bool = True,
) -> Indices:
    """Frame indices [T] of a clip: a random start, then every stride-th frame; a short video starts
    at 0 and repeats its last step.

    Source: VideoMAE's pretraining sampler (start uniform in [0, num_video_frames - num_frames *
    stride]), which steps to no video's last frame: without reach_end a step that would land there
    repeats the one before it.
    """
    start = int(rng.integers(max(num_video_frames - num_frames * stride, 0) + 1))
    furthest = num_video_frames - (1 if reach_end else 2)
    last_step = max(furthest - start, 0) // stride
    return start + stride * np.minimum(np.arange(num_frames, dtype=np.int64), last_step)


def dense_indices(
    num_video_frames: int, num_frames: int, stride: int, rng: np.random.Generator | None = None
) -> Indices:
    """Frame indices [T] of a labelled clip: a random start, or the middle without rng, then on
    average every stride-th frame.

    T points spread evenly over num_frames * stride frames, both ends included, rounded down: 4 4
    ... 4 5 apart for 16 frames of stride 4. A video that is not longer gives its frames from the
    start on, spread likewise, and then repeats its last one. Source: VideoMAE's fine-tuning
    sampler.
    """
    length = num_frames * stride
    if num_video_frames > length:
        free = num_video_frames - length
        start = free // 2 if rng is None else int(rng.integers(free))
        return np.minimum(
            np.linspace(start, start + length, num_frames), start + length - 1
        ).astype(np.int64)
    shown = np.linspace(0, num_video_frames, num_video_frames // stride)
    return np.minimum(
        np.pad(shown, (0, num_frames - len(shown)), constant_values=num_video_frames),
        num_video_frames - 1,
    ).astype(np.int64)


def uniform_indices(
    num_video_frames: int, num_frames: int, rng: np.random.Generator | None = None
) -> Indices:
    """Frame indices [T]: one of each of T equal parts of the video, drawn, or the part's middle
    without rng.

    Where a part is shorter than a frame, frames repeat. Source: TSN (Wang et al., 2016), as
    VideoMAE reads Something-Something.
    """
    edges = np.arange(num_frames + 1) * (num_video_frames / num_frames)
    within = 0.5 if rng is None else rng.random(num_frames)
    return np.minimum(edges[:-1] + within * np.diff(edges), num_video_frames - 1).astype(np.int64)


def part_indices(
    num_video_frames: int,
    num_frames: int,
    short: Literal["first", "all"],
    rng: np.random.Generator | None = None,
) -> Indices:
    """Frame indices [T]: one of each of T parts of num_video_frames // T whole frames, drawn, or
    the part's middle without rng.

    What is left over at the end of the video is not seen. Of a video shorter than T frames: its
    first frame T times (short = first), or all of its frames, after as many copies of the first as
    are missing (all). Source: Something-Something as VideoMAE (first) and VideoMAE V2 (all) read it
    to train.
    """
    places_T, length = np.arange(num_frames, dtype=np.int64), num_video_frames // num_frames
    if length == 0:
        return (
            np.maximum(places_T - (num_frames - num_video_frames), 0)
            if short == "all"
            else np.zeros_like(places_T)
        )
    return places_T * length + (
        length // 2 if rng is None else rng.integers(length, size=num_frames)
    )


def view_indices(
    num_video_frames: int, num_frames: int, stride: int, num_clips: int, sampling: Sampling
) -> Indices:
    """Frame indices [S, T] of the clips of a test.

    dense: of every stride-th frame the T from number int(clip * (frames - T) / (S - 1)) on, the
    middle ones where S is 1; where there are fewer than T, the last repeats. All others: the video
    in T equal parts, and of each the frame at clip / S of its length, the middle one where S is 1:
    S interleaved sets. Source: the official test of VideoMAE on Kinetics and on
    Something-Something (published for S = 2), in integers, so that no rounding of floats moves a
    frame.
    """
    clips_S1 = np.arange(num_clips, dtype=np.int64)[:, None]
    places_T = np.arange(num_frames, dtype=np.int64)
    if sampling != "dense":
        parts, first_S1 = (num_clips, clips_S1) if num_clips > 1 else (2, clips_S1 + 1)
        return (places_T * parts + first_S1) * num_video_frames // (num_frames * parts)
    num_strided = -(-num_video_frames // stride)
    starts_S = spread(max(num_strided - num_frames, 0), num_clips)
    return stride * np.minimum(starts_S[:, None] + places_T, num_strided - 1)


def spread(free: int, num: int) -> Indices:
    """`num` starts from 0 to `free`, evenly spread and rounded down; the middle where it is one."""
    if num == 1:
        return np.array([free // 2], dtype=np.int64)
    return np.arange(num, dtype=np.int64) * free // (num - 1)


def window_indices(num_video_frames: int, num_frames: int, stride: int, hop: int) -> Indices:
    """Frame indices [S, T] of clips along a video: one every `hop` frames, until a clip reaches its
    end, beyond which the last frame repeats; no frame is left out where hop <= num_frames * stride.
    """
    num_clips = 1 + -(-max(num_video_frames - num_frames * stride, 0) // hop)
    starts_S1 = np.arange(num_clips, dtype=np.int64)[:, None] * hop
    places_T = np.arange(num_frames, dtype=np.int64)
    return np.minimum(starts_S1 + places_T * stride, num_video_frames - 1)


def first_middle_last(num_video_frames: int) -> Indices:
    """The indices of three frames, or fewer where there are fewer."""
    return np.unique([0, num_video_frames // 2, num_video_frames - 1])
