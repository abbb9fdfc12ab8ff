"""What other projects' files and folders hold, read as data: nothing in them is ever executed.

A file is what its content says, not its suffix: safetensors, or a pickle of torch.save
(torch_file.py). What is beside the weights may be objects of any package: they are passed over and
named.
"""

import json
import re
import zipfile
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from video_mae.convert.pickled import CodeError, Stored, Thing, things_in
from video_mae.convert.torch_file import TorchFile
from video_mae.training.checkpoint import MANIFEST

MAX_JSON_BYTES = 64 << 20  # the index of the largest model is a few megabytes
# under which the projects keep the weights, in order of preference
WRAPPERS = ("model", "module", "state_dict", "model_state")
# in which a training under DeepSpeed leaves its weights, where it does not partition them
DEEPSPEED_FILE = "mp_rank_00_model_states.pt"
# where the official projects and mmengine keep the options of a training
OPTIONS = {"args", "meta"}
TOLD_NAMES, LONGEST_KEY = 12, 500  # of what is passed over; of an entry, in characters
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


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
    """Reads a checkpoint file, a Hugging Face folder (config.json and weights, whole or in shards),
    or a checkpoint folder of DeepSpeed.

    Raises: FileNotFoundError; ValueError with one line that names the file and what is wrong with
    it.
    """
    path = Path(path)
    if is_deepspeed_folder(path):
        path = path / DEEPSPEED_FILE
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    tensors, arguments, left_out = _read_file(path)
    return Source(
        path=path, tensors=tensors, arguments=arguments, left_out=left_out, files=(path.name,)
    )


def is_deepspeed_folder(path: Path) -> bool:
    """Whether a folder is another project's checkpoint of DeepSpeed, whose weights lie in one file."""
    return (
        (path / DEEPSPEED_FILE).is_file()
        and not (path / "config.json").is_file()
        and not (path / MANIFEST).is_file()
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises: ValueError naming the file."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(
            f"{path}: is larger than {MAX_JSON_BYTES} bytes, no such file holds a configuration"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON ({_one_line(error)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return value


def _read_folder(folder: Path) -> Source:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder / 'config.json'}: no such file; a folder of weights has one, of other projects name the file"
        )
    config = read_json(folder / "config.json")
    present = [name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not present:
        raise FileNotFoundError(f"{folder}: holds none of {', '.join(WEIGHT_FILES)}")
    chosen, *unread = present
    left_out = {
        name: f"a file that was not read, because {chosen} is there"
        for name in unread
        if not name.endswith(".index.json")
    }
    if not chosen.endswith(".index.json"):
        tensors, arguments, more = _read_file(folder / chosen)
        return Source(
            path=folder,
            tensors=tensors,
            config=config,
            arguments=arguments,
            left_out={**left_out, **more},
            files=(chosen,),
        )
    tensors, shards = _read_shards(folder / chosen)
    return Source(
        path=folder, tensors=tensors, config=config, left_out=left_out, files=(chosen, *shards)
    )


def _read_shards(index: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Every tensor that an index names, each from the file that the index names."""
    places = read_json(index).get("weight_map")
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(place, str) for place in places.values())
    ):
        raise ValueError(f"{index}: has no weight_map of tensor names and file names")
    shards = sorted(set(places.values()))
    for shard in shards:
        if Path(shard).name != shard or not shard.isprintable():
            raise ValueError(f"{index}: names the file {shard!r}, which is not one beside it")
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index.parent / missing[0]}: no such file, but {index.name} names it ({len(missing)} of {len(shards)} "
            "are missing)"
        )
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        found, _, _ = _read_file(index.parent / shard)
        promised = {name for name, place in places.items() if place == shard}
        wrong = sorted(promised ^ found.keys())
        if wrong:
            verb = "does not hold" if wrong[0] in promised else "holds besides"
            raise ValueError(
                f"{index.parent / shard}: {verb} {_printable(wrong[0])}, unlike {index.name} says ({len(wrong)} such tensors)"
            )
        tensors.update(found)
    return tensors, shards


def _read_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, str]]:
    """(weights, options of the training, what is left out and why)."""
    if _is_safetensors(path):
        try:
            return load_file(path), {}, {}
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path}: cannot be read as safetensors ({_one_line(error)})"
            ) from None
    try:
        file = TorchFile(path)
    except CodeError as error:
        raise ValueError(
            f"{path}: holds {error}, which is code and no tensor; nothing of this file is read"
        ) from None
    except Exception as error:  # a damaged pickle can make the reader raise anything
        raise ValueError(
            f"{path}: is damaged, truncated or no checkpoint ({_one_line(error)})"
        ) from None
    with closing(file):
        return _sort(file, path)


def _sort(
    file: TorchFile, path: Path
) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, str]]:
    content = file.content
    if not isinstance(content, dict):
        raise _unlike_weights(path, content)
    wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
    weights = content if wrapper is None else content[wrapper]
    others = (
        {} if wrapper is None else {key: value for key, value in content.items() if key != wrapper}
    )
    seen: set[int] = set()
    left_out = {
        _printable(key): _content(value, seen, key in OPTIONS) for key, value in others.items()
    }
    tensors: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        if isinstance(value, Thing) and value.name.startswith(("torch._utils.", "torch._tensor.")):
            raise ValueError(
                f"{path}: {_printable(name)}: is made by {value.name}, not an ordinary one"
            )
        if not isinstance(value, Stored):
            left_out[_printable(name)] = _content(value, seen)
        elif _printable(name) != name:
            raise ValueError(f"{path}: {_printable(name)} is no name of a tensor")
        else:
            tensors[name] = _read_tensor(file, value, f"{path}: {name}")
    if not tensors:
        thing = next((value for value in content.values() if isinstance(value, Thing)), None)
        raise (
            _unlike_weights(path, thing)
            if thing
            else ValueError(
                f"{path}: holds no tensors" + (f" under {wrapper!r}" if wrapper else "")
            )
        )
    total, size = (
        sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        path.stat().st_size,
    )
    if total > size:
        raise ValueError(
            f"{path}: says that it holds {total} bytes of weights, but has {size} bytes"
        )
    options = next((value for key, value in others.items() if key in OPTIONS), {})
    if isinstance(options, Thing) and options.name == "argparse.Namespace":
        options = options.state
    return tensors, options if isinstance(options, dict) else {}, left_out


def _unlike_weights(path: Path, content: object) -> ValueError:
    if isinstance(content, Thing):
        return ValueError(
            f"{path}: holds a {content.name}, which is code and no tensor; nothing of this file is read"
        )
    return ValueError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")


def _is_safetensors(path: Path) -> bool:
    """Raises: ValueError for what is neither safetensors nor a file of torch.save."""
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise ValueError(f"{path}: is empty")
    if start == b"version h":
        raise ValueError(
            f"{path}: is a pointer of Git LFS to a file, not the file; `git lfs pull` fetches it"
        )
    is_safetensors = start[8:] == b"{"
    if start.startswith(b"PK") and not is_safetensors:
        _check_archive(path)
    elif not start.startswith(b"\x80") and not is_safetensors:
        raise ValueError(f"{path}: is no checkpoint: neither safetensors nor a file of torch.save")
    return is_safetensors


def _check_archive(path: Path) -> None:
    """Raises: ValueError for an archive that unpacks to more than it is: torch.save stores without
    compression.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise ValueError(f"{path}: is damaged or truncated ({_one_line(error)})") from None
    if unpacked > size:
        raise ValueError(
            f"{path}: would unpack to {unpacked} bytes from {size}, as no file of torch.save does; nothing of it is read"
        )


def _read_tensor(file: TorchFile, stored: Stored, where: str) -> torch.Tensor:
    """Raises: ValueError for a tensor that is no ordinary one, or whose values are not all in the
    file.
    """
    if stored.storage.dtype is None:
        raise ValueError(f"{where}: is of {stored.storage.kind}, not an ordinary one")
    try:
        return file.tensor(stored)
    except Exception as error:
        raise ValueError(f"{where}: is damaged or truncated ({_one_line(error)})") from None


def _content(value: object, seen: set[int], is_options: bool = False) -> str:
    """What something is that is left out, how many tensors are in it, and what else is passed over
    there.
    """
    count, names = things_in(value, seen)
    kind = f"not part of the weights: {value.name if isinstance(value, Thing) else type(value).__name__}"
    if is_options:
        kind = "options of the training, read only for what the tensors do not tell"
    tensors = f" with {count} tensors" if count else ""
    more = f" and {len(names) - TOLD_NAMES} more" if len(names) > TOLD_NAMES else ""
    things = f"; passed over, no tensors: {', '.join(names[:TOLD_NAMES])}{more}" if names else ""
    return f"{kind}{tensors}{things}"


def _printable(key: object) -> str:
    return (key if isinstance(key, str) and key.isprintable() else repr(key))[:LONGEST_KEY]


def _one_line(error: BaseException) -> str:
    text = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())
    return f"{type(error).__name__}: {text[:160]}"
