"""The memory bank: for every image a running mean of its embeddings (paper, section 3.2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MemoryConfig
from .world import World


class MemoryBank(nn.Module):
    """`memory` (N, D) float32 with unit rows, and `z`, the constant of the NCE loss (negative until estimated).

    Rows are images, by id. The bank is the same on every rank: every rank applies the same updates.
    """

    memory: Tensor
    z: Tensor

    def __init__(self, images: int, dim: int, config: MemoryConfig, seed: int = 0, ranks: int = 1) -> None:
        super().__init__()
        self.momentum = config.momentum
        self.z_is_set = False
        banks = 1 if config.init == "shared" else ranks
        memory = _random_rows(images, dim, seed)
        for rank in range(1, banks):
            memory += _random_rows(images, dim, seed + rank)
        self.register_buffer("memory", memory / banks)
        self.register_buffer("z", torch.tensor(-1.0, dtype=torch.float64))

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


def _random_rows(images: int, dim: int, seed: int) -> Tensor:
    """Uniform in [-a, a] with a = 1/sqrt(dim/3), then scaled to unit length (Wu et al., 2018)."""
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(dim / 3)
    return F.normalize(torch.rand(images, dim, generator=generator).mul_(2 * bound).sub_(bound))
