"""Photometric transforms of many small images at once, each with its own parameters, on whatever device they are on.

Parameters stay on the host as numpy arrays: which elements an operation touches is known without asking the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from ..config import ViewsConfig
from .operations import (
    autocontrast_,
    blur_,
    brightness_,
    contrast_,
    flip_,
    gray_,
    hue_,
    on_some,
    posterize_,
    saturation_,
    sharpness_,
    solarize_,
)
from .random import uniforms

FIRST_STREAM = 1  # of `uniforms`: element e of an image draws from stream 1 + e
JITTER: dict[str, Callable[[Tensor, np.ndarray], None]] = {
    "brightness": brightness_,
    "contrast": contrast_,
    "saturation": saturation_,
    "hue": hue_,
}
JITTER_OPS = tuple(JITTER)
_ORDERS = np.array(list(itertools.permutations(range(4))))
_CHUNK_VALUES = 1 << 20  # on a CPU, one chunk and its temporaries stay in the cache


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


def apply_photometrics(pixels: Tensor, params: Photometrics, cfg: ViewsConfig) -> Tensor:
    """Apply the photometric chain of the recipe, then normalise: (n, H, W, 3) uint8 to (n, 3, H, W) float32.

    base: jitter, then (posterize, sharpness, solarize, autocontrast), then gray, then flip.
    blur: flip, then jitter, then gray, then Gaussian blur.
    """
    n, height, width, _ = pixels.shape
    factors = torch.tensor([[1 / (255 * s) for s in cfg.std], [-m / s for m, s in zip(cfg.mean, cfg.std)]])
    scale, shift = factors.to(pixels.device, non_blocking=True).view(2, 1, 3, 1, 1)
    channels = 1 if _is_gray(pixels) else 3
    plans = _jitter_plans(params, cfg)
    # elements with the same jitter operations in the same order stand together: one slice then serves them all
    order = np.argsort(plans, kind="stable")
    chunk = max(1, n if pixels.is_cuda else _CHUNK_VALUES // (channels * height * width))
    out = torch.empty((n, 3, height, width), device=pixels.device)
    for first in range(0, n, chunk):
        index = order[first : first + chunk]
        where = torch.from_numpy(index).to(pixels.device, non_blocking=True)
        chosen = pixels.index_select(0, where).permute(0, 3, 1, 2)[:, :channels]
        x = chosen.to(torch.float32, memory_format=torch.contiguous_format)
        _chain(x, params[index], plans[index], cfg)
        out.index_copy_(0, where, (x * scale).add_(shift))
    return out


def _chain(x: Tensor, params: Photometrics, plans: np.ndarray, cfg: ViewsConfig) -> None:
    """Apply all transforms, in place on (m, C, H, W) pixels sorted by their jitter plans."""
    if cfg.photometric == "base":
        _jitter(x, params, plans)
        on_some(x, params.group, lambda part, index: _group(part, params[index]))
        on_some(x, params.gray, lambda part, _: gray_(part))
        on_some(x, params.flip, lambda part, _: flip_(part))
    else:
        on_some(x, params.flip, lambda part, _: flip_(part))
        _jitter(x, params, plans)
        on_some(x, params.gray, lambda part, _: gray_(part))
        on_some(x, params.blur, lambda part, index: blur_(part, params.sigma[index]))


def denormalise(images: Tensor, cfg: ViewsConfig) -> Tensor:
    """Return normalised images (n, 3, H, W) as pixels to look at: (n, H, W, 3) uint8 on the CPU."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (cfg.mean, cfg.std))
    pixels = (images.detach().float().cpu() * std + mean) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _is_gray(pixels: Tensor) -> bool:
    """Return whether all channels are equal; then one stands for three. False on a GPU, which would have to wait."""
    if pixels.is_cuda or not len(pixels):
        return False
    return all(torch.equal(part[..., 0], part[..., channel]) for part in (pixels[:1], pixels) for channel in (1, 2))


def _jitter_plans(params: Photometrics, cfg: ViewsConfig) -> np.ndarray:
    """Return (n,) the jitter operations that do something, in order, as digits (index + 1) of a number in base 5."""
    active = np.array([getattr(cfg, name) > 0 for name in JITTER_OPS])
    plans = np.zeros(len(params), np.int64)
    for op in params.order.T:
        plans = np.where(params.jitter & active[op], plans * 5 + op + 1, plans)
    return plans


def _jitter(x: Tensor, params: Photometrics, plans: np.ndarray) -> None:
    """Apply colour jitter to elements sorted by their plans."""
    for run in _runs(plans):
        for digit in np.base_repr(plans[run.start], 5):
            if digit != "0":
                name = JITTER_OPS[int(digit) - 1]
                JITTER[name](x[run], getattr(params, name)[run])


def _runs(values: np.ndarray) -> Iterator[slice]:
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return (slice(start, stop) for start, stop in itertools.pairwise(edges) if stop > start)


def _group(x: Tensor, params: Photometrics) -> None:
    posterize_(x, params.bits)
    sharpness_(x, params.sharpness)
    solarize_(x, params.threshold)
    autocontrast_(x)
