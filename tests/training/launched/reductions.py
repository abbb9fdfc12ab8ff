"""What some ranks send to one another in a step, and the weights that come of it.

Arguments: how many ranks, and a folder. Each case is one engine after another in one process group,
in forks of this process; rank 0 writes NAME.safetensors, the weights after two steps, and
sent.json: {NAME: {operation: [numbers sent in the second step, how often]}}, where what is
as small as a norm or a signal counts as `small`.
"""

import json
import multiprocessing
import os
import socket
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  (before the fork)
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from video_mae import ModelConfig, ObjectiveConfig, VideoMAE, tube_mask
from video_mae.config import EngineConfig, OptimConfig, RunConfig
from video_mae.training.engine import Engine, leave

MODEL = ModelConfig(
    num_frames=2,
    height=32,
    width=32,
    patch_size=8,
    embed_dim=32,
    depth=1,
    num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
)
OPERATIONS = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor")
SMALL_BUCKETS = {"reduce_bucket_size": 5000}
# ZeRO 3 that lets go of everything between the forward and the backward pass
NOTHING_KEPT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
}
# hpZ comes last: it makes a group of the process that stays
CASES: dict[str, tuple[Any, int, dict[str, Any]]] = {
    **{f"stage{stage}_{num}": (stage, num, {}) for stage in range(4) for num in (1, 3)},
    **{f"buckets{stage}": (stage, 3, SMALL_BUCKETS) for stage in (1, 2, 3)},
    **{f"overlap{stage}": (stage, 3, {**SMALL_BUCKETS, "overlap_comm": True}) for stage in (1, 2)},
    "hpz": (3, 3, {**NOTHING_KEPT, "zero_hpz_partition_size": 2}),
}
# ZeRO 3 replaces a function of torch for good
CASES = dict(sorted(CASES.items(), key=lambda case: case[1][0]))
sent: dict[str, list[int]] = defaultdict(lambda: [0, 0])


def count_all(name: str) -> None:
    """Has an operation of torch counted, by the larger of its tensors."""
    operation = getattr(dist, name)

    def count(*inputs: Any, **more: Any) -> Any:
        tensors = filter(torch.is_tensor, [*inputs, *more.values()])
        numbers = max(tensor.numel() for tensor in tensors)
        counts = sent[name if numbers > 2 else "small"]
        counts[0] += numbers
        counts[1] += 1
        return operation(*inputs, **more)

    setattr(dist, name, count)


def trained(folder: Path, stage: Any, accumulation: int, zero: dict[str, Any]) -> Engine:
    """An engine after two steps, the last of which is counted."""
    torch.manual_seed(0)
    config = RunConfig(
        output=str(folder),
        engine=EngineConfig(zero_stage=stage, precision="fp32", extra={"zero_optimization": zero}),
        # a small eps would make much of the rounding of the smallest gradients
        optim=OptimConfig(micro_batch=2, accumulation=accumulation, clip_grad=1.0, eps=1e-3),
    )
    engine = Engine(VideoMAE(MODEL, ObjectiveConfig()), config)
    engine.deepspeed.train()
    for step in range(2):
        sent.clear()
        for micro in range(accumulation):
            seed = 100 * step + 10 * micro + engine.rank
            numbers = torch.Generator().manual_seed(seed)
            clip = torch.randint(0, 256, (2, 2, 32, 32, 3), dtype=torch.uint8, generator=numbers)
            mask = tube_mask(torch.tensor([seed, seed + 1000]), MODEL.grid, 0.75)
            engine.backward(engine(clip, mask).loss, last=micro == accumulation - 1)
        engine.step(1e-2)
    return engine


def work(folder: Path, rank: int, size: int, port: int) -> None:
    """A rank."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    for name in OPERATIONS:
        count_all(name)
    found = {}
    for name, (stage, accumulation, zero) in CASES.items():
        if name == "hpz" and size == 2:
            continue
        engine = trained(folder, stage, accumulation, zero)
        found[name] = {operation: [*counts] for operation, counts in sent.items()}
        state = engine.full_state()
        if rank == 0:
            save_file(state, folder / f"{name}.safetensors")
    if rank == 0:
        (folder / "sent.json").write_text(json.dumps(found))
    leave()


def main() -> None:
    """Starts the ranks."""
    size, folder = int(sys.argv[1]), Path(sys.argv[2])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=work, args=(folder, rank, size, port)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * size


if __name__ == "__main__":
    main()
