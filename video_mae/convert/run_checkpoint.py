"""A checkpoint of a run of ours as a model, where the run has left no model folder: any ZeRO stage,
any number of ranks.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from video_mae.config import FinetuneConfig, PretrainConfig, load_config
from video_mae.config.schema import read_keys
from video_mae.model.vit import VideoClassifier, VideoMAE
from video_mae.training.checkpoint import MANIFEST, damaged_files, newest, read_manifest
from video_mae.training.engine import partitioned_weights
from video_mae.training.optim import parameter_groups


def checkpoint_folder(path: Path) -> Path | None:
    """The checkpoint that is meant: a folder with a manifest, or the newest one of a run folder;
    None for anything else.
    """
    if (path / MANIFEST).is_file():
        return path
    found = newest(path / "checkpoints")
    return found[0] if found else None


def load_checkpoint(folder: Path, *, trust: bool) -> VideoMAE | VideoClassifier:
    """The model that a checkpoint RUN/checkpoints/step_N holds, in float32.

    Raises: FileNotFoundError; ValueError where the checkpoint is not whole, or `trust` is not
    given: DeepSpeed keeps its state in pickles, and reading one executes whatever it holds.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(
            f"{folder}: is no complete checkpoint; take another, or the model folder of the run"
        )
    if not trust:
        raise ValueError(
            f"{folder}: holds pickles of DeepSpeed, which can execute code when they are read; take the run's model folder, "
            "or say trust=true if the run is your own"
        )
    damaged = damaged_files(folder, manifest, manifest["files"])
    if damaged:
        raise ValueError(
            f"{folder / damaged[0]}: is not what was written (its checksum is another); take another checkpoint"
        )
    model, config = _model_of_run(folder.resolve().parents[1] / "config.yaml")
    if manifest["zero_stage"] == 0:
        state = _unpartitioned(
            torch.load(
                folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False
            ),
            model,
            config,
        )
    else:
        state = partitioned_weights(folder)
    model.load_state_dict(state)
    return model.eval()


def _model_of_run(file: Path) -> tuple[VideoMAE | VideoClassifier, PretrainConfig | FinetuneConfig]:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; a checkpoint is read beside the configuration of its run"
        )
    if "classifier" in read_keys(file):
        config = load_config(file, schema=FinetuneConfig)
        return VideoClassifier(config.model, config.classifier), config
    config = load_config(file)
    return VideoMAE(config.model, config.objective), config


def _unpartitioned(
    content: Mapping[str, Any], model: torch.nn.Module, config: PretrainConfig | FinetuneConfig
) -> dict[str, torch.Tensor]:
    """Without ZeRO: the module's weights, or the float32 master copies that the optimizer keeps in
    its order.
    """
    state, masters = dict(content["module"]), content["optimizer"]
    if "fp32_groups" in masters:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        optim = config.optim
        groups = parameter_groups(
            model, optim.weight_decay, optim.layer_decay, decay_tokens=optim.decay_tokens
        )
        for group, values in zip(groups, masters["fp32_groups"], strict=True):
            state.update(
                (names[id(parameter)], value)
                for parameter, value in zip(group["params"], values, strict=True)
            )
    return {name: tensor.detach().float() for name, tensor in state.items()}
