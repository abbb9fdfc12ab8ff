"""What is built of this tree works where it is installed, from another folder."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("video_mae", "kernels", "configs", "pyproject.toml", "README.md", "LICENSE")
BUILD = "import setuptools.build_meta as build; build.build_{}('dist')"
ORIGIN = (
    "import importlib.util as find; print(find.find_spec('video_mae.kernels.attention').origin)"
)


def run(*words: str, cwd: Path, path: str = "") -> str:
    """What a command of this Python says; it finds the package in `path` before all others."""
    result = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel of the tree, and one of its sdist."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    tree.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, tree / part, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / part, tree)
    run("-c", BUILD.format("sdist"), cwd=tree)
    with tarfile.open(next(tree.glob("dist/*.tar.gz"))) as sdist:
        sdist.extractall(folder, filter="data")
    wheels = {}
    for name, source in (("tree", tree), ("sdist", next(folder.glob("video_mae-*")))):
        run("-c", BUILD.format("wheel"), cwd=source)
        wheels[name] = next(source.glob("dist/*.whl"))
    return wheels


@pytest.mark.parametrize("name", ["tree", "sdist"])
def test_a_wheel_has_all_files(built: dict[str, Path], name: str) -> None:
    there = set(zipfile.ZipFile(built[name]).namelist())
    wanted = {"video_mae/py.typed", "video_mae/completion.bash"}
    for folder in ("configs", "kernels", "video_mae"):
        inside = "" if folder == "video_mae" else "video_mae/"
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in (".py", ".yaml"):
                wanted.add(inside + path.relative_to(ROOT).as_posix())
    assert wanted <= there
    # `kernels` would be another project's
    assert {Path(path).parts[0].split("-")[0] for path in there} == {"video_mae"}


def test_an_installed_wheel_works_from_another_folder(
    built: dict[str, Path], demo_folder: Path, tmp_path: Path
) -> None:
    target, here = tmp_path / "installed", tmp_path / "elsewhere"
    here.mkdir()
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target))
    run(*pip, str(built["sdist"]), cwd=here)

    def command(*words: str) -> str:
        return run("-m", "video_mae", *words, cwd=here, path=str(target))

    assert "video-mae 0." in command("--version")
    recipe = "../installed/video_mae/configs/finetune/ucf101_base.yaml"
    assert recipe in command("recipes").splitlines()
    assert (here / recipe).is_file()
    assert "8 videos" in command("pack", str(demo_folder / "val.txt"), "packed")
    assert (here / "packed").is_dir()
    assert run("-c", ORIGIN, cwd=here, path=str(target)).startswith(str(target))
