"""Banks whose rows start as embeddings of the untrained network: `memory.init = "forward"`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
import torch.nn.functional as F
from conftest import IMAGES, tiny_recipe
from torch import Tensor

from pirl.checkpoint import Checkpoints
from pirl.config import Recipe
from pirl.errors import ConfigError, PreemptedError, TrainingError
from pirl.loader import Loader
from pirl.memory import MemoryBank
from pirl.storage import open_storage
from pirl.training.initial_rows import STATISTICS_IMAGES, fill_bank
from pirl.training.loop import build_state, train
from pirl.training.spec import Options
from pirl.views import apply_photometrics, draw_photometrics
from pirl.world import World

FORWARD = ("memory.init=forward", "loss.negatives=all")


def first_rows(world: World, data: str, recipe: Recipe, workers: int = 0) -> dict[bool, dict[str, Any]]:
    """Return the rows of this rank, and the network's state after the pass, for a whole bank (False) and a cut one."""
    results = {}
    for cut in (False, True):
        loader = Loader(data, recipe, world, workers)
        state = build_state(recipe, loader.dataset.rows, world, cut=cut)
        assert not state.bank.memory.any()
        for _ in fill_bank(recipe, state.model, state.bank, loader, world):
            pass
        memory = state.bank.memory
        results[cut] = {"first": state.bank.first, "rows": memory, "model": state.model.state_dict()}
        assert state.model.training
    return results


@pytest.mark.parametrize("overrides", [[], ["data.images=3", "train.batch_size=3"]], ids=["images", "few images"])
def test_rows_do_not_depend_on_ranks(shards: str, tmp_path: Path, overrides: list[str]) -> None:
    """On 1, 2 and 4 ranks, whole and cut, also where a rank has one row or none; the network stays as it was."""
    recipe = tiny_recipe(*FORWARD, "train.last_batch=drop", *overrides)
    expected = first_rows(World(), shards, recipe)[False]
    rows = expected["rows"]
    assert rows.shape == (3 if overrides else IMAGES, 8)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
    fresh = build_state(recipe, 3, World()).model.state_dict()
    for size in (2, 4):
        results = ranks.run(first_rows, size, tmp_path / str(size), shards, recipe)
        for rank in results:
            assert torch.equal(rank[False]["rows"], results[0][False]["rows"])
            for name, value in fresh.items():
                assert torch.equal(rank[True]["model"][name], value), name
        cut = torch.cat([rank[True]["rows"] for rank in results])
        assert torch.equal(cut, results[0][False]["rows"])
        torch.testing.assert_close(cut, rows, rtol=0, atol=2e-6)


def test_rows_are_embeddings_of_the_untrained_network(shards: str) -> None:
    """The plain form: batch norm with the statistics of evenly spaced images, each row alone; the same by processes."""
    recipe = tiny_recipe(*FORWARD)
    rows = first_rows(World(), shards, recipe)[False]["rows"]
    assert torch.equal(first_rows(World(), shards, recipe, workers=2)[False]["rows"], rows)
    loader, model = Loader(shards, recipe, World(), 0), build_state(recipe, 2, World()).model

    def images(ids: np.ndarray) -> Tensor:
        batch = loader.dataset[0, ids]
        return apply_photometrics(batch.images, draw_photometrics(recipe.views, 0, 0, ids, [0]), recipe.views)

    assert IMAGES < STATISTICS_IMAGES
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean of what it sees
            module.reset_running_stats()
    with torch.no_grad():
        model.train().trunk(images(np.arange(IMAGES)))
        model.eval()
        for id in (0, 17, 41):
            embedding = model.image_head(model.trunk(images(np.array([id]))))[0]
            torch.testing.assert_close(rows[id], F.normalize(embedding, dim=0), rtol=0, atol=2e-6)
    assert rows.std(0).mean() > 1e-3  # they differ from image to image


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stop_during_the_pass_loses_nothing(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """A signal ends the pass within a batch; the next start makes it again and ends as a run without a signal."""
    recipe = tiny_recipe(*FORWARD, "train.epochs=1", f"memory.precision={precision}")
    train(recipe, Options(data=shards, out=str(tmp_path / "whole"), workers=0), World())
    fill, filled = MemoryBank.fill, []

    def fill_and_stop(self: MemoryBank, first: int, embeddings: Tensor) -> None:
        filled.append(first)
        fill(self, first, embeddings)
        if len(filled) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MemoryBank, "fill", fill_and_stop)
    options = Options(data=shards, out=str(tmp_path / "stopped"), workers=0)
    with pytest.raises(PreemptedError, match="before the first step"):
        train(recipe, options, World())
    assert filled == [0, 9]
    assert Checkpoints(open_storage(options.out) / "checkpoints").newest() is None
    train(recipe, options, World())
    assert filled == [0, 9, *range(0, IMAGES, 9)]
    states = [Checkpoints(open_storage(str(tmp_path / run)) / "checkpoints").load() for run in ("whole", "stopped")]
    whole, stopped = (state[1] for state in states if state)
    assert torch.equal(whole["bank"]["memory"], stopped["bank"]["memory"])
    assert all(torch.equal(value, stopped["model"][name]) for name, value in whole["model"].items())


def test_a_resumed_run_makes_no_pass(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(data=shards, out=str(tmp_path / "run"), workers=0, checkpoint_every_s=0, keep=9)
    train(tiny_recipe(*FORWARD, "train.epochs=1"), options, World())
    checkpoints = tmp_path / "run" / "checkpoints"
    (tmp_path / "run" / "DONE.json").unlink()
    (checkpoints / "step-00000005" / "COMMIT.json").unlink()
    monkeypatch.setattr(MemoryBank, "fill", lambda *_: pytest.fail("the bank was filled again"))
    train(tiny_recipe(*FORWARD, "train.epochs=1"), options, World())
    assert (checkpoints / "step-00000005" / "COMMIT.json").exists()


def test_an_embedding_that_is_not_finite_names_its_image(shards: str, tmp_path: Path) -> None:
    recipe = tiny_recipe(*FORWARD, "data.images=6", "train.batch_size=3")
    loader, state = Loader(shards, recipe, World(), 0), build_state(recipe, 6, World())
    with torch.no_grad():
        state.model.image_head[0].bias.fill_(torch.inf)
    with pytest.raises(TrainingError, match="image 0 by the untrained network is NaN or infinite"):
        next(fill_bank(recipe, state.model, state.bank, loader, World()))


def test_all_rows_are_filled_or_none_is_left_out() -> None:
    with pytest.raises(ConfigError, match='"visited" leaves out rows without a visit'):
        tiny_recipe("memory.init=forward", "loss.negatives=visited", "loss.kind=cross_entropy")
