"""The memory bank: for every image a running mean of its embeddings (paper, section 3.2).

A bank is whole, the same on every rank, or cut by rows: rank r of W owns the rows from N r / W on. What a rank asks of
rows that it may not own goes through `gather` and `collect`, which do nothing on a whole bank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MemoryConfig
from .world import World

BLOCK_ROWS = 1 << 14  # of random numbers at a time


@dataclass(frozen=True)
class Queries:
    """Samples that are to be scored against rows of the bank: this rank's, or those of all ranks in rank order."""

    rows: Tensor
    """(G,) int64 own rows of the bank."""
    units: Tensor
    """(2, G, D) unit embeddings of the patches and of the images."""
    seeds: Tensor
    """(2, G) int64 seeds of their negatives."""


class MemoryBank(nn.Module):
    """`memory` (N, D) float32 with unit rows: one for each image, by id.

    The whole bank on every rank: every rank applies the same updates.
    """

    memory: Tensor
    cut = False

    def __init__(
        self, images: int, dim: int, config: MemoryConfig, seed: int = 0, ranks: int = 1, part: range | None = None
    ) -> None:
        super().__init__()
        self.images, self.momentum = images, config.momentum
        part = range(images) if part is None else part
        self.first = part.start
        """Row of the bank that is the first of `memory`."""
        banks = 1 if config.init == "shared" else ranks
        memory = _random_rows(part, dim, seed)
        for rank in range(1, banks):
            memory += _random_rows(part, dim, seed + rank)
        self.register_buffer("memory", memory.div_(banks))

    def part_of(self, memory: Tensor) -> Tensor:
        """Return what this rank holds of a bank: of all its rows, or of this part already."""
        if len(memory) == self.images:
            return memory[self.first : self.first + len(self.memory)]
        return memory

    def own(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows `ids` (B,) as (B, D), zeros for those of other ranks, and which of them are this rank's."""
        return self.memory[ids], torch.ones_like(ids, dtype=torch.bool)

    def gather(self, world: World, queries: Queries, counts: list[int]) -> Queries:
        """Return the queries that this rank scores."""
        return queries

    def collect(self, world: World, sums: Tensor, counts: list[int]) -> Tensor:
        """Return the sums over all rows of this rank's own queries, from those of `gather`ed queries."""
        return sums

    @torch.no_grad()
    def update(self, ids: Tensor, embeddings: Tensor) -> None:
        """Move the rows `ids` (B,) towards the unit `embeddings` (B, D), all ranks' together in rank order.

        row := normalise(m * row + (1 - m) * embedding). An id that comes twice keeps its last update.
        """
        rows = self.momentum * self.memory[ids] + (1 - self.momentum) * embeddings.to(self.memory.dtype)
        self.memory[ids] = F.normalize(rows)

    def checksum(self) -> int:
        """Of the rows' bits: the same on every rank with the same rows, in whatever order they are summed.

        Integers are summed at the speed of memory, fifty times as fast as in float64. Waits for the device.
        """
        words = torch.int64 if self.memory.shape[1] % 2 == 0 else torch.int32
        return int(self.memory.view(words).sum(dtype=torch.int64))


class RowsBank(MemoryBank):
    """The rows of this rank of a bank that is cut over all ranks: `memory` holds those from `first` on."""

    cut = True

    def __init__(self, images: int, dim: int, config: MemoryConfig, seed: int, world: World) -> None:
        super().__init__(images, dim, config, seed, world.size, rows_of(images, world.rank, world.size))

    def own(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows `ids` (B,) as (B, D), zeros for those of other ranks, and which of them are this rank's."""
        present = self._present(ids)
        if not len(self.memory):
            return self.memory.new_zeros(len(ids), self.memory.shape[1]), present
        rows = self.memory[(ids - self.first).clamp(0, len(self.memory) - 1)]
        return rows * present[:, None], present

    def gather(self, world: World, queries: Queries, counts: list[int]) -> Queries:
        """Return all ranks' queries in rank order, in one message of the 32-bit words that they consist of."""
        if world.size == 1:
            return queries
        dim = queries.units.shape[2]
        parts = [*queries.units, queries.rows[:, None], queries.seeds.T]
        words = torch.cat([part.contiguous().view(torch.int32) for part in parts], dim=1)
        everyone = world.all_gather(words, counts)
        width = words.shape[1] - 6
        units = everyone[:, :width].contiguous().view(queries.units.dtype).unflatten(1, (2, dim)).movedim(1, 0)
        numbers = everyone[:, width:].contiguous().view(torch.int64)
        return Queries(numbers[:, 0], units.contiguous(), numbers[:, 1:].T)

    def collect(self, world: World, sums: Tensor, counts: list[int]) -> Tensor:
        """Return the sums over all rows of this rank's own queries, from those of `gather`ed queries."""
        return world.sum_scatter(sums, counts)

    @torch.no_grad()
    def update(self, ids: Tensor, embeddings: Tensor) -> None:
        """Move those of the rows `ids` that are this rank's; `ids` and `embeddings` are all ranks'."""
        present = self._present(ids)
        rows, dim = ids[present] - self.first, self.memory.shape[1]
        moved = self.momentum * self.memory[rows] + (1 - self.momentum) * embeddings[present].to(self.memory.dtype)
        self.memory[rows] = F.normalize(moved.view(-1, dim))

    def _present(self, ids: Tensor) -> Tensor:
        return (ids >= self.first) & (ids < self.first + len(self.memory))


def rows_of(images: int, rank: int, ranks: int) -> range:
    """Return the rows that a rank owns of a bank of `images` rows; none where there are more ranks than rows."""
    return range(images * rank // ranks, images * (rank + 1) // ranks)


def gather_updates(world: World, ids: Tensor, embeddings: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """All ranks' ids (B,) int64 and embeddings (B, D) in rank order, where rank r has `counts[r]`: in one message.

    Both travel as the 32-bit words that they consist of, bit by bit.
    """
    if world.size == 1:
        return ids, embeddings
    words = torch.cat([embeddings.contiguous().view(torch.int32), ids[:, None].contiguous().view(torch.int32)], dim=1)
    everyone = world.all_gather(words, counts)
    width = words.shape[1] - 2
    return (
        everyone[:, width:].contiguous().view(torch.int64)[:, 0],
        everyone[:, :width].contiguous().view(embeddings.dtype),
    )


def _random_rows(part: range, dim: int, seed: int) -> Tensor:
    """Return the rows `part` of a bank: uniform in [-a, a] with a = 1/sqrt(dim/3), then of unit length (Wu, 2018).

    The rows before them are drawn and dropped, block by block: no rank holds more than its part.
    """
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(dim / 3)
    spare = torch.empty(min(BLOCK_ROWS, part.start), dim)
    for first in range(0, part.start, BLOCK_ROWS):
        spare[: part.start - first].uniform_(generator=generator)
    rows = torch.empty(len(part), dim)
    for block in rows.split(BLOCK_ROWS):
        block.copy_(F.normalize(block.uniform_(generator=generator).mul_(2 * bound).sub_(bound)))
    return rows
