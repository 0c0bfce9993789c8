"""The jigsaw: jittered patches of a second, independent crop, in random order (paper, section 3)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from ..config import ModelConfig
from ..heads import mlp
from .boxes import CROP_DRAWS, cut, random_box
from .pretext import Box, Mark, Pretext


class Places(NamedTuple):
    """Places of the patches of B images; g is the side of the grid."""

    box: np.ndarray
    """(B, 4) int64: top, left, height, width of the crop from which patches are cut, in pixels of the original."""
    jitter: np.ndarray
    """(B, 2, g, g) int64: x (index 0) and y (1) offset of the patch in cell [column, row], in pixels of that crop."""
    permutation: np.ndarray
    """(B, g^2) int64: patch k of the output is number permutation[k] of the grid, counted down its columns."""


class Jigsaw(Pretext):
    """A grid of g x g cells, one patch of P pixels from each."""

    noun = "patches"
    order = "permutation"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        size = self.views.patch_size
        return self.views.grid**2, size, size, 3

    @property
    def columns(self) -> int:
        return self.views.grid

    @property
    def draws(self) -> int:
        """Those of the crop, then 2 g^2 of the jitter and g^2 of the permutation."""
        return CROP_DRAWS + 3 * self.elements

    def place(self, draws: np.ndarray, sizes: np.ndarray) -> Places:
        cfg = self.views
        crop, jitter, order = np.split(draws, [CROP_DRAWS, CROP_DRAWS + 2 * self.elements], axis=1)
        offsets = max(cfg.cell - cfg.patch_size, 1)  # the reference draws 0..20 where 21 would fit
        return Places(
            box=random_box(crop, sizes, cfg.patch_scale, cfg.patch_ratio),
            jitter=(jitter.reshape(-1, 2, cfg.grid, cfg.grid) * offsets).astype(np.int64),
            permutation=np.argsort(order, axis=1, kind="stable"),
        )

    def cut(self, image: np.ndarray, places: Places, row: int, out: np.ndarray) -> None:
        """Write the patches in permuted order, (g^2, P, P, 3) uint8."""
        cfg, size = self.views, self.views.patch_size
        source = cut(image, places.box[row], cfg.patch_crop_size, cfg.resampling)
        columns, rows = np.divmod(places.permutation[row], cfg.grid)
        jitter_x, jitter_y = places.jitter[row][:, columns, rows]
        lefts, tops = (columns * cfg.cell + jitter_x).tolist(), (rows * cfg.cell + jitter_y).tolist()
        for k in range(self.elements):
            out[k] = source[tops[k] : tops[k] + size, lefts[k] : lefts[k] + size]

    def head(self, features: int, config: ModelConfig) -> PatchHead:
        return PatchHead(features, config, self.elements)

    def marks(self, places: Places, row: int) -> tuple[Box, list[Mark]]:
        cfg = self.views
        top, left, height, width = places.box[row].tolist()
        across, down = width / cfg.patch_crop_size, height / cfg.patch_crop_size
        marks = []
        for cell in places.permutation[row].tolist():
            column, line = divmod(cell, cfg.grid)
            x, y = places.jitter[row][:, column, line].tolist()
            corner = left + (column * cfg.cell + x) * across, top + (line * cfg.cell + y) * down
            marks.append(Mark(cell, (*corner, cfg.patch_size * across, cfg.patch_size * down)))
        return (left, top, width, height), marks

    @property
    def legend(self) -> str:
        return (
            f"The coloured squares are the {self.elements} patches cut from it, each shifted at random in its cell. "
            "The network gets the patches in the order of the permutation (read line by line). A number is the patch's "
            f"cell in the grid of {self.views.grid} by {self.views.grid} cells, counted down the columns from 0. "
            "Colours, flips and blurs are drawn for each patch and for the image view on its own."
        )


class PatchHead(nn.Module):
    """g(.) of the paper: each patch is projected, the projections are concatenated in their shuffled order."""

    def __init__(self, features: int, config: ModelConfig, patches: int) -> None:
        super().__init__()
        dim = config.embedding_dim
        if config.head == "linear":
            self.project = mlp([features, dim], relu="none")
        else:
            self.project = mlp([features, features, dim], relu="every")
        self.combine = nn.Linear(patches * dim, dim)
        self.patches = patches

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, dim) for (B * patches, features)."""
        x = self.project(x)
        return self.combine(x.reshape(len(x) // self.patches, -1))
