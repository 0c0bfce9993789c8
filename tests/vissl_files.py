"""Files as VISSL writes them, built from its recorded names and shapes, with no code of the library.

Values are random where a test compares them, and one number a tensor where only names and shapes matter: a stretched
number takes no space in a file and next to none in memory. Such files are refused outside of these tests: the fixture
`stretched` has them read.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

LAYOUT = json.loads((Path(__file__).parent / "data" / "reference_layout.json").read_text())
VARIANT = {
    "r50-200ep-linear": "r50_linear",
    "r50-200ep-mlp": "r50_mlp",
    "r50-800ep-linear": "r50_linear",
    "r50-800ep-mlp": "r50_mlp",
    "r50w2-400ep-linear": "r50w2_linear",
    "r50w2-400ep-mlp": "r50w2_mlp",
}


@pytest.fixture
def stretched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have tensors read whose values are stored once for many."""
    monkeypatch.setattr("pirl.export.safe_load.is_stretched", lambda tensor: False)


class Values:
    """Tensors of a shape: random, or one number each, never the same for two."""

    def __init__(self, random: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(0) if random else None
        self.count = 0

    def __call__(self, shape: list[int]) -> Tensor:
        self.count += 1
        if not shape:
            return torch.tensor(self.count)  # num_batches_tracked
        if self.generator:
            return torch.rand(shape, generator=self.generator) + 1e-3
        return torch.tensor(self.count / 1024).expand(shape)


def trunk_of(name: str, values: Values) -> OrderedDict[str, Tensor]:
    shapes = LAYOUT["trunks"][LAYOUT["variants"][VARIANT[name]]["trunk"]]
    return OrderedDict((key, values(shape)) for key, shape in shapes.items())


def heads_of(name: str, values: Values) -> OrderedDict[str, Tensor]:
    return OrderedDict((key, values(shape)) for key, shape in LAYOUT["variants"][VARIANT[name]]["heads"].items())


def optimizer_order(trunk: dict[str, Tensor], heads: dict[str, Tensor]) -> list[list[str]]:
    """The recorded groups: convolutions, batch norms with weight and bias in turn, head weights, head biases."""
    weights = [key for key in trunk if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    return [
        [key for key in weights if trunk[key].ndim == 4],
        [key for key in weights if trunk[key].ndim == 1],
        [key for key in heads if key.endswith("weight")],
        [key for key in heads if key.endswith("bias")],
    ]


def optimizer_of(trunk: dict[str, Tensor], heads: dict[str, Tensor], values: Values, lr: float) -> dict[str, Any]:
    tensors, state, groups, index = {**trunk, **heads}, {}, [], 0
    for keys, decay in zip(optimizer_order(trunk, heads), (1e-4, 0.0, 1e-4, 0.0)):
        settings = {"lr": lr, "momentum": 0.9, "dampening": 0, "weight_decay": decay, "nesterov": False}
        groups.append({**settings, "params": list(range(index, index + len(keys)))})
        for key in keys:
            state[index] = {"momentum_buffer": values(list(tensors[key].shape))}
            index += 1
    return {"state": state, "param_groups": groups}


def checkpoint(
    name: str, images: int = 40, random: bool = False, phase: int | None = None, images_per_step: int = 1024
) -> dict[str, Any]:
    """The content of a checkpoint of the zoo's training `name` on `images` images, written after phase `phase`."""
    epochs = int(name.split("ep-")[0].rpartition("-")[2])
    phase = epochs - 1 if phase is None else phase
    nce, values = name.endswith("linear"), Values(random)
    trunk, heads = trunk_of(name, values), heads_of(name, values)
    memory = torch.randn(images, 128, generator=torch.Generator().manual_seed(1))
    loss = OrderedDict(
        {
            "nce_average.memory": memory / memory.norm(dim=1, keepdim=True),
            "nce_average.params": torch.tensor([32000, 0.07 if nce else 0.1, 2.25 * images if nce else -1, 0.5]),
            "nce_average.multinomial.prob": torch.ones(images),
            "nce_average.multinomial.alias": torch.zeros(images, dtype=torch.int64),
        }
    )
    iteration = (phase + 1) * math.ceil(images / images_per_step)
    rate = (0.00012 + 0.5 * (0.12 - 0.00012) * (1 + math.cos(math.pi * phase / epochs))) * images_per_step / 1024
    classy = {
        "train": True,
        "base_model": {"model": {"trunk": trunk, "heads": heads}, "meta": {"trunk": {}, "heads": []}},
        "meters": [],
        "optimizer": {"optim": optimizer_of(trunk, heads, values, rate)},
        "phase_idx": phase,
        "train_phase_idx": phase,
        "num_updates": iteration * images_per_step,
        "losses": [12.25, 11.5],
        "hooks": {"LogLossLrEtaHook": {}},
        "loss": loss,
        "train_dataset_iterator": {},
    }
    if "w2" in name:
        classy["amp"] = {"loss_scaler0": {"loss_scale": 4096.0, "unskipped": 77}}
    progress = {"phase_idx": phase, "iteration": iteration, "loss": loss, "iteration_num": 0, "train_phase_idx": phase}
    return {**progress, "classy_state_dict": classy}


def write(path: Path, content: Any, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path
