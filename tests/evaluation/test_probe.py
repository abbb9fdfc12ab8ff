"""The probe stage: a planted signal is found, the choice is made on validation, caches and
repetitions change nothing.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from video_mae import (
    ClassifierConfig,
    ModelConfig,
    VideoClassifier,
    VideoMAE,
    load_pretrained,
    save_model_folder,
)
from video_mae.config import ClipsConfig
from video_mae.config.evaluation import ProbeConfig
from video_mae.config.schema import parse
from video_mae.evaluation.features import FrozenEncoder
from video_mae.evaluation.probe import Probing, choose_setting, start
from video_mae.evaluation.scores import Scores

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
    class_tokens=1,
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread(quiet_process: None) -> None:
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mae") / "model"
    save_model_folder(folder, VideoMAE(MODEL))
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """Lists train, val and test, whose label is which of three colours a video has more of; a
    broken video in train and in val.
    """
    root, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for split, num in (("train", 24), ("val", 9), ("test", 6)):
        lines = []
        for i in range(num):
            frames = rng.integers(0, 100, (6, 16, 24, 3), dtype=np.uint8)
            frames[..., i % 3] += 100
            lines.append(
                f"{write_video(root / split / f'{i}.mp4', frames).relative_to(root)} {i % 3}"
            )
        if split != "test":
            (root / split / "4.mp4").write_bytes(b"broken")
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    (root / "classes.txt").write_text("red\ngreen\nblue\n")
    return root


def config(videos: Path, output: Path, *overrides: str) -> ProbeConfig:
    return parse(
        None,
        [
            f"train={videos / 'train.txt'}",
            f"validation={videos / 'val.txt'}",
            f"output={output}",
            "num_workers=0",
            "epochs=20",
            "batch_size=8",
            "data.stride=1",
            "lrs=[0.0000001,0.01]",
            "weight_decays=[0.01]",
            *overrides,
        ],
        ProbeConfig,
    )


def probe(model: Path, videos: Path, output: Path, *overrides: str) -> dict[str, Any]:
    assert start(str(model), config(videos, output, *overrides))() == 0
    return json.loads((output / "metrics.json").read_text())


def test_a_planted_signal_is_found_by_every_kind(
    model: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = probe(model, videos, tmp_path / "out", f"test={videos / 'test.txt'}")
    assert metrics["videos"] == {"train": 24, "validation": 9, "test": 6}
    assert set(metrics["probes"]) == {"linear", "attentive", "knn"}
    for kind, found in metrics["probes"].items():
        assert found["validation"]["top1"] == 8 / 9, kind  # the broken one is wrong
        assert found["test"]["top1"] == 1, kind
        assert found["test"]["videos"] == 6
        best = max(entry["validation_top1"] for entry in found["grid"])
        chosen = [
            entry
            for entry in found["grid"]
            if all(entry[key] == value for key, value in found["chosen"].items())
        ]
        assert [entry["validation_top1"] for entry in chosen] == [best]
    assert len(metrics["probes"]["linear"]["grid"]) == 2
    assert [entry["k"] for entry in metrics["probes"]["knn"]["grid"]] == [1, 5, 20]
    assert {name: len(bad) for name, bad in metrics["bad"].items()} == {
        "train": 1,
        "validation": 1,
        "test": 0,
    }
    table = (tmp_path / "out" / "table.txt").read_text()
    assert table in capsys.readouterr().out
    assert "pretrained weights, 3 classes" in table
    assert "chosen on the validation list" in table
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metrics.json", "table.txt"}


def test_results_are_the_same_again_and_from_disk(
    model: Path, videos: Path, tmp_path: Path
) -> None:
    probe(model, videos, tmp_path / "once")
    probe(model, videos, tmp_path / "disk", "cache=disk", "num_workers=2")
    first, second = (
        json.loads((tmp_path / name / "metrics.json").read_text())["probes"]
        for name in ("once", "disk")
    )
    assert first == second


def test_random_weights_have_the_architecture_and_no_knowledge(
    model: Path, videos: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    trained = load_pretrained(model, VideoMAE)
    trained.encoder.patch_embed.weight.data.zero_()  # an encoder that has unlearned to see
    save_model_folder(tmp_path / "run" / "model", trained)
    for weights, folder in (("pretrained", "probe"), ("random", "probe_random")):
        overrides = [f"weights={weights}", "output=", "kind=linear"]
        assert start(str(tmp_path / "run"), config(videos, tmp_path, *overrides))() == 0
        metrics = json.loads((tmp_path / "run" / folder / "metrics.json").read_text())
        assert metrics["probes"]["linear"]["validation"]["top1"] == (
            8 / 9 if weights == "random" else 3 / 9
        )


def test_drawn_clips_are_encoded_as_they_come(model: Path, videos: Path, tmp_path: Path) -> None:
    for sampling in ("dense", "uniform"):
        metrics = probe(
            model,
            videos,
            tmp_path / sampling,
            "augment=true",
            "flip=true",
            "epochs=8",
            f"sampling={sampling}",
        )
        # chance is 3 of 9
        assert min(found["validation"]["top1"] for found in metrics["probes"].values()) >= 7 / 9


def test_views_are_examples_in_training_and_averaged_after_it(
    model: Path, videos: Path, tmp_path: Path
) -> None:
    metrics = probe(model, videos, tmp_path / "out", "num_clips=2", "num_crops=2", "epochs=5")
    assert min(found["validation"]["top1"] for found in metrics["probes"].values()) >= 7 / 9


def test_the_choice_is_made_on_validation_by_accuracy_and_then_by_certainty():
    def scores(score_MK: list[list[float]], seen: int = 3) -> Scores:
        score = np.array(score_MK)
        score[seen:] = np.nan
        return Scores(score, np.array([0, 1, 0]))

    right, sure, wrong = (
        [[0.6, 0.4], [0.4, 0.6], [0.6, 0.4]],
        [[0.9, 0.1], [0.2, 0.8], [0.8, 0.2]],
        [[0.1, 0.9], [0.8, 0.2], [0.2, 0.8]],
    )
    chosen = choose_setting(
        [{"k": k} for k in range(4)],
        {
            "validation": [scores(found) for found in (wrong, right, sure, right)],
            "test": [scores(found, seen=2) for found in (sure, sure, wrong, sure)],
        },
    )
    assert chosen["chosen"] == {"k": 2}  # though the others are better on the test list
    assert [entry["validation_top1"] for entry in chosen["grid"]] == [0, 1, 1, 1]
    assert (chosen["validation"]["top1"], chosen["test"]["top1"], chosen["test"]["videos"]) == (
        1,
        0,
        3,
    )


def test_features_are_those_of_the_encoder_one_by_one(
    model: Path, videos: Path, tmp_path: Path
) -> None:
    encoder = load_pretrained(model, VideoMAE).encoder
    probing = Probing(
        str(model), config(videos, tmp_path / "out", "num_clips=2", "encode_batch=5", "cache=disk")
    )
    features = probing.encode("train", FrozenEncoder(load_pretrained(model), CPU), tmp_path)
    assert (tmp_path / "train").is_file()
    pooled_MVD, tokens_MVND = features.pooled_MVD, features.tokens_MVND
    assert tokens_MVND is not None
    assert features.seen_M.tolist() == [i != 4 for i in range(24)]
    for video in (0, 3, 23):
        with torch.no_grad():
            path = probing.lists["train"].paths[video]
            tokens_VND = encoder(probing.views.read(path).clips())[:, 1:]
        torch.testing.assert_close(pooled_MVD[video], tokens_VND.mean(dim=1))
        torch.testing.assert_close(tokens_MVND[video].float(), tokens_VND, rtol=1e-3, atol=2e-3)
    assert (pooled_MVD[4] == 0).all()


def test_a_classifier_can_be_probed(videos: Path, tmp_path: Path) -> None:
    save_model_folder(tmp_path / "model", VideoClassifier(MODEL, ClassifierConfig(num_classes=7)))
    for weights in ("pretrained", "random"):
        metrics = probe(
            tmp_path / "model", videos, tmp_path / weights, "kind=linear", f"weights={weights}"
        )
        assert metrics["classes"] == 3  # of the list, not of the head


def test_frames_are_those_of_the_training_unless_others_are_asked_for(
    videos: Path, tmp_path: Path
) -> None:
    model = VideoMAE(MODEL)
    model.clips_config = ClipsConfig(stride=5)
    save_model_folder(tmp_path / "model", model)
    head = ClassifierConfig(num_classes=3, sampling="parts_v2", stride=7)
    save_model_folder(tmp_path / "classifier", VideoClassifier(MODEL, head))
    for name, overrides, expected in (
        ("model", [], ("dense", 5)),
        ("classifier", [], ("uniform", 7)),
        ("model", ["sampling=uniform", "data.stride=2"], ("uniform", 2)),
    ):
        asked = config(videos, tmp_path / "out", "data.stride=null", *overrides)
        plan = Probing(str(tmp_path / name), asked)
        assert (plan.views.sampling, plan.views.stride) == expected
        assert (plan.settings["sampling"], plan.settings["data.stride"]) == expected


def test_mistakes_are_one_line(
    model: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "more.txt").write_text(f"{videos / 'val' / '0.mp4'} 3\n")
    for overrides, message in (
        (
            [f"validation={tmp_path / 'more.txt'}"],
            r"validation: .* has the label 3, there are 3 classes",
        ),
        ([f"test={tmp_path / 'none.txt'}"], "test: no such list file or folder"),
        (["num_heads=5"], "num_heads: 5 does not divide the encoder's width 24"),
        (["kind=linear", "ks=[0]"], r"ks: \(0,\) must be at least 1"),
        (["train="], r"train: \(empty\) must be given"),
        (["data.source=x"], "unknown key data.source"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            start(str(model), config(videos, tmp_path / "out", *overrides))
    (tmp_path / "bad.txt").write_text(
        f"{videos / 'val' / '4.mp4'} 0\n{videos / 'val' / '0.mp4'} 0\n"
    )
    assert (
        start(str(model), config(videos, tmp_path / "out", f"validation={tmp_path / 'bad.txt'}"))()
        == 3
    )
    assert not (tmp_path / "out" / "metrics.json").exists()
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "29500"),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="probe: runs in one process"):
        start(str(model), config(videos, tmp_path / "out"))
