"""Optimiser groups, learning rates and the step itself, against the reference's record and against arithmetic."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe
from test_model import VARIANTS

from pirl.config import ModelConfig, OptimConfig, Recipe
from pirl.model import PIRL, build_model
from pirl.optim import build_optimizer, learning_rate, parameter_groups, set_learning_rate

LAYOUT = json.loads((Path(__file__).parent / "data" / "reference_layout.json").read_text())
WORLD_OF_32 = ("train.batch_size=1024", "optim.base_lr=0.03", "optim.end_lr_ratio=0.001")


@pytest.mark.parametrize("variant", VARIANTS)
def test_groups_are_the_references(variant: str) -> None:
    with torch.device("meta"):
        model = PIRL(VARIANTS[variant])
    groups = parameter_groups(model, OptimConfig())
    found = [[len(g["params"]), sum(p.numel() for p in g["params"]), g["weight_decay"]] for g in groups]
    assert found == LAYOUT["variants"][variant]["groups"]
    if variant == "r50_linear":
        assert [group[0] for group in found] == [53, 106, 3, 3]
        assert [group[1] for group in found] == [23_454_912, 53_120, 671_744, 384]


def test_every_parameter_is_in_one_group_in_module_order() -> None:
    model = PIRL(ModelConfig(block="basic", layers=(1, 1, 1, 1), width=0.0625, head="mlp"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    grouped = [[names[p] for p in group["params"]] for group in parameter_groups(model, OptimConfig())]
    assert sorted(name for group in grouped for name in group) == sorted(names.values())
    order = list(names.values())
    for group in grouped:
        assert group == sorted(group, key=order.index)
    assert grouped[2] == [
        f"{head}.weight"
        for head in (
            "patch_head.project.0",
            "patch_head.project.2",
            "patch_head.combine",
            "image_head.0",
            "image_head.2",
        )
    ]


def test_decay_of_norm_and_bias_is_a_choice() -> None:
    model = build_model(tiny_recipe())
    decays = [g["weight_decay"] for g in parameter_groups(model, OptimConfig(decay_norm_and_bias=True))]
    assert decays == [1e-4] * 4


@pytest.mark.parametrize(
    ("epochs", "epoch", "expected"),
    [
        (200, 0, 0.12),
        (200, 1, 0.11999261),
        (200, 50, 0.10244398),
        (200, 100, 0.06006),
        (200, 150, 0.01767602),
        (200, 199, 0.00012739),
        (400, 399, 0.00012185),
        (800, 799, 0.00012046),
    ],
)
def test_learning_rates_recorded_from_the_reference(epochs: int, epoch: int, expected: float) -> None:
    recipe = tiny_recipe(*WORLD_OF_32, f"train.epochs={epochs}")
    assert learning_rate(recipe, epoch) == pytest.approx(expected, abs=5e-9)
    assert learning_rate(recipe, epoch + 0.999) == learning_rate(recipe, epoch)  # set once an epoch


def test_another_world_size_scales_both_ends() -> None:
    recipe = tiny_recipe(*WORLD_OF_32[1:], "train.batch_size=256", "train.epochs=200", "optim.schedule=step")
    assert learning_rate(recipe, 0) == pytest.approx(0.03, rel=1e-12)
    assert learning_rate(recipe, 200) == pytest.approx(3e-5, rel=1e-12)


def test_step_schedule_is_a_cosine_at_every_step() -> None:
    recipe = tiny_recipe(*WORLD_OF_32, "train.epochs=8", "optim.schedule=step")
    assert learning_rate(recipe, 2) == pytest.approx(0.00012 + 0.5 * (0.12 - 0.00012) * (1 + 0.5**0.5), rel=1e-12)
    assert learning_rate(recipe, 4) == pytest.approx(0.06006, rel=1e-12)
    assert learning_rate(recipe, 8) == pytest.approx(0.00012, rel=1e-12)
    rates = [learning_rate(recipe, step / 10) for step in range(81)]
    assert all(later < earlier for earlier, later in pairwise(rates))


def test_warm_up_is_linear_and_the_cosine_spans_the_rest() -> None:
    recipe = tiny_recipe(*WORLD_OF_32, "train.epochs=10", "optim.schedule=step", "optim.warmup_epochs=2")
    assert learning_rate(recipe, 0.5) == pytest.approx(0.03, rel=1e-12)
    assert learning_rate(recipe, 1) == pytest.approx(0.06, rel=1e-12)
    assert learning_rate(recipe, 2) == pytest.approx(0.12, rel=1e-12)
    assert learning_rate(recipe, 6) == pytest.approx(0.06006, rel=1e-12)  # half of the eight epochs left
    assert learning_rate(recipe, 10) == pytest.approx(0.00012, rel=1e-12)


def hand_written_sgd(recipe: Recipe, steps: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two models after the same gradients: one by the optimiser, one by the formula."""
    model = build_model(recipe)
    optimizer = build_optimizer(model, recipe)
    decayed = {
        name: recipe.optim.weight_decay if parameter.ndim > 1 else 0.0 for name, parameter in model.named_parameters()
    }
    mine = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    momentum = {name: torch.zeros_like(value) for name, value in mine.items()}
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        rate = 0.1 / (step + 1)
        set_learning_rate(optimizer, rate)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            gradient = parameter.grad.double() + decayed[name] * mine[name]  # coupled: through the momentum
            momentum[name] = recipe.optim.momentum * momentum[name] + gradient  # no dampening
            look_ahead = gradient + recipe.optim.momentum * momentum[name]
            mine[name] = mine[name] - rate * (look_ahead if recipe.optim.nesterov else momentum[name])
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, mine


@pytest.mark.parametrize("nesterov", ["false", "true"])
def test_sgd_step_by_hand(nesterov: str) -> None:
    recipe = tiny_recipe("optim.weight_decay=0.05", f"optim.nesterov={nesterov}")
    theirs, mine = hand_written_sgd(recipe, steps=3)
    for name, value in theirs.items():
        torch.testing.assert_close(value.double(), mine[name], rtol=1e-5, atol=1e-6, msg=name)


def test_set_learning_rate_reaches_every_group() -> None:
    model = build_model(tiny_recipe())
    optimizer = build_optimizer(model, tiny_recipe())
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25] * 4
