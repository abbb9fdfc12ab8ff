"""What every operation shares: the choice of an implementation, and checks of a clip."""

import torch

# What `auto` picks. An operation lists its implementations with the one for `auto` first.
IMPLEMENTATIONS = {
    "gather_tubelets": ("reference",),
    "packed_attention": ("sdpa", "reference"),
    "reconstruction_loss": ("reference",),
    "contrastive_loss": ("reference",),
}


def choose(operation: str, impl: str) -> str:
    """The implementation to run. Raises: ValueError for one that does not exist; nothing falls back silently."""
    available = IMPLEMENTATIONS[operation]
    if impl == "auto":
        return available[0]
    if impl not in available:
        raise ValueError(f"{operation}: impl {impl} is not one of auto, {', '.join(available)}")
    return impl


def describe(impl: str) -> str:
    """One line for the start of a run: what each operation will run. Raises: ValueError as `choose`."""
    return ", ".join(f"{operation} = {choose(operation, impl)}" for operation in IMPLEMENTATIONS)


def check_clip(clip_BTHWC: torch.Tensor, index_BN: torch.Tensor, tubelet: tuple[int, int, int], operation: str) -> None:
    """Raises: ValueError naming the argument that does not fit."""
    if clip_BTHWC.ndim != 5:
        raise ValueError(f"{operation}: clip_BTHWC has shape {tuple(clip_BTHWC.shape)}, not (B, T, H, W, C)")
    if clip_BTHWC.dtype != torch.uint8 and not clip_BTHWC.is_floating_point():
        raise ValueError(f"{operation}: clip_BTHWC is {clip_BTHWC.dtype}; give uint8, or floating point in [0, 1]")
    if any(side % unit for side, unit in zip(clip_BTHWC.shape[1:4], tubelet, strict=True)):
        raise ValueError(f"{operation}: clip_BTHWC of {tuple(clip_BTHWC.shape[1:4])} is not a multiple of the tubelet {tubelet}")
    if index_BN.ndim != 2 or index_BN.shape[0] != clip_BTHWC.shape[0] or index_BN.dtype != torch.int64:
        raise ValueError(f"{operation}: index has shape {tuple(index_BN.shape)} of {index_BN.dtype}, "
                         f"not ({clip_BTHWC.shape[0]}, tokens) of int64")
