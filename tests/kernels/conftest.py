"""Tests of the kernels themselves: a CPU has them in Triton's interpreter (tests/conftest.py)."""

import pytest
import torch

from video_mae.kernels import dispatch


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """`impl="triton"` is there on a CPU, too."""
    if torch.cuda.is_available():
        pytest.skip("tests/gpu has the kernels, which are compiled here")
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
