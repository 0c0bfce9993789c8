"""Backends: where a program runs. `open_backend` is the only place that knows their names.

Every command imports this module, so the methods import what is slow to import.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import EXIT_DONE, UsageError, did_you_mean
from .evaluate.spec import EvaluationOptions, EvaluationSpec, evaluation_options
from .jobs.kind import JobKind
from .jobs.pytorchjob import PyTorchJob
from .jobs.settings import JobSettings, job_settings
from .jobs.trainjob import TrainJob
from .settings import Collector, items_of
from .text import count
from .training.spec import TrainingOptions, TrainingSpec, training_options

if TYPE_CHECKING:
    from .programs import EvaluationProgram, Program, Training

Settings = Mapping[str, Any]


class Backend(ABC):
    """A place where programs run to their end."""

    @property
    @abstractmethod
    def where(self) -> str:
        """Place and size, for messages: "on this machine"."""

    @abstractmethod
    def check_location(self, option: str, uri: str) -> None:
        """Raise if programs here cannot see this URI."""

    @abstractmethod
    def require_access(self) -> None:
        """Raise if this account may not start programs here; asked before work that a start has to follow."""

    @abstractmethod
    def check(self, program: Program) -> list[str]:
        """Raise if the program cannot run here, else return what it would do, in a few lines. Start nothing."""

    @abstractmethod
    def plan(self, program: Program) -> str:
        """Check, and return what `run` would start, for a dry run."""

    @abstractmethod
    def run(self, program: Program, labels: Mapping[str, str] | None = None) -> int:
        """Run the program until its completion marker is in storage, and return 0.

        A failure that was printed already is returned as its exit code; any other is raised. `labels` name what
        started the program, on backends that keep labels.
        """


class LocalBackend(Backend):
    """Ranks on this machine."""

    def __init__(self, items: Iterable[str] = (), given: Settings | None = None) -> None:
        fields = JobSettings.model_fields
        defaults = {name: (None, "", 0, fields[name].default) for name in given or {}}
        stated = [name for name, value in (given or {}).items() if name != "processes" and value not in defaults[name]]
        stated += [item.partition("=")[0] for item in items]
        if stated:
            raise UsageError(
                f"{', '.join(stated)}: settings of a job, which backend 'local' does not start",
                f"choose one that does: --backend {DEFAULT_CLUSTER}, PIRL_BACKEND={DEFAULT_CLUSTER}; or omit these",
            )

    @property
    def where(self) -> str:
        """This machine."""
        return "on this machine"

    def check_location(self, option: str, uri: str) -> None:
        """Accept every URI."""

    def require_access(self) -> None:
        """Accept every account."""

    def check(self, program: Program) -> list[str]:
        """Check the program."""
        return program.plan()

    def plan(self, program: Program) -> str:
        """Return the program's plan."""
        return "".join(f"{line}\n" for line in self.check(program))

    def run(self, program: Program, labels: Mapping[str, str] | None = None) -> int:
        """Start the ranks, and return their exit code."""
        from .launch import run_ranks

        self.check(program)
        program.prepare()
        with tempfile.TemporaryDirectory(prefix="pirl-") as folder:
            path = ""
            if file := program.file():
                path = str(Path(folder) / file[0])
                Path(path).write_text(file[1])
            return run_ranks(program.module, program.arguments(path), program.processes)


class ClusterBackend(Backend):
    """A job on the current Kubernetes cluster, of the first of these kinds that its API serves.

    A single kind needs no request: its plan can be made without a cluster.
    """

    def __init__(self, kinds: Sequence[JobKind], items: Iterable[str] = (), given: Settings | None = None) -> None:
        self.kinds = tuple(kinds)
        self.settings = job_settings(items, given)
        restart = self.settings.restart
        if restart and not any(restart in kind.restarts for kind in self.kinds):
            raise self._unsuited(self.kinds[0])

    @cached_property
    def kind(self) -> JobKind:
        """The kind of the job; with several to choose from, the cluster is asked."""
        kind = self.kinds[0]
        if len(self.kinds) > 1:
            from .jobs.cluster import served_kind

            kind = served_kind(self.settings.namespace, self.kinds)
        if self.settings.restart and self.settings.restart not in kind.restarts:
            raise self._unsuited(kind)
        return kind

    def _unsuited(self, kind: JobKind) -> UsageError:
        return UsageError(
            f"job setting restart={self.settings.restart} does not suit a {kind.title}",
            f"omit it, or choose {', '.join(kind.restarts)}",
        )

    @property
    def where(self) -> str:
        """Kind and size of the job."""
        job = self.settings
        each = f"{count(job.gpus, 'GPU')} and {count(job.ranks_per_pod, 'rank')}"
        return f"by a {self.kind.title} of {count(job.nodes, 'pod')}, each of {each}"

    def check_location(self, option: str, uri: str) -> None:
        """Refuse a location that only this machine can see."""
        from .storage import open_storage

        if not open_storage(uri).shared:
            raise UsageError(f"--{option} {uri} is on this machine, where pods cannot see it", "use s3://bucket/prefix")

    def require_access(self) -> None:
        """Raise without the rights of a launcher, or where no kind of job is served."""
        from .jobs.cluster import Cluster

        Cluster(self.settings.namespace, self.kind).require_rights()

    def check(self, program: Program) -> list[str]:
        """Check the program, and that pods can see what it reads and writes."""
        for option, uri in program.locations.items():
            self.check_location(option, uri)
        return program.plan()

    def plan(self, program: Program) -> str:
        """Return the objects that would be created, as YAML, after a comment for each derived resource."""
        from .jobs.pod import build_job, to_yaml
        from .jobs.resources import formulas

        self.check(program)
        lines = formulas(self.settings.model_dump(), self.settings.ranks_per_pod)
        return "".join(f"# {line}\n" for line in lines) + to_yaml(build_job(self.kind, program, self.settings))

    def run(self, program: Program, labels: Mapping[str, str] | None = None) -> int:
        """Create or adopt the job, and follow it to its end."""
        from .jobs.cluster import Cluster
        from .jobs.launcher import Launcher

        self.check(program)
        program.prepare()
        Launcher(program, self.settings, Cluster(self.settings.namespace, self.kind), labels or {}).run()
        return EXIT_DONE


KINDS: tuple[JobKind, ...] = (TrainJob(), PyTorchJob())
"""Kinds of jobs, in the order in which `cluster` prefers them."""
DEFAULT_CLUSTER = "cluster"
BACKENDS: dict[str, Callable[..., Backend]] = {
    "local": LocalBackend,
    **{kind.name: partial(ClusterBackend, (kind,)) for kind in KINDS},
    DEFAULT_CLUSTER: partial(ClusterBackend, KINDS),
}


def open_backend(name: str, items: Iterable[str] = (), given: Settings | None = None) -> Backend:
    """Return the backend of this name, with settings of a job: NAME=VALUE items, and values `given` by name.

    An empty text in `given` is the default. Raise `UsageError` for an unknown name or settings that cannot work.
    """
    if name not in BACKENDS:
        raise UsageError(
            f"backend {name!r} does not exist.{did_you_mean(name, BACKENDS)}", f"choose one of {', '.join(BACKENDS)}"
        )
    return BACKENDS[name](items, given)


def open_cluster(name: str, items: Iterable[str] = ()) -> ClusterBackend:
    """Return the backend of this name; raise `UsageError` unless it is on a cluster."""
    backend = open_backend(name, items)
    if not isinstance(backend, ClusterBackend):
        raise UsageError(f"backend {name!r} is not on a cluster", f"choose {DEFAULT_CLUSTER}")
    return backend


def prepare_training(
    recipe: str,
    *,
    data: str,
    out: str,
    overrides: str | Iterable[str],
    options: str | TrainingOptions,
    backend: str,
    job: str | Iterable[str],
) -> tuple[Backend, Training]:
    """Return where to train, and the training, of the values of a command or the texts of a step.

    Raise all problems at once.
    """
    from .programs import Training

    problems = Collector("the training")
    own = problems.run(lambda: options if isinstance(options, TrainingOptions) else training_options(options))
    processes = {"processes": own.processes} if own else {}
    chosen = problems.run(lambda: open_backend(backend, items_of(job), processes))
    parse = partial(TrainingSpec.parse, recipe, data=data, out=out, overrides=overrides)
    spec = problems.run(lambda: parse(options=own or TrainingOptions()))
    problems.finish()
    assert chosen is not None
    assert spec is not None
    return chosen, Training(spec)


def prepare_evaluation(
    run: str,
    *,
    data: str,
    test: str,
    options: str | EvaluationOptions,
    backend: str,
    job: str | Iterable[str],
) -> tuple[Backend, EvaluationProgram]:
    """Return where to evaluate, and the evaluation, of the values of a command or the texts of a step.

    Raise all problems at once.
    """
    from .programs import EvaluationProgram

    problems = Collector("the evaluation")
    own = problems.run(lambda: evaluation_options(options))
    processes = {"processes": own.processes} if own else {}
    chosen = problems.run(lambda: open_backend(backend, items_of(job), processes))
    spec = problems.run(lambda: EvaluationSpec.parse(run, data=data, test=test, options=own or EvaluationOptions()))
    problems.finish()
    assert chosen is not None
    assert spec is not None
    return chosen, EvaluationProgram(spec)
