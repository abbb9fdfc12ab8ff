"""What two ranks allocate and send in a step, in each ZeRO stage, in one process group.

Arguments: a YAML file of a run, and the JSON file that rank 0 writes: for each of CASES the bytes of
all tensors where the last backward pass of a step begins, where it ends, and between steps, beyond
what there was before the engine; the bytes that a forward pass keeps for its backward pass; and
what DeepSpeed's log of communication counted in the step, by operation.
"""

import gc
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from video_mae.config import load_config
from video_mae.model.masking import token_mask
from video_mae.model.vit import VideoMAE
from video_mae.training.engine import Engine, leave

ACCUMULATION = 2
# steps before the one that is measured: only then ZeRO 3 knows the order of its parameters
WARM = 2
CASES = {
    **{str(stage): (stage, "bf16", 0) for stage in range(4)},
    **{f"{stage} fp32": (stage, "fp32", 0) for stage in (0, 1, 3)},
    "3 frozen": (3, "bf16", 2),
}
"""Name: ZeRO stage, precision, how many blocks of the encoder are not trained."""


def tensor_bytes() -> int:
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if not torch.is_tensor(thing):
            continue
        for tensor in (thing, thing.grad if thing.is_leaf else None):
            if tensor is not None and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


class Kept:
    """Bytes that are saved for a backward pass, without the parameters."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.found: dict[int, int] = {}
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.found[storage.data_ptr()] = storage.nbytes()
        return tensor


def measured(path: str, stage: int, precision: str, num_frozen: int) -> dict[str, Any]:
    import deepspeed.comm as comm

    keys = [f"engine.zero_stage={stage}", f"engine.precision={precision}"]
    if (
        num_frozen
    ):  # nothing stays gathered for the backward pass, so that it shows what that gathers
        zero = "engine.extra.zero_optimization.stage3"
        keys += [f"{zero}_max_reuse_distance=0", f"{zero}_prefetch_bucket_size=0"]
    config = load_config(path, [*keys, f"optim.accumulation={ACCUMULATION}"])
    model, batch = config.model, config.optim.micro_batch
    clip_BTHWC = torch.randint(
        0, 256, (batch, model.num_frames, model.height, model.width, 3), dtype=torch.uint8
    )
    mask = token_mask(torch.arange(batch), model.grid, config.mask.kind, config.mask.ratio)
    before = tensor_bytes()
    network = VideoMAE(
        model, config.objective, checkpointing=config.engine.activation_checkpointing
    )
    if num_frozen:
        for part in (network.encoder.patch_embed, *list(network.encoder.blocks)[:num_frozen]):
            part.requires_grad_(False)
    engine = Engine(network, config)
    found: dict[str, Any] = {}
    is_last = False

    def watch(module: torch.nn.Module, name: str) -> None:
        def look(gradient: torch.Tensor) -> None:
            if is_last:
                found[name] = tensor_bytes() - before

        def follow(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(look)

        module.register_forward_hook(follow)

    watch(network.decoder.head, "backward begins")
    watch(network.encoder.patch_embed, "backward ends")
    comm.configure(enabled=True, prof_all=True)
    log: Any = comm.comm.comms_logger
    for step in range(WARM + 1):
        log.reset_data()
        for micro in range(ACCUMULATION):
            kept = Kept(network)
            with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
                loss = engine(clip_BTHWC, mask).loss
            found["kept"] = sum(kept.found.values())
            del kept
            is_last = step == WARM and micro == ACCUMULATION - 1
            engine.backward(loss, last=micro == ACCUMULATION - 1)
            del loss
        engine.step(1e-3)
    sent: Counter[str] = Counter()
    for name, sizes in log.get_raw_data().items():
        sent[name] += sum(size * times[0] for size, times in sizes.items())
    found["sent"] = dict(sent)
    found["between steps"] = tensor_bytes() - before
    comm.configure(enabled=False)
    return found


def main() -> None:
    path, file = (word for word in sys.argv[1:] if not word.startswith("--local_rank"))
    found = {}
    for name, case in CASES.items():
        found[name] = measured(path, *case)
        if torch.distributed.get_rank() == 0:
            Path(file).write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main()
