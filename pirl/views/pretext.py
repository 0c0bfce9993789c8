"""The pretext: how the second view of an image is made of its pixels, and which head embeds it.

The first view is a crop. The trunk learns to give both views one embedding, whatever the pretext did to the second.
A kind of pretext is a subclass of `Pretext` and a line of `PRETEXTS` in `pirl.sections`; nothing else names it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import nn

from ..config import ModelConfig, ViewsConfig
from ..sections import PRETEXTS
from .parameters import Photometrics, draw_photometrics

Box = tuple[float, float, float, float]
"""Left, top, width, height in pixels of the original image."""


class Mark(NamedTuple):
    """Place of one element of the second view, for the sheet of views."""

    label: int
    """Number by which the sheet names the place, below `Pretext.labels`."""
    box: Box


class Pretext(ABC):
    """One way to make the second view of an image: one or more elements of the same size."""

    noun: ClassVar[str]
    """The second view in a word, for people: "patches"."""
    order: ClassVar[str]
    """The labels of a sample's marks in a word: "permutation"."""

    def __init__(self, views: ViewsConfig) -> None:
        self.views = views

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """Of an image's second view: elements, height, width, 3 colours."""

    @property
    @abstractmethod
    def draws(self) -> int:
        """Uniform numbers that `place` takes for an image."""

    @abstractmethod
    def place(self, draws: np.ndarray, sizes: np.ndarray) -> Any:
        """Return the places of the second views of B images, by uniform `draws` (B, draws) in [0, 1).

        `sizes` (B, 2) are height and width. What is returned is given to `cut` and `marks` as it is.
        """

    @abstractmethod
    def cut(self, image: np.ndarray, places: Any, row: int, out: np.ndarray) -> None:
        """Write the second view of one image (H, W, 3) uint8, by row `row` of `places`, into `out` of `shape`."""

    @abstractmethod
    def head(self, features: int, config: ModelConfig) -> nn.Module:
        """Return the module from (B * elements, features), sample-major, to (B, embedding_dim)."""

    @abstractmethod
    def marks(self, places: Any, row: int) -> tuple[Box, list[Mark]]:
        """Return the box of the crop that the second view comes from, and the mark of each element."""

    @property
    @abstractmethod
    def legend(self) -> str:
        """Sentences that explain the marks of the sheet of views."""

    @property
    def elements(self) -> int:
        """Elements of an image's second view."""
        return self.shape[0]

    @property
    def labels(self) -> int:
        """Number of different labels of a mark."""
        return self.elements

    @property
    def columns(self) -> int:
        """Elements in a line of the sheet of views."""
        return self.elements

    def photometrics(self, seed: int, epoch: int, ids: np.ndarray) -> Photometrics:
        """Return the photometric parameters of the second views of images, each element with its own."""
        return draw_photometrics(self.views, seed, epoch, ids, range(1, 1 + self.elements))


def open_pretext(views: ViewsConfig) -> Pretext:
    """Return the pretext of a recipe's views."""
    module, _, name = PRETEXTS[views.pretext].partition(":")
    kind: type[Pretext] = getattr(import_module(module), name)
    return kind(views)
