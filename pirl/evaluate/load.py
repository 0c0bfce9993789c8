"""Network of a run for an evaluation, an export or a report, and checks of its features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pirl.checkpoint import Commit, SavedTraining
from pirl.config import Recipe, parse_recipe
from pirl.errors import CheckpointError
from pirl.model import PIRL, Trunk, build_model
from pirl.run import Run
from pirl.shards import ShardReader

COLLAPSED = 1e-8  # share of a feature's mean square that is variance; rounding alone makes about 1e-14
BANK = "bank/memory"  # in a checkpoint's state


def load_model(uri: str | Run, rows: range | None = None) -> tuple[Recipe, Commit, PIRL, Tensor]:
    """Return the network of a run's newest checkpoint, or of the one named, and the (N, D) rows of its memory bank.

    The network is in evaluation mode, on the CPU. The recipe is the checkpoint's, with the run's own section `eval`:
    that may change after the training. With `rows`, only these of the bank are read.
    """
    recipe, commit, model, saved = _load(uri, None if rows is None else {BANK: rows})
    return recipe, commit, model, saved["bank"]["memory"]


def load_trunk(uri: str | Run) -> tuple[Recipe, Commit, Trunk]:
    """Return what `load_model` does, of the network its trunk alone."""
    recipe, commit, model, _ = _load(uri, {BANK: range(0)})
    return recipe, commit, model.trunk


def _load(uri: str | Run, rows: Mapping[str, range] | None = None) -> tuple[Recipe, Commit, PIRL, SavedTraining]:
    run = uri if isinstance(uri, Run) else Run.at(uri)
    commit, saved = run.load(rows)
    recipe = parse_recipe(saved["recipe"], origin=f"the recipe inside {commit.name}")
    model = build_model(recipe)
    model.load_state_dict(saved["model"])
    return with_own_eval(run, recipe), commit, model.eval(), saved


def with_own_eval(run: Run, recipe: Recipe) -> Recipe:
    """Return a checkpoint's recipe with the section `eval` of the run that holds it."""
    return recipe.model_copy(update={"eval": run.recipe().eval}) if run.exists() else recipe


def require_finite(features: Tensor, ids: Sequence[int] | np.ndarray, reader: ShardReader, trunk: str) -> None:
    """Raise `CheckpointError` naming the first image whose features, one row of `features` each, are not finite."""
    finite = torch.isfinite(features).flatten(1).all(1)
    bad = (~finite).nonzero().flatten().tolist()
    if bad:
        raise not_finite(int(ids[bad[0]]), len(bad), len(features), reader, trunk)


def not_finite(id: int, bad: int, images: int, reader: ShardReader, trunk: str) -> CheckpointError:
    """Return the error of `bad` of `images` images, of which `id` is the first."""
    return CheckpointError(
        f"features of the {trunk} trunk are NaN or infinite: image {id} ({reader.name(id)}) of "
        f"{reader.storage.uri}, {bad:,} of {images:,} images",
        "evaluate an older checkpoint (RUN/checkpoints/step-N); `pirl report RUN` shows how the training went",
    )
