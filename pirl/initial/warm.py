"""A warm start: a new run that begins with what an older one has learned, on the same images and more.

The trunk, the heads and the constant Z are taken over. The memory bank is laid out again, because ids are dense and in
the order of the source: an image added in the middle moves the ids behind it. An image is recognised by its name and
its size in bytes, both from the shards' indexes (no image is read); its row moves with it. The row of an image that is
new is a random unit vector, as in a fresh bank. The optimiser and the schedule start from the beginning.

The result is a checkpoint of step 0 in the new run: training resumes from it like from any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pirl.checkpoint import Cursor
from pirl.config import Recipe
from pirl.data import CropDataset
from pirl.errors import CheckpointError
from pirl.evaluate.load import BANK
from pirl.loss import Contrast
from pirl.memory import RowsBank
from pirl.model import build_model
from pirl.optim import build_optimizer
from pirl.results import WarmRecord
from pirl.run import Run
from pirl.shards import ShardReader
from pirl.training.state import TrainState
from pirl.world import World


def same_images(old: ShardReader, new: ShardReader) -> np.ndarray:
    """Return (len(new),) int64: the id in `old` of every image of `new`, -1 for one that was not there."""
    old_ids = {key: id for id, key in enumerate(_keys(old))}
    return np.array([old_ids.get(key, -1) for key in _keys(new)], np.int64)


def only_added(old: ShardReader, new: ShardReader) -> bool:
    """Return whether `new` has every image of `old`, and more."""
    return int((same_images(old, new) >= 0).sum()) == len(old) < len(new)


@dataclass(frozen=True)
class WarmStart:
    """The origin of a new run: a checkpoint of an older run, and the shards that it was trained on."""

    run: str
    checkpoint: str
    data: str


def warm_start(start: WarmStart, data: str, out: str, recipe: Recipe) -> tuple[int, int]:
    """Make the checkpoint of step 0 of the run `out` on `data`. Return (rows kept, new rows).

    `CheckpointError` when that checkpoint's bank is not one of that data's images.
    """
    origin = Run(Run.at(start.run).storage, start.checkpoint or None)
    commit, saved = origin.load(rows={BANK: range(0)})
    before, after = CropDataset(start.data, recipe), CropDataset(data, recipe)
    old_row = np.full(len(before.reader), -1, np.int64)  # of every old id; -1 where the recipe left the image out
    old_row[before.image_ids(np.arange(before.rows))] = np.arange(before.rows)
    old_id = same_images(before.reader, after.reader)[after.image_ids(np.arange(after.rows))]
    source = np.where(old_id >= 0, old_row[old_id], -1)
    kept = int((source >= 0).sum())

    blank = recipe.loss.negatives == "visited"
    dim, seed = recipe.model.embedding_dim, recipe.train.seed
    bank = RowsBank(after.rows, dim, recipe.memory, seed, World(), blank=blank)  # saved in pieces, for any rank's rows
    rows = 0
    for first, piece in origin.checkpoints().pieces(commit.name, BANK):
        moved = np.flatnonzero((source >= first) & (source < first + len(piece)))
        bank.memory[torch.from_numpy(moved)] = piece[torch.from_numpy(source[moved] - first)].to(bank.memory.dtype)
        rows += len(piece)
    if rows != before.rows:
        raise CheckpointError(
            f"{start.run} has a memory bank of {rows:,} rows, {start.data} has {before.rows:,} images",
            "these are not the shards that it was trained on; set --warm-epochs -1 for a cold start",
        )
    criterion = Contrast(recipe.loss, World())
    criterion.z.copy_(saved["bank"]["z"])
    model = build_model(recipe)
    model.load_state_dict(saved["model"])
    digest = after.reader.manifest.digest
    scaler = torch.amp.GradScaler("cpu", enabled=recipe.train.precision == "fp16")
    state = TrainState(model, bank, criterion, build_optimizer(model, recipe), scaler)
    run = Run.at(out)
    checkpoints = run.checkpoints()
    checkpoints.save(state.to_dict(recipe, digest), Cursor(), recipe.digest(), digest)
    if error := checkpoints.wait():
        raise error
    run.save_warm_start(WarmRecord(source=origin.checkpoint_uri(commit.name), rows=after.rows, kept=kept))
    return kept, after.rows - kept


def _keys(reader: ShardReader) -> list[tuple[str, int]]:
    return [(reader.name(id), size) for id, size in enumerate(reader.sizes().tolist())]
