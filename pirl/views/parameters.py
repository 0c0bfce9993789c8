"""Parameters of the photometric transforms, drawn for each image and element on its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from ..config import ViewsConfig
from .random import uniforms

FIRST_STREAM = 1  # of `uniforms`: element e of an image draws from stream 1 + e
JITTER_OPS = ("brightness", "contrast", "saturation", "hue")
_ORDERS = np.array(list(itertools.permutations(range(len(JITTER_OPS)))))


@dataclass(frozen=True)
class Photometrics:
    """Parameters of the transforms of n elements (images or patches): arrays (n, ...)."""

    jitter: np.ndarray
    """bool: whether the colour jitter applies."""
    order: np.ndarray
    """(n, 4) int64: the jitter's operations (indices of JITTER_OPS) in the order in which they apply."""
    brightness: np.ndarray
    contrast: np.ndarray
    saturation: np.ndarray
    """float32 factors, 1 changes nothing."""
    hue: np.ndarray
    """float32 in turns, -0.5..0.5."""
    group: np.ndarray
    """bool: whether posterize, sharpness, solarize and autocontrast apply (all four or none)."""
    bits: np.ndarray
    """int64, 4..8: bits that posterize keeps."""
    sharpness: np.ndarray
    """float32 factor, 1 changes nothing."""
    threshold: np.ndarray
    """int64, 0..256: solarize inverts from this value on."""
    gray: np.ndarray
    """bool."""
    flip: np.ndarray
    """bool: left and right exchanged."""
    blur: np.ndarray
    """bool."""
    sigma: np.ndarray
    """float32: standard deviation of the Gaussian blur, pixels."""

    def __len__(self) -> int:
        return len(self.jitter)

    def __getitem__(self, index: np.ndarray) -> Photometrics:
        return Photometrics(*(getattr(self, field.name)[index] for field in fields(self)))


def draw_photometrics(
    cfg: ViewsConfig, seed: int, epoch: int, ids: np.ndarray, elements: Sequence[int]
) -> Photometrics:
    """Return the parameters of elements of each image (0: image view, k: patch k - 1 of the output), image by image.

    Returns arrays of n = B * len(elements). Every element draws independently of all others.
    """
    streams = FIRST_STREAM + np.tile(np.asarray(elements, np.int64), len(ids))
    u = uniforms(seed, epoch, np.repeat(np.asarray(ids), len(elements)), streams, 14).T

    def factor(column: np.ndarray, low: float, high: float) -> np.ndarray:
        return (low + (high - low) * column).astype(np.float32)

    def strength(column: np.ndarray, value: float) -> np.ndarray:
        return factor(column, max(0.0, 1 - value), 1 + value)

    return Photometrics(
        jitter=u[0] < cfg.jitter_probability,
        order=_ORDERS[(u[1] * len(_ORDERS)).astype(np.int64)],
        brightness=strength(u[2], cfg.brightness),
        contrast=strength(u[3], cfg.contrast),
        saturation=strength(u[4], cfg.saturation),
        hue=factor(u[5], -cfg.hue, cfg.hue),
        group=u[6] < cfg.posterize_probability,
        bits=4 + (u[7] * 5).astype(np.int64),
        sharpness=factor(u[8], 0.1, 1.9),
        threshold=(u[9] * 257).astype(np.int64),
        gray=u[10] < cfg.gray_probability,
        flip=u[11] < cfg.flip_probability,
        blur=u[12] < cfg.blur_probability,
        sigma=factor(u[13], *cfg.blur_sigma),
    )
