"""Models by their names: a path, a repository of the hub, its cache; and what is sent there.

The hub is one of this machine (tests/hub_server.py).
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_server import Files, Hub, serving
from huggingface_hub import constants, hf_api
from safetensors.torch import load_file

from video_mae import (
    ClassifierConfig,
    ModelConfig,
    VideoClassifier,
    VideoMAE,
    load_pretrained,
    save_model_folder,
)
from video_mae.cli import main
from video_mae.convert.export import export_hugging_face
from video_mae.convert.hub import asking_hub
from video_mae.files import write_json
from video_mae.training.starting_weights import starting_weights
from video_mae.training.teacher import EncoderTeacher, TransformersTeacher, load_teacher

MODEL = ModelConfig(
    num_frames=4,
    height=32,
    width=32,
    patch_size=8,
    embed_dim=24,
    depth=1,
    num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
)
HEAD = ClassifierConfig(num_classes=3, class_names=("run", "swim", "fly"), stride=2)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty hub, which this process asks, with an empty cache and the token of a writer."""
    template = "/{repo_id}/resolve/{revision}/{filename}"
    with serving() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hf_api.api, "endpoint", served.url)
        monkeypatch.setenv("HF_TOKEN", "writer")
        yield served


def files_of(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """folder("name", seed): a model folder of a classifier with weights of its own."""

    def make(name: str, seed: int = 0) -> Path:
        torch.manual_seed(seed)
        save_model_folder(tmp_path / name, VideoClassifier(MODEL, HEAD))
        return tmp_path / name

    return make


def weight(model: Any) -> torch.Tensor:
    return model.encoder.patch_embed.weight.detach()


def stored(files: Path) -> torch.Tensor:
    return load_file(files / "model.safetensors")["encoder.patch_embed.weight"]


def status(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def test_a_model_of_the_hub_is_loaded_by_its_name_and_once(
    hub: Hub, folder: Callable[..., Path]
) -> None:
    now, before = folder("now", 0), folder("before", 1)
    others = {"modeling.py": b"raise SystemExit", "model.pt": b"?", "sub/model.safetensors": b"?"}
    others["transformers/config.json"] = b"{}"
    hub.repositories["me/small"] = {"main": files_of(now) | others, "v1": files_of(before)}
    for name in ("hf://me/small", "me/small", "hf:me/small", "hf://me/small@main"):
        assert weight(load_pretrained(name)).equal(stored(now)), name
    assert weight(load_pretrained("me/small@v1")).equal(stored(before))
    commit = hub.commit(hub.repositories["me/small"]["v1"])
    assert weight(load_pretrained(f"hf://me/small@{commit}")).equal(stored(before))
    fetched = [name for name in hub.requests if name.startswith("GET /me/small/resolve")]
    # two files of one commit, one that is another of the other: nothing that is code, unknown or in
    # another folder
    assert sorted(name.rpartition("/")[2] for name in fetched) == [
        "config.json",
        "model.safetensors",
        "model.safetensors",
    ]


def test_a_path_that_is_there_is_a_path(
    hub: Hub, folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["me/small"] = {"main": files_of(folder("other", 1))}
    here = folder("me/small")
    monkeypatch.chdir(tmp_path)
    assert weight(load_pretrained("me/small")).equal(stored(here))
    assert hub.requests == []
    assert weight(load_pretrained("hf://me/small")).equal(stored(tmp_path / "other"))


def test_a_run_folder_is_a_model_too(folder: Callable[..., Path], tmp_path: Path) -> None:
    model, best = folder("run/model", 0), folder("run/best", 1)
    assert weight(load_pretrained(tmp_path / "run")).equal(stored(best))
    assert weight(load_pretrained(model)).equal(stored(model))


def test_pickles_of_weights_are_read_and_code_in_them_is_not_run(hub: Hub, tmp_path: Path) -> None:
    model = VideoMAE(replace(MODEL, encoder_norm=False)).eval()
    theirs = tmp_path / "theirs"
    export_hugging_face(model, theirs)
    torch.save(load_file(theirs / "model.safetensors"), tmp_path / "pytorch_model.bin")
    files = files_of(theirs)
    del files["model.safetensors"]
    read = (tmp_path / "pytorch_model.bin").read_bytes()
    hub.repositories["them/old"] = {"main": files | {"pytorch_model.bin": read}}
    assert weight(load_pretrained("them/old")).equal(weight(model))

    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    evil = pickle.dumps({"model": Payload()})
    hub.repositories["them/evil"] = {"main": files | {"pytorch_model.bin": evil}}
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: "):
        load_pretrained("them/evil")
    assert not (tmp_path / "executed").exists()


def test_what_is_not_there_is_said_in_one_line(
    hub: Hub, folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories["me/small"] = {"main": files_of(folder("small"))}
    for name, said in (
        ("/no/model", r"/no/model: no such file or folder"),
        ("no/such/path", "no/such/path: no such file or folder"),
        ("model.pth", "model.pth: no such file or folder"),
        ("me/none", "me/none: no such file or folder here, and nothing from the hub (404 "),
        (
            "hf://me/small@v9",
            "hf://me/small@v9: no such file or folder here, and nothing from the hub",
        ),
    ):
        assert status("extract", name, tmp_path, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.startswith(f"video-mae extract: {said}")
        assert error.count("\n") == 1
        assert ("HF_TOKEN" in error) == ("hub" in said)
    assert "Revision Not Found" in error
    with pytest.raises(FileNotFoundError, match=r"^x \((word ){39}\.\.\.\); "), asking_hub("x"):
        raise OSError("word\n" * 100)  # cut at a word


def test_a_cache_does_without_the_hub(
    hub: Hub, folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = folder("small")
    hub.repositories["me/small"] = {"main": files_of(small)}
    load_pretrained("me/small")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert weight(load_pretrained("hf://me/small")).equal(stored(small))
    with pytest.raises(FileNotFoundError, match=r"^me/other: no such .*HF_HUB_OFFLINE") as error:
        load_pretrained("me/other")
    assert "\n" not in str(error.value)
    assert hub.requests == []


def test_a_process_heeds_the_environment_of_the_hub(
    hub: Hub, folder: Callable[..., Path], tmp_path: Path
) -> None:
    hub.repositories["me/small"] = {"main": files_of(folder("small"))}
    code = (
        "import sys; from video_mae.convert.hub import located;"
        "assert 'huggingface_hub' not in sys.modules; print(located('me/small'))"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    for offline in "01":
        environment["HF_HUB_OFFLINE"] = offline
        ended = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        found = Path(ended.stdout.strip())
        assert found.is_relative_to(tmp_path / "home" / "hub" / "models--me--small"), ended.stderr
        assert (found / "model.safetensors").is_file()
        hub.repositories.clear()


@pytest.mark.slow
def test_training_starts_from_and_learns_of_models_of_the_hub(
    hub: Hub, folder: Callable[..., Path], tmp_path: Path, tiny: Callable[..., Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    save_model_folder(tmp_path / "mae", VideoMAE(tiny().model))
    hub.repositories["me/mae"] = {"main": files_of(tmp_path / "mae")}
    _, weights = starting_weights(tiny("checkpoint=me/mae"))
    name = "encoder.patch_embed.weight"
    assert weights.tensors[name].equal(stored(tmp_path / "mae"))
    with pytest.raises(FileNotFoundError, match=r"^checkpoint: me/none: no such"):
        starting_weights(tiny("checkpoint=me/none"))

    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dino")
    processor = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"height": 32, "width": 32},
    }
    write_json(tmp_path / "dino" / "preprocessor_config.json", processor)
    hub.repositories["them/dino"] = {"main": files_of(tmp_path / "dino")}
    for teacher, kind in (
        ("me/mae", EncoderTeacher),
        ("hf://me/mae", EncoderTeacher),
        ("them/dino", TransformersTeacher),
        ("hf://them/dino", TransformersTeacher),
        ("hf:them/dino", TransformersTeacher),
    ):
        features = tiny("objective.target=features", f"objective.teacher={teacher}")
        assert type(load_teacher(features)) is kind, teacher


def test_a_pushed_model_comes_back_with_a_card(
    hub: Hub, folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = folder("run/best")
    (tmp_path / "run" / "config.yaml").write_text("data: {source: /home/me/secret}\n")
    (tmp_path / "run" / "metrics.jsonl").write_text(
        '{"step": 2, "loss": 1.5, "val_top1": 0.75, "val_loss": 1.0}\n'
        '{"step": 4, "loss": 1.25, "val_top1": 0.5, "val_loss": 2.0, "lr": 0.125}\n'
    )
    metrics = {"settings": {"model": "/elsewhere/run/best", "list": "/home/me/val.txt"}}
    write_json(tmp_path / "run" / "metrics.json", {**metrics, "top1": 0.625, "videos": 8})
    words = ["data=Kinetics-400, ours", "licence=cc-by-nc-4.0", "private=true"]
    assert status("push", tmp_path / "run", "me/new", *words) == 0
    assert f"pushed {hub.url}/me/new/commit/" in capsys.readouterr().out
    assert [(made["name"], made["visibility"]) for made in hub.made] == [("new", "private")]
    files = hub.repositories["me/new"]["main"]
    card = files["README.md"].decode()
    _, header, text = card.split("---\n", 2)
    told = yaml.safe_load(header)
    assert told["license"] == "cc-by-nc-4.0"
    assert told["pipeline_tag"] == "video-classification"
    for said in ("Kinetics-400, ours", "step: 2", "val_top1: 0.75", "top1: 0.625", "videos: 8"):
        assert said in text
    assert "lr:" not in text
    assert "embed_dim: 24" in text
    assert 'load_pretrained("hf://me/new@main")' in text
    assert "VideoMAEForVideoClassification.from_pretrained('me/new', subfolder=" in text
    assert "/home/me" not in card
    model = load_pretrained("hf://me/new@main", VideoClassifier)
    assert weight(model).equal(stored(best))
    assert model.classifier_config == HEAD

    # other figures are of another model, what transformers cannot hold is not left of an earlier one
    learned = VideoClassifier(replace(MODEL, positions="learned"), HEAD)
    save_model_folder(tmp_path / "run" / "model", learned)
    assert status("push", tmp_path / "run" / "model", "me/new") == 0
    files = hub.repositories["me/new"]["main"]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    text = files["README.md"].decode()
    assert "top1: 0.625" not in text
    assert "step: 4" in text
    assert "It has no such model (format: Hugging Face's VideoMAE has no model.positions" in text

    save_model_folder(tmp_path / "run" / "other_model", VideoMAE(MODEL))
    metrics["settings"]["model"] = "/elsewhere/run/model"
    write_json(tmp_path / "run" / "metrics.json", {**metrics, "top1": 0.625})
    assert status("push", tmp_path / "run" / "other_model", "me/mae") == 0
    card = hub.repositories["me/mae"]["main"]["README.md"].decode()
    assert "pipeline_tag: feature-extraction\n" in card
    assert "top1: 0.625" not in card


def test_a_push_goes_to_a_branch_or_a_folder_or_says_why_not(
    hub: Hub,
    folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    transformers = pytest.importorskip("transformers")
    model, out = folder("model"), tmp_path / "out"
    hub.repositories["me/there"] = {"main": {"README.md": b"old"}, "next": {}}
    assert status("push", model, "me/there", "revision=next") == 0
    assert hub.repositories["me/there"]["main"] == {"README.md": b"old"}
    assert "model.safetensors" in hub.repositories["me/there"]["next"]
    hub.requests.clear()
    assert status("push", model, "me/there", f"output={out}") == 0
    assert status("push", model, "me/there", f"output={out}") == 2
    assert "out exists; choose another" in capsys.readouterr().err
    assert hub.requests == []
    theirs = transformers.VideoMAEForVideoClassification.from_pretrained(
        str(out), subfolder="transformers"
    )
    clip_BTHWC = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    mean, std = torch.tensor(MODEL.mean), torch.tensor(MODEL.std)
    pixels = ((clip_BTHWC / 255 - mean) / std).permute(0, 1, 4, 2, 3)
    with torch.no_grad():
        ours = load_pretrained(out)(clip_BTHWC)
        torch.testing.assert_close(theirs(pixels).logits, ours, rtol=1e-4, atol=1e-5)
    monkeypatch.setenv("HF_TOKEN", "reader")
    capsys.readouterr()  # transformers shows its progress
    for name, said in (
        ("nowhere at all", "OWNER/NAME: nowhere at all does not say whose it is to be"),
        ("me/not there", "Repo id must use alphanumeric chars"),
        ("a/b/c", "Repo id must be in the form"),
    ):
        assert status("push", model, name, f"output={tmp_path / 'none'}") == 2
        assert capsys.readouterr().err.startswith(f"video-mae push: {said}")
    assert not (tmp_path / "none").exists()
    for words in (("me/there",), ("me/new",), ("me/there", "revision=none")):
        assert status("push", model, *words) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"video-mae push: {words[0]}: was not sent (")
        assert error.count("\n") == 1
