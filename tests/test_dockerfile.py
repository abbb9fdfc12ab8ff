"""The image: linted where hadolint is installed, and held to what can be read of it anyway."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "Dockerfile").read_text()
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


def test_runs_and_data_stay_out_of_the_image():
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs", "data"} <= set(ignored)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing():
    result = subprocess.run(["hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
