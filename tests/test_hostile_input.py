"""What strangers give: texts that look like orders, files that are none or too large, names with
escapes. Nothing is resolved, nothing hangs, nothing reaches a terminal as it is.
"""

import csv
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from video_mae import (
    ClassifierConfig,
    ModelConfig,
    VideoClassifier,
    load_config,
    load_pretrained,
    save_model_folder,
)
from video_mae.cli import main
from video_mae.config import FinetuneConfig
from video_mae.config.data import SourceConfig
from video_mae.config.schema import parse, save_config
from video_mae.data import read_annotations
from video_mae.data.videos import class_file, read_labeled
from video_mae.evaluation.scores import Scores, write_class_table
from video_mae.files import one_line, read_text

SECRET = "a value of the environment"
ORDERS = ("${oc.env:SECRET}", "${SECRET}", "$SECRET", "${env:SECRET}", "%(SECRET)s", "{SECRET}")
ESCAPE = "\x1b[31mred\x1b]0;title\x07\nsecond\u202eline"
CONFIG = ModelConfig(
    num_frames=4, height=32, width=32, patch_size=8, embed_dim=32, depth=1, num_heads=2
)


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", SECRET)


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_of:
        main(arguments)
    return int(exit_of.value.code or 0)


def classifier(folder: Path, names: tuple[str, ...]) -> Path:
    torch.manual_seed(0)
    head = ClassifierConfig(num_classes=len(names), class_names=names)
    save_model_folder(folder / "model", VideoClassifier(CONFIG, head))
    return folder / "model"


def texts_in(folder: Path) -> str:
    return "".join(
        path.read_bytes().decode(errors="replace") for path in folder.rglob("*") if path.is_file()
    )


def test_texts_of_a_model_folder_are_never_resolved_nor_exported_as_something_else(
    tmp_path: Path,
) -> None:
    folder = classifier(tmp_path, ORDERS)
    model = load_pretrained(folder, VideoClassifier)
    assert model.classifier_config.class_names == ORDERS
    assert status("convert", str(folder), str(tmp_path / "again"), "format=model") in (0, 2)
    assert status("convert", str(folder), str(tmp_path / "hub"), "format=transformers") in (0, 2)
    save_model_folder(tmp_path / "saved", model)
    assert load_pretrained(tmp_path / "saved", VideoClassifier).classifier_config.class_names == (
        ORDERS
    )
    assert SECRET not in texts_in(tmp_path)

    # every text of config.json, wherever it stands
    description = json.loads((folder / "config.json").read_text())
    for section in ("model", "classifier"):
        for key, value in description[section].items():
            if not isinstance(value, str):
                continue
            changed = {**description, section: {**description[section], key: ORDERS[0]}}
            (folder / "config.json").write_text(json.dumps(changed))
            with pytest.raises(ValueError, match=key) as error:
                load_pretrained(folder)
            assert SECRET not in str(error.value)
            assert ORDERS[0] in str(error.value)


def test_texts_of_configurations_lists_and_folders_are_never_resolved(tmp_path: Path) -> None:
    for order in ORDERS:
        path = tmp_path / "config.yaml"
        path.write_text(f"output: '{order}'\ndata: {{source: '{order}'}}\n")
        if "${" in order:
            with pytest.raises(ValueError, match=r"\$\{\.\.\.\}` is not supported"):
                load_config(path)
        else:
            config = load_config(path)
            assert (config.output, config.data.source) == (order, order)
        config = parse(None, [f"output={order}", f"data.source={order}"], FinetuneConfig)
        assert (config.output, config.data.source) == (order, order)
        save_config(config, path)
        assert load_config(path, schema=FinetuneConfig) == config

    names = [order.replace("/", "") for order in ORDERS]
    for name in names:
        (tmp_path / "videos" / name).mkdir(parents=True)
        (tmp_path / "videos" / name / f"{name}.mp4").write_bytes(b"x")
    found = read_annotations(SourceConfig(source=str(tmp_path / "videos")))
    assert sorted(found.class_names) == sorted(names)
    assert all(Path(found[i][0]).stem in names for i in range(len(found)))
    lines = [f'"{tmp_path}/videos/{name}/{name}.mp4" {i}' for i, name in enumerate(names)]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "classes.txt").write_text("\n".join(names) + "\n")
    listed = read_labeled("LIST", str(tmp_path / "list.txt"))
    assert list(listed.class_names) == names
    assert class_file(tmp_path / "list.txt") == tuple(names)


def test_a_foreign_folder_is_read_without_resolving_its_labels(tmp_path: Path) -> None:
    config = {
        "model_type": "videomae",
        "architectures": ["VideoMAEForVideoClassification"],
        "id2label": {str(i): order for i, order in enumerate(ORDERS)},
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model") as error:
        load_pretrained(tmp_path)
    assert SECRET not in str(error.value)


def hostile_config(kind: str, path: Path) -> None:
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "kernel":
        path.symlink_to("/proc/self/environ")
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:  # a hole: it takes no room
            file.truncate(300 * 10**6)


@pytest.mark.parametrize("kind", ["FIFO", "device", "kernel", "folder", "300 MB"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_model_folder_of_files_that_are_none_is_refused_at_once(
    tmp_path: Path, kind: str, name: str
) -> None:
    folder = classifier(tmp_path, ("a", "b"))
    hostile_config(kind, folder / name)
    begin = time.monotonic()
    with pytest.raises((ValueError, FileNotFoundError), match=name) as error:
        load_pretrained(folder)
    assert len(str(error.value).splitlines()) == 1
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("kind", ["FIFO", "device", "kernel", "folder", "300 MB"])
def test_a_configuration_or_list_of_classes_that_is_no_file_is_refused_at_once(
    tmp_path: Path, kind: str
) -> None:
    for name in ("config.yaml", "classes.txt"):
        (tmp_path / name).write_text("seed: 1\n")
        hostile_config(kind, tmp_path / name)
    with pytest.raises((ValueError, FileNotFoundError), match=r"config\.yaml"):
        load_config(tmp_path / "config.yaml")
    if kind in ("kernel", "300 MB"):  # others are no files, and nothing is read
        with pytest.raises(ValueError, match=r"classes\.txt"):
            class_file(tmp_path / "list.txt")


def test_a_text_is_read_in_any_systems_lines(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"a\r\nb\rc\n")
    assert read_text(tmp_path / "x") == "a\nb\nc\n"


@pytest.mark.parametrize("num", [1000, 200_000])
def test_very_many_values_are_one_short_line(tmp_path: Path, num: int) -> None:
    folder = classifier(tmp_path, ("a", "b"))
    description = json.loads((folder / "config.json").read_text())
    for key in ("mean", "std"):
        description["model"][key] = [0.5] * num
        (folder / "config.json").write_text(json.dumps(description))
        begin = time.monotonic()
        with pytest.raises(ValueError, match=r"model\.mean") as error:
            load_pretrained(folder)
        assert len(str(error.value)) < 700
        assert time.monotonic() - begin < 20


def test_no_class_is_a_formula_of_a_spreadsheet(tmp_path: Path) -> None:
    names = ['=HYPERLINK("http://x")', "+1", "-2", "@x", "a=b", ESCAPE]
    scores = Scores(np.eye(6)[[1, 2, 3, 4, 5, 0]], np.arange(6))
    write_class_table(tmp_path / "classes.csv", scores, names)
    with (tmp_path / "classes.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert [row[1] for row in rows[1:]] == [f"'{name}" for name in names[:4]] + [
        "a=b",
        one_line(ESCAPE),
    ]
    for row in rows:
        assert not any(cell.startswith(("=", "+", "-", "@")) for cell in row)
        assert all(cell.isprintable() for cell in row)


def is_clean(printed: str) -> bool:
    return all(line.isprintable() for line in printed.replace("\r", "").split("\n"))


def test_class_names_keys_and_words_reach_the_console_escaped(
    tmp_path: Path, demo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = classifier(tmp_path, (ESCAPE, "b"))
    video = str(next((demo_folder / "val").rglob("*.mp4")))
    assert status("predict", str(folder), video, "num_clips=1") == 0
    said = capsys.readouterr()
    assert "\\x1b[31mred" in said.out
    assert len(said.out.splitlines()) == 2
    assert is_clean(said.out + said.err)

    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"data": {f"sourc{ESCAPE}": 1}}))
    for words in (
        ("predict", str(folder), video, f"num_clip{ESCAPE}=1"),
        ("predict", str(folder), video, f"num_clips={ESCAPE}"),
        ("predict", str(folder), video, f"--num{ESCAPE}"),
        ("predict", str(folder / ESCAPE), video),
        ("predict", str(folder), video + ESCAPE),
        (f"predict{ESCAPE}",),
        ("pretrain", str(config)),
        ("pretrain", str(config) + ESCAPE),
        ("pretrain", str(config), f"data.{ESCAPE}=3"),
    ):
        assert status(*words) == 2, words
        said = capsys.readouterr()
        assert "\\x1b" in said.err, words
        assert is_clean(said.out + said.err), words


def test_a_report_of_a_list_is_printed_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "\x1b[31mred"
    folder.mkdir()
    for name in ("a\x1b[31m\u202e.mp4", "b.mp4"):
        (folder / name).write_bytes(b"no video")
    assert status("doctor", str(folder), f"output={tmp_path}/\x1b[0m") == 1
    said = capsys.readouterr().out
    assert "\\x1b[31mred" in said
    assert is_clean(said)


@pytest.mark.parametrize(
    "output", ["FILE/run", "FILE", "/proc/run", "/sys/kernel/x", "/dev/null/run"]
)
def test_results_cannot_lie_below_a_file_or_in_the_kernel(
    tmp_path: Path,
    demo_folder: Path,
    tiny_file: Path,
    capsys: pytest.CaptureFixture[str],
    output: str,
) -> None:
    (tmp_path / "file").write_text("x")
    output = output.replace("FILE", str(tmp_path / "file"))
    videos = str(demo_folder / "val.txt")
    folder = classifier(tmp_path, class_file(Path(videos)))
    for words in (
        ("pretrain", str(tiny_file), f"output={output}"),
        ("evaluate", str(folder), videos, f"output={output}"),
        ("probe", str(folder), f"train={videos}", f"validation={videos}", f"output={output}"),
        ("extract", str(folder), videos, output),
        ("pack", videos, output),
    ):
        assert status(*words) == 2, words
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1, said
        assert "Traceback" not in said
        assert output in said, said
    assert (tmp_path / "file").read_text() == "x"


def test_names_of_files_and_unknown_keys_are_one_line_in_errors(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a\x1b[31m\x07b.mp4 1\n")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_annotations(SourceConfig(source=str(tmp_path / "list.txt")))
    assert one_line(str(error.value)) == str(error.value)
