"""A model folder: config.json (plain constructor data) beside model.safetensors. Only tensors are ever read."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from video_mae.config import ModelConfig, ObjectiveConfig
from video_mae.model import VideoMAE
from video_mae.schema import from_dict, to_dict


def save_model_folder(folder: str | Path, model: VideoMAE, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Writes a model folder whole or not at all, replacing an earlier one.

    state: the weights, where they do not live in `model` (under ZeRO they are gathered first); float32 is written.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in (state or model.state_dict()).items()}
    description = {"kind": "VideoMAE", "model": to_dict(model.config), "objective": to_dict(model.objective_config)}
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
        building = Path(work) / "new"
        building.mkdir()
        save_file(tensors, building / "model.safetensors", metadata={"format": "pt"})
        (building / "config.json").write_text(json.dumps(description, indent=2) + "\n")
        if folder.exists():
            os.replace(folder, Path(work) / "old")
        os.replace(building, folder)


def load_pretrained(folder: str | Path, *, impl: str = "auto") -> VideoMAE:
    """Reads a model folder into a VideoMAE on the CPU, in evaluation mode.

    Raises: FileNotFoundError; ValueError naming the file and what does not fit. Executes nothing from the files.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such file; a model folder holds config.json and model.safetensors")
    where = str(folder / "config.json")
    try:
        description = json.loads((folder / "config.json").read_text())
        model_config, objective_config = description["model"], description["objective"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: not the configuration of a model folder ({error!r})") from None
    model = VideoMAE(from_dict(ModelConfig, model_config, f"{where}: model"),
                     from_dict(ObjectiveConfig, objective_config, f"{where}: objective"), impl=impl)
    try:
        state = load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / 'model.safetensors'}: cannot be read ({error})") from None
    expected = model.state_dict()
    wrong = [f"{name} is missing" for name in expected if name not in state]
    wrong += [f"{name} is not part of this model" for name in state if name not in expected]
    wrong += [f"{name} has shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}" for name, tensor in expected.items()
              if name in state and state[name].shape != tensor.shape]
    if wrong:
        raise ValueError(f"{folder / 'model.safetensors'}: {wrong[0]}" + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""))
    model.load_state_dict(state)
    return model.eval()
