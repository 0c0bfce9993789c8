"""First rows of the memory bank, from one forward pass of the untrained network (`memory.init = "forward"`).

The row of an image is its embedding by the image head, from its crop of the first epoch. Batch norm takes its
statistics from one batch of images that are evenly spaced over the data set, and keeps them for the pass: a row depends
on its image alone, whichever rank computes it, in whatever batch. The network itself stays as it was.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Recipe
from ..data import Batch
from ..errors import TrainingError
from ..loader import Loader
from ..logs import info
from ..memory import MemoryBank, rows_of
from ..model import PIRL, memory_format
from ..text import duration
from ..views import apply_photometrics
from ..world import World
from .feed import deliver
from .step import autocast

STATISTICS_IMAGES = 256  # at most, that give batch norm its statistics
REPORT_EVERY_S = 15.0


def fill_bank(recipe: Recipe, model: PIRL, bank: MemoryBank, loader: Loader, world: World) -> Iterator[None]:
    """Set all rows of a bank to the images' embeddings by `model`; yield after each batch.

    Each rank computes N / W rows in the order of the ids: those that it has of a cut bank. A whole bank is exchanged at
    the end. All ranks iterate together and as often.
    """
    world.moment = "the forward pass before the first step"
    started = reported = time.monotonic()
    shares = [rows_of(loader.dataset.rows, rank, world.size) for rank in range(world.size)]
    size = -(-recipe.train.batch_size // world.size)
    own = shares[world.rank]
    parts = [range(start, min(start + size, own.stop)) for start in own[::size]]
    tasks = ((0, np.arange(part.start, part.stop)) for part in parts)
    with _own_statistics(recipe, model, loader, world), closing(loader.load(tasks)) as batches:
        for number in range(max(-(-len(share) // size) for share in shares)):
            if number < len(parts):
                bank.fill(parts[number].start, _embed(recipe, model, next(batches), world))
            now = time.monotonic()
            if world.is_main and now - reported > REPORT_EVERY_S:
                reported, done = now, min(len(own), (number + 1) * size)
                eta = duration((now - started) / done * (len(own) - done))
                info(f"memory bank: embedded {done / len(own):.0%} of the images before the first step  ETA {eta}")
            yield
    if not bank.cut:
        for rank, share in enumerate(shares):
            if share:  # as bytes, which every backend sends
                world.broadcast(bank.memory[share.start : share.stop].view(torch.uint8), rank)
    if world.is_main:
        seconds = time.monotonic() - started
        info(f"memory bank: rows from one forward pass over {loader.dataset.rows:,} images, in {duration(seconds)}")


@contextmanager
def _own_statistics(recipe: Recipe, model: PIRL, loader: Loader, world: World) -> Iterator[None]:
    """Have batch norm normalise by the statistics of one batch of rank 0, the same on all ranks."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    norms = [(module, module.momentum) for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    try:
        if world.is_main:
            rows = loader.dataset.rows
            count = min(rows, STATISTICS_IMAGES)
            for module, _ in norms:
                module.momentum = 1.0  # takes the batch's own
            _embed(recipe, model.train(), loader.dataset[0, np.arange(count) * rows // count], world)
        for _, buffer in model.named_buffers():
            world.broadcast(buffer)
        model.eval()
        yield
    finally:
        for module, momentum in norms:
            module.momentum = momentum
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
        model.train()


@torch.no_grad()
def _embed(recipe: Recipe, model: PIRL, batch: Batch, world: World) -> Tensor:
    """Return (B, D) unit embeddings of a batch's images; raise `TrainingError` where they are not finite."""
    inputs = deliver(recipe, world, 0, batch)
    images = apply_photometrics(inputs.images, inputs.image_photometrics, recipe.views)
    with autocast(recipe, world):
        embeddings = model.image_head(model.trunk(images.to(memory_format=memory_format(model.trunk))))
    finite = embeddings.isfinite().all(1)
    if not finite.all():
        id = int(batch.ids[int((~finite).int().argmax())])
        raise TrainingError(
            f"the embedding of image {id} by the untrained network is NaN or infinite",
            "use train.precision=fp32, or memory.init=shared",
        )
    return F.normalize(embeddings.float())
