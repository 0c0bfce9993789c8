"""A pretext is one file and one line of `PRETEXTS`: views, head, training, plan and sheet have it by that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IMAGES, tiny_recipe
from images import flat_folder

from pirl.config import Recipe, parse_recipe
from pirl.data import CropDataset
from pirl.errors import ConfigError
from pirl.model import build_model
from pirl.plan import plan_training
from pirl.registry import VersionRecord, model_card
from pirl.report import write_preview
from pirl.run import Run
from pirl.sections import PRETEXTS
from pirl.training.loop import train
from pirl.training.spec import Options
from pirl.views import crop_batch, draw_geometry, open_pretext
from pirl.world import World


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setitem(PRETEXTS, "rotation", "rotation:Rotation")
    return tiny_recipe("views.pretext=rotation", "train.epochs=1")


def test_the_second_view_is_made_by_it(recipe: Recipe, shards: str) -> None:
    rows = np.arange(IMAGES)
    dataset = CropDataset(shards, recipe)
    batch = dataset[0, rows]
    assert batch.elements.shape == (IMAGES, 16, 16, 3)
    images = [np.asarray(dataset.reader.image(int(id))) for id in rows]
    assert np.array_equal(batch.elements.numpy(), crop_batch(images, rows, 0, 0, recipe.views)[1])
    sizes = np.array([image.shape[:2] for image in images])
    turns = draw_geometry(recipe.views, 0, 0, rows, sizes).places.turns
    assert set(turns.tolist()) == {0, 1, 2, 3}
    images_alone = CropDataset(shards, tiny_recipe())[0, rows].images
    assert torch.equal(batch.images, images_alone)  # the first view does not depend on the pretext


def test_the_head_and_the_training_are_its_own(recipe: Recipe, shards: str, tmp_path: Path) -> None:
    done = train(recipe, Options(data=shards, out=str(tmp_path / "run"), workers=0), World())
    assert done.images_seen == IMAGES
    run = Run.at(str(tmp_path / "run"))
    assert run.recipe() == recipe
    loaded = run.checkpoints().load()
    assert loaded is not None
    assert set(loaded[1]["model"]) == set(build_model(recipe).state_dict())
    assert "patch_head.0.weight" in loaded[1]["model"]
    assert plan_training(recipe, nodes=1, gpus=1, images=IMAGES).fits


@pytest.mark.parametrize("name", ["sheet.png", "sheet.html"])
def test_the_sheet_of_views_shows_it(recipe: Recipe, tmp_path: Path, name: str) -> None:
    folder = flat_folder(tmp_path / "images", images=4, width=20, height=28)
    write_preview(recipe, str(folder), tmp_path / name, count=2)
    content = (tmp_path / name).read_bytes()
    assert content.startswith(b"\x89PNG") or b"turned crop, quarter turns" in content


def test_the_model_card_names_it(recipe: Recipe) -> None:
    record = VersionRecord(run_id="run", files={}, config=recipe)
    assert "what the pretext rotation makes of it" in model_card(record)
    assert "what the pretext jigsaw makes of it" in model_card(VersionRecord(run_id="run", files={}))


def test_an_unknown_pretext_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pretext 'jigsaws' not found\. Did you mean 'jigsaw'"):
        tiny_recipe("views.pretext=jigsaws")


def test_recipes_of_version_0_1_keep_their_digests(recipe: Recipe) -> None:
    """The key came later: at its default it changes no digest; another pretext is another training."""
    plain = tiny_recipe("train.epochs=1")
    assert "views.pretext" not in plain.learned()
    assert len(plain.digests()) == 2
    assert recipe.digests() == {recipe.digest()} != {plain.digest()}
    assert parse_recipe(recipe.to_toml()) == recipe
    assert open_pretext(plain.views).elements == 4
