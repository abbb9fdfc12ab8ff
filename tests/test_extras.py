"""A plain install imports and works; what needs more says which pip command brings it."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from video_mae import extras
from video_mae.cli import main
from video_mae.config.data import FileConfig
from video_mae.decoding import decoders
from video_mae.decoding.pictures import open_tiff

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {"skimage": "scikit-image", "PIL": "pillow", "yaml": "pyyaml"}
NEED_ALL = ("video_mae/benchmark/plots.py",)  # imported where matplotlib has been found


def names(requirements: list[str]) -> set[str]:
    return {requirement.split(">")[0].split(";")[0].strip() for requirement in requirements}


def imported(tree: ast.AST, *, everywhere: bool) -> Iterator[str]:
    """The packages that a file imports when it is itself imported, or everywhere in it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).split(".")[0]
        elif everywhere or not isinstance(node, ast.If | ast.FunctionDef):
            yield from imported(node, everywhere=everywhere)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No extra is installed."""
    monkeypatch.setattr(extras, "find_spec", lambda package: None)


def test_a_plain_install_can_import_every_file():
    plain = names(PROJECT["dependencies"])
    for path in [*(ROOT / "video_mae").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        if path.relative_to(ROOT).as_posix() in NEED_ALL:
            continue
        found = set(imported(ast.parse(path.read_text()), everywhere=False))
        found -= {*sys.stdlib_module_names, "video_mae", "kernels"}
        assert {DISTRIBUTIONS.get(package, package) for package in found} <= plain, path


@pytest.mark.parametrize("package", extras.EXTRAS)
def test_an_extra_brings_its_package(package):
    extra = PROJECT["optional-dependencies"][extras.EXTRAS[package]]
    assert DISTRIBUTIONS.get(package, package) in names(extra)


def test_a_stage_that_lacks_a_package_names_the_pip_command(missing, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["demo", str(tmp_path / "demo"), "train_clips=8", "validation_clips=8"])
    assert ended.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told == "video-mae demo: skimage is not installed; pip install 'video-mae[demo]'"


def test_a_decoder_that_is_not_there_names_the_pip_command(missing):
    decoders.problem.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"decord is not installed; pip install 'video-mae\["):
            decoders.resolve("decord")
        assert decoders.resolve("auto") == "pyav"
    finally:
        decoders.problem.cache_clear()


def test_a_file_that_needs_a_package_names_the_pip_command(missing, tmp_path):
    with pytest.raises(ImportError, match=r"tifffile is not installed; pip install 'video-mae\["):
        open_tiff(str(tmp_path / "a.tif"), FileConfig(), 1)
