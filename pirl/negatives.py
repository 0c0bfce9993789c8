"""Which rows of the bank an embedding is contrasted with: drawn for each image, or one sample a step for all.

drawn        K rows for each image and view, uniform with replacement, from a seed of its own (the paper, the zoo)
systematic   every (N/K)-th row from a random start, the same for all images of a step; with K = N, all rows
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import LossConfig


def draw_negatives(config: LossConfig, rows: int, ids: Tensor, seeds: Tensor) -> Tensor:
    """Return (B, K) int64 rows to contrast with, uniform with replacement, each sample from its own seed.

    A draw is a function of (run, epoch, image, view) alone, whatever ranks, batches and devices it meets. Every 64-bit
    word of a sample's sequence gives two draws, its low half first: r -> floor(r * rows / 2^32), so that a row's
    probability is 1/rows to within rows/2^32 of it. `seeds` (B,) int64 may be on the CPU: nothing waits for a device.
    """
    count = config.negatives
    assert isinstance(count, int), "all rows are not drawn"
    high = rows - 1 if config.exclude_positive else rows
    words = splitmix64(seeds.to(ids.device, non_blocking=True), -(-count // 2))
    halves = torch.stack([words & 0xFFFFFFFF, (words >> 32) & 0xFFFFFFFF], dim=2).flatten(1)
    drawn = halves.mul_(high).bitwise_right_shift_(32)[:, :count]
    if config.exclude_positive:
        drawn += drawn >= ids[:, None]
    return drawn


def splitmix64(seeds: Tensor, n: int) -> Tensor:
    """Return the first `n` words of the generator SplitMix64 from each seed: (B, n) int64, bits of unsigned numbers.

    Word k is a mix of seed + k * constant, so that all come at once: Steele et al., "Fast splittable pseudorandom
    number generators", OOPSLA 2014. Integers wrap around.
    """
    words = torch.arange(1, n + 1, device=seeds.device) * (0x9E3779B97F4A7C15 - (1 << 64)) + seeds[:, None]
    words ^= (words >> 30) & ((1 << 34) - 1)  # the masks take the sign's copies away
    words *= 0xBF58476D1CE4E5B9 - (1 << 64)
    words ^= (words >> 27) & ((1 << 37) - 1)
    words *= 0x94D049BB133111EB - (1 << 64)
    words ^= (words >> 31) & ((1 << 33) - 1)
    return words


@dataclass(frozen=True)
class Systematic:
    """Every `stride`-th of `rows` rows, from `start` on; each row is in the sample with probability 1 / stride."""

    rows: int
    start: int
    stride: int

    @classmethod
    def of_step(cls, config: LossConfig, rows: int, seed: int) -> Systematic:
        """Return all rows, or the sample of about `config.negatives` that a step's seed decides."""
        if not isinstance(config.negatives, int):
            return cls(rows, 0, 1)
        stride = max(1, rows // config.negatives)
        word = int(splitmix64(torch.tensor([seed]), 1)) & 0xFFFFFFFF
        return cls(rows, word * stride >> 32, stride)

    @property
    def count(self) -> int:
        """Rows in the sample."""
        return len(range(self.start, self.rows, self.stride))

    def of(self, memory: Tensor, first: int) -> Tensor:
        """Return the sample's rows among `memory`, the bank's rows from `first` on: a view."""
        return memory[max(self.start - first, (self.start - first) % self.stride) :: self.stride]

    def has(self, ids: Tensor) -> Tensor:
        """Return which of the rows `ids` are in the sample."""
        return (ids - self.start) % self.stride == 0
