"""The fast protocol: a linear probe and nearest neighbours on the features of a frozen trunk.

Every image passes the trunk once, without augmentation, and the probe is trained on
the stored features of the last layer, averaged over the map. It answers in seconds whether pretraining has helped. Its
numbers are not those of the model zoo, which come from `layers`: augmented crops, pooled maps of every layer, another
optimiser. Compare like with like.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pirl.config import Recipe
from pirl.data import CropDataset
from pirl.errors import UsageError
from pirl.model import PIRL
from pirl.results import BankScores, Score, Scores
from pirl.shards import ShardReader, check_same_decoding, listed

log = logging.getLogger(__name__)

SIMILARITIES = 1 << 28  # that are held at a time: a gigabyte


@dataclass(frozen=True)
class Protocol:
    """The probe's settings: one set for every trunk, never tuned for one of them."""

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


FAST = Protocol()


@dataclass
class Features:
    """(n, D) float32 features and (n,) int64 labels of one data set."""

    x: Tensor
    y: Tensor


def as_json(protocol: Protocol) -> dict[str, Any]:
    """Return the protocol as JSON does: lists for tuples."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(protocol).items()}


def check_labels(train: ShardReader, test: ShardReader) -> list[str]:
    """Return the classes of the training images, by which the labels of the test images are numbered from now on.

    Classes are matched by name. DataError naming those that only the test images have; a warning names those without a
    test image.
    """
    check_same_decoding(train.manifest, test.manifest)
    for reader in (train, test):
        if reader.manifest.classes is None:
            raise UsageError(
                f"{reader.storage.uri} has no labels: an evaluation needs them",
                "shard a folder with one subfolder for each class",
            )
        reader.check()
    assert train.manifest.classes is not None
    if absent := test.match_classes(train.manifest.classes):
        log.warning("%s has no image of %s: they count for nothing", test.storage.uri, listed(absent))
    return train.manifest.classes


def probe(train: Features, test: Features, classes: int, protocol: Protocol) -> dict[str, Scores]:
    """Return the scores of linear probes with all labels and with few, and of nearest neighbours."""
    mean, std = train.x.mean(0), train.x.std(0).clamp_min(1e-6)
    scaled = Features((train.x - mean) / std, train.y)
    scaled_test = Features((test.x - mean) / std, test.y)
    few = [
        linear_probe(few_labels(scaled, protocol.label_share, seed), scaled_test, classes, protocol, seed)
        for seed in protocol.seeds
    ]
    full = [linear_probe(scaled, scaled_test, classes, protocol, seed) for seed in protocol.seeds]
    return {
        "linear": Scores(top1=spread([top1 for top1, _ in full]), top5=spread([top5 for _, top5 in full])),
        "linear_1pct": Scores(top1=spread([top1 for top1, _ in few]), top5=spread([top5 for _, top5 in few])),
        "knn": Scores(top1=share_of(nearest_neighbours(train, test, classes, protocol), len(test.y))),
    }


def bank_neighbours(
    memory: Tensor, train_data: str, recipe: Recipe, test: Features, classes: int, protocol: Protocol
) -> BankScores:
    """Nearest neighbours among the rows `memory` (N, D) of the bank, for embeddings `test` (n, D).

    Each row is the mean embedding of a training image over the last epochs, so that none of these is looked at again.
    """
    images = CropDataset(train_data, recipe)
    labels = torch.from_numpy(images.reader.labels()[images.image_ids(np.arange(len(memory)))])
    share = nearest_neighbours(Features(memory, labels), test, classes, protocol)
    return BankScores(top1=share_of(share, len(test.y)), rows=len(memory), dim=memory.shape[1])


@torch.no_grad()
def embed(model: PIRL, features: Tensor) -> Tensor:
    """(n, D) float32 features of the trunk -> (n, dim) embeddings of the image's head, which the bank is made of."""
    return model.image_head(features)


def share_of(hits: float, count: int) -> Score:
    """Return a share of `count` images with its standard error, as `spread` does for several runs."""
    return Score(mean=hits, std=(hits * (1 - hits) / count) ** 0.5, runs=[hits])


def spread(runs: list[float]) -> Score:
    """Return mean and standard deviation (n - 1) of a few runs."""
    return Score(mean=float(np.mean(runs)), std=float(np.std(runs, ddof=1)) if len(runs) > 1 else 0.0, runs=runs)


def linear_probe(train: Features, test: Features, classes: int, protocol: Protocol, seed: int) -> tuple[float, float]:
    """Softmax regression by SGD with a cosine schedule: (top-1, top-5) on the test features."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(train.x.shape[1], classes)
    bound = train.x.shape[1] ** -0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.zero_()
    optimizer = torch.optim.SGD(
        layer.parameters(), protocol.lr, protocol.momentum, weight_decay=protocol.weight_decay, nesterov=True
    )
    batch = min(protocol.batch_size, len(train.y))
    steps = max(protocol.min_steps, protocol.epochs * len(train.y) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(train.y), generator=generator)
        index, order = order[:batch], order[batch:]
        optimizer.zero_grad()
        F.cross_entropy(layer(train.x[index]), train.y[index]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        best = layer(test.x).topk(min(5, classes)).indices
    hits = best == test.y[:, None]
    return hits[:, 0].double().mean().item(), hits.any(1).double().mean().item()


def few_labels(train: Features, share: float, seed: int) -> Features:
    """Return a share of each class, at least one image, drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in train.y.unique():
        members = (train.y == label).nonzero()[:, 0]
        count = max(1, round(share * len(members)))
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    index = torch.cat(chosen)
    return Features(train.x[index], train.y[index])


def nearest_neighbours(train: Features, test: Features, classes: int, protocol: Protocol) -> float:
    """Top-1 of a vote of the nearest by cosine similarity, weighted by exp(similarity / T) (Wu et al., 2018)."""
    predictions = []
    chunk = max(1, min(1000, SIMILARITIES // len(train.y)))
    for index, similarity in neighbours(train.x, test.x, min(protocol.neighbours, len(train.y)), chunk):
        votes = torch.zeros(len(similarity), classes, dtype=similarity.dtype)
        votes.scatter_add_(1, train.y[index], torch.exp(similarity / protocol.knn_temperature))
        predictions.append(votes.argmax(1))
    return (torch.cat(predictions) == test.y).double().mean().item()


def neighbours(train: Tensor, test: Tensor, count: int, chunk: int = 1000) -> Iterator[tuple[Tensor, Tensor]]:
    """For chunks of `test` in order: (c, count) indices into `train` and their cosine similarities."""
    bank = F.normalize(train).T.contiguous()
    for part in test.split(chunk):
        similarity, index = (F.normalize(part) @ bank).topk(count)
        yield index, similarity


def load_pixels(reader: ShardReader, recipe: Recipe) -> Callable[[], Iterator[Tensor]]:
    """Batches of (B, crop, crop, 3) uint8 pixels, in order of the ids, resized and centre-cropped.

    Decodes at each call, unless the images are small enough to be kept.
    """
    side = recipe.eval.crop
    keep = len(reader) * side * side * 3 <= 1 << 29
    kept: list[Tensor] = []

    def batches(size: int = 256) -> Iterator[Tensor]:
        if kept:
            yield from kept
            return
        for start in range(0, len(reader), size):
            ids = range(start, min(start + size, len(reader)))
            pixels = np.stack([centre_crop(reader.image(id), recipe) for id in ids])
            if keep:
                kept.append(torch.from_numpy(pixels))
            yield torch.from_numpy(pixels)

    return batches


def centre_crop(image: Image.Image, recipe: Recipe) -> np.ndarray:
    """(crop, crop, 3) uint8 of an RGB image: shorter side to `resize`, then the centre."""
    config, short = recipe.eval, min(image.size)
    if short != config.resize:
        width, height = (config.resize * side // short for side in image.size)  # as torchvision's Resize rounds
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((image.width - config.crop) / 2), round((image.height - config.crop) / 2)
    return np.asarray(image.crop((left, top, left + config.crop, top + config.crop)))


@torch.no_grad()
def extract(trunk: nn.Module, batches: Callable[[], Iterator[Tensor]], recipe: Recipe) -> Tensor:
    """(n, D) float32 features of the trunk in evaluation mode, with the running statistics it was trained with."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trunk = trunk.to(device).to(memory_format=torch.channels_last)
    mean = torch.tensor(recipe.views.mean, device=device).view(3, 1, 1)
    std = torch.tensor(recipe.views.std, device=device).view(3, 1, 1)
    features = []
    for pixels in batches():
        x = pixels.to(device).permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)
        features.append(trunk(x).float().cpu())
    return torch.cat(features)
