"""The loader of a rank: batches of crops in the order of the epochs, made by loading processes in shared memory."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import tee
from multiprocessing import forkserver, resource_tracker
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import logs
from .config import Recipe
from .data import Batch, CropDataset, Share, epoch_shares
from .device import Event, abandon_pages, lock_pages, unlock_pages, wait_for
from .errors import DataError, PirlError
from .launch import STOP_SIGNALS
from .order import open_order
from .storage.patience import longest_wait_s
from .views import open_pretext
from .world import World

MOST_SORTED = 10_000_000  # rows whose order is sorted without a warning
PREFETCH = 2  # batches requested from each worker ahead of time
POLL_S = 5  # between two checks that the workers live

log = logging.getLogger(__name__)


class Slots(Dataset[None]):
    """Crops by (epoch, rows, slot), written into shared memory that is made once: what a loading process does.

    Handing over new tensors would cost three times as much: to allocate them, to map them, and to copy.
    """

    def __init__(self, crops: CropDataset, slots: int, most: int) -> None:
        """`slots` batches of up to `most` images."""
        cfg = crops.recipe.views
        self.crops = crops
        self.images = torch.empty((slots, most, *cfg.image_shape), dtype=torch.uint8).share_memory_()
        self.elements = torch.empty((slots, most, *open_pretext(cfg).shape), dtype=torch.uint8).share_memory_()

    def __getitem__(self, index: tuple[int, np.ndarray, int]) -> None:
        epoch, rows, slot = index
        self.crops.fill(epoch, rows, *self._views(rows, slot))

    def batch(self, rows: np.ndarray, slot: int) -> Batch:
        return self.crops.batch(rows, *self._views(rows, slot))

    def _views(self, rows: np.ndarray, slot: int) -> tuple[Tensor, Tensor]:
        return self.images[slot, : len(rows)], self.elements[slot, : len(rows)]


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
        self.limit_s = max(world.timeout_s / 2, longest_wait_s(data))
        """Longest wait for a loading process, which may wait for an unavailable storage."""
        if world.is_main:
            self.dataset.reader.check()  # once for all ranks, so that damage shows at once and not in mid-epoch
        if world.is_main and recipe.train.order == "sorted" and self.dataset.rows > MOST_SORTED:
            log.warning(
                "every rank sorts %s keys at the start of an epoch -> train.order=permutation in a new run",
                f"{self.dataset.rows:,}",
            )

    def batches(self, epoch: int, samples: int) -> Generator[tuple[int, int, Share, Batch], None, None]:
        """Yield (epoch, samples of it seen before, share, batch) from the cursor to the end of the last epoch.

        The pixels of a batch are valid until the next one is requested, and until the mark that its slot was given has
        been reached. Closing the generator ends the workers.
        """
        plan, ahead = tee(self._plan(epoch, samples))
        with closing(self.load((at, share.rows) for at, _, share in ahead)) as loaded:
            for batch in loaded:
                yield *next(plan), batch

    def load(self, tasks: Iterable[tuple[int, np.ndarray]]) -> Generator[Batch, None, None]:
        """Yield the batch of each (epoch, rows), of at most a rank's share of a global batch, as `batches` does."""
        if not self.workers:
            for epoch, rows in tasks:
                yield self.dataset[epoch, rows]
            return
        own, ahead = tee(tasks)
        processes = LoadingProcesses(self.dataset, self.world, self.workers, ahead, self.limit_s)
        try:
            for number, (_, rows) in enumerate(own):
                yield processes.batch(number, rows)
            processes.unlock()
        finally:
            processes.close()

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


class Slot:
    """Host memory of one batch; loading processes write it again once the device has copied it."""

    def __init__(self) -> None:
        self.copied: Event | None = None
        """Mark after the copy; None where nothing copies while this process continues."""

    def wait(self, timeout_s: float) -> None:
        """Wait until the slot may be written again."""
        if self.copied is not None:
            wait_for(self.copied, timeout_s)
            self.copied = None


def slots_of(workers: int) -> int:
    """Return the slots of a rank: the batches under way, the one in use, and the one before, still being copied."""
    return workers * PREFETCH + 2


class LoadingProcesses:
    """The loading processes of one rank, and the shared memory that they write batches into."""

    def __init__(
        self,
        dataset: CropDataset,
        world: World,
        workers: int,
        tasks: Iterator[tuple[int, np.ndarray]],
        limit_s: float,
    ) -> None:
        """Start them on tasks (epoch, rows); a batch that takes longer than `limit_s` is an error."""
        self.world, self.tasks, self.limit_s = world, tasks, limit_s
        count = slots_of(workers)
        most = -(-dataset.recipe.train.batch_size // world.size)
        self.shared = Slots(dataset, count, most)
        self.slots = [Slot() for _ in range(count)]
        self._locked = [self.shared.images, self.shared.elements] if world.device.type != "cpu" else []
        lock_pages(self._locked)
        _start_server()
        self._loader = DataLoader(
            ErrorsAsValues(self.shared),
            batch_size=None,
            sampler=self._tasks(),
            num_workers=workers,
            prefetch_factor=PREFETCH,
            timeout=POLL_S,
            multiprocessing_context="forkserver",
            worker_init_fn=start_worker,
        )
        self._results: Any = None

    def _tasks(self) -> Iterator[tuple[int, np.ndarray, int]]:
        for number, (epoch, rows) in enumerate(self.tasks):
            slot = number % len(self.slots)
            self.slots[slot].wait(self.limit_s)
            yield epoch, rows, slot

    def batch(self, number: int, rows: np.ndarray) -> Batch:
        """Wait for the batch of the task `number`, which has these rows."""
        with self._explained():
            if self._results is None:
                self._results = iter(self._loader)
            error = self._next()
        if error is not None:
            raise error
        slot = number % len(self.slots)
        return self.shared.batch(rows, slot)._replace(slot=self.slots[slot])

    def unlock(self) -> None:
        """Let the pages of the slots go, at the end of the plan."""
        for slot in self.slots:
            slot.wait(self.limit_s)
        unlock_pages(self._locked)
        self._locked = []

    def close(self) -> None:
        """End the processes, however busy."""
        if self._results is not None:
            self._results._shutdown_workers()
            for process in self._results._workers:
                process.kill()  # because a stalled one does not see the request, and this process waits for it
        abandon_pages(self._locked)

    def _next(self) -> Any:
        """Return the next item of the workers.

        They have `limit_s`, less than other ranks wait for this one, so that the stalled rank is the first to report.
        """
        deadline = time.monotonic() + self.limit_s
        while True:
            try:
                return next(self._results)
            except RuntimeError as error:
                if "DataLoader timed out" not in str(error) or time.monotonic() > deadline:
                    raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise a `DataError` for a worker that stalls or dies."""
        try:
            yield
        except (RuntimeError, EOFError, OSError) as error:
            if "DataLoader timed out" in str(error):
                raise DataError(
                    f"the data loading processes of rank {self.world.rank} have made no batch for "
                    f"{self.limit_s:g} s at {self.world.moment}",
                    "look at them, at the disk and the storage of the shards; --timeout-s sets the time",
                ) from error
            # a worker that dies in the middle of handing over a batch shows as a broken connection
            if not isinstance(error, RuntimeError) or "DataLoader worker" in str(error):
                raise DataError(
                    f"a data loading process of rank {self.world.rank} died: {str(error) or type(error).__name__}",
                    "it may have run out of memory or of shared memory (/dev/shm); use fewer workers or more memory",
                ) from error
            raise


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
