"""The linear protocol of the model zoo: a linear classifier on every layer of a frozen trunk, trained on random crops.

Seven heads share each pass through the trunk, which stays as it is, the running statistics of its batch norm included.
A head is batch norm on a pooled map of about 9,000 values, then one linear layer; the averaged last map has one such
head and one without batch norm. The losses are added up, so that each head learns what it would learn alone. SGD for 28
epochs, tested on centre crops after each: VISSL's `eval_resnet_8gpu_transfer_in1k_linear` (after Goyal et al., ICCV
2019), which runs on 8 GPUs with batch norm over all of their 256 images; one process sees the whole batch in ours.

The published numbers of the zoo are, by all signs, those of head res5 after the last epoch. The fast protocol of
`probe` reads the averaged last map only and sees each image once: it costs one epoch where this one costs 28.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pirl.config import Recipe
from pirl.errors import DataError, TrainingError, UsageError
from pirl.evaluate.crops import FLIP, RATIO, SCALE, Chunk, LabelledCrops
from pirl.evaluate.layers import LAYERS, FrozenLayers, Shapes
from pirl.evaluate.load import load_trunk, require_finite
from pirl.evaluate.probe import check_labels
from pirl.model import weights_digest
from pirl.optim import set_learning_rate
from pirl.order import epoch_order
from pirl.run import LAYERS as LAYERS_RESULT
from pirl.run import Run
from pirl.shards import ShardReader
from pirl.text import duration

ZOO_EPOCHS, ZOO_DROPS = 28, (8, 16, 24)
ZOO_RESIZE, ZOO_CROP = 256, 224
CHUNK = 32  # images that go through the trunk at a time: it is frozen, so this changes no statistics
KEPT_BYTES = 1 << 29  # of test features, which are the same in every epoch
REPORT_EVERY_S = 15.0

HEADS = {**{name: name for name in LAYERS[:5]}, "res5avg_bn": "res5avg", "res5avg": "res5avg"}
"""Head -> the layer it reads, in the reference's order. Only the last one has no batch norm."""


Part = tuple[dict[str, Tensor], Tensor]
"""Features of n images by layer, (n, C, h, w) each, and their labels (n,)."""


@dataclass(frozen=True)
class ZooProtocol:
    """The zoo's settings. Another number of epochs moves the drops of the learning rate in proportion."""

    epochs: int = ZOO_EPOCHS
    batch_size: int = 256
    base_lr: float = 0.01
    """For a batch of 256; scaled linearly with the batch."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    """On weights and biases of linear layers, not on batch norm."""
    seed: int = 1

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2:
            raise UsageError(
                f"{self.epochs} epochs in batches of {self.batch_size} cannot be trained",
                "give at least 1 epoch and 2 images a batch: batch norm needs two",
            )

    def drops(self) -> list[int]:
        """Return the epochs from which the learning rate is a tenth of the one before."""
        return [-(-drop * self.epochs // ZOO_EPOCHS) for drop in ZOO_DROPS]

    def learning_rate(self, epoch: int, batch: int) -> float:
        """Of the epoch number `epoch`, from 0, with `batch` images a step."""
        return self.base_lr * batch / 256 / 10.0 ** sum(epoch >= drop for drop in self.drops())


class Head(nn.Module):
    """Batch norm over the channels of a pooled map (or none), then a linear layer on all of its values."""

    def __init__(self, shape: tuple[int, int, int], classes: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(shape[0]) if norm else nn.Identity()
        self.linear = nn.Linear(math.prod(shape), classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, h, w) -> (n, classes)."""
        return self.linear(self.norm(x).flatten(1))


def build_heads(shapes: Shapes, classes: int, seed: int) -> nn.ModuleDict:
    """All heads, with PyTorch's default initial weights from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleDict({name: Head(shapes[layer], classes, name != "res5avg") for name, layer in HEADS.items()})


def head_optimizer(heads: nn.ModuleDict, protocol: ZooProtocol) -> torch.optim.SGD:
    """Nesterov's SGD, with decay on the linear layers' weights and biases; the rate is set before every epoch."""
    groups: dict[str, list[Tensor]] = {"linear": [], "norm": []}
    for module in heads.modules():
        if isinstance(module, nn.Linear | nn.BatchNorm2d):
            groups["linear" if isinstance(module, nn.Linear) else "norm"] += [module.weight, module.bias]
    decay = {"linear": protocol.weight_decay, "norm": 0.0}
    return torch.optim.SGD(
        [{"name": name, "params": params, "weight_decay": decay[name]} for name, params in groups.items() if params],
        lr=protocol.base_lr,
        momentum=protocol.momentum,
        nesterov=True,
        fused=True,
    )


def split_batches(order: np.ndarray, size: int) -> list[np.ndarray]:
    """Batches of `size`, a smaller one last. A single image left joins the one before: batch norm needs two."""
    return np.split(order, range(size, len(order) - 1, size))


def train_step(
    heads: nn.ModuleDict, optimizer: torch.optim.Optimizer, features: dict[str, Tensor], labels: Tensor
) -> Tensor:
    """One step of all heads on one batch; returns their losses (heads,), each the mean cross entropy of the batch."""
    losses = torch.stack([F.cross_entropy(head(features[HEADS[name]]), labels) for name, head in heads.items()])
    optimizer.zero_grad(set_to_none=True)
    losses.sum().backward()
    optimizer.step()
    return losses.detach()


def top_hits(scores: Tensor, labels: Tensor) -> Tensor:
    """(2,) int64: of (n, classes) scores, how many have their label first, and how many among the first five."""
    hits = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    return torch.stack([hits[:, 0].sum(), hits.any(1).sum()])


@torch.no_grad()
def score_heads(heads: nn.ModuleDict, parts: Iterable[Part], images: int) -> dict[str, Any]:
    """{"top1": {head: share}, "top5": ...} over all parts."""
    heads.eval()
    hits: dict[str, Any] = dict.fromkeys(heads, 0)
    for features, labels in parts:
        for name, head in heads.items():
            hits[name] += top_hits(head(features[HEADS[name]]), labels)
    heads.train()
    return {f"top{k}": {name: int(hits[name][at]) / images for name in heads} for at, k in ((0, 1), (1, 5))}


class CentreFeatures:
    """The test images' features in parts: computed again in each epoch, unless they are few enough to be kept."""

    def __init__(self, layers: FrozenLayers, crops: LabelledCrops, workers: int) -> None:
        self.layers, self.crops, self.workers = layers, crops, workers
        size = 4 * sum(map(math.prod, layers.shapes.values())) * len(crops)
        self.kept: list[Part] | None = [] if size <= KEPT_BYTES else None

    def __iter__(self) -> Iterator[Part]:
        if self.kept:
            yield from self.kept
            return
        chunks: list[Chunk] = [(None, ids) for ids in _chunks(np.arange(len(self.crops)))]
        for (_, ids), (pixels, labels) in zip(chunks, self.crops.load(chunks, self.workers)):
            part = self.layers(pixels), labels.to(self.layers.device)
            require_finite(part[0]["res5avg"], ids, self.crops.reader, "pretrained")
            if self.kept is not None:
                self.kept.append(part)
            yield part


def _chunks(ids: np.ndarray) -> list[np.ndarray]:
    return np.split(ids, range(CHUNK, len(ids), CHUNK))


def train_heads(
    heads: nn.ModuleDict,
    layers: FrozenLayers,
    train: LabelledCrops,
    test: LabelledCrops,
    protocol: ZooProtocol,
    workers: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Train `heads` in place. Returns, for each epoch, its learning rate, losses, and top-1 and top-5 on `test`."""
    heads.to(layers.device).train()
    optimizer = head_optimizer(heads, protocol)
    size = min(protocol.batch_size, len(train))
    test_features = CentreFeatures(layers, test, workers)
    started = reported = time.monotonic()
    records = []
    for epoch in range(protocol.epochs):
        rate = protocol.learning_rate(epoch, size)
        set_learning_rate(optimizer, rate)
        epoch_started, seen = time.monotonic(), 0
        total = torch.zeros(len(heads), device=layers.device)
        batches = [_chunks(ids) for ids in split_batches(epoch_order(protocol.seed, epoch, len(train)), size)]
        pixels = train.load([(epoch, ids) for chunks in batches for ids in chunks], workers)
        for chunks in batches:
            features, labels = _gather((layers(x), y) for x, y in islice(pixels, len(chunks)))
            total += train_step(heads, optimizer, features, labels.to(layers.device)) * len(labels)
            seen += len(labels)
            if time.monotonic() - reported > REPORT_EVERY_S:
                reported = time.monotonic()
                progress(
                    f"epoch {epoch + 1}: {seen:,} of {len(train):,}, {seen / (reported - epoch_started):.0f} images/s"
                )
        losses = dict(zip(heads, (total / seen).tolist()))
        if broken := [name for name, loss in losses.items() if not math.isfinite(loss)]:
            raise TrainingError(
                f"the loss of {', '.join(broken)} is not finite in epoch {epoch + 1}",
                "look for values that are not finite in the trunk: `pirl report` shows how its training went",
            )
        scores = score_heads(heads, test_features, len(test))
        reported = time.monotonic()
        records.append(
            {"epoch": epoch + 1, "lr": rate, "loss": losses, **scores, "seconds": round(reported - epoch_started, 2)}
        )
        left = (reported - started) / (epoch + 1) * (protocol.epochs - epoch - 1)
        shown = "  ".join(f"{name} {100 * top1:.1f}" for name, top1 in scores["top1"].items())
        progress(f"epoch {epoch + 1}/{protocol.epochs}  lr {rate:.3g}  top-1 in %: {shown}  left {duration(left)}")
    return records


def _gather(parts: Iterator[Part]) -> Part:
    features, labels = zip(*parts)
    return {name: torch.cat([part[name] for part in features]) for name in features[0]}, torch.cat(labels)


def describe(
    protocol: ZooProtocol, recipe: Recipe, layers: FrozenLayers, images: int
) -> tuple[dict[str, Any], list[str]]:
    """Return the protocol as it is applied to `images` training images, and its differences from the zoo's."""
    batch = min(protocol.batch_size, images)
    applied = {
        "name": "zoo",
        **asdict(protocol),
        "batch_size": batch,
        "lr_drops": protocol.drops(),
        "resize": recipe.eval.resize,
        "crop": recipe.eval.crop,
        "crop_scale": list(SCALE),
        "crop_ratio": list(RATIO),
        "flip": FLIP,
        "heads": {
            name: {
                "layer": layer,
                "pooling": repr(layers.pools[layer]),
                "features": math.prod(layers.shapes[layer]),
                "batch_norm": name != "res5avg",
            }
            for name, layer in HEADS.items()
        },
    }
    differences = []
    if protocol.epochs != ZOO_EPOCHS:
        drops = [str(drop + 1) for drop in protocol.drops() if drop < protocol.epochs]
        differences.append(
            f"{protocol.epochs} epochs for {ZOO_EPOCHS}; the learning rate drops in proportion, "
            + (f"to a tenth before epochs {', '.join(drops)}" if drops else "never in this one")
        )
    if batch != ZooProtocol.batch_size:
        differences.append(f"batches of {batch} for {ZooProtocol.batch_size}; the learning rate is scaled with them")
    if (recipe.eval.resize, recipe.eval.crop) != (ZOO_RESIZE, ZOO_CROP):
        differences.append(
            f"crops of {recipe.eval.crop} pixels for {ZOO_CROP}, cut for the test from images resized to "
            f"{recipe.eval.resize} for {ZOO_RESIZE}, by the recipe's [eval]"
        )
    if not layers.exact:
        differences.append(
            "adaptive pooling to at most 9,216 features: the zoo's windows are made for a bottleneck ResNet of width "
            "1 or 2 on crops of 224 pixels"
        )
    return applied, differences


def evaluate_layers(
    run: str,
    train_data: str,
    test_data: str,
    protocol: ZooProtocol = ZooProtocol(),
    workers: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Apply the protocol to a run's newest checkpoint, or to the one named, and write the run's `eval_zoo.json`.

    Returns its content: top-1 and top-5 by head after the last epoch, and all of it for each epoch, as shares of 1.
    An existing result for the same checkpoint, data and protocol is kept.
    """
    started = time.monotonic()
    folder = Run.at(run)
    folder.require_writable(LAYERS_RESULT)
    recipe, commit, trunk = load_trunk(folder)
    readers = [ShardReader(uri) for uri in (train_data, test_data)]
    classes = check_labels(*readers)
    if len(readers[0]) < 2:
        raise DataError(f"{train_data} has one image: batch norm needs two", "give more images to train on")
    layers = FrozenLayers(trunk, recipe, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    applied, differences = describe(protocol, recipe, layers, len(readers[0]))
    result: dict[str, Any] = {
        "checkpoint": commit.name,
        "weights": weights_digest(trunk.state_dict()),
        "train_data": readers[0].manifest.digest,
        "test_data": readers[1].manifest.digest,
        "train_images": len(readers[0]),
        "test_images": len(readers[1]),
        "classes": classes,
        "protocol": applied,
        "differences": differences,
    }
    before = folder.layers()
    if before and all(before.get(key) == value for key, value in result.items()):
        return before
    for difference in differences:
        progress(f"not as in the zoo: {difference}")
    heads = build_heads(layers.shapes, len(classes), protocol.seed)
    train, test = (LabelledCrops(reader, recipe, protocol.seed) for reader in readers)
    epochs = train_heads(heads, layers, train, test, protocol, workers, progress)
    result |= {name: epochs[-1][name] for name in ("top1", "top5")}
    result |= {
        "untested": readers[1].match_classes(classes),
        "epochs": epochs,
        "seconds": round(time.monotonic() - started, 1),
    }
    folder.save_layers(result)
    return result
