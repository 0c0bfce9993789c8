"""Initial weights of a new run: of a run, a registered version, or a file of weights.

They are checked and copied into the run before its ranks start. Ranks and pods read the copy, so that they need not
see the place. The backbone is always taken, the heads where the source has them and they fit. Memory bank, optimiser
and schedule are those of the recipe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from pirl.config import Recipe
from pirl.embedding.loading import TORCH_SUFFIXES, registered_version
from pirl.errors import CheckpointError, StorageNotFoundError, UsageError
from pirl.evaluate.load import load_model
from pirl.export.identify import check, check_architecture
from pirl.export.vissl import Contents, contents_of, read_contents
from pirl.initial.warm import WarmStart, warm_start
from pirl.logs import info
from pirl.model import build_model, weights_digest
from pirl.registry.load import load_version
from pirl.results import InitialRecord
from pirl.run import Run, split_checkpoint_uri
from pirl.shards import Manifest
from pirl.storage import expand_home, local_path, open_storage
from pirl.training.spec import TrainingSpec

SAFETENSORS = ".safetensors"
FOLDER_FILE = "model.safetensors"  # in a folder of Hugging Face's layout
SCHEDULE = ("train", "optim")
"""Sections of a recipe that may differ from those of the run that is extended."""


@dataclass(frozen=True)
class Initial:
    """Weights under the names of `PIRL`, and notes on what of the source was not taken."""

    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """Digest of the weights, whatever file they came from."""
        return weights_digest(self.tensors)


def check_origin(spec: TrainingSpec) -> list[str]:
    """Return in a few lines what the training starts from, or raise where it cannot start from it.

    A run that has a checkpoint resumes from that one. It must have started from the same place or weights.
    """
    if spec.init and spec.extend:
        raise UsageError("--init and --extend exclude each other", "choose one: --extend takes weights and memory bank")
    run = Run.at(spec.out)
    if run.checkpoints().newest():
        _check_same_origin(run, spec)
        return []
    if spec.init:
        initial = read_initial(spec.init, spec.recipe)
        return [f"initial weights: {spec.init}, digest {initial.digest[:12]}", *initial.notes]
    if spec.extend:
        _extended(spec)
        return [f"extends {spec.extend}: its weights and memory bank; optimiser and schedule restart"]
    return []


def prepare_origin(spec: TrainingSpec) -> None:
    """Write into a run without a checkpoint what it starts from."""
    run = Run.at(spec.out)
    if run.checkpoints().newest():
        return
    if spec.extend:
        start = _extended(spec)
        warm_start(start, spec.data, spec.out, spec.recipe)
        info(f"extending {start.run}/{start.checkpoint}: optimiser and schedule restart")
    if not spec.init:
        run.discard_initial()
        return
    initial = read_initial(spec.init, spec.recipe)
    for note in initial.notes:
        info(note)
    data = save({name: tensor.contiguous() for name, tensor in initial.tensors.items()})
    record = InitialRecord(source=spec.init, digest=initial.digest, sha256=hashlib.sha256(data).hexdigest())
    run.save_initial(record, data)
    info(f"initial weights: {spec.init}, digest {record.digest[:12]}")


def _check_same_origin(run: Run, spec: TrainingSpec) -> None:
    record, warm = run.initial(), run.warm_start()
    if spec.extend and (not warm or split_checkpoint_uri(warm.source)[0] != Run.at(spec.extend).uri):
        raise _other_origin(run, f"extends {warm.source}" if warm else "extends no run", f"--extend {spec.extend}")
    if not spec.init or (record and record.source == spec.init):
        return
    if not record or record.digest != read_initial(spec.init, spec.recipe).digest:
        start = f"{record.source} (digest {record.digest[:12]})" if record else "no given weights"
        raise _other_origin(run, f"started from {start}", f"--init {spec.init}")


def _other_origin(run: Run, start: str, option: str) -> UsageError:
    return UsageError(f"{run.place} {start}: {option} differs", "omit the option to resume, or choose another --out")


def _extended(spec: TrainingSpec) -> WarmStart:
    """Return the checkpoint that a run extends, or raise where the continuation would not be of the same training."""
    origin = Run.at(spec.extend)
    commit = origin.commit()
    if origin.completion() is None and origin.checkpoint is None:
        raise UsageError(
            f"{origin.place} is not finished: it has {commit.name}, expected a finished run",
            "run its own command again to resume it",
        )
    if commit.data_digest != (digest := Manifest.load(open_storage(spec.data)).digest):
        raise UsageError(
            f"{origin.place} was trained on other data (digest {commit.data_digest[:12]}, these shards have "
            f"{digest[:12]})",
            "give its own shards; for more images use `pirl retrain --warm-epochs 10`",
        )
    differences = [line for line in origin.recipe().differences(spec.recipe) if line.split(".")[0] not in SCHEDULE]
    if differences:
        raise UsageError(
            f"{origin.place} has another recipe:\n  " + "\n  ".join(differences),
            "only settings of train and optim may differ from those of the extended run",
        )
    return WarmStart(origin.uri, commit.name, spec.data)


def read_initial(source: str, recipe: Recipe) -> Initial:
    """Return the weights at a place, fitted to the network of a recipe; raise `CheckpointError` with all misfits."""
    with torch.device("meta"):
        model = build_model(recipe)
    contents = _contents(source)
    notes = []
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.startswith("trunk.")}
    if {name: getattr(tensor, "shape", None) for name, tensor in contents.heads.items()} != expected:
        if contents.heads:
            notes.append(f"initial weights: the heads in {source} are not those of {recipe.name}: backbone only")
        contents = Contents(contents.trunk, ignored=contents.ignored)
    check_architecture(contents, {recipe.name: recipe}, source)
    notes += [f"initial weights: {note}" for note in check(contents, model, recipe, Path(source))]
    return Initial({name: tensor.detach() for name, tensor in contents.model.items()}, notes)


def _contents(source: str) -> Contents:
    suffix = PurePosixPath(source).suffix
    if suffix in (SAFETENSORS, *TORCH_SUFFIXES):
        with _local_copy(source) as path:
            return _read(path)
    if open_storage(source).exists(FOLDER_FILE):
        return _contents(f"{source.rstrip('/')}/{FOLDER_FILE}")
    run = Run.at(source)
    if run.exists():
        state = load_model(run, rows=range(0))[2].state_dict()
        trunk = {name.removeprefix("trunk."): tensor for name, tensor in state.items() if name.startswith("trunk.")}
        return Contents(trunk, {name: tensor for name, tensor in state.items() if not name.startswith("trunk.")})
    return Contents(dict(load_version(registered_version(source))[1].state_dict()))


def _read(path: Path) -> Contents:
    """Return weights and heads of a file alone: bank, optimiser and progress of a checkpoint are not taken."""
    if path.suffix != SAFETENSORS:
        contents = read_contents(path)
    else:
        try:
            contents = contents_of(load_file(path), path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: {error}", "copy or export it again") from None
    return Contents(contents.trunk, contents.heads, ignored=contents.ignored)


@contextmanager
def _local_copy(source: str) -> Iterator[Path]:
    """Provide the file at a path or URI on this machine."""
    if "://" not in source:
        path = expand_home(source)
        if not path.is_file():
            raise UsageError(f"initial weights not found: {source} is not a file", "name an existing file, or a run")
        yield path
        return
    folder, _, name = source.rpartition("/")
    storage = open_storage(folder)
    if own := local_path(storage):
        with _local_copy(str(own / name)) as path:
            yield path
        return
    with TemporaryDirectory(prefix="pirl-init-") as temporary:
        path = Path(temporary) / name
        try:
            storage.download(name, path)
        except StorageNotFoundError:
            raise UsageError(f"initial weights not found: {source}", "name an existing object, or a run") from None
        yield path
