"""Features along videos: of the right frames, at the right times, whole files only, one for each
full path.
"""

import json
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from video_mae import (
    ClassifierConfig,
    ModelConfig,
    VideoClassifier,
    VideoMAE,
    load_pretrained,
    save_model_folder,
)
from video_mae.config import ClipsConfig
from video_mae.config.evaluation import ExtractConfig
from video_mae.config.model import Sampling
from video_mae.config.schema import parse
from video_mae.data import views as module
from video_mae.data.views import Windows
from video_mae.decoding import Reading, decode, stream
from video_mae.evaluation.extract import FeatureFile, file_name, start
from video_mae.evaluation.features import FrozenEncoder

MODEL = ModelConfig(
    num_frames=4,
    height=16,
    width=16,
    patch_size=8,
    embed_dim=24,
    depth=5,
    num_heads=2,
    decoder_embed_dim=8,
    decoder_depth=1,
    decoder_num_heads=2,
    class_tokens=1,
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mae") / "model"
    save_model_folder(folder, VideoMAE(MODEL))
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """103 frames, 25 a second, 16 x 16 pixels, so that nothing is resized."""
    frames = np.random.default_rng(0).integers(0, 256, (103, 16, 16, 3), dtype=np.uint8)
    return write_video(tmp_path_factory.mktemp("video") / "long.mp4", frames)


@pytest.fixture(autouse=True)
def _one_thread(quiet_process: None) -> None:
    pass


def config(*overrides: str) -> ExtractConfig:
    return parse(
        None,
        ["num_workers=0", "data.stride=3", "hop=10", "batch_size=4", *overrides],
        ExtractConfig,
    )


def extract(model: Path, source: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    """The arrays of the only video."""
    assert start(str(model), str(source), str(folder), config(*overrides))() == 0
    (file,) = [path for path in folder.iterdir() if path.suffix in (".npz", ".safetensors")]
    return load_file(file) if file.suffix == ".safetensors" else dict(np.load(file))


def clips_of(video: Path) -> torch.Tensor:
    """What the options above mean, written out: 11 clips, the last of which repeats the last frame."""
    frames = torch.from_numpy(decode(str(video), np.arange))
    clips = [[min(first + 3 * t, 102) for t in range(4)] for first in range(0, 101, 10)]
    assert clips[-1] == [100, 102, 102, 102]
    return torch.stack([frames[clip] for clip in clips])


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
@pytest.mark.parametrize("level", ["pooled", "tokens", "pyramid"])
def test_features_are_those_of_a_direct_call_on_the_same_frames(
    model: Path, video: Path, tmp_path: Path, level: str, ending: str
) -> None:
    arrays = extract(
        model,
        video,
        tmp_path / "out",
        f"level={level}",
        f"format={ending}",
        *(["layers=[4,1]"] if level == "pyramid" else []),
    )
    encoder = load_pretrained(model, VideoMAE).encoder
    with torch.no_grad():
        tokens = encoder(clips_of(video))
        if level == "pooled":
            expected = tokens[:, 1:].mean(dim=1)  # without the class token
        elif level == "tokens":
            expected = tokens[:, 1:].unflatten(1, (2, 2, 2))
        else:
            found = {}
            for layer in (1, 4):
                encoder.blocks[layer].register_forward_hook(
                    lambda _, __, output, layer=layer: found.update({layer: output})
                )
            encoder(clips_of(video))
            norm = encoder.norm
            assert isinstance(norm, torch.nn.LayerNorm)
            # the last block is what the norm reads
            torch.testing.assert_close(norm(found[4]), tokens)
            expected = torch.stack([found[4], found[1]], dim=1)[:, :, 1:].unflatten(2, (2, 2, 2))
    assert arrays["start_frame"].tolist() == list(range(0, 101, 10))
    assert arrays["features"].dtype == np.float32
    assert arrays["features"].shape == expected.shape
    np.testing.assert_allclose(arrays["features"], expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", ["uniform", "parts"])
def test_a_uniform_clip_is_all_of_the_video(
    trained: Sampling, tmp_path: Path, video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier = VideoClassifier(MODEL, ClassifierConfig(num_classes=3, sampling=trained)).eval()
    save_model_folder(tmp_path / "model", classifier)
    arrays = extract(tmp_path / "model", video, tmp_path / "out", "sampling=uniform", "hop=0")
    assert "frames:" not in capsys.readouterr().out
    # the middles of four parts of 103 frames
    frames = torch.from_numpy(decode(str(video), np.arange))[[12, 38, 64, 90]]
    with torch.no_grad():
        expected = FrozenEncoder(classifier, CPU)(frames[None]).pooled_BD
    np.testing.assert_allclose(arrays["features"], expected.numpy(), rtol=1e-5, atol=1e-5)
    assert (arrays["start_frame"].tolist(), arrays["start_seconds"][0]) == ([0], 0.0)
    assert arrays["end_seconds"] == pytest.approx([103 / 25])
    with pytest.raises(
        ValueError, match=r"extract.json: was made with sampling = uniform, now dense"
    ):
        extract(tmp_path / "model", video, tmp_path / "out", "hop=0", "sampling=dense")


def test_frames_that_a_classifier_was_not_trained_on_are_told(
    tmp_path: Path, video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model_folder(
        tmp_path / "model", VideoClassifier(MODEL, ClassifierConfig(num_classes=3, stride=2))
    )
    one = extract(tmp_path / "model", video, tmp_path / "one")
    assert (
        "frames: dense, stride 3, as given here; without it dense, stride 2\n"
        in capsys.readouterr().out
    )
    same = parse(None, ["num_workers=0", "stride=3", "hop=10", "batch_size=4"], ExtractConfig)
    # the same features, by the other key
    assert start(str(tmp_path / "model"), str(video), str(tmp_path / "one"), same)() == 0
    two = extract(tmp_path / "model", video, tmp_path / "two", "stride=2")  # and data.stride=3
    assert "frames:" not in capsys.readouterr().out.split("features")[-2]
    assert not np.array_equal(one["features"], two["features"])
    for overrides, said in ((("sampling=uniform",), "hop: 10 is for"),):
        with pytest.raises(ValueError, match=said):
            config(*overrides)


def test_clips_are_those_of_the_training_unless_others_are_asked_for(
    tmp_path: Path, video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remembering = VideoMAE(MODEL)
    remembering.clips_config = ClipsConfig(stride=2)
    models = {
        "remembers": remembering,
        "does not": VideoMAE(MODEL),
        "classifier": VideoClassifier(MODEL, ClassifierConfig(num_classes=3, stride=6)),
        "uniform": VideoClassifier(MODEL, ClassifierConfig(num_classes=3, sampling="parts")),
    }
    starts = {"remembers": 8, "does not": 16, "classifier": 24}
    for name, model in models.items():
        save_model_folder(tmp_path / name, model)
        plain = parse(None, ["num_workers=0"], ExtractConfig)
        assert start(str(tmp_path / name), str(video), str(tmp_path / "out" / name), plain)() == 0
        (file,) = (tmp_path / "out" / name).glob("*.npz")
        begins = np.load(file)["start_frame"].tolist()
        assert begins[:2] == ([0, starts[name]] if name in starts else [0])
        said = json.loads((tmp_path / "out" / name / "extract.json").read_text())
        assert said["data.stride"] == starts.get(name, 16) // 4
        assert said["sampling"] == ("uniform" if name == "uniform" else "dense")
    assert "frames:" not in capsys.readouterr().out
    told = extract(tmp_path / "remembers", video, tmp_path / "told")
    assert told["start_frame"].tolist() == list(range(0, 101, 10))
    assert "as given here; without it dense, stride 2" in capsys.readouterr().out
    # a hop is of dense clips
    extract(tmp_path / "uniform", video, tmp_path / "dense")


def test_a_classifier_gives_what_its_head_reads(tmp_path: Path, video: Path) -> None:
    torch.manual_seed(1)
    classifier = VideoClassifier(MODEL, ClassifierConfig(num_classes=3, head_init_scale=1.0)).eval()
    classifier.get_parameter("fc_norm.weight").data.normal_()
    clip_BTHWC = clips_of(video)[:3]
    pooled = FrozenEncoder(classifier, CPU)(clip_BTHWC).pooled_BD
    torch.testing.assert_close(classifier.head(pooled), classifier(clip_BTHWC))
    first = VideoClassifier(
        MODEL, ClassifierConfig(num_classes=3, head_init_scale=1.0, pooling="first")
    ).eval()
    torch.testing.assert_close(
        first.head(FrozenEncoder(first, CPU)(clip_BTHWC).pooled_BD), first(clip_BTHWC)
    )


def test_times_of_a_25_fps_file_are_right(model: Path, video: Path, tmp_path: Path) -> None:
    arrays = extract(model, video, tmp_path / "out")
    starts = np.arange(11) * 10
    assert arrays["start_frame"].tolist() == starts.tolist()
    assert arrays["start_seconds"] == pytest.approx(starts / 25, abs=1e-5)
    # a clip spans 12 frames
    assert arrays["end_seconds"] == pytest.approx([*(starts[:10] + 12) / 25, 103 / 25], abs=1e-5)


def test_times_follow_the_stamps_of_a_variable_frame_rate(shared_videos: Path) -> None:
    windows = Windows(
        num_frames=4, height=16, width=16, stride=2, hop=5, crop="center", reading=Reading()
    )
    with av.open(str(shared_videos / "real" / "vfr.mp4")) as container:
        seconds = sorted(
            frame.time for frame in container.decode(video=0) if frame.time is not None
        )
    times, _ = windows.read(str(shared_videos / "real" / "vfr.mp4"))
    first = seconds[0]
    assert times.start_seconds_C == pytest.approx(
        [second - first for second in seconds[: len(times.start_frame_C) * 5 : 5]], abs=1e-3
    )
    # without stamps on some frames
    avi, _ = windows.read(str(shared_videos / "real" / "tests_data_test.avi"))
    assert avi.start_seconds_C == pytest.approx(avi.start_frame_C / 25)


def test_a_video_shorter_than_a_clip_is_one_clip(
    model: Path, write_video: Callable[..., Path], tmp_path: Path
) -> None:
    frames = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    arrays = extract(model, write_video(tmp_path / "short.mp4", frames), tmp_path / "out")
    assert arrays["features"].shape == (1, 24)
    assert (arrays["start_seconds"].tolist(), arrays["end_seconds"]) == (
        [0.0],
        pytest.approx([2 / 25], abs=1e-5),
    )


def test_clips_are_made_while_the_video_is_read_and_frames_are_let_go(
    video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, read = set(), []

    def counting(*arguments: Any) -> Any:
        for index, frame in enumerate(stream(*arguments)):
            read.append(index)
            yield frame

    fit = Windows._fit

    def tracked(self: Windows, frame: torch.Tensor) -> torch.Tensor:
        fitted, number = fit(self, frame).clone(), len(read)
        alive.add(number)
        weakref.finalize(fitted, alive.discard, number)
        return fitted

    monkeypatch.setattr(module, "stream", counting)
    monkeypatch.setattr(Windows, "_fit", tracked)
    windows = Windows(
        num_frames=4, height=16, width=16, stride=3, hop=2, crop="whole", reading=Reading()
    )
    most = []
    for clip_THWC in windows.read(str(video))[1]:
        assert clip_THWC.shape == (4, 16, 16, 3)
        assert len(read) <= 2 * len(most) + 10  # frames that are wanted up to the end of this clip
        most.append(len(alive))
    assert len(most) == 47
    assert max(most) <= windows.span + 1


def test_the_middle_or_all_of_a_frame_is_seen(
    video: Path, write_video: Callable[..., Path], tmp_path: Path
) -> None:
    frames = np.zeros((4, 32, 64, 3), dtype=np.uint8)
    frames[:, :, :16], frames[:, :, 48:] = 255, 255  # the sides are white
    path = str(write_video(tmp_path / "sides.mp4", frames))
    clips = {}
    for crop in ("center", "whole"):
        windows = Windows(
            num_frames=4, height=16, width=16, stride=1, hop=4, crop=crop, reading=Reading()
        )
        (clips[crop],) = windows.read(path)[1]
    assert clips["center"].float().mean() < 10
    assert clips["whole"].float().mean() == pytest.approx(127, abs=10)


def test_equal_names_in_two_folders_have_two_files(
    model: Path, write_video: Callable[..., Path], tmp_path: Path
) -> None:
    rng, paths = np.random.default_rng(2), [tmp_path / "a" / "x.mp4", tmp_path / "b" / "x.mp4"]
    for path in paths:
        write_video(path, rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8))
    # one of them twice, with and without a label
    (tmp_path / "list.txt").write_text("a/x.mp4\nb/x.mp4\na/x.mp4 7\n")
    assert start(str(model), str(tmp_path / "list.txt"), str(tmp_path / "out"), config())() == 0
    index = [
        json.loads(line) for line in (tmp_path / "out" / "index.jsonl").read_text().splitlines()
    ]
    assert [row["path"] for row in index] == [str(path) for path in paths]
    first, second = (np.load(tmp_path / "out" / row["file"])["features"] for row in index)
    assert not np.allclose(first, second)
    assert file_name("a/x.mp4", "npz") == file_name(str(Path("a/x.mp4").absolute()), "npz")


def test_workers_and_ranks_give_the_same_files_and_name_the_bad_video(
    model: Path, write_video: Callable[..., Path], tmp_path: Path, on_ranks: Callable[..., None]
) -> None:
    rng = np.random.default_rng(3)
    for i in range(5):
        write_video(
            tmp_path / "videos" / f"{i}.mp4",
            rng.integers(0, 256, (10 * i + 5, 16, 16, 3), dtype=np.uint8),
        )
    content = (tmp_path / "videos" / "4.mp4").read_bytes()
    (tmp_path / "videos" / "cut.mp4").write_bytes(content[: len(content) // 2])
    (tmp_path / "list.txt").write_text(
        "".join(f"videos/{name}.mp4\n" for name in (4, "cut", 0, 1, 2, 3))
    )

    def work(folder: Path, *overrides: str) -> None:
        assert start(str(model), str(tmp_path / "list.txt"), str(folder), config(*overrides))() == 0

    work(tmp_path / "alone")
    work(tmp_path / "workers", "num_workers=2")
    on_ranks(2, lambda: work(tmp_path / "ranks"))
    for folder in (tmp_path / name for name in ("alone", "workers", "ranks")):
        index = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
        assert [bool("bad" in row) for row in index] == [False, True, False, False, False, False]
        assert {path.name for path in folder.iterdir()} == {
            "extract.json",
            "index.jsonl",
            *(row["file"] for row in index if "file" in row),
        }
        for path in (tmp_path / "alone").glob("*.npz"):
            assert path.read_bytes() == (folder / path.name).read_bytes()


def test_a_killed_extraction_leaves_whole_files_and_goes_on(
    model: Path, write_video: Callable[..., Path], tmp_path: Path
) -> None:
    rng = np.random.default_rng(4)
    frames = rng.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    write_video(tmp_path / "videos" / "0.mp4", frames)
    for i in range(1, 60):
        (tmp_path / "videos" / f"{i}.mp4").write_bytes((tmp_path / "videos" / "0.mp4").read_bytes())
    out, settings = (
        tmp_path / "out",
        ["num_workers=0", "data.stride=3", "hop=3", "batch_size=4", "level=tokens"],
    )
    command = [
        sys.executable,
        "-m",
        "video_mae",
        "extract",
        str(model),
        str(tmp_path / "videos"),
        str(out),
        *settings,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.npz"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.npz")}
    assert len(before) < 60
    assert all(np.load(path)["features"].shape == (17, 2, 2, 2, 24) for path in before)
    assert (
        start(str(model), str(tmp_path / "videos"), str(out), config("hop=3", "level=tokens"))()
        == 0
    )
    after = list(out.glob("*.npz"))
    assert len(after) == 60
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len({np.load(path)["features"].tobytes() for path in after}) == 1
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_a_file_is_there_when_it_is_closed(tmp_path: Path, kind: Any) -> None:
    features = np.random.default_rng(0).random((5, 2, 3)).astype(np.float32)
    beside = {"start_frame": np.arange(5), "end_seconds": np.arange(5) / 3}
    path = tmp_path / f"video.{kind}"
    file = FeatureFile(path, kind, (5, 2, 3), "float16", beside)
    file.append(features[:2])
    assert not path.exists()
    file.append(features[2:])
    assert file.missing == 0
    file.close()
    arrays = dict(np.load(path)) if kind == "npz" else load_file(path)
    assert arrays.keys() == {"features", *beside}
    assert np.array_equal(arrays["features"], features.astype(np.float16))
    assert all(np.array_equal(arrays[name], array) for name, array in beside.items())
    FeatureFile(tmp_path / f"other.{kind}", kind, (5, 2, 3), "float32", beside).discard()
    assert [path.name for path in tmp_path.iterdir()] == [f"video.{kind}"]


def test_mistakes_are_one_line(model: Path, video: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract(model, video, out)
    with pytest.raises(
        ValueError,
        match=r"extract.json: was made with hop = 10, now 11; choose another folder",
    ):
        start(str(model), str(video), str(out), config("hop=11"))
    torch.manual_seed(9)
    save_model_folder(tmp_path / "other", VideoMAE(MODEL))
    with pytest.raises(ValueError, match="was made with weights = "):
        start(str(tmp_path / "other"), str(video), str(out), config())
    with pytest.raises(ValueError, match=r"is not empty and has no extract.json; choose another"):
        start(str(model), str(video), str(tmp_path), config())
    with pytest.raises(ValueError, match=r"layers: \[5\] must be blocks of the encoder, 0 to 4"):
        start(str(model), str(video), str(tmp_path / "new"), config("level=pyramid", "layers=[5]"))
    with pytest.raises(FileNotFoundError, match="LIST_OR_VIDEO: no such list file or folder"):
        start(str(model), str(tmp_path / "none.txt"), str(tmp_path / "new"), config())
    with pytest.raises(ValueError, match=r"layers: .* are those of level=pyramid"):
        config("layers=[1]")
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    assert start(str(model), str(tmp_path / "bad.mp4"), str(tmp_path / "new"), config())() == 3
