"""Nearest neighbours of images by the cosine similarity of their features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from pirl.embedding.encoder import Batch, Embeddings, Encoder, report_skipped
from pirl.embedding.images import Given

SIMILARITIES = 1 << 26  # that are held at a time: a quarter of a gigabyte


@dataclass(frozen=True)
class Neighbours:
    """The nearest images of one query, the nearest first."""

    query: str
    names: list[str]
    similarities: list[float]

    @property
    def pairs(self) -> list[tuple[str, float]]:
        """Names and similarities, together."""
        return list(zip(self.names, self.similarities))


def find_neighbours(
    encoder: Encoder,
    images: Given,
    queries: Sequence[Given] | None = None,
    count: int = 5,
    *,
    batch_size: int = 64,
    workers: int | None = None,
) -> list[Neighbours]:
    """Return the nearest of `images` for each query; without queries, for each of the images among the others.

    With queries, memory grows with them and not with the images. Images that cannot be read are left out, with a
    warning.
    """
    if queries is not None:
        parts = [encoder.embed(each, batch_size=batch_size, workers=workers, errors="skip") for each in queries]
        targets = Embeddings(
            [name for part in parts for name in part.names], np.concatenate([p.features for p in parts])
        )
        return nearest(targets, encoder.batches(images, batch_size=batch_size, workers=workers, errors="skip"), count)
    every = encoder.embed(images, batch_size=batch_size, workers=workers, errors="skip")
    return nearest(every, _parts(every), count, others=True)


def nearest(queries: Embeddings, batches: Iterable[Batch], count: int, others: bool = False) -> list[Neighbours]:
    """Return the nearest images of all batches for each query; with `others` image i is not query i's neighbour."""
    targets = F.normalize(torch.from_numpy(queries.features))
    best = torch.full((len(targets), 0), -torch.inf)
    index = torch.zeros((len(targets), 0), dtype=torch.int64)
    names: list[str] = []
    skipped: list[tuple[str, str]] = []
    for batch in batches:
        skipped += batch.skipped
        similarity = targets @ F.normalize(torch.from_numpy(batch.features)).T
        places = torch.arange(len(names), len(names) + len(batch.names)).expand(len(targets), -1)
        if others:
            similarity[places == torch.arange(len(targets))[:, None]] = -torch.inf
        best, index = torch.cat([best, similarity], 1), torch.cat([index, places], 1)
        best, order = best.topk(min(count, best.shape[1]))
        index = index.gather(1, order)
        names += batch.names
    report_skipped(skipped)
    rows = zip(queries.names, best.tolist(), index.tolist())
    return [
        Neighbours(query, *_finite([(names[i], value) for value, i in zip(values, places)]))
        for query, values, places in rows
    ]


def _finite(pairs: list[tuple[str, float]]) -> tuple[list[str], list[float]]:
    """Return names and similarities without the query itself."""
    kept = [(name, round(value, 4)) for name, value in pairs if value > -np.inf]
    return [name for name, _ in kept], [value for _, value in kept]


def _parts(every: Embeddings) -> Iterator[Batch]:
    """Yield features in batches whose similarities with all images fit into memory."""
    size = max(1, SIMILARITIES // max(1, len(every.names)))
    for start in range(0, len(every.names), size):
        part = every.features[start : start + size]
        yield Batch(every.names[start : start + size], np.full(len(part), -1), part, [])
