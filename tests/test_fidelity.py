"""docs/fidelity.md: that what it names exists; and the facts of its tables that have no better place."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_recipe
from torch import nn

from pirl.config import LossConfig, MemoryConfig, ModelConfig, load_recipe
from pirl.loss import Contrast, Samples, StepLoss
from pirl.memory import MemoryBank
from pirl.model import Trunk, build_model
from pirl.optim import build_optimizer, set_learning_rate
from pirl.world import World

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "fidelity.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)))
ROWS = [line.split("|")[1:-1] for line in PAGE.splitlines() if re.match(r"\|.*\.py::", line)]


@cache
def defined(path: Path) -> set[str]:
    """Top-level functions and classes of a file."""
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize(("file", "name"), NAMED, ids=lambda value: value)
def test_what_the_page_names_exists(file: str, name: str) -> None:
    path = ROOT / ("tests" if file.startswith("test_") else "pirl") / file
    assert path.exists()
    assert name in defined(path)


def test_every_fact_has_code_and_a_test() -> None:
    assert len(ROWS) > 45
    for *_, code, tests in ROWS:
        assert re.fullmatch(r" `(?!test_)[\w/]+\.py::\w+` ", code), code
        assert re.fullmatch(r" (`test_\w+\.py::test_\w+`(, )?)+ ", tests), tests


def test_all_thirteen_surprises_are_listed() -> None:
    assert [row[0].strip() for row in ROWS if len(row) == 4] == [f"T{n}" for n in range(1, 14)]


# --- trunk and heads -----------------------------------------------------------------------------


RECORDED_SPREAD = {
    "conv1.weight": 0.04758,
    "layer1.0.conv1.weight": 0.07133,
    "layer1.0.conv2.weight": 0.02408,
    "layer1.0.downsample.0.weight": 0.07227,
    "layer4.2.conv2.weight": 0.00850,
    "layer4.2.conv3.weight": 0.02552,
}


def test_initial_weights_of_r50_have_the_recorded_spread() -> None:
    """Standard deviations that the reference's model had; other random numbers, so within their own error."""
    model = build_model(load_recipe("r50-200ep-linear"))
    weights = model.trunk.state_dict()
    for key, std in RECORDED_SPREAD.items():
        error = 2 * std * (0.8 / weights[key].numel()) ** 0.5  # of the difference of two such estimates
        assert weights[key].std().item() == pytest.approx(std, abs=3 * error + 5e-6), key
    assert model.patch_head.project[0].weight.std().item() == pytest.approx(0.012761, rel=0.01)


@pytest.mark.parametrize(("size", "side"), [(64, 2), (224, 7)])
def test_sizes_of_the_last_maps(size: int, side: int) -> None:
    with torch.device("meta"):
        trunk = Trunk(ModelConfig())
        seen: list[torch.Size] = []
        trunk.layer4.register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
        assert trunk(torch.empty(2, 3, size, size)).shape == (2, 2048)
    assert seen == [(2, 2048, side, side)]


def test_heads_start_with_different_weights() -> None:
    model = build_model(tiny_recipe())
    patch, image = model.patch_head.project[0], model.image_head[0]
    assert isinstance(patch, nn.Linear)
    assert patch.weight.shape == image.weight.shape
    assert not torch.equal(patch.weight, image.weight)


# --- the first step, at the reference's sizes ----------------------------------------------------

N, K, BATCH = 40_000, 32_000, 6  # scores and losses depend on K, and not on N


def first_step(kind: str, temperature: float, bank: MemoryBank, dtype: torch.dtype = torch.float32) -> StepLoss:
    """The loss of random embeddings against a fresh bank."""
    generator = torch.Generator().manual_seed(7)
    patches, images = (torch.randn(BATCH, 128, generator=generator).to(dtype) for _ in range(2))
    negatives = [torch.randint(0, N, (BATCH, K), generator=generator) for _ in range(2)]
    config = LossConfig(kind=kind, temperature=temperature)  # type: ignore[arg-type]
    weights = torch.full((BATCH,), 1 / BATCH)
    samples = Samples(torch.arange(BATCH), torch.empty(2, 0), weights, [BATCH], drawn=(negatives[0], negatives[1]))
    return Contrast(config, World())(bank, samples, patches, images)


@pytest.mark.parametrize(("init", "score", "z"), [("shared", 2.209, 2.829e6), ("rank_mean", 1.025, 1.314e6)])
def test_first_scores_and_z_are_the_recorded_ones(init: str, score: float, z: float) -> None:
    """E[exp(s)] of random unit vectors at T 0.07, and Z for N = 1,281,167 of them."""
    bank = MemoryBank(20_000, 128, MemoryConfig(init=init), seed=1, ranks=32)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    embeddings = F.normalize(torch.randn(64, 128, generator=generator))
    indices = torch.randint(0, 20_000, (64, 4001), generator=generator)
    criterion = Contrast(LossConfig(temperature=0.07), World())
    criterion.estimate_z(bank, indices, embeddings)
    mean = criterion.z.item() / 20_000
    assert mean == pytest.approx(score, rel=0.01)
    assert 1_281_167 * mean == pytest.approx(z, rel=0.01)


def test_losses_of_the_first_step_are_the_recorded_ones() -> None:
    bank = MemoryBank(N, 128, MemoryConfig(), seed=2)
    assert first_step("nce", 0.07, bank).loss.item() == pytest.approx(12.4, abs=0.5)
    losses = [
        first_step("cross_entropy", 0.1, MemoryBank(N, 128, MemoryConfig(), seed=s)).loss.item() for s in (1, 2, 3)
    ]
    assert sum(losses) / 3 == pytest.approx(10.7, abs=0.4)
    assert math.log(K + 1) == pytest.approx(10.37, abs=0.005)


def test_both_losses_are_scalars() -> None:
    for kind in ("nce", "cross_entropy"):
        assert first_step(kind, 0.07, MemoryBank(N, 128, MemoryConfig())).loss.shape == ()


def test_the_loss_is_computed_in_float32() -> None:
    """Of embeddings in float16, as autocast leaves them; scores in float16 would differ in the fourth digit."""
    bank = MemoryBank(N, 128, MemoryConfig())
    loss = first_step("cross_entropy", 0.1, bank, torch.float16).loss
    assert loss.dtype == torch.float32
    generator = torch.Generator().manual_seed(7)
    rounded = [torch.randn(BATCH, 128, generator=generator).half().float() for _ in range(2)]
    negatives = [torch.randint(0, N, (BATCH, K), generator=generator) for _ in range(2)]
    terms = []
    for embedding, drawn in zip(rounded, negatives):
        index = torch.cat([torch.arange(BATCH)[:, None], drawn], 1)
        scores = (bank.memory[index].double() * F.normalize(embedding.double())[:, None]).sum(2) / 0.1
        terms.append((scores.logsumexp(1) - scores[:, 0]).mean())
    assert loss.item() == pytest.approx(sum(terms).item() / 2, rel=1e-6)


# --- mixed precision -----------------------------------------------------------------------------


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """torch fills uninitialised memory with NaN, so that a use of it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_in_new_memory")
def test_a_skipped_first_step_leaves_no_trace() -> None:
    """The first steps of float16 overflow until the loss scale has come down."""
    recipe = tiny_recipe("train.precision=fp16")
    model = build_model(recipe)
    optimizer = build_optimizer(model, recipe)
    scaler = torch.amp.GradScaler("cpu")
    set_learning_rate(optimizer, 0.1)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    for gradient in (math.inf, 2.0):
        scaler.scale(torch.ones(()))  # makes the scale
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient * scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
    for name, value in model.named_parameters():
        decay = 1e-4 * start[name] if value.ndim > 1 else 0
        torch.testing.assert_close(value.detach(), start[name] - 0.1 * (2.0 + decay), msg=name)
