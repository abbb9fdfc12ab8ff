"""Files of a training with objects of any package beside their weights: these are read, the rest is
passed over, named, and never run.
"""

import argparse
import collections
import contextlib
import dataclasses
import enum
import functools
import http
import io
import logging
import pathlib
import pickle
import runpy
import signal
import sys
import tracemalloc
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from video_mae.convert.facts import Facts
from video_mae.convert.foreign_files import read_source
from video_mae.convert.importing import import_model

hostile = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "hostile_files.py")))
official = hostile.official
SIZE, FACTS, saved, text = hostile.SIZE, hostile.FACTS, hostile.saved, hostile.text
REBUILD: Any = sys.modules["torch._utils"].__dict__["_rebuild_parameter"]
STATE = official.mmaction_finetuned(SIZE)


class HistoryBuffer:
    """As a training keeps a curve: arrays, and functions of its own that its state takes along."""

    def __init__(self) -> None:
        self.values, self.counts = np.arange(300.0), np.arange(300)
        self.latest, self.length = np.float32(0.5), 10**6

    def mean(self) -> float:
        return float(self.values.mean())

    def smallest(self) -> float:
        return float(self.values.min())

    def __getstate__(self) -> dict[str, Any]:
        return {
            **vars(self),
            "statistics_methods": {"mean": HistoryBuffer.mean, "min": HistoryBuffer.smallest},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise AssertionError("an object of the file has been made")


class ConfigDict(dict[str, Any]):
    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return type(self), (dict(self),), None, None, iter(self.items())


class Phase(enum.Enum):
    TRAIN = "train"


class Loop:
    class State:  # of a nested class
        def __init__(self) -> None:
            self.epoch = 3


KINDS = (HistoryBuffer, ConfigDict, Phase, Loop, Loop.State)


@contextmanager
def as_if_of(package: str) -> Iterator[None]:
    """The kinds above belong to a package that is there for as long as a file is written."""
    names = [".".join(package.split(".")[: i + 1]) for i in range(package.count(".") + 1)]
    modules = {name: types.ModuleType(name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        for kind in KINDS:
            patch.setattr(kind, "__module__", package)
            setattr(modules[package], kind.__name__, kind)
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield


def message_hub() -> dict[str, Any]:
    scalars = collections.OrderedDict({"train/loss": HistoryBuffer(), "train/lr": HistoryBuffer()})
    named = collections.defaultdict(list)
    named["a"].append(torch.ones(2))
    runtime = collections.OrderedDict(
        cfg="model = dict(type='Recognizer3D')",
        max_iters=10,
        best=np.float64(0.5),
        root=pathlib.Path("work"),
        phase=Phase.TRAIN,
        recent=collections.deque([1.0, 2.0], maxlen=5),
        named=named,
        config=ConfigDict(a=1),
        seen={1, 2},
        frozen=frozenset("ab"),
        raw=b"\x00\xff",
        call=functools.partial(print, 1, sep=""),
        logger=logging.getLogger("x"),
        state=Loop.State(),
        rng=np.random.RandomState(0).get_state(),
        generator=np.random.default_rng(0),
        counts=collections.Counter("abc"),
        large=10**2000,
    )
    return {
        "log_scalars": scalars,
        "runtime_info": runtime,
        "resumed_keys": collections.OrderedDict({"train/loss": True}),
    }


def training_file(folder: Path, package: str, **options: Any) -> Path:
    """epoch_N.pth as mmengine's Runner writes it."""
    optimizer = {
        "state": {0: {"exp_avg": torch.zeros(3)}},
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0]}],
    }
    content = {
        "meta": {
            "epoch": 3,
            "iter": 10,
            "cfg": "",
            "seed": 1,
            "experiment_name": "x",
            "dataset_meta": ConfigDict(classes=("a",)),
        },
        "state_dict": collections.OrderedDict(STATE),
        "message_hub": message_hub(),
        "optimizer": optimizer,
        "param_schedulers": [{"_global_step": 3, "last_step": np.int64(3)}],
    }
    content["state_dict"]._metadata = collections.OrderedDict({"": {"version": 1}})
    with as_if_of(package):
        return saved(content, **options)(folder)


@pytest.mark.parametrize("package", ["mmengine.logging.history_buffer", "a_package.of_nobody"])
@pytest.mark.parametrize(
    "options",
    [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}, {"pickle_protocol": 5}],
    ids=["archive", "old", "protocol 4", "protocol 5"],
)
def test_a_training_file_of_mmengine_is_read_and_what_was_passed_over_is_named(
    package, options, tmp_path
):
    path = training_file(tmp_path, package, **options)
    plain, _ = import_model(_plain(tmp_path), Facts(**FACTS))
    # of other protocols
    with pytest.raises(pickle.UnpicklingError), warnings.catch_warnings(action="ignore"):
        torch.load(path, weights_only=True)
    model, report = import_model(path, Facts(**FACTS))
    assert all(
        torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items()
    )
    assert {"meta", "message_hub", "optimizer", "param_schedulers"} <= set(report.left_out)
    line = report.left_out["message_hub"]
    assert f"{package}.HistoryBuffer" in line
    assert "with 1 tensors" in line
    assert f"{package}.Phase" in line
    assert all("\n" not in remark for remark in report.lines())
    assert report.left_out["optimizer"].endswith("dict with 1 tensors")
    assert not {package, package.split(".")[0]} & set(sys.modules)


def test_data_of_python_itself_is_passed_over(tmp_path):
    content = [
        signal.SIGTERM,
        http.HTTPStatus.OK,
        dict[str, int],
        type(None),
        dataclasses.MISSING,
        io.BytesIO(b"x"),
        io.StringIO("x"),
        sys.modules["typing"].Dict[str, int],
    ]
    _, report = import_model(
        saved({"model": STATE, "x": content}, pickle_protocol=4)(tmp_path), Facts(**FACTS)
    )
    assert "_MISSING_TYPE" in report.left_out["x"]


# What other readers would execute, or break over, and what is no more than a text or a number of
# items here.
INERT: dict[str, tuple[bytes, str]] = {
    **{f"grows: {name}": (payload, "") for name, payload in hostile.GROWING.items()},
    "a call of another package": (
        b"cnumpy.f2py.crackfortran\nmyeval\n" + text("open('EXECUTED', 'w')") + b"\x85R",
        "numpy.f2py.crackfortran.myeval",
    ),
    "a name without a call": (b"cposix\nsystem\n", "posix.system"),
    "a state for a function": (
        b"ctorch._utils\n_rebuild_parameter\n(N}" + text("__defaults__") + b"cposix\nsystem\nstb",
        "torch._utils._rebuild_parameter",
    ),
    "a state for a class": (
        b"cargparse\nNamespace\n(N}" + text("__init__") + b"cposix\nsystem\nstb",
        "",
    ),
    "a state for an object": (
        b"ca_package\nKind\n)\x81(}" + text("__class__") + b"cposix\nsystem\ns}tb",
        "a_package.Kind",
    ),
    "methods of a dictionary": (
        b"ccollections\nOrderedDict\n)R}" + text("items") + b"cposix\nsystem\nsb",
        "",
    ),
    "an attribute of a text": (
        b"c__builtin__\ngetattr\n" + text("x") + text("format") + b"\x86R",
        "",
    ),
    "a large place in the memo": (b"Nr\xff\xff\xff\xff", ""),
    "a large array": (b"c__builtin__\nbytearray\nL" + str(2**60).encode() + b"L\n\x85R", ""),
    "an integer of many digits": (b"\x8b" + (10**6).to_bytes(4, "little") + b"\x01" * 10**6, ""),
    "a deep key": (b"})" + b"\x85" * 300_000 + b"Ns", ""),
    "a deep item of a set": (b"\x8f()" + b"\x85" * 300_000 + b"\x90", ""),
    "a deep item of a frozen set": (b"()" + b"\x85" * 300_000 + b"\x91", ""),
    "a deep key of protocol 0": (b"()" + b"\x85" * 300_000 + b"Nd", ""),
    "a deep list": (b"]" + b"]" * 100_000 + b"a" * 100_000, ""),
    "a name of many lines": (
        text("a_package") + text("a\nb\x1b[31m") + b"\x93)R",
        "a_package.a\\nb",
    ),
    "a long name": (text("a_package") + text("a" * 10**6) + b"\x93)R", "a_package.aaa"),
}


@pytest.mark.parametrize("case", INERT)
def test_what_is_not_called_stays_a_text(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    payload, named = INERT[case]
    before = REBUILD.__defaults__
    plain, _ = import_model(saved({"model": hostile.STATE})(tmp_path), Facts(**FACTS))
    model, report = import_model(hostile.beside(payload)(tmp_path), Facts(**FACTS))
    assert all(
        torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items()
    )
    assert list(report.left_out) == ["x"]
    assert named in report.left_out["x"]
    assert report.left_out["x"].isprintable()
    assert len(report.left_out["x"]) < 300
    assert REBUILD.__defaults__ == before
    assert [child.name for child in tmp_path.iterdir()] == ["x.pth"]


@pytest.mark.parametrize("case", hostile.GROWING)
def test_what_is_given_to_many_calls_is_there_once(case, tmp_path):
    path = hostile.beside(hostile.GROWING[case])(tmp_path)
    read_source(path)
    tracemalloc.start()
    try:
        read_source(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6  # copies would take more than 80 million
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "name", [name for name in hostile.PAYLOADS if name not in ("OBJ", "an object that calls")]
)
def test_the_payloads_would_have_been_executed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    payload, _ = hostile.PAYLOADS[name]
    with contextlib.suppress(Exception):  # some end in an error, afterwards
        pickle.loads((b"\x80\x04" if b"\x93" in payload else b"\x80\x02") + payload + b".")
    assert (tmp_path / "EXECUTED").exists()


def test_tensors_of_every_kind_have_the_bits_that_torch_reads(tmp_path):
    generator = torch.Generator().manual_seed(0)
    kinds = (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    )
    whole = torch.randn(6, 5, generator=generator)
    tensors = {f"{kind}": (100 * torch.randn(3, 4, generator=generator)).to(kind) for kind in kinds}
    tensors |= {
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "nothing": torch.empty(0, 3),
        "turned": whole.T,
        "slice": whole[1:4, ::2],
        "row": whole[2],
        "parameter": torch.nn.Parameter(whole.clone()),
        "broadcast": torch.ones(3, 1),
    }
    tagged = whole.clone()
    tagged.origin = "a tensor with an attribute"  # pyright: ignore[reportAttributeAccessIssue]
    tensors["tagged"] = tagged
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save({"model": tensors}, tmp_path / "x.pth", **options)
        theirs = torch.load(tmp_path / "x.pth", weights_only=True)["model"]
        ours = read_source(tmp_path / "x.pth").tensors
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name


def test_the_options_of_a_training_are_read_whatever_lies_between_them(tmp_path):
    arguments = argparse.Namespace(
        num_frames=6, root=pathlib.Path("x"), rate=np.float64(0.5), call=functools.partial(print, 1)
    )
    source = read_source(saved({"model": STATE, "args": arguments})(tmp_path))
    assert source.arguments["num_frames"] == 6
    assert set(source.arguments) == {"num_frames", "root", "rate", "call"}


def _plain(folder: Path) -> Path:
    torch.save(STATE, folder / "plain.pth")
    return folder / "plain.pth"
