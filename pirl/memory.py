"""The memory bank: for every image a running mean of its embeddings (paper, section 3.2).

A bank is whole, the same on every rank, or cut by rows: rank r of W owns the rows from N r / W on. What a rank asks of
rows that it may not own goes through `gather` and `collect`, which do nothing on a whole bank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MemoryConfig
from .negatives import Systematic
from .twister import jump
from .world import World

BLOCK_ROWS = 1 << 14  # that are drawn, or copied, at a time
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
    """`memory` (N, D) float32 or bfloat16 with unit rows: one for each image, by id.

    The whole bank on every rank: every rank applies the same updates. A `blank` bank has rows of zeros, which are to be
    loaded, or which no epoch has visited.
    """

    memory: Tensor
    visited: Tensor | None
    """(N,) bool, or None where all rows count; rows that are not visited are zero."""
    cut = False

    def __init__(
        self,
        images: int,
        dim: int,
        config: MemoryConfig,
        seed: int = 0,
        ranks: int = 1,
        part: range | None = None,
        *,
        blank: bool = False,
    ) -> None:
        super().__init__()
        self.images, self.momentum = images, config.momentum
        part = range(images) if part is None else part
        self.first = part.start
        """Row of the bank that is the first of `memory`."""
        dtype = PRECISIONS[config.precision]
        banks = 1 if config.init == "shared" else ranks
        memory = torch.zeros(len(part), dim, dtype=dtype) if blank else _random_rows(part, dim, seed, banks, dtype)
        self.register_buffer("memory", memory)
        self.register_buffer("visited", None, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Type in which rows are scored and moved."""
        return torch.promote_types(self.memory.dtype, torch.float32)

    def load(self, memory: Tensor) -> None:
        """Take the rows of a checkpoint: all those of the bank, or this rank's. The tensor is kept where it can be."""
        if len(memory) == self.images != len(self.memory):
            memory = memory[self.first : self.first + len(self.memory)].clone()
        memory = memory.to(self.memory.device, self.memory.dtype)
        self.load_state_dict({"memory": memory}, assign=True)
        if self.visited is not None:
            self.count_visits()

    def count_visits(self) -> None:
        """Keep from now on which rows are not zero, and score no others."""
        self.visited = self.memory.any(1)

    def blocks(self, sample: Systematic) -> Iterator[Tensor]:
        """Yield the rows of the sample that are this rank's, in `dtype`: a view where it may be, else copied blocks."""
        rows = sample.of(self.memory, self.first)
        visited = None if self.visited is None or self.visited.all() else sample.of(self.visited, self.first)
        if visited is None and rows.dtype == self.dtype:
            yield rows
            return
        for start in range(0, len(rows), BLOCK_ROWS):
            block = rows[start : start + BLOCK_ROWS]
            if visited is not None:
                block = block[visited[start : start + BLOCK_ROWS]]
            yield block.to(self.dtype)

    def own(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows `ids` (B,) as (B, D), zeros for those of other ranks, and which of them are this rank's."""
        return self.memory[ids].to(self.dtype), torch.ones_like(ids, dtype=torch.bool)

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
        rows = self.momentum * self.memory[ids] + (1 - self.momentum) * embeddings.to(self.dtype)
        self.memory[ids] = F.normalize(rows).to(self.memory.dtype)
        if self.visited is not None:
            self.visited[ids] = True

    @torch.no_grad()
    def fill(self, first: int, embeddings: Tensor) -> None:
        """Set the rows from `first` on, which this rank has, to the unit `embeddings`."""
        self.memory[first - self.first : first - self.first + len(embeddings)] = embeddings.to(self.memory.dtype)

    def checksum(self) -> int:
        """Of the rows' bits: the same on every rank with the same rows, in whatever order they are summed.

        Integers are summed at the speed of memory, fifty times as fast as in float64. Waits for the device.
        """
        size = self.memory.shape[1] * self.memory.element_size()
        words = next(each for each in (torch.int64, torch.int32, torch.int16) if size % each.itemsize == 0)
        return int(self.memory.view(words).sum(dtype=torch.int64))


class RowsBank(MemoryBank):
    """The rows of this rank of a bank that is cut over all ranks: `memory` holds those from `first` on."""

    cut = True

    def __init__(
        self, images: int, dim: int, config: MemoryConfig, seed: int, world: World, *, blank: bool = False
    ) -> None:
        part = rows_of(images, world.rank, world.size)
        super().__init__(images, dim, config, seed, world.size, part, blank=blank)

    def own(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows `ids` (B,) as (B, D), zeros for those of other ranks, and which of them are this rank's."""
        present = self._present(ids)
        if not len(self.memory):
            return ids.new_zeros(len(ids), self.memory.shape[1], dtype=self.dtype), present
        rows = self.memory[(ids - self.first).clamp(0, len(self.memory) - 1)].to(self.dtype)
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
        super().update(ids[present] - self.first, embeddings[present])

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


def _random_rows(part: range, dim: int, seed: int, banks: int, dtype: torch.dtype) -> Tensor:
    """Return the rows `part` of a bank: uniform in [-a, a] with a = 1/sqrt(dim/3), then of unit length (Wu, 2018).

    Rows are the mean of `banks` such banks, from the seeds `seed`, `seed` + 1, ... A generator for each jumps over the
    rows before the part, so that any part costs what its own rows cost, and has the bits that it has in a whole bank.
    """
    generators = [torch.Generator().manual_seed(seed + bank) for bank in range(banks)]
    for generator in generators:
        jump(generator, part.start * dim)
    bound = 1 / math.sqrt(dim / 3)
    rows, spare = torch.empty(len(part), dim, dtype=dtype), torch.empty(min(BLOCK_ROWS, len(part)), dim)
    for block in rows.split(BLOCK_ROWS):
        unit = spare[: len(block)]
        draws = (F.normalize(unit.uniform_(generator=each).mul_(2 * bound).sub_(bound)) for each in generators)
        total = next(draws)
        for more in draws:
            total += more
        block.copy_(total.div_(banks))
    return rows
