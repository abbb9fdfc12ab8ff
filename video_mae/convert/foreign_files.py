"""What other projects' files and folders hold, read as data: nothing in them is ever executed.

A file is what its content says, not its suffix: safetensors, or a pickle of torch.save
(torch_file.py). What is beside the weights may be objects of any package: they are passed over and
named.
"""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from video_mae.convert.facts import Options, Tensors
from video_mae.convert.model_folder import DEEPSPEED_FILE, is_deepspeed_folder, read_safetensors
from video_mae.convert.torch_file import CodeError, Thing, TorchFile, shown, things_in
from video_mae.files import read_text

# under which the projects keep the weights, in order of preference
WRAPPERS = ("model", "module", "state_dict", "model_state")
# where mmengine and the official projects keep the options of a training
OPTIONS = ("meta", "args")
TOLD_NAMES, LONGEST_KEY = 12, 500  # of what is passed over; of an entry, in characters
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(kw_only=True)
class ForeignModel:
    """What was read: weights by the names they have there, what else tells of the architecture, and
    what is left out and why.
    """

    path: Path
    files: tuple[str, ...]
    tensors: Tensors = field(default_factory=dict)
    config: Options = field(default_factory=dict)
    arguments: Options = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def read_source(path: str | Path) -> ForeignModel:
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
    return _read_file(path)


def read_json(path: Path) -> Options:
    """A JSON object. Raises: ValueError naming the file."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON ({_one_line(error)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return value


def _read_folder(folder: Path) -> ForeignModel:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder / 'config.json'}: no such file; a folder of weights has one, of other "
            "projects name the file"
        )
    config = read_json(folder / "config.json")
    present = [name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not present:
        raise FileNotFoundError(f"{folder}: holds none of {', '.join(WEIGHT_FILES)}")
    chosen, *unread = present
    is_index = chosen.endswith(".json")
    source = _read_shards(folder / chosen) if is_index else _read_file(folder / chosen)
    for name in unread:
        if not name.endswith(".json"):
            source.left_out[name] = f"a file that was not read, because {chosen} is there"
    options = config.get("model_config")  # of VideoMAE V2 on the Hugging Face hub
    if isinstance(options, dict):
        source.arguments = options
    return replace(source, path=folder, config=config)


def _read_shards(index: Path) -> ForeignModel:
    """Every tensor that an index names, each from the file that the index names."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or {type(place) for place in places.values()} != {str}:
        raise ValueError(f"{index}: has no weight_map of tensor names and file names")
    shards = sorted(set(places.values()))
    together = ForeignModel(path=index, files=(index.name, *shards))
    for shard in shards:
        if Path(shard).name != shard or not shard.isprintable():
            raise ValueError(f"{index}: names the file {shard!r}, which is not one beside it")
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(
                f"{index.parent / shard}: no such file, but {index.name} names it"
            )
    for shard in shards:
        found = _read_file(index.parent / shard).tensors
        promised = {name for name, place in places.items() if place == shard}
        wrong = sorted(promised ^ found.keys())
        if wrong:
            verb = "does not hold" if wrong[0] in promised else "holds besides"
            raise ValueError(
                f"{index.parent / shard}: {verb} {shown(wrong[0])}, unlike {index.name} says"
            )
        together.tensors.update(found)
    return together


def _read_file(path: Path) -> ForeignModel:
    source = ForeignModel(path=path, files=(path.name,))
    with path.open("rb") as opened:
        start = opened.read(9)
        opened.seek(0)
        if not start:
            raise ValueError(f"{path}: is empty")
        if start == b"version h":
            raise ValueError(f"{path}: is a pointer of Git LFS; `git lfs pull` fetches the file")
        if start[8:] == b"{":
            source.tensors = read_safetensors(path)
        elif start.startswith((b"PK", b"\x80")):
            try:
                file = TorchFile(opened)
            except CodeError as error:
                raise _code(path, str(error)) from None
            except Exception as error:  # a damaged pickle can make the reader raise anything
                raise ValueError(
                    f"{path}: is damaged, truncated or no checkpoint ({_one_line(error)})"
                ) from None
            _sort(file, source)
        else:
            raise ValueError(
                f"{path}: is no checkpoint: neither safetensors nor a file of torch.save"
            )
    return source


def _sort(file: TorchFile, source: ForeignModel) -> None:
    """Tells weights, options and the rest of a file apart."""
    path, content = source.path, file.content
    if isinstance(content, Thing):
        raise _code(path, content.name)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
    weights, others = content, {}
    if wrapper:
        weights = content[wrapper]
        others = {key: value for key, value in content.items() if key != wrapper}
    seen: set[int] = set()
    for key, value in others.items():
        source.left_out[shown(key, LONGEST_KEY)] = _content(value, seen, is_options=key in OPTIONS)
    for name, value in weights.items():
        printable = shown(name, LONGEST_KEY)
        if not isinstance(value, Thing) or not value.is_tensor:
            source.left_out[printable] = _content(value, seen)
            continue
        if printable != name:
            raise ValueError(f"{path}: {printable} is no name of a tensor")
        try:
            source.tensors[name] = file.tensor(value)
        except Exception as error:
            raise ValueError(
                f"{path}: {name}: is damaged, or no ordinary tensor ({_one_line(error)})"
            ) from None
    if not source.tensors:
        for value in content.values():
            if isinstance(value, Thing):
                raise _code(path, value.name)
        raise ValueError(f"{path}: holds no tensors" + (f" under {wrapper!r}" if wrapper else ""))
    total = sum(tensor.nbytes for tensor in source.tensors.values())
    size = path.stat().st_size
    if total > size:
        raise ValueError(f"{path}: says that it holds {total} bytes of weights, but has {size}")
    for key in OPTIONS:
        options = others.get(key)
        if isinstance(options, Thing) and options.name == "argparse.Namespace" and options.parts:
            options = options.parts[0]
        if isinstance(options, dict):
            source.arguments = options


def _code(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path}: holds {what}, which is code and no tensor; nothing of this file is read"
    )


def _content(value: object, seen: set[int], *, is_options: bool = False) -> str:
    """What something is that is left out, how many tensors are in it, and what else is passed over
    there.
    """
    count, names = things_in(value, seen)
    what = "dict" if isinstance(value, dict) else type(value).__name__
    if isinstance(value, Thing):
        what = value.name
    kind = f"not part of the weights: {what}"
    if is_options:
        kind = "options of the training, read only for what the tensors do not tell"
    tensors = f" with {count} tensors" if count else ""
    more = f" and {len(names) - TOLD_NAMES} more" if len(names) > TOLD_NAMES else ""
    things = f"; passed over, no tensors: {', '.join(names[:TOLD_NAMES])}{more}" if names else ""
    return f"{kind}{tensors}{things}"


def _one_line(error: BaseException) -> str:
    text = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())
    return f"{type(error).__name__}: {text[:160]}"
