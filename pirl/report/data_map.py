"""The map of the data: training images in two dimensions, with likely duplicates and outliers.

t-SNE (van der Maaten and Hinton, 2008) of scikit-learn places the images by the cosine of their features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pirl.evaluate import nearest
from pirl.report.gallery import Gallery
from pirl.report.pictures import Picture, picture, sprite_sheets
from pirl.shards import ShardReader

IMAGES = 1_500  # on the map
SMALLEST = 5  # images that make a map
NEAR = 8  # neighbours of each image
LISTED = 12  # pairs and outliers
OUTLIER_NEIGHBOURS = 5  # whose mean similarity is compared
PERPLEXITY = 30
COMPONENTS = 50  # principal components that t-SNE is given
STEPS = 500
QUERIES = 1_024  # that are compared at a time
CANDIDATES = 100  # pairs whose pixels are compared
SAME_SIDE, SAME_LEVELS = 32, 8.0
"""Likely duplicates differ by less than 8 of 255 levels (root mean square) at 32x32 pixels."""


@dataclass(frozen=True)
class Member:
    """A listed image; `point` is its number on the map."""

    point: int
    name: str
    label: str | None
    picture: Picture


@dataclass(frozen=True)
class Pair:
    """Two images that are likely the same; `exact` where their files have the same bytes."""

    first: Member
    second: Member
    similarity: float
    exact: bool

    @property
    def detail(self) -> str:
        alike = "equal files" if self.exact else f"cosine {self.similarity:.3f}"
        return f"{alike}, two classes" if self.first.label != self.second.label else alike


@dataclass(frozen=True)
class Outlier:
    """An image far from all others: the mean cosine with its nearest."""

    member: Member
    similarity: float


@dataclass(frozen=True)
class DataMap:
    """The section of the page. `points` is for the script, `sheets` are the thumbnails."""

    checkpoint: str
    images: int
    searched: int
    copies: int
    """Images of the whole data set whose file has the bytes of an earlier one."""
    points: dict[str, Any]
    sheets: list[Picture]
    pairs: list[Pair]
    outliers: list[Outlier]

    @property
    def shown(self) -> int:
        return len(self.points["x"])


def draw_map(gallery: Gallery) -> DataMap | None:
    """Return the map of a gallery's images; None for fewer than five images.

    At most `IMAGES` are drawn: those of the lists, then the first of the gallery's random order.
    """
    reader = gallery.reader
    if len(reader) < SMALLEST:
        return None
    copies = equal_files(reader)
    exact = [(int(a), int(b)) for a, b in copies[:LISTED]]
    gallery = gallery.including([id for pair in exact for id in pair])
    index, similarity = nearest_others(gallery.pretrained, NEAR)
    twins = [*exact, *likely_duplicates(gallery, index, similarity, {*exact})][:LISTED]
    spread = similarity[:, :OUTLIER_NEIGHBOURS].mean(1)
    remote = torch.argsort(spread, stable=True)[:LISTED].tolist()

    place = {id: row for row, id in enumerate(gallery.ids)}
    first = [place[id] for pair in twins for id in pair] + remote
    rows = list(dict.fromkeys([*first, *range(len(gallery.ids))]))[:IMAGES]
    point = {row: number for number, row in enumerate(rows)}
    features = F.normalize(gallery.pretrained[rows])

    def member(row: int) -> Member:
        id = gallery.ids[row]
        return Member(point[row], reader.name(id), class_of(reader, id), picture(reader.image(id), 160))

    def cosine(a: int, b: int) -> float:
        return float(features[point[a]] @ features[point[b]])

    pairs = [(place[a], place[b], (a, b) in exact) for a, b in twins]
    ids = [gallery.ids[row] for row in rows]
    cell, sheets = sprite_sheets(reader.image(id) for id in ids)
    return DataMap(
        checkpoint=gallery.trunks.checkpoint,
        images=len(reader),
        searched=len(gallery.ids),
        copies=len(copies),
        points=points_of(reader, ids, features, gallery.trunks.recipe.train.seed) | cell,
        sheets=sheets,
        pairs=[Pair(member(a), member(b), cosine(a, b), same) for a, b, same in pairs],
        outliers=[Outlier(member(row), float(spread[row])) for row in remote],
    )


def points_of(reader: ShardReader, ids: list[int], features: torch.Tensor, seed: int) -> dict[str, Any]:
    """Return place, class, name and neighbours of each image, as the page's script reads them."""
    near, cosines = nearest_others(features, NEAR)
    places = embed(features.numpy(), seed)
    return {
        "x": places[:, 0].tolist(),
        "y": places[:, 1].tolist(),
        "ids": ids,
        "names": [reader.name(id) for id in ids],
        "labels": [reader.label(id) for id in ids],
        "classes": reader.manifest.classes or [],
        "near": near.tolist(),
        "cosines": [[round(value, 3) for value in row] for row in cosines.tolist()],
    }


def embed(features: np.ndarray, seed: int) -> np.ndarray:
    """Return places (n, 2) of unit features (n, D), integers from 0 to 10,000; the same for the same seed."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    count = len(features)
    if np.ptp(features, 0).max() < 1e-6:  # collapsed features: all images are at one place
        return np.full((count, 2), 5_000)
    with threadpool_limits(1):  # the order of t-SNE's sums depends on the number of threads
        axes = PCA(min(COMPONENTS, *features.shape), svd_solver="full").fit_transform(features.astype(np.float64))
        tsne = TSNE(perplexity=min(PERPLEXITY, (count - 1) / 3), max_iter=STEPS, random_state=seed % 2**32)
        places = tsne.fit_transform(axes)
    low, high = places.min(0), places.max(0)
    return np.rint((places - low) / np.maximum(high - low, 1e-9) * 10_000).astype(int)


def nearest_others(features: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows nearest to each row (n, count), without the row itself, and their cosines."""
    count = min(count, len(features) - 1)
    indexes, similarities = [], []
    for start in range(0, len(features), QUERIES):
        part = features[start : start + QUERIES]
        index, similarity = nearest(features, part, count + 1)
        own = index == torch.arange(start, start + len(part))[:, None]
        own[~own.any(1), -1] = True  # more copies than neighbours: the last gives way
        indexes.append(index[~own].view(len(part), count))
        similarities.append(similarity[~own].view(len(part), count))
    return torch.cat(indexes), torch.cat(similarities)


def equal_files(reader: ShardReader) -> list[tuple[int, int]]:
    """Return the ids of each image whose size and checksum an earlier image has, behind that image's id."""
    checksums = reader.checksums()
    if checksums is None:
        return []
    keys = checksums + (reader.sizes() << 32)
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    return sorted((int(order[at]), int(order[at + 1])) for at in same)


def likely_duplicates(
    gallery: Gallery, index: torch.Tensor, similarity: torch.Tensor, except_for: set[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return pairs of ids that are nearest by features and nearly equal by pixels, the nearest first."""
    order = torch.argsort(similarity[:, 0], descending=True, stable=True)[: 2 * CANDIDATES].tolist()
    rows = dict.fromkeys(tuple(sorted((row, int(index[row, 0])))) for row in order)
    pairs = []
    for a, b in list(rows)[:CANDIDATES]:
        first, second = sorted((gallery.ids[a], gallery.ids[b]))
        if (first, second) not in except_for and alike(gallery.reader, first, second):
            pairs.append((first, second))
    return pairs


def alike(reader: ShardReader, first: int, second: int) -> bool:
    """Return whether the pixels of two images are nearly equal."""
    one, other = (
        np.asarray(reader.image(id).resize((SAME_SIDE, SAME_SIDE), Image.Resampling.BOX), np.float32)
        for id in (first, second)
    )
    return float(np.sqrt(np.mean((one - other) ** 2))) < SAME_LEVELS


def class_of(reader: ShardReader, id: int) -> str | None:
    """Return the class name of an image; None without labels."""
    classes = reader.manifest.classes
    return classes[reader.label(id)] if classes else None
