"""Photometric transforms of many small images at once, each with its own parameters.

Parameters are drawn on the host: which elements an operation touches is decided without a look at the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

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
from .parameters import JITTER_OPS, Photometrics
from .wide import Stages, apply_stages, move_stages, stage_arrays

JITTER: dict[str, Callable[[Tensor, np.ndarray], None]] = {
    "brightness": brightness_,
    "contrast": contrast_,
    "saturation": saturation_,
    "hue": hue_,
}
_CHUNK_VALUES = 1 << 20  # on a CPU, one chunk and its temporaries stay in the cache


def apply_photometrics(pixels: Tensor, params: Photometrics | Stages, cfg: ViewsConfig) -> Tensor:
    """Apply the photometric chain of the recipe, then normalise: (n, H, W, 3) uint8 to (n, 3, H, W) float32.

    On a GPU `wide` does it; parameters that are there already (`Stages`) spare the step a copy.

    base: jitter, then (posterize, sharpness, solarize, autocontrast), then gray, then flip.
    blur: flip, then jitter, then gray, then Gaussian blur.
    """
    if isinstance(params, dict):
        return apply_stages(pixels, params, cfg)
    if pixels.device.type != "cpu":
        return apply_stages(pixels, move_stages([stage_arrays(params, cfg)], pixels.device)[0], cfg)
    n, height, width, _ = pixels.shape
    factors = torch.tensor([[1 / (255 * s) for s in cfg.std], [-m / s for m, s in zip(cfg.mean, cfg.std)]])
    scale, shift = factors.view(2, 1, 3, 1, 1)
    channels = 1 if _is_gray(pixels) else 3
    plans = _jitter_plans(params, cfg)
    # elements with the same jitter operations in the same order stand together: one slice then serves them all
    order = np.argsort(plans, kind="stable")
    chunk = max(1, _CHUNK_VALUES // (channels * height * width))
    out = torch.empty((n, 3, height, width))
    for first in range(0, n, chunk):
        index = order[first : first + chunk]
        where = torch.from_numpy(index)
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
    """Return whether all channels are equal; then one stands for three."""
    if not len(pixels):
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
