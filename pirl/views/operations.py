"""PIL's 8-bit image operations on many images at once, each image with its own parameter.

Pixels are float32 tensors (m, C, H, W) that hold the integers 0..255, changed in place; C is 3, or 1 where all channels
are equal. Parameters are arrays (m,), or tensors on the device. Every operation rounds where PIL rounds and gives PIL's
values exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def on_some(x: Tensor, mask: np.ndarray, op: Callable[[Tensor, np.ndarray], object]) -> None:
    """Apply `op(elements, their indices)` in place to the elements of `x` where `mask` holds."""
    index = np.flatnonzero(mask)
    if len(index) == len(x):
        op(x, index)
    elif len(index):
        where = torch.from_numpy(index).to(x.device, non_blocking=True)
        part = x.index_select(0, where)
        op(part, index)
        x.index_copy_(0, where, part)


Values = np.ndarray | Tensor
"""One value for each element."""


def column(x: Tensor, values: Values, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return one value for each element, to broadcast over its pixels."""
    if isinstance(values, Tensor):
        return values.view(-1, 1, 1, 1)
    return torch.as_tensor(values, dtype=dtype).to(x.device, non_blocking=True).view(-1, 1, 1, 1)


def _blend_(x: Tensor, degenerate: Tensor, factor: np.ndarray) -> None:
    """Set x to degenerate + factor (x - degenerate), clipped and cut to integers, as PIL's Image.blend."""
    x.sub_(degenerate).mul_(column(x, factor)).add_(degenerate).clamp_(0, 255).floor_()


def luma(x: Tensor) -> Tensor:
    """Return PIL's mode L, (m, 1, H, W): (19595 R + 38470 G + 7471 B + 2^15) >> 16. Float32 holds it exactly."""
    if x.shape[1] == 1:
        return x.clone()
    red, green, blue = x.split(1, dim=1)
    gray = red * (19595 / 65536)
    return gray.add_(green, alpha=38470 / 65536).add_(blue, alpha=7471 / 65536).add_(0.5).floor_()


def brightness_(x: Tensor, factor: np.ndarray) -> None:
    """Apply PIL's ImageEnhance.Brightness."""
    x.mul_(column(x, factor)).clamp_(max=255).floor_()


def contrast_(x: Tensor, factor: np.ndarray) -> None:
    """Apply PIL's ImageEnhance.Contrast: away from the rounded mean luma."""
    _blend_(x, mean_luma(luma(x)), factor)


def mean_luma(gray: Tensor) -> Tensor:
    """Return the rounded mean of each gray image, (m, 1, 1, 1)."""
    total = gray.sum(-1).sum((1, 2), dtype=torch.float64)  # of integers: exact in any order
    pixels = torch.full_like(total, gray.shape[2] * gray.shape[3])  # a GPU divides by a number by its reciprocal
    return (total / pixels + 0.5).floor_().float().view(-1, 1, 1, 1)


def saturation_(x: Tensor, factor: np.ndarray) -> None:
    """Apply PIL's ImageEnhance.Color: away from the gray image."""
    if x.shape[1] == 3:
        _blend_(x, luma(x), factor)


@functools.cache
def hue_table(device: torch.device) -> Tensor:
    """Return PIL's 8-bit hue by two differences of colours: (511 * 511,) uint8 at 511 (R - G) + G - B, from -255."""
    red_green, green_blue = (axis - 255 for axis in np.mgrid[:511, :511])
    channels = np.stack([red_green + green_blue, green_blue, np.zeros_like(green_blue)], axis=-1)
    channels -= channels.min(axis=-1, keepdims=True)
    colours = Image.fromarray(np.minimum(channels, 255).astype(np.uint8))  # larger differences do not occur
    return torch.from_numpy(np.array(colours.convert("HSV"))[..., 0].ravel()).to(device)


def hue_(x: Tensor, turns: np.ndarray) -> None:
    """Apply torchvision's adjust_hue on PIL images: to 8-bit HSV, a shift of H modulo 256, and back."""
    if x.shape[1] == 1:
        return  # gray has no hue
    red, green, blue = x.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # double precision as in PIL: a whole number may come out just below itself, and is then cut to the one before
    saturation = (chroma / value.clamp(min=1)).double().mul_(255).floor_().float()
    key = (red - green).mul_(511).add_(green).sub_(blue).add_(255 * 512).int()
    hue = hue_table(x.device).index_select(0, key.view(-1)).view(key.shape)
    hue.add_(column(x, hue_shift(turns), torch.uint8).view(-1, 1, 1))  # wraps around

    turn = hue.float().mul_(6)  # in 1/255 of a sixth of the circle; red, green and blue stand at 0 = 1530, 510 and 1020
    strength = saturation.mul_(value)
    torch.sub(255, (turn - 765).abs_().sub_(255).clamp_(0, 255), out=red)
    torch.sub(turn, 510, out=green).abs_().sub_(255)
    torch.sub(turn, 1020, out=blue).abs_().sub_(255)
    scale = strength.new_full((), 255 * 255)  # a tensor, for true division on a GPU
    for channel in (red, green, blue):
        channel.clamp_(0, 255).mul_(strength).add_(32512).div_(scale).floor_().neg_().add_(value)


def hue_shift(turns: np.ndarray) -> np.ndarray:
    """Return the steps of 1/256 by which 8-bit hues are shifted."""
    return np.trunc(turns.astype(np.float64) * 255) % 256


def flip_(x: Tensor) -> None:
    """Exchange left and right."""
    x.copy_(x.flip(-1))


def posterize_(x: Tensor, bits: np.ndarray) -> None:
    """Apply PIL's ImageOps.posterize."""
    down, up = posterize_steps(bits)
    x.mul_(column(x, down)).floor_().mul_(column(x, up))


def posterize_steps(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors before and after the cut to integers."""
    step = 2.0 ** (8 - bits)
    return 1 / step, step


def sharpness_(x: Tensor, factor: Values) -> None:
    """Apply PIL's ImageEnhance.Sharpness: away from the image smoothed by a 3x3 kernel; border pixels stay."""
    height, width = x.shape[2:]
    if min(height, width) < 3:
        return
    # shifts along the flattened pixels keep memory access contiguous; what they get wrong at the border is not used
    flat = x.view(len(x), -1)
    line = flat[:, :-2] + flat[:, 1:-1]
    line.add_(flat[:, 2:])
    smooth = line[:, : -2 * width] + line[:, width:-width]
    centre = flat[:, width + 1 : -width - 1]
    smooth.add_(line[:, 2 * width :]).add_(centre, alpha=4).mul_(1 / 13).add_(0.5).floor_()
    sharp = torch.empty_like(x)
    middle = sharp.view(len(x), -1)[:, width + 1 : -width - 1]
    torch.sub(centre, smooth, out=middle)
    middle.mul_(column(x, factor).view(-1, 1)).add_(smooth).clamp_(0, 255).floor_()
    x[..., 1:-1, 1:-1] = sharp[..., 1:-1, 1:-1]


def solarize_(x: Tensor, threshold: Values) -> None:
    """Apply PIL's ImageOps.solarize."""
    inverted = (x - column(x, threshold - 1)).clamp_(0, 1)  # arithmetic is faster than torch.where on a CPU
    x.add_(inverted.mul_(torch.rsub(x, 255, alpha=2)))


def autocontrast_(x: Tensor) -> None:
    """Apply PIL's ImageOps.autocontrast: each channel stretched to 0..255."""
    low, high = (extreme(x.flatten(2), dim=2, keepdim=True).double() for extreme in (torch.amin, torch.amax))
    # 255 / tensor would multiply by a rounded reciprocal
    stretch = torch.where(high > low, torch.full_like(low, 255) / (high - low).clamp(min=1), 1.0)
    offset = torch.where(high > low, -low * stretch, 0.0)
    # double precision, as PIL: a whole number may come out just below itself and is cut
    stretched = x.flatten(2).double().mul_(stretch).add_(offset).floor_()
    x.copy_(stretched.view_as(x)).clamp_(0, 255)


def gray_(x: Tensor) -> None:
    """Apply PIL's conversion to mode L, in all channels."""
    if x.shape[1] == 3:
        x.copy_(luma(x).expand_as(x))


def blur_(x: Tensor, sigma: np.ndarray) -> None:
    """Apply PIL's GaussianBlur: three box blurs along the rows, then three along the columns."""
    reach, inner, outer = box_weights(sigma)
    for radius in np.unique(reach).tolist():

        def blur(part: Tensor, index: np.ndarray, radius: int = radius) -> None:
            weights = tuple(column(x, w[index], torch.int32).view(-1, 1) for w in (inner, outer))
            pixels = part.to(torch.int32)
            for axis in (3, 2):
                pixels = _box_blur(pixels, axis, radius, *weights)
            part.copy_(pixels)

        on_some(x, reach == radius, blur)


def box_weights(sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return three box filters that make a Gaussian, in PIL's float32 arithmetic and its 24-bit fixed point.

    Returns, (m,) each, int64: whole pixels on either side of the centre, their weight, and the weight of the two
    pixels beyond (Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering", 2011).
    """
    sigma = sigma.astype(np.float32)
    variance = sigma * sigma / np.float32(3)
    length = np.sqrt(12.0 * variance.astype(np.float64) + 1.0).astype(np.float32)
    whole = np.floor((length - np.float32(1)) / np.float32(2))
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) * (whole + 1)))
    radius = (whole + rest).astype(np.float32)
    reach = radius.astype(np.int64)
    inner = (np.float32(1 << 24) / (radius * 2 + 1)).astype(np.int64)
    return reach, inner, ((1 << 24) - (2 * reach + 1) * inner) // 2


def _box_blur(x: Tensor, axis: int, radius: int, inner: Tensor, outer: Tensor) -> Tensor:
    """Apply three box blurs of (m, C, H, W) int32 along `axis`, rounded to 8 bits after each, edges repeated."""
    size, pad = x.shape[axis], radius + 1
    shape = list(x.shape)
    shape[axis] += 2 * pad
    padded = x.new_empty(shape)
    body = padded.narrow(axis, pad, size)
    body.copy_(x)
    # shifts along the flattened pixels, as in sharpness_: only the padding comes out wrong, and it is filled again
    flat = padded.view(len(x), -1)
    step = padded.stride(axis)
    end = flat.shape[1] - pad * step
    centre = flat[:, pad * step : end]
    for _ in range(3):
        padded.narrow(axis, 0, pad).copy_(body.narrow(axis, 0, 1))
        padded.narrow(axis, pad + size, pad).copy_(body.narrow(axis, size - 1, 1))
        far = (flat[:, : -2 * pad * step] + flat[:, 2 * pad * step :]).mul_(outer)
        near = centre.clone() if radius else centre
        for distance in range(1, radius + 1):
            near += flat[:, (pad - distance) * step : end - distance * step]
            near += flat[:, (pad + distance) * step : end + distance * step]
        # sums reach 2^32: int32 wraps, and the mask takes the sign's copies away
        torch.mul(near, inner, out=centre).add_(far).add_(1 << 23).bitwise_right_shift_(24).bitwise_and_(255)
    return body
