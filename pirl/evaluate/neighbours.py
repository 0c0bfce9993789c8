"""Nearest neighbours by cosine similarity, among rows that are dealt over ranks, in bounded memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pirl.evaluate.execution import ALONE
from pirl.evaluate.features import Features, share_of
from pirl.evaluate.progress import Progress
from pirl.world import World

QUERIES, BLOCK = 2048, 16384
"""Queries and rows whose similarities are held at a time: 134 MB."""


def nearest(rows: Tensor, queries: Tensor, count: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Return the ids (q, count) of the nearest of `rows` to each of `queries` (q, D), and their similarities.

    `first` is the id of the first row. The nearest comes first.
    """
    queries = F.normalize(queries)
    best = queries.new_empty(len(queries), 0)
    ids = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(rows), BLOCK):
        block = F.normalize(rows[start : start + BLOCK].to(queries.device).float())
        similarity, place = (queries @ block.T).topk(min(count, len(block)))
        best, ids = _best(torch.cat([best, similarity], 1), torch.cat([ids, place + first + start], 1), count)
    return ids, best


def _best(similarity: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    best, place = similarity.topk(min(count, similarity.shape[1]))
    return best, ids.gather(1, place)


def nearest_of_all(rows: Features, queries: Tensor, count: int, world: World) -> tuple[Tensor, Tensor]:
    """Return what `nearest` does among the rows of all ranks, for queries that all ranks have."""
    ids, similarity = nearest(rows.x, queries, count, rows.first)
    if world.size == 1:
        return ids, similarity
    missing = count - ids.shape[1]  # of a rank with few rows
    similarity, ids = F.pad(similarity, (0, missing), value=-torch.inf), F.pad(ids, (0, missing))
    equal = [len(queries)] * world.size
    everyone = [world.all_gather(each.contiguous(), equal) for each in (similarity, ids)]
    wide = [each.view(world.size, len(queries), count).transpose(0, 1).flatten(1) for each in everyone]
    best, ids = _best(wide[0], wide[1], count)
    return ids, best


def vote(
    train: Features,
    test: Features,
    classes: int,
    count: int,
    temperature: float,
    world: World = ALONE,
    progress: Progress | None = None,
) -> float:
    """Return top-1 of a vote of the nearest, weighted by exp(similarity / T) (Wu et al., 2018)."""
    device, progress = world.device, progress or Progress()
    labels = train.y.to(device)
    count = min(count, len(train.y))
    hits = torch.zeros((), dtype=torch.int64, device=device)
    shares = [share_of(len(test.y), world, rank) for rank in range(world.size)]
    size = max(1, QUERIES // world.size)
    for start in range(0, max(map(len, shares)), size):
        parts = [share[start : start + size] for share in shares]
        own = parts[world.rank]
        world.moment = f"the neighbours of image {own.start}"
        queries = test.x[own.start - test.first : own.stop - test.first].float().to(device)
        queries = world.all_gather(queries, [len(part) for part in parts])
        index, similarity = nearest_of_all(train, queries, count, world)
        votes = torch.zeros(len(queries), classes, device=device)
        votes.scatter_add_(1, labels[index], torch.exp(similarity / temperature))
        expected = torch.cat([test.y[part.start : part.stop] for part in parts]).to(device)
        hits += (votes.argmax(1) == expected).sum()
        progress.advance(len(queries))
    return int(hits) / len(test.y)
