"""A pickle as plain data: a machine that knows what each opcode is for, and runs nothing.

No name in the file is ever looked up, imported or called. torch's own safe reader refuses every
file that names more than it knows; here a name stays a text and what would be called becomes a
`Thing`, so that weights are read whatever else a training has left beside them.
"""

import pickletools
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import torch

LARGEST_INTEGER_BITS, LONGEST_NAME = 128, 120
MOST_ARGUMENTS = 1 << 22  # of all calls: one list may be given to many, and each has a copy
STORAGES = {
    f"torch.{kind}Storage": dtype
    for kind, dtype in (
        ("Double", torch.float64),
        ("Float", torch.float32),
        ("Half", torch.float16),
        ("BFloat16", torch.bfloat16),
        ("Long", torch.int64),
        ("Int", torch.int32),
        ("Short", torch.int16),
        ("Char", torch.int8),
        ("Byte", torch.uint8),
        ("Bool", torch.bool),
        ("ComplexFloat", torch.complex64),
        ("ComplexDouble", torch.complex128),
    )
}
ORDINARY = ("torch.Tensor", "torch.nn.parameter.Parameter")

# A call of Python's own library means that a file is made to do something, but for these, which
# make data. Nothing would happen: this only tells a hostile file from an honest one. Objects of
# other packages are what trainings leave.
DATA = frozenset(
    (
        "builtins.bool",
        "builtins.bytearray",
        "builtins.bytes",
        "builtins.complex",
        "builtins.dict",
        "builtins.float",
        "builtins.frozenset",
        "builtins.getattr",
        "builtins.int",
        "builtins.list",
        "builtins.object",
        "builtins.range",
        "builtins.set",
        "builtins.slice",
        "builtins.str",
        "builtins.tuple",
        "builtins.type",
        "_codecs.encode",
        "_io.BytesIO",
        "_io.StringIO",
        "_operator.getitem",
        "argparse.Namespace",
        "array._array_reconstructor",
        "copyreg._reconstructor",
        "functools.partial",
        "http.HTTPStatus",
        "itertools.count",
        "logging.getLogger",
        "operator.attrgetter",
        "operator.getitem",
        "operator.itemgetter",
        "random.Random",
        "re._compile",
        "signal.Signals",
        "time.struct_time",
        "types.GenericAlias",
        "types.SimpleNamespace",
    )
)
DATA_MODULES = (
    "collections",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "ipaddress",
    "pathlib",
    "typing",
    "uuid",
    "zoneinfo",
)
COMMANDS = {
    "os",
    "posix",
    "nt",
    "sys",
    "subprocess",
    "builtins",
    "importlib",
    "system",
    "popen",
    "eval",
    "exec",
    "__import__",
}

LITERALS = frozenset(
    (
        "INT",
        "LONG",
        "LONG1",
        "LONG4",
        "BININT",
        "BININT1",
        "BININT2",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    )
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class CodeError(ValueError):
    """A file would execute something; the message is what."""


@dataclass(frozen=True)
class Name:
    """A name that a file has for something of a package."""

    text: str


@dataclass(eq=False)
class Thing:
    """Stands where a file would have something called: the name of that, and all that was given to
    it. It does nothing.
    """

    name: str
    given: list[Any] = field(default_factory=list)
    state: Any = None


@dataclass(frozen=True)
class Storage:
    """Values in the file: `count` of them under `key`, of the dtype that `kind` stands for, or none
    that is read here.
    """

    key: str
    count: int
    kind: str
    start: int

    @property
    def dtype(self) -> torch.dtype | None:
        return STORAGES.get(self.kind)


@dataclass(frozen=True)
class Stored:
    """A tensor that has not been read."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Machine:
    """The stack of a pickle with plain values, `Name`, `Thing` and `Stored` on it."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.num_arguments = 0

    def run(self, file: IO[bytes]) -> Any:
        """What a pickle holds; the file stands behind it then. Raises: CodeError, or any exception
        for a damaged one.
        """
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in LITERALS:
                large = isinstance(argument, int) and argument.bit_length() > LARGEST_INTEGER_BITS
                self.stack.append(Thing("builtins.int") if large else argument)
            elif opcode.name in CONSTANTS:
                self.stack.append(CONSTANTS[opcode.name])
            else:
                self._step(opcode.name, argument)
        return self.stack.pop()

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self.marked.append(stack)
                self.stack = []
            case "POP" if not stack:
                self._items()
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._items()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                items = self._items()
                self.stack.append(tuple(items))
            case "LIST" | "FROZENSET":
                items = self._items()
                self.stack.append(items)
            case "DICT":
                items = self._items()
                self.stack.append({})
                _set_items(self.stack[-1], items)
            case "APPEND":
                item = stack.pop()
                _append(stack[-1], [item])
            case "APPENDS" | "ADDITEMS":
                items = self._items()
                _append(self.stack[-1], items)
            case "SETITEM":
                items = [stack.pop(-2), stack.pop()]
                _set_items(stack[-1], items)
            case "SETITEMS":
                items = self._items()
                _set_items(self.stack[-1], items)
            case "GLOBAL":
                stack.append(_name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_name(module, name))
            case "EXT1" | "EXT2" | "EXT4":
                stack.append(Name(f"copyreg.extension_{argument}"))
            case "REDUCE" | "NEWOBJ":
                given, called = stack.pop(), stack.pop()
                stack.append(self._call(called, given))
            case "NEWOBJ_EX":
                keywords, given, called = stack.pop(), stack.pop(), stack.pop()
                stack.append(self._call(called, [*given, keywords]))
            case "INST":
                given = self._items()
                self.stack.append(self._call(_name(*argument.split(" ", 1)), given))
            case "OBJ":
                called, *given = self._items()
                self.stack.append(self._call(called, given))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Thing):  # of other values it is what no weights need
                    stack[-1].state = state
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case _:
                raise ValueError(f"has an opcode {opcode}, which torch.save does not write")

    def _call(self, called: Any, given: Any) -> Any:
        """What a call stands for. Raises: ValueError where a small file would become large by
        calls.
        """
        if not isinstance(given, tuple | list):
            raise ValueError("has a call without arguments")
        self.num_arguments += len(given) + sum(
            len(item) for item in given if isinstance(item, tuple | list)
        )
        self.num_arguments += len(called.given) if isinstance(called, Thing) else 0
        if self.num_arguments > MOST_ARGUMENTS:
            raise ValueError(f"gives more than {MOST_ARGUMENTS} arguments to what it calls")
        return _make(called, given)

    def _items(self) -> list[Any]:
        """What lies above the last mark, which goes."""
        items, self.stack = self.stack, self.marked.pop()
        return items

    def _storage(self, reference: Any) -> Storage:
        if (
            not isinstance(reference, tuple)
            or len(reference) not in (5, 6)
            or reference[0] != "storage"
        ):
            raise ValueError("refers to something that is no storage")
        _, kind, key, _, count, *view = reference
        start = view[0][1] if view and view[0] else 0
        if (
            not isinstance(kind, Name)
            or not isinstance(key, str)
            or not _are_counts([count, start])
        ):
            raise ValueError("refers to a storage in another way than torch.save does")
        storage = Storage(key, count, kind.text, start)
        self.storages[key] = storage
        return storage


def _name(module: Any, name: Any) -> Name:
    """A name as Python 3 has it."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("has a name that is no text")
    if (module, name) in NAME_MAPPING:
        module, name = NAME_MAPPING[module, name]
    return Name(_plain(f"{IMPORT_MAPPING.get(module, module)}.{name}"))


def _plain(text: str) -> str:
    """As much of a text as a message can show."""
    return (text if text.isprintable() else ascii(text))[:LONGEST_NAME]


def _make(called: Any, given: Sequence[Any]) -> Any:
    """What a call stands for: a tensor, a dictionary, a name, or a `Thing`."""
    if (
        isinstance(called, Thing)
        and called.name == "functools.partial"
        and called.given
        and isinstance(called.given[0], Name)
    ):
        return _make(called.given[0], [*called.given[1:], *given])
    if not isinstance(called, Name):
        raise CodeError(
            f"a call of {called.name if isinstance(called, Thing) else type(called).__name__}"
        )
    if _is_code(called.text):
        raise CodeError(called.text)
    match called.text, given:
        case "collections.OrderedDict", [] | [[*_]]:
            made: dict[Any, Any] = {}
            _set_items(made, [item for pair in (given[0] if given else ()) for item in pair])
            return made
        case "builtins.getattr", [Name() | Thing() as owner, str(attribute), *_]:
            return Name(
                _plain(f"{owner.text if isinstance(owner, Name) else owner.name}.{attribute}")
            )
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state", [
            Stored() as stored,
            *_,
        ]:
            return stored
        case "torch._tensor._rebuild_from_type_v2", [
            Name() as function,
            Name(text),
            [*values],
            _,
        ] if text in ORDINARY:
            return _make(function, values)
        case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2", [
            Storage() as storage,
            offset,
            [*size],
            [*stride],
            *more,
        ]:
            # more: gradient, hooks, marks of lazily negated or conjugated values
            is_plain = len(more) < 3 or not more[2]
            if is_plain and len(size) == len(stride) and _are_counts([offset, *size, *stride]):
                return Stored(storage, offset, tuple(size), tuple(stride))
    return Thing(called.text, list(given))


def _is_code(name: str) -> bool:
    """Whether a call of this would do something rather than make data, as far as the name tells."""
    module, *rest = name.split(".")
    if name in DATA or module in DATA_MODULES:
        return False
    return module in sys.stdlib_module_names or not COMMANDS.isdisjoint(rest)


def _are_counts(values: Sequence[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _append(target: Any, items: list[Any]) -> None:
    if not isinstance(target, Thing | list):
        raise ValueError("appends to something that is no list")
    (target.given if isinstance(target, Thing) else target).extend(items)


def _set_items(target: Any, items: list[Any]) -> None:
    """Keys and values, one after the other. A key that is no plain value becomes a text: tuples of
    tuples could not be hashed.
    """
    if isinstance(target, Thing):
        target.given.extend(items)
        return
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("sets items of something that is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[
            key
            if isinstance(key, str | int | float | bytes | None)
            else f"<{type(key).__name__} {len(target)}>"
        ] = value


def things_in(content: object, seen: set[int]) -> tuple[int, list[str]]:
    """(number of tensors, what would have been called or is named, each once, packages before
    Python's own) in all that a content holds.

    seen: what has been counted with other contents of the file, which is not counted again; this
    content is added.
    """
    count, names, stack = 0, {}, [content]
    while stack:
        item = stack.pop()
        if isinstance(item, Name):
            names[item.text] = None
            continue
        if id(item) in seen:  # objects may hold each other
            continue
        seen.add(id(item))
        if isinstance(item, Stored | torch.Tensor):
            count += 1
        elif isinstance(item, Mapping):
            stack.extend(item.values())
        elif isinstance(item, list | tuple | set):
            stack.extend(item)
        elif isinstance(item, Thing):
            names[item.name] = None
            stack.extend([item.given, item.state])
    return count, sorted(
        names.keys() - DATA, key=lambda name: (name.split(".")[0] in sys.stdlib_module_names, name)
    )
