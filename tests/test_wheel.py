"""What is built of this tree works where it is installed, from another folder."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("video_mae", "kernels", "configs", "pyproject.toml", "README.md", "LICENSE")
BUILD = "import setuptools.build_meta as build; print(build.build_{}('dist'))"


def run(*words: str, cwd: Path, path: str = "") -> str:
    """What a command of this Python says; it finds the package in `path` alone."""
    result = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": path, "HOME": str(cwd)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders in which a wheel of the tree, and one of its sdist, are installed."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    tree.mkdir()
    for part in PARTS:
        ignore = shutil.ignore_patterns("__pycache__")
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, tree / part, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / part, tree)
    run("-c", BUILD.format("sdist"), cwd=tree)
    with tarfile.open(next(tree.glob("dist/*.tar.gz"))) as sdist:
        sdist.extractall(folder, filter="data")
    trees = {"tree": tree, "sdist": next(folder.glob("video_mae-*"))}
    found = {}
    for name, source in trees.items():
        run("-c", BUILD.format("wheel"), cwd=source)
        wheel = str(next(source.glob("dist/*.whl")))
        target = folder / f"of_{name}"
        pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
        run(*pip, str(target), wheel, cwd=folder)
        found[name] = target
    return found


@pytest.mark.parametrize("source", ["tree", "sdist"])
def test_an_installed_wheel_has_all_files(installed: dict[str, Path], source: str) -> None:
    target = installed[source] / "video_mae"
    for of, ending in (("video_mae", "py"), ("kernels", "py"), ("configs", "yaml")):
        for path in (ROOT / of).rglob(f"*.{ending}"):
            inside = path.relative_to(ROOT / of)
            if "kernels" not in inside.parts:
                place = target / inside if of == "video_mae" else target / of / inside
                assert place.is_file(), place
    assert (target / "py.typed").is_file()
    assert (target / "completion.bash").is_file()
    assert not (installed[source] / "kernels").exists()  # another project's name


def test_an_installed_wheel_works_from_another_folder(
    installed: dict[str, Path], tmp_path: Path
) -> None:
    target = str(installed["sdist"])

    def command(*words: str) -> str:
        return run("-m", "video_mae", *words, cwd=tmp_path, path=target)

    assert "video-mae 0." in command("--version")
    recipes = command("recipes")
    assert "of_sdist/video_mae/configs/pretrain/kinetics400_base.yaml\n" in recipes
    size = ["train_clips=8", "validation_clips=8", "num_frames=4", "height=32", "width=32"]
    command("demo", "data", *size)
    told = command(
        "pretrain",
        next(line for line in recipes.splitlines() if line.endswith("pretrain/demo.yaml")),
        "data.source=data/train.txt",
        "probe.train=",
        "probe.validation=",
        "--dry-run",
    )
    assert "nothing was written or begun" in told
    code = "import video_mae.kernels.attention as used; print(used.__file__)"
    assert run("-c", code, cwd=tmp_path, path=target).startswith(target)
