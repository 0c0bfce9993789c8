"""Programs that a backend runs: a module, its specification, its completion marker, and its progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

from .errors import UsageError
from .evaluate.progress import describe
from .evaluate.spec import EvaluationSpec
from .lines import MetricsLine, ProgressLine
from .run import EVALUATION_PROGRESS, METRICS, Run, split_checkpoint_uri
from .shards import Manifest
from .storage import open_storage
from .training.spec import TrainingSpec
from .training.start import plan


class Command(Protocol):
    """`python -m MODULE ARGUMENTS` for one run, and the file that the arguments name."""

    @property
    def module(self) -> str:
        """Module to start."""

    @property
    def name(self) -> str:
        """Name for labels: that of the recipe."""

    @property
    def out(self) -> str:
        """URI of the run."""

    def file(self) -> tuple[str, str] | None:
        """Return name and text of the specification's file, or None for a program without one."""

    def arguments(self, path: str) -> list[str]:
        """Return the module's arguments, where `path` is that of its file."""


class Program(Command, Protocol):
    """A command with ranks, inputs in storage, a completion marker, and a record of its progress."""

    @property
    def record(self) -> str:
        """Object of the run with one JSON line a logged step; each line has the number `step`."""

    @property
    def processes(self) -> int:
        """Ranks on this machine; 0: one for each GPU, else two."""

    @property
    def locations(self) -> Mapping[str, str]:
        """URIs that it reads or writes, by the name of their option."""

    def plan(self) -> list[str]:
        """Return what it would do, in a few lines; raise if it cannot work."""

    def prepare(self) -> None:
        """Write what its ranks start from, after the plan and before they start."""

    def is_complete(self) -> bool:
        """Return whether its completion marker exists; raise `UsageError` if it is another program's."""

    def update(self) -> None:
        """Update the settings of a complete run that its result does not depend on."""

    def describe(self, line: Mapping[str, Any]) -> str:
        """Return a line of the record in words."""


@dataclass(frozen=True)
class Specified:
    """Common part of the programs whose only argument is the JSON file of a specification."""

    spec: TrainingSpec | EvaluationSpec
    json_name: ClassVar[str]

    @property
    def processes(self) -> int:
        """Ranks on this machine."""
        return self.spec.processes

    def file(self) -> tuple[str, str]:
        """Return the specification, without the number of processes: it is the backend's."""
        return self.json_name, self.spec.model_copy(update={"processes": 0}).to_json()

    def arguments(self, path: str) -> list[str]:
        """Return the only argument, the path of the specification."""
        return [path]


@dataclass(frozen=True)
class Training(Specified):
    """Pretraining by a recipe: `python -m pirl.train`."""

    spec: TrainingSpec
    json_name: ClassVar[str] = "training.json"
    module: str = "pirl.train"
    record: str = METRICS

    @property
    def name(self) -> str:
        """Name of the recipe."""
        return self.spec.recipe.name

    @property
    def out(self) -> str:
        """URI of the run."""
        return self.spec.out

    @property
    def locations(self) -> Mapping[str, str]:
        """URIs of shards and run."""
        return {"data": self.spec.data, "out": self.spec.out}

    def plan(self) -> list[str]:
        """Check recipe, data, run and initial weights, and return what would be done."""
        return [*plan(self.spec), *self._origin().check_origin(self.spec)] if self._has_origin else plan(self.spec)

    def prepare(self) -> None:
        """Copy the initial weights into the run."""
        if self._has_origin or Run.at(self.out).initial():
            self._origin().prepare_origin(self.spec)

    @property
    def _has_origin(self) -> bool:
        return bool(self.spec.init or self.spec.extend)

    @staticmethod
    def _origin() -> Any:
        from .initial import weights  # loads torch, which other trainings need in their ranks alone

        return weights

    def is_complete(self) -> bool:
        """Return whether the completion marker exists; raise if it names another recipe or other data."""
        completion = Run.at(self.out).completion()
        if completion is None:
            return False
        matches = {
            "recipe_digest": completion.recipe_digest in self.spec.recipe.digests(),
            "data_digest": completion.data_digest == Manifest.load(open_storage(self.spec.data)).digest,
        }
        differing = [name for name, matching in matches.items() if not matching]
        if differing:
            raise UsageError(
                f"the completion marker in {self.out} is of another training ({', '.join(differing)} differ)",
                "use another --out; image and launcher of different versions can do this too",
            )
        return True

    def update(self) -> None:
        """Save the recipe where only settings that are not learned have changed."""
        Run.at(self.out).update_recipe(self.spec.recipe)

    def describe(self, line: Mapping[str, Any]) -> str:
        """Return epoch, step, loss and throughput."""
        values = cast(MetricsLine, line)
        return (
            f"epoch {values['epoch']:.2f}  step {values['step']}  loss {values['loss']:.4f}  "
            f"{values['images_per_s']:.0f} images/s"
        )


@dataclass(frozen=True)
class EvaluationProgram(Specified):
    """Evaluation of a run by a protocol: `python -m pirl.evaluate`."""

    spec: EvaluationSpec
    json_name: ClassVar[str] = "evaluation.json"
    module: str = "pirl.evaluate"
    record: str = EVALUATION_PROGRESS

    @property
    def name(self) -> str:
        """Name of the protocol."""
        return self.spec.protocol

    @property
    def out(self) -> str:
        """URI of the run."""
        return split_checkpoint_uri(self.spec.run)[0]

    @property
    def locations(self) -> Mapping[str, str]:
        """URIs of run and shards."""
        return {"run": self.spec.run, "data": self.spec.data, "test": self.spec.test}

    def plan(self) -> list[str]:
        """Check run and data, and return what would be done."""
        from .evaluate.start import plan as plan_evaluation

        return plan_evaluation(self.spec)

    def prepare(self) -> None:
        """Prepare nothing: the run has its weights."""

    def is_complete(self) -> bool:
        """Return whether the run has the result of this checkpoint, data and protocol."""
        return self.result() is not None

    def result(self) -> Any:
        """Return the result: content of `eval_zoo.json` for the protocol zoo, else an evaluation; None without it."""
        from .evaluate.apply import kept_result

        return kept_result(self.spec)

    def update(self) -> None:
        """Write the locations of the data into a result that was kept."""
        from .evaluate.apply import apply_protocol

        apply_protocol(self.spec)

    def describe(self, line: Mapping[str, Any]) -> str:
        """Return phase, progress and throughput."""
        return describe(cast(ProgressLine, line))
