"""From shards to batches: an exact order of ids, dealt to ranks, decoded and cropped by workers.

The order of an epoch is a function of (seed, epoch) alone: a permutation of the rows, cut into global batches, each
dealt to the ranks by index. No id comes twice, none is left out but what `last_batch = "drop"` drops, and a run that
stops after any number of samples goes on there on any number of ranks.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from functools import lru_cache
from multiprocessing import forkserver, resource_tracker
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .config import Recipe
from .distributed import World
from .errors import DataError, PirlError
from .shards import ShardReader, decode_image
from .views import crop_batch, uniforms

ORDER_STREAM = 250  # of the counter-based random numbers; the views use small stream numbers
NEGATIVES_STREAM = 251
CACHED_SIDE = 64  # decoded images up to this size are kept: decoding them costs more than holding them
CACHED_BYTES = 256 << 20  # for each process


class Batch(NamedTuple):
    """One rank's share of a global batch."""

    rows: Tensor
    """(B,) int64 rows of the memory bank."""
    ids: Tensor
    """(B,) int64 image ids in the data set; rows and ids are equal unless the recipe uses fewer images."""
    images: Tensor
    """(B, S, S, 3) uint8 crops."""
    patches: Tensor
    """(B * patches, P, P, 3) uint8, sample-major, each sample's in permuted order."""


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


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """The permutation of 0..rows-1 that epoch `epoch` visits: (rows,) int64, read-only."""
    keys = uniforms(seed, epoch, np.arange(rows), ORDER_STREAM, 1)[:, 0]
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order


def epoch_shares(recipe: Recipe, rows: int, epoch: int, world: World, start: int = 0) -> Iterator[Share]:
    """This rank's shares of epoch `epoch`, from the sample `start` on (a multiple of the global batch)."""
    order = epoch_order(recipe.train.seed, epoch, rows)
    size = recipe.train.batch_size
    end = rows - rows % size if recipe.train.last_batch == "drop" else rows
    for first in range(start, end, size):
        batch = order[first : min(first + size, end)]
        counts = [len(range(rank, len(batch), world.size)) for rank in range(world.size)]
        if counts[world.rank]:
            yield Share(batch[world.rank :: world.size], world.size / len(batch), counts, len(batch))
        else:
            yield Share(batch[:1], 0.0, counts, len(batch))


def negative_seeds(seed: int, epoch: int, ids: np.ndarray, view: int) -> Tensor:
    """(B,) int64 seeds from which each image's negatives are drawn: view 0 patches, 1 image."""
    draws = uniforms(seed, epoch, ids, NEGATIVES_STREAM + view, 1)[:, 0]
    return torch.from_numpy((draws * 2.0**53).astype(np.int64))


class CropDataset(Dataset[Batch]):
    """Batches by (epoch, rows): what a loader's worker does. It decodes and crops, and hands over uint8 pixels."""

    def __init__(self, data: str, recipe: Recipe) -> None:
        self.recipe = recipe
        self.reader = ShardReader(data)
        self.rows = recipe.rows(len(self.reader))
        self._decoded: dict[int, Image.Image] = {}
        self._decoded_bytes = 0

    def image_ids(self, rows: np.ndarray) -> np.ndarray:
        """The ids of bank rows: the same, or evenly spaced over the data set where the recipe uses fewer images."""
        return rows if self.rows == len(self.reader) else rows * len(self.reader) // self.rows

    def __getitem__(self, index: tuple[int, np.ndarray]) -> Batch:
        epoch, rows = index
        ids = self.image_ids(rows)
        images, patches = crop_batch(
            [self._decode(int(id)) for id in ids], ids, self.recipe.train.seed, epoch, self.recipe.views
        )
        return Batch(
            torch.from_numpy(rows.copy()),
            torch.from_numpy(ids.copy()),
            torch.from_numpy(images),
            torch.from_numpy(patches),
        )

    def _decode(self, id: int) -> Image.Image:
        image = self._decoded.get(id)
        if image is None:
            image = decode_image(self.reader.read(id), f"image {id} ({self.reader.name(id)})")
            if max(image.size) <= CACHED_SIDE and self._decoded_bytes < CACHED_BYTES:
                self._decoded[id] = image
                self._decoded_bytes += 4 * image.width * image.height
        return image


class ErrorsAsValues(Dataset[Any]):
    """Hands a `PirlError` over as an item: raised in a worker, it would arrive wrapped in that worker's traceback."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except PirlError as error:
            return error


class Loader:
    """Iterates over one rank's batches, across epochs, with `workers` processes (0: in this one)."""

    def __init__(self, data: str, recipe: Recipe, world: World, workers: int) -> None:
        self.dataset = CropDataset(data, recipe)
        self.recipe = recipe
        self.world = world
        self.workers = workers

    def batches(self, epoch: int, samples: int) -> Iterator[tuple[int, int, Share, Batch]]:
        """(epoch, samples of it seen before, share, batch) from the cursor to the end of the last epoch."""
        plan = self._plan(epoch, samples)
        if self.workers:
            _start_server()
        loader = DataLoader(
            ErrorsAsValues(self.dataset),
            batch_size=None,
            sampler=((at, share.rows) for at, _, share in self._plan(epoch, samples)),
            num_workers=self.workers,
            pin_memory=self.world.device.type == "cuda",
            multiprocessing_context="forkserver" if self.workers else None,
            worker_init_fn=start_worker if self.workers else None,
        )
        try:
            for (at, seen, share), batch in zip(plan, loader):
                if isinstance(batch, PirlError):
                    raise batch
                yield at, seen, share, Batch(*batch)
        except (RuntimeError, EOFError, OSError) as error:
            # a worker that dies in the middle of handing over a batch shows as a broken connection
            if self.workers and (not isinstance(error, RuntimeError) or "DataLoader worker" in str(error)):
                raise DataError(
                    f"a data loading process of rank {self.world.rank} died: {str(error) or type(error).__name__}",
                    "it may have run out of memory or of shared memory (/dev/shm); use fewer workers or more memory",
                ) from error
            raise

    def _plan(self, epoch: int, samples: int) -> Iterator[tuple[int, int, Share]]:
        for at in range(epoch, self.recipe.train.epochs):
            seen = samples if at == epoch else 0
            for share in epoch_shares(self.recipe, self.dataset.rows, at, self.world, seen):
                yield at, seen, share
                seen += share.size


def _start_server() -> None:
    """Start the process that workers are forked from with SIGTERM blocked, which they inherit.

    A launcher signals the whole process group, and a rank that was told to stop still needs a few batches.
    """
    resource_tracker.ensure_running()  # which unblocks these signals when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(_: int) -> None:
    """Have a loader's worker use one thread, and end when the process that it works for ends, however that ends.

    Nobody else would see to it: the server that it was forked from lives as long as a worker does.
    """
    torch.set_num_threads(1)
    employer = multiprocessing.parent_process()
    assert employer is not None

    def follow() -> None:
        employer.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
