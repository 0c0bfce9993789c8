"""The seam for kinds of jobs: what Kubernetes' operators disagree on, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from .cluster import Cluster
    from .settings import JobSettings

Object = dict[str, Any]  # of Kubernetes, as its API has it
DEFAULT_CONTAINER = "kubectl.kubernetes.io/default-container"
"""Annotation of a pod with the name of the container that runs the program; `kubectl logs` follows it too."""
SPEC_HASH = "pirl.dev/spec-hash"
"""Annotation of a job's objects with the digest of their specs."""
TTL = "pirl.dev/ttl-s"
"""Annotation of a job that its operator does not delete: seconds until a launcher does."""


class Resource(NamedTuple):
    """A type of object of the API: `batch`, `v1`, `jobs`, `Job`."""

    group: str
    version: str
    plural: str
    kind: str

    def __str__(self) -> str:
        return f"{self.plural}.{self.group}/{self.version}"


class Right(NamedTuple):
    """A verb on a resource of an API group; a resource may be RESOURCE/SUBRESOURCE."""

    verb: str
    group: str
    resource: str

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}"


class Operator(NamedTuple):
    """A controller of a kind: its name in messages, its Deployment, and the version that was tried."""

    name: str
    deployment: str
    version: str


class Phase(Enum):
    """Of a job, in the words of its operator."""

    ACTIVE = "active"
    SUSPENDED = "suspended"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@dataclass(frozen=True)
class Verdict:
    """The operator's judgement of a job."""

    phase: Phase
    message: str = ""


class JobKind(ABC):
    """A kind of job that runs one pod a node."""

    name: ClassVar[str]
    """Name of the backend that uses it."""
    resources: ClassVar[tuple[Resource, ...]]
    """Of the objects that make one job, which share its name: the job last, what it refers to before it."""
    container: ClassVar[str]
    """Name that the operator expects of the container that trains."""
    operators: ClassVar[tuple[Operator, ...]]
    """The controllers that run a job of this kind."""
    install: ClassVar[str]
    """Next step when the cluster does not serve this kind."""
    refusals: ClassVar[frozenset[str]]
    """Reasons of the events by which a controller reports that it cannot create pods."""
    restarts: ClassVar[tuple[str, ...]] = ("containers",)
    """Values of the job setting `restart` that it can do, the default first."""
    expires: ClassVar[bool] = True
    """The operator deletes an ended job after `ttl_s`; else the next launcher in the namespace does."""
    reads: ClassVar[tuple[Right, ...]] = ()
    """Rights of the launcher on objects of the operator's own."""

    @abstractmethod
    def specs(self, name: str, settings: JobSettings, template: Object) -> list[Object]:
        """Return the `spec` of each of `resources` of the job `name`, around the template of a pod."""

    @abstractmethod
    def pods(self, cluster: Cluster, job: Object) -> list[Object]:
        """Return the pods of this very job, not of an earlier one of the same name."""

    @abstractmethod
    def index(self, pod: Object) -> int:
        """Return the pod's node index; rank 0 is in pod 0."""

    @abstractmethod
    def verdict(self, job: Object) -> Verdict:
        """Return the operator's judgement from the job's spec and status."""

    def involved(self, name: str) -> tuple[str, ...]:
        """Return the names of the objects whose events report on the job `name`; pods have events of their own."""
        return (name,)

    @property
    def resource(self) -> Resource:
        """The type of the job itself."""
        return self.resources[-1]

    @property
    def title(self) -> str:
        """The kind as messages spell it."""
        return self.resource.kind

    @property
    def command(self) -> str:
        """The kind as `kubectl` takes it."""
        return self.resource.kind.lower()

    @property
    def rights(self) -> tuple[Right, ...]:
        """All that a launcher of this kind needs, and all that `manifests/` gives its service account."""
        *parts, job = self.resources
        verbs: list[tuple[Resource, tuple[str, ...]]] = [(part, ("create", "get", "delete", "patch")) for part in parts]
        verbs.append((job, ("create", "get", "delete", *(() if self.expires else ("list",)))))
        return (
            *(Right(verb, item.group, item.plural) for item, names in verbs for verb in names),
            *self.reads,
            Right("list", "", "pods"),
            Right("list", "", "events"),
            Right("get", "", "pods/log"),
        )


def conditions(thing: Object) -> list[Object]:
    """Return the conditions of a job or a pod; empty without a status."""
    return (thing.get("status") or {}).get("conditions") or []


def true_conditions(thing: Object) -> dict[str, str]:
    """Return the message of each condition that holds, by type; the API promises no order."""
    return {item["type"]: item.get("message", "") for item in conditions(thing) if item["status"] == "True"}


def owner(thing: Object) -> str:
    """Return the uid of the object's owner, or ""."""
    return next((reference["uid"] for reference in thing["metadata"].get("ownerReferences", ())), "")


def container_name(pod: Object) -> str:
    """Return the name of the container that runs the program; a pod may have sidecars."""
    named = pod["metadata"].get("annotations", {}).get(DEFAULT_CONTAINER)
    return named or pod["spec"]["containers"][0]["name"]
