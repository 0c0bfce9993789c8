"""The two views of an image: a crop of it, and what the recipe's pretext makes of a second one (paper, section 3).

Geometry happens on 8-bit pixels where images are decoded; photometric transforms are batched tensor work
(`photometric`) on the device of the model. All randomness is a pure function of (seed, epoch, image id, view), see
`random`. The pretext is a seam (`pretext`); `jigsaw` is the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import ViewsConfig
from .boxes import CROP_DRAWS, cut, random_box
from .parameters import Photometrics, draw_photometrics
from .photometric import apply_photometrics, denormalise
from .pretext import Pretext, open_pretext
from .random import philox4x32, uniforms

__all__ = [
    "CROP_DRAWS",
    "Geometry",
    "Photometrics",
    "Pretext",
    "apply_photometrics",
    "crop",
    "crop_batch",
    "denormalise",
    "draw_geometry",
    "draw_photometrics",
    "open_pretext",
    "philox4x32",
    "random_box",
    "uniforms",
]

GEOMETRY_STREAM = 0  # of `uniforms`: the image crop's columns, then the pretext's; the photometric streams follow


@dataclass(frozen=True)
class Geometry:
    """Places of the views of a batch of B images."""

    image_box: np.ndarray
    """(B, 4) int64: top, left, height, width of the image view in pixels of the original."""
    places: Any
    """Of the second views, as the pretext's `place` returned them."""


def draw_geometry(cfg: ViewsConfig, seed: int, epoch: int, ids: np.ndarray, sizes: np.ndarray) -> Geometry:
    """Return the places of the views of the images `ids` (B,) of `sizes` (B, 2: height, width) in an epoch."""
    pretext = open_pretext(cfg)
    draws = uniforms(seed, epoch, ids, GEOMETRY_STREAM, CROP_DRAWS + pretext.draws)
    image, second = np.split(draws, [CROP_DRAWS], axis=1)
    box = random_box(image, sizes, cfg.image_scale, cfg.image_ratio)
    return Geometry(box, pretext.place(second, sizes))


def crop(
    image: np.ndarray,
    geometry: Geometry,
    row: int,
    cfg: ViewsConfig,
    out: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the views of one image (H, W, 3) uint8 by row `row` of `geometry`, before photometric transforms.

    They are the image (S, S, 3) uint8 and the second view in the pretext's shape, written into `out` where it is given.
    Crops are resized each straight from the original.
    """
    pretext = open_pretext(cfg)
    if out is None:
        out = np.empty(cfg.image_shape, np.uint8), np.empty(pretext.shape, np.uint8)
    out[0][...] = cut(image, geometry.image_box[row], cfg.image_size, cfg.resampling)
    pretext.cut(image, geometry.places, row, out[1])
    return out


def crop_batch(
    images: Sequence[np.ndarray], ids: np.ndarray, seed: int, epoch: int, cfg: ViewsConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return the views of B images (H, W, 3) uint8.

    They are (B, S, S, 3) uint8 and elements (B * elements, H, W, 3) uint8, all of one image together.
    """
    sizes = np.array([image.shape[:2] for image in images], np.int64).reshape(-1, 2)
    geometry = draw_geometry(cfg, seed, epoch, ids, sizes)
    views = np.empty((len(images), *cfg.image_shape), np.uint8)
    seconds = np.empty((len(images), *open_pretext(cfg).shape), np.uint8)
    for row, image in enumerate(images):
        crop(image, geometry, row, cfg, out=(views[row], seconds[row]))
    return views, seconds.reshape(-1, *seconds.shape[2:])
