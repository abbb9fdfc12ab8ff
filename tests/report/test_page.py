"""The page of a run: its figures are those of the files, all of it is in one file, and nothing in
it is anybody else's HTML.
"""

import html
import io
import json
import math
import re
import shutil
from base64 import b64decode
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_folders
import torch
from PIL import Image
from torchmetrics.functional.classification import multiclass_calibration_error

from video_mae.cli import main
from video_mae.config import FinetuneConfig, PretrainConfig
from video_mae.config.schema import save_config
from video_mae.files import json_line, read_jsonl
from video_mae.report import answers
from video_mae.report.curves import draw_curves
from video_mae.report.page import write_report
from video_mae.report.record import list_settings, read_run, summarize

PLOTLY = "/* what draws */"


@pytest.fixture(autouse=True)
def plotly_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its five megabytes are not read again and again."""
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: PLOTLY)


def words(page: str) -> str:
    """What a reader sees, in one line."""
    page = re.sub(r"<(script|style)>.*?</\1>", "", page, flags=re.DOTALL)
    page = re.sub(r"data-figure='[^']*'", "", page)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def figures(page: str) -> list[dict[str, Any]]:
    """The plots, as the script of the page reads them."""
    return [json.loads(html.unescape(one)) for one in re.findall(r"data-figure='([^']*)'", page)]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folders.pretraining(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run_folders.fine_tuning(tmp_path_factory.mktemp("runs") / "tuned")
    return run_folders.evaluation(folder)


def test_a_page_tells_what_on_what_how_far_how_good_and_what_comes_next(pretrained: Path):
    page = write_report(pretrained)
    text = words(page.read_text())
    for part in (
        "Masked autoencoder pretraining on data/demo/train.txt, 960 videos; ViT 768 wide, 12 deep"
        ", 22.5 million parameters; clips of 16 x 224 x 224; 2 x CPU.",
        "finished",
        "Progress 1,400 of 1,400 steps, 23.33 epochs, 0:57:30 h between the first and the last",
        "Frozen features 32.0% top-1 of a ridge regression; nearest neighbours 27.5%",
        "Speed 40 clips/s medians; waiting for data 3.0%; peak memory 1.2 GB",
        f"finetune FINETUNE.yaml checkpoint={pretrained} data.source=TRAIN_LIST",
        f"DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 --module video_mae pretrain "
        f"{pretrained}/config.yaml output={pretrained}_again",
        "python 3.11.7",
        "Videos that could not be decoded in training: 1",
    ):
        assert part in text, part
    last = read_jsonl(pretrained / "metrics.jsonl")[-2]
    assert f"Loss {last['loss']:.4g} from" in text
    assert "ETA" not in text


def test_a_run_that_is_at_work_says_how_long_it_will_take(tmp_path: Path):
    folder = run_folders.pretraining(tmp_path / "a run", finished=False, steps=700)
    text = words(write_report(folder).read_text())
    assert "700 of 1,400" in text
    assert "ETA 0:29:10 h" in text  # 700 steps of 2.5 seconds
    assert f"pretrain '{folder}/config.yaml'" in text
    assert "finished" not in text


def test_a_page_is_one_file_that_asks_nobody(pretrained: Path, tested: Path):
    for folder in (pretrained, tested):
        page = write_report(folder).read_text()
        assert PLOTLY in page
        own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
        links = re.findall(r'\b(?:src|href)\s*=\s*"([^"]*)"', own)
        assert len(links) > 5
        assert all(link.startswith("data:") for link in links)
        assert "url(" not in own
        assert "default-src 'none'" in own
        assert 'name="viewport" content="width=device-width' in own


def test_names_are_nobodys_html(tmp_path: Path):
    folder = tmp_path / "a <b> & run"
    run_folders.fine_tuning(folder)
    run_folders.evaluation(folder)
    evil = "<img src=x onerror=alert(1)>"
    bad = {"path": f"{evil}.mp4", "decoder": "pyav", "reason": evil}
    (folder / "quarantine.jsonl").write_bytes(json_line({**bad, "step": 1, "time": 1.0}))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("data/demo/train.txt", f"'{evil}'"))
    for name in ("classes.csv", "predictions.jsonl"):
        content = (folder / name).read_text()
        (folder / name).write_text(
            content.replace("cartwheel", "<script>alert(2)</script>'\\u0027")
        )
    page = write_report(folder).read_text()
    assert page.count("<script>") == 2  # plotly, and what draws
    assert page.count("</script>") == 2
    assert "<img src=x" not in page
    assert "<b> &amp; run" not in page
    text = words(page)
    assert text.count(evil) >= 3
    assert "<script>alert(2)</script>" in text
    assert any(
        "&lt;b&gt;without" in y for figure in figures(page) for y in str(figure).split("<br>")
    )


@pytest.mark.parametrize("metrics", [None, "", '{"step": 4, "lo'])
def test_a_page_of_a_run_that_has_logged_nothing_says_so(tmp_path: Path, metrics: str | None):
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    page = write_report(tmp_path).read_text()
    assert "no step logged yet" in page
    assert figures(page) == []


def test_a_value_that_was_not_finite_is_called_that_and_leaves_a_gap(tmp_path: Path):
    lines = [run_folders.training_line(step, 10) for step in (1, 2, 3)]
    lines[1]["loss"] = lines[2]["loss"] = None
    run_folders.write_lines(tmp_path, lines)
    page = write_report(tmp_path).read_text()
    assert "Loss not finite" in words(page)
    assert figures(page)[0]["data"][0]["y"][1:] == [None, None]


def test_a_folder_that_is_missing_is_named_and_a_page_that_cannot_be_made_costs_a_line(
    tmp_path: Path,
):
    with pytest.raises(FileNotFoundError, match="nowhere: no such run folder"):
        write_report(tmp_path / "nowhere")
    run_folders.evaluation(tmp_path)
    page = write_report(tmp_path).read_bytes()
    rows = read_jsonl(tmp_path / "predictions.jsonl")
    (tmp_path / "predictions.jsonl").write_bytes(json_line({**rows[0], "label": 99}))
    told: list[str] = []
    write_report(tmp_path, told.append)
    assert len(told) == 1
    assert "report.html: could not be drawn, all else is there" in told[0]
    assert (tmp_path / "report.html").read_bytes() == page


def test_only_panels_with_values_are_drawn_and_long_curves_are_averaged(tmp_path: Path):
    lines = [run_folders.training_line(step, 10) for step in range(1, 4501)]
    run_folders.write_lines(tmp_path, lines)
    page = write_report(tmp_path).read_text()
    assert all(figure["data"] for figure in figures(page))
    titles = re.findall(r"<figure class=\"plot\">\s*<h3>([^<]*)", page)
    assert "Loss" in titles
    assert not {"Accuracy", "Model FLOP utilisation", "Skipped steps"} & set(titles)
    [curve] = draw_curves([read_run(tmp_path)], ["loss", "reconstruction_loss", "val_loss"])
    assert len(curve["x"]) == 900
    assert curve["x"][:2] == [5, 10]
    assert curve["y"][0] == pytest.approx(np.mean([line["loss"] for line in lines[:5]]))


def test_settings_that_nothing_reads_are_not_shown_as_if_they_were(tmp_path: Path):
    def keys(config: Any) -> list[set[str]]:
        save_config(config, tmp_path / "config.yaml")
        return [{setting.key for setting in part} for part in list_settings(read_run(tmp_path))]

    tuned = FinetuneConfig()
    optim = replace(tuned.optim, steps=500, epochs=3.0)
    classifier = replace(tuned.classifier, stride=2, sampling="uniform")
    model = replace(tuned.model, decoder_depth=2)
    changed, kept, idle = keys(replace(tuned, optim=optim, classifier=classifier, model=model))
    assert changed == {"optim.steps", "classifier.sampling"}
    assert {"data.stride", "classifier.stride", "optim.epochs", "lora.alpha"} <= idle
    assert {"validation.batch", "model.decoder_depth"} <= idle
    assert "optim.warmup_steps" in kept
    assert not changed & idle
    # what a run finds out for itself nobody has changed
    found = replace(tuned.data, decoder="pyav")
    changed, *_ = keys(replace(tuned, data=found, classifier=replace(classifier, num_classes=7)))
    assert changed == {"classifier.sampling"}
    assert "data.decoder pyav" in words(write_report(tmp_path).read_text())
    pretraining = PretrainConfig()
    objective = replace(pretraining.objective, contrastive_weight=0.5)
    changed, kept, idle = keys(replace(pretraining, objective=objective))
    assert changed == {"objective.contrastive_weight"}
    assert {"data.stride", "objective.temperature", "optim.epochs"} <= kept
    assert {"optim.warmup_steps", "objective.teacher", "probe.num_videos"} <= idle


def test_the_best_validation_is_that_of_the_best_model(tmp_path: Path):
    """Of those with one accuracy the one with less loss; what is no number is none of them."""
    folder = run_folders.fine_tuning(tmp_path / "tuned")
    lines = read_jsonl(folder / "metrics.jsonl")
    for step, top1, loss in (
        (900, None, None),
        (870, 0.9, None),
        (840, 0.9, 0.4),
        (810, 0.9, 0.3),
        (780, 0.9, 0.3),
        (750, 0.9, 0.5),
    ):
        for line in lines:
            if line["step"] == step and "val_top1" in line:
                line |= {"val_top1": top1, "val_loss": loss}
    run_folders.write_lines(folder, lines)
    assert "best, after step 780" in words(write_report(folder).read_text())
    # one that ended before its first line about training
    run_folders.write_lines(folder, [line for line in lines if "val_top1" in line])
    assert "Curves" in words(write_report(folder).read_text())


def test_the_pace_of_the_last_lines_is_that_of_the_rest(tmp_path: Path):
    lines = [run_folders.training_line(step, 10) for step in range(1, 81)]
    for line in lines[:60]:
        line["time"] += 100.0 * (line["step"] - 60)  # it was much slower long ago
    run_folders.write_lines(tmp_path, lines)
    run_folders.write_facts(tmp_path, 100, finished=False)
    assert summarize(read_run(tmp_path))["eta"] == pytest.approx(20 * 2.5)
    assert summarize(read_run(tmp_path))["clips_per_second"] == pytest.approx(40, abs=1)


def test_the_run_that_was_in_the_folder_before_is_drawn_beside(tmp_path: Path):
    folder = run_folders.fine_tuning(tmp_path / "tuned")
    shutil.copytree(folder, tmp_path / "tuned.earlier_1796000000")
    page = write_report(folder).read_text()
    assert "tuned.earlier_1796000000" in words(page)
    curves = figures(page)[0]["data"]
    assert [curve["hovertemplate"] for curve in curves] == [
        f"%{{y}}<extra>{run}: {name}</extra>"
        for run in ("tuned", "tuned.earlier_1796000000")
        for name in ("loss", "validation loss")
    ]
    assert [curve["showlegend"] for curve in curves] == [True, True, False, False]


def pictures(page: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/\w+;base64,([^"]*)"', page)
    return [Image.open(io.BytesIO(b64decode(one))) for one in found]


def test_reconstructions_move_and_are_laid_out_over_the_training(pretrained: Path):
    page = write_report(pretrained).read_text()
    moving, *stills = pictures(page)
    assert getattr(moving, "n_frames", 1) == 8
    text = words(page)
    order = "original visible step 280 step 560 step 840 step 1,120 step 1,400"
    assert order in text
    assert "75.0% hidden (tube)" in text
    assert "brightness and contrast are not the model's" in text
    assert len(stills) == 7
    original, _, early, *_, late = (np.asarray(one.convert("RGB")).astype(int) for one in stills)
    truth = run_folders.moving_frames(0).original[0, 4].numpy().repeat(3, 0).repeat(3, 1)
    side = len(truth)
    assert np.abs(original[:side, :side] - truth).mean() < 12  # WebP is lossy
    assert np.abs(late - original).mean() < np.abs(early - original).mean()


def test_pictures_of_an_earlier_version_are_shown(tmp_path: Path):
    folder = tmp_path / "reconstructions"
    folder.mkdir()
    for step, grey in (("step_00000900", 10), ("step_00001000", 200)):
        Image.new("L", (8, 8), grey).save(folder / f"{step}.png")
    [shown] = pictures(write_report(tmp_path).read_text())
    assert shown.getpixel((0, 0)) == 200


def test_confusions_calibration_and_views_are_those_of_the_predictions(tested: Path):
    rows = read_jsonl(tested / "predictions.jsonl")
    names = run_folders.class_names(8)
    matrix = answers.confusions(rows, names)
    assert len(matrix["y"]) == 7  # the last class has no videos
    assert matrix["y"][:2] == ["pretending to p... 0", "jump 1"]
    mine = [row["predicted"] for row in rows if row["label"] == 3]
    for place, column in enumerate(map(int, matrix["x"])):
        share = mine.count(column) / len(mine)
        assert (matrix["z"][3][place] or 0) == pytest.approx(share)
        count = f"{mine.count(column)} of {len(mine)}"
        assert matrix["text"][3][place].endswith(count if share else "")
    bars, error = answers.calibration(rows)
    assert sum(bars["text"]) == len(rows)
    assert 0 < error < 1
    spread = answers.views(rows)
    assert spread is not None
    first = np.mean([row["view_predictions"][0] == row["label"] for row in rows])
    assert spread[0]["y"][0] == pytest.approx(first)
    agreeing = [p == row["predicted"] for row in rows for p in row["view_predictions"]]
    assert spread[1] == pytest.approx(np.mean(agreeing))
    assert answers.views([{**row, "view_predictions": [1]} for row in rows]) is None


def test_the_expected_calibration_error_is_that_of_torchmetrics():
    random = np.random.default_rng(3)
    score_MK = random.dirichlet([0.3] * 5, size=300)
    label_M = random.integers(5, size=300)
    rows = [
        {"top": [{"probability": float(score_K.max())}], "right": bool(score_K.argmax() == label)}
        for score_K, label in zip(score_MK, label_M, strict=True)
    ]
    expected = multiclass_calibration_error(
        torch.from_numpy(score_MK), torch.from_numpy(label_M), 5, n_bins=10, norm="l1"
    )
    assert answers.calibration(rows)[1] == pytest.approx(float(expected), abs=1e-6)


def test_the_worst_mistakes_come_with_their_frames(tested: Path):
    rows = read_jsonl(tested / "predictions.jsonl")
    worst = answers.worst_mistakes(rows)
    sure = [row["top"][0]["probability"] for row in rows if not row["right"]]
    assert [rows[number]["top"][0]["probability"] for number in worst] == sorted(sure)[:-9:-1]
    page = write_report(tested).read_text()
    assert len(pictures(page)) == 8
    row = rows[worst[0]]
    text = words(page)
    assert f"is {row['class']} {row['top'][0]['class']} {row['top'][0]['probability']:.1%}" in text
    assert f"Test top-1 {np.mean([row['right'] for row in rows]):.1%}" in text
    assert "chance 12.5%" in text
    assert "Classes, the hardest first" in text
    assert "8 classes" in text


def test_many_classes_have_their_hardest_and_easiest_first(tmp_path: Path):
    folder = run_folders.evaluation(tmp_path / "test", 60, 300)
    page = write_report(folder).read_text()
    text = words(page)
    assert "Evaluation, 60 classes" in text
    assert text.index("Hardest classes") < text.index("Easiest classes")
    assert "All 59 classes with videos" in text
    assert len(figures(page)[0]["data"][0]["y"]) == 59
    assert "Curves" not in text


def compare(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["compare", *arguments])
    return int(ended.value.code or 0)


def test_runs_are_laid_side_by_side(pretrained: Path, tested: Path, tmp_path: Path):
    other = run_folders.pretraining(tmp_path / "demo", finished=False, steps=280)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(
        config.replace("ratio: 0.75", "ratio: 0.9").replace("decoder: auto", "decoder: decord")
    )
    output = tmp_path / "pages" / "all.html"
    folders = str(pretrained), str(tested), str(other)
    assert compare(*folders, f"output={output}") == 0
    page = output.read_text()
    text = words(page)
    assert text.startswith(f"{pretrained}, {tested}, {other} 3 runs")  # two are called demo
    rows = re.findall(r"<tr><td><code>([^<]*)</code></td>(.*?)</tr>", page, flags=re.DOTALL)
    differing = {key: re.findall(r"<td>(.*?)</td>", cells) for key, cells in rows}
    assert differing["mask.ratio"] == ["0.75", "", "0.9"]
    assert differing["optim.micro_batch"] == ["16", "8", "16"]
    assert differing["data.decoder"] == ["auto", "auto", "decord"]
    assert differing["classifier.num_classes"] == ["", "8", ""]
    assert "seed" not in differing
    assert "optim.epochs" in differing  # of the one that reads it
    assert differing["optim.epochs"] == ["", "30.0", ""]
    loss = figures(page)[0]["data"]
    assert len({curve["line"]["color"] for curve in loss}) == 3
    assert len(pictures(page)) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{run}"], "RUN: {run} is one run: name two or more"),
        (["{run}", "nowhere"], "RUN: nowhere holds neither metrics.jsonl nor metrics.json"),
        (["{run}", "{empty}"], "RUN: {empty} holds neither metrics.jsonl nor metrics.json"),
        (["{run}", "{run}", "output=list.txt"], "output: list.txt must end with .html"),
        (["{run}", "{run}", "outputs=a.html"], "unknown key outputs (did you mean output?)"),
    ],
)
def test_what_cannot_be_compared_is_told_in_one_line(
    pretrained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
):
    places = {"run": pretrained, "empty": tmp_path}
    assert compare(*(argument.format(**places) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"video-mae compare: {told.format(**places)}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_loss_curve_is_the_one_of_the_file(pretrained: Path):
    curves = draw_curves([read_run(pretrained)], ["loss", "probe_loss", "lr"])
    assert [curve["name"] for curve in curves] == ["loss", "probe loss", "lr"]
    assert curves[0]["x"] == list(range(20, 1401, 20))
    assert curves[1]["y"][0] == pytest.approx(0.35 + 0.7 * math.exp(-0.7))
