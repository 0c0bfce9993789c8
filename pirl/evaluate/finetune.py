"""The protocol finetune: the whole network trained with a few labels, from pretrained and from random weights.

The paper's table 3, after VISSL's `eval_resnet_8gpu_transfer_in1k_semi_sup_fulltune`. Every rank has its part of a
batch; gradients are added up, and batch norm has the statistics of the whole batch. One rank, two or four give the same
numbers but for rounding. After each epoch that ends long after the last save, the state is kept in the run.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pirl.config import Recipe
from pirl.errors import TrainingError
from pirl.evaluate.crops import Chunk, LabelledCrops
from pirl.evaluate.execution import Execution
from pirl.evaluate.features import share_of
from pirl.evaluate.heads import top_hits
from pirl.evaluate.images import check_labels
from pirl.evaluate.load import load_trunk
from pirl.evaluate.norms import whole_batch_norms
from pirl.evaluate.probe import few_of, share_score
from pirl.evaluate.schedules import USUAL, FinetuneProtocol, moved_drops
from pirl.evaluate.states import EpochStates
from pirl.evaluate.zoo import ZOO_CROP, ZOO_RESIZE, split_batches
from pirl.model import Trunk, build_model, memory_format
from pirl.optim import set_learning_rate
from pirl.order import epoch_order
from pirl.results import Evaluation, FewLabels, FineTuned, FineTuning, Scores
from pirl.run import Run
from pirl.shards import ShardReader
from pirl.views import uniforms
from pirl.world import World

SUBSET_STREAM = 239  # of the counter-based random numbers
TEST_CHUNK = 256


def labelled_subset(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return the ids of a share of each class, at least one image, in ascending order.

    Each id has a random number by (seed, id) alone; a class gives its smallest ones. So a smaller share is a subset of
    a larger one, and other images do not change which are drawn but by their number.
    """
    draws = uniforms(seed, 0, np.arange(len(labels)), SUBSET_STREAM, 1)[:, 0]
    order = np.lexsort((draws, labels))
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    members = np.split(order, starts[1:])
    return np.sort(np.concatenate([ids[: few_of(len(ids), share)] for ids in members]))


class Classifier(nn.Module):
    """A backbone in training mode and a linear layer on its features."""

    def __init__(self, trunk: Trunk, classes: int, seed: int, world: World) -> None:
        """Give the linear layer PyTorch's default initial weights from `seed`."""
        super().__init__()
        self.trunk = whole_batch_norms(trunk, world)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.linear = nn.Linear(trunk.features, classes)
        self.requires_grad_(True)
        self.layout = memory_format(trunk)
        self.to(world.device).to(memory_format=self.layout)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, classes)."""
        return self.linear(self.trunk(x.contiguous(memory_format=self.layout)))


@dataclass
class Data:
    """Images of a fine-tuning: crops of training and test images, and the normalisation."""

    recipe: Recipe
    train: LabelledCrops
    test: LabelledCrops
    classes: int
    device: torch.device
    mean: Tensor = field(init=False)
    std: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(3, 1, 1)
            for values in (self.recipe.views.mean, self.recipe.views.std)
        )

    def normal(self, pixels: Tensor) -> Tensor:
        """(n, S, S, 3) uint8 -> (n, 3, S, S) float32 on the device."""
        x = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        return x.div_(255).sub_(self.mean).div_(self.std)


def train_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, images: int, world: World
) -> Tensor:
    """Make one step on a batch of `images` images, of which this rank has `x` and `y`; return the mean loss of all."""
    loss = F.cross_entropy(network(x), y, reduction="sum") / images
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if world.size > 1:
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        total = world.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        for gradient, part in zip(gradients, total.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))
    optimizer.step()
    return world.sum(loss.detach().clone())


def train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    ids: np.ndarray,
    protocol: FinetuneProtocol,
    epoch: int,
    execution: Execution,
) -> float:
    """Train one epoch on the images `ids`, each batch dealt to the ranks by index; return the mean loss."""
    world, size = execution.world, min(protocol.batch_size, len(ids))
    whole = split_batches(ids[epoch_order(protocol.seed, epoch, len(ids))], size)
    chunks: list[Chunk] = [(epoch, batch[world.rank :: world.size]) for batch in whole]
    total = torch.zeros((), device=world.device)
    network.train()
    for number, (batch, (x, y)) in enumerate(zip(whole, _loaded(data, chunks, execution.workers))):
        world.moment = f"batch {number} of epoch {epoch + 1} of fine-tuning"
        total += train_step(network, optimizer, x, y, len(batch), world) * len(batch)
        execution.progress.advance(len(batch))
    loss = float(total) / len(ids)
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss of fine-tuning is not finite in epoch {epoch + 1}",
            "look for NaN or infinity in the backbone with `pirl report`, or give a lower --base-lr",
        )
    return loss


def _loaded(data: Data, chunks: list[Chunk], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalised images and labels of each chunk, also of one without an image."""
    loaded = data.train.load([chunk for chunk in chunks if len(chunk[1])], workers)
    side = data.recipe.eval.crop
    for _, ids in chunks:
        if len(ids):
            pixels, labels = next(loaded)
            yield data.normal(pixels), labels.to(data.device)
        else:
            yield (
                torch.zeros(0, 3, side, side, device=data.device),
                torch.zeros(0, dtype=torch.int64, device=data.device),
            )


@torch.no_grad()
def test_rates(network: nn.Module, data: Data, execution: Execution) -> tuple[float, float]:
    """Return top-1 and top-5 on the centre crops of the test images of all ranks."""
    world = execution.world
    network.eval()
    own = share_of(len(data.test), world)
    chunks: list[Chunk] = [
        (None, np.arange(start, min(start + TEST_CHUNK, own.stop))) for start in range(own.start, own.stop, TEST_CHUNK)
    ]
    hits = torch.zeros(2, dtype=torch.int64, device=world.device)
    world.moment = "the test of fine-tuning"
    for pixels, labels in data.test.load(chunks, execution.workers):
        hits += top_hits(network(data.normal(pixels)), labels.to(world.device))
    top1, top5 = (world.sum(hits).double() / len(data.test)).tolist()
    return top1, top5


class FineTuner:
    """The fine-tunings of one evaluation, one after the other, from the newest of `states`."""

    def __init__(self, data: Data, protocol: FinetuneProtocol, execution: Execution, states: EpochStates) -> None:
        self.data, self.protocol, self.execution, self.states = data, protocol, execution, states
        self.saved = states.load()
        self.rates: dict[str, list[float]] = self.saved["rates"] if self.saved else {}
        """Top-1 and top-5 of those that are finished, by name."""

    def train(self, name: str, trunk: Trunk, ids: np.ndarray) -> tuple[float, float]:
        """Return top-1 and top-5 of a backbone after all epochs on the images `ids`; `name` is that of the result."""
        if name in self.rates:
            top1, top5 = self.rates[name]
            return top1, top5
        protocol, execution, progress = self.protocol, self.execution, self.execution.progress
        network = Classifier(trunk, self.data.classes, protocol.seed, execution.world)
        optimizer = torch.optim.SGD(
            network.parameters(),
            lr=protocol.base_lr,
            momentum=protocol.momentum,
            nesterov=protocol.momentum > 0,
            weight_decay=protocol.weight_decay,
        )
        first = self._restore(name, network, optimizer)
        progress.begin(name, protocol.epochs * len(ids), "images", done=first * len(ids))
        size = min(protocol.batch_size, len(ids))
        for epoch in range(first, protocol.epochs):
            rate = protocol.learning_rate(epoch, size)
            set_learning_rate(optimizer, rate)
            loss = train_epoch(network, optimizer, self.data, ids, protocol, epoch, execution)
            progress.note(f"{name}: epoch {epoch + 1}/{protocol.epochs}  lr {rate:.3g}  loss {loss:.4f}")
            if epoch + 1 < protocol.epochs:
                self._save(name, epoch + 1, network, optimizer)
        top1, top5 = test_rates(network, self.data, execution)
        progress.note(f"{name}: top-1 {100 * top1:.2f} %, top-5 {100 * top5:.2f} %")
        self.rates[name] = [top1, top5]
        self._save(name, protocol.epochs, network, optimizer)
        return top1, top5

    def _restore(self, name: str, network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the state of an interrupted fine-tuning of this name; return its finished epochs."""
        saved, self.saved = self.saved, None
        if not saved or saved["name"] != name:
            return 0
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        self.execution.progress.note(f"{name}: resumed after epoch {saved['epochs']}")
        return int(saved["epochs"])

    def _save(self, name: str, epochs: int, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        state = {
            "name": name,
            "epochs": epochs,
            "rates": self.rates,
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        self.states.save(len(self.rates) * (self.protocol.epochs + 1) + epochs % self.protocol.epochs, state)


def differences(protocol: FinetuneProtocol, recipe: Recipe, smallest: int) -> list[str]:
    """Return the deviations from the paper's settings, for subsets of which the smallest has `smallest` images."""
    lines = [f"batch norm over {min(protocol.batch_size, smallest)} images or more for 32, those of one of 8 GPUs"]
    if protocol.epochs != USUAL.epochs:
        (drop,) = moved_drops((protocol.drop,), protocol.epochs, USUAL.epochs)
        lines.append(f"{protocol.epochs} epochs for {USUAL.epochs}; the learning rate drops before epoch {drop + 1}")
    settings = ("drop", "batch_size", "base_lr", "momentum", "weight_decay")
    lines += [
        f"{name} is {value:g} for {usual:g}"
        for name in settings
        if (value := getattr(protocol, name)) != (usual := getattr(USUAL, name))
    ]
    if smallest < protocol.batch_size:
        lines.append(f"batches of {smallest} for {protocol.batch_size}; the learning rate is scaled with them")
    if (recipe.eval.resize, recipe.eval.crop) != (ZOO_RESIZE, ZOO_CROP):
        lines.append(
            f"crops of {recipe.eval.crop} pixels for {ZOO_CROP}, cut for the test from images resized to "
            f"{recipe.eval.resize} for {ZOO_RESIZE}, by the recipe's [eval]"
        )
    return lines


def fine_tune(
    uri: str, train_data: str, test_data: str, protocol: FinetuneProtocol, evaluation: Evaluation, execution: Execution
) -> Evaluation:
    """Return an evaluation with its section `finetune`: the one it has if that is by the same protocol, else a new one.

    `evaluation` is that of the same checkpoint and data by the protocol fast. Rank 0 writes it.
    """
    if has_finetune(evaluation, protocol):
        return evaluation
    started, run, world = time.monotonic(), Run.at(uri), execution.world
    recipe, _, pretrained = load_trunk(run)
    readers = [ShardReader(each) for each in (train_data, test_data)]
    classes = check_labels(*readers)
    train, test = (LabelledCrops(reader, recipe, protocol.seed) for reader in readers)
    data = Data(recipe, train, test, len(classes), world.device)
    labels = readers[0].labels()
    subsets = {share: labelled_subset(labels, share, protocol.seed) for share in protocol.shares}
    what = [evaluation.weights, evaluation.train_data, evaluation.test_data, protocol.model_dump(mode="json")]
    digest = hashlib.sha256(json.dumps([*what, recipe.eval.resize, recipe.eval.crop]).encode()).hexdigest()
    states = EpochStates(run.evaluation_parts(f"finetune-{digest[:16]}"), digest, world)
    tuner = FineTuner(data, protocol, execution, states)
    results = []
    for share, ids in subsets.items():
        rates = {}
        for side in ("pretrained", "random"):
            start = copy.deepcopy(pretrained) if side == "pretrained" else build_model(recipe).trunk
            rates[side] = tuner.train(f"{100 * share:g} % of the labels, {side}", start, ids)
        results.append(_result(share, labels, ids, rates, len(test)))
    smallest = min(map(len, subsets.values()))
    section = FineTuning(
        protocol=protocol.model_dump(mode="json"),
        results=results,
        differences=differences(protocol, recipe, smallest),
        ranks=world.size,
        seconds=round(time.monotonic() - started, 1),
    )
    result = evaluation.model_copy(update={"finetune": section})
    if world.is_main:
        run.save_evaluation(result)
        run.discard_evaluation_parts("finetune")
    return result


def _result(
    share: float, labels: np.ndarray, ids: np.ndarray, rates: dict[str, tuple[float, float]], images: int
) -> FineTuned:
    numbers = np.unique(labels[ids], return_counts=True)[1]
    sides = {
        side: Scores(top1=share_score(top1, images), top5=share_score(top5, images))
        for side, (top1, top5) in rates.items()
    }
    return FineTuned(
        share=share,
        labels=FewLabels(labels=len(ids), least=int(numbers.min()), most=int(numbers.max())),
        images=hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest(),
        **sides,
    )


def has_finetune(evaluation: Evaluation, protocol: FinetuneProtocol) -> bool:
    """Return whether an evaluation has a result by this protocol."""
    section = evaluation.finetune
    return section is not None and section.protocol == protocol.model_dump(mode="json")
