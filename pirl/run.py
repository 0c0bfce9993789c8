"""The layout of a run's folder, and of the folder that holds data, runs and registry.

    config.toml      the resolved recipe             eval.json        probes of the backbone and of random weights
    metrics.jsonl    one line each 50 steps          eval_zoo.json    the zoo's linear protocol, layer by layer
    events.jsonl     starts, resumes, saves          gate.json        promoted or not, and why
    checkpoints/     complete or absent              registered.json  the version it became
    DONE.json        written last by rank 0          steps/           time and memory of each step
    warm.json        what a warm start began with    report.html      all of this on one page
    eval_bank.json   neighbours in the memory bank   eval_parts/      of an evaluation under way
    init.json        weights that it started from    init.safetensors the weights
    sinks/           files of TensorBoard, MLflow, Weights & Biases

No other module has these names. Contents are typed (`pirl.results`). Nothing is read until it is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pirl import logs
from pirl.config import Recipe, parse_recipe
from pirl.errors import CheckpointError, StorageNotFoundError
from pirl.layer_results import LayersEvaluation
from pirl.lines import Event, MetricsLine, ProgressLine, parse_lines
from pirl.results import (
    Completion,
    Content,
    Evaluation,
    GateDecision,
    InitialRecord,
    Registered,
    StepRecord,
    WarmRecord,
)
from pirl.storage import Storage, local_path, open_storage
from pirl.text import count

if TYPE_CHECKING:  # importing it loads torch, which a look into a folder does not need
    from pirl.checkpoint import Checkpoints, Commit, SavedTraining

RECIPE, DONE = "config.toml", "DONE.json"
METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
EVALUATION, LAYERS, CHAMPION = "eval.json", "eval_zoo.json", "eval_champion.json"
BANK_EVALUATION = "eval_bank.json"
GATE, REGISTERED = "gate.json", "registered.json"
WARM, REPORT = "warm.json", "report.html"
INITIAL, INITIAL_WEIGHTS = "init.json", "init.safetensors"
CHECKPOINTS, STEPS, SINKS, EVALUATION_PARTS = "checkpoints", "steps", "sinks", "eval_parts"
EVALUATION_PROGRESS = "eval_progress.jsonl"

KINDS: dict[str, type[Any]] = {METRICS: MetricsLine, EVENTS: Event}
NO_CHECKPOINT_HINT = "give the --out of a `pirl train` that has started"

T = TypeVar("T", bound=Content)


def split_checkpoint_uri(uri: str) -> tuple[str, str | None]:
    """Return the run and the checkpoint's name of `RUN`, `RUN/checkpoints` or `RUN/checkpoints/step-N`."""
    match = re.fullmatch(rf"(.+?)(?:(?<!/)/{CHECKPOINTS}(?:/(step-[^/]+))?)?", uri.rstrip("/"))
    return (match[1], match[2]) if match else (uri, None)


def read_lines(storage: Storage, name: str) -> list[Any]:
    """Return the lines of a record, of the kind of its file; [] without one; leave out damaged ones with a warning."""
    try:
        text = storage.read_bytes(name).decode(errors="replace")
    except StorageNotFoundError:
        return []
    lines, damaged = parse_lines(text, KINDS[name])
    if damaged:
        logs.warn(f"{storage.uri}/{name} has {count(damaged, 'line')} that cannot be read: left out")
    return lines


@dataclass(frozen=True)
class Record:
    """Metrics and events of a training."""

    metrics: list[MetricsLine]
    """By step."""
    events: list[Event]
    """In order of time."""

    @property
    def last(self) -> MetricsLine | None:
        """The newest interval."""
        return self.metrics[-1] if self.metrics else None


@dataclass(frozen=True)
class Run:
    """One run's folder. `checkpoint` is the name of the checkpoint that its URI has named, if any."""

    storage: Storage
    checkpoint: str | None = None

    @classmethod
    def at(cls, uri: str | Storage) -> Run:
        """Return the run at `RUN`, `RUN/checkpoints` or `RUN/checkpoints/step-N`."""
        if isinstance(uri, Storage):
            return cls(uri)
        folder, checkpoint = split_checkpoint_uri(uri)
        return cls(open_storage(folder), checkpoint)

    @property
    def uri(self) -> str:
        return self.storage.uri

    @property
    def place(self) -> str:
        """The location for messages: a path as it is, where `uri` has its blanks and brackets as %20 and %5B."""
        return str(local_path(self.storage) or self.uri)

    @property
    def name(self) -> str:
        return self.uri.rpartition("/")[2]

    # ---- the recipe: a folder with one is a run

    def exists(self) -> bool:
        """Return whether a training or an import has begun in this folder."""
        return self.storage.exists(RECIPE)

    def recipe_text(self) -> str:
        """Return the resolved recipe as TOML; raise `StorageNotFoundError` without a run."""
        try:
            return self.storage.read_bytes(RECIPE).decode()
        except StorageNotFoundError:
            raise StorageNotFoundError(
                f"{self.place} does not hold a run: {RECIPE} is missing",
                "give the --out of a `pirl train` that has started; `pirl runs` lists runs",
            ) from None

    def recipe(self) -> Recipe:
        """Return the resolved recipe; raise `StorageNotFoundError` without a run."""
        return parse_recipe(self.recipe_text(), origin=f"{self.uri}/{RECIPE}")

    def save_recipe(self, recipe: Recipe) -> None:
        self.storage.write_bytes(RECIPE, recipe.to_toml().encode())

    def update_recipe(self, recipe: Recipe) -> None:
        """Save the recipe of a complete run where settings that are not learned have changed, as those of `eval`."""
        if self.recipe() != recipe:
            self.save_recipe(recipe)

    # ---- what the steps leave

    def completion(self) -> Completion | None:
        """Return the completion marker; None while the training is not finished."""
        return self._read(DONE, Completion)

    def complete(self, completion: Completion) -> None:
        self._write(DONE, completion)

    def evaluation(self) -> Evaluation | None:
        return self._read(EVALUATION, Evaluation)

    def save_evaluation(self, evaluation: Evaluation) -> None:
        self._write(EVALUATION, evaluation)

    def bank_evaluation(self) -> Evaluation | None:
        """Return the scores of the memory bank alone."""
        return self._read(BANK_EVALUATION, Evaluation)

    def save_bank_evaluation(self, evaluation: Evaluation) -> None:
        self._write(BANK_EVALUATION, evaluation)

    def save_evaluation_progress(self, line: ProgressLine) -> None:
        """Replace the line on the progress of an evaluation under way."""
        self.storage.write_bytes(EVALUATION_PROGRESS, f"{json.dumps(line)}\n".encode())

    def evaluation_parts(self, name: str) -> Storage:
        """Return the folder of what an evaluation has computed and would continue from; `name` identifies its input."""
        return self.storage / EVALUATION_PARTS / name

    def discard_evaluation_parts(self, protocol: str) -> None:
        """Delete what evaluations by a protocol have left to continue from."""
        folder = self.storage / EVALUATION_PARTS
        for name in folder.list(f"{protocol}-"):
            folder.delete(name)

    def champion_evaluation(self) -> Evaluation | None:
        """Return the evaluation of a champion's backbone on the data of this run's evaluation."""
        return self._read(CHAMPION, Evaluation)

    def save_champion_evaluation(self, evaluation: Evaluation) -> None:
        self._write(CHAMPION, evaluation)

    def layers(self) -> LayersEvaluation | None:
        """Return the result of the zoo's linear protocol."""
        return self._read(LAYERS, LayersEvaluation)

    def save_layers(self, result: LayersEvaluation) -> None:
        self._write(LAYERS, result)

    def gate(self) -> GateDecision | None:
        return self._read(GATE, GateDecision)

    def save_gate(self, decision: GateDecision) -> None:
        self._write(GATE, decision)

    def registered(self) -> Registered | None:
        return self._read(REGISTERED, Registered)

    def save_registered(self, registered: Registered) -> None:
        self._write(REGISTERED, registered)

    def warm_start(self) -> WarmRecord | None:
        return self._read(WARM, WarmRecord)

    def save_warm_start(self, record: WarmRecord) -> None:
        self._write(WARM, record)

    def initial(self) -> InitialRecord | None:
        """Return the origin of the weights that it started from; None where they were random."""
        return self._read(INITIAL, InitialRecord)

    def save_initial(self, record: InitialRecord, weights: bytes) -> None:
        """Write initial weights as safetensors, then the record that names them."""
        self.storage.write_bytes(INITIAL_WEIGHTS, weights)
        self._write(INITIAL, record)

    def initial_weights(self) -> bytes:
        """Return the initial weights, a safetensors file."""
        return self.storage.read_bytes(INITIAL_WEIGHTS)

    def discard_initial(self) -> None:
        """Delete the initial weights of a start that made no checkpoint."""
        for name in (INITIAL, INITIAL_WEIGHTS):
            if self.storage.exists(name):
                self.storage.delete(name)

    def mismatch(self, evaluation: Evaluation) -> str:
        """Return why an evaluation is not of the newest checkpoint, or of the one named; "" where it is."""
        commit = self.commit()
        if evaluation.checkpoint_name != commit.name:
            return f"its evaluation is of {evaluation.checkpoint_name}, its checkpoint is {commit.name}"
        if evaluation.commit not in ("", commit.sha256):  # version 0.1 recorded none
            return f"its evaluation is of other weights than those of its checkpoint {commit.name}"
        return ""

    def step(self, name: str) -> StepRecord | None:
        return self._read(f"{STEPS}/{name}.json", StepRecord)

    def save_step(self, record: StepRecord) -> None:
        self._write(f"{STEPS}/{record.step}.json", record)

    def steps(self) -> list[StepRecord]:
        """Return the records of all steps, in the order in which they started."""
        names = [name for name in self.storage.list(f"{STEPS}/") if name.endswith(".json")]
        records = [self._read(name, StepRecord) for name in names]
        return sorted(filter(None, records), key=lambda record: record.started)

    def record(self) -> Record:
        """Return metrics and events; leave out lines that cannot be read, with a warning."""
        return Record(read_lines(self.storage, METRICS), read_lines(self.storage, EVENTS))

    def require_writable(self, name: str = EVALUATION) -> None:
        """Raise `StorageError` where the file of this name cannot be written, before the work for it begins."""
        self.storage.require_writable(name)

    def save_report(self, page: str) -> str:
        """Write the report; return its URI."""
        self.storage.write_bytes(REPORT, page.encode())
        return f"{self.uri}/{REPORT}"

    # ---- checkpoints

    def checkpoints(self, **options: Any) -> Checkpoints:
        """Return the run's checkpoints; `options` are those of `Checkpoints`."""
        from pirl.checkpoint import Checkpoints

        return Checkpoints(self.storage / CHECKPOINTS, **options)

    def checkpoint_uri(self, name: str) -> str:
        return f"{self.uri}/{CHECKPOINTS}/{name}"

    def commit(self) -> Commit:
        """Return the record of the checkpoint named, or of the newest; raise `CheckpointError` without one."""
        checkpoints = self.checkpoints()
        name = self.checkpoint or checkpoints.newest()
        if name is None:
            raise self._no_checkpoint()
        return checkpoints.commit(name)

    def load(self, rows: Mapping[str, range] | None = None) -> tuple[Commit, SavedTraining]:
        """Return the checkpoint named, or the newest that is whole; raise `CheckpointError` without one.

        Of the tensors in `rows` only these rows are read.
        """
        from pirl.checkpoint import saved_training

        loaded = self.checkpoints().load(self.checkpoint, rows)
        if loaded is None:
            raise self._no_checkpoint()
        commit, state = loaded
        return commit, saved_training(state, f"checkpoint {commit.name} of {self.place}")

    def _no_checkpoint(self) -> CheckpointError:
        return CheckpointError(f"{self.place} has no checkpoint", NO_CHECKPOINT_HINT)

    def _read(self, name: str, kind: type[T]) -> T | None:
        try:
            value = self.storage.read_json(name)
        except StorageNotFoundError:
            return None
        return kind.parse(value, f"{self.uri}/{name}")

    def _write(self, name: str, content: Content) -> None:
        self.storage.write_json(name, content.to_json())


@dataclass(frozen=True)
class Workspace:
    """A root with ROOT/data, ROOT/runs and ROOT/registry."""

    root: str

    def run(self, name: str) -> Run:
        return Run.at(f"{self._base}/runs/{name}")

    def run_uri(self, name: str) -> str:
        return f"{self._base}/runs/{name}"

    def shards(self, split: str, key: str = "") -> str:
        """Return the location of the shards of a split; `key` distinguishes states of one source."""
        return f"{self._base}/data/{split}-{key}" if key else f"{self._base}/data/{split}"

    def all_shards(self) -> list[str]:
        """Return the locations of all sharded data sets."""
        names = (name for name in open_storage(self.root).list("data/") if name.endswith("/manifest.json"))
        return [f"{self._base}/{name.removesuffix('/manifest.json')}" for name in names]

    @property
    def registry(self) -> str:
        return f"{self._base}/registry"

    @property
    def _base(self) -> str:
        return self.root.rstrip("/") if self.root.strip("/") else self.root
