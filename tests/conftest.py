"""What several test files need: a little rendered data set, a tiny run, the shared real clips where
there are some.

What a machine with a GPU may lack is imported where it is used: tests of kernels need torch, triton
and einops.
"""

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

# Before numpy and torch count the cores: processes of tests share them, and so do two ranks.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
import yaml

if TYPE_CHECKING:
    from video_mae.config import FinetuneConfig, PretrainConfig

# Who starts the tests in the background has these ignored, which commands inherit and respect.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

LONG = (
    "test_launcher",
    "test_injected_faults",
    "test_attention",
    "test_contrastive",
    "test_joint",
    "test_reconstruction",
    "test_compile_check",
    "test_matrix",
    "test_gpu_run",
    "test_fake_gpu",
    "test_benchmark_data",
)
# What `make quick` leaves out besides: the rest takes about a minute on two cores.
SLOW = (
    *LONG,
    "test_arrays_safety",
    "test_benchmark",
    "test_benchmark_report",
    "test_benchmark_step",
    "test_compile",
    "test_convert_safety",
    "test_damage",
    "test_data",
    "test_decoders",
    "test_doctor",
    "test_evaluate",
    "test_experiment",
    "test_extract",
    "test_finetune",
    "test_isolation",
    "test_key_frames",
    "test_loader",
    "test_names",
    "test_pack",
    "test_probe",
    "test_interrupts",
    "test_shards",
    "test_wheel",
)
# Of these each test function can run in another process: they share no fixture.
KERNELS = Path(__file__).resolve().parent / "kernels"
SHARED_VIDEOS = Path(__file__).resolve().parents[2] / "shared" / "videos"

TINY = {
    "model": {
        "num_frames": 4,
        "height": 32,
        "width": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "decoder_embed_dim": 16,
        "decoder_depth": 1,
        "decoder_num_heads": 2,
    },
    "mask": {"ratio": 0.75},
    "data": {"num_workers": 0, "stride": 2, "crop_scales": [1.0, 0.75]},
    "optim": {"micro_batch": 4, "steps": 4, "warmup_steps": 1, "base_lr": 0.05},
    "engine": {"precision": "fp32", "zero_stage": 0},
    "journal": {"log_interval": 1, "checkpoint_interval": 0, "picture_interval": 0},
}

TINY_FINETUNE = {
    "model": {
        "num_frames": 4,
        "height": 32,
        "width": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
    },
    "classifier": {"num_classes": 8, "stride": 2, "head_init_scale": 1.0},
    "data": {"num_workers": 0, "flip": False},
    "validation": {"interval": 2, "batch": 3},
    "optim": {"micro_batch": 4, "steps": 4, "warmup_steps": 1, "base_lr": 0.1},
    "engine": {"precision": "fp32", "zero_stage": 0},
    "journal": {"log_interval": 1, "checkpoint_interval": 0},
}


def interpret_kernels() -> None:
    """Without a GPU the kernels of this process run in Triton's interpreter, which is chosen when
    they are imported, and what Triton imports with its first launch.

    Only tests that ask for it (tests/kernels/conftest.py) find `impl="triton"` on a CPU, and no
    process that a test starts is told of it.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    for name in ("attention", "joint"):  # and those that they import
        import_module(f"video_mae.kernels.{name}")
    from video_mae.kernels import dispatch, scaling

    scaling.scale_tokens(torch.ones(1, 1, 1), torch.ones(1, 1), 1.0, torch.float32)
    dispatch.INTERPRETED = False
    del os.environ["TRITON_INTERPRET"]


if not torch.cuda.is_available():
    interpret_kernels()


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order, and what one process has to run as a whole where several share the tests (pytest
    -n 2).

    Who trains in this process leaves a process group, its environment and DeepSpeed's changes to
    torch to the tests after it: they come last. A file stays in one process, for the sake of its
    fixtures; those that take minutes begin, so that all processes end together.
    """

    def trains_here(item: pytest.Item) -> bool:
        return item.get_closest_marker("trains_here") is not None

    items.sort(key=lambda item: (trains_here(item), item.path.stem not in LONG))
    for item in items:
        if item.path.stem in SLOW or trains_here(item) or item.get_closest_marker("launcher"):
            item.add_marker(pytest.mark.slow)
        group = f"{item.path.parent.name}/{item.path.stem}"
        if trains_here(item):
            group += ", training"
        elif item.path.parent == KERNELS and isinstance(item, pytest.Function):
            group += f", {item.originalname}"
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from video_mae.tools.demo import DemoConfig, make_demo_data

    folder = tmp_path_factory.mktemp("data") / "demo"
    make_demo_data(
        folder, DemoConfig(train_clips=24, validation_clips=8, num_frames=16, height=48, width=48)
    )
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
    path.write_text(
        yaml.safe_dump({**TINY, "data": {**TINY["data"], "source": str(demo_folder / "train.txt")}})
    )
    return path


@pytest.fixture
def tiny(tiny_file: Path, tmp_path: Path) -> "Callable[..., PretrainConfig]":
    """tiny("optim.steps=3", ...): that run with changes, in tmp_path/run unless `output` is
    changed.
    """
    from video_mae.config import load_config

    return lambda *overrides: load_config(tiny_file, [f"output={tmp_path / 'run'}", *overrides])


@pytest.fixture(scope="session")
def tiny_finetune_file(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file of a fine-tuning run that takes seconds: everything published is on, the
    label is the photograph.
    """
    folder, content = tmp_path_factory.mktemp("finetune"), {**TINY_FINETUNE}
    for section, split in (("data", "train"), ("validation", "val")):
        videos = [
            line.rsplit(" ", 1)[0]
            for line in (demo_folder / f"{split}.txt").read_text().splitlines()
        ]
        (folder / f"{split}.txt").write_text(
            "".join(f"{demo_folder / video} {i // 8}\n" for i, video in enumerate(videos))
        )
        content[section] = {**TINY_FINETUNE[section], "source": str(folder / f"{split}.txt")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    return folder / "tiny.yaml"


@pytest.fixture
def tiny_finetune(tiny_finetune_file: Path, tmp_path: Path) -> "Callable[..., FinetuneConfig]":
    """As `tiny`, for fine-tuning."""
    from video_mae.config import FinetuneConfig, load_config

    return lambda *overrides: load_config(
        tiny_finetune_file, [f"output={tmp_path / 'run'}", *overrides], FinetuneConfig
    )


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    """write_video(path, frames_THWC, fps=25): an H.264 file of uint8 frames with even sides."""
    import av

    def write(path: Path, frames_THWC: np.ndarray, fps: int = 25) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=fps, options={"crf": "10", "g": "12"})
            stream.height, stream.width, stream.pix_fmt = *frames_THWC.shape[1:3], "yuv420p"
            for frame in frames_THWC:
                container.mux(
                    stream.encode(
                        av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                    )
                )
            container.mux(stream.encode())
        return path

    return write


@pytest.fixture(scope="session")
def on_ranks() -> Callable[..., None]:
    """on_ranks(n, work): `work()` in n processes that find a launcher's environment, as stages do
    that use gloo between them.
    """

    def run(world_size: int, work: Callable[[], object]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]

        def one(rank: int) -> None:
            torch.set_num_threads(1)
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK="0",
                WORLD_SIZE=str(world_size),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
            work()

        processes = [
            multiprocessing.get_context("fork").Process(target=one, args=(rank,))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * world_size

    return run


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    """Gives the handlers of signals and the environment back that a stage has changed which ran in
    this process: what the next test starts is not to take itself for a rank.
    """
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)
    handlers = {number: signal.getsignal(number) for number in numbers}
    environment = dict(os.environ)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def quiet_process() -> Iterator[None]:
    """For tests that train in this process: gives threads back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
