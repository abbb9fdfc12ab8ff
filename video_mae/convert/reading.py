"""What other projects' files and folders hold, read as data: nothing in them is ever executed.

A file is what its content says, not its suffix: safetensors, or a pickle of torch.save, which is read with weights_only=True. Beyond
torch's own list only names that carry data are let through, and what stands in for them is inert: no code of another package runs.
"""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from video_mae.checkpoint import MANIFEST

MAX_JSON_BYTES = 64 << 20  # the index of the largest model is a few megabytes
WRAPPERS = ("model", "module", "state_dict")  # under which the projects keep the weights, in order of preference
DEEPSPEED_FILE = "mp_rank_00_model_states.pt"  # in which a training under DeepSpeed leaves its weights, where it does not partition them
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class Opaque:
    """Stands in for an object that is no tensor and is not needed: takes anything, does nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class Arguments:
    """Stands in for argparse.Namespace, in which the official projects keep the options of a training."""


# Names found in the projects' own files. Nothing that is called here can do more than be created.
STAND_INS: list[Any] = [(Arguments, "argparse.Namespace")] + [(Opaque, name) for name in (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype", "numpy.ndarray", "pathlib.PosixPath", "pathlib.PurePosixPath", "mmengine.logging.history_buffer.HistoryBuffer",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler")]


@dataclass(frozen=True, kw_only=True)
class Source:
    """What was read: weights by the names they have there, and what else tells of the architecture."""

    path: Path
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()


def read_source(path: str | Path) -> Source:
    """Reads a checkpoint file, a Hugging Face folder (config.json and weights, whole or in shards), or a checkpoint folder of DeepSpeed.

    Raises: FileNotFoundError; ValueError with one line that names the file and what is wrong with it.
    """
    path = Path(path)
    if is_deepspeed_folder(path):
        path = path / DEEPSPEED_FILE
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    tensors, arguments, left_out = _read_file(path)
    return Source(path=path, tensors=tensors, arguments=arguments, left_out=left_out, files=(path.name,))


def is_deepspeed_folder(path: Path) -> bool:
    """Whether a folder is another project's checkpoint of DeepSpeed, whose weights lie in one file."""
    return (path / DEEPSPEED_FILE).is_file() and not (path / "config.json").is_file() and not (path / MANIFEST).is_file()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises: ValueError naming the file."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: is larger than {MAX_JSON_BYTES} bytes, no such file holds a configuration")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON ({_one_line(error)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return value


def _read_folder(folder: Path) -> Source:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'}: no such file; a folder of weights has one, of other projects name the file")
    config = read_json(folder / "config.json")
    present = [name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not present:
        raise FileNotFoundError(f"{folder}: holds none of {', '.join(WEIGHT_FILES)}")
    chosen, *unread = present
    left_out = {name: f"a file that was not read, because {chosen} is there" for name in unread if not name.endswith(".index.json")}
    if not chosen.endswith(".index.json"):
        tensors, arguments, more = _read_file(folder / chosen)
        return Source(path=folder, tensors=tensors, config=config, arguments=arguments, left_out={**left_out, **more}, files=(chosen,))
    tensors, shards = _read_shards(folder / chosen)
    return Source(path=folder, tensors=tensors, config=config, left_out=left_out, files=(chosen, *shards))


def _read_shards(index: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Every tensor that an index names, each from the file that the index names."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise ValueError(f"{index}: has no weight_map of tensor names and file names")
    shards = sorted(set(places.values()))
    for shard in shards:
        if Path(shard).name != shard or not shard.isprintable():
            raise ValueError(f"{index}: names the file {shard!r}, which is not one beside it")
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise FileNotFoundError(f"{index.parent / missing[0]}: no such file, but {index.name} names it ({len(missing)} of {len(shards)} "
                                "are missing)")
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        found, _, _ = _read_file(index.parent / shard)
        promised = {name for name, place in places.items() if place == shard}
        wrong = sorted(promised ^ found.keys())
        if wrong:
            verb = "does not hold" if wrong[0] in promised else "holds besides"
            raise ValueError(f"{index.parent / shard}: {verb} {_printable(wrong[0])}, unlike {index.name} says ({len(wrong)} such tensors)")
        tensors.update(found)
    return tensors, shards


def _read_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, str]]:
    """(weights, options of the training, what is left out and why)."""
    content, size = _read_content(path), path.stat().st_size
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
    weights = content if wrapper is None else content[wrapper]
    others = {} if wrapper is None else {key: value for key, value in content.items() if key != wrapper}
    left_out = {_printable(key): _content(value) for key, value in others.items()}
    if "args" in left_out:
        left_out["args"] = "options of the training, read only for what the tensors do not tell"
    tensors: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor):
            left_out[_printable(name)] = _content(value)
        elif not isinstance(name, str) or not name.isprintable():
            raise ValueError(f"{path}: {name!r} is no name of a tensor")
        else:
            tensors[name] = _checked(value, f"{path}: {name}")
    if not tensors:
        raise ValueError(f"{path}: holds no tensors" + (f" under {wrapper!r}" if wrapper else ""))
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if total > size:
        raise ValueError(f"{path}: says that it holds {total} bytes of weights, but has {size} bytes")
    arguments = others.get("args")
    arguments = vars(arguments) if isinstance(arguments, Arguments) else arguments
    return tensors, dict(arguments) if isinstance(arguments, dict) else {}, left_out


def _read_content(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise ValueError(f"{path}: is empty")
    if start[8:] == b"{":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: cannot be read as safetensors ({_one_line(error)})") from None
    if start == b"version h":
        raise ValueError(f"{path}: is a pointer of Git LFS to a file, not the file; `git lfs pull` fetches it")
    if start.startswith(b"PK"):
        _check_archive(path)
    elif not start.startswith(b"\x80"):
        raise ValueError(f"{path}: is no checkpoint: neither safetensors nor a file of torch.save")
    try:
        with torch.serialization.safe_globals(STAND_INS), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle can make the reader raise anything
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and code:
            raise ValueError(f"{path}: holds {code[1]}, which is code and no tensor; nothing of this file is read") from None
        raise ValueError(f"{path}: is damaged, truncated or no checkpoint ({_one_line(error)})") from None


def _check_archive(path: Path) -> None:
    """Raises: ValueError for an archive that unpacks to more than it is: torch.save stores without compression."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise ValueError(f"{path}: is damaged or truncated ({_one_line(error)})") from None
    if unpacked > size:
        raise ValueError(f"{path}: would unpack to {unpacked} bytes from {size}, as no file of torch.save does; nothing of it is read")


def _checked(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """A tensor without autograd whose values are all in the file. Raises: ValueError."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.device.type != "cpu" \
            or tensor.is_quantized:
        raise ValueError(f"{where}: is a {tensor.layout} tensor on {tensor.device}, not an ordinary one")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{where}: has shape {tuple(tensor.shape)}, but only {tensor.untyped_storage().nbytes()} bytes")
    return tensor.detach()


def _content(value: object) -> str:
    """What something is that is left out, and how many tensors are in it."""
    count, stack, seen = 0, [value], set()
    while stack:
        item = stack.pop()
        if id(item) in seen:  # objects may hold each other
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            count += 1
        elif isinstance(item, Mapping):
            stack.extend(item.values())
        elif isinstance(item, list | tuple | set):
            stack.extend(item)
    tensors = f" with {count} tensors" if count else ""
    return f"not part of the weights: {type(value).__name__}{tensors}"


def _printable(key: object) -> str:
    return key if isinstance(key, str) and key.isprintable() else repr(key)


def _one_line(error: BaseException) -> str:
    text = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())
    return f"{type(error).__name__}: {text[:160]}"
