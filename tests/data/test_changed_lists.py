"""A run belongs to its lists: another one under the same name is refused, or let in and told; the
results of a test likewise.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from video_mae.cli import main
from video_mae.config import DataConfig, FinetuneConfig, PretrainConfig
from video_mae.config.data import SourceConfig, WeightedSourceConfig
from video_mae.config.schema import to_dict
from video_mae.data import read_annotations, read_sources
from video_mae.files import read_jsonl
from video_mae.results import check_results, write_metrics
from video_mae.tools.pack import PackConfig
from video_mae.tools.pack import start as pack
from video_mae.training.finetune import prepare as prepare_finetuning
from video_mae.training.finetune import run as finetune
from video_mae.training.loop import DONE
from video_mae.training.pretrain import Pretraining, prepare, run
from video_mae.training.run_folder import LISTS_FILE

pytestmark = [pytest.mark.trains_here, pytest.mark.usefixtures("quiet_process")]


@pytest.fixture
def listed(demo_folder: Path, tmp_path: Path) -> Path:
    """A list of 6 videos, to be changed."""
    lines = [
        str(demo_folder / line) for line in (demo_folder / "train.txt").read_text().splitlines()[:6]
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "list.txt"


def digest(source: Path | str) -> str:
    return read_annotations(SourceConfig(source=str(source))).digest()


def test_a_digest_is_of_the_paths_and_labels_in_their_order(listed: Path) -> None:
    before, lines = digest(listed), listed.read_text().splitlines()
    listed.write_bytes(
        "\r\n\r\n".join(line.replace(" ", "\t") for line in lines).encode("utf-8-sig")
    )
    assert digest(listed) == before  # written otherwise, it says the same
    assert digest(listed.rename(listed.with_name("other.txt"))) == before
    first, second, *rest = lines
    path, label = first.rsplit(" ", 1)
    relabelled = f"{path} {int(label) + 1}"
    for other in (
        [second, first, *rest],
        [relabelled, second, *rest],
        [second, *rest],
        [first, *lines],
        [path, second, *rest],
    ):
        listed.write_text("\n".join(other))
        assert digest(listed) != before


def test_paths_cannot_be_moved_from_one_to_the_next_unseen(tmp_path: Path) -> None:
    for name in ("a", "ab", "b", "bb"):
        (tmp_path / name).touch()
    (tmp_path / "1").write_text("ab\nb\n")
    (tmp_path / "2").write_text("a\nbb\n")
    assert digest(tmp_path / "1") != digest(tmp_path / "2")


def test_a_packed_folder_is_known_by_its_rows_wherever_it_lies(
    listed: Path, tmp_path: Path
) -> None:
    assert (
        pack(str(listed), str(tmp_path / "packed"), PackConfig(num_workers=1, short_side=16))
        == DONE
    )
    shutil.copytree(tmp_path / "packed", tmp_path / "copy")
    before = digest(tmp_path / "packed")
    assert digest(tmp_path / "copy") == digest(f"file://{tmp_path / 'copy'}") == before
    listed.write_text("\n".join(listed.read_text().splitlines()[::-1]))
    assert (
        pack(str(listed), str(tmp_path / "other"), PackConfig(num_workers=1, short_side=16)) == DONE
    )
    assert digest(tmp_path / "other") != before


def test_another_list_of_the_same_name_is_refused_or_let_in_and_told(
    listed: Path, tiny: Callable[..., PretrainConfig]
) -> None:
    config = tiny(f"data.source={listed}", "optim.steps=2")
    folder, lines = Path(config.output), listed.read_text().splitlines()
    assert run(prepare(config)) == DONE
    listed.write_text("\n".join(lines) + "\n\n")
    prepare(config)
    listed.write_text("\n".join(lines[:5]))
    with pytest.raises(
        ValueError,
        match=r"run: data\.source is another list than that of this run \(it had 6 videos, and "
        r"has 5, of other "
        r"paths, labels or order\); put the list back, set data\.allow_changed_list=true to go "
        r"on with "
        r"this one, or choose another output",
    ):
        prepare(config)
    allowed = tiny(f"data.source={listed}", "optim.steps=2", "data.allow_changed_list=true")
    assert run(prepare(allowed)) == DONE
    assert (
        "data.source is another list than that of this run (it had 6 videos, and has 5,"
        in (folder / "log.txt").read_text()
    )
    prepare(config)  # now it is the run's
    listed.write_text("\n".join(lines[::-1]))
    (folder / LISTS_FILE).rename(folder / "kept")
    prepare(config)  # an earlier version recorded none
    (folder / LISTS_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"lists\.json: is not readable; remove it"):
        prepare(config)
    (folder / "kept").rename(folder / LISTS_FILE)
    shutil.rmtree(folder / "checkpoints")
    prepare(config)  # nothing was learned from the other


def test_a_file_that_is_gone_when_a_run_goes_on_is_bad_as_in_the_run_itself(
    listed: Path,
    tiny: Callable[..., PretrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "videos").mkdir()
    lines, victim = [], tmp_path / "videos" / "2.mp4"
    for number, line in enumerate(listed.read_text().splitlines()):
        path, label = line.rsplit(" ", 1)
        shutil.copy(path, victim.with_name(f"{number}.mp4"))
        lines.append(f"videos/{number}.mp4 {label}")
    listed.write_text("\n".join(lines))
    config = tiny(
        f"data.source={listed}",
        "data.max_bad_share=0.5",
        "optim.steps=6",
        "journal.checkpoint_interval=2",
        "journal.keep_checkpoints=5",
    )
    folder, after = Path(config.output), Pretraining.after

    def vanish(self: Pretraining, done: int) -> None:
        after(self, done)
        if done == 2:
            victim.unlink()

    monkeypatch.setattr(Pretraining, "after", vanish)
    assert run(prepare(config)) == DONE
    monkeypatch.undo()
    before = (folder / "model" / "model.safetensors").read_bytes()
    with pytest.raises(FileNotFoundError, match=r"list\.txt:3: no such file"):
        prepare(replace(config, output=str(tmp_path / "new")))

    for step in (4, 6):  # as if it had been killed after step 2
        shutil.rmtree(folder / "checkpoints" / f"step_{step:08d}")
    shutil.rmtree(folder / "model")
    (folder / "quarantine.jsonl").unlink()
    assert run(prepare(config)) == DONE
    assert (folder / "model" / "model.safetensors").read_bytes() == before
    said = (folder / "log.txt").read_text()
    assert "resumed after step 2" in said
    assert f"{listed}:3: no such file: {victim}" in said
    assert "what is gone counts as bad" in said
    bad = [Path(line["path"]).name for line in read_jsonl(folder / "quarantine.jsonl")]
    assert bad == ["2.mp4"]


def test_the_root_of_relative_paths_may_be_given_later_where_the_paths_stay(
    listed: Path, tiny: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    path = listed.read_text().splitlines()[0].rsplit(" ", 1)[0]
    shutil.copy(path, tmp_path / "a.mp4")
    listed.write_text("a.mp4 1\n")
    config = tiny(f"data.source={listed}", "optim.steps=1")
    assert run(prepare(config)) == DONE
    prepare(tiny(f"data.source={listed}", "optim.steps=1", f"data.root={tmp_path}"))
    (tmp_path / "b").mkdir()
    shutil.copy(path, tmp_path / "b" / "a.mp4")
    with pytest.raises(ValueError, match=r"data\.source is another list"):
        prepare(tiny(f"data.source={listed}", "optim.steps=1", f"data.root={tmp_path / 'b'}"))


def test_the_command_line_ends_with_status_2_and_one_line(
    listed: Path, tiny: Callable[..., PretrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(f"data.source={listed}", "optim.steps=1")
    assert run(prepare(config)) == DONE
    file = listed.with_name("config.yaml")
    file.write_text(yaml.safe_dump(json.loads(json.dumps(to_dict(config)))))
    listed.write_text(listed.read_text().replace(" 0\n", " 1\n") + listed.read_text())
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", str(file)])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "data.source is another list" in told


def test_each_of_several_sources_is_known_by_its_name(listed: Path, demo_folder: Path) -> None:
    data = DataConfig(
        sources={
            "one": WeightedSourceConfig(source=str(listed)),
            "two": WeightedSourceConfig(source=str(demo_folder / "val.txt")),
        }
    )
    digests = {key: videos.digest() for key, videos in read_sources(data, 3).by_key.items()}
    assert digests == {
        "data.sources.one.source": digest(listed),
        "data.sources.two.source": digest(demo_folder / "val.txt"),
    }


def test_a_validation_list_is_part_of_a_run_too(
    tiny_finetune: Callable[..., FinetuneConfig], tmp_path: Path
) -> None:
    validation = tmp_path / "val.txt"
    lines = Path(tiny_finetune().validation.source).read_text().splitlines()
    validation.write_text("\n".join(lines))
    config = tiny_finetune(f"validation.source={validation}", "optim.steps=1")
    assert finetune(prepare_finetuning(config)) == DONE
    assert set(json.loads((Path(config.output) / LISTS_FILE).read_text())) == {
        "data.source",
        "validation.source",
    }
    validation.write_text("\n".join(lines[1:]))
    with pytest.raises(
        ValueError, match=r"validation\.source is another list than that of this run"
    ):
        prepare_finetuning(config)


def test_results_of_another_list_are_not_written_over(tmp_path: Path) -> None:
    write_metrics(tmp_path, {"list": "val.txt", "list_sha256": "a"}, {})
    check_results(tmp_path, {"list": "val.txt", "list_sha256": "a"})
    with pytest.raises(
        ValueError,
        match=r"metrics\.json: was made with another list of this name; choose another output, "
        r"or remove it",
    ):
        check_results(tmp_path, {"list": "val.txt", "list_sha256": "b"})
    write_metrics(tmp_path, {"list": "val.txt"}, {})  # of an earlier version
    check_results(tmp_path, {"list": "val.txt", "list_sha256": "b"})


def test_results_of_before_a_setting_had_it_as_it_was_then(tmp_path: Path) -> None:
    write_metrics(tmp_path, {"model": "m"}, {})
    check_results(tmp_path, {"model": "m", "antialias": True, "list_sha256": "b"})
    with pytest.raises(ValueError, match="was made with antialias = True, now False"):
        check_results(tmp_path, {"model": "m", "antialias": False})
