"""A model folder: config.json (plain constructor data) beside model.safetensors. Only tensors are ever read."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from video_mae.config import ClassifierConfig, ModelConfig, ObjectiveConfig
from video_mae.model import VideoClassifier, VideoMAE
from video_mae.schema import from_dict, to_dict

Model = VideoMAE | VideoClassifier
Kind = TypeVar("Kind", VideoMAE, VideoClassifier)


def save_model_folder(folder: str | Path, model: Model, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Writes a model folder whole or not at all, replacing an earlier one.

    state: the weights, where they do not live in `model` (under ZeRO they are gathered first); float32 is written.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in (state or model.state_dict()).items()}
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
        building = Path(work) / "new"
        building.mkdir()
        save_file(tensors, building / "model.safetensors", metadata={"format": "pt"})
        (building / "config.json").write_text(json.dumps(_describe(model), indent=2) + "\n")
        if folder.exists():
            os.replace(folder, Path(work) / "old")
        os.replace(building, folder)


@overload
def load_pretrained(folder: str | Path, *, impl: str = "auto") -> Model: ...
@overload
def load_pretrained(folder: str | Path, kind: type[Kind], *, impl: str = "auto") -> Kind: ...
def load_pretrained(folder: str | Path, kind: type[Model] | None = None, *, impl: str = "auto") -> Model:
    """Reads a model folder into a VideoMAE or a VideoClassifier, as it says, on the CPU, in evaluation mode.

    kind: the class that the caller can use. Raises: FileNotFoundError; ValueError naming the file and what does not fit, or for a
    model of another kind. Executes nothing from the files.
    """
    folder = Path(folder)
    model = _build(folder, impl)
    if kind is not None and not isinstance(model, kind):
        raise ValueError(f"{folder}: holds a {type(model).__name__}, a {kind.__name__} is wanted")
    state = _read_tensors(folder / "model.safetensors")
    expected = model.state_dict()
    wrong = [f"{name} is missing" for name in expected if name not in state]
    wrong += [f"{name} is not part of this model" for name in state if name not in expected]
    wrong += [f"{name} has shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}" for name, tensor in expected.items()
              if name in state and state[name].shape != tensor.shape]
    if wrong:
        raise ValueError(f"{folder / 'model.safetensors'}: {wrong[0]}" + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""))
    model.load_state_dict(state)
    return model.eval()


def _describe(model: Model) -> dict[str, Any]:
    if isinstance(model, VideoMAE):
        return {"kind": "VideoMAE", "model": to_dict(model.config), "objective": to_dict(model.objective_config)}
    return {"kind": "VideoClassifier", "model": to_dict(model.config), "classifier": to_dict(model.classifier_config)}


def _build(folder: Path, impl: str) -> Model:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such file; a model folder holds config.json and model.safetensors")
    where = f"{folder / 'config.json'}"
    try:
        description = json.loads((folder / "config.json").read_text())
        kind = description["kind"]
        head = {"VideoMAE": "objective", "VideoClassifier": "classifier"}[kind]
        model_config, head_config = description["model"], description[head]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: not the configuration of a model folder ({error!r})") from None
    config = from_dict(ModelConfig, model_config, f"{where}: model")
    if kind == "VideoMAE":
        return VideoMAE(config, from_dict(ObjectiveConfig, head_config, f"{where}: objective"), impl=impl)
    return VideoClassifier(config, from_dict(ClassifierConfig, head_config, f"{where}: classifier"), impl=impl)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
