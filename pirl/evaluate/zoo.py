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

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np
import torch
from torch import nn

from pirl.config import Recipe
from pirl.errors import DataError, TrainingError, UsageError
from pirl.evaluate.crops import FLIP, RATIO, SCALE, Chunk, LabelledCrops
from pirl.evaluate.execution import ALONE, Execution
from pirl.evaluate.features import share_of
from pirl.evaluate.heads import HEADS, Part, build_heads, head_optimizer, join, score_heads, train_step
from pirl.evaluate.images import check_labels
from pirl.evaluate.layers import FrozenLayers
from pirl.evaluate.load import load_trunk, require_finite
from pirl.evaluate.schedules import SCHEDULES, Schedule, moved_drops
from pirl.evaluate.states import EpochStates
from pirl.layer_results import LayersEpoch, LayersEvaluation, LayersHeader, ZooSettings
from pirl.model import weights_digest
from pirl.optim import set_learning_rate
from pirl.order import epoch_order
from pirl.run import LAYERS as LAYERS_RESULT
from pirl.run import Run
from pirl.shards import ShardReader
from pirl.world import World

ZOO_RESIZE, ZOO_CROP = 256, 224
CHUNK = 32  # images that go through the trunk at a time: it is frozen, so this changes no statistics
KEPT_BYTES = 1 << 29  # of test features, which are the same in every epoch


@dataclass(frozen=True)
class ZooProtocol:
    """The zoo's settings. Another number of epochs moves the drops of the learning rate in proportion."""

    epochs: int = 28
    batch_size: int = 256
    base_lr: float = 0.01
    """For a batch of 256; scaled linearly with the batch."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    """On weights and biases of linear layers, not on batch norm."""
    seed: int = 1
    schedule: Schedule = "imagenet"
    """Data set whose published schedule it follows."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2:
            raise UsageError(
                f"{self.epochs} epochs in batches of {self.batch_size} cannot be trained",
                "give at least 1 epoch and 2 images a batch: batch norm needs two",
            )

    def drops(self) -> list[int]:
        """Return the epochs from which the learning rate is a tenth of the one before."""
        usual, drops = SCHEDULES[self.schedule]
        return moved_drops(drops, self.epochs, usual)

    def learning_rate(self, epoch: int, batch: int) -> float:
        """Return that of the epoch number `epoch`, from 0, with `batch` images a step."""
        return self.base_lr * batch / 256 / 10.0 ** sum(epoch >= drop for drop in self.drops())


def split_batches(order: np.ndarray, size: int) -> list[np.ndarray]:
    """Batches of `size`, a smaller one last. A single image left joins the one before: batch norm needs two."""
    return np.split(order, range(size, len(order) - 1, size))


class CentreFeatures:
    """A rank's test images' features in parts: computed again in each epoch, unless they are few enough to be kept."""

    def __init__(self, layers: FrozenLayers, crops: LabelledCrops, workers: int, world: World = ALONE) -> None:
        self.layers, self.crops, self.workers = layers, crops, workers
        self.ids = share_of(len(crops), world)
        size = 4 * sum(map(math.prod, layers.shapes.values())) * len(self.ids)
        self.kept: list[Part] | None = [] if size <= KEPT_BYTES else None

    def __iter__(self) -> Iterator[Part]:
        if self.kept:
            yield from self.kept
            return
        chunks: list[Chunk] = [(None, ids) for ids in _chunks(np.arange(self.ids.start, self.ids.stop))]
        for (_, ids), (pixels, labels) in zip(chunks, self.crops.load(chunks, self.workers)):
            part = self.layers(pixels), labels.to(self.layers.device)
            require_finite(part[0]["res5avg"], ids, self.crops.reader, "pretrained")
            if self.kept is not None:
                self.kept.append(part)
            yield part


def _chunks(ids: np.ndarray) -> list[np.ndarray]:
    return np.split(ids, range(CHUNK, len(ids), CHUNK)) if len(ids) else []


def train_heads(
    heads: nn.ModuleDict,
    layers: FrozenLayers,
    train: LabelledCrops,
    test: LabelledCrops,
    protocol: ZooProtocol,
    execution: Execution | None = None,
    states: EpochStates | None = None,
) -> list[LayersEpoch]:
    """Train `heads` in place, from the newest of `states`.

    Return, for each epoch, its learning rate, losses, and top-1 and top-5 on `test`.
    """
    execution = execution or Execution(World(device=layers.device))
    states = states or EpochStates(None, "")
    heads.to(layers.device).train()
    optimizer = head_optimizer(heads, protocol)
    size = min(protocol.batch_size, len(train))
    test_features = CentreFeatures(layers, test, execution.workers, execution.world)
    records: list[LayersEpoch] = []
    if saved := states.load():
        heads.load_state_dict(saved["heads"])
        optimizer.load_state_dict(saved["optimizer"])
        records = [LayersEpoch.model_validate(record) for record in saved["records"]]
        execution.progress.note(f"resumed after epoch {len(records)}")
    execution.progress.begin("zoo", protocol.epochs * len(train), "images", done=len(records) * len(train))
    for epoch in range(len(records), protocol.epochs):
        rate, started = protocol.learning_rate(epoch, size), time.monotonic()
        set_learning_rate(optimizer, rate)
        losses = _train_epoch(heads, optimizer, layers, train, protocol.seed, epoch, size, execution)
        scores = score_heads(heads, test_features, len(test), execution.world)
        seconds = round(time.monotonic() - started, 2)
        rates = scores.model_dump()
        records.append(LayersEpoch(epoch=epoch + 1, lr=rate, loss=losses, seconds=seconds, **rates))
        shown = "  ".join(f"{name} {100 * top1:.1f}" for name, top1 in scores.top1.items())
        execution.progress.note(f"epoch {epoch + 1}/{protocol.epochs}  lr {rate:.3g}  top-1 in %: {shown}")
        if epoch + 1 < protocol.epochs:
            kept = [record.to_json() for record in records]
            state = {"heads": heads.state_dict(), "optimizer": optimizer.state_dict(), "records": kept}
            states.save(epoch + 1, state)
    return records


def _train_epoch(
    heads: nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    layers: FrozenLayers,
    train: LabelledCrops,
    seed: int,
    epoch: int,
    size: int,
    execution: Execution,
) -> dict[str, float]:
    """Train one epoch, each batch dealt to the ranks by index; return the mean loss of each head."""
    world = execution.world
    total = torch.zeros(len(heads), device=layers.device)
    whole = split_batches(epoch_order(seed, epoch, len(train)), size)
    batches = [_chunks(ids[world.rank :: world.size]) for ids in whole]
    pixels = train.load([(epoch, ids) for chunks in batches for ids in chunks], execution.workers)
    for number, (chunks, ids) in enumerate(zip(batches, whole)):
        world.moment = f"batch {number} of epoch {epoch + 1}"
        parts = [(layers(x), y.to(layers.device)) for x, y in islice(pixels, len(chunks))]
        features, labels = join(parts, layers.shapes, layers.device)
        total += train_step(heads, optimizer, features, labels, world, len(ids)) * len(ids)
        execution.progress.advance(len(ids))
    losses = dict(zip(heads, (total / len(train)).tolist()))
    if broken := [name for name, loss in losses.items() if not math.isfinite(loss)]:
        raise TrainingError(
            f"the loss of {', '.join(broken)} is not finite in epoch {epoch + 1}",
            "look for NaN or infinity in the backbone: `pirl report` shows how its training went",
        )
    return losses


def describe(protocol: ZooProtocol, recipe: Recipe, layers: FrozenLayers, images: int) -> tuple[ZooSettings, list[str]]:
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
    usual = SCHEDULES[protocol.schedule][0]
    if protocol.epochs != usual:
        drops = [str(drop + 1) for drop in protocol.drops() if drop < protocol.epochs]
        differences.append(
            f"{protocol.epochs} epochs for {usual}; the learning rate drops in proportion, "
            + (f"to a tenth before epochs {', '.join(drops)}" if drops else "never in this one")
        )
    if protocol.base_lr != ZooProtocol.base_lr:
        differences.append(f"a learning rate of {protocol.base_lr:g} for {ZooProtocol.base_lr:g}")
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
    return ZooSettings.model_validate(applied), differences


def evaluate_layers(
    run: str,
    train_data: str,
    test_data: str,
    protocol: ZooProtocol = ZooProtocol(),
    execution: Execution | None = None,
) -> LayersEvaluation:
    """Apply the protocol to a run's newest checkpoint, or to the one named, and write the run's `eval_zoo.json`.

    Return its content.
    An existing result for the same checkpoint, data and protocol is kept.
    """
    started, execution = time.monotonic(), execution or Execution()
    world, folder = execution.world, Run.at(run)
    if world.is_main:
        folder.require_writable(LAYERS_RESULT)
    recipe, layers, readers, header = _prepare(folder, train_data, test_data, protocol, world.device)
    before: LayersEvaluation | None = world.broadcast_object(_matching(folder, header) if world.is_main else None)
    if before:
        return before
    for difference in header.differences:
        execution.progress.note(f"not as in the zoo: {difference}")
    heads = build_heads(layers.shapes, len(header.classes), protocol.seed)
    train, test = (LabelledCrops(reader, recipe, protocol.seed) for reader in readers)
    digest = hashlib.sha256(json.dumps(header.to_json(), sort_keys=True).encode()).hexdigest()
    states = EpochStates(folder.evaluation_parts(f"zoo-{digest[:16]}"), digest, world)
    epochs = train_heads(heads, layers, train, test, protocol, execution, states)
    result = LayersEvaluation(
        **header.to_json(),
        top1=epochs[-1].top1,
        top5=epochs[-1].top5,
        untested=readers[1].match_classes(header.classes),
        epochs=epochs,
        ranks=world.size,
        seconds=round(time.monotonic() - started, 1),
    )
    if world.is_main:
        folder.save_layers(result)
        folder.discard_evaluation_parts("zoo")
    return result


def kept_layers(run: Run, train_data: str, test_data: str, protocol: ZooProtocol) -> LayersEvaluation | None:
    """Return the run's result if it is of the same checkpoint, data and protocol."""
    return _matching(run, _prepare(run, train_data, test_data, protocol, torch.device("cpu"))[3])


def _matching(run: Run, header: LayersHeader) -> LayersEvaluation | None:
    before = run.layers()
    return before if before and before.measures(header) else None


def _prepare(
    run: Run, train_data: str, test_data: str, protocol: ZooProtocol, device: torch.device
) -> tuple[Recipe, FrozenLayers, list[ShardReader], LayersHeader]:
    """Return recipe, frozen layers, readers of both data sets, and the result without scores."""
    recipe, commit, trunk = load_trunk(run)
    readers = [ShardReader(uri) for uri in (train_data, test_data)]
    classes = check_labels(*readers)
    if len(readers[0]) < 2:
        raise DataError(f"{train_data} has one image: batch norm needs two", "give more images to train on")
    weights = weights_digest(trunk.state_dict())
    layers = FrozenLayers(trunk, recipe, device)
    applied, differences = describe(protocol, recipe, layers, len(readers[0]))
    header = LayersHeader(
        checkpoint=commit.name,
        weights=weights,
        train_data=readers[0].manifest.digest,
        test_data=readers[1].manifest.digest,
        train_images=len(readers[0]),
        test_images=len(readers[1]),
        classes=classes,
        protocol=applied,
        differences=differences,
    )
    return recipe, layers, readers, header
