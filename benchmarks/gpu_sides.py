"""Two sides of a training step on a GPU, and their scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.g4_negatives import TEMPERATURE, Z
from benchmarks.harness import RESULTS
from benchmarks.reference_nce import ReferenceNCE
from pirl.config import Recipe, load_recipe
from pirl.loss import Contrast, Samples
from pirl.memory import MemoryBank
from pirl.model import build_model, memory_format
from pirl.optim import build_optimizer, parameter_groups, set_learning_rate
from pirl.world import World


@dataclass(frozen=True)
class Scale:
    """Sizes of a measurement."""

    device: str
    recipe: str
    overrides: tuple[str, ...]
    images: int
    negatives: int
    batches: tuple[int, ...]
    steps: int
    """In one measured time."""
    repeats: int
    demand: float
    """Factor of the required ratios: 1, or 0 if nothing is measured."""
    results: Path

    def load(self, batch: int) -> Recipe:
        sizes = [f"train.batch_size={batch}", f"loss.negatives={self.negatives}"]
        return load_recipe(self.recipe, [*self.overrides, *sizes])


def full_scale() -> Scale:
    memory = torch.cuda.get_device_properties(0).total_memory
    batches = (32, 256) if memory > 120e9 else (32, 128)  # both sides stay on the device
    overrides = ("train.precision=bf16", "loss.kind=nce", f"loss.temperature={TEMPERATURE}")
    return Scale("cuda", "r50-200ep-linear", overrides, 1_281_167, 32_000, batches, 10, 7, 1.0, RESULTS)


def tiny_scale(results: Path) -> Scale:
    overrides = ("loss.kind=nce", f"loss.temperature={TEMPERATURE}", "loss.exclude_positive=false", "data.images=0")
    return Scale("cpu", "demo", overrides, 300, 64, (4,), 1, 1, 0.0, results)


class Inputs:
    """Model, bank and synthetic views on the device; never zeros, which are faster."""

    def __init__(self, scale: Scale, batch: int) -> None:
        self.recipe, self.device = scale.load(batch), torch.device(scale.device)
        views = self.recipe.views
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(batch, 3, views.image_size, views.image_size, generator=generator).to(self.device)
        patches = torch.randn(batch * views.grid**2, 3, views.patch_size, views.patch_size, generator=generator)
        self.patches = patches.to(self.device)
        self.ids = torch.randperm(scale.images, generator=generator)[:batch].to(self.device)
        self.model = build_model(self.recipe).to(self.device)
        self.bank = MemoryBank(scale.images, self.recipe.model.embedding_dim, self.recipe.memory).to(self.device)
        self.criterion = Contrast(self.recipe.loss, World(device=self.device))
        self.criterion.z.fill_(Z)
        self.criterion.z_is_set = True
        self.optimizer = build_optimizer(self.model, self.recipe)
        set_learning_rate(self.optimizer, 0.01)


class ReferenceStep:
    """Step of the reference: eager, channels first, float32 with cuDNN's default TF32, its loss and NaN check."""

    def __init__(self, scale: Scale, batch: int) -> None:
        self.inputs = Inputs(scale, batch)
        groups = parameter_groups(self.inputs.model, self.inputs.recipe.optim)
        self.optimizer = torch.optim.SGD(groups, lr=0.01, momentum=self.inputs.recipe.optim.momentum)
        self.loss = ReferenceNCE(self.inputs.bank.memory, scale.negatives, TEMPERATURE, 0.5, Z)

    def __call__(self, rows: tuple[Tensor, Tensor] | None = None) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        embeddings = self.inputs.model(self.inputs.images, self.inputs.patches)
        loss = self.loss.step(self.inputs.ids, *embeddings, rows)
        assert not torch.isnan(loss).item()
        self.optimizer.step()
        return loss


class OurStep:
    """Step of `pirl train` after the photometrics: channels last, autocast, rows in place, one fused optimiser.

    `how`: "eager", "compile" (the network, by `torch.compile`), or "graph" (the whole step as a CUDA graph).
    """

    def __init__(self, scale: Scale, batch: int, how: str) -> None:
        self.inputs = inputs = Inputs(scale, batch)
        layout = memory_format(inputs.model.trunk)
        inputs.model.to(memory_format=layout)
        self.images, self.patches = inputs.images.to(memory_format=layout), inputs.patches.to(memory_format=layout)
        self.network: Callable[..., Any] = torch.compile(inputs.model) if how == "compile" else inputs.model
        self.weights = torch.full((batch,), 1 / batch, device=inputs.device)
        self.seeds = torch.arange(2 * batch, device=inputs.device).view(2, batch)
        self.graph: torch.cuda.CUDAGraph | None = None
        if how == "graph":
            self._capture()

    def __call__(self) -> None:
        if self.graph:
            self.graph.replay()
        else:
            self.step()

    def step(self, rows: tuple[Tensor, Tensor] | None = None) -> Tensor:
        inputs = self.inputs
        self.seeds += 1 << 32  # never the same rows twice
        samples = Samples(inputs.ids, self.seeds, self.weights, [len(inputs.ids)], drawn=rows)
        inputs.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(inputs.device.type, torch.bfloat16, inputs.recipe.train.precision == "bf16"):
            embeddings = self.network(self.images, self.patches)
        result = inputs.criterion(inputs.bank, samples, *embeddings)
        inputs.bank.update(result.rows, result.embeddings)
        result.loss.backward()
        inputs.optimizer.step()
        return result.loss.detach()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()
