"""Which implementation of an operation runs."""

import torch

from .attention_tiles import WIDTH_CLASSES, width_class
from .launch import INTERPRETED

# What there is for an operation; on a CPU `auto` takes the first, on CUDA triton (attention: by
# AUTO_MAX_TOKENS).
IMPLEMENTATIONS = {
    "gather_tubelets": ("reference", "triton"),
    "packed_attention": ("sdpa", "reference", "triton"),
    "reconstruction_loss": ("reference", "triton"),
    "contrastive_loss": ("reference", "triton"),
}

# (compute capability, width class of a head) -> the most tokens for which `auto` runs the Triton
# attention (float16, bfloat16); beyond them, and for what is not here, SDPA. An estimate, not yet
# measured on a GPU: up to 256 tokens attention is bound by memory, where reading the packed qkv in
# place and writing dqkv without a copy should win; from about 784 tokens cuDNN should. Wider heads
# than 64 take the registers of two programs a multiprocessor, and more waves: SDPA until it is
# measured.
AUTO_MAX_TOKENS = {((8, 0), 64): 256, ((9, 0), 64): 256}


@torch.compiler.assume_constant_result
def attention_limit(device: torch.device, width: int) -> int:
    """The entry of AUTO_MAX_TOKENS for heads of this width on a CUDA device, else 0."""
    if width > WIDTH_CLASSES[-1]:
        return 0
    return AUTO_MAX_TOKENS.get((torch.cuda.get_device_capability(device), width_class(width)), 0)


def choose(operation: str, impl: str, device: torch.device) -> str:
    """The implementation to run on a device. Raises: ValueError for one that does not exist there;
    nothing falls back silently.
    """
    available = IMPLEMENTATIONS[operation]
    if impl == "auto":
        return "triton" if device.type == "cuda" else available[0]
    if impl not in available:
        raise ValueError(f"{operation}: impl {impl} is not one of auto, {', '.join(available)}")
    if impl == "triton" and device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"{operation}: impl triton needs a CUDA device, not {device.type}; use auto "
            "(or, to test, set TRITON_INTERPRET=1)"
        )
    return impl


def describe(impl: str, device: torch.device) -> str:
    """One line for the start of a run: what each operation will run. Raises: ValueError as
    `choose`.
    """
    chosen = {operation: choose(operation, impl, device) for operation in IMPLEMENTATIONS}
    if impl == "auto" and device.type == "cuda":
        limits = {width: attention_limit(device, width) for width in WIDTH_CLASSES}
        parts = [
            f"triton for 16-bit heads of width up to {width} and {limit} tokens"
            for width, limit in limits.items()
            if limit
        ]
        chosen["packed_attention"] = " else ".join([*parts, "sdpa"])
    return ", ".join(
        f"{operation} = {implementation}" for operation, implementation in chosen.items()
    )
