"""The photometric chain for a GPU: each operation once, on all elements that need it.

Launches set the pace there, not pixels. All parameters travel to the device in one message (`device.to_device`). The
values are those of `photometric`, which runs on a CPU and keeps its chunks in the cache.

The jitter's three blends (brightness, contrast, saturation) have one form, x := d + f (x - d), where d is 0, the mean
luma or the luma. So an element's blends before its hue shift are at most three passes over all elements, and those
after it three more, in whatever orders the elements have them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..config import ViewsConfig
from ..device import to_device
from .operations import (
    autocontrast_,
    box_weights,
    column,
    flip_,
    gray_,
    hue_shift,
    hue_table,
    luma,
    mean_luma,
    posterize_steps,
    sharpness_,
    solarize_,
)
from .parameters import JITTER_OPS, Photometrics

Stages = dict[str, list[Tensor]]
"""Of each stage of the chain: the indices of its elements, then a column for each of its parameters."""

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(len(JITTER_OPS))
HUE_OFFSETS = (765.0, 510.0, 1020.0)  # where red turns off, and green and blue stand, in 1/255 of a sixth of the circle


def stage_arrays(params: Photometrics, cfg: ViewsConfig) -> dict[str, list[np.ndarray]]:
    """Return the stages as arrays; one that no element needs is left out."""
    stages = {"normalise": _normalisation(cfg), **_jitter_stages(params, cfg)}
    if cfg.photometric == "base":
        down, up = posterize_steps(params.bits)
        columns = [each.astype(np.float32) for each in (down, up, params.sharpness, params.threshold)]
        stages["group"] = _stage(params.group, *columns)
    else:
        stages["blur"] = _stage(params.blur, *_blur_weights(params.sigma[params.blur], params.blur))
    stages["gray"], stages["flip"] = _stage(params.gray), _stage(params.flip)
    return {name: arrays for name, arrays in stages.items() if len(arrays[0])}


def move_stages(sets: Sequence[dict[str, list[np.ndarray]]], device: torch.device) -> list[Stages]:
    """Return sets of stages on a device, copied in one message."""
    moved = iter(to_device([array for stages in sets for arrays in stages.values() for array in arrays], device))
    return [{name: [next(moved) for _ in arrays] for name, arrays in stages.items()} for stages in sets]


def apply_stages(pixels: Tensor, stages: Stages, cfg: ViewsConfig) -> Tensor:
    """Apply the chain to (n, H, W, 3) uint8 on a device, then normalise: (n, 3, H, W) float32."""
    x = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    jitter = [*(f"before {k}" for k in range(3)), "hue", *(f"after {k}" for k in range(3))]
    names = [*jitter, "group", "gray", "flip"] if cfg.photometric == "base" else ["flip", *jitter, "gray", "blur"]
    for name in names:
        if name in stages:
            index, *columns = stages[name]
            part = x.index_select(0, index)
            OPERATIONS[name.partition(" ")[0]](part, *columns)
            x.index_copy_(0, index, part)
    scale, shift = stages["normalise"]
    return x.mul_(scale.view(1, 3, 1, 1)).add_(shift.view(1, 3, 1, 1))


def _stage(mask: np.ndarray, *columns: np.ndarray) -> list[np.ndarray]:
    """Return the indices where `mask` holds, and the columns there."""
    return [np.flatnonzero(mask), *(each[mask] for each in columns)]


def _normalisation(cfg: ViewsConfig) -> list[np.ndarray]:
    scale = [1 / (255 * s) for s in cfg.std]
    shift = [-m / s for m, s in zip(cfg.mean, cfg.std)]
    return [np.array(scale, np.float32), np.array(shift, np.float32)]


def _jitter_stages(params: Photometrics, cfg: ViewsConfig) -> dict[str, list[np.ndarray]]:
    """Return the blends before the hue shift and after it, the k-th of each element in stage k, and the shift."""
    active = np.array([getattr(cfg, name) > 0 for name in JITTER_OPS])
    applies = params.jitter[:, None] & active[params.order]
    hue = applies & (params.order == HUE)
    blends = applies & (params.order != HUE)
    after = hue.cumsum(axis=1) > 0
    factors = np.stack([params.brightness, params.contrast, params.saturation], axis=1)
    stages = {}
    for name, chosen in (("before", blends & ~after), ("after", blends & after)):
        place = chosen.cumsum(axis=1)
        for k in range(3):
            element, position = np.nonzero(chosen & (place == k + 1))
            op = params.order[element, position]
            by_luma, by_mean = ((op == kind).astype(np.float32) for kind in (SATURATION, CONTRAST))
            stages[f"{name} {k}"] = [element, by_luma, by_mean, factors[element, op]]
    shift = hue_shift(params.hue).astype(np.uint8)
    constants = [np.array(HUE_OFFSETS, np.float32), np.array([-1, 1, 1], np.float32), np.array([255, 0, 0], np.float32)]
    stages["hue"] = [*_stage(hue.any(axis=1), shift), *constants, np.array([255.0 * 255], np.float32)]
    return stages


def _blur_weights(sigma: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """Return the box filters' weights by distance, for the most distant pixel that any of them has: (n,) int32 each."""
    reach, inner, outer = box_weights(sigma)
    columns = []
    for distance in range(int(reach.max(initial=0)) + 2):
        weights = np.zeros(len(mask), np.int32)
        weights[mask] = np.where(distance <= reach, inner, np.where(distance == reach + 1, outer, 0))
        columns.append(weights)
    return columns


def _blend(x: Tensor, by_luma: Tensor, by_mean: Tensor, factor: Tensor) -> None:
    """Apply each element's own blend: brightness, contrast or saturation."""
    gray = luma(x)
    mean = mean_luma(gray).mul_(column(x, by_mean))
    gray.mul_(column(x, by_luma)).add_(mean)
    x.sub_(gray).mul_(column(x, factor)).add_(gray).clamp_(0, 255).floor_()


def _hue(x: Tensor, shift: Tensor, offsets: Tensor, sign: Tensor, base: Tensor, scale: Tensor) -> None:
    """Apply `operations.hue_` on three channels at once."""
    red, green, blue = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    saturation = (value - low).div_(value.clamp(min=1)).double().mul_(255).floor_().float()
    key = (red - green).mul_(511).add_(green).sub_(blue).add_(255 * 512).int()
    hue = hue_table(x.device).index_select(0, key.view(-1)).view(key.shape).add_(shift.view(-1, 1, 1))  # wraps around
    turn, strength = hue.float().mul_(6), saturation.mul_(value)
    channels = torch.sub(turn[:, None], offsets.view(1, 3, 1, 1)).abs_().sub_(255).clamp_(0, 255)
    channels.mul_(sign.view(1, 3, 1, 1)).add_(base.view(1, 3, 1, 1)).mul_(strength[:, None])
    torch.sub(value[:, None], channels.add_(32512).div_(scale).floor_(), out=x)


def _group(x: Tensor, down: Tensor, up: Tensor, factor: Tensor, threshold: Tensor) -> None:
    x.mul_(column(x, down)).floor_().mul_(column(x, up))
    sharpness_(x, factor)
    solarize_(x, threshold)
    autocontrast_(x)


def _blur(x: Tensor, *weights: Tensor) -> None:
    """Apply three box blurs along the rows and three along the columns, each element with its own weights."""
    pixels = x.to(torch.int32)
    for axis in (3, 2):
        pixels = _box_blur(pixels, axis, [weight.view(-1, 1) for weight in weights])
    x.copy_(pixels)


def _box_blur(x: Tensor, axis: int, weights: Sequence[Tensor]) -> Tensor:
    """Apply three box blurs as `operations` does, with the weight of each distance in place of one radius."""
    size, pad = x.shape[axis], len(weights) - 1
    shape = list(x.shape)
    shape[axis] += 2 * pad
    padded = x.new_empty(shape)
    body = padded.narrow(axis, pad, size)
    body.copy_(x)
    flat, step = padded.view(len(x), -1), padded.stride(axis)
    end = flat.shape[1] - pad * step
    centre = flat[:, pad * step : end]
    for _ in range(3):
        padded.narrow(axis, 0, pad).copy_(body.narrow(axis, 0, 1))
        padded.narrow(axis, pad + size, pad).copy_(body.narrow(axis, size - 1, 1))
        total = centre * weights[0]
        for distance, weight in enumerate(weights[1:], 1):
            pair = flat[:, (pad - distance) * step : end - distance * step]
            total += (pair + flat[:, (pad + distance) * step : end + distance * step]).mul_(weight)
        # sums reach 2^32: int32 wraps, and the mask takes the sign's copies away
        torch.bitwise_and(total.add_(1 << 23).bitwise_right_shift_(24), 255, out=centre)
    return body


OPERATIONS: dict[str, Callable[..., None]] = {
    "before": _blend,
    "after": _blend,
    "hue": _hue,
    "group": _group,
    "gray": gray_,
    "flip": flip_,
    "blur": _blur,
}
