"""G10: the fast evaluation compared with the linear protocol of the model zoo, on the same backbone and images.

The images are Fashion-MNIST, from the folders of `make demo`. The backbone is the demo's with its initial weights,
because the cost of neither protocol depends on them. Counted: the images that pass the backbone, also for the bank's
neighbours.

A second comparison: the fast probe's SGD with the optimum of the same objective, by L-BFGS on the same features. With
the probe's own weight decay the objective is so flat that SGD ends far from the optimum, and scores higher on test
images for that. So both must agree with a decay at which SGD converges (`CONVERGED_DECAY`). The accuracy with the
probe's own decay, in its own steps and in ten times as many, is printed next to it.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Result, compare, finish
from pirl.config import load_recipe
from pirl.data import CropDataset
from pirl.evaluate import Features, Progress, Protocol, ZooProtocol, embed
from pirl.evaluate.crops import LabelledCrops
from pirl.evaluate.features import CHUNK, Extractor, Moments, extract_all, moments
from pirl.evaluate.heads import build_heads
from pirl.evaluate.layers import FrozenLayers
from pirl.evaluate.parts import Parts
from pirl.evaluate.probe import Pair, bank_neighbours, probe, score_probes
from pirl.evaluate.sgd import Standardised, train_probes
from pirl.evaluate.zoo import train_heads
from pirl.memory import MemoryBank
from pirl.model import build_model
from pirl.shards import ShardReader, open_source, write_shards
from pirl.storage import open_storage
from pirl.world import World

TRAIN, TEST, CLASSES = 6000, 2000, 10
CONVERGED_DECAY = 1e-3  # ten times the probe's
POINTS = 0.3  # largest difference of the probe's top-1 from the optimum's, in percentage points


class Sides:
    """Both protocols on the first trunk of the demo."""

    def __init__(self, folder: str, train: int = TRAIN, test: int = TEST, epochs: int = 28) -> None:
        readers = []
        for split, images in (("train", train), ("test", test)):
            storage = open_storage(f"{folder}/{split}")
            write_shards(open_source(f"fashion-mnist:{split}"), storage, limit=images)
            readers.append(ShardReader(storage.uri))
        self.train, self.test = readers
        self.recipe = load_recipe("demo")
        self.model = build_model(self.recipe).eval()
        self.trunk = self.model.trunk
        self.zoo = ZooProtocol(epochs=epochs)
        self.forwards = 0
        self.trunk.conv1.register_forward_hook(self._count)

    def _count(self, _module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        self.forwards += len(inputs[0])

    def augmented(self) -> dict[str, Any]:
        """Run the zoo's protocol: seven heads, each image cropped and sent through the backbone in every epoch."""
        layers = FrozenLayers(self.trunk, self.recipe, torch.device("cpu"))
        train, test = (LabelledCrops(reader, self.recipe, self.zoo.seed) for reader in (self.train, self.test))
        return train_heads(build_heads(layers.shapes, CLASSES, self.zoo.seed), layers, train, test, self.zoo)[-1]

    def extract(self, reader: ShardReader) -> Features:
        extractor = Extractor({"": self.trunk}, self.recipe, torch.device("cpu"))
        extractor.trunks[""].conv1.register_forward_hook(self._count)
        crops = LabelledCrops(reader, self.recipe, seed=0)
        return extract_all(extractor, crops, World(), 0, Parts(None, ""), Progress())[""]

    def features(self) -> list[Features]:
        return [self.extract(reader) for reader in (self.train, self.test)]

    def by_bank(self) -> dict[str, Any]:
        """Run the neighbours in a bank, whose rows cost nothing and hold nothing in this benchmark."""
        rows = CropDataset(self.train.storage.uri, self.recipe).rows
        bank = MemoryBank(rows, self.recipe.model.embedding_dim, self.recipe.memory)
        test = embed(self.model, self.extract(self.test))
        return bank_neighbours(bank.memory, self.train.storage.uri, self.recipe, test, CLASSES, Protocol())

    def check_forwards(self) -> None:
        """Raise unless features make one pass over all images, and the bank's neighbours one over the test images."""
        for work, readers in ((self.features, (self.train, self.test)), (self.by_bank, (self.test,))):
            self.forwards, images = 0, sum(map(len, readers))
            work()
            scaling = images + sum(min(len(reader), CHUNK) for reader in readers)
            assert self.forwards == scaling

    def fast(self) -> dict[str, Any]:
        """Run the fast protocol: linear probes with all and with few labels from three seeds, and neighbours."""
        train, test = self.features()
        return probe({"pretrained": Pair(train, test)}, CLASSES, Protocol())[0]["pretrained"]


def optimum(train: Features, test: Features, weight_decay: float) -> float:
    """Return top-1 of the linear layer by L-BFGS on the probe's own objective, in up to 1,000 iterations."""
    layer = nn.Linear(train.x.shape[1], CLASSES)
    optimizer = torch.optim.LBFGS(
        layer.parameters(), max_iter=1000, tolerance_grad=1e-5, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(layer(train.x), train.y)
        value = value + weight_decay / 2 * sum(parameter.square().sum() for parameter in layer.parameters())
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return (layer(test.x).argmax(1) == test.y).double().mean().item()


def by_sgd(train: Features, test: Features, protocol: Protocol) -> list[tuple[float, float]]:
    """Return (top-1, top-5) of the probe of each seed, on features as they are."""
    dim = train.x.shape[1]
    plain = Moments(torch.zeros(dim), torch.ones(dim), collapsed=False)
    sides = [Standardised(each, plain, torch.device("cpu")) for each in (train, test)]
    subsets = [torch.arange(len(train.y))] * len(protocol.seeds)
    weights = train_probes(sides[:1], subsets, CLASSES, protocol, World(), Progress(), "linear")
    return score_probes(sides[1:], weights, World())[0]


def solvers(train: Features, test: Features) -> dict[str, Any]:
    """Return top-1 in percent of the probe's SGD and of L-BFGS; raise if they differ although SGD converges."""
    scale = moments(train, World())
    sides = [Standardised(each, scale, torch.device("cpu")) for each in (train, test)]
    train, test = (Features(each.rows(torch.arange(each.count)), each.labels) for each in sides)
    own = Protocol()
    found: dict[str, Any] = {}
    for name, protocol in (
        ("own_decay", own),
        ("own_decay_10x_steps", replace(own, min_steps=10 * own.min_steps, seeds=(0,))),
        ("10x_decay", replace(own, weight_decay=CONVERGED_DECAY)),
    ):
        sgd = [100 * top1 for top1, _ in by_sgd(train, test, protocol)]
        best = 100 * optimum(train, test, protocol.weight_decay)
        found[name] = {"sgd_top1": round(sum(sgd) / len(sgd), 2), "lbfgs_top1": round(best, 2)}
    arrived = found["10x_decay"]
    assert abs(arrived["sgd_top1"] - arrived["lbfgs_top1"]) <= POINTS, found
    return found


def main() -> Result:
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(folder)
        facts: dict[str, Any] = {
            "train_images": TRAIN,
            "test_images": TEST,
            "image_forwards": {"ours": TRAIN + TEST, "reference": 28 * TRAIN + TEST, "by_bank": TEST},
        }

        def check() -> None:
            sides.check_forwards()
            started = time.perf_counter()
            sides.by_bank()
            facts["by_bank_s"] = round(time.perf_counter() - started, 2)
            facts["solvers"] = solvers(*sides.features())

        return compare(
            goal="G10",
            title=f"fast evaluation compared with the zoo's 28 epochs, {TRAIN} + {TEST} images of Fashion-MNIST",
            sides={"reference": sides.augmented, "ours": sides.fast},
            required=10,
            parity=check,
            repeats=1,
            unit="s",
            facts=facts,
        )


if __name__ == "__main__":
    finish([main()])
