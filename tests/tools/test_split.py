"""Lists to train, validate and test on: shares of each class, whole groups, the input as it was."""

from collections import Counter
from pathlib import Path

import pytest

from video_mae.cli import main
from video_mae.config.data import SourceConfig
from video_mae.data.videos import read_annotations, read_labeled

PARTS = ("train", "validation", "test")


def status(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def parts_of(folder: Path) -> dict[str, list[tuple[str, int]]]:
    found = {}
    for part in PARTS:
        videos = read_annotations(SourceConfig(source=str(folder / f"{part}.txt")))
        found[part] = [(str(path), info["label"]) for path, info in videos]
    return found


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """A folder of classes of 40, 20 and 5 videos, of five people who do each."""
    for name, number in (("run fast", 40), ("swim", 20), ("fly", 5)):
        for video in range(number):
            path = tmp_path / "videos" / name / f"{name}_g{video % 5:02}_c{video}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    return tmp_path / "videos"


def test_each_list_has_its_share_of_every_class(
    classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(classes.rglob("*"))
    assert status("split", classes) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in told] == [
        ["52", "videos"],
        ["7", "videos"],
        ["6", "videos"],
    ]
    assert sorted(classes.rglob("*")) == before
    parts = parts_of(tmp_path / "videos_split")
    everything = [path for part in parts.values() for path, _ in part]
    assert sorted(everything) == sorted(str(path) for path in before if path.is_file())
    # labels of the folder are by name: fly, run fast, swim
    for part, share in zip(PARTS, (0.8, 0.1, 0.1), strict=True):
        counts = Counter(label for _, label in parts[part])
        for label, total in enumerate((5, 40, 20)):
            assert abs(counts[label] - share * total) <= 1
    names = read_labeled("x", str(tmp_path / "videos_split" / "test.txt")).class_names
    assert names == ("fly", "run fast", "swim")
    assert status("split", classes) == 2
    assert "exists; choose another" in capsys.readouterr().err


def test_the_seed_is_all_that_is_drawn(classes: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert status("split", classes, f"output={tmp_path / name}", f"seed={seed}") == 0
    first, same, other = (parts_of(tmp_path / name) for name in "abc")
    assert first == same
    assert first != other


def test_a_group_is_in_one_list(classes: Path, tmp_path: Path) -> None:
    words = [r"group=_g(\d+)_", "shares=[3, 1, 1]", f"output={tmp_path / 'out'}"]
    assert status("split", classes, *words) == 0
    parts = parts_of(tmp_path / "out")
    people = {
        part: {Path(path).name.split("_g")[1][:2] for path, _ in parts[part]} for part in PARTS
    }
    assert [len(people[part]) for part in PARTS] == [3, 1, 1]
    assert len(set.union(*people.values())) == 5


def test_a_column_of_a_list_can_be_the_group(classes: Path, tmp_path: Path) -> None:
    rows = ["path,label,person"]
    for number, path in enumerate(sorted(classes.rglob("*.mp4"))):
        rows.append(f"{path},{number % 2},{'anna' if number % 3 else 'ben'}")
    (tmp_path / "list.csv").write_text("\r\n".join([*rows, ""]))
    text = (tmp_path / "list.csv").read_bytes()
    assert status("split", tmp_path / "list.csv", "group=,([^,]*)$", "shares=[2, 1, 0]") == 0
    assert (tmp_path / "list.csv").read_bytes() == text
    lists = tmp_path / "list.csv_split"
    anna, ben = ((lists / f"{part}.txt").read_text().splitlines() for part in PARTS[:2])
    assert (len(anna), len(ben)) == (43, 22)
    assert not (lists / "test.txt").read_text()
    person_of = {row.split(",")[0]: row.split(",")[2] for row in rows}
    assert {person_of[line.rsplit(" ", 1)[0]] for line in ben} == {"ben"}
    assert not (lists / "classes.txt").exists()


def test_mistakes_are_one_line_and_write_nothing(
    classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'none.mp4'} 0\n")
    for words, said in (
        ((classes, "group=(g"), "group: (g is wrong as a pattern: missing )"),
        ((classes, "group=person"), "group: person is not found in "),
        ((classes, "shares=[1, 2]"), "shares: "),
        ((classes, "shares=[0, 0, 0]"), "shares: [0.0, 0.0, 0.0] must not all be 0"),
        ((classes, "shares=[2, -1, 0]"), "shares: (2.0, -1.0, 0.0) must be at least 0"),
        ((tmp_path / "list.txt",), "list.txt:1: "),
        ((tmp_path / "none",), "no such list file or folder"),
    ):
        assert status("split", *words) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"videos", "list.txt"}
