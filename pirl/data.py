"""From shards to batches: an exact order of ids, dealt to ranks, decoded and cropped by workers.

The order of an epoch is a function of (seed, epoch) alone: a permutation of the rows (`order`), cut into global
batches, each dealt to the ranks by index. No id comes twice. None is left out, except those that `last_batch = "drop"`
drops. A run that stops after any number of samples resumes there, on any number of ranks.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import logs
from .config import Recipe
from .errors import DataError, PirlError
from .launch import STOP_SIGNALS
from .order import open_order
from .shards import ShardReader, decode_pixels, image_size
from .views import crop, draw_geometry, uniforms
from .world import World

NEGATIVES_STREAM = 251  # of the counter-based random numbers, and 252; see `views` and `order` for others
STEP_STREAM = 254
MOST_SORTED = 10_000_000  # rows whose order is sorted without a warning
CACHED_SIDE = 64  # decoded images up to this size are kept: decoding them costs more than holding them
CACHED_BYTES = 256 << 20  # for each process
BUFFER_BYTES = 12 << 20  # larger images are decoded into memory of their own
PREFETCH = 2  # batches that each worker is asked for ahead of time
POLL_S = 5  # between two looks whether the workers live


log = logging.getLogger(__name__)


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
    """Return (B,) int64 seeds from which each image's negatives are drawn: view 0 patches, 1 image."""
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
        patches = torch.empty(len(rows), *cfg.patch_shape, dtype=torch.uint8)
        self.fill(epoch, rows, images, patches)
        return self.batch(rows, images, patches)

    def fill(self, epoch: int, rows: np.ndarray, images: Tensor, patches: Tensor) -> None:
        """Write the crops of `rows` into (B, S, S, 3) and (B, patches, P, P, 3) uint8."""
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
        for row, out in enumerate(zip(images.numpy(), patches.numpy())):
            crop(self._pixels(ids[row], sources[row]), geometry, row, cfg, out)

    def batch(self, rows: np.ndarray, images: Tensor, patches: Tensor) -> Batch:
        """Return crops that `fill` has written, with their rows and ids."""
        ids = self.image_ids(rows)
        return Batch(torch.from_numpy(rows.copy()), torch.from_numpy(ids.copy()), images, patches.flatten(0, 1))

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


class Slots(Dataset[None]):
    """Crops by (epoch, rows, slot), written into shared memory that is made once: what a loading process does.

    Handing over new tensors would cost three times as much: to allocate them, to map them, and to copy.
    """

    def __init__(self, crops: CropDataset, slots: int, most: int) -> None:
        """`slots` batches of up to `most` images."""
        cfg = crops.recipe.views
        self.crops = crops
        self.images = torch.empty((slots, most, *cfg.image_shape), dtype=torch.uint8).share_memory_()
        self.patches = torch.empty((slots, most, *cfg.patch_shape), dtype=torch.uint8).share_memory_()

    def __getitem__(self, index: tuple[int, np.ndarray, int]) -> None:
        epoch, rows, slot = index
        self.crops.fill(epoch, rows, *self._views(rows, slot))

    def batch(self, rows: np.ndarray, slot: int) -> Batch:
        return self.crops.batch(rows, *self._views(rows, slot))

    def _views(self, rows: np.ndarray, slot: int) -> tuple[Tensor, Tensor]:
        return self.images[slot, : len(rows)], self.patches[slot, : len(rows)]


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
        if world.is_main:
            self.dataset.reader.check()  # once for all ranks, so that damage shows at once and not in mid-epoch
        if world.is_main and recipe.train.order == "sorted" and self.dataset.rows > MOST_SORTED:
            log.warning(
                "every rank sorts %s keys at the start of an epoch -> train.order=permutation in a new run",
                f"{self.dataset.rows:,}",
            )

    def batches(self, epoch: int, samples: int) -> Generator[tuple[int, int, Share, Batch], None, None]:
        """Yield (epoch, samples of it seen before, share, batch) from the cursor to the end of the last epoch.

        The pixels of a batch are there until the next one is asked for. Closing it ends the workers.
        """
        if not self.workers:
            for at, seen, share in self._plan(epoch, samples):
                yield at, seen, share, self.dataset[at, share.rows]
            return
        slots = self.workers * PREFETCH + 1  # batches that are under way, and the one that is in use
        most = -(-self.recipe.train.batch_size // self.world.size)
        shared = Slots(self.dataset, slots, most)
        pins = Pins([shared.images, shared.patches], slots) if self.world.device.type == "cuda" else None

        def tasks() -> Iterator[tuple[int, np.ndarray, int]]:
            for number, (at, _, share) in enumerate(self._plan(epoch, samples)):
                if pins:
                    pins.wait(number % slots)
                yield at, share.rows, number % slots

        _start_server()
        loader = DataLoader(
            ErrorsAsValues(shared),
            batch_size=None,
            sampler=tasks(),
            num_workers=self.workers,
            prefetch_factor=PREFETCH,
            timeout=POLL_S,
            multiprocessing_context="forkserver",
            worker_init_fn=start_worker,
        )
        ready: Any = None
        try:
            ready = iter(loader)
            for number, (at, seen, share) in enumerate(self._plan(epoch, samples)):
                error = self._next(ready)
                if error is not None:
                    raise error
                yield at, seen, share, shared.batch(share.rows, number % slots)
                if pins:
                    pins.used(number % slots)
        except (RuntimeError, EOFError, OSError) as error:
            if "DataLoader timed out" in str(error):
                raise DataError(
                    f"the data loading processes of rank {self.world.rank} have made no batch for "
                    f"{self.world.timeout_s / 2:g} s at {self.world.moment}",
                    "look at them, at the disk and the storage of the shards; --timeout-s sets the time, twice of this",
                ) from error
            # a worker that dies in the middle of handing over a batch shows as a broken connection
            if not isinstance(error, RuntimeError) or "DataLoader worker" in str(error):
                raise DataError(
                    f"a data loading process of rank {self.world.rank} died: {str(error) or type(error).__name__}",
                    "it may have run out of memory or of shared memory (/dev/shm); use fewer workers or more memory",
                ) from error
            raise
        finally:
            if ready is not None:
                ready._shutdown_workers()
                for process in ready._workers:
                    process.kill()  # one that hangs has not heard it, and this process could not end before it
            if pins:
                pins.release()

    def _next(self, ready: Iterator[Any]) -> Any:
        """Return the next item of the workers.

        They have half of the time that other ranks wait for this one, so that the stalled rank is the first to report.
        """
        deadline = time.monotonic() + self.world.timeout_s / 2
        while True:
            try:
                return next(ready)
            except RuntimeError as error:
                if "DataLoader timed out" not in str(error) or time.monotonic() > deadline:
                    raise

    def batch_ids(self, epoch: int, start: int, stop: int) -> list[int]:
        """Return the ids of the images that all ranks together see as the samples `start` to `stop` of an epoch."""
        train = self.recipe.train
        rows = open_order(train.order, train.seed, epoch, self.dataset.rows).part(start, stop)
        return self.dataset.image_ids(rows).tolist()

    def _plan(self, epoch: int, samples: int) -> Iterator[tuple[int, int, Share]]:
        for at in range(epoch, self.recipe.train.epochs):
            seen = samples if at == epoch else 0
            for share in epoch_shares(self.recipe, self.dataset.rows, at, self.world, seen):
                yield at, seen, share
                seen += share.size


class Pins:
    """Slots in page-locked memory, from which a GPU copies while this process continues.

    A slot must not be written again before the GPU has done what was queued while the slot was in use.
    """

    def __init__(self, tensors: Sequence[Tensor], slots: int) -> None:
        self.tensors = tensors
        self.events = [torch.cuda.Event() for _ in range(slots)]
        for tensor in tensors:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))

    def used(self, slot: int) -> None:
        self.events[slot].record()

    def wait(self, slot: int) -> None:
        self.events[slot].synchronize()  # at once where nothing was recorded

    def release(self) -> None:
        torch.cuda.synchronize()
        for tensor in self.tensors:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr()))


def _start_server() -> None:
    """Start the process that workers are forked from with the stop signals blocked, which they inherit.

    A launcher signals the whole process group, and a rank that stops still needs a few batches.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    resource_tracker.ensure_running()  # it inherits the mask, but unblocks SIGTERM and SIGINT in this process
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(_: int) -> None:
    """Have a loader's worker use one thread, and end when the process that it works for ends, however that ends.

    Nobody else would see to it: the server that it was forked from lives as long as a worker does.
    """
    logs.guard_streams()
    torch.set_num_threads(1)
    employer = multiprocessing.parent_process()
    assert employer is not None

    def follow() -> None:
        employer.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
