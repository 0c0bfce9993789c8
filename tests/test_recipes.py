"""The six recipes of the zoo: every number of the reference, written out here once more by hand."""

from __future__ import annotations

import json
import sys
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import pytest
from conftest import shards_of
from images import folder_of_classes

from pirl import cli
from pirl.config import Recipe, load_recipe
from pirl.optim import learning_rate
from pirl.training.loop import train
from pirl.training.spec import Options
from pirl.world import World

GOLDEN = Path(__file__).parent / "data" / "recipes"
IMAGENET = 1_281_167


@dataclass(frozen=True)
class Zoo:
    """One row of the model zoo's table, with what its settings come to on 4 x 8 GPUs."""

    top1: float
    width: float
    head: str
    epochs: int
    iterations: int
    last_rate: float
    precision: str


ZOO = {
    "r50-200ep-linear": Zoo(62.9, 1, "linear", 200, 250_400, 0.00012739, "fp32"),
    "r50-200ep-mlp": Zoo(65.8, 1, "mlp", 200, 250_400, 0.00012739, "fp32"),
    "r50-800ep-linear": Zoo(64.29, 1, "linear", 800, 1_001_600, 0.00012046, "fp32"),
    "r50-800ep-mlp": Zoo(69.9, 1, "mlp", 800, 1_001_600, 0.00012046, "fp32"),
    "r50w2-400ep-linear": Zoo(69.3, 2, "linear", 400, 500_800, 0.00012185, "fp16"),
    "r50w2-400ep-mlp": Zoo(70.9, 2, "mlp", 400, 500_800, 0.00012185, "fp16"),
}


@pytest.fixture(params=ZOO)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def recipe(name: str) -> Recipe:
    return load_recipe(name)


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["pirl", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code in (0, None)
    return capsys.readouterr().out


def test_show_prints_the_golden_config(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A change of a default is a change of these files: `pirl show NAME > tests/data/recipes/NAME.toml`."""
    assert shown(monkeypatch, capsys, "show", name) == (GOLDEN / f"{name}.toml").read_text()


def test_length_and_learning_rates(name: str, recipe: Recipe) -> None:
    row = ZOO[name]
    assert recipe.published_top1 == row.top1
    assert recipe.train.epochs == row.epochs
    assert recipe.train.batch_size == 4 * 8 * 32
    assert recipe.steps_per_epoch(IMAGENET) == 1252
    assert recipe.train.epochs * recipe.steps_per_epoch(IMAGENET) == row.iterations
    assert recipe.data.images == 0
    assert learning_rate(recipe, 0) == pytest.approx(0.12, rel=1e-12)
    assert learning_rate(recipe, row.epochs - 1) == pytest.approx(row.last_rate, abs=5e-9)


def test_optimiser(recipe: Recipe) -> None:
    optim = recipe.optim
    assert (optim.momentum, optim.nesterov) == (0.9, False)
    assert (optim.weight_decay, optim.decay_norm_and_bias) == (1e-4, False)
    assert (optim.schedule, optim.warmup_epochs) == ("epoch", 0)
    assert (optim.base_lr, optim.end_lr_ratio) == (0.03, 0.001)


def test_head_loss_and_bank(name: str, recipe: Recipe) -> None:
    linear = ZOO[name].head == "linear"
    assert recipe.model.head == ZOO[name].head
    assert recipe.model.embedding_dim == 128
    assert recipe.loss.kind == ("nce" if linear else "cross_entropy")
    assert recipe.loss.temperature == (0.07 if linear else 0.1)
    assert recipe.loss.negatives == 32_000
    assert recipe.loss.patch_weight == 0.5
    assert not recipe.loss.exclude_positive
    assert (recipe.memory.momentum, recipe.memory.init) == (0.5, "shared")
    if not linear:
        assert recipe.model.image_head_relu == ("every" if ZOO[name].width == 1 else "none")


def test_trunk_and_precision(name: str, recipe: Recipe) -> None:
    model = recipe.model
    assert (model.block, model.layers, model.width) == ("bottleneck", (3, 4, 6, 3), ZOO[name].width)
    assert (model.stem, model.stem_stride) == ("imagenet", 2)
    assert recipe.train.precision == ZOO[name].precision


def test_geometry(recipe: Recipe) -> None:
    views = recipe.views
    assert (views.image_size, views.image_scale, views.image_ratio) == (224, (0.08, 1), (3 / 4, 4 / 3))
    assert (views.patch_crop_size, views.patch_scale, views.patch_ratio) == (255, (0.6, 1), (3 / 4, 4 / 3))
    assert (views.grid, views.cell, views.patch_size) == (3, 85, 64)
    assert (views.mean, views.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (recipe.eval.resize, recipe.eval.crop) == (256, 224)


def test_photometrics(name: str, recipe: Recipe) -> None:
    views = recipe.views
    strengths = (views.brightness, views.contrast, views.saturation, views.hue)
    assert (views.gray_probability, views.flip_probability) == (0.2, 0.5)
    if ZOO[name].head == "linear":
        assert (views.photometric, strengths, views.jitter_probability) == ("base", (0.4, 0.4, 0.4, 0.2), 1)
        assert views.posterize_probability == 0.66
    else:
        assert (views.photometric, strengths, views.jitter_probability) == ("blur", (0.8, 0.8, 0.8, 0.2), 0.8)
        assert (views.blur_probability, views.blur_sigma) == (0.5, (0.1, 2))


def test_a_recipe_is_complete_and_says_why_where_the_reference_is_ambiguous(name: str, recipe: Recipe) -> None:
    text = (resources.files("pirl") / "recipes" / f"{name}.toml").read_text()
    written = tomllib.loads(text)
    optional = {  # settings of the other chain or head
        "views": {"blur_probability", "blur_sigma"}
        if recipe.views.photometric == "base"
        else {"posterize_probability"},
        "model": {"image_head_relu"} if recipe.model.head == "linear" else set(),
    }
    for section, values in recipe.model_dump().items():
        assert section in written
        if isinstance(values, dict):
            assert set(values) - set(written[section]) <= optional.get(section, set()), section
    switches = ["init", "exclude_positive", "schedule", "last_batch"]
    switches += ["image_head_relu"] if recipe.model.head == "mlp" else []
    for switch in switches:
        (line,) = [line for line in text.splitlines() if line.startswith(f"{switch} = ")]
        assert "# " in line, switch


def test_recipes_are_listed_for_32_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["recipe"]: row for row in json.loads(shown(monkeypatch, capsys, "recipes", "--json"))}
    for name, row in ZOO.items():
        assert rows[name]["ranks"] == 32
        assert rows[name]["iterations"] == row.iterations
        assert rows[name]["learning_rate"] == pytest.approx(0.12, rel=1e-12)
        assert rows[name]["last_learning_rate"] == pytest.approx(row.last_rate, abs=5e-9)
        assert rows[name]["published_top1"] == row.top1


def test_the_table_fits_into_120_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(monkeypatch, capsys, "recipes")
    assert max(map(len, text.splitlines())) <= 120
    assert text.count("│ r50") == 6  # one line each
    for number in ("250,400", "1,001,600", "500,800", "0.12", "64.29"):
        assert number in text


@pytest.mark.parametrize(("ranks", "rate", "steps"), [(8, 0.03, 5005), (64, 0.24, 626), (1, 0.00375, 40_037)])
def test_another_number_of_ranks_rescales_as_the_reference_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ranks: int, rate: float, steps: int
) -> None:
    """Steps by hand: 1,281,167 images are padded to a multiple of the ranks, then dealt in batches of 32."""
    rows = {
        row["recipe"]: row for row in json.loads(shown(monkeypatch, capsys, "recipes", "--json", "--ranks", str(ranks)))
    }
    row = rows["r50-200ep-linear"]
    assert row["batch_size"] == 32 * ranks
    assert row["iterations"] == 200 * steps
    assert row["learning_rate"] == pytest.approx(rate, rel=1e-12)
    assert row["last_learning_rate"] == pytest.approx(0.00012739 * rate / 0.12, rel=1e-4)
    text = shown(monkeypatch, capsys, "recipes", "--ranks", str(ranks))
    assert f"train.batch_size={32 * ranks}" in text
    assert "proportional to the global batch" in text


def test_photos_are_learned_from_fifty_images(tmp_path: Path) -> None:
    shards = shards_of(folder_of_classes(tmp_path / "photos", classes=2, images=25), tmp_path / "shards")
    completion = train(
        load_recipe("photos", ["train.epochs=1"]), Options(data=shards, out=str(tmp_path / "run")), World()
    )
    assert completion.steps == 1
