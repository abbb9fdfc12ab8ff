"""Model folders: what goes in comes out, and nothing in them is ever executed."""

import json
import os
import pickle
import stat
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from video_mae import (
    ClassifierConfig,
    MaskConfig,
    ModelConfig,
    ObjectiveConfig,
    VideoClassifier,
    VideoMAE,
    load_pretrained,
    resized,
    save_model_folder,
    tube_mask,
)
from video_mae.config import ClipsConfig
from video_mae.convert import model_folder as weights
from video_mae.convert.model_folder import write_weights
from video_mae.evaluation.extract import FeatureFile
from video_mae.training.saving import write_state

MODEL = ModelConfig(
    num_frames=4,
    height=16,
    width=32,
    patch_size=8,
    embed_dim=12,
    depth=2,
    num_heads=2,
    decoder_embed_dim=8,
    decoder_depth=1,
    decoder_num_heads=2,
    in_channels=2,
    mean=(0.1, 0.2),
    std=(0.3, 0.4),
    drop_path=0.1,
)
OBJECTIVE = ObjectiveConfig(
    contrastive_weight=0.25, learn_temperature=True, negatives="batch", normalize="tubelet"
)


def make(seed: int = 0) -> VideoMAE:
    torch.manual_seed(seed)
    return VideoMAE(MODEL, OBJECTIVE)


def assert_same(ours: VideoMAE, theirs: VideoMAE) -> None:
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(
        torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items()
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model_folder(tmp_path / "deep" / "model", make())
    return tmp_path / "deep" / "model"


def test_model_comes_back_bit_for_bit_with_the_same_outputs(folder):
    model, loaded = make().eval(), load_pretrained(folder, VideoMAE)
    assert not loaded.training
    assert (loaded.config, loaded.objective_config) == (MODEL, OBJECTIVE)
    assert_same(model, loaded)
    clip = torch.randint(0, 256, (2, 4, 16, 32, 2), dtype=torch.uint8)
    mask = tube_mask(torch.arange(2), model.grid, 0.6)
    assert all(
        torch.equal(a, b) for a, b in zip(model(clip, mask), loaded(clip, mask), strict=True)
    )
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_how_clips_were_made_comes_back_and_earlier_folders_say_nothing(folder, tmp_path):
    assert load_pretrained(folder).clips_config is None
    assert "clips" not in json.loads((folder / "config.json").read_text())
    model, clips = make(), ClipsConfig(stride=7, mask=MaskConfig(kind="random", ratio=0.6))
    model.clips_config = clips
    save_model_folder(tmp_path / "one", model)
    # of another size, and once more
    save_model_folder(
        tmp_path / "two", resized(load_pretrained(tmp_path / "one", VideoMAE), num_frames=8)
    )
    for name in ("one", "two"):
        description = json.loads((tmp_path / name / "config.json").read_text())
        assert description["clips"] == {
            "sampling": "dense",
            "stride": 7,
            "mask": {"kind": "random", "ratio": 0.6, "decoder_mask_ratio": 0.0},
        }
        assert load_pretrained(tmp_path / name).clips_config == clips
    description["clips"]["stride"] = 0
    (tmp_path / "two" / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"config\.json: clips\.stride: 0 must be at least 1"):
        load_pretrained(tmp_path / "two")


def test_a_run_folder_is_read_as_its_best_or_last_model(tmp_path):
    save_model_folder(tmp_path / "run" / "model", make())
    assert_same(load_pretrained(tmp_path / "run", VideoMAE), make())
    save_model_folder(tmp_path / "run" / "best", make(seed=1))
    assert_same(load_pretrained(tmp_path / "run", VideoMAE), make(seed=1))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_decides(umask, mode, tmp_path):
    earlier = os.umask(umask)
    try:
        save_model_folder(tmp_path / "model", make())
        write_weights(tmp_path / "hub", make().state_dict(), {"config.json": {}})
        write_state(tmp_path / "checkpoint" / "state.safetensors", make().state_dict())
        beside = {"seconds": np.zeros(1)}
        file = FeatureFile(tmp_path / "features", "safetensors", (1, 2), "float32", beside)
        file.append(np.ones((1, 2)))
        file.close()
    finally:
        os.umask(earlier)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 6
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in files} == {
        path.name: mode for path in files
    }


def test_given_state_is_written_in_float32(tmp_path):
    state = {name: tensor.bfloat16() for name, tensor in make(seed=1).state_dict().items()}
    save_model_folder(tmp_path / "model", make(), state)
    for name, tensor in load_pretrained(tmp_path / "model", VideoMAE).state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[name].float())


def test_a_classifier_comes_back_with_its_classes(tmp_path):
    head = ClassifierConfig(
        num_classes=3, class_names=("run", "swim", "fly"), sampling="uniform", head_init_scale=1.0
    )
    torch.manual_seed(0)
    model = VideoClassifier(MODEL, head).eval()
    save_model_folder(tmp_path / "model", model)
    loaded = load_pretrained(tmp_path / "model", VideoClassifier)
    assert (loaded.config, loaded.classifier_config) == (MODEL, head)
    clip = torch.randint(0, 256, (2, 4, 16, 32, 2), dtype=torch.uint8)
    assert torch.equal(model(clip), loaded(clip))
    assert isinstance(load_pretrained(tmp_path / "model"), VideoClassifier)
    with pytest.raises(ValueError, match=r"model: holds a VideoClassifier, a VideoMAE is wanted"):
        load_pretrained(tmp_path / "model", VideoMAE)


def test_earlier_folder_is_replaced_whole(folder):
    (folder / "stale").write_text("")
    save_model_folder(folder, make(seed=1))
    assert_same(load_pretrained(folder, VideoMAE), make(seed=1))
    assert not (folder / "stale").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_failing_save_leaves_the_old_folder_and_nothing_else(folder, monkeypatch):
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_model_folder(folder, make(seed=1))
    assert_same(load_pretrained(folder, VideoMAE), make())
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


# modules of the package convert
OURS = ("facts", "hub", "model_folder")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_pretrained(folder, VideoMAE)


def test_no_other_project_s_format_is_imported_for_a_model_folder(folder):
    code = (
        "import sys, video_mae; model = video_mae.load_pretrained(sys.argv[1]);"
        "print(*sorted(name for name in sys.modules if name.startswith('video_mae.convert.')))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == [f"video_mae.convert.{name}" for name in OURS]


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_pretrained(tmp_path / "nowhere")


class Bomb:
    """A pickle of it would touch a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path(self.path),)  # pyright: ignore[reportReturnType]


def test_pickle_in_disguise_executes_nothing(folder, tmp_path):
    content = pickle.dumps(Bomb(tmp_path / "executed"))
    pickle.loads(content)
    assert (tmp_path / "executed").exists()  # it does work
    (tmp_path / "executed").unlink()
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_pretrained(folder, VideoMAE)
    torch.save({"x": Bomb(tmp_path / "executed")}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_pretrained(folder, VideoMAE)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 8, b"{}", struct.pack("<Q", 2**62), struct.pack("<Q", 2) + b"{]"]
)
def test_file_that_is_no_safetensors_is_named(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]*model\.safetensors: "):
        load_pretrained(folder, VideoMAE)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_truncated_weights_are_named(folder, share):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"^[^\n]*model\.safetensors: cannot be read"):
        load_pretrained(folder, VideoMAE)


def rename(state: dict[str, torch.Tensor]) -> None:
    state["decoder.head.wieght"] = state.pop("decoder.head.weight")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("encoder.norm.bias"), ["encoder.norm.bias", "missing"]),
        (lambda state: state.update(more=torch.zeros(1)), ["more", "not part"]),
        (
            lambda state: state.update({"decoder.head.bias": torch.zeros(3)}),
            ["decoder.head.bias", "(3,)", "(256,)"],
        ),
        (
            lambda state: state.update({"decoder.mask_token": torch.zeros(1, 1, 8)}),
            ["decoder.mask_token", "(1, 1, 8)", "(8,)"],
        ),
        (rename, ["decoder.head.weight", "1 more"]),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, change, said):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"^[^\n]*model\.safetensors: [^\n]*$") as error:
        load_pretrained(folder, VideoMAE)
    assert all(part in str(error.value) for part in said)


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("model", "dept", 2, "did you mean depth"),
        ("model", "depth", "many", "depth"),
        ("model", "depth", 0, "model.depth"),
        ("model", "num_heads", 5, "num_heads"),
        ("model", "mean", [0.1, 0.2, 0.3], "mean"),
        ("model", "std", "x", "std"),
        ("model", "depth", None, "depth"),
        ("model", "in_channels", True, "in_channels"),
        ("objective", "normalize", "chanel", "normalize"),
        ("objective", "tau", 1, "tau"),
    ],
)
def test_wrong_key_or_value_in_the_configuration_is_named(folder, section, key, value, said):
    description = json.loads((folder / "config.json").read_text())
    description[section][key] = value
    (folder / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"^[^\n]*config\.json: [^\n]*$") as error:
        load_pretrained(folder, VideoMAE)
    assert section in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"model": {}}',
        '{"model": 3, "objective": {}}',
        '{"model": [1], "objective": {}}',
        '{"model": {}, "objective": "clip"}',
    ],
)
def test_file_that_is_no_configuration_is_named(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"^[^\n]*config\.json: "):
        load_pretrained(folder, VideoMAE)
