"""Who is named where ranks stand still, from what they have told."""

import os
import threading
import time
from pathlib import Path

import pytest

from video_mae.training.heartbeat import Progress, _Watch, heartbeat


class LeftError(Exception):
    pass


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Watch:
    """Of rank 0 of three, in a folder where an earlier start has stalled."""
    (tmp_path / ".heartbeats").mkdir()
    for rank in (1, 2):
        tell(tmp_path / ".heartbeats" / f"rank_{rank}", 9, 999, "reading", -100)
    for name, value in {"RANK": 0, "WORLD_SIZE": 3, "LOCAL_RANK": 0, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "here")
    watch = _Watch(tmp_path, 30)

    def leave(line: str, teller: int = 0) -> None:
        raise LeftError(f"{teller}: {line}")

    monkeypatch.setattr(watch, "leave", leave)
    watch.doubts = 1  # what it sees it sees for the second time
    return watch


def tell(file: Path, moves: int, seconds: int, stage: str, ago: float) -> None:
    """A beat, so many seconds after (before) now."""
    rank = file.name.removeprefix("rank_")
    file.write_text(f"{moves} {seconds} rank {rank} (host, process 7): {stage} since then")
    os.utime(file, (time.time() + ago, time.time() + ago))


def test_ranks_that_beat_and_move_are_left_alone(watch: _Watch) -> None:
    watch.look()  # the others have not begun, and have time
    for moves, ago in ((5, 20), (9, 49)):
        for rank, file in enumerate(watch.files):
            tell(file, moves + rank, 29, "forward", ago)
        watch.look()


@pytest.mark.parametrize("text", ["\0" * 60, "5", "5 x rank 1", ""])
def test_half_a_text_is_no_sign_of_death_and_ends_no_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """As a network disk may give, of a file that is just written."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "here")
    beats = tmp_path / ".heartbeats"
    with heartbeat(tmp_path, 30):
        (watching,) = [one for one in threading.enumerate() if "beat" in one.name]
        tell(beats / "rank_1", 5, 1, "forward", 1)
        (beats / "rank_1").write_text(text)
        os.utime(beats / "rank_1", (time.time() + 1, time.time() + 1))
        time.sleep(2.5)
        assert watching.is_alive()


def test_a_rank_that_is_not_heard_is_named(watch: _Watch) -> None:
    tell(watch.files[0], 5, 31, "all-reduce", 40)
    tell(watch.files[1], 5, 3, "all-reduce", 8)
    tell(watch.files[2], 5, 31, "all-reduce", 40)
    with pytest.raises(
        LeftError, match=r"^0: rank 1 .host, process 7.: all-reduce since then; no sign"
    ):
        watch.look()


def test_a_clock_that_jumps_is_no_death_where_the_others_are_heard_soon(watch: _Watch) -> None:
    """Or a machine that was suspended for an hour: this rank wakes up first."""
    watch.doubts = 0
    tell(watch.files[0], 5, 3, "forward", 3600)
    tell(watch.files[1], 5, 3, "forward", 3600)
    tell(watch.files[2], 4, 3, "forward", 8)
    watch.look()
    tell(watch.files[2], 4, 4, "forward", 3601)
    watch.look()
    tell(watch.files[0], 5, 5, "forward", 7200)
    watch.look()
    with pytest.raises(LeftError, match=r"^0: rank 2 .*; no sign of life"):
        watch.look()


def test_the_first_that_lives_tells_and_who_has_not_begun_is_told(watch: _Watch) -> None:
    tell(watch.files[0], 5, 0, "all-reduce", 40)
    tell(watch.files[2], 5, 0, "all-reduce", 40)
    with pytest.raises(LeftError, match=r"^0: rank 1: has not begun; no sign of life since"):
        watch.look()
    watch.rank = 2
    tell(watch.files[2], 5, 0, "all-reduce", 80)
    tell(watch.files[1], 5, 0, "all-reduce", 80)
    with pytest.raises(LeftError, match=r"^1: rank 0 .host, process 7.: all-reduce"):
        watch.look()


def test_a_rank_that_the_others_wait_for_is_named(watch: _Watch) -> None:
    tell(watch.files[0], 8, 31, "all-reduce", 40)
    tell(watch.files[1], 8, 31, "all-reduce", 40)
    tell(watch.files[2], 6, 32, "reading", 40)
    with pytest.raises(LeftError, match=r"^0: rank 2 .host, process 7.: reading since then$"):
        watch.look()


def test_a_save_and_what_others_wait_for_meanwhile_takes_its_time(watch: _Watch) -> None:
    tell(watch.files[0], 6, 0, "saving", 400)
    tell(watch.files[1], 8, 390, "all-reduce", 400)
    tell(watch.files[2], 8, 390, "all-reduce", 400)
    watch.look()


def test_a_rank_that_is_gone_is_named_once_no_other_is_behind_it(watch: _Watch) -> None:
    tell(watch.files[0], 6, 0, "saving", 400)
    tell(watch.files[1], 8, 390, "all-reduce", 400)
    tell(watch.files[2], 8, 3, "all-reduce", 40)
    watch.look()
    tell(watch.files[0], 8, 0, "all-reduce", 400)
    watch.look()
    with pytest.raises(LeftError, match=r"^0: rank 2 .*: all-reduce since then; no sign of life"):
        watch.look()


def test_only_stages_of_a_step_are_timed_and_not_what_the_first_one_compiles(
    watch: _Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress, told = Progress(), []
    monkeypatch.setattr("video_mae.training.heartbeat.progress", progress)
    for step in (0, 1):
        progress.step = step
        for stage in ("reading", "forward", "all-reduce", "saving", "measuring"):
            progress.begin(stage)
            watch.tell()
            seconds = float(watch.files[0].read_text().split()[1])
            told.append((progress.stage, seconds > 0))
    assert told == [
        ("reading", True),
        *[("start", False)] * 4,
        ("reading", True),
        ("forward", True),
        ("all-reduce", True),
        ("saving", False),
        ("measuring", False),
    ]
