"""Labelled crops for a probe that sees augmented images: random ones to train it, centre crops to test it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pirl.config import Recipe
from pirl.errors import DataError, PirlError
from pirl.loader import ErrorsAsValues, start_worker
from pirl.shards import ShardReader
from pirl.views import CROP_DRAWS, random_box, uniforms

PROBE_STREAM = 240  # of the counter-based random numbers; the views use small numbers, `data` those from 250 on
SCALE, RATIO, FLIP = (0.08, 1.0), (3 / 4, 4 / 3), 0.5  # torchvision's RandomResizedCrop and RandomHorizontalFlip

Chunk = tuple[int | None, np.ndarray]
"""The epoch of training, or None for centre crops, and ids (n,)."""


def draw_crops(seed: int, epoch: int, ids: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (n, 4) int64 of top, left, height, width, and whether to flip (n,), for images of `sizes` (n, 2: h, w).

    Row i is a pure function of (seed, epoch, ids[i], sizes[i]).
    """
    draws = uniforms(seed, epoch, ids, PROBE_STREAM, CROP_DRAWS + 1)
    return random_box(draws[:, :CROP_DRAWS], sizes, SCALE, RATIO), draws[:, CROP_DRAWS] < FLIP


def centre_crop(image: Image.Image, recipe: Recipe) -> np.ndarray:
    """(crop, crop, 3) uint8 of an RGB image: shorter side to `resize`, then the centre."""
    config, short = recipe.eval, min(image.size)
    if short != config.resize:
        width, height = (config.resize * side // short for side in image.size)  # as torchvision's Resize rounds
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((image.width - config.crop) / 2), round((image.height - config.crop) / 2)
    return np.asarray(image.crop((left, top, left + config.crop, top + config.crop)))


def random_crops(images: list[Image.Image], ids: np.ndarray, seed: int, epoch: int, side: int) -> np.ndarray:
    """(n, side, side, 3) uint8: a random crop of each RGB image, resized and flipped as in an epoch of training."""
    sizes = np.array([(image.height, image.width) for image in images], np.int64)
    boxes, flips = draw_crops(seed, epoch, ids, sizes)
    out = np.empty((len(images), side, side, 3), np.uint8)
    for row, (image, box, flip) in enumerate(zip(images, boxes.tolist(), flips)):
        top, left, height, width = box
        cut = image.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BILINEAR)
        out[row] = np.asarray(cut)[:, ::-1] if flip else np.asarray(cut)
    return out


class LabelledCrops(Dataset[tuple[Tensor, Tensor]]):
    """Crops and labels by `Chunk`: what a loader's worker does. It decodes and crops, and hands over uint8 pixels."""

    def __init__(self, reader: ShardReader, recipe: Recipe, seed: int) -> None:
        self.reader, self.recipe, self.seed = reader, recipe, seed

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """(n, crop, crop, 3) uint8 and (n,) int64."""
        epoch, ids = chunk
        images = [self.reader.image(int(id)) for id in ids]
        if epoch is None:
            pixels = np.stack([centre_crop(image, self.recipe) for image in images])
        else:
            pixels = random_crops(images, ids, self.seed, epoch, self.recipe.eval.crop)
        return torch.from_numpy(pixels), torch.from_numpy(self.reader.labels(ids))

    def load(self, chunks: Iterable[Chunk], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the chunks in order, made by `workers` processes (0: in this one)."""
        loader = DataLoader(
            ErrorsAsValues(self),
            batch_size=None,
            sampler=chunks,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context="forkserver" if workers else None,
            worker_init_fn=start_worker if workers else None,
        )
        try:
            for item in loader:
                if isinstance(item, PirlError):
                    raise item
                yield item
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"a data loading process died: {error}",
                "it may have run out of memory or of shared memory (/dev/shm); use fewer workers or more memory",
            ) from error
