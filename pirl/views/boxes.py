"""Random crops: their boxes, and the pixels inside at another size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

TRIES = 10  # of a random crop, before the centre is taken
CROP_DRAWS = 2 * TRIES + 2
"""Uniforms of one crop: (area, aspect ratio) of each try, then top and left."""


def random_box(draws: np.ndarray, sizes: np.ndarray, scale: Sequence[float], ratio: Sequence[float]) -> np.ndarray:
    """Return boxes by the law of torchvision's RandomResizedCrop: (B, 4) int64 of top, left, height, width.

    The area is uniform in `scale` (shares of the image's area), the aspect ratio log-uniform in `ratio`; the first of
    10 tries that fits is placed uniformly, and if none fits the largest centred box with an allowed ratio is taken.
    `draws` (B, 22) uniform in [0, 1), `sizes` (B, 2) height and width.
    """
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:, 0 : 2 * TRIES : 2])
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * draws[:, 1 : 2 * TRIES : 2])
    tried_w, tried_h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (tried_w > 0) & (tried_w <= width) & (tried_h > 0) & (tried_h <= height)
    any_fits, first = fits.any(axis=1), fits.argmax(axis=1)[:, None]

    height, width = height[:, 0], width[:, 0]
    centre_w = np.where(width / height > ratio[1], np.maximum(1, np.rint(height * ratio[1])), width)
    centre_h = np.where(width / height < ratio[0], np.maximum(1, np.rint(width / ratio[0])), height)
    h = np.where(any_fits, np.take_along_axis(tried_h, first, axis=1)[:, 0], centre_h)
    w = np.where(any_fits, np.take_along_axis(tried_w, first, axis=1)[:, 0], centre_w)
    top = np.where(any_fits, draws[:, 2 * TRIES] * (height - h + 1), (height - h) // 2)
    left = np.where(any_fits, draws[:, 2 * TRIES + 1] * (width - w + 1), (width - w) // 2)
    return np.stack([top, left, h, w], axis=1).astype(np.int64)


def cut(image: np.ndarray, box: np.ndarray, size: int, resampling: str) -> np.ndarray:
    """Return the pixels of an image (H, W, 3) uint8 inside a box, resized to (size, size, 3) uint8.

    The filter is bilinear and antialiased: PIL's, or where `resampling` is "near" PyTorch's, three times as fast, whose
    values are at most 1 level off (one in two hundred is).
    """
    top, left, height, width = box.tolist()
    # cut first: pixels outside the box must not come into the reach of the filter
    pixels = image[top : top + height, left : left + width]
    if resampling == "exact":
        return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))
    planes = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]
    return F.interpolate(planes, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
