"""The loss of two views as sums over rows: taken where the rows are, collected where the samples are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from .config import LossConfig
from .memory import MemoryBank, Queries
from .negatives import Systematic, draw_negatives
from .rowsums import Sums, Terms, softplus

EPSILON = 1.1920929e-07  # float32's, as the reference adds it, in either precision
DRAWN_AT_ONCE = 1 << 22  # draws, of as many queries as these are


@dataclass(frozen=True)
class Negatives:
    """The negatives of one step: a systematic sample for all queries, or rows drawn for each of them."""

    config: LossConfig
    sample: Systematic | None
    images: int

    @classmethod
    def of_step(cls, config: LossConfig, images: int, step_seed: int) -> Negatives:
        """Return the negatives that a recipe and a step's seed decide, for a bank of `images` rows."""
        sample = None if config.draws_per_image else Systematic.of_step(config, images, step_seed)
        return cls(config, sample, images)

    @property
    def count(self) -> int:
        """Negatives of each query, K."""
        if self.sample:
            return self.sample.count - self.config.takes_all_rows
        return int(self.config.negatives)

    def with_own(self, rows: Tensor, own: Tensor) -> Tensor:
        """Return which queries have their own row in the sample, where it must not count as a negative.

        `own` (B, D) are these rows; one that no epoch has visited is zero.
        """
        if self.config.negatives == "visited":
            return own.any(1)
        if self.sample and (self.config.takes_all_rows or self.config.exclude_positive):
            return self.sample.has(rows)
        return torch.zeros_like(rows, dtype=torch.bool)

    def sums(self, bank: MemoryBank, terms: Terms, queries: Queries, views: slice = slice(None)) -> Sums:
        """Return the sums over this rank's rows, of the queries of the views one after the other."""
        if self.sample:
            units = queries.units[views].flatten(0, 1)
            parts = [terms.over(rows, units) for rows in bank.blocks(self.sample)]
            return reduce(Sums.plus, parts) if parts else Sums.zeros(units)
        parts = [
            terms.over_drawn(bank.memory, bank.first, units, self._drawn(queries.rows, seeds))
            for units, seeds in zip(queries.units[views], queries.seeds[views])
        ]
        return Sums(*(torch.cat(column) for column in zip(*parts)))

    def _drawn(self, rows: Tensor, seeds: Tensor) -> Iterator[Tensor]:
        size = max(1, DRAWN_AT_ONCE // int(self.config.negatives))
        for part, part_seeds in zip(rows.split(size), seeds.split(size)):
            yield from draw_negatives(self.config, self.images, part, part_seeds)


def total_of_exponentials(bank: MemoryBank, negatives: Negatives, queries: Queries) -> Tensor:
    """Return the sum of exp(s) over this rank's rows that the queries' patches are scored against, float64.

    The own row counts with drawn rows, as in the reference; a systematic sample is taken as it is.
    """
    terms = Terms(negatives.config.temperature, None)
    sums = negatives.sums(bank, terms, queries, slice(0, 1))
    total = sums.value.double().sum() * math.exp(terms.scale)
    if not negatives.sample:
        own, present = bank.own(queries.rows)
        scores = (own * queries.units[0]).sum(1).double() / negatives.config.temperature
        total += (scores.exp() * present).sum()
    return total


def packed_sums(bank: MemoryBank, negatives: Negatives, terms: Terms, queries: Queries) -> Tensor:
    """Return (G, 6 + 3 D): all that this rank's rows give to each of G samples; the ranks' add up."""
    sums = negatives.sums(bank, terms, queries)
    own, _ = bank.own(queries.rows)
    positive = (own * queries.units).sum(2)
    columns = [positive.T, *(each.unflatten(0, (2, -1)).movedim(0, 1).flatten(1) for each in sums), own]
    return torch.cat(columns, dim=1)


def finish(packed: Tensor, negatives: Negatives, terms: Terms, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the (2, B) losses, the (2, B, D) gradients of the unit embeddings and (2, B, 2) mean cosines.

    `packed` is the sum of all ranks' sums for these B samples, whose rows are `rows`.
    """
    dim = packed.shape[1] // 3 - 2
    positive, value, pull, similarity, own = packed.split([2, 2, 2 * dim, 2, dim], dim=1)
    positive, value, similarity = positive.T, value.T, similarity.T
    pull = pull.unflatten(1, (2, dim)).movedim(1, 0)
    scored = negatives.sample.count if negatives.sample else negatives.count
    cosines = torch.stack([positive, similarity / scored], dim=2)
    with_own = negatives.with_own(rows, own)
    if terms.shift is None:
        losses, weight, own_slope = _cross_entropy(positive, value, with_own, terms)
        pull = pull * weight[..., None]
    else:
        score = positive / terms.temperature - terms.shift
        noise = negatives.count / negatives.images
        constant = negatives.count * math.log1p(EPSILON / noise)
        value = value - softplus(score) * with_own
        own_slope = -torch.sigmoid(-score) - torch.sigmoid(score) * with_own
        losses = value + softplus(-score) + constant
    gradient = pull.addcmul(own, own_slope[..., None]).div_(terms.temperature)
    return losses, gradient, cosines


def _cross_entropy(positive: Tensor, value: Tensor, with_own: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses, the weight of the pull, and the slope of the own row's score; float64 keeps their digits."""
    score = positive.double() / terms.temperature
    negative = torch.log(value.double()) + terms.scale
    total = torch.where(with_own, torch.maximum(negative, score), torch.logaddexp(negative, score))
    weight = torch.exp(terms.scale - total)
    own_slope = torch.where(with_own, -1.0, torch.expm1(score - total))
    return (total - score).to(value), weight.to(value), own_slope.to(value)
