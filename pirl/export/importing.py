"""Import of VISSL's checkpoints: the recipe, checks, and the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pirl import __version__
from pirl.checkpoint import Cursor, Rows, SavedTraining, saved_training
from pirl.config import Recipe
from pirl.errors import CheckpointError, UsageError
from pirl.export.identify import check, identify
from pirl.export.vissl import Contents, completed_epochs, read_contents
from pirl.memory import MemoryBank
from pirl.metrics import Context, open_log
from pirl.model import PIRL, build_model
from pirl.optim import build_optimizer, parameter_groups
from pirl.outputs import check_run_output
from pirl.results import Completion
from pirl.run import Run
from pirl.shards import Manifest
from pirl.storage import open_storage, sha256_file
from pirl.text import count

UNKNOWN_DATA = "unknown"


@dataclass
class Import:
    """A file that passed all checks, and the content of its run."""

    contents: Contents
    recipe: Recipe
    candidates: list[str]
    """Names of the recipes that it may be of: one, unless the file fits several."""
    state: SavedTraining
    cursor: Cursor
    data_digest: str
    lacks: list[str] = field(default_factory=list)
    """Of "heads", "bank" and "optimizer", what was not in the file: a run that lacks any is never resumed."""
    notes: list[str] = field(default_factory=list)
    uri: str = ""

    @property
    def epochs(self) -> int:
        return completed_epochs(self.cursor, self.recipe, len(self.state["bank"]["memory"]))

    def summary(self) -> str:
        """Return one line with its recipes and its contents."""
        parts = [f"trunk ({count(len(self.contents.trunk), 'tensor')})"]
        if "heads" not in self.lacks:
            parts.append(f"heads ({count(len(self.contents.heads), 'tensor')})")
        if "bank" not in self.lacks:
            z = self.state["bank"]["z"].item()
            parts.append(f"memory bank of {count(len(self.state['bank']['memory']), 'row')}")
            parts.append(f"Z {z:.4g}" if z > 0 else "no Z")
        if "optimizer" not in self.lacks:
            parts.append("optimiser")
            parts.append(f"after epoch {self.epochs} of {self.recipe.train.epochs}")
        return f"{' or '.join(self.candidates)}: {', '.join(parts)}"


def import_file(
    path: Path, out: str, data: str | None = None, recipe: str | None = None, overrides: Sequence[str] = ()
) -> Import:
    """Make a run of a checkpoint file. Nothing is written unless all of the file is good."""
    run = Run.at(out)
    if run.exists():
        raise UsageError(f"{out} holds a run already", "give another --out: an import never writes over a run")
    check_run_output(out, data=data)
    imported = examine(path, data, recipe, overrides)
    imported.state["imported"] = {"file": path.name, "sha256": sha256_file(path), "lacks": imported.lacks}
    checkpoints = run.checkpoints()
    memory = imported.state["bank"]["memory"]
    bank = {**imported.state["bank"], "memory": Rows(memory, 0, len(memory))}  # in pieces, for any rank's rows
    state = {**imported.state, "bank": bank}
    checkpoints.save(state, imported.cursor, imported.recipe.digest(), imported.data_digest)
    if error := checkpoints.wait():
        raise error
    log = open_log(Context(run.storage), ["jsonl", "console"])
    log.event("import", **imported.state["imported"], recipe=imported.recipe.name, version=__version__)
    log.flush()
    if not imported.lacks and imported.epochs >= imported.recipe.train.epochs:
        run.complete(_completion(imported, run.checkpoint_uri(run.commit().name)))
    run.save_recipe(imported.recipe)  # last: it makes the folder a run
    imported.uri = run.uri
    return imported


def _completion(imported: Import, checkpoint: str) -> Completion:
    return Completion(
        steps=imported.cursor.step,
        epochs=imported.recipe.train.epochs,
        images_seen=imported.epochs * len(imported.state["bank"]["memory"]),
        seconds=imported.cursor.seconds,
        checkpoint=checkpoint,
        recipe=imported.recipe.name,
        recipe_digest=imported.recipe.digest(),
        data_digest=imported.data_digest,
        ranks=0,  # not in the file
        version=__version__,
        imported=imported.state["imported"]["file"],
    )


def examine(path: Path, data: str | None = None, recipe: str | None = None, overrides: Sequence[str] = ()) -> Import:
    """Read a file, identify its recipe, and check all of it; raise `CheckpointError` with every problem."""
    manifest = Manifest.load(open_storage(data)) if data else None
    contents = read_contents(path)
    chosen, candidates, notes = identify(contents, path, recipe, overrides)
    with torch.device("meta"):
        model = PIRL(chosen.model, chosen.views)
    notes += check(contents, model, chosen, path)

    lacks = [] if contents.heads else ["heads"]
    fresh = build_model(chosen).state_dict() if lacks else {}
    names = model.state_dict()
    state: dict[str, Any] = {"model": {name: contents.model.get(name, fresh.get(name)) for name in names}}

    rows = len(contents.loss["memory"]) if contents.loss else 0
    if manifest and contents.loss and rows != chosen.rows(manifest.images):
        raise CheckpointError(
            f"{path} has a memory bank of {rows:,} rows, and {data} has {manifest.images:,} images",
            "give the shards of the images that it was trained on: all of them, in the same order",
        )
    if contents.loss:
        z = contents.extras.z if contents.extras else contents.params[2]  # VISSL's is rounded to float32
        state["bank"] = {"memory": contents.loss["memory"], "z": torch.tensor(z, dtype=torch.float64)}
    else:
        lacks.append("bank")
        rows = chosen.rows(manifest.images) if manifest else 0
        bank = MemoryBank(rows, chosen.model.embedding_dim, chosen.memory, chosen.train.seed)
        state["bank"] = {"memory": bank.memory, "z": torch.tensor(-1.0, dtype=torch.float64)}

    optimizer, why = optimizer_state(contents, model, chosen)
    if why or "bank" in lacks:
        lacks.append("optimizer")
        notes += [why] if why and contents.momenta else []
    state["optimizer"] = optimizer
    state["scaler"] = contents.scaler if chosen.train.precision == "fp16" else {}
    state["recipe"] = chosen.to_toml()
    cursor, remarks = _cursor(contents, chosen, rows)
    state["data_digest"] = digest = _digest(contents, manifest, lacks)
    if lacks:
        remarks.append(f"no {', '.join(lacks)} in the file: the run can be evaluated and exported, not resumed")
    elif digest == UNKNOWN_DATA and cursor.epoch < chosen.train.epochs:
        remarks.append("to continue this training, import with --data: the shards that it was trained on")
    saved = saved_training(state, f"the state in {path}")
    return Import(contents, chosen, candidates, saved, cursor, digest, lacks, [*notes, *remarks])


def _digest(contents: Contents, manifest: Manifest | None, lacks: list[str]) -> str:
    """Return the digest of the data that the run can be resumed on, or a text that every training refuses."""
    if lacks:
        return "trunk only" if "heads" in lacks else f"no {lacks[0]}"
    if manifest:
        return manifest.digest
    return contents.extras.data_digest if contents.extras else UNKNOWN_DATA


def _cursor(contents: Contents, recipe: Recipe, rows: int) -> tuple[Cursor, list[str]]:
    """Return the cursor at which training resumes; an interrupted epoch starts again, in our own order."""
    if contents.extras:
        return contents.extras.cursor, []
    steps = contents.epochs * recipe.steps_per_epoch(rows)
    notes = []
    if contents.loss and contents.iteration > steps:
        notes.append(f"written within epoch {contents.epochs + 1}, which would start again")
    elif contents.loss and contents.iteration < steps:
        notes.append(
            f"the file counts {contents.iteration:,} steps, {contents.epochs} epochs of {rows:,} images in batches of "
            f"{recipe.train.batch_size} make {steps:,}"
        )
    return Cursor(epoch=contents.epochs, samples=0, step=steps), notes


def optimizer_state(contents: Contents, model: PIRL, recipe: Recipe) -> tuple[dict[str, Any], str]:
    """Return the state for our optimiser, and why the file's was not taken, if it was not.

    Both keep convolutions, batch norms, linear weights and linear biases in four groups, each in module order: the
    n-th of a file is the n-th of this model, whatever its number is.
    """
    own = parameter_groups(model, recipe.optim)
    groups = build_optimizer(nn.Linear(1, 1), recipe).state_dict()["param_groups"]  # for the settings next to "params"
    first = 0
    for group, parameters in zip(groups, own):
        group["params"] = list(range(first, first := first + len(parameters["params"])))
    result: dict[str, Any] = {"state": {}, "param_groups": groups}
    if not contents.momenta:
        return result, "the file has no optimiser"
    sizes = [len(group) for group in contents.momenta], [len(group["params"]) for group in own]
    if sizes[0] != sizes[1]:
        return result, f"the optimiser was not read: it has groups of {sizes[0]} tensors, ours of {sizes[1]}"
    for group in groups:
        group["lr"] = contents.learning_rate
    momenta = list(chain.from_iterable(contents.momenta))
    if not contents.iteration and all(momentum is None for momentum in momenta):
        return result, ""  # before the first step
    shapes = [parameter.shape for group in own for parameter in group["params"]]
    for index, (momentum, shape) in enumerate(zip(momenta, shapes)):
        if not isinstance(momentum, Tensor) or momentum.shape != shape:
            shown = tuple(momentum.shape) if isinstance(momentum, Tensor) else "none"
            return result, f"the optimiser was not read: momentum {index} is {shown}, expected {tuple(shape)}"
    result["state"] = {index: {"momentum_buffer": momentum} for index, momentum in enumerate(momenta)}
    return result, ""
