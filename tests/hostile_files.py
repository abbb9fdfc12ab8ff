"""Hostile and damaged files: what makes each in a folder, and what must be said of it. For
test_convert_safety.py.
"""

import argparse
import json
import os
import pickle
import runpy
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from video_mae.convert.importing import import_model
from video_mae.tools.convert import ConvertConfig, convert

official = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("second_official.py"))))
SIZE = official.Size(depth=2, decoder_depth=1)
FACTS: dict[str, Any] = {
    "num_heads": 3,
    "decoder_num_heads": 2,
    "num_frames": 6,
    "height": 16,
    "width": 24,
}
STATE: dict[str, torch.Tensor] = official.videomae_pretraining(SIZE)
PROJ = "encoder.blocks.1.attn.proj.weight"


class Bomb:
    """A pickle of it touches EXECUTED when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch EXECUTED",)


class Evaluation:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("open('EXECUTED', 'w')",)


def saved(content: Any, **options: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(content, folder / "x.pth", **options)
        return folder / "x.pth"

    return make


def changed(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        state = dict(STATE)
        change(state)
        return saved({"model": state})(folder)

    return make


def replaced(name: str, tensor: torch.Tensor) -> Callable[[Path], Path]:
    return changed(lambda state: state.update({name: tensor}))


def without(*prefixes: str) -> Callable[[Path], Path]:
    return saved(
        {"model": {name: tensor for name, tensor in STATE.items() if not name.startswith(prefixes)}}
    )


def raw(content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "x.pth").write_bytes(content)
        return folder / "x.pth"

    return make


def cut(share: float, file: str = "x.pth") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / file
        if file.endswith("safetensors"):
            save_file(STATE, path)
        else:
            saved({"model": STATE})(folder)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        return path

    return make


def repacked(
    change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED
) -> Callable[[Path], Path]:
    """A file of torch.save whose parts are changed."""

    def make(folder: Path) -> Path:
        path = saved({"model": STATE})(folder)
        with zipfile.ZipFile(path) as archive:
            parts = {name: change(name, archive.read(name)) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in parts.items():
                archive.writestr(name, content)
        return path

    return make


def beside(payload: bytes) -> Callable[[Path], Path]:
    """A file of torch.save with another entry beside the weights, whose value is a pickle written
    by hand.
    """
    return repacked(
        lambda name, content: (
            content[:-1] + text("x") + payload + b"s." if name.endswith("data.pkl") else content
        )
    )


def text(value: str) -> bytes:
    """A text in a pickle."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def safetensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], Path]:
    """A safetensors file whose header is changed."""

    def make(folder: Path) -> Path:
        path = folder / "x.safetensors"
        save_file(STATE, path)
        content = path.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
        return path

    return make


def hub_folder(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    """A Hugging Face folder of two shards, changed."""

    def make(folder: Path) -> Path:
        model = folder / "hub"
        source = saved({"model": STATE})(folder)
        convert(source, model, ConvertConfig(**FACTS, format="hugging_face"))
        source.unlink()
        state = load_file(model / "model.safetensors")
        (model / "model.safetensors").unlink()
        places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(sorted(state))}
        for part in sorted(set(places.values())):
            save_file(
                {name: tensor for name, tensor in state.items() if places[name] == part},
                model / part,
            )
        (model / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": places})
        )
        import_model(model)  # whole before the change
        change(model)
        return model

    return make


def index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], Path]:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return hub_folder(apply)


def swap(content: dict[str, Any]) -> None:
    places = content["weight_map"]
    first, second = sorted(places)[:2]
    places[first], places[second] = places[second], places[first]


def own_folder(**changes: Any) -> Callable[[Path], Path]:
    """A model folder of ours whose config.json is changed, or, without changes, says nothing."""

    def make(folder: Path) -> Path:
        source = saved({"model": STATE})(folder)
        convert(source, folder / "own", ConvertConfig(**FACTS))
        source.unlink()
        config = json.loads((folder / "own" / "config.json").read_text())
        config["model"] = {**config["model"], **changes} if changes else {}
        (folder / "own" / "config.json").write_text(json.dumps(config))
        return folder / "own"

    return make


def torchscript(folder: Path) -> Path:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(folder / "x.pth"))
    return folder / "x.pth"


def tar(folder: Path) -> Path:
    (folder / "zeros").write_bytes(b"\x00" * 10**6)
    with tarfile.open(folder / "x.pth", "w:gz") as archive:
        archive.add(folder / "zeros")
    return folder / "x.pth"


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "x.pth")
    return folder / "x.pth"


def quantized(folder: Path) -> Path:
    with warnings.catch_warnings(action="ignore"):  # torch is about to drop them, files are not
        return replaced(PROJ, torch.quantize_per_tensor(torch.eye(24), 0.1, 0, torch.qint8))(folder)


def meta(folder: Path) -> Path:
    return saved({"model": {**STATE, PROJ: torch.empty(24, 24, device="meta")}})(folder)


TOUCH = text("touch EXECUTED")
# What would be executed by a plain reader of pickles, one for each way of calling something.
PAYLOADS: dict[str, tuple[bytes, str]] = {
    "REDUCE": (b"cposix\nsystem\n" + TOUCH + b"\x85R", "system, which is code"),
    "INST": (b"(" + TOUCH + b"iposix\nsystem\n", "system, which is code"),
    "OBJ": (b"(cposix\nsystem\n" + TOUCH + b"o", "system, which is code"),
    "STACK_GLOBAL": (
        text("posix") + text("system") + b"\x93" + TOUCH + b"\x85R",
        "system, which is code",
    ),
    "a name behind a module": (
        text("shutil") + text("os.system") + b"\x93" + TOUCH + b"\x85R",
        "system, which is code",
    ),
    "a name behind another package": (
        text("torch.serialization") + text("os.system") + b"\x93" + TOUCH + b"\x85R",
        "system, which is code",
    ),
    "getattr": (
        b"c__builtin__\ngetattr\nc__builtin__\ngetattr\ncos\npath\n"
        + text("os")
        + b"\x86R"
        + text("system")
        + b"\x86R"
        + TOUCH
        + b"\x85R",
        "system, which is code",
    ),
    "getattr of an object": (
        b"c__builtin__\ngetattr\nctorch.serialization\nos\n"
        + text("system")
        + b"\x86R"
        + TOUCH
        + b"\x85R",
        "system, which is code",
    ),
    "partial": (
        b"cfunctools\npartial\ncposix\nsystem\n\x85R" + TOUCH + b"\x85R",
        "system, which is code",
    ),
    "a name of Python 2": (
        b"ccommands\ngetoutput\n" + TOUCH + b"\x85R",
        "getoutput, which is code",
    ),
    "a call in a state": (
        b"ccollections\nCounter\n)R}" + text("x") + b"cposix\nsystem\n" + TOUCH + b"\x85Rsb",
        "system, which is code",
    ),
    "a call in a call": (
        b"c__builtin__\nset\ncposix\nsystem\n" + TOUCH + b"\x85R\x85\x85R",
        "system, which is code",
    ),
    "a call in a key": (b"}cposix\nsystem\n" + TOUCH + b"\x85RNs", "system, which is code"),
    "an object that calls": (
        b"coperator\nmethodcaller\n" + text("system") + TOUCH + b"\x86Rcposix\n__loader__\n\x85R",
        "which is code",
    ),
    "another reader": (
        b"cpickle\nloads\nc_codecs\nencode\n"
        + text("cposix\nsystem\n(S'touch EXECUTED'\ntR.")
        + text("latin1")
        + b"\x86R\x85R",
        "loads, which is code",
    ),
}
# A long tuple or list in the memo, given to call after call, each of which would copy it: more
# memory than any machine has.
GROWING: dict[str, bytes] = {
    "arguments": b"(" + b"N" * 100_000 + b"tq\xff0(" + b"cnumpy\nf\nh\xffR" * 100 + b"l",
    "arguments with keywords": b"("
    + b"N" * 100_000
    + b"tq\xff0("
    + b"cnumpy\nf\nh\xff}\x92" * 100
    + b"l",
    "pairs of a dictionary": b"("
    + b"(NNt" * 50_000
    + b"lq\xff0("
    + b"ccollections\nOrderedDict\nh\xff\x85R" * 100
    + b"l",
    "arguments of a partial": b"cfunctools\npartial\n(cnumpy\nf\n"
    + b"N" * 100_000
    + b"tRq\xff0("
    + b"h\xff)R" * 100
    + b"l",
}
HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    # would execute code
    "system in the weights": (saved({"model": {**STATE, "x": Bomb()}}), "system, which is code"),
    "system beside the weights": (
        saved({"model": STATE, "optimizer": Bomb()}),
        "system, which is code",
    ),
    "system in the options": (
        saved({"model": STATE, "args": argparse.Namespace(x=Bomb())}),
        "system, which is code",
    ),
    "system in the old format": (
        saved({"model": STATE, "x": Bomb()}, _use_new_zipfile_serialization=False),
        "system, which is code",
    ),
    "eval in the weights": (saved({"model": {**STATE, "x": Evaluation()}}), "eval, which is code"),
    "a whole pickled module": (saved(torch.nn.Linear(2, 2)), "Linear, which is code"),
    "plain pickle": (raw(pickle.dumps(Bomb(), protocol=2)), r"x\.pth: "),
    "plain pickle of protocol 4": (raw(pickle.dumps({"model": Bomb()}, protocol=4)), r"x\.pth: "),
    **{f"by hand: {name}": (beside(payload), said) for name, (payload, said) in PAYLOADS.items()},
    "partials of partials": (
        beside(b"cnumpy\nf\n" + b"q\xff0cfunctools\npartial\nh\xff\x85R" * 900 + b")R"),
        "a call of functools.partial",
    ),
    "a module in the place of the weights": (
        saved({"model": torch.nn.Linear(2, 2)}),
        "Linear, which is code",
    ),
    "reference to a module of torch's old format": (
        beside(b"(" + text("module") + b"NNNtQ"),
        "no storage",
    ),
    "reference of a deep name": (
        beside(b"(" + text("storage") + b"ctorch\nFloatStorage\n)" + b"\x85" * 300_000 + b"NNtQ"),
        "no storage",
    ),
    "an array that is not there": (beside(b"\x96" + struct.pack("<Q", 1 << 40)), "damaged"),
    "shape of a text": (
        repacked(
            lambda name, content: (
                content.replace(
                    b"K\x18K\x18\x86", b"\x8a\x04\x00\x00\x00\x40" + text("x") + b"\x86"
                )
                if name.endswith("data.pkl")
                else content
            )
        ),
        "has a shape that is none",
    ),
    "an opcode of nobody": (beside(b"\xff"), "damaged"),
    "program of TorchScript": (torchscript, r"x\.pth: is damaged, truncated or no checkpoint"),
    # is no file of weights, or not all of one
    "zero bytes": (raw(b""), "is empty"),
    "one byte": (raw(b"\x80"), r"x\.pth: "),
    "nothing but zeros": (raw(b"\x00" * 4096), "no checkpoint"),
    "page of an error": (raw(b"<!DOCTYPE html><title>404</title>"), "no checkpoint"),
    "pointer of Git LFS": (raw(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
    "empty archive": (raw(b"PK\x05\x06" + b"\x00" * 18), "damaged, truncated or no checkpoint"),
    "start of a file": (cut(0.5), "damaged, truncated"),
    "all but the last bytes": (cut(0.9999), "damaged, truncated"),
    "start of safetensors": (cut(0.5, "x.safetensors"), "safetensors"),
    "header of safetensors cut": (cut(0.01, "x.safetensors"), "safetensors"),
    "pipe": (fifo, "no such file"),
    # lies about shapes and sizes
    "header that is too long": (raw(struct.pack("<Q", 2**62) + b'{"a":1}'), "safetensors"),
    "shape of more than there is": (
        safetensors(lambda header: header[PROJ].update(shape=[24, 10**9])),
        "safetensors",
    ),
    "offsets behind the end": (
        safetensors(lambda header: header[PROJ].update(data_offsets=[0, 10**12])),
        "safetensors",
    ),
    "offsets on top of another": (
        safetensors(
            lambda header: header[PROJ].update(data_offsets=header["mask_token"]["data_offsets"])
        ),
        "safetensors",
    ),
    "storage that is shorter": (
        repacked(lambda name, content: content[:-4] if name.endswith("data/0") else content),
        "damaged",
    ),
    "archive of another kind": (tar, "no checkpoint"),
    "archive that grows": (
        repacked(lambda _, content: content + b"\x00" * 10**6, zipfile.ZIP_DEFLATED),
        "would unpack to",
    ),
    "one number as a matrix": (
        replaced(PROJ, torch.zeros(1).expand(24, 24)),
        "has shape .*but only 4 bytes",
    ),
    "one storage as many": (
        saved({"model": {**STATE, **{f"copy{i}": STATE[PROJ].view(-1) for i in range(500)}}}),
        "says that it holds",
    ),
    "matrix the wrong way": (
        replaced("encoder.blocks.1.mlp.fc1.weight", torch.ones(24, 40)),
        r"encoder\.blocks\.1\.mlp\.fc1\.weight: has shape \(24, 40\).*\(40, 24\)",
    ),
    "bias that is too long": (
        replaced("encoder.blocks.1.attn.q_bias", torch.ones(25)),
        r"q_bias: has shape \(25,\).*24",
    ),
    "one dimension too many": (
        replaced("encoder.norm.weight", torch.ones(24, 1)),
        r"norm\.weight: has shape \(24, 1\)",
    ),
    "no dimension": (
        replaced("encoder.norm.weight", torch.tensor(1.0)),
        r"norm\.weight: has shape \(\)",
    ),
    "nothing in a tensor": (
        replaced("encoder.patch_embed.proj.weight", torch.ones(0, 3, 2, 8, 8)),
        r"proj\.weight: has shape \(0",
    ),
    "patch that is no square": (
        replaced("encoder.patch_embed.proj.weight", torch.ones(24, 3, 2, 8, 4)),
        r"proj\.weight: has shape",
    ),
    "head of another tubelet": (
        changed(
            lambda state: state.update(
                {"decoder.head.weight": torch.ones(100, 16), "decoder.head.bias": torch.ones(100)}
            )
        ),
        "predicts 100 values of a tubelet, which has 384",
    ),
    "NaN": (replaced(PROJ, torch.full((24, 24), float("nan"))), "NaN or infinite"),
    "infinity": (
        replaced("mask_token", torch.full((1, 1, 16), float("inf"))),
        "mask_token: holds values that are NaN or infinite",
    ),
    "whole numbers": (replaced(PROJ, torch.ones(24, 24, dtype=torch.int64)), "int64"),
    "complex numbers": (replaced(PROJ, torch.ones(24, 24, dtype=torch.complex64)), "complex64"),
    "sparse": (replaced(PROJ, torch.eye(24).to_sparse()), "not an ordinary one"),
    "quantized": (quantized, "not an ordinary one"),
    "on no device": (meta, "not an ordinary one"),
    # is not all of a model, or of no model that is known
    "missing tensor": (
        changed(lambda state: state.pop("encoder.norm.bias")),
        r"x\.pth: encoder\.norm\.bias is missing",
    ),
    "missing bias in one block": (
        changed(lambda state: state.pop("encoder.blocks.1.attn.v_bias")),
        r"encoder\.blocks\.1\.attn\.v_bias is missing",
    ),
    "missing block": (without("encoder.blocks.0."), "block 0 of the encoder"),
    "no blocks": (without("encoder.blocks.", "decoder.blocks."), "no model that is known"),
    "cosine attention": (
        replaced("encoder.blocks.0.attn.scale", torch.ones(3, 1, 1)),
        "cosine attention",
    ),
    "unknown layer of a block": (
        replaced("decoder.blocks.0.adapter.weight", torch.ones(16, 16)),
        "not known here",
    ),
    "unknown part of a block": (
        replaced("encoder.blocks.0.attn.relative_position_bias_table", torch.ones(3)),
        "not known here",
    ),
    "unknown token": (replaced("encoder.reg_tokens", torch.ones(1, 4, 24)), "not known here"),
    "two for one": (
        replaced("module.mask_token", torch.ones(1, 1, 16)),
        "two tensors for one thing",
    ),
    "name without an end": (
        replaced("x" * 10**6, torch.ones(1)),
        r"x\.pth: x{500} is no name of a tensor",
    ),
    "name of two lines": (replaced("encoder\nnorm", torch.ones(1)), "no name of a tensor"),
    "number as a name": (saved({"model": {**STATE, 3: torch.ones(1)}}), "3 is no name of a tensor"),
    "list": (saved([STATE]), "holds a list"),
    "no tensors": (saved({"model": {"a": 1}}), "holds no tensors under 'model'"),
    "another project's tensors": (
        saved({"conv1.weight": torch.ones(3), "layer1.0.bn1.weight": torch.ones(3)}),
        "no model that is known",
    ),
    # folders
    "missing shard": (
        hub_folder(lambda folder: (folder / "part-1.safetensors").unlink()),
        r"part-1\.safetensors: no such file, but .*index",
    ),
    "swapped index": (index(swap), r"part-\d\.safetensors: (does not hold|holds besides) decoder"),
    "index that names too few": (
        index(lambda content: content["weight_map"].popitem()),
        r"part-\d\.safetensors: holds besides",
    ),
    "index out of the folder": (
        index(lambda content: content["weight_map"].update(mask_token="../x.pth")),
        "not one beside it",
    ),
    "index to the root": (
        index(lambda content: content["weight_map"].update(mask_token="/etc/passwd")),
        "not one beside it",
    ),
    "index without a map": (index(lambda content: content.pop("weight_map")), "no weight_map"),
    "index of numbers": (
        index(lambda content: content["weight_map"].update(mask_token=3)),
        "no weight_map",
    ),
    "no config.json": (hub_folder(lambda folder: (folder / "config.json").unlink()), "config.json"),
    "damaged config.json": (
        hub_folder(lambda folder: (folder / "config.json").write_text('{"model_type": "videomae"')),
        r"config\.json",
    ),
    "deep config.json": (
        hub_folder(lambda folder: (folder / "config.json").write_text("[" * 10**6)),
        r"config\.json",
    ),
    "config.json of our own that is deep": (
        own_folder(depth=1000),
        r"config\.json: model\.depth: is 1000, but",
    ),
    "of our own that is deeper": (own_folder(depth=10**9), "model.depth: .* at most 1024"),
    "of our own that is wide": (own_folder(embed_dim=3 * 10**9), r"own/"),
    "of our own with many frames": (
        own_folder(num_frames=2 * 10**9),
        r"num_frames: .* at most 1e\+09",
    ),
    "of our own with many tokens": (own_folder(num_frames=2**16, height=2**14), "not believed"),
    "of our own with positions of many": (
        own_folder(position_grid=[4096, 4096, 4096]),
        "position_grid: .* more tokens than are believed",
    ),
    "of our own that says nothing": (
        own_folder(),
        r"config\.json: not the configuration",
    ),
}
