"""Masks: what every one promises, the published counts, and the random numbers under them."""

from collections import deque

import numpy as np
import pytest
import torch

from video_mae import TokenMask, frame_mask, random_mask, token_mask, tube_mask
from video_mae.model.masking import ContextMask, _noise, mask_counts, random_kept_mask

KINDS = {
    "tube": tube_mask,
    "random": random_mask,
    "random_kept": random_kept_mask,
    "frame": frame_mask,
}
GRIDS = [(8, 14, 14), (4, 6, 6), (5, 3, 7), (2, 1, 9), (3, 2, 2)]
EXTREME = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 2**62])
FULL_64 = (1 << 64) - 1


def hidden_grid(mask: TokenMask, grid: tuple[int, int, int]) -> torch.Tensor:
    """bool [B, time, height, width]: what the encoder does not see."""
    flat = torch.ones(len(mask.visible_BV), grid[0] * grid[1] * grid[2], dtype=torch.bool)
    return flat.scatter(1, mask.visible_BV, False).reshape(-1, *grid)


def chosen_grid(index_BN: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    return (
        torch.zeros(len(index_BN), grid[0] * grid[1] * grid[2], dtype=torch.bool)
        .scatter(1, index_BN, True)
        .reshape(-1, *grid)
    )


@pytest.mark.parametrize(
    ("grid", "kind", "ratio", "dual", "visible", "masked"),
    [
        ((8, 14, 14), "tube", 0.9, 0.0, 160, 1408),
        ((8, 16, 16), "tube", 0.9, 0.0, 208, 1840),
        ((8, 14, 14), "tube", 0.9, 0.5, 160, 704),
        ((8, 14, 14), "tube", 0.75, 0.0, 392, 1176),
        ((1, 14, 14), "random", 0.75, 0.0, 49, 147),
        ((8, 14, 14), "random", 0.9, 0.0, 157, 1411),
        ((8, 14, 14), "frame", 0.875, 0.0, 196, 1372),
        ((16, 20, 20), "tube", 0.9, 0.0, 640, 5760),
        ((8, 14, 14), "tube", 0.9, 0.25, 160, 1056),
        ((8, 14, 14), "tube", 0.9, 0.75, 160, 352),
        ((8, 14, 14), "random_kept", 0.9, 0.0, 156, 1412),
        ((1, 14, 14), "random_kept", 0.75, 0.0, 49, 147),
        ((8, 16, 16), "random_kept", 0.9, 0.0, 204, 1844),
    ],
)
def test_published_settings_give_the_published_counts(grid, kind, ratio, dual, visible, masked):
    assert mask_counts(grid, kind, ratio, dual) == (visible, masked)
    mask = token_mask(EXTREME, grid, kind, ratio, dual)
    assert mask.visible_BV.shape == (8, visible)
    assert mask.masked_BM.shape == (8, masked)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.5, 0.8])
def test_visible_and_masked_are_sorted_disjoint_and_together_everything(kind, grid, ratio):
    mask = KINDS[kind](EXTREME, grid, ratio)
    for index in mask:
        assert index.dtype == torch.int64
        assert (index.diff(dim=1) > 0).all()
    everything = torch.cat(mask, dim=1).sort(dim=1).values
    assert torch.equal(everything, torch.arange(grid[0] * grid[1] * grid[2]).expand(8, -1))


@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.75, 0.8, 0.9, 0.95])
def test_what_mae_keeps_is_counted_not_what_it_hides(ratio):
    differing = 0
    for num_tokens in range(2, 300):
        kept = int(num_tokens * (1 - ratio))  # the definition of MAE and mae_st, floats and all
        if kept == 0:
            with pytest.raises(
                ValueError,
                match=rf"^mask.ratio: {ratio} of {num_tokens} tokens hides {num_tokens}; ",
            ):
                mask_counts((1, 1, num_tokens), "random_kept", ratio)
            continue
        assert mask_counts((1, 1, num_tokens), "random_kept", ratio) == (kept, num_tokens - kept)
        ours, theirs = (
            token_mask(EXTREME, (1, 1, num_tokens), kind, ratio)
            for kind in ("random", "random_kept")
        )
        differing += ours.visible_BV.shape != theirs.visible_BV.shape
        assert all(
            set(some) <= set(more)
            for some, more in zip(theirs.visible_BV.tolist(), ours.visible_BV.tolist(), strict=True)
        )
    assert differing > 100


@pytest.mark.parametrize("grid", GRIDS)
def test_every_frame_hides_the_same_tubes(grid):
    hidden = hidden_grid(tube_mask(EXTREME, grid, 0.7), grid)
    assert (hidden == hidden[:, :1]).all()
    assert (hidden.sum(dim=(2, 3)) == int(0.7 * grid[1] * grid[2])).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_frame_mask_hides_whole_frames(grid):
    hidden = hidden_grid(frame_mask(EXTREME, grid, 0.5), grid).flatten(2)
    assert (hidden.all(dim=2) == hidden.any(dim=2)).all()
    assert (hidden.all(dim=2).sum(dim=1) == int(0.5 * grid[0])).all()


@pytest.mark.parametrize("dual", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_keeps_its_mask_in_any_batch(kind, dual):
    together = token_mask(EXTREME, (8, 6, 5), kind, 0.75, dual)
    for i in range(len(EXTREME)):
        alone = token_mask(EXTREME[i : i + 1], (8, 6, 5), kind, 0.75, dual)
        again = token_mask(EXTREME.flip(0), (8, 6, 5), kind, 0.75, dual)
        for whole, one, turned in zip(together, alone, again, strict=True):
            assert torch.equal(whole[i], one[0])
            assert torch.equal(whole[i], turned[len(EXTREME) - 1 - i])


@pytest.mark.parametrize("kind", ["tube", "random"])
def test_different_seeds_give_different_masks(kind):
    masks = KINDS[kind](torch.cat([EXTREME[2:], torch.arange(500)]), (4, 14, 14), 0.9).masked_BM
    assert len(masks.unique(dim=0)) == len(masks)


@pytest.mark.parametrize(
    ("kind", "ratio"), [("tube", 0.75), ("random", 0.75), ("random", 0.5), ("frame", 0.5)]
)
@pytest.mark.parametrize("stride", [1, 2**32])
def test_every_place_is_hidden_equally_often_and_neighbours_are_independent(kind, ratio, stride):
    grid, samples = (4, 5, 5), 3000
    hidden = hidden_grid(KINDS[kind](torch.arange(samples) * stride, grid, ratio), grid).double()
    units = {
        "tube": hidden[:, 0].flatten(1),
        "random": hidden.flatten(1),
        "frame": hidden[:, :, 0, 0],
    }[kind]
    num, share = units.shape[1], units[0].mean().item()
    spread = (share * (1 - share) / samples) ** 0.5
    z = (units.mean(0) - share) / spread  # the sum of its squares is about chi-square
    assert z.square().sum() < num + 5 * (2 * num) ** 0.5
    covariance = (units[:, :-1] * units[:, 1:]).mean(0) - share**2
    expected = -share * (1 - share) / (num - 1)  # the number hidden is fixed
    assert ((covariance - expected).abs() < 6 * spread).all()


def running_cell(start: int, skipped: int, grid: tuple[int, int, int]) -> np.ndarray:
    """bool [time, height, width] of decoded tokens, as a queue that turns by one before every frame
    and tiles it by 2 x 2.
    """
    time, height, width = grid
    queue = deque([1] * skipped + [0] * (4 - skipped))
    queue.rotate(-start)
    decoded = np.zeros(grid, dtype=bool)
    for frame in range(time):
        queue.rotate(-1)
        cell = np.array(queue).reshape(2, 2)
        decoded[frame] = np.tile(cell, (height // 2, width // 2)) == 0
    return decoded


@pytest.mark.parametrize("grid", [(8, 14, 14), (4, 6, 8), (12, 2, 4)])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_scored_tokens_and_context_are_all_that_the_running_cell_chooses(grid, ratio):
    seeds = torch.arange(64)
    mask = token_mask(seeds, grid, "tube", 0.75, ratio, "all")
    assert isinstance(mask, ContextMask)
    for ours, theirs in zip(mask, token_mask(seeds, grid, "tube", 0.75, ratio), strict=False):
        assert torch.equal(ours, theirs)
    chosen = chosen_grid(torch.cat([mask.masked_BM, mask.context_BX], dim=1), grid).numpy()
    assert all(
        any(np.array_equal(one, running_cell(start, int(4 * ratio), grid)) for start in range(4))
        for one in chosen
    )
    # nothing is left out
    assert isinstance(token_mask(seeds, grid, "tube", 0.75, 0.0, "all"), TokenMask)


def test_the_published_context_is_of_80_tokens():
    mask = token_mask(EXTREME, (8, 14, 14), "tube", 0.9, 0.5, "all")
    assert [index.shape[1] for index in mask] == [160, 704, 80]


@pytest.mark.parametrize("grid", [(8, 14, 14), (4, 6, 8), (12, 2, 4)])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_dual_masking_is_the_running_cell(grid, ratio):
    seeds = torch.arange(64)
    mask = token_mask(seeds, grid, "tube", 0.75, ratio)
    hidden, kept = hidden_grid(mask, grid).numpy(), chosen_grid(mask.masked_BM, grid).numpy()
    starts = []
    for b in range(len(seeds)):
        fits = [
            start
            for start in range(4)
            if np.array_equal(kept[b], hidden[b] & running_cell(start, int(4 * ratio), grid))
        ]
        starts += fits[:1]
        assert fits, f"sample {b} follows no running cell"
    assert np.bincount(starts, minlength=4).min() >= 6  # of 16 expected
    for slots in np.split(kept, grid[0] // 4, axis=1):
        assert (slots.sum(1) == hidden[:, 0] * (4 - int(4 * ratio))).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(1, 4, 4), (3, 5, 7), (6, 3, 3), (2, 1, 9), (5, 14, 14)])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_dual_masking_keeps_a_fixed_count_where_the_cell_does_not_fit(kind, grid, ratio):
    if kind == "frame" and grid[0] == 1:
        return  # one frame cannot be hidden
    whole, dual = token_mask(EXTREME, grid, kind, 0.6), token_mask(EXTREME, grid, kind, 0.6, ratio)
    num_masked = whole.masked_BM.shape[1]
    assert torch.equal(whole.visible_BV, dual.visible_BV)
    assert dual.masked_BM.shape == (8, num_masked - int(ratio * num_masked))
    assert (dual.masked_BM.diff(dim=1) > 0).all()
    assert (chosen_grid(dual.masked_BM, grid) <= chosen_grid(whole.masked_BM, grid)).all()


@pytest.mark.parametrize(
    ("grid", "kind", "ratio"),
    [
        ((8, 14, 14), "tube", 0.001),
        ((8, 1, 1), "tube", 0.5),
        ((1, 4, 4), "frame", 0.5),
        ((1, 1, 1), "random", 0.9),
        ((8, 14, 14), "tube", 1.0),
        ((4, 4, 4), "random", 0.0),
    ],
)
def test_mask_that_hides_nothing_or_everything_is_refused_by_name(grid, kind, ratio):
    with pytest.raises(ValueError, match=r"^mask\.ratio: [^\n]*$"):
        mask_counts(grid, kind, ratio)


def splitmix64(seed: int, count: int, stream: int) -> list[int]:
    """Steele et al. (2014) in unbounded integers, started `stream * 2^32` steps after the seed."""
    numbers = []
    for i in range(1, count + 1):
        x = (seed + ((stream << 32) + i) * 0x9E3779B97F4A7C15) & FULL_64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & FULL_64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & FULL_64
        numbers.append(x ^ (x >> 31))
    return numbers


def test_random_numbers_are_the_published_splitmix64():
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert splitmix64(0, 3, 0) == published
    assert [
        x & FULL_64 for x in _noise(torch.zeros(1, dtype=torch.int64), 3, stream=0)[0].tolist()
    ] == published
    for stream in range(3):
        ours = _noise(EXTREME, 200, stream)
        for seed, row in zip(EXTREME.tolist(), ours.tolist(), strict=True):
            assert [x & FULL_64 for x in row] == splitmix64(seed & FULL_64, 200, stream)


def test_masks_stay_as_they_were():
    """Resuming an old run needs them: a change here is a change of every run's data."""
    assert tube_mask(torch.tensor([42]), (1, 4, 4), 0.75).visible_BV.tolist() == [[2, 3, 8, 11]]
    assert token_mask(torch.tensor([42]), (4, 2, 2), "random", 0.5, 0.5).masked_BM.tolist() == [
        [0, 4, 13, 14]
    ]


def test_compiles_as_one_graph():
    compiled = torch.compile(token_mask, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        compiled(EXTREME, (4, 6, 6), "tube", 0.75, 0.5),
        token_mask(EXTREME, (4, 6, 6), "tube", 0.75, 0.5),
        strict=True,
    ):
        assert torch.equal(ours, eager)
