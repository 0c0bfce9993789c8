"""G10: the fast evaluation beside the linear protocol of the model zoo, on the same trunk and images.

Fashion-MNIST, found as `make demo` finds it; the demo's trunk with its initial weights, as neither protocol's cost
depends on them. Counted: how many images go through the trunk. Compared too: the fast probe's SGD with the optimum of
the same problem, found by L-BFGS on the same features.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Result, compare, finish
from pirl.config import load_recipe
from pirl.evaluate import Features, Protocol, ZooProtocol, extract, linear_probe, load_pixels, probe
from pirl.evaluate.crops import LabelledCrops
from pirl.evaluate.layers import FrozenLayers
from pirl.evaluate.zoo import build_heads, train_heads
from pirl.model import build_model
from pirl.shards import ShardReader, open_source, write_shards
from pirl.storage import open_storage

TRAIN, TEST, CLASSES = 6000, 2000, 10
POINTS = 0.3  # by which the probe's top-1 may miss the optimum's, in percentage points


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
        self.trunk = build_model(self.recipe).trunk.eval()
        self.zoo = ZooProtocol(epochs=epochs)
        self.forwards = 0
        self.trunk.conv1.register_forward_hook(self._count)

    def _count(self, _module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        self.forwards += len(inputs[0])

    def augmented(self) -> dict[str, Any]:
        """The zoo's: seven heads, each image cropped anew and sent through the trunk in every epoch."""
        layers = FrozenLayers(self.trunk, self.recipe, torch.device("cpu"))
        train, test = (LabelledCrops(reader, self.recipe, self.zoo.seed) for reader in (self.train, self.test))
        return train_heads(build_heads(layers.shapes, CLASSES, self.zoo.seed), layers, train, test, self.zoo)[-1]

    def features(self) -> list[Features]:
        return [
            Features(
                extract(self.trunk, load_pixels(reader, self.recipe), self.recipe), torch.from_numpy(reader.labels())
            )
            for reader in (self.train, self.test)
        ]

    def fast(self) -> dict[str, Any]:
        """Each image once; linear probes with all and with few labels from three seeds, and nearest neighbours."""
        train, test = self.features()
        return probe(train, test, CLASSES, Protocol())


def optimum(train: Features, test: Features, weight_decay: float) -> float:
    """Top-1 of the linear layer that L-BFGS finds for the probe's own objective, in up to 500 iterations."""
    layer = nn.Linear(train.x.shape[1], CLASSES)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(layer(train.x), train.y)
        value = value + weight_decay / 2 * sum(parameter.square().sum() for parameter in layer.parameters())
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return (layer(test.x).argmax(1) == test.y).double().mean().item()


def main() -> Result:
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(folder)
        facts: dict[str, Any] = {"train_images": TRAIN, "test_images": TEST}

        def check() -> None:
            """One pass of the fast protocol. L-BFGS beside its probe is told, and a miss does not end this."""
            sides.forwards = 0
            train, test = sides.features()
            assert sides.forwards == TRAIN + TEST
            mean, std = train.x.mean(0), train.x.std(0).clamp_min(1e-6)
            train, test = (Features((each.x - mean) / std, each.y) for each in (train, test))
            protocol = Protocol()
            found = [100 * linear_probe(train, test, CLASSES, protocol, seed)[0] for seed in protocol.seeds]
            best = 100 * optimum(train, test, protocol.weight_decay)
            facts.update(sgd_top1=round(sum(found) / len(found), 2), lbfgs_top1=round(best, 2))
            facts["within_points"] = abs(facts["sgd_top1"] - facts["lbfgs_top1"]) <= POINTS
            facts["image_forwards"] = {"ours": TRAIN + TEST, "reference": 28 * TRAIN + TEST}

        return compare(
            goal="G10",
            title=f"fast evaluation beside the zoo's 28 epochs, {TRAIN} + {TEST} images of Fashion-MNIST",
            sides={"reference": sides.augmented, "ours": sides.fast},
            required=10,
            parity=check,
            repeats=1,
            unit="s",
            facts=facts,
        )


if __name__ == "__main__":
    finish([main()])
