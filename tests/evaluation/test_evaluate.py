"""Evaluation: every video once, whatever the ranks and batches; scores against a loop over views;
mistakes in one line.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from video_mae import (
    ClassifierConfig,
    Facts,
    ModelConfig,
    VideoClassifier,
    VideoMAE,
    classify_video,
    load_pretrained,
    save_model_folder,
)
from video_mae.config.evaluation import EvaluateConfig, PredictConfig
from video_mae.config.schema import parse
from video_mae.evaluation import predict
from video_mae.evaluation.evaluate import Evaluation, start
from video_mae.evaluation.predict import merge_views, views_of

NAMES = ("run", "swim", "fly")
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
RESULTS = ("predictions.jsonl", "metrics.json", "classes.csv")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)  # whose weights say all three classes
    folder = tmp_path_factory.mktemp("run") / "model"
    model = VideoClassifier(
        MODEL, ClassifierConfig(num_classes=3, class_names=NAMES, stride=2, head_init_scale=300.0)
    )
    save_model_folder(folder, model)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """Eight videos of 1 to 15 frames, equal names in two folders; one of them is broken, another is
    there twice.
    """
    root, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    lines = []
    for i in range(8):
        path = root / "ab"[i % 2] / f"{i // 2}.mp4"
        write_video(
            path,
            rng.integers(0, 128, (1 + 2 * i, 24, 32, 3), dtype=np.uint8)
            + np.uint8(rng.integers(128)),
        )
        lines.append(f"{path.relative_to(root)} {i % 3}")
    (root / "b" / "1.mp4").write_bytes((root / "b" / "2.mp4").read_bytes()[:700])
    (root / "list.txt").write_text("\n".join([*lines, lines[0]]) + "\n")
    return root


def config(*overrides: str) -> EvaluateConfig:
    return parse(None, ["num_workers=0", "num_clips=2", "num_crops=2", *overrides], EvaluateConfig)


def evaluate(model: Path, source: Path, output: Path, *overrides: str) -> dict[str, Any]:
    assert start(str(model), str(source), config(f"output={output}", *overrides))() == 0
    return (
        json.loads((output / "metrics.json").read_text())
        if os.environ.get("RANK", "0") == "0"
        else {}
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_scores_are_the_mean_over_views_of_the_softmax(
    model: Path, videos: Path, tmp_path: Path, quiet_process: None
) -> None:
    assert merge_views(torch.tensor([[0.0, np.log(3)], [np.log(9), 0.0]])).numpy() == pytest.approx(
        [(0.25 + 0.9) / 2, (0.75 + 0.1) / 2]
    )
    metrics = evaluate(model, videos / "list.txt", tmp_path, "all_scores=true")
    classifier, right = load_pretrained(model, VideoClassifier), 0
    assert metrics["views"] == 4
    found = rows(tmp_path)
    assert [Path(row["path"]).relative_to(videos) for row in found] == [
        Path(line.rsplit(" ")[0]) for line in (videos / "list.txt").read_text().splitlines()
    ]
    for row in found:
        if "bad" in row:
            continue
        video = views_of(classifier.config, classifier.classifier_config, 2, 2).read(row["path"])
        with torch.no_grad():
            scores = [classifier(clip[None]).double().softmax(dim=1)[0] for clip in video.clips()]
        expected = torch.stack(scores).mean(dim=0)
        assert row["scores"] == pytest.approx(expected.tolist(), abs=1e-6)
        assert row["top"][0] == {
            "class": NAMES[int(expected.argmax())],
            "probability": max(row["scores"]),
        }
        assert row["views"] == 4
        right += int(expected.argmax()) == row["label"]
    assert metrics["top1"] == right / 9
    assert {row["predicted"] for row in found if "bad" not in row} == {0, 1, 2}


def test_frames_are_resized_as_the_model_says_or_as_it_is_told(
    model: Path, videos: Path, tmp_path: Path, quiet_process: None
) -> None:
    sharp = load_pretrained(model, VideoClassifier)
    sharp.classifier_config = replace(sharp.classifier_config, antialias=False)
    save_model_folder(tmp_path / "sharp", sharp)
    runs = {
        "smooth": (model, ""),
        "sharp": (tmp_path / "sharp", ""),
        "told sharp": (model, "antialias=false"),
        "told smooth": (tmp_path / "sharp", "antialias=true"),
    }
    scores = {}
    for name, (folder, told) in runs.items():
        metrics = evaluate(
            folder, videos / "list.txt", tmp_path / name, "all_scores=true", *filter(None, [told])
        )
        assert metrics["settings"]["antialias"] == name.endswith("smooth")
        scores[name] = [row.get("scores") for row in rows(tmp_path / name)]
    assert scores["smooth"] == scores["told smooth"]
    assert scores["sharp"] == scores["told sharp"]
    assert scores["smooth"] != scores["sharp"]
    with pytest.raises(
        ValueError, match=r"metrics.json: was made with antialias = True, now False"
    ):
        start(
            str(model),
            str(videos / "list.txt"),
            config(f"output={tmp_path / 'smooth'}", "antialias=false"),
        )


def test_figures_have_the_same_bits_for_any_ranks_and_batch_size(
    model: Path, videos: Path, tmp_path: Path, quiet_process: None, on_ranks: Callable[..., None]
) -> None:
    evaluate(model, videos / "list.txt", tmp_path / "1")

    evaluate(model, videos / "list.txt", tmp_path / "1 by 5", "batch_size=5", "num_workers=2")
    on_ranks(2, lambda: evaluate(model, videos / "list.txt", tmp_path / "2 by 1"))
    on_ranks(
        3,
        lambda: evaluate(
            model, videos / "list.txt", tmp_path / "3 by 2", "batch_size=2", "num_workers=1"
        ),
    )
    for name in RESULTS:
        contents = {
            folder: (tmp_path / folder / name).read_bytes()
            for folder in ("1", "1 by 5", "2 by 1", "3 by 2")
        }
        assert len(set(contents.values())) == 1, name


def test_a_rank_may_have_nothing_to_do(
    model: Path, videos: Path, tmp_path: Path, quiet_process: None, on_ranks: Callable[..., None]
) -> None:
    (tmp_path / "one.txt").write_text(f"{videos / 'a' / '3.mp4'} 1\n")
    on_ranks(2, lambda: evaluate(model, tmp_path / "one.txt", tmp_path / "out"))
    assert len(rows(tmp_path / "out")) == 1


def test_equal_names_in_two_folders_are_two_videos(
    model: Path, videos: Path, tmp_path: Path, quiet_process: None
) -> None:
    evaluate(model, videos / "list.txt", tmp_path)
    twins = {row["path"]: row["top"] for row in rows(tmp_path) if row["path"].endswith("3.mp4")}
    assert len(twins) == 2
    first, second = twins.values()
    assert first != second


@pytest.mark.parametrize("skip", [False, True])
def test_a_broken_video_is_named_and_wrong_or_left_out(
    model: Path,
    videos: Path,
    tmp_path: Path,
    skip: bool,
    quiet_process: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    metrics = evaluate(model, videos / "list.txt", tmp_path, f"skip_bad={str(skip).lower()}")
    assert metrics["bad_videos"] == 1
    assert metrics["bad"][0]["path"].endswith("b/1.mp4")
    assert "cut off" in metrics["bad"][0]["reason"]
    assert metrics["settings"]["bad_videos_are"] == ("left out" if skip else "wrong")
    assert metrics["videos"] == (8 if skip else 9)
    right = sum(row.get("right", False) for row in rows(tmp_path))
    assert metrics["top1"] == right / metrics["videos"]
    assert [row["views"] for row in rows(tmp_path)].count(0) == 1
    assert "1 videos could not be decoded" in capsys.readouterr().out


def test_a_run_folder_is_read_best_first_and_gets_the_results(
    model: Path, videos: Path, tmp_path: Path, quiet_process: None
) -> None:
    run = tmp_path / "run"
    shutil.copytree(model, run / "model")
    (run / "config.yaml").touch()
    assert start(str(run), str(videos / "list.txt"), config())() == 0
    assert {path.name for path in run.iterdir()} == {
        "model",
        "config.yaml",
        "mistakes",
        "report.html",
        *RESULTS,
    }
    assert json.loads((run / "metrics.json").read_text())["settings"]["model"] == str(run / "model")
    with pytest.raises(
        ValueError, match=r"metrics.json: was made with num_crops = 2, now 3; choose another output"
    ):
        start(str(run / "model"), str(videos / "list.txt"), config("num_crops=3"))
    shutil.copytree(model, run / "best")
    with pytest.raises(ValueError, match=r"was made with model = .*model, now .*best"):
        start(str(run), str(videos / "list.txt"), config())


def test_frames_can_be_chosen_otherwise_than_the_model_says_and_it_is_told(
    model: Path,
    videos: Path,
    tmp_path: Path,
    quiet_process: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = load_pretrained(model, VideoClassifier)
    chosen.classifier_config = replace(chosen.classifier_config, sampling="uniform", stride=3)
    save_model_folder(tmp_path / "chosen", chosen)
    expected = evaluate(
        tmp_path / "chosen", videos / "list.txt", tmp_path / "expected", "all_scores=true"
    )
    assert "given" not in capsys.readouterr().out
    found = evaluate(
        model,
        videos / "list.txt",
        tmp_path / "found",
        "sampling=uniform",
        "stride=3",
        "antialias=true",
        "all_scores=true",
    )
    out = capsys.readouterr().out
    assert (
        "sampling = uniform: given, the model says dense\nstride = 3: given, the model says 2\n"
        "antialias = True: given, the model says True\n"
    ) in out
    assert "(uniform)" in out
    assert {**found["settings"], "model": ""} == {**expected["settings"], "model": ""}
    assert rows(tmp_path / "found") == rows(tmp_path / "expected")
    evaluate(model, videos / "list.txt", tmp_path / "own", "all_scores=true")
    assert rows(tmp_path / "own") != rows(tmp_path / "found")
    with pytest.raises(ValueError, match="was made with sampling = uniform, now dense"):
        start(str(model), str(videos / "list.txt"), config(f"output={tmp_path / 'found'}"))


def test_the_number_of_clips_follows_the_sampling_that_is_chosen(
    model: Path, videos: Path, tmp_path: Path, quiet_process: None
) -> None:
    plans = [
        Evaluation(
            str(model),
            str(videos / "list.txt"),
            parse(None, [f"output={tmp_path}", "num_workers=0", *more], EvaluateConfig),
        )
        for more in ([], ["sampling=uniform"])
    ]
    assert [(plan.views.num_clips, plan.views.stride) for plan in plans] == [(5, 2), (2, 2)]


def test_predict_can_choose_frames_otherwise_too(
    model: Path, videos: Path, quiet_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    video = str(videos / "a" / "3.mp4")
    chosen = load_pretrained(model, VideoClassifier, facts=Facts(sampling="uniform", stride=1))
    assert predict.start(str(model), [video], PredictConfig(sampling="uniform", stride=1)) == 0
    first, second, best, *_ = capsys.readouterr().out.splitlines()
    assert (first, second) == (
        "sampling = uniform: given, the model says dense",
        "stride = 1: given, the model says 2",
    )
    name, probability = classify_video(chosen, video)[0]
    assert best == f"{probability:7.2%}  {name}"


def test_a_folder_of_classes_is_matched_by_name(
    model: Path, videos: Path, tmp_path: Path, quiet_process: None
) -> None:
    # no `run`: positions would be off by one
    for name, video in (("swim", "a/0.mp4"), ("fly", "a/1.mp4"), ("fly", "a/2.mp4")):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(videos / video, tmp_path / "data" / name)
    evaluate(model, tmp_path / "data", tmp_path / "out")
    assert [(row["label"], row["class"]) for row in rows(tmp_path / "out")] == [
        (2, "fly"),
        (2, "fly"),
        (1, "swim"),
    ]


def test_arrays_are_evaluated_as_they_are_trained_on(tmp_path: Path, quiet_process: None) -> None:
    torch.manual_seed(0)
    size = replace(MODEL, in_channels=1, mean=(0.5,), std=(0.2,))
    classifier = VideoClassifier(
        size, ClassifierConfig(num_classes=3, stride=1, head_init_scale=300.0)
    ).eval()
    save_model_folder(tmp_path / "model", classifier)
    volume = np.random.default_rng(0).normal(100, 30, (4, 16, 16)).astype(np.float32)
    np.save(tmp_path / "volume.npy", volume)
    (tmp_path / "list.txt").write_text("volume.npy 1\n")
    evaluate(
        tmp_path / "model",
        tmp_path / "list.txt",
        tmp_path / "out",
        "data.value_range=[0,200]",
        "all_scores=true",
    )
    with torch.no_grad():
        logits = classifier(torch.from_numpy(volume.clip(0, 200) / 200)[None, ..., None])
    assert rows(tmp_path / "out")[0]["scores"] == pytest.approx(
        logits.softmax(dim=1)[0].tolist(), abs=1e-3
    )


def test_a_video_is_classified_in_five_lines(
    model: Path, videos: Path, tmp_path: Path, quiet_process: None
) -> None:
    evaluate(model, videos / "list.txt", tmp_path)
    classifier = load_pretrained(model)
    found = classify_video(classifier, videos / "a" / "3.mp4", num_clips=2, num_crops=2)
    row = next(row for row in rows(tmp_path) if row["path"].endswith("a/3.mp4"))
    assert [{"class": name, "probability": probability} for name, probability in found] == row[
        "top"
    ]
    assert sum(probability for _, probability in found) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"b/1\.mp4: pyav: the file is cut off"):
        classify_video(classifier, videos / "b" / "1.mp4")
    with pytest.raises(ValueError, match="a VideoMAE has no classes"):
        classify_video(VideoMAE(MODEL), videos / "a" / "3.mp4")


def test_classifying_leaves_the_model_in_its_mode(
    model: Path, videos: Path, quiet_process: None
) -> None:
    classifier = VideoClassifier(
        MODEL, ClassifierConfig(num_classes=3, head_dropout=0.5, head_init_scale=300.0)
    ).train()
    once, again = (classify_video(classifier, videos / "a" / "3.mp4") for _ in range(2))
    assert once == again
    assert classifier.training
    assert once[0][0].startswith("class ")


def test_scores_that_are_not_finite_give_no_figures(
    model: Path,
    videos: Path,
    tmp_path: Path,
    quiet_process: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    classifier = load_pretrained(model, VideoClassifier)
    classifier.head.weight.data.fill_(3e38)  # finite, but not what comes out
    save_model_folder(tmp_path / "model", classifier)
    assert (
        start(
            str(tmp_path / "model"), str(videos / "list.txt"), config(f"output={tmp_path / 'out'}")
        )()
        == 3
    )
    assert "not finite" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_list_of_broken_videos_gives_no_figures(
    model: Path,
    videos: Path,
    tmp_path: Path,
    quiet_process: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "list.txt").write_text(f"{videos / 'b' / '1.mp4'} 0\n")
    assert (
        start(str(model), str(tmp_path / "list.txt"), config(f"output={tmp_path / 'out'}"))() == 3
    )
    assert "none of the 1 videos could be decoded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"list\.txt: the list is empty"),
        (
            "a/0.mp4\na/1.mp4 1\n",
            r"LIST: .*a/0\.mp4 has no label in .*list\.txt, write lines `PATH LABEL`",
        ),
        (
            "a/0.mp4 0\na/1.mp4 3\n",
            r"LIST: .*a/1\.mp4 has the label 3, there are 3 classes \(0 to 2\); correct .*list\.txt",
        ),
        ("a/0.mp4 -7\n", r"LIST: .*a/0\.mp4 has the label -7, number the classes from 0"),
        ("a/none.mp4 0\n", r"list\.txt:1: no such file"),
    ],
)
def test_a_wrong_list_is_one_line(
    model: Path, videos: Path, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "list.txt").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        start(
            str(model),
            str(tmp_path / "list.txt"),
            config(f"output={tmp_path}", f"data.root={videos}"),
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("run\nfly\nswim\n", r"classes\.txt: class 1 is fly, the model calls it swim"),
        ("run\nswim\n", r"classes\.txt: names 2 classes, the model has 3"),
    ],
)
def test_a_class_list_that_does_not_match_is_one_line(
    model: Path, videos: Path, tmp_path: Path, classes: str, message: str
) -> None:
    (tmp_path / "list.txt").write_text(f"{videos / 'a' / '0.mp4'} 0\n")
    (tmp_path / "classes.txt").write_text(classes)
    with pytest.raises(ValueError, match=message):
        start(str(model), str(tmp_path / "list.txt"), config(f"output={tmp_path / 'out'}"))


def test_other_mistakes_are_one_line(model: Path, videos: Path, tmp_path: Path) -> None:
    source = str(videos / "list.txt")
    save_model_folder(tmp_path / "mae", VideoMAE(MODEL))
    with pytest.raises(ValueError, match="holds a VideoMAE, a VideoClassifier is wanted"):
        start(str(tmp_path / "mae"), source, config(f"output={tmp_path / 'out'}"))
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        start(str(tmp_path / "nowhere"), source, config())
    with pytest.raises(ValueError, match=r"output: \(empty\), name a folder"):
        start(str(model), source, config())
    with pytest.raises(FileNotFoundError, match="LIST: no such list file or folder"):
        start(str(model), str(tmp_path / "none.txt"), config(f"output={tmp_path / 'out'}"))
    (tmp_path / "data" / "swin").mkdir(parents=True)
    shutil.copy(videos / "a" / "0.mp4", tmp_path / "data" / "swin")
    with pytest.raises(
        ValueError,
        match=r"the folder swin is none of the model's 3 classes \(did you mean swim\?\)",
    ):
        start(str(model), str(tmp_path / "data"), config(f"output={tmp_path / 'out'}"))
    for override, message in (
        ("num_clips=0", "num_clips: 0 must be at least 1"),
        ("data.source=x", "unknown key data.source"),
        ("data.stride=0", "data.stride: 0 must be at least 1"),
        ("stride=0", "stride: 0 must be at least 1"),
        ("sampling=sparse", "sampling"),
    ):
        with pytest.raises(ValueError, match=message):
            config(override)
