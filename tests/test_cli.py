"""The command line of the small stages: what they write, and one line for each mistake."""

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from video_mae import (
    MaskConfig,
    ModelConfig,
    ObjectiveConfig,
    VideoMAE,
    load_pretrained,
    save_model_folder,
)
from video_mae.cli import main
from video_mae.config import ClipsConfig


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_of:
        main(arguments)
    return int(exit_of.value.code or 0)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model_folder(
        folder,
        VideoMAE(
            ModelConfig(
                num_frames=4,
                height=32,
                width=32,
                patch_size=8,
                embed_dim=32,
                depth=1,
                num_heads=2,
                decoder_embed_dim=16,
                decoder_depth=1,
                decoder_num_heads=2,
            ),
            ObjectiveConfig(),
        ),
    )
    return folder


@pytest.fixture
def video(demo_folder: Path) -> str:
    return str(next((demo_folder / "val").rglob("*.mp4")))


def drawn(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The picture of the only video, and the first frame of its film."""
    (picture,), (film,) = folder.glob("*.png"), folder.glob("*.mp4")
    with av.open(str(film)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 4
    return np.asarray(Image.open(picture)), frames[0]


def test_reconstruct_starts_from_the_training_and_draws_the_same_each_time(
    model_folder: Path, video: str, tmp_path: Path
) -> None:
    """The model remembers stride 2 and a mask that hides 6 of 16 places."""
    run = tmp_path / "run"
    model = load_pretrained(model_folder, VideoMAE)
    model.clips_config = ClipsConfig(stride=2, mask=MaskConfig(kind="tube", ratio=0.4))
    save_model_folder(run / "model", model)
    for name, words in {
        "plain": [run],
        "told": [model_folder, "stride=2", "mask.ratio=0.4"],
        "data": [model_folder, "data.stride=2", "mask.ratio=0.4", "mask.kind=tube"],
        "seed": [run, "seed=1"],
        "ratio": [run, "mask.ratio=0.75"],
        "kind": [run, "mask.kind=random"],
        "stride": [run, "stride=1"],
        "none": [model_folder],
    }.items():
        model_, *keys = map(str, words)
        assert status("reconstruct", model_, video, *keys, f"output={tmp_path / name}") == 0
    plain, film = drawn(tmp_path / "plain")
    # original, visible, predicted: side by side, and below each other
    for tile in (plain[80:208, 84:212], film[60:188, 84:212]):
        assert 10 < tile.std() < 110
    for name in ("told", "data"):
        picture, other_film = drawn(tmp_path / name)
        assert (picture == plain).all()
        assert (other_film == film).all()
    for name in ("seed", "ratio", "kind", "stride", "none"):
        picture, _ = drawn(tmp_path / name)
        assert picture.shape != plain.shape or (picture != plain).any(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda words: ["/no/model", *words[1:]], "/no/model: no such file or folder"),
        (lambda words: [words[0], __file__, words[2]], "test_cli.py"),
        (lambda words: [*words, "none.mp4"], "none.mp4"),
        (
            lambda words: [*words, "mask.ratio=0.001"],
            "mask.ratio: 0.001 of 16 tokens a frame hides 0",
        ),
        (lambda words: [*words, "strides=2"], "unknown key strides (did you mean stride?)"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    model_folder: Path,
    video: str,
    tmp_path: Path,
    change: Callable[[list[str]], list[str]],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = change([str(model_folder), video, f"output={tmp_path / 'pictures'}"])
    assert status("reconstruct", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("video-mae reconstruct: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "reconstruct", "demo"])
def test_help_explains_every_key(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(stage, "--help", "all") == 0
    text = capsys.readouterr().out
    expected = {
        "pretrain": [
            "optim.micro_batch = 32",
            "model.embed_dim = 768",
            "{tube | random | random_kept | frame}",
        ],
        "finetune": [
            'checkpoint = ""',
            "augment.mixup = 0.8",
            "classifier.num_classes = 400",
            "{worker | device}",
        ],
        "reconstruct": ["stride = null", "mask.ratio = null"],
        "demo": ["train_clips = 960", "{easy | medium | hard}"],
    }
    assert all(words in text for words in expected[stage])


def test_demo_renders_once_and_refuses_another_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["train_clips=8", "validation_clips=8", "num_frames=4", "height=32", "width=32"]
    assert status("demo", str(tmp_path / "data"), *options) == 0
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    assert status("demo", str(tmp_path / "data"), *options) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == made
    assert status("demo", str(tmp_path / "data"), *options, "seed=1") == 2
    assert "seed" in capsys.readouterr().err
