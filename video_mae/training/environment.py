"""The environment of a process that trains or evaluates under DeepSpeed, or without a launcher."""

import os

import torch

from video_mae.config.data import ReadConfig
from video_mae.config.training import Precision
from video_mae.config.world import World, ranks_here


def check_devices(key: str, precision: Precision, data: ReadConfig) -> None:
    """Raises: ValueError where a GPU is asked for, and there is none. key: of the precision."""
    if torch.cuda.is_available():
        return
    if precision == "fp16":
        raise ValueError(f"{key}: fp16 needs a GPU; use bf16 or fp32")
    if data.decoder_device == "cuda":
        raise ValueError(
            "data.decoder_device: cuda needs a GPU, and there is none here; set it to cpu"
        )
    import psutil  # which DeepSpeed brings

    for process in psutil.Process().parents():
        if "\0--num_gpus" in "\0".join(process.cmdline()):
            raise ValueError(
                "--num_gpus: there is no GPU here; on CPUs: deepspeed --num_accelerators 2 ..."
            )


def prepare_environment() -> torch.device:
    """Without a launcher DeepSpeed would look for MPI; on a CPU each rank takes its share of the
    cores. Returns the device of this rank, which is the current one then. Raises: ValueError.
    """
    world = World.from_environment()
    given = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if os.environ.get(name)]
    if "RANK" not in given:
        os.environ["LOCAL_WORLD_SIZE"] = "1"
    if len(given) < 3:  # one process, then: on any port that is free
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ.update(
        RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank)
    )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would look for others, and warn
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here()))
        return torch.device("cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK: {world.local_rank} has no GPU, there are {torch.cuda.device_count()} "
            "here; start as many processes"
        )
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device
