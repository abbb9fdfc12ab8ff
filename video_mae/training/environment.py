"""The environment of a process that trains or evaluates under DeepSpeed, or without a launcher."""

import os

import torch

from video_mae.config.world import World, ranks_here


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
