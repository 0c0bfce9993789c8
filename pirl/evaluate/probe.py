"""The fast protocol: linear probes and nearest neighbours on the features of frozen backbones.

Every image passes the backbones once, without augmentation, and the probes are trained on
the stored features of the last layer, averaged over the map. It answers in seconds whether pretraining has helped. Its
numbers are not those of the model zoo, which come from `layers`: augmented crops, pooled maps of every layer, another
optimiser. Compare like with like.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pirl.config import Recipe
from pirl.data import CropDataset
from pirl.evaluate.confusion import confusion
from pirl.evaluate.execution import ALONE
from pirl.evaluate.features import ROWS, Features, moments, share_of
from pirl.evaluate.neighbours import vote
from pirl.evaluate.progress import Progress
from pirl.evaluate.sgd import Standardised, train_probes
from pirl.model import PIRL
from pirl.results import BankScores, Confusion, FewLabels, Score, Scores
from pirl.world import World

MOST_STEPS = 20_000
"""Bound of a probe's steps: from 256,001 images on, 20 epochs would take more."""


@dataclass(frozen=True)
class Protocol:
    """The probe's settings: one set for every backbone, never tuned for one of them."""

    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 20
    min_steps: int = 1500
    batch_size: int = 256
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_share: float = 0.01
    neighbours: int = 20
    knn_temperature: float = 0.07

    def batch(self, images: int) -> int:
        """Return the images of a step."""
        return min(self.batch_size, images)

    def steps(self, images: int) -> int:
        """Return the steps on `images` with labels, at most MOST_STEPS."""
        return min(MOST_STEPS, self.unbounded_steps(images))

    def unbounded_steps(self, images: int) -> int:
        """Return the steps of all epochs, and at least `min_steps`."""
        return max(self.min_steps, self.epochs * images // self.batch(images))


FAST = Protocol()


class Pair(NamedTuple):
    """Features of training and test images by one backbone."""

    train: Features
    test: Features


def as_json(protocol: Protocol) -> dict[str, Any]:
    """Return the protocol as JSON does: lists for tuples."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(protocol).items()}


def probe(
    pairs: Mapping[str, Pair],
    classes: int,
    protocol: Protocol,
    world: World = ALONE,
    progress: Progress | None = None,
) -> tuple[dict[str, dict[str, Scores]], list[str], Confusion]:
    """Return the scores of each backbone, the names of those whose features have collapsed, and the first's confusion.

    The probes of all backbones and seeds are trained together. Every rank calls it with its own rows.
    """
    progress = progress or Progress()
    sides = list(pairs.values())
    moment = [moments(side.train, world) for side in sides]
    collapsed = [name for name, each in zip(pairs, moment) if each.collapsed]
    for name in collapsed:
        progress.note(f"the features of the {name} trunk have collapsed: the same for all training images")
    train = [Standardised(side.train, each, world.device) for side, each in zip(sides, moment)]
    test = [Standardised(side.test, each, world.device) for side, each in zip(sides, moment)]
    y = sides[0].train.y
    few = [few_labels(y, protocol.label_share, seed) for seed in protocol.seeds]
    scores: list[dict[str, Scores]] = [{} for _ in sides]
    for name, subsets in (("linear", [torch.arange(len(y))] * len(few)), ("linear_1pct", few)):
        weights = train_probes(train, subsets, classes, protocol, world, progress, name)
        if name == "linear":
            errors = confusion(test[0], weights[0], classes, world)
        for side, rates in enumerate(score_probes(test, weights, world)):
            top1, top5 = ([rate[at] for rate in rates] for at in (0, 1))
            scores[side][name] = Scores(top1=spread(top1), top5=spread(top5))
    progress.begin("neighbours", len(sides) * len(sides[0].test.y), "images")
    for side, pair in enumerate(sides):
        hits = vote(*pair, classes, protocol.neighbours, protocol.knn_temperature, world, progress)
        scores[side]["knn"] = Scores(top1=share_score(hits, len(pair.test.y)))
    return dict(zip(pairs, scores)), collapsed, errors


@torch.no_grad()
def score_probes(test: Sequence[Standardised], weights: Tensor, world: World) -> list[list[tuple[float, float]]]:
    """Return (top-1, top-5) by backbone and seed, of (backbones * seeds, D + 1, classes) weights."""
    seeds, dim = len(weights) // len(test), weights.shape[1] - 1
    hits = torch.zeros(len(weights), 2, dtype=torch.int64, device=weights.device)
    for side, features in enumerate(test):
        for start in range(0, features.count, ROWS // 4):
            places = torch.arange(start, min(start + ROWS // 4, features.count))
            x, y = features.rows(places), features.labels[places + features.first].to(weights.device)
            for number in range(side * seeds, (side + 1) * seeds):
                logits = torch.addmm(weights[number, dim], x, weights[number, :dim])
                right = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
                hits[number] += torch.stack([right[:, 0].sum(), right.any(1).sum()])
    rates = (world.sum(hits).double() / len(test[0].labels)).view(len(test), seeds, 2).tolist()
    return [[(top1, top5) for top1, top5 in side] for side in rates]


def bank_neighbours(
    memory: Tensor,
    train_data: str,
    recipe: Recipe,
    test: Features,
    classes: int,
    protocol: Protocol,
    world: World = ALONE,
    progress: Progress | None = None,
) -> BankScores:
    """Nearest neighbours among this rank's rows `memory` (n, D) of the bank, for embeddings `test`.

    Each row is the mean embedding of a training image over the last epochs, so that none of these is looked at again.
    """
    images = CropDataset(train_data, recipe)
    ids = images.image_ids(np.arange(images.rows))
    train = Features(memory, torch.from_numpy(images.reader.labels()[ids]), share_of(images.rows, world).start)
    progress = progress or Progress()
    progress.begin("neighbours in the memory bank", len(test.y), "images")
    hits = vote(train, test, classes, protocol.neighbours, protocol.knn_temperature, world, progress)
    return BankScores(top1=share_score(hits, len(test.y)), rows=images.rows, dim=memory.shape[1])


@torch.no_grad()
def embed(model: PIRL, features: Features) -> Features:
    """Return the (n, dim) embeddings by the image's head, which the bank is made of, of features of the backbone."""
    parts = [model.image_head(part.float() / features.scale) for part in features.x.split(ROWS)]
    return Features(torch.cat(parts), features.y, features.first)


def share_score(hits: float, count: int) -> Score:
    """Return a share of `count` images with its standard error, as `spread` does for several runs."""
    return Score(mean=hits, std=(hits * (1 - hits) / count) ** 0.5, runs=[hits])


def spread(runs: list[float]) -> Score:
    """Return mean and standard deviation (n - 1) of a few runs."""
    return Score(mean=float(np.mean(runs)), std=float(np.std(runs, ddof=1)) if len(runs) > 1 else 0.0, runs=runs)


def few_of(members: int, share: float) -> int:
    """Return how many labels of a class of `members` images the probe with few labels has."""
    return max(1, round(share * members))


def count_few(labels: np.ndarray, share: float) -> FewLabels:
    """Return how many of the (n,) labels the probe with few labels has."""
    counts = [few_of(int(members), share) for members in np.unique(labels, return_counts=True)[1]]
    return FewLabels(labels=sum(counts), least=min(counts), most=max(counts))


def few_labels(labels: Tensor, share: float, seed: int) -> Tensor:
    """Return the ids of a share of each class, at least one image, drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    order = labels.argsort(stable=True)
    _, counts = labels.unique(return_counts=True)
    for members in order.split(counts.tolist()):
        count = few_of(len(members), share)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen)
