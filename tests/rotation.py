"""A toy pretext, all of it in this file: the second view is the second crop, turned by a multiple of 90 degrees."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import nn

from pirl.config import ModelConfig
from pirl.heads import mlp
from pirl.views.boxes import CROP_DRAWS, cut, random_box
from pirl.views.pretext import Box, Mark, Pretext


class Turns(NamedTuple):
    """Places of B images: the crops (B, 4), and the quarter turns (B,) of each."""

    box: np.ndarray
    turns: np.ndarray


class Rotation(Pretext):
    """One element of the image view's size, turned by 0 to 3 quarters."""

    noun = "turned crop"
    order = "quarter turns"
    draws = CROP_DRAWS + 1
    labels = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return 1, self.views.image_size, self.views.image_size, 3

    def place(self, draws: np.ndarray, sizes: np.ndarray) -> Turns:
        box = random_box(draws[:, :CROP_DRAWS], sizes, self.views.image_scale, self.views.image_ratio)
        return Turns(box, (draws[:, CROP_DRAWS] * 4).astype(np.int64))

    def cut(self, image: np.ndarray, places: Turns, row: int, out: np.ndarray) -> None:
        pixels = cut(image, places.box[row], self.views.image_size, self.views.resampling)
        out[0] = np.rot90(pixels, places.turns[row])

    def head(self, features: int, config: ModelConfig) -> nn.Module:
        return mlp([features, config.embedding_dim], relu="none")

    def marks(self, places: Turns, row: int) -> tuple[Box, list[Mark]]:
        top, left, height, width = places.box[row].tolist()
        return (left, top, width, height), [Mark(int(places.turns[row]), (left, top, width, height))]

    @property
    def legend(self) -> str:
        return "The number is how often it was turned by 90 degrees."
