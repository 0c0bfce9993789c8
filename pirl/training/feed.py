"""Batches on the device of the steps: copied on a stream of their own, each while the step before it runs."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import Recipe
from ..data import Batch, Share, negative_seeds
from ..device import CopyStream
from ..loader import Loader
from ..views import Photometrics, draw_photometrics, open_pretext
from ..views.wide import Stages, move_stages, stage_arrays
from ..world import World


class Inputs(NamedTuple):
    """A rank's share of a global batch, on the device of the step."""

    ids: np.ndarray
    """(B,) int64 image ids, on the host."""
    rows: Tensor
    """(B,) int64 rows of the memory bank."""
    seeds: Tensor
    """(2, B) int64 seeds of the negatives."""
    images: Tensor
    """(B, S, S, 3) uint8 crops."""
    elements: Tensor
    """(B * elements, P, P, 3) uint8, sample-major: the second views."""
    image_photometrics: Photometrics | Stages
    element_photometrics: Photometrics | Stages

    @property
    def copied(self) -> list[Tensor]:
        """Tensors that were copied to the device."""
        stages = [each for each in (self.image_photometrics, self.element_photometrics) if isinstance(each, dict)]
        columns = [column for each in stages for values in each.values() for column in values]
        return [self.rows, self.seeds, self.images, self.elements, *columns]


def deliver(recipe: Recipe, world: World, epoch: int, batch: Batch) -> Inputs:
    """Return a batch with its random parameters on the device, without waiting for it.

    A GPU gets three messages from page-locked memory: images, second views, and all else in one.
    """
    seed, views, ids = recipe.train.seed, recipe.views, batch.ids.numpy()
    seeds = torch.stack([negative_seeds(seed, epoch, ids, view) for view in (0, 1)])
    images = draw_photometrics(views, seed, epoch, ids, [0])
    elements = open_pretext(views).photometrics(seed, epoch, ids)
    if world.device.type == "cpu":
        return Inputs(ids, batch.rows, seeds, batch.images, batch.elements, images, elements)
    numbers = {"rows": [batch.rows.numpy()], "seeds": [seeds.numpy()]}
    sets = [numbers, stage_arrays(images, views), stage_arrays(elements, views)]
    moved, image_stages, element_stages = move_stages(sets, world.device)
    pixels, second = (
        (each if batch.slot else lock_copy(each)).to(world.device, non_blocking=True)
        for each in (batch.images, batch.elements)
    )
    return Inputs(ids, moved["rows"][0], moved["seeds"][0], pixels, second, image_stages, element_stages)


def lock_copy(pixels: Tensor) -> Tensor:
    """Return a copy in page-locked memory, of pixels that no loading process wrote there."""
    return pixels.pin_memory()


class Feed:
    """The batches of a loader as inputs of steps."""

    def __init__(self, loader: Loader, recipe: Recipe, world: World) -> None:
        self.loader, self.recipe, self.world = loader, recipe, world
        self.stream = open_stream(world.device)

    def batches(self, epoch: int, samples: int) -> Generator[tuple[int, int, Share, Inputs], None, None]:
        """Yield (epoch, samples of it seen before, share, inputs) from the cursor to the end of the last epoch.

        A GPU has the step before still queued when the next batch is requested, so the two overlap. Closing the
        generator ends the loading processes.
        """
        with closing(self.loader.batches(epoch, samples)) as batches:
            for at, seen, share, batch in batches:
                yield at, seen, share, self._deliver(at, batch)

    def _deliver(self, epoch: int, batch: Batch) -> Inputs:
        if self.stream is None:
            return deliver(self.recipe, self.world, epoch, batch)
        with self.stream.copying():
            inputs = deliver(self.recipe, self.world, epoch, batch)
        copied = self.stream.mark()
        if batch.slot:
            batch.slot.copied = copied
        self.stream.hand_over(copied, inputs.copied)
        return inputs


def open_stream(device: torch.device) -> CopyStream | None:
    """Return the stream of the copies to a GPU; None on a CPU, which copies nothing."""
    return CopyStream(device) if device.type == "cuda" else None
