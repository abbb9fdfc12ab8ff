"""The image: linted where hadolint is installed, and held to what can be read of it anyway."""

import fnmatch
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "Dockerfile").read_text()
PACKED = (
    "video_mae",
    "kernels",
    "configs",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "constraints",
)
STEPS = re.findall(r"^([A-Z]+) (.*)$", re.sub(r"\\\n\s*", " ", TEXT), re.MULTILINE)


def test_every_line_is_an_instruction_that_docker_knows():
    known = {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "CMD"}
    written = [line for line in re.sub(r"\\\n\s*", " ", TEXT).splitlines() if line.strip()]
    assert [line for line in written if line[0] != "#"] == [" ".join(step) for step in STEPS]
    assert {name for name, _ in STEPS} <= known
    assert STEPS[0][0] == "FROM"
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu\d\d\.04", STEPS[0][1])


def test_the_cuda_of_the_image_is_that_of_the_tested_set():
    pinned = re.search(r"^cuda-toolkit==(\d+\.\d+)\.", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    assert STEPS[0][1].startswith(f"nvidia/cuda:{pinned[1]}.")


def test_what_is_copied_and_installed_is_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for name, words in STEPS:
        if name == "COPY":
            *sources, _ = words.split()
            assert all((ROOT / source).exists() for source in sources), words
        for asked in re.findall(r"\.\[([\w,]+)\]", words):
            assert set(asked.split(",")) <= extras.keys()


def test_runs_and_data_stay_out_of_the_image_and_nothing_that_is_packed():
    """A pattern of .dockerignore is of a path from the root on: `data` is not video_mae/data."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs", "data"} <= set(ignored)
    patterns = [re.compile(fnmatch.translate(one.removeprefix("**/"))) for one in ignored]
    is_anywhere = [one.startswith("**/") for one in ignored]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    wanted = [path for path in tracked.stdout.splitlines() if path.startswith(PACKED)]
    assert {"pyproject.toml", "video_mae/kernels", "kernels/attention.py"} <= set(wanted)
    for path in wanted:
        names = path.split("/")
        for pattern, is_any in zip(patterns, is_anywhere, strict=True):
            assert not any(pattern.match(name) for name in (names if is_any else names[:1])), path


def test_the_python_of_the_image_is_new_enough_and_its_own():
    """That of the system refuses pip, so the packages go into an environment."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = {"22.04": (3, 10), "24.04": (3, 12), "26.04": (3, 14)}[STEPS[0][1][-5:]]
    needed = re.fullmatch(r">=(\d+)\.(\d+)", project["requires-python"])
    assert needed is not None
    assert python >= tuple(map(int, needed.groups()))
    words = {name: text for name, text in STEPS if name == "ENV"}["ENV"]
    assert "PATH=/opt/video-mae/bin:$PATH" in words
    runs = [text for name, text in STEPS if name == "RUN"]
    assert "python3 -m venv /opt/video-mae" in runs[0]
    assert all("break-system-packages" not in text for text in runs)
    site = f"/opt/video-mae/lib/python{python[0]}.{python[1]}/site-packages"
    docs = (ROOT / "docs" / "console.md").read_text()
    assert site in docs
    # whom the processes run as, and the memory that the loader shares
    assert '--user "$(id -u):$(id -g)"' in docs
    assert "--ipc=host" in docs


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing():
    result = subprocess.run(["hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
