"""Bounds of a recipe: whatever `pirl show` accepts is built, drawn and trained for a step."""

from __future__ import annotations

import math
import random
import tomllib
import typing
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from conftest import TINY, tiny_recipe
from pydantic import BaseModel

from pirl.config import Recipe, parse_recipe
from pirl.errors import ConfigError
from pirl.loss import Contrast, Samples
from pirl.memory import MemoryBank
from pirl.model import build_model
from pirl.optim import build_optimizer, learning_rate, set_learning_rate
from pirl.settings import kinds_of
from pirl.views import apply_photometrics, crop_batch, draw_photometrics
from pirl.world import World

SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 24, 33, 48]  # small ones: a build of them is cheap
INTEGERS = [*SIZES, -1, -(2**63), 2**31, 2**62]
NUMBERS = [0.0, 1.0, 0.5, 0.07, 1e-300, 1e-9, 0.011, 1e-3, 0.02, 2.0, 99.0, 1e9, 1e39, 1e300]
NUMBERS += [-1.0, -1e-9, math.nan, math.inf, -math.inf]
COSTLY = {"model.layers": [-1, 0, 1, 2], "model.width": [0.001, 1 / 128, 1 / 64, 0.02, 0.0625, 0.1, -1.0, math.nan]}
COSTLY |= {"model.embedding_dim": [1, 2, 3, 8, 9], "loss.negatives": [0, 1, 2, 7, 16], "views.grid": [0, 1, 2, 3, 5, 6]}


def keys(model: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, Any]:
    """Every key of a recipe with its annotation."""
    leaves: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            leaves |= keys(field.annotation, f"{name}.")
        else:
            leaves[prefix + name] = field.annotation
    return leaves


def sample(key: str, annotation: Any, rng: random.Random) -> Any:
    """A value for a key, right or wrong."""
    if rng.random() < 0.03:
        return rng.choice([True, "text", "", [1, 2], {"a": 1}, []])
    if typing.get_origin(annotation) is tuple:
        values = [sample(key, part, rng) for part in typing.get_args(annotation)]
        return sorted(values) if len(values) == 2 and rng.random() < 0.8 and _numbers(values) else values
    if typing.get_origin(annotation) is typing.Literal:
        return rng.choice(typing.get_args(annotation))
    kinds = kinds_of(annotation)
    if bool in kinds:
        return rng.random() < 0.5
    if key in COSTLY:
        return rng.choice(COSTLY[key])
    return rng.choice(INTEGERS if int in kinds else NUMBERS if float in kinds else ["a", "a b", "../a", "\n"])


def _numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def step(recipe: Recipe) -> None:
    """One optimiser step on three random images; everything must be finite and of the shapes that the recipe says."""
    views, generator = recipe.views, np.random.default_rng(0)
    images = [generator.integers(0, 256, (*size, 3), np.uint8) for size in ((20, 24), (1, 30), (30, 2))]
    ids = np.arange(len(images))
    pixels, patches = crop_batch(images, ids, recipe.train.seed, 0, views)
    inputs = [
        apply_photometrics(torch.from_numpy(part), draw_photometrics(views, recipe.train.seed, 0, ids, elements), views)
        for part, elements in ((pixels, [0]), (patches, range(1, 1 + views.grid**2)))
    ]
    assert all(part.isfinite().all() for part in inputs)
    model = build_model(recipe)
    optimizer = build_optimizer(model, recipe)
    set_learning_rate(optimizer, learning_rate(recipe, 0.5))
    rows = torch.arange(3)
    bank = MemoryBank(8, recipe.model.embedding_dim, recipe.memory, recipe.train.seed, ranks=2)
    image_embeddings, patch_embeddings = torch.randn(2, 3, recipe.model.embedding_dim)
    with torch.device("meta"):
        shown = build_model(recipe)(*(part.to("meta") for part in inputs))
    assert all(part.shape == (3, recipe.model.embedding_dim) for part in shown)
    samples = Samples(rows, torch.arange(6).view(2, 3), torch.full((3,), 1 / 3), [3])
    result = Contrast(recipe.loss, World())(bank, samples, patch_embeddings, image_embeddings)
    assert result.loss.isfinite()
    bank.update(result.rows, result.embeddings)
    assert bank.memory.isfinite().all()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_accepted_is_built(seed: int) -> None:
    rng = random.Random(seed)
    annotations = keys()
    accepted = refused = 0
    torch.manual_seed(seed)
    while accepted < 40:
        tree: dict[str, Any] = tomllib.loads(TINY)
        for key in rng.sample(sorted(annotations), rng.choice([1, 1, 2, 3])):
            *path, last = key.split(".")
            (tree.setdefault(path[0], {}) if path else tree)[last] = sample(key, annotations[key], rng)
        text = tomli_w.dumps(tree)
        try:
            recipe = parse_recipe(text)
        except ConfigError:
            refused += 1
            continue
        accepted += 1
        again = parse_recipe(recipe.to_toml())
        assert again == recipe
        assert again.digest() == recipe.digest()
        try:
            step(recipe)
        except Exception as error:
            raise AssertionError(f"accepted, but not built:\n{text}") from error
    assert refused > 20


def test_the_largest_values_are_built() -> None:
    """Without memory, on the meta device: every upper bound of the network and the views at once."""
    views = ["views.grid=5", "views.patch_crop_size=4096", "views.patch_size=819", "views.image_size=4096"]
    model = ["model.layers=[128, 1, 1, 1]", "model.embedding_dim=8192", "model.width=16"]
    recipe = tiny_recipe(*views, *model, "eval.resize=4096")
    with torch.device("meta"):
        network = build_model(recipe)
        images, patches = torch.empty(1, 3, 4096, 4096), torch.empty(25, 3, 819, 819)
        assert [part.shape for part in network(images, patches)] == [(1, 8192), (1, 8192)]
    build_optimizer(network, recipe)
