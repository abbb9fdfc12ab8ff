"""Files of torch.save as plain data: read by the standard library's reader of pickles, which is
kept from looking anything up.

No name in the file is imported or called: it stays a text, and what would be called becomes a
`Thing`. So weights are read whatever else a training has left beside them. torch's own safe reader
cannot do that: it refuses names of `os`, the opcodes after protocol 2, and compares no checksums.
"""

import io
import math
import pickle
import struct
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch

# What files begin with that are no archives: those before torch 1.6.
OLD_MAGIC, OLD_VERSION = 0x1950A86A20F9469CFC6C, 1001
LONGEST_NAME = 120
ORDINARY = ("torch.Tensor", "torch.nn.parameter.Parameter")

# A call of a name with one of these in it means that a file is made to do something. Nothing would
# happen: this only tells a hostile file from an honest one, whose objects are let pass.
COMMANDS = {
    *("os", "posix", "nt", "sys", "subprocess", "importlib", "runpy", "pickle", "marshal"),
    *("ctypes", "socket", "shutil", "pty", "webbrowser", "system", "popen", "eval", "exec"),
    *("compile", "open", "__import__"),
}

# the reader that is written in Python
PythonUnpickler: Any = pickle._Unpickler  # pyright: ignore[reportPrivateUsage]


class CodeError(ValueError):
    """A file would execute something; the message is what."""


@dataclass(eq=False)
class Thing:
    """Stands for what a file names; `given` is what it would be called with, None where it is not
    called. It does nothing.
    """

    name: str
    given: Any = None
    # state and items that it would take up
    parts: list[Any] = field(default_factory=list)

    def append(self, item: Any) -> None:
        self.parts.append(item)

    def extend(self, items: list[Any]) -> None:
        self.parts.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.parts.extend([key, value])

    @property
    def is_tensor(self) -> bool:
        is_rebuilt = self.name.startswith(("torch._utils._rebuild", "torch._tensor._rebuild"))
        return is_rebuilt and self.given is not None


class PlainKeys(dict[Any, Any]):
    """A dictionary that hashes no key of a file but plain ones: tuples of tuples of tuples take any
    depth of the machine's stack, and no message can show a long integer.
    """

    def __setitem__(self, key: Any, value: Any) -> None:
        is_long = isinstance(key, int) and key.bit_length() > 64
        if is_long or not isinstance(key, str | int | float | bytes | None):
            key = f"<{type(key).__name__} {len(self)}>"
        super().__setitem__(key, value)


class InertUnpickler(PythonUnpickler):
    """Python's own reader, where whatever would be looked up or called is a `Thing`.

    Arguments are kept as they are, never copied: a file cannot make more than it holds. The reader
    that is written in C could not be changed so far, and makes room for any place in its memo.
    """

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, Thing] = {}

    def find_class(self, module: str, name: str) -> Thing:
        """The name as Python 3 has it."""
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        return Thing(shown(f"{module}.{name}"))

    def persistent_load(self, reference: Any) -> Thing:
        """Values in the file, named by ("storage", kind, key, device, count, view)."""
        match reference:
            case ("storage", Thing(), str(key), _, _, *_):
                self.storages[key] = Thing("storage", reference)
                return self.storages[key]
        raise ValueError("refers to something that is no storage")

    def _instantiate(self, called: Any, given: list[Any]) -> None:
        self.append(_call(called, given))

    def load_call(self) -> None:
        given, called = self.stack.pop(), self.stack.pop()
        self.append(_call(called, given))

    def load_call_with_keywords(self) -> None:
        keywords, given, called = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.append(_call(called, [given, keywords]))

    def load_state(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Thing):  # of other values it is what no weights need
            self.stack[-1].append(state)

    def load_empty_dictionary(self) -> None:
        self.append(PlainKeys())

    def load_dict(self) -> None:
        items, made = self.pop_mark(), PlainKeys()
        for key, value in zip(items[::2], items[1::2], strict=True):
            made[key] = value
        self.append(made)

    dispatch = {
        **PythonUnpickler.dispatch,
        pickle.REDUCE[0]: load_call,
        pickle.NEWOBJ[0]: load_call,
        pickle.NEWOBJ_EX[0]: load_call_with_keywords,
        pickle.BUILD[0]: load_state,
        pickle.EMPTY_DICT[0]: load_empty_dictionary,
        pickle.DICT[0]: load_dict,
        # what a set holds would be hashed; a bytearray is made as large as a file says
        pickle.EMPTY_SET[0]: PythonUnpickler.load_empty_list,
        pickle.ADDITEMS[0]: PythonUnpickler.load_appends,
        pickle.FROZENSET[0]: PythonUnpickler.load_list,
        pickle.BYTEARRAY8[0]: PythonUnpickler.load_binbytes8,
    }


def _call(called: Any, given: Any) -> Any:
    """What a call stands for: a dictionary, a name, or a `Thing`. Raises: CodeError."""
    if not isinstance(called, Thing):
        raise CodeError(f"a call of {type(called).__name__}")
    if called.given is not None:
        # a function with its first arguments, which is what may be called again
        match called.name, called.given:
            case "functools.partial", [Thing(given=None) as function, *_]:
                called, given = function, [called.given, given]
            case _:
                raise CodeError(f"a call of {called.name}")
    if not COMMANDS.isdisjoint(called.name.split(".")):
        raise CodeError(called.name)
    match called.name, given:
        case "collections.OrderedDict", []:
            return PlainKeys()
        case "builtins.getattr", [Thing() as owner, str(attribute), *_]:
            return Thing(shown(f"{owner.name}.{attribute}"))
    return Thing(called.name, given)


def shown(value: object, longest: int = LONGEST_NAME) -> str:
    """As much of a text, or of anything's description, as a message can show."""
    return (value if isinstance(value, str) and value.isprintable() else ascii(value))[:longest]


class TorchFile:
    """An open file of torch.save: its `content`, in which tensors are things; `tensor` reads one.

    Checksums are compared, except where a file was saved without any, as torch can be told to.
    Raises: CodeError; whatever exception a damaged file leads to.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._values: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        # begin and length in a file of the old format
        self._places: dict[str, tuple[int, int]] = {}
        self._archive: zipfile.ZipFile | None = None
        self._root = ""
        is_archive = file.read(2) == b"PK"
        file.seek(0)
        self.content = self._open_archive() if is_archive else self._open_old()

    def _open_archive(self) -> Any:
        self._archive = archive = zipfile.ZipFile(self._file)
        entries = archive.infolist()
        unpacked, size = sum(entry.file_size for entry in entries), self._file.seek(0, 2)
        if unpacked > size:  # torch.save does not compress
            raise ValueError(f"would unpack to {unpacked} bytes from {size}")
        if not any(entry.CRC for entry in entries):  # set_crc32_options(False) of torch
            for entry in entries:
                entry.CRC = None  # pyright: ignore[reportAttributeAccessIssue]
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise ValueError(f"has {len(pickles)} parts named data.pkl, not one")
        self._root = pickles[0].removesuffix("data.pkl")
        if f"{self._root}constants.pkl" in names:
            raise ValueError("is a program of TorchScript")
        order = f"{self._root}byteorder"
        if order in names and archive.read(order).decode() != sys.byteorder:
            raise ValueError("is of a machine of another byte order")
        return InertUnpickler(io.BytesIO(archive.read(pickles[0]))).load()

    def _open_old(self) -> Any:
        file = self._file
        magic, version, system = (InertUnpickler(file).load() for _ in range(3))
        if (magic, version) != (OLD_MAGIC, OLD_VERSION):
            raise ValueError("is no file of torch.save")
        if system["little_endian"] is not True:
            raise ValueError("is of a machine of another byte order")
        reader = InertUnpickler(file)
        content, keys = reader.load(), InertUnpickler(file).load()
        for key in keys:
            if not isinstance(key, str):
                raise ValueError("has values without a name")
            length = struct.unpack("<q", file.read(8))[0] * _dtype(reader.storages[key]).itemsize
            self._places[key] = file.tell(), length
            file.seek(length, 1)
        return content

    def tensor(self, thing: Thing) -> torch.Tensor:
        """The values of an ordinary tensor. Raises: ValueError for another one, or where the file
        has fewer values; whatever damage leads to.
        """
        for _ in range(3):  # a parameter of a tensor with attributes is the deepest
            match thing.name.split(".")[-1], thing.given:
                case "_rebuild_parameter" | "_rebuild_parameter_with_state", [Thing() as data, *_]:
                    thing = data
                case "_rebuild_from_type_v2", [Thing() as function, Thing() as kind, given, _] if (
                    kind.name in ORDINARY
                ):
                    thing = Thing(function.name, given)
        if thing.name not in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            raise ValueError(f"is made by {thing.name}, not an ordinary one")
        storage, offset, size, stride, *more = thing.given
        if more[2:] and more[2]:
            raise ValueError("is lazily negated or conjugated, not an ordinary one")
        _, _, key, _, count, *view = storage.given
        begin = view[0][1] if view and view[0] else 0
        if {type(number) for number in (count, begin, offset, *size, *stride)} != {int}:
            raise ValueError("has a shape that is none")
        dtype = _dtype(storage)
        flat = self._flat(key, dtype)
        if len(flat) < count:
            raise ValueError(f"is damaged: {count} values should be there, {len(flat)} are")
        if math.prod(size) > len(flat):
            has = len(flat) * dtype.itemsize
            raise ValueError(f"has shape {size}, but only {has} bytes")
        return flat.as_strided(size, stride, begin + offset)

    def _flat(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        """All values of a storage, once for the tensors that share them."""
        if (key, dtype) not in self._values:
            if self._archive is not None:
                content = self._archive.read(f"{self._root}data/{key}")
            else:
                begin, length = self._places[key]
                self._file.seek(begin)
                content = self._file.read(length)
            # torch makes no tensor of an empty buffer
            self._values[key, dtype] = (
                torch.frombuffer(bytearray(content), dtype=dtype)
                if content
                else torch.empty(0, dtype=dtype)
            )
        return self._values[key, dtype]


def _dtype(storage: Thing) -> torch.dtype:
    """Of values in the file. Raises: ValueError for those that are not read here."""
    kind = storage.given[1].name
    try:
        return torch.serialization.StorageType(kind.removeprefix("torch.")).dtype
    except KeyError:
        raise ValueError(f"is of {kind}, not an ordinary one") from None


def things_in(content: object, seen: set[int]) -> tuple[int, list[str]]:
    """(number of tensors, names of other things, each once, packages before Python's own) in all
    that a content holds.

    seen: what has been counted with other contents of the file, which is not counted again; this
    content is added.
    """
    count, names, stack = 0, set(), [content]
    while stack:
        item = stack.pop()
        if not isinstance(item, Thing | dict | list | tuple) or id(item) in seen:
            continue
        seen.add(id(item))  # objects may hold each other
        if isinstance(item, dict):
            stack.extend(item.values())
        elif not isinstance(item, Thing):
            stack.extend(item)
        elif item.is_tensor:
            count += 1
        else:
            names.add(item.name)
            stack.extend([item.given, item.parts])
    return count, sorted(
        names, key=lambda name: (name.split(".")[0] in sys.stdlib_module_names, name)
    )
