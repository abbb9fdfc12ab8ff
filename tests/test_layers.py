"""Who may import whom, read from the source: the design, kept by a test."""

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for folder in ("video_mae", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not path.relative_to(ROOT).as_posix().startswith("video_mae/kernels/")
}
SOURCES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}

# A folder (or a file at the top) is a level: it imports what stands in the rows below its own, and
# itself.
LEVELS = (
    ("cli",),
    ("benchmark", "planning"),
    ("tools",),
    ("evaluation",),
    ("training",),
    ("convert",),
    ("data", "model"),
    ("decoding", "kernels"),
    ("report",),
    ("config",),
    ("processes", "results"),
    ("files", "extras", "progress_bar"),
)
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
COMPETITORS = ("video_mae.benchmark.pipelines",)  # runs them beside ours
ONLY = {
    "deepspeed": ("video_mae.training.engine",),
    "triton": ("kernels.",),
    "decord": ("video_mae.decoding.", *COMPETITORS),
    "pytorchvideo": COMPETITORS,
    "torchcodec": ("video_mae.decoding.", *COMPETITORS),
    "av": ("video_mae.decoding.", *COMPETITORS),
}


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All of a file but what only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if not (
            isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
        ):
            yield node
            yield from nodes(node)


def imports(name: str) -> set[str]:
    """Every module that a file imports, at its top or inside a function; of a package its files
    where these are meant.
    """
    found: set[str] = set()
    for node in nodes(SOURCES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*name.split(".")[: -node.level], *([node.module] if node.module else [])])
                if node.level
                else str(node.module)
            )
            inside = base.replace("video_mae.kernels", "kernels")
            found |= {
                f"{base}.{alias.name}" for alias in node.names if f"{inside}.{alias.name}" in FILES
            } or {base}
    return found


def ours(name: str) -> set[str]:
    """The parts of video_mae that a file imports, by their first word."""
    return {
        module.split(".")[1] if "." in module else "video_mae"
        for module in imports(name)
        if module.split(".")[0] == "video_mae"
    }


@pytest.mark.parametrize("part", LEVEL)
def test_a_level_imports_only_what_lies_under_it(part):
    allowed = {part} | {other for other, level in LEVEL.items() if level > LEVEL[part]}
    for name in FILES:
        if name.startswith((f"video_mae.{part}.", f"{part}.")) or name == f"video_mae.{part}":
            assert ours(name) <= allowed, name


def test_every_file_stands_on_a_level():
    for name in FILES:
        own = name.split(".")[1] if name.startswith("video_mae.") else name.split(".")[0]
        assert own in LEVEL or name in ("video_mae.__init__", "video_mae.__main__"), name


def test_decoding_imports_no_torch():
    for name in FILES:
        if name.startswith("video_mae.decoding.") and not name.endswith("torchcodec_video"):
            assert "torch" not in {module.split(".")[0] for module in imports(name)}, name


def test_only_main_imports_the_command_line():
    assert [name for name in FILES if "cli" in ours(name)] == ["video_mae.__main__"]


@pytest.mark.parametrize("library", ONLY)
def test_a_library_has_its_one_place(library):
    users = [
        name for name in FILES if library in {module.split(".")[0] for module in imports(name)}
    ]
    assert [name for name in users if not name.startswith(ONLY[library])] == []


def test_kernels_import_torch_triton_einops_and_themselves():
    for name in FILES:
        if name.startswith("kernels."):
            used = {module.split(".")[0] for module in imports(name)}
            assert used <= {"torch", "triton", "einops", "kernels"} | sys.stdlib_module_names, name


def test_nobody_imports_the_other_project_called_kernels():
    for name in FILES:
        for node in ast.walk(SOURCES[name]):
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "kernels" for alias in node.names), name
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).split(".")[0] != "kernels", name


def test_kernels_is_a_link_without_a_package_file():
    assert (ROOT / "video_mae" / "kernels").resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_sources_and_tests_are_ascii():
    for path in [*FILES.values(), *sorted((ROOT / "tests").rglob("*.py"))]:
        assert path.read_bytes().isascii(), path


def is_triton_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(
        ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list
    )


@pytest.mark.parametrize("name", FILES)
def test_public_names_tell_what_they_are(name):
    tree = SOURCES[name]
    assert name.endswith(("__init__", "__main__")) or ast.get_docstring(tree), (
        f"{name} has no docstring"
    )
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            trivial = isinstance(node, ast.FunctionDef) and len(node.body) == 1
            assert trivial or ast.get_docstring(node), f"{name}.{node.name} has no docstring"
        for function in ast.walk(node):
            if isinstance(
                function, ast.FunctionDef | ast.AsyncFunctionDef
            ) and not is_triton_kernel(function):
                assert function.returns is not None, (
                    f"{name}.{function.name} does not say what it returns"
                )


def test_a_class_has_a_name_of_its_own():
    homes: dict[str, str] = {}
    for name, tree in SOURCES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert node.name not in homes, f"{node.name}: {homes[node.name]} and {name}"
                homes[node.name] = name


def test_a_file_of_tests_stays_in_one_process(request):
    """Its fixtures take minutes, and who trains comes last: and pytest-xdist has to mean its groups."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("one process runs all tests")
    assert request.node.nodeid.endswith("@tests/test_layers")
