"""Sums over rows of the bank for both losses: additive, so that each rank can take its own rows.

For a query q (a unit embedding) and the scores s_n = <m_n, q> / T of some rows m_n:

cross_entropy   value = sum exp(s_n - c)         pull = sum exp(s_n - c) m_n        with a constant c
nce             value = sum softplus(s_n - z)    pull = sum sigmoid(s_n - z) m_n    with z = ln(Z * noise)

Over all rows, cross_entropy's are attention's output and log-sum-exp: kernels of attention read the bank once, and
nothing of the size of the scores exists. Without such a kernel, and for nce, blocks of rows are multiplied.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HEADROOM = 60.0  # exp(60) times 10^11 rows is finite in float32, and scores 140 below the highest possible still count
BLOCK_BYTES = 4 << 20  # of scores at a time in the multiplied form
SIMILARITY_ROWS = 1024  # of a rank, for the mean similarity to all rows, which only the log reads


class Sums(NamedTuple):
    """Sums over rows for Q queries of dimension D. Each field of two ranks' rows adds up."""

    value: Tensor
    """(Q,)"""
    pull: Tensor
    """(Q, D)"""
    similarity: Tensor
    """(Q,) sum of the cosines."""

    def plus(self, other: Sums) -> Sums:
        """Return the sums over the rows of both."""
        return Sums(*(one + more for one, more in zip(self, other)))

    @classmethod
    def zeros(cls, queries: Tensor) -> Sums:
        return cls(queries.new_zeros(len(queries)), torch.zeros_like(queries), queries.new_zeros(len(queries)))


@dataclass(frozen=True)
class Terms:
    """Function of the negatives' scores. `shift` is ln(Z * noise), or None for cross_entropy."""

    temperature: float
    shift: Tensor | None

    @property
    def scale(self) -> float:
        """The constant c of cross_entropy's sums: scores of unit vectors are at most 1/T."""
        return 1 / self.temperature - HEADROOM

    def over(self, rows: Tensor, queries: Tensor) -> Sums:
        """Return the sums over all of `rows` (R, D), a view with any stride, for the unit `queries` (Q, D)."""
        if not len(rows) or not len(queries):
            return Sums.zeros(queries)
        few = rows[:: max(1, len(rows) // SIMILARITY_ROWS)]
        similarity = queries @ (few.sum(0) * (len(rows) / len(few)))
        if self.shift is not None:
            return Sums(*self._nce(rows, queries), similarity)
        lse, mean = attend(rows, queries, 1 / self.temperature)
        value = torch.exp(lse.double() - self.scale).to(queries.dtype)
        return Sums(value, mean * value[:, None], similarity)

    def _nce(self, rows: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        assert self.shift is not None
        value, pull, _ = Sums.zeros(queries)
        for block in rows.split(_block_rows(queries)):
            scores = torch.mm(queries, block.T).div_(self.temperature).sub_(self.shift)
            value += softplus(scores).sum(1)
            pull.addmm_(scores.sigmoid_(), block)
        return value, pull

    def over_drawn(self, memory: Tensor, first: int, queries: Tensor, drawn: Iterable[Tensor]) -> Sums:
        """Return the sums over drawn rows, those among them that lie in `memory`: rows from `first` on.

        `drawn` has (K,) int64 rows of the whole bank for each query.
        """
        sums = Sums.zeros(queries)
        for query, chosen, value, pull, similarity in zip(queries, drawn, *sums):
            rows = memory[chosen[(chosen >= first) & (chosen < first + len(memory))] - first].to(query.dtype)
            scores = torch.mv(rows, query)
            similarity.copy_(scores.sum())
            scores.div_(self.temperature)
            if self.shift is None:
                slopes = scores.sub_(self.scale).exp_()
                value.copy_(slopes.sum())
            else:
                scores -= self.shift
                value.copy_(softplus(scores).sum())
                slopes = scores.sigmoid_()
            pull.copy_(torch.mv(rows.T, slopes))
        return sums


def attend(rows: Tensor, queries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return (Q,) log-sum-exp of the scores of `rows` (R, D) times `scale`, and the (Q, D) mean of rows by softmax."""
    kernel = _attention_on_gpu if rows.is_cuda else _attention_on_cpu
    groups = max(1, min(torch.get_num_threads() * 4 if not rows.is_cuda else 64, len(rows) // 512))
    size = len(rows) // groups
    parts = [kernel(rows[: groups * size].unflatten(0, (groups, size)), queries, scale)]
    if groups * size < len(rows):
        parts.append(kernel(rows[None, groups * size :], queries, scale))
    lses, means = (torch.cat(column) for column in zip(*parts))
    lse = torch.logsumexp(lses, dim=0)
    return lse, torch.einsum("gq,gqd->qd", torch.exp(lses - lse), means)


def _attention_on_cpu(rows: Tensor, queries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the (G, Q) log-sum-exp and (G, Q, D) means of G groups of rows (G, R, D)."""
    q, k = queries.expand(len(rows), 1, -1, -1), rows[:, None]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, scale=scale)
    return lse[:, 0], out[:, 0]


def _attention_on_gpu(rows: Tensor, queries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the same by the memory-efficient kernel; multiplied in blocks where it refuses the type or the shape."""
    if rows.dtype != torch.float32 or rows.shape[-1] % 4:
        return multiplied(rows, queries, scale)
    q, k = queries.expand(len(rows), 1, -1, -1), rows[:, None]
    out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, k, None, True, scale=scale)
    return lse[:, 0, : len(queries)], out[:, 0]


def multiplied(rows: Tensor, queries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return what the kernels of attention return, by products of blocks."""
    lses, means = [], []
    for group in rows:
        for block in group.split(_block_rows(queries)):
            scores = torch.mm(queries, block.T).mul_(scale)
            lses.append(torch.logsumexp(scores, dim=1))
            means.append(torch.mm(scores.sub_(lses[-1][:, None]).exp_(), block))
    return torch.stack(lses), torch.stack(means)


def _block_rows(queries: Tensor) -> int:
    return max(1, BLOCK_BYTES // (len(queries) * queries.element_size()))


def softplus(x: Tensor) -> Tensor:
    """Return ln(1 + exp(x)), exact in float64 too."""
    return F.softplus(x, threshold=40)
