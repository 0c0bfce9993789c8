"""On a GPU: the same numbers as on a CPU, and no step that waits for the device. Anywhere: the benchmark's check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import IMAGES, tiny_recipe

from benchmarks import gpu, gpu_sides
from pirl.config import LossConfig, MemoryConfig
from pirl.data import negative_seeds
from pirl.loader import Loader
from pirl.loss import Contrast, Samples
from pirl.memory import MemoryBank
from pirl.model import build_model, memory_format
from pirl.negatives import draw_negatives
from pirl.optim import build_optimizer, set_learning_rate
from pirl.training.feed import Feed
from pirl.training.loop import train
from pirl.training.spec import Options
from pirl.training.state import TrainState
from pirl.training.step import train_step
from pirl.views import apply_photometrics, draw_photometrics
from pirl.world import World

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


def test_the_benchmark_in_tiny_on_the_processor(tmp_path: Path) -> None:
    """Every part runs and both sides agree; no time is required of it."""
    results = gpu.run(gpu_sides.tiny_scale(tmp_path))
    goals = [result.goal for result in results]
    assert goals == ["G4b-4", "G5-4", "G5-4-graph", "G6", "G8-gpu"]
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:]] == goals
    assert {path.stem for path in tmp_path.glob("*.json")} == set(goals)


def test_sides_that_differ_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = gpu_sides.OurStep.step
    monkeypatch.setattr(gpu_sides.OurStep, "step", lambda self, rows=None: step(self, rows) * 1.5)
    with pytest.raises(AssertionError, match="close"):
        gpu.train_step(gpu_sides.tiny_scale(tmp_path), 4)
    assert not list(tmp_path.iterdir())


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nce", "cross_entropy"])
def test_loss_gradients_and_bank_are_the_processors(kind: str) -> None:
    def results(device: str) -> list[torch.Tensor]:
        config = LossConfig(kind=kind, negatives=1000)  # type: ignore[arg-type]
        bank = MemoryBank(5000, 32, MemoryConfig()).to(device)
        generator = torch.Generator().manual_seed(0)
        raw = [torch.randn(6, 32, generator=generator).to(device).requires_grad_() for _ in range(2)]
        ids = np.arange(100, 106)
        rows = torch.from_numpy(ids).to(device)
        seeds = torch.stack([negative_seeds(0, 0, ids, view) for view in (0, 1)])
        drawn = [draw_negatives(config, 5000, rows, each) for each in seeds]
        weights = torch.full((6,), 1 / 6, device=device)
        criterion = Contrast(config, World(device=torch.device(device)))
        result = criterion(bank, Samples(rows, seeds, weights, [6]), *raw)
        result.loss.backward()
        bank.update(result.rows, result.embeddings)
        found = [result.loss, *(each.grad for each in raw), bank.memory, criterion.z, *drawn]
        return [each.detach().cpu() for each in found if each is not None]

    for value, expected in zip(results("cuda"), results("cpu")):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("photometric", ["base", "blur"])
def test_photometrics_are_the_processors(photometric: str) -> None:
    cfg = tiny_recipe(f"views.photometric={photometric}").views
    pixels = torch.randint(0, 256, (12, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    params = draw_photometrics(cfg, 0, 0, np.arange(12), [0])
    here, there = (apply_photometrics(pixels.to(device), params, cfg).cpu() for device in ("cpu", "cuda"))
    assert ((here - there).abs() > 1.01 / (255 * min(cfg.std))).float().mean() < 1e-3


@needs_gpu
@pytest.mark.gpu
def test_no_step_waits_for_the_device(shards: str) -> None:
    """From crops in host memory to the optimiser; the first step, which estimates Z, may."""
    recipe = tiny_recipe("train.precision=bf16", "model.width=0.5")
    world = World(device=torch.device("cuda"))
    model = build_model(recipe).cuda()
    model = model.to(memory_format=memory_format(model.trunk))
    bank = MemoryBank(IMAGES, recipe.model.embedding_dim, recipe.memory).cuda()
    criterion = Contrast(recipe.loss, world)
    state = TrainState(
        model, bank, criterion, build_optimizer(model, recipe), torch.amp.GradScaler("cuda", enabled=False)
    )
    set_learning_rate(state.optimizer, 0.01)
    batches: Any = Feed(Loader(shards, recipe, world, workers=0), recipe, world).batches(0, 0)
    for number, (epoch, _, share, inputs) in zip(range(4), batches):
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            train_step(recipe, model, state, world, epoch, share, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.gpu
def test_a_whole_training(shards: str, tmp_path: Path) -> None:
    """With loading processes, whose slots the device reads while the next are filled."""
    recipe = tiny_recipe("model.width=0.5", "train.precision=bf16")
    done = train(recipe, Options(data=shards, out=str(tmp_path), workers=2), World(device=torch.device("cuda")))
    assert done.images_seen == 3 * IMAGES
