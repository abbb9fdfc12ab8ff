"""Where tokens are: positions of any grid, fixed or learned, computed for it or interpolated from
another.

Letters: N tokens of a grid (time, height, width) in raster order, T frames of tokens, L places of
a frame, D width of encoder or decoder.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from video_mae.config import ModelConfig
from video_mae.model.masking import Grid


def sinusoid_positions(
    num_tokens: int, width: int, device: torch.device | None = None
) -> torch.Tensor:
    """Fixed positions [N, D] over the flattened (time, height, width) index: sine in even columns,
    cosine in odd ones.

    Source: Vaswani et al. (2017), as VideoMAE flattens it; computed in float64, returned in
    float32.
    """
    frequency = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    angle = torch.arange(num_tokens, dtype=torch.float64, device=device)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).float()


def sincos_positions(grid: Grid, width: int, device: torch.device | None = None) -> torch.Tensor:
    """Fixed positions [N, D] by place: sines and cosines of the column, then of the row; times add
    theirs, less those of time 0.

    With one frame of tokens this is the table of MAE (He et al., 2021), column first as its code
    has it; the time is added as mae_st (Feichtenhofer et al., 2022) adds its learned ones. Computed
    in float64, returned in float32; D must be a multiple of 4.
    """

    def waves(count: int, width: int) -> torch.Tensor:
        frequency = 1 / 10000.0 ** (
            torch.arange(width // 2, dtype=torch.float64, device=device) / (width // 2)
        )
        angle = torch.arange(count, dtype=torch.float64, device=device)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    times, rows, columns = grid
    place = torch.cat(
        [
            waves(columns, width // 2).expand(rows, -1, -1),
            waves(rows, width // 2)[:, None].expand(-1, columns, -1),
        ],
        dim=2,
    )
    clock = waves(times, width)
    return ((clock - clock[0])[:, None, None] + place).flatten(0, 2).float()


def computed_positions(
    kind: str, grid: Grid, width: int, device: torch.device | None = None
) -> torch.Tensor:
    """The float32 table [N, D] of kind `sinusoid` or `sincos`."""
    if kind == "sincos":
        return sincos_positions(grid, width, device)
    return sinusoid_positions(math.prod(grid), width, device)


def interpolate_positions(table_ND: torch.Tensor, grid: Grid, new_grid: Grid) -> torch.Tensor:
    """A table made for `grid` at the tokens of `new_grid`: cubic in height and width, linear in
    time, each axis by itself.

    As fine-tuners of MAE do it, in PyTorch's convention without aligned corners; an axis of the
    same length is left as it is. Matrix products, so that the gradient of a learned table repeats
    bit for bit, in float64, which autocast leaves alone.
    """
    if grid == new_grid:
        return table_ND
    table = table_ND.double().unflatten(0, grid)
    for axis, (old, new) in enumerate(zip(grid, new_grid, strict=True)):
        if old != new:
            weights = _interpolation(old, new, axis > 0, table_ND.device)
            table = (weights @ table.movedim(axis, -2)).movedim(-2, axis)
    return table.flatten(0, 2).to(table_ND.dtype)


def _interpolation(old: int, new: int, is_cubic: bool, device: torch.device) -> torch.Tensor:
    """[new, old]: how much of each old place is in each new one."""
    basis = torch.eye(old, dtype=torch.float64, device=device)[None]
    if is_cubic:  # PyTorch has it for images: here of width 1
        return F.interpolate(basis[..., None], size=(new, 1), mode="bicubic")[0, ..., 0].T
    return F.interpolate(basis, size=new, mode="linear")[0].T


def _fixed_positions(
    kind: str, made_for: Grid | None, grid: Grid, width: int, device: torch.device | None
) -> torch.Tensor:
    """Positions at the tokens of a grid, computed for it, or made for another and interpolated."""
    made_for = made_for or grid
    return interpolate_positions(computed_positions(kind, made_for, width, device), made_for, grid)


_remembered_positions = lru_cache(maxsize=16)(torch.inference_mode(False)(_fixed_positions))


class Positions(nn.Module):
    """Positions of one width: `positions(grid)` is the table [N, D] of any grid.

    Fixed ones are computed once a grid. Learned ones are parameters made for config.position_grid
    (the model's own grid where it is not set), interpolated for any other: `table`, or `space` and
    `time`, and `class_row` of the class token.
    """

    fixed_ND: torch.Tensor

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.kind, self.grid, self.width = config.positions, config.grid, width
        self.made_for = config.position_grid or config.grid
        self.class_row: nn.Parameter | None = None
        times, rows, columns = self.made_for
        if self.kind == "learned":
            self.table = nn.Parameter(torch.empty(times * rows * columns, width))
        elif self.kind == "separate":
            self.space = nn.Parameter(torch.empty(rows * columns, width))
            self.time = nn.Parameter(torch.empty(times, width))
        else:
            self.source = None if config.resize_positions == "compute" else self.made_for
            fixed_ND = _fixed_positions(self.kind, self.source, self.grid, width, None)
            self.register_buffer("fixed_ND", fixed_ND, persistent=False)
            return
        for table in self.parameters():
            nn.init.trunc_normal_(table, std=0.02)
        if config.class_tokens:
            self.class_row = nn.Parameter(torch.zeros(width))

    def forward(self, grid: Grid) -> tuple[torch.Tensor, torch.Tensor | float]:
        """(positions [N, D] of any grid (time, height, width) in tokens, position [D] of the class
        token: 0 where they are fixed).
        """
        return self._of_grid(grid), 0.0 if self.class_row is None else self.class_row

    def _of_grid(self, grid: Grid) -> torch.Tensor:
        if self.kind == "learned":
            return interpolate_positions(self.table, self.made_for, grid)
        if self.kind == "separate":
            made_for = self.made_for
            space_LD = interpolate_positions(self.space, (1, *made_for[1:]), (1, *grid[1:]))
            time_TD = interpolate_positions(self.time, (made_for[0], 1, 1), (grid[0], 1, 1))
            return (time_TD[:, None] + space_LD).flatten(0, 1)
        if grid == self.grid:
            return self.fixed_ND
        make = _fixed_positions if torch.compiler.is_compiling() else _remembered_positions
        return make(self.kind, self.source, grid, self.width, self.fixed_ND.device)
