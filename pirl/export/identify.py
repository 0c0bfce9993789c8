"""The recipe of a file, and checks that the file is complete and undamaged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pirl.config import Recipe, load_recipe, parse_recipe, recipe_names
from pirl.errors import CheckpointError, did_you_mean
from pirl.export.vissl import Contents, vissl_name
from pirl.model import PIRL
from pirl.optim import learning_rate
from pirl.text import count


def identify(
    contents: Contents, path: Path, name: str | None = None, overrides: Sequence[str] = ()
) -> tuple[Recipe, list[str], list[str]]:
    """Return the recipe, the names of all possible recipes, and notes.

    Recipes are compared by trunk, heads, learning rate and completed epochs. Settings in the file (K, T, the bank's
    momentum, the loss, the batch) are taken from it.
    """
    if name is None and contents.extras:
        recipe = parse_recipe(contents.extras.recipe, overrides, origin=f"the recipe inside {path}")
        return recipe, [recipe.name], []
    names = [name] if name else [name for name in recipe_names() if load_recipe(name).published_top1]
    plain = {name: load_recipe(name, overrides) for name in names}
    fitting = {name: recipe for name, recipe in plain.items() if _architecture(contents) == _architecture(recipe)}
    check_architecture(contents, plain, path)
    fewest = min(len(_misfits(contents, recipe)) for recipe in fitting.values())
    fitting = {name: recipe for name, recipe in fitting.items() if len(_misfits(contents, recipe)) == fewest}
    long_enough = {name: recipe for name, recipe in fitting.items() if recipe.train.epochs >= contents.epochs}
    fitting = long_enough or fitting
    given = {item.partition("=")[0].strip() for item in overrides}  # these win over those of the file
    recipes = {}
    for name, recipe in fitting.items():
        settings = [item for item in _settings(contents, recipe) if item.partition("=")[0] not in given]
        recipes[name] = load_recipe(name, [*settings, *overrides])
    by_rate = [name for name, recipe in recipes.items() if _had_learning_rate(contents, recipe)]
    by_epochs = [name for name, recipe in recipes.items() if recipe.train.epochs == contents.epochs]
    candidates = by_rate or by_epochs or list(recipes)
    recipe = recipes[candidates[0]]
    notes = [f"set apart from {candidates[0]}: {item}" for item in plain[candidates[0]].differences(recipe)]
    if len(candidates) > 1:
        notes.append(f"the file fits all of these: taken as {recipe.name} (--recipe NAME chooses)")
    if contents.heads and recipe.model.head == "mlp" and recipe.model.image_head_relu != "none":
        notes.append(
            f"image_head_relu is {recipe.model.image_head_relu!r}, which is not in the file: as when the zoo was "
            'trained; VISSL has "hidden" since April 2021'
        )
    return recipe, candidates, notes


def check_architecture(contents: Contents, recipes: Mapping[str, Recipe], path: Path | str) -> None:
    """Raise `CheckpointError` where the trunk in a file is of none of these recipes."""
    if _architecture(contents) in map(_architecture, recipes.values()):
        return
    expected = " or ".join(dict.fromkeys(_described(_architecture(recipe)) for recipe in recipes.values()))
    raise CheckpointError(
        f"{path} is of another architecture: {_described(_architecture(contents))}; expected {expected}",
        "give a recipe of its architecture with --recipe, or settings such as model.width=4",
    )


def _settings(contents: Contents, recipe: Recipe) -> list[str]:
    """Return overrides for the settings of the file that differ from the recipe."""
    items = [f"train.epochs={contents.epochs}"] if contents.epochs > recipe.train.epochs else []
    if contents.batch_size and contents.batch_size != recipe.train.batch_size:
        items.append(f"train.batch_size={contents.batch_size}")
    if len(contents.params) != 4 or not all(map(math.isfinite, contents.params)):
        return items
    negatives, temperature, z, momentum = contents.params  # float32: str() of it is the decimal that was meant
    if recipe.loss.negatives not in ("all", negatives):
        items.append(f"loss.negatives={round(negatives)}")
    if np.float32(temperature) != np.float32(recipe.loss.temperature):
        items.append(f"loss.temperature={np.float32(temperature)!s}")
    if np.float32(momentum) != np.float32(recipe.memory.momentum):
        items.append(f"memory.momentum={np.float32(momentum)!s}")
    kind = "nce" if z > 0 else "cross_entropy"  # only NCE has a Z, from its first step on
    if contents.iteration and kind != recipe.loss.kind:
        items.append(f"loss.kind={kind}")
    return items


def _had_learning_rate(contents: Contents, recipe: Recipe) -> bool:
    """Return whether the optimiser has this recipe's learning rate, of the last epoch or the one under way."""
    epochs = (max(contents.epochs - 1, 0), contents.epochs)
    rate = contents.learning_rate
    return rate is not None and any(math.isclose(rate, learning_rate(recipe, e), rel_tol=1e-4) for e in epochs)


def _architecture(what: Contents | Recipe) -> tuple[str, tuple[int, ...], float]:
    """Return (block, blocks in each stage, width) of a recipe's trunk, or of a file by its names and shapes."""
    if isinstance(what, Recipe):
        return what.model.block, what.model.layers, what.model.width
    blocks = [{name.split(".")[1] for name in what.trunk if name.startswith(f"layer{n}.")} for n in (1, 2, 3, 4)]
    kind = "bottleneck" if any(".conv3." in name for name in what.trunk) else "basic"
    stem = what.trunk.get("conv1.weight", what.trunk.get("bn1.weight"))
    return kind, tuple(map(len, blocks)), len(stem) / 64 if isinstance(stem, Tensor) and stem.ndim else 0.0


def _described(architecture: tuple[str, tuple[int, ...], float]) -> str:
    kind, blocks, width = architecture
    return f"{kind} blocks {'+'.join(map(str, blocks))}, width {width:g}" if sum(blocks) else "not a ResNet"


# --- checks ---------------------------------------------------------------------------------------


def _misfits(contents: Contents, recipe: Recipe) -> list[str]:
    with torch.device("meta"):
        return misfits(contents, PIRL(recipe.model, recipe.views))


def misfits(contents: Contents, model: PIRL) -> list[str]:
    """Return every name that is missing or unknown, and every shape that is another than the model's."""
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if contents.heads or name.startswith("trunk.")
    }
    given = contents.model
    missing = {_shown(name) for name in expected if name not in given and not name.endswith(".num_batches_tracked")}
    unknown = [_shown(name) for name in given if name not in expected]
    problems = [f"missing {name}.{did_you_mean(name, unknown)}" for name in sorted(missing)]
    problems += [f"unknown {name}.{did_you_mean(name, missing)}" for name in unknown]
    for name, tensor in given.items():
        if name not in expected:
            continue
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_complex():
            problems.append(f"{_shown(name)} is not a tensor of real numbers")
        elif tuple(tensor.shape) != expected[name]:
            problems.append(f"{_shown(name)} has the shape {tuple(tensor.shape)}, expected {expected[name]}")
    return problems


def check(contents: Contents, model: PIRL, recipe: Recipe, path: Path) -> list[str]:
    """Raise `CheckpointError` with every problem of trunk, heads and bank; convert types, and return notes of that."""
    problems = misfits(contents, model)
    if contents.loss:
        memory, params = (contents.loss.get(name) for name in ("memory", "params"))
        for name, value in (("memory", memory), ("params", params)):
            if not isinstance(value, Tensor):
                problems.append(f"missing nce_average.{name}")
        dim = recipe.model.embedding_dim
        if isinstance(memory, Tensor) and (memory.ndim != 2 or memory.shape[1] != dim or not len(memory)):
            problems.append(f"nce_average.memory has the shape {tuple(memory.shape)}, expected (images, {dim})")
        if isinstance(params, Tensor) and tuple(params.shape) != (4,):
            problems.append(f"nce_average.params has the shape {tuple(params.shape)}, expected (4,)")
    problems += [line for name, tensor in _tensors(contents) if (line := _not_finite(name, tensor))]
    if problems:
        lines = "\n  ".join(problems)
        raise CheckpointError(
            f"{path} does not fit {recipe.name}: {count(len(problems), 'problem')}\n  {lines}",
            "it may be of a changed model, or was renamed or damaged; --recipe NAME compares with another",
        )
    return _convert(contents, model)


def _convert(contents: Contents, model: PIRL) -> list[str]:
    notes = [f"not read: {name}" for name in contents.ignored]
    prob = contents.loss.get("multinomial.prob")
    if isinstance(prob, Tensor) and not bool((prob == 1).all()):
        notes.append("not read: its negatives were not drawn uniformly")
    if "memory" in contents.loss:
        contents.loss["memory"] = contents.loss["memory"].float()
    converted, counters = set(), 0
    for name, like in model.state_dict().items():
        if not name.startswith("trunk."):
            tensors, key = contents.heads, name
        else:
            tensors, key = contents.trunk, name.removeprefix("trunk.")
        if key in tensors and tensors[key].dtype != like.dtype:
            converted.add(f"{tensors[key].dtype} to {like.dtype}".replace("torch.", ""))
            tensors[key] = tensors[key].to(like.dtype)
        elif key not in tensors and name.startswith("trunk."):
            tensors[key] = torch.zeros(like.shape, dtype=like.dtype)
            counters += 1
    if counters:
        notes.append(f"{counters} counters of batches (num_batches_tracked) were missing: 0, which nothing depends on")
    return notes + [f"tensors were converted from {item}" for item in sorted(converted)]


def _tensors(contents: Contents) -> list[tuple[str, Any]]:
    """Return every tensor of a file by the name to show."""
    momenta = [(f"momentum {n}", tensor) for n, tensor in enumerate(chain.from_iterable(contents.momenta))]
    losses = [(f"nce_average.{name}", tensor) for name, tensor in contents.loss.items()]
    return [*((_shown(name), tensor) for name, tensor in contents.model.items()), *losses, *momenta]


def _not_finite(name: str, tensor: Any) -> str:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return ""
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    return f"{name} has {bad:,} of {tensor.numel():,} non-finite values" if bad else ""


def _shown(name: str) -> str:
    """Return a tensor's name for people: torchvision's for the trunk, VISSL's for the heads."""
    if name.startswith("trunk."):
        return name.removeprefix("trunk.")
    try:
        return f"heads {vissl_name(name)}"
    except ValueError:
        return f"heads {name}"
