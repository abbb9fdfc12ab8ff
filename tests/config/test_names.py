"""Names that files and classes may have: no UTF-8, line separators, signs of formulas, 255 bytes;
each stage ends well and writes JSON.
"""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from video_mae import (
    ClassifierConfig,
    ModelConfig,
    ObjectiveConfig,
    VideoClassifier,
    VideoMAE,
    load_config,
    save_model_folder,
)
from video_mae.cli import main
from video_mae.config import DataConfig, FinetuneConfig, RunConfig
from video_mae.data import read_annotations
from video_mae.data.lists import format_line
from video_mae.data.videos import class_file, read_labeled
from video_mae.files import Register, json_text, read_text, unicode_text
from video_mae.training import finetune, pretrain
from video_mae.training.journal import Journal

MODEL = ModelConfig(
    num_frames=4,
    height=16,
    width=16,
    patch_size=8,
    embed_dim=24,
    depth=1,
    num_heads=2,
    decoder_embed_dim=8,
    decoder_depth=1,
    decoder_num_heads=2,
)
FILES = (
    "b\udce4r.mp4",
    "\u65e5" * 83 + ".mp4",
    "x" * 251 + ".mp4",
    "a\nb.mp4",
    "a\rb.mp4",
    "a\vb.mp4",
    "a\u2028b.mp4",
    "a\x85b.mp4",
    "\ufeffa.mp4",
    " a .mp4",
    "#1.mp4",
    "$x_$.mp4",
    "a\\b.mp4",
    "%s{}.mp4",
    '"a".mp4',
    "\x1b[2J.mp4",
    "a 7.mp4",
)
CLASSES = ("cl\udce4ss", "$a_{^$", "x\u2028y", "\u65e5" * 85, "line\nbreak", "b\u00e4r")
BROKEN = "br\udcf6ken\u2028.mp4"


@dataclass(frozen=True)
class Failure:
    """What the registers take."""

    path: str
    decoder: str
    reason: str


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """A folder per class; the first has a file of each name, the others have one."""
    root = tmp_path_factory.mktemp("names")
    for label, name in enumerate(CLASSES):
        frames_THWC = np.random.default_rng(label).integers(0, 255, (12, 24, 32, 3), dtype=np.uint8)
        (root / "data" / name).mkdir(parents=True)
        video = shutil.copy(
            write_video(root / "video.mp4", frames_THWC), root / "data" / name / "one.mp4"
        )
        for more in FILES if label == 0 else ():
            shutil.copy(video, root / "data" / name / more)
    (root / "data" / CLASSES[1] / BROKEN).write_text("no video")
    return root / "data"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    save_model_folder(folder / "encoder", VideoMAE(MODEL, ObjectiveConfig()))
    save_model_folder(
        folder / "classifier",
        VideoClassifier(MODEL, ClassifierConfig(num_classes=len(CLASSES), stride=2)),
    )
    return folder


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_of:
        main(arguments)
    return int(exit_of.value.code or 0)


def strict(path: Path, *, lines: bool = False) -> Any:
    """What a parser reads that knows no more than the standard: UTF-8, no lone surrogates, no NaN;
    a line is one for every reader.
    """
    text = path.read_bytes().decode("utf-8")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    assert not lines or text.splitlines() == text.split("\n")[:-1]
    values = [
        json.loads(part, parse_constant=refuse) for part in (text.splitlines() if lines else [text])
    ]
    json.dumps(values, ensure_ascii=False).encode("utf-8")
    return values if lines else values[0]


QUICK = ("num_clips=1", "num_crops=1", "num_workers=0")
CLASS_TEXTS = sorted(CLASSES)  # as folders are numbered
SHOWN = [
    {"cl\udce4ss": "cl\\xe4ss", "x\u2028y": "x\\u2028y", "line\nbreak": "line\\x0abreak"}.get(
        name, name
    )
    for name in CLASS_TEXTS
]


def test_evaluate_and_what_it_writes(data, models, tmp_path, capsys):
    out = tmp_path / "b\udce4r"
    for _ in range(2):  # the second finds the settings of the first
        assert (
            status("evaluate", str(models / "classifier"), str(data), f"output={out}", *QUICK) == 0
        )
    rows = strict(out / "predictions.jsonl", lines=True)
    assert len(rows) == len(FILES) + len(CLASSES) + 1
    assert {row["class"] for row in rows} == set(SHOWN)
    assert {Path(row["path"]).name for row in rows} == {
        unicode_text(name) for name in (*FILES, "one.mp4", BROKEN)
    }
    metrics = strict(out / "metrics.json")
    assert [Path(bad["path"]).name for bad in metrics["bad"]] == [unicode_text(BROKEN)]
    with (out / "classes.csv").open(encoding="utf-8", newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == SHOWN
    assert "could not be drawn" not in capsys.readouterr().out
    page = (out / "report.html").read_bytes().decode("utf-8")
    assert all(escape(name) in page for name in SHOWN)


def test_a_picture_that_cannot_be_drawn_costs_no_figure(
    data, models, tmp_path, capsys, monkeypatch
):
    def fail(*_: Any, **__: Any) -> None:
        assert (tmp_path / "out" / "metrics.json").is_file()  # figures come first
        raise RuntimeError("no plots\nanywhere")

    monkeypatch.setattr("plotly.offline.get_plotlyjs", fail)
    assert (
        status(
            "evaluate", str(models / "classifier"), str(data), f"output={tmp_path / 'out'}", *QUICK
        )
        == 0
    )
    out = capsys.readouterr().out
    assert (
        "report.html: could not be drawn, all else is there (RuntimeError: no plots anywhere)\n"
        in out
    )
    assert "top-1" in out
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "classes.csv",
        "metrics.json",
        "mistakes",
        "predictions.jsonl",
    ]


def test_predict_names_any_class_and_reads_any_name(data, tmp_path, capfd):
    classifier = VideoClassifier(
        MODEL, ClassifierConfig(num_classes=2, class_names=("$\ud800$", "b\u00e4r"), stride=2)
    )
    save_model_folder(tmp_path / "model", classifier)
    strict(tmp_path / "model" / "config.json")
    for name in ("b\udce4r.mp4", "a\nb.mp4", FILES[1]):
        assert (
            status("predict", str(tmp_path / "model"), str(data / CLASSES[0] / name), "num_clips=1")
            == 0
        )
    assert (
        status("predict", str(tmp_path / "model"), str(data / CLASSES[1] / BROKEN), "num_clips=1")
        == 2
    )
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_extract_gives_every_video_a_file_that_its_index_names(data, models, tmp_path, kind):
    words = (
        "extract",
        str(models / "encoder"),
        str(data),
        str(tmp_path / "out"),
        "num_workers=0",
        "data.stride=2",
        f"format={kind}",
    )
    assert status(*words) == 0
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob(f"*.{kind}")}
    assert status(*words) == 0
    rows = strict(tmp_path / "out" / "index.jsonl", lines=True)
    assert {
        file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob(f"*.{kind}")
    } == before
    assert sorted(row["file"] for row in rows if "bad" not in row) == sorted(before)
    assert [Path(row["path"]).name for row in rows if "bad" in row] == [unicode_text(BROKEN)]
    assert max(len(name.encode()) for name in before) <= 255 - len("..part")


def test_probe(data, models, tmp_path):
    assert (
        status(
            "probe",
            str(models / "encoder"),
            f"train={data}",
            f"validation={data}",
            f"output={tmp_path / 'out'}",
            "num_workers=0",
            "epochs=1",
            "kind=linear",
        )
        == 0
    )
    assert Path(
        strict(tmp_path / "out" / "metrics.json")["bad"]["train"][0]["path"]
    ).name == unicode_text(BROKEN)


def test_pack_and_its_index_and_classes(data, models, tmp_path):
    assert status("pack", str(data), str(tmp_path / "out"), "num_workers=1", "short_side=0") == 0
    assert strict(tmp_path / "out" / "manifest.json")["class_names"] == SHOWN
    rows = strict(tmp_path / "out" / "manifest.jsonl", lines=True)
    assert {Path(row["path"]).name for row in rows} == {
        unicode_text(name) for name in (*FILES, "one.mp4", BROKEN)
    }
    assert len(strict(tmp_path / "out" / "refused.jsonl", lines=True)) == 1
    assert (
        status(
            "evaluate",
            str(models / "classifier"),
            str(tmp_path / "out"),
            f"output={tmp_path / 'results'}",
            *QUICK,
        )
        == 0
    )
    assert strict(tmp_path / "results" / "metrics.json")["classes_with_videos"] == len(CLASSES)


def test_doctor_names_what_no_list_can_hold_and_lists_the_rest(data, tmp_path, capsys):
    assert status("doctor", str(data), f"output={tmp_path / 'out'}", "num_workers=1") == 1
    rows = strict(tmp_path / "out" / "videos.jsonl", lines=True)
    strict(tmp_path / "out" / "summary.json")
    unlisted = {Path(row["path"]).name for row in rows if "no_name" in row["findings"]}
    assert unlisted >= {"b\\xe4r.mp4", "a\nb.mp4", "a\rb.mp4"}
    assert class_file(tmp_path / "out" / "clean.txt") == tuple(SHOWN)
    videos = read_annotations(DataConfig(source=str(tmp_path / "out" / "clean.txt")))
    # beside "one.mp4" in a class whose name is not UTF-8
    assert len(videos) == sum(row["good"] for row in rows) == len(CLASSES) - 2
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "\ufeffa.mp4",
        " a .mp4",
        "a\u2028",
        "\u2028a",
        "a\v",
        "#1.mp4",
        "a\x85b 3",
        "\ufeff",
        "\u3000a",
    ],
)
def test_a_clean_list_beside_its_videos_reads_back(tmp_path, write_video, name):
    video = write_video(tmp_path / "whole.mp4", np.zeros((8, 16, 16, 3), dtype=np.uint8))
    shutil.copy(video, tmp_path / name)
    (tmp_path / "list.txt").write_text(format_line(name, 3) + "\n", encoding="utf-8")
    assert status("doctor", str(tmp_path / "list.txt"), f"output={tmp_path}", "num_workers=1") == 0
    assert [
        (path, info["label"])
        for path, info in read_annotations(DataConfig(source=str(tmp_path / "clean.txt")))
    ] == [  # pyright: ignore
        (str(tmp_path / name), 3)
    ]


def test_reconstruct_writes_pictures_of_the_longest_names(data, models, tmp_path):
    videos = [str(data / CLASSES[0] / name) for name in (FILES[0], FILES[1], "a\nb.mp4")]
    words = ["stride=2", f"output={tmp_path}"]
    assert status("reconstruct", str(models / "encoder"), *videos, *words) == 0
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".mp4"] * 3 + [".png"] * 3
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in tmp_path.glob("*.png"))


@pytest.mark.parametrize("name", ["x" * 256, "\u65e5" * 86, "x/" * 2100])
def test_a_name_that_no_disk_takes_is_one_line_with_the_name(models, data, tmp_path, name, capsys):
    video = str(data / CLASSES[0] / "one.mp4")
    good = str(data)
    for words in (
        ("predict", str(models / "classifier"), name),
        ("evaluate", str(models / "classifier"), name, f"output={tmp_path / 'o'}"),
        ("evaluate", str(models / "classifier"), good, f"output={tmp_path / name}"),
        ("evaluate", name, good),
        ("reconstruct", str(models / "encoder"), video, f"output={tmp_path / name}"),
        ("look", str(models / "encoder"), name),
        ("doctor", name),
        ("pack", name, "out"),
        ("extract", str(models / "encoder"), good, str(tmp_path / name)),
        ("pack", good, str(tmp_path / name)),
        ("convert", str(models / "encoder"), str(tmp_path / name)),
        ("pretrain", name),
    ):
        assert status(*words) == 2, words
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert name[:20] in error


def test_a_converted_model_has_the_longest_name(models, tmp_path):
    assert status("convert", str(models / "encoder"), str(tmp_path / ("\u65e5" * 85))) == 0
    assert (
        status(
            "convert",
            str(models / "encoder"),
            str(tmp_path / ("m\udce4" * 20)),
            "format=hugging_face",
        )
        == 0
    )
    assert len(list(tmp_path.iterdir())) == 2


def test_registers_and_journals_hold_any_name(tmp_path):
    names = [*FILES, BROKEN]
    failures = [Failure(name, "pyav", f"{name}: broken") for name in names]
    Register(tmp_path / "quarantine.jsonl").add(failures, 1)
    Register(tmp_path / "quarantine.jsonl").add(failures, 1)  # a later start knows them all
    assert [row["path"] for row in strict(tmp_path / "quarantine.jsonl", lines=True)] == [
        unicode_text(name) for name in names
    ]
    engine: Any = SimpleNamespace(
        config=RunConfig(output=str(tmp_path)), rank=0, device=torch.device("cpu")
    )
    journal = Journal(engine, total_steps=1, clips_per_step=1, flops_per_clip=0.0)
    for name in names:
        journal.say(f"validation: {name}")
    assert len((tmp_path / "log.txt").read_bytes().decode("utf-8").splitlines()) == len(names)


@pytest.mark.parametrize(
    "value",
    [
        "b\udce4r",
        "\ud800",
        "\ud83d\ude00x",
        "a\\udce4",
        "\\",
        "\u2028\u2029\x85\x7f\x9f",
        "\0\x1b\n\r",
        "\U0001f600 \ufeff \uffff",
        {"k\udcff": ["\udc80"]},
    ],
)
def test_json_is_what_the_standard_allows(value, tmp_path):
    (tmp_path / "file").write_bytes(json_text([value]).encode("utf-8") + b"\n")
    (read,) = strict(tmp_path / "file", lines=True)
    if isinstance(value, str):
        assert read == [unicode_text(value)]
        assert (unicode_text(value) == value) == (
            not any(0xD800 <= ord(letter) < 0xE000 for letter in value)
        )
    else:
        assert read == [{"k\\xff": ["\\x80"]}]
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            json_text({"a": number})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_class_lists_are_read_in_every_encoding_and_end_lines_only_at_line_ends(
    data, tmp_path, encoding, end
):
    names = ["x\u2028y", "$a$", "b\u00e4r\x0b.", "\u65e5\u672c\x85\x1c."]
    (tmp_path / "classes.txt").write_bytes(end.join([*names, ""]).encode(encoding))
    (tmp_path / "list.txt").write_bytes(
        f"{data / CLASSES[1] / 'one.mp4'} 3{end}".encode(encoding.replace("-le", ""))
    )
    if encoding == "utf-16-le":
        with pytest.raises(ValueError, match=r"classes\.txt: .*save it as UTF-8 text"):
            read_labeled("LIST", str(tmp_path / "list.txt"))
    else:
        assert read_labeled("LIST", str(tmp_path / "list.txt")).class_names == tuple(names)


def test_a_file_in_another_encoding_is_named(tmp_path):
    for content in (
        "b\u00e4r".encode("latin-1"),
        "b\u00e4r".encode("utf-16")[:-1],
        "a".encode("utf-32"),
    ):
        (tmp_path / "classes.txt").write_bytes(content)
        with pytest.raises(ValueError, match=r"classes\.txt: .*save it as"):
            read_text(tmp_path / "classes.txt")
    (tmp_path / "list.txt").write_bytes(b"b\xe4r.mp4 1\n")
    with pytest.raises(
        ValueError,
        match=r"list\.txt:1: the line `b\\xe4r\.mp4 1` is not UTF-8, save the list as UTF-8 text; "
        r".* rename it",
    ):
        read_annotations(DataConfig(source=str(tmp_path / "list.txt")))


@pytest.mark.trains_here
@pytest.mark.usefixtures("quiet_process")
def test_training_ends_well_and_writes_json(
    tiny, tiny_finetune, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("video_mae.training.picture.Image.fromarray", None)  # and without pictures
    output = tmp_path / "$r\udce4n_"
    config = tiny(
        f"output={output}", f"data.source={data}", "optim.steps=7", "data.max_bad_share=1"
    )
    assert pretrain.run(pretrain.prepare(config)) == 0
    strict(output / "metrics.jsonl", lines=True)
    strict(output / "deepspeed.json")
    strict(output / "model" / "config.json")
    assert [Path(row["path"]).name for row in strict(output / "quarantine.jsonl", lines=True)] == [
        unicode_text(BROKEN)
    ]
    assert capsys.readouterr().out.count("could not be drawn, all else is there") == 2
    assert "could not be drawn" in (output / "log.txt").read_bytes().decode("utf-8")
    assert (output / "report.html").read_bytes().decode("utf-8").count("$r\\xe4n_") >= 2
    again = load_config(output / "config.yaml")
    assert (again.output, again.data.source) == (str(output), str(data))
    config = tiny_finetune(
        f"output={tmp_path / 'tuned'}",
        f"data.source={data}",
        f"validation.source={data}",
        "optim.steps=2",
        f"classifier.num_classes={len(CLASSES)}",
    )
    assert finetune.run(finetune.prepare(config)) == 0
    assert strict(tmp_path / "tuned" / "best" / "config.json")["classifier"]["class_names"] == SHOWN
    assert load_config(
        tmp_path / "tuned" / "config.yaml", schema=FinetuneConfig
    ).classifier.class_names == tuple(SHOWN)
    assert (
        status(
            "evaluate", str(tmp_path / "tuned"), str(data), f"output={tmp_path / 'tuned'}", *QUICK
        )
        == 0
    )
