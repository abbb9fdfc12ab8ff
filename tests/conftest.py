"""What several test files need: a little rendered data set, a tiny run, the shared real clips where there are some."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from video_mae.config import PretrainConfig, load_config
from video_mae.demo import DemoConfig, make_demo_data

SHARED_VIDEOS = Path(__file__).resolve().parents[2] / "shared" / "videos"

TINY = {
    "model": {"num_frames": 4, "height": 32, "width": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2,
              "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    "mask": {"ratio": 0.75},
    "data": {"num_workers": 0, "stride": 2, "crop_scales": [1.0, 0.75]},
    "optim": {"micro_batch": 4, "steps": 4, "warmup_steps": 1, "base_lr": 0.05},
    "engine": {"precision": "fp32", "zero_stage": 0},
    "journal": {"log_interval": 1, "checkpoint_interval": 0, "picture_interval": 0},
}


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "demo"
    make_demo_data(folder, DemoConfig(train_clips=24, validation_clips=8, num_frames=16, height=48, width=48))
    return folder


@pytest.fixture(scope="session")
def shared_videos() -> Path:
    if not SHARED_VIDEOS.is_dir():
        pytest.skip("the shared clips are not beside this checkout")
    return SHARED_VIDEOS


@pytest.fixture(scope="session")
def tiny_file(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file of a run that takes seconds."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "data": {**TINY["data"], "source": str(demo_folder / "train.txt")}}))
    return path


@pytest.fixture
def tiny(tiny_file: Path, tmp_path: Path) -> Callable[..., PretrainConfig]:
    """tiny("optim.steps=3", ...): that run with changes, in tmp_path/run unless `output` is changed."""
    return lambda *overrides: load_config(tiny_file, [f"output={tmp_path / 'run'}", *overrides])


@pytest.fixture
def quiet_process() -> Iterator[None]:
    """For tests that train in this process: gives signal handlers and the number of threads back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start: two ranks share the cores
