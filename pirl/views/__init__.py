"""The two views of an image: a crop, and nine jittered patches of a second crop in random order (paper, section 3).

Geometry happens on 8-bit pixels where images are decoded; photometric transforms are batched tensor work
(`photometric`) on the device of the model. All randomness is a pure function of (seed, epoch, image id, view), see
`random`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..config import ViewsConfig
from .photometric import Photometrics, apply_photometrics, denormalise, draw_photometrics
from .random import philox4x32, uniforms

__all__ = [
    "Geometry",
    "Photometrics",
    "apply_photometrics",
    "crop",
    "crop_batch",
    "denormalise",
    "draw_geometry",
    "draw_photometrics",
    "philox4x32",
    "uniforms",
]

TRIES = 10  # of a random crop, before the centre is taken
GEOMETRY_STREAM = 0  # of `uniforms`; the photometric streams follow
CROP_DRAWS = 2 * TRIES + 2
"""Uniforms of one crop: (area, aspect ratio) of each try, then top and left.

Columns of the geometry stream: image crop 0..21, patch crop 22..43, then 2 g^2 of the jitter, g^2 of the permutation.
"""


@dataclass(frozen=True)
class Geometry:
    """Places of the views of a batch of B images; g is the side of the jigsaw grid."""

    image_box: np.ndarray
    """(B, 4) int64: top, left, height, width of the image view in pixels of the original."""
    patch_box: np.ndarray
    """(B, 4) int64: the same for the crop from which patches are cut."""
    patch_jitter: np.ndarray
    """(B, 2, g, g) int64: x (index 0) and y (1) offset of the patch in cell [column, row], in pixels of that crop."""
    permutation: np.ndarray
    """(B, g^2) int64: patch k of the output is number permutation[k] of the grid, counted down its columns."""


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


def draw_geometry(cfg: ViewsConfig, seed: int, epoch: int, ids: np.ndarray, sizes: np.ndarray) -> Geometry:
    """Return boxes, jitter and permutation of the images `ids` (B,) of `sizes` (B, 2: height, width) in an epoch."""
    cells = cfg.grid * cfg.grid
    draws = uniforms(seed, epoch, ids, GEOMETRY_STREAM, 2 * CROP_DRAWS + 3 * cells)
    image, patch, jitter, order = np.split(draws, np.cumsum([CROP_DRAWS, CROP_DRAWS, 2 * cells]), axis=1)
    offsets = max(cfg.cell - cfg.patch_size, 1)  # the reference draws 0..20 where 21 would fit
    return Geometry(
        image_box=random_box(image, sizes, cfg.image_scale, cfg.image_ratio),
        patch_box=random_box(patch, sizes, cfg.patch_scale, cfg.patch_ratio),
        patch_jitter=(jitter.reshape(-1, 2, cfg.grid, cfg.grid) * offsets).astype(np.int64),
        permutation=np.argsort(order, axis=1, kind="stable"),
    )


def crop(
    image: np.ndarray,
    geometry: Geometry,
    row: int,
    cfg: ViewsConfig,
    out: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the views of one image (H, W, 3) uint8 by row `row` of `geometry`, before photometric transforms.

    They are the image (S, S, 3) uint8 and its patches (g^2, P, P, 3) uint8 in permuted order, written into `out` where
    it is given. Crops are resized with an antialiased bilinear filter, each straight from the original: PIL's, or where
    `resampling` is "near" PyTorch's, three times as fast, whose values are at most 1 level off (one in two hundred is).
    """
    size = cfg.patch_size
    if out is None:
        out = np.empty(cfg.image_shape, np.uint8), np.empty(cfg.patch_shape, np.uint8)
    image_out, patches_out = out
    resized = _resized_by_pil if cfg.resampling == "exact" else _resized_by_torch
    image_out[...] = resized(_cut(image, geometry.image_box[row]), cfg.image_size)
    source = resized(_cut(image, geometry.patch_box[row]), cfg.patch_crop_size)
    columns, rows = np.divmod(geometry.permutation[row], cfg.grid)
    jitter_x, jitter_y = geometry.patch_jitter[row][:, columns, rows]
    lefts, tops = (columns * cfg.cell + jitter_x).tolist(), (rows * cfg.cell + jitter_y).tolist()
    for k in range(cfg.patches):
        patches_out[k] = source[tops[k] : tops[k] + size, lefts[k] : lefts[k] + size]
    return out


def _cut(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    # cut first: pixels outside the box must not come into the reach of the filter
    top, left, height, width = box.tolist()
    return image[top : top + height, left : left + width]


def _resized_by_pil(pixels: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


def _resized_by_torch(pixels: np.ndarray, size: int) -> np.ndarray:
    planes = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]
    return F.interpolate(planes, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def crop_batch(
    images: Sequence[np.ndarray], ids: np.ndarray, seed: int, epoch: int, cfg: ViewsConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return the views of B images (H, W, 3) uint8.

    They are (B, S, S, 3) uint8 and patches (B g^2, P, P, 3) uint8, all of one image together.
    """
    sizes = np.array([image.shape[:2] for image in images], np.int64).reshape(-1, 2)
    geometry = draw_geometry(cfg, seed, epoch, ids, sizes)
    views = np.empty((len(images), *cfg.image_shape), np.uint8)
    patches = np.empty((len(images), *cfg.patch_shape), np.uint8)
    for row, image in enumerate(images):
        crop(image, geometry, row, cfg, out=(views[row], patches[row]))
    return views, patches.reshape(-1, *patches.shape[2:])
