"""A model folder: config.json (plain constructor data) beside model.safetensors. Only tensors are
ever read.
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from video_mae.config import ClassifierConfig, ClipsConfig, ModelConfig, ObjectiveConfig
from video_mae.config.schema import from_dict, to_dict
from video_mae.convert.facts import Facts, Options, Tensors
from video_mae.convert.hub import located
from video_mae.files import is_regular, json_text, one_line, read_small, write_whole
from video_mae.model.lora import merged
from video_mae.model.vit import VideoClassifier, VideoMAE

Model = VideoMAE | VideoClassifier
ModelClass = TypeVar("ModelClass", VideoMAE, VideoClassifier)
# What config.json says beside the configuration of the model, by the model's class.
HEADS = {
    "VideoMAE": ("objective", ObjectiveConfig),
    "VideoClassifier": ("classifier", ClassifierConfig),
}
SIZES = {"embed_dim", "depth", "num_heads"}
# in which a training under DeepSpeed leaves its weights, where it does not partition them
DEEPSPEED_FILE = "mp_rank_00_model_states.pt"
RUN_MANIFEST = "MANIFEST.json"  # of a checkpoint of ours, which lies in a run folder


def save_model_folder(
    folder: str | Path,
    model: Model,
    state: Tensors | None = None,
    more: Options | None = None,
) -> None:
    """Writes a model folder whole or not at all, replacing an earlier one.

    state: the weights, where they do not live in `model` (under ZeRO they are gathered first);
    float32 is written, low-rank updates as part of their matrices. more: what further files of JSON
    hold, by name.
    """
    is_classifier = isinstance(model, VideoClassifier)
    head = model.classifier_config if is_classifier else model.objective_config
    kind = type(model).__name__
    description = {"kind": kind, "model": to_dict(model.config), HEADS[kind][0]: to_dict(head)}
    if model.clips_config is not None:
        description["clips"] = to_dict(model.clips_config)
    state = merged(model, state or model.state_dict())
    write_weights(folder, state, {"config.json": description, **(more or {})})


def write_weights(folder: str | Path, state: Tensors, files: Options) -> None:
    """Writes a folder of model.safetensors in float32 and files of JSON, whole or not at all."""
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}

    def write(building: Path) -> None:
        building.mkdir()
        file = building / "model.safetensors"
        save_file(tensors, file, metadata={"format": "pt"})
        allow_readers(file)
        for name, content in files.items():
            text = json_text(content, indent=2) + "\n"
            (building / name).write_text(text, encoding="utf-8")

    write_whole(Path(folder), write, sum(tensor.nbytes for tensor in tensors.values()))


def allow_readers(file: Path) -> None:
    """Gives a file the mode that the umask decides: safetensors shows its files to nobody else."""
    example = file.with_name(f".{file.name}.mode")
    example.touch()
    shutil.copymode(example, file)
    example.unlink()


def read_safetensors(file: Path) -> Tensors:
    """All tensors of a file. Raises: FileNotFoundError or ValueError naming the file."""
    if file.exists() and not is_regular(file):  # a pipe would be waited for
        raise ValueError(f"{file}: is no regular file")
    try:
        return load_file(file)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(one_line(f"{file}: cannot be read as safetensors ({error})")) from None


@overload
def load_pretrained(
    path: str | Path, *, impl: str = "auto", facts: Facts | None = None
) -> Model: ...
@overload
def load_pretrained(
    path: str | Path, kind: type[ModelClass], *, impl: str = "auto", facts: Facts | None = None
) -> ModelClass: ...
def load_pretrained(
    path: str | Path,
    kind: type[Model] | None = None,
    *,
    impl: str = "auto",
    facts: Facts | None = None,
) -> Model:
    """Reads a model folder into a VideoMAE or a VideoClassifier, as it says, on the CPU, in
    evaluation mode.

    path: a model folder, a run folder, or what another project wrote: a checkpoint file, a Hugging
    Face folder (import_model; what it assumes, leaves out or makes anew is logged as a warning); or
    one of these on the hub, hf://OWNER/NAME[@REVISION] (`located`). kind: the class that the caller
    can use. facts: what another project's file may leave open; of a model folder too, sampling and
    stride can be others. Raises: FileNotFoundError; ValueError naming the file and what does not
    fit, or for a model of another kind. Executes nothing from the files.
    """
    path = find_model_folder(path)
    if is_model_folder(path):
        model, facts = _load_folder(path, impl), facts or Facts()
        if replace(facts, sampling=None, stride=None) != Facts():
            raise ValueError(
                f"{path}: is a model folder, which leaves nothing open; facts are for files of "
                "other projects"
            )
        remarks = choose_frames(model, facts.sampling, facts.stride)
    else:
        # Other projects' formats are for those who have such files.
        from video_mae.convert.importing import import_model

        model, report = import_model(path, facts, impl=impl)
        remarks = report.remarks()
    for remark in remarks:
        logging.getLogger(__name__).warning(one_line(f"{path}: {remark}"))
    if kind is not None and not isinstance(model, kind):
        raise ValueError(
            f"{path}: holds a {type(model).__name__}, a {kind.__name__} is wanted; `video-mae "
            "finetune` makes a VideoClassifier, `video-mae pretrain` a VideoMAE"
        )
    return model


def choose_frames(
    model: Model, sampling: Literal["dense", "uniform"] | None, stride: int | None
) -> list[str]:
    """Has frames chosen in another way than a classifier says, where one is given; returns a line
    on each. Raises: ValueError.
    """
    lines = []
    for key, value in (("sampling", sampling), ("stride", stride)):
        if value is None:
            continue
        if not isinstance(model, VideoClassifier):
            raise ValueError(
                f"{key}: is how frames of a classifier are chosen, and this model is a "
                f"{type(model).__name__}"
            )
        said = getattr(model.classifier_config, key)
        lines.append(f"{key} = {value}: given, the model says {said}")
        model.classifier_config = replace(model.classifier_config, **{key: value})
    return lines


def is_deepspeed_folder(path: Path) -> bool:
    """Whether a folder is another project's checkpoint of DeepSpeed, with one file of weights."""
    is_ours = (path / "config.json").is_file() or (path / RUN_MANIFEST).is_file()
    return (path / DEEPSPEED_FILE).is_file() and not is_ours


def is_model_folder(path: Path) -> bool:
    """Whether a path is to be read as a model folder: all but files, and folders that have the
    marks of another project.
    """
    if path.is_file() or is_deepspeed_folder(path):
        return False
    try:
        description = json.loads(read_small(path / "config.json"))
    except (OSError, ValueError, RecursionError):
        return True
    if not isinstance(description, dict) or "kind" in description:
        return True
    return not {"model_type", "architectures"} & description.keys()


def find_model_folder(path: str | Path, key: str = "") -> Path:
    """What `load_pretrained` is to read: the file or folder that `path` means (`located`), or what
    a run folder holds, best/ before model/. key: begins an error. Raises: FileNotFoundError.
    """
    path = located(path, key)
    if path.is_file() or is_deepspeed_folder(path):
        return path
    for folder in (path, path / "best", path / "model"):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"{key}{path}: neither a model folder (config.json, model.safetensors) nor a run folder "
        "with best/ or model/ in it"
    )


def _load_folder(folder: Path, impl: str) -> Model:
    config, head, clips = _read_configuration(folder / "config.json")
    file = folder / "model.safetensors"
    state = read_safetensors(file)
    where = f"{folder / 'config.json'}: model"
    # before any block is made
    depths = {"encoder": ("depth", config.depth)}
    if isinstance(head, ObjectiveConfig):
        depths["decoder"] = ("decoder_depth", config.decoder_depth)
    for side, (key, depth) in depths.items():
        blocks = {name.split(".")[2] for name in state if name.startswith(f"{side}.blocks.")}
        if depth != len(blocks):
            raise ValueError(
                f"{where}.{key}: is {depth}, but model.safetensors has {len(blocks)} blocks in its "
                f"{side}"
            )
    try:
        model = fitted(config, head, state, impl)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    model.clips_config = clips
    return model


def fitted(
    config: ModelConfig,
    head: ObjectiveConfig | ClassifierConfig,
    state: Tensors,
    impl: str,
    *,
    called: Callable[[str], str] = str,
    new: tuple[str, ...] = (),
) -> Model:
    """The model of a configuration with these weights, in evaluation mode.

    called: our name -> the one of a message; new: beginnings of names that may be missing. Raises:
    ValueError naming the first tensor that does not fit.
    """

    def make() -> Model:
        if isinstance(head, ObjectiveConfig):
            return VideoMAE(config, head, impl=impl)
        return VideoClassifier(config, head, impl=impl)

    try:
        with torch.device("meta"):  # a few numbers can ask for any size
            expected = make().state_dict()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:80]
        raise ValueError(f"the model is larger than any tensor can be ({reason})") from None
    wrong = [
        f"{called(name)} is missing"
        for name in expected
        if name not in state and not name.startswith(new)
    ]
    for name, tensor in state.items():
        if name not in expected:
            wrong.append(f"{called(name)} is not part of this model")
        elif tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            wrong.append(f"{called(name)}: has shape {shapes} as the other tensors have it")
        elif not (tensor.is_floating_point() and bool(tensor.isfinite().all())):
            wrong.append(f"{called(name)}: holds values that are no finite floating point numbers")
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]}{more}")
    model = make()
    model.load_state_dict(state, strict=False)
    return model.eval()


def _read_configuration(
    file: Path,
) -> tuple[ModelConfig, ObjectiveConfig | ClassifierConfig, ClipsConfig | None]:
    try:
        description = json.loads(read_small(file))
        section, schema = HEADS[description["kind"]]
        model_config, head_config = description["model"], description[section]
        # the defaults are those of a run: a model folder has always said all of it
        if SIZES - set(model_config):
            raise KeyError(*SIZES)
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not the configuration of a model folder ({error!r})") from None
    config, clips = from_dict(ModelConfig, model_config, str(file), "model"), None
    if "clips" in description:  # earlier versions did not keep it
        clips = from_dict(ClipsConfig, description["clips"], str(file), "clips")
    return config, from_dict(schema, head_config, str(file), section), clips
