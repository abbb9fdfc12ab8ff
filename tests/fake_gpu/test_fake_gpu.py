"""Starts the tests beside it where torch finds a GPU that can do nothing.

The library of that GPU is built here, and preloaded.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton import backends

HERE = Path(__file__).resolve().parent
HEADERS = Path(backends.__path__[0]) / "nvidia" / "include"  # CUDA's, from Triton's wheel


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_what_runs_on_cuda_runs_on_fake_cuda_tensors(tmp_path: Path) -> None:
    library = tmp_path / "libcuda.so.1"
    subprocess.run(
        [
            "cc",
            "-shared",
            "-fPIC",
            f"-I{HEADERS}",
            f"-Wl,-soname,{library.name}",
            str(HERE / "gpu.c"),
            "-o",
            str(library),
        ],
        check=True,
    )
    environment = {
        **os.environ,
        "FAKE_GPU": "1",
        "LD_PRELOAD": str(library),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(HERE),
        "-p",
        "no:cacheprovider",
        "--durations=10",
    ]
    finished = subprocess.run(
        command,
        cwd=HERE.parents[1],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(finished.stdout)  # pytest shows it if this fails
    assert finished.returncode == 0, "\n" + finished.stdout[-20000:]
    assert " passed" in finished.stdout
