"""Starts tests/interpreted with Triton's interpreter, which has to be chosen before the kernels are
imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.timeout(1800)
def test_kernels_are_right_in_the_interpreter():
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(HERE / "interpreted"),
        "-p",
        "no:cacheprovider",
        "--timeout=600",
        "--durations=10",
    ]
    finished = subprocess.run(
        command,
        cwd=HERE.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(finished.stdout)  # pytest shows it if this fails
    assert finished.returncode == 0, "\n" + finished.stdout[-20000:]
    assert " passed" in finished.stdout
