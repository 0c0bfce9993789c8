"""From shards to batches: an exact order of ids, dealt to ranks, decoded and cropped.

The order of an epoch is a function of (seed, epoch) alone: a permutation of the rows (`order`), cut into global
batches, each dealt to the ranks by index. No id comes twice. None is left out, except those that `last_batch = "drop"`
drops. A run that stops after any number of samples resumes there, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .config import Recipe
from .order import open_order
from .shards import ShardReader, decode_pixels, image_size
from .views import crop, draw_geometry, open_pretext, uniforms
from .world import World

NEGATIVES_STREAM = 251  # of the counter-based random numbers, and 252; see `views` and `order` for others
STEP_STREAM = 254
CACHED_SIDE = 64  # decoded images up to this size are kept: decoding them costs more than holding them
CACHED_BYTES = 256 << 20  # for each process
BUFFER_BYTES = 12 << 20  # larger images are decoded into memory of their own


class Batch(NamedTuple):
    """One rank's share of a global batch."""

    rows: Tensor
    """(B,) int64 rows of the memory bank."""
    ids: Tensor
    """(B,) int64 image ids in the data set; rows and ids are equal unless the recipe uses fewer images."""
    images: Tensor
    """(B, S, S, 3) uint8 crops."""
    elements: Tensor
    """(B * elements, P, P, 3) uint8, sample-major: the second views."""
    slot: Any = None
    """`loader.Slot` of the pixels, which gets the mark after their copy; None: memory of their own."""


class Share(NamedTuple):
    """Which rows a rank has of a global batch."""

    rows: np.ndarray
    weight: float
    """Of each sample, so that the mean over ranks of weighted sums is the mean over the global batch; 0 for a stand-in
    row on a rank that has none of a small last batch."""
    counts: list[int]
    """Samples of every rank that count."""
    size: int
    """Of the global batch."""
    first: int
    """Of the epoch's samples, where the batch starts."""


def epoch_shares(recipe: Recipe, rows: int, epoch: int, world: World, start: int = 0) -> Iterator[Share]:
    """Yield this rank's shares of epoch `epoch`, from the sample `start` on (a multiple of the global batch)."""
    order = open_order(recipe.train.order, recipe.train.seed, epoch, rows)
    size = recipe.train.batch_size
    end = rows - rows % size if recipe.train.last_batch == "drop" else rows
    for first in range(start, end, size):
        batch = order.part(first, min(first + size, end))
        counts = [len(range(rank, len(batch), world.size)) for rank in range(world.size)]
        if counts[world.rank]:
            yield Share(batch[world.rank :: world.size], world.size / len(batch), counts, len(batch), first)
        else:
            yield Share(batch[:1], 0.0, counts, len(batch), first)


def negative_seeds(seed: int, epoch: int, ids: np.ndarray, view: int) -> Tensor:
    """Return (B,) int64 seeds from which each image's negatives are drawn: view 0 the second, 1 the image."""
    draws = uniforms(seed, epoch, ids, NEGATIVES_STREAM + view, 1)[:, 0]
    return torch.from_numpy((draws * 2.0**53).astype(np.int64))


def step_seed(seed: int, epoch: int, first: int) -> int:
    """Return the seed of what a whole step shares, the step from the sample `first` of the epoch on."""
    return int(uniforms(seed, epoch, np.array([first]), STEP_STREAM, 1)[0, 0] * 2.0**53)


class CropDataset(Dataset[Batch]):
    """Batches by (epoch, rows): what a loader's worker does. It decodes and crops, and hands over uint8 pixels."""

    def __init__(self, data: str, recipe: Recipe) -> None:
        self.recipe = recipe
        self.reader = ShardReader(data)
        self.rows = recipe.rows(len(self.reader))
        self._buffer = bytearray()
        self._decoded: dict[int, np.ndarray] = {}
        self._decoded_bytes = 0

    def image_ids(self, rows: np.ndarray) -> np.ndarray:
        """Return the ids of bank rows: the same, or evenly spaced over the data set if the recipe uses fewer images."""
        return rows if self.rows == len(self.reader) else rows * len(self.reader) // self.rows

    def __getitem__(self, index: tuple[int, np.ndarray]) -> Batch:
        epoch, rows = index
        cfg = self.recipe.views
        images = torch.empty(len(rows), *cfg.image_shape, dtype=torch.uint8)
        elements = torch.empty(len(rows), *open_pretext(cfg).shape, dtype=torch.uint8)
        self.fill(epoch, rows, images, elements)
        return self.batch(rows, images, elements)

    def fill(self, epoch: int, rows: np.ndarray, images: Tensor, elements: Tensor) -> None:
        """Write the crops of `rows` into (B, S, S, 3) and (B, elements, P, P, 3) uint8."""
        ids, cfg = self.image_ids(rows).tolist(), self.recipe.views
        unread = [id for id in ids if id not in self._decoded]
        read = dict(zip(unread, self.reader.read_many(unread)))
        sources = [self._decoded[id] if id in self._decoded else read[id] for id in ids]
        sizes = [
            source.shape[:2]
            if isinstance(source, np.ndarray)
            else image_size(source, self._name(id), self.reader.manifest.decoding)
            for id, source in zip(ids, sources)
        ]
        geometry = draw_geometry(cfg, self.recipe.train.seed, epoch, np.array(ids), np.array(sizes, np.int64))
        for row, out in enumerate(zip(images.numpy(), elements.numpy())):
            crop(self._pixels(ids[row], sources[row]), geometry, row, cfg, out)

    def batch(self, rows: np.ndarray, images: Tensor, elements: Tensor) -> Batch:
        """Return crops that `fill` has written, with their rows and ids."""
        ids = self.image_ids(rows)
        return Batch(torch.from_numpy(rows.copy()), torch.from_numpy(ids.copy()), images, elements.flatten(0, 1))

    def _pixels(self, id: int, source: bytes | np.ndarray) -> np.ndarray:
        """Return (H, W, 3) uint8, valid until the next call."""
        if isinstance(source, np.ndarray):
            return source
        if not self._buffer:
            self._buffer = bytearray(BUFFER_BYTES)
        pixels = decode_pixels(source, self._name(id), self.reader.manifest.decoding, self._buffer)
        if max(pixels.shape) <= CACHED_SIDE and self._decoded_bytes < CACHED_BYTES:
            self._decoded[id] = pixels = pixels.copy()
            self._decoded_bytes += pixels.nbytes
        return pixels

    def _name(self, id: int) -> str:
        return f"image {id} ({self.reader.name(id)})"
