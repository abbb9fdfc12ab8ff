"""Which tokens the encoder sees and which the decoder predicts, as sorted index tensors with static
shapes.

A mask depends on its sample's own 64-bit seed alone (integer mixing, then a sort), never on batch,
rank or device.
Letters: B samples, N tokens of the grid (time, height, width) in raster order, V visible, M masked
(to be predicted), X visible ones that the decoder gets again, T frames of tokens, L places of a
frame of tokens.
"""

import math
from typing import Literal, NamedTuple, overload

import torch

from video_mae.config.training import MaskKind

Grid = tuple[int, int, int]
Context = Literal["scored", "all"]

CELL = 4  # places of the 2 x 2 cell that runs over time in decoder masking


class TokenMask(NamedTuple):
    """Sorted, disjoint int64 token indices: what the encoder sees, what the decoder predicts."""

    visible_BV: torch.Tensor
    masked_BM: torch.Tensor


class ContextMask(NamedTuple):
    """A `TokenMask`, and visible tokens for which the decoder of model.decoder_context = all gets a
    mask token besides.
    """

    visible_BV: torch.Tensor
    masked_BM: torch.Tensor
    context_BX: torch.Tensor


AnyMask = TokenMask | ContextMask


def tube_mask(seeds_B: torch.Tensor, grid: Grid, ratio: float) -> TokenMask:
    """Hides the same int(ratio * H * W) places in every frame.

    seeds_B: int64; the mask is made on its device. Raises: ValueError where nothing or everything
    would be hidden. Source: VideoMAE (Tong et al., 2022).
    """
    time, height, width = grid
    places = height * width
    shown_BL, hidden_BL = _split(seeds_B, places, int(ratio * places), ratio, "tokens a frame")
    start_T1 = torch.arange(0, time * places, places, device=seeds_B.device)[:, None]
    return TokenMask(
        (start_T1 + shown_BL[:, None]).flatten(1), (start_T1 + hidden_BL[:, None]).flatten(1)
    )


def random_mask(seeds_B: torch.Tensor, grid: Grid, ratio: float) -> TokenMask:
    """Hides int(ratio * N) tokens anywhere."""
    num_tokens = math.prod(grid)
    return TokenMask(*_split(seeds_B, num_tokens, int(ratio * num_tokens), ratio, "tokens"))


def random_kept_mask(seeds_B: torch.Tensor, grid: Grid, ratio: float) -> TokenMask:
    """Keeps int((1 - ratio) * N) tokens anywhere: one fewer than `random_mask` where neither
    product is whole, 156 of 1,568 at 0.9.

    Source: MAE (He et al., 2021), mae_st (Feichtenhofer et al., 2022).
    """
    num_tokens = math.prod(grid)
    # in floats as there: 0.9 of 10 tokens keeps int(0.9999...) = 0
    num_hidden = num_tokens - int(num_tokens * (1 - ratio))
    return TokenMask(*_split(seeds_B, num_tokens, num_hidden, ratio, "tokens"))


def frame_mask(seeds_B: torch.Tensor, grid: Grid, ratio: float) -> TokenMask:
    """Hides int(ratio * T) whole frames of tokens. Source: the ablation of VideoMAE (Tong et al.,
    2022).
    """
    time, height, width = grid
    places = height * width
    shown_BT, hidden_BT = _split(seeds_B, time, int(ratio * time), ratio, "frames of tokens")
    place_L = torch.arange(places, device=seeds_B.device)
    return TokenMask(
        (shown_BT[..., None] * places + place_L).flatten(1),
        (hidden_BT[..., None] * places + place_L).flatten(1),
    )


def running_cell(
    seeds_B: torch.Tensor, grid: Grid, ratio: float, masked_BM: torch.Tensor
) -> torch.Tensor:
    """Keeps those masked tokens that the running cell lets the decoder predict.

    A 2 x 2 cell tiles every frame; int(4 * ratio) of its places are skipped, and they move on by
    one from frame to frame, from a random start. Over every 4 frames of tokens each place is
    predicted equally often, so under tube masking the kept tokens are exactly the official ones.
    Elsewhere their number varies by sample: it is fixed here at M - int(ratio * M) by dropping
    tokens at random, or adding some that the cell skips.
    Returns: int64 [B, M - int(ratio * M)], sorted. Source: VideoMAE V2 (Wang et al., 2023).
    """
    _, height, width = grid
    num_masked = masked_BM.shape[1]
    frame_BM = masked_BM // (height * width)
    row_BM = masked_BM // width % height
    column_BM = masked_BM % width
    start_B1 = _noise(seeds_B, 1, stream=1) % CELL
    place_BM = (2 * (row_BM % 2) + column_BM % 2 + frame_BM + start_B1 + 1) % CELL
    skipped_BM = (place_BM < int(CELL * ratio)).long()
    # those that the cell skips come last, and both parts in a random order
    key_BM = (_noise(seeds_B, num_masked, stream=2) >> 2) + (skipped_BM << 62)
    num_kept = num_masked - int(ratio * num_masked)
    kept_BM = key_BM.argsort(dim=1, stable=True)[:, :num_kept]
    return masked_BM.gather(1, kept_BM).sort(dim=1).values


MASKS = {
    "tube": tube_mask,
    "random": random_mask,
    "random_kept": random_kept_mask,
    "frame": frame_mask,
}


@overload
def token_mask(
    seeds_B: torch.Tensor, grid: Grid, kind: MaskKind, ratio: float, decoder_mask_ratio: float = 0.0
) -> TokenMask: ...
@overload
def token_mask(
    seeds_B: torch.Tensor,
    grid: Grid,
    kind: MaskKind,
    ratio: float,
    decoder_mask_ratio: float,
    decoder_context: Context,
) -> AnyMask: ...
def token_mask(
    seeds_B: torch.Tensor,
    grid: Grid,
    kind: MaskKind,
    ratio: float,
    decoder_mask_ratio: float = 0.0,
    decoder_context: Context = "scored",
) -> AnyMask:
    """The mask that a configuration asks for; `decoder_mask_ratio` > 0 leaves to predict what the
    running cell keeps.

    decoder_context: the model's; with `all` such a mask is a `ContextMask`.
    """
    mask = MASKS[kind](seeds_B, grid, ratio)
    if decoder_mask_ratio == 0:
        return mask
    visible_BV, masked_BM = mask
    scored_BM = running_cell(seeds_B, grid, decoder_mask_ratio, masked_BM)
    if decoder_context == "scored":
        return TokenMask(visible_BV, scored_BM)
    context_BX = running_cell(seeds_B, grid, decoder_mask_ratio, visible_BV)
    return ContextMask(visible_BV, scored_BM, context_BX)


def mask_counts(
    grid: Grid, kind: MaskKind, ratio: float, decoder_mask_ratio: float = 0.0
) -> tuple[int, int]:
    """(V, M) of every mask with these settings. Raises: ValueError for a mask that hides nothing or
    everything.
    """
    mask = token_mask(torch.zeros(1, dtype=torch.int64), grid, kind, ratio, decoder_mask_ratio)
    return mask.visible_BV.shape[1], mask.masked_BM.shape[1]


def _split(
    seeds_B: torch.Tensor, available: int, num_hidden: int, ratio: float, unit: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted (shown, hidden) among `available` places, the choice random in the seed."""
    if not 0 < num_hidden < available:
        raise ValueError(
            f"mask.ratio: {ratio} of {available} {unit} hides {num_hidden}; "
            "it must hide at least 1 and leave at least 1"
        )
    order = _noise(seeds_B, available, stream=0).argsort(dim=1, stable=True)
    return order[:, num_hidden:].sort(dim=1).values, order[:, :num_hidden].sort(dim=1).values


def _noise(seeds_B: torch.Tensor, count: int, stream: int) -> torch.Tensor:
    """int64 [B, count]: the SplitMix64 generator of Steele et al. (2014), started at each seed
    (int64 arithmetic wraps).
    """
    counter = torch.arange(1, count + 1, device=seeds_B.device, dtype=torch.int64) + (stream << 32)
    x = seeds_B[:, None] + counter * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _signed(word: int) -> int:
    """The same 64 bits as torch takes them."""
    return word - (1 << 64)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift: torch's >> on int64 copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
