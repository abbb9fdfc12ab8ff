"""A model folder: config.json (plain constructor data) beside model.safetensors. Only tensors are
ever read.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from video_mae.config import ClassifierConfig, ModelConfig, ObjectiveConfig
from video_mae.config.schema import from_dict, to_dict
from video_mae.convert import Facts, import_model
from video_mae.convert.architecture import MAX_TOKENS
from video_mae.convert.foreign_files import is_deepspeed_folder
from video_mae.files import json_text, write_whole
from video_mae.model.vit import VideoClassifier, VideoMAE

Model = VideoMAE | VideoClassifier
Kind = TypeVar("Kind", VideoMAE, VideoClassifier)
HEADS = {
    "VideoMAE": ("objective", ObjectiveConfig),
    "VideoClassifier": ("classifier", ClassifierConfig),
}


def save_model_folder(
    folder: str | Path,
    model: Model,
    state: Mapping[str, torch.Tensor] | None = None,
    more: Mapping[str, str] | None = None,
) -> None:
    """Writes a model folder whole or not at all, replacing an earlier one.

    state: the weights, where they do not live in `model` (under ZeRO they are gathered first);
    float32 is written. more: text of further files by name.
    """
    tensors = {
        name: tensor.detach().float().cpu().contiguous()
        for name, tensor in (state or model.state_dict()).items()
    }
    texts = {**(more or {}), "config.json": json_text(_describe(model), indent=2) + "\n"}

    def write(building: Path) -> None:
        building.mkdir()
        save_file(tensors, building / "model.safetensors", metadata={"format": "pt"})
        for name, text in texts.items():
            (building / name).write_text(text, encoding="utf-8")

    write_whole(Path(folder), write)


@overload
def load_pretrained(
    path: str | Path, *, impl: str = "auto", facts: Facts | None = None
) -> Model: ...
@overload
def load_pretrained(
    path: str | Path, kind: type[Kind], *, impl: str = "auto", facts: Facts | None = None
) -> Kind: ...
def load_pretrained(
    path: str | Path,
    kind: type[Model] | None = None,
    *,
    impl: str = "auto",
    facts: Facts | None = None,
) -> Model:
    """Reads a model folder into a VideoMAE or a VideoClassifier, as it says, on the CPU, in
    evaluation mode.

    path: a model folder, or what another project wrote: a checkpoint file, a Hugging Face folder
    (video_mae.convert.import_model; what it assumes, leaves out or makes anew is logged as a
    warning). kind: the class that the caller can use. facts: what another project's file may leave
    open; of a model folder too, sampling and stride can be others. Raises: FileNotFoundError;
    ValueError naming the file and what does not fit, or for a model of another kind. Executes
    nothing from the files.
    """
    path = Path(path)
    if is_model_folder(path):
        model, facts = _load_folder(path, impl), facts or Facts()
        if replace(facts, sampling=None, stride=None) != Facts():
            raise ValueError(
                f"{path}: is a model folder, which leaves nothing open; facts are for files of other projects"
            )
        remarks = choose_frames(model, facts.sampling, facts.stride)
    else:
        model, report = import_model(path, facts, impl=impl)
        remarks = report.remarks()
    for remark in remarks:
        logging.getLogger(__name__).warning("%s: %s", path, remark)
    if kind is not None and not isinstance(model, kind):
        raise ValueError(f"{path}: holds a {type(model).__name__}, a {kind.__name__} is wanted")
    return model


def choose_frames(
    model: Model, sampling: Literal["dense", "uniform"] | None, stride: int | None
) -> list[str]:
    """Has frames chosen in another way than a classifier says, where one is given; returns a line
    on each. Raises: ValueError.
    """
    given = {
        key: value
        for key, value in (("sampling", sampling), ("stride", stride))
        if value is not None
    }
    if not given:
        return []
    if not isinstance(model, VideoClassifier):
        raise ValueError(
            f"{next(iter(given))}: is how frames of a classifier are chosen, and this model is a {type(model).__name__}"
        )
    lines = [
        f"{key} = {value}: given, the model says {getattr(model.classifier_config, key)}"
        for key, value in given.items()
    ]
    model.classifier_config = replace(model.classifier_config, **given)
    return lines


def is_model_folder(path: Path) -> bool:
    """Whether a path is to be read as a model folder: all but files, and folders that have the
    marks of another project.
    """
    if path.is_file() or is_deepspeed_folder(path):
        return False
    try:
        description = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return True
    return not (
        isinstance(description, dict)
        and "kind" not in description
        and {"model_type", "architectures"} & description.keys()
    )


def _load_folder(folder: Path, impl: str) -> Model:
    config, head = _read_configuration(folder)
    state = _read_tensors(folder / "model.safetensors")
    where = f"{folder / 'config.json'}: model"
    if config.num_tokens > MAX_TOKENS:
        raise ValueError(
            f"{where}: has {config.num_tokens} tokens; more than {MAX_TOKENS} are not believed"
        )
    for key, side in [("depth", "encoder")] + (
        [("decoder_depth", "decoder")] if isinstance(head, ObjectiveConfig) else []
    ):
        blocks = {name.split(".")[2] for name in state if name.startswith(f"{side}.blocks.")}
        if getattr(config, key) != len(blocks):
            raise ValueError(
                f"{where}.{key}: is {getattr(config, key)}, but model.safetensors has {len(blocks)} blocks in its {side}"
            )
    try:
        with torch.device("meta"):
            expected = _make(config, head, impl).state_dict()
    except RuntimeError as error:
        raise ValueError(
            f"{where}: is larger than any tensor can be ({' '.join(str(error).split())[:80]})"
        ) from None
    wrong = [f"{name} is missing" for name in expected if name not in state]
    wrong += [f"{name} is not part of this model" for name in state if name not in expected]
    wrong += [
        f"{name} has shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    wrong += [
        f"{name} holds values that are no finite floating point numbers"
        for name, tensor in state.items()
        if not (tensor.is_floating_point() and bool(tensor.isfinite().all()))
    ]
    if wrong:
        raise ValueError(
            f"{folder / 'model.safetensors'}: {wrong[0]}"
            + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")
        )
    model = _make(config, head, impl)
    model.load_state_dict(state)
    return model.eval()


def find_model_folder(path: str | Path) -> Path:
    """What `load_pretrained` is to read: `path` itself, or what a run folder holds, best/ before
    model/. Raises: FileNotFoundError.
    """
    path = Path(path)
    if path.is_file():
        return path
    for folder in (path, path / "best", path / "model"):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"{path}: neither a model folder (config.json, model.safetensors) nor a run folder with best/ or model/ in it"
    )


def _describe(model: Model) -> dict[str, Any]:
    if isinstance(model, VideoMAE):
        return {
            "kind": "VideoMAE",
            "model": to_dict(model.config),
            "objective": to_dict(model.objective_config),
        }
    return {
        "kind": "VideoClassifier",
        "model": to_dict(model.config),
        "classifier": to_dict(model.classifier_config),
    }


def _read_configuration(folder: Path) -> tuple[ModelConfig, ObjectiveConfig | ClassifierConfig]:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: no such file; a model folder holds config.json and model.safetensors"
            )
    where = f"{folder / 'config.json'}"
    try:
        description = json.loads((folder / "config.json").read_bytes())
        section, schema = HEADS[description["kind"]]
        model_config, head_config = description["model"], description[section]
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: not the configuration of a model folder ({error!r})") from None
    return from_dict(ModelConfig, model_config, f"{where}: model"), from_dict(
        schema, head_config, f"{where}: {section}"
    )


def _make(config: ModelConfig, head: ObjectiveConfig | ClassifierConfig, impl: str) -> Model:
    return (
        VideoMAE(config, head, impl=impl)
        if isinstance(head, ObjectiveConfig)
        else VideoClassifier(config, head, impl=impl)
    )


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
