"""Settings of a job on a cluster; none changes what is learned.

What the API server, the kubelet or the first pod would refuse is refused here, before anything is created.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, field_validator, model_validator

from .. import __version__
from ..settings import Settings, json_value, read_items, validated
from .resources import derived

IMAGE = f"localhost/pirl-trainer:{__version__.replace('+', '-')}"
SECRET_NAMES = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|ACCESS_KEY|PRIVATE_KEY", re.IGNORECASE)

DNS = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
PART = r"[a-z0-9]+((\.|_{1,2}|-+)[a-z0-9]+)*"  # of the path of an image
WORD = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"  # name or value of a label
BYTES = {"": 1, **{unit: 1000 ** (n + 1) for n, unit in enumerate("kMGTP")}}
BYTES |= {f"{unit}i": 1024 ** (n + 1) for n, unit in enumerate("KMGTP")}
RESERVED = re.compile(r"PET_.*|(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|PIRL_METRICS_PORT")
CA_DIR = "/etc/ssl/pirl"
"""Folder of the ConfigMap of the setting `ca` in a pod."""
SYSTEM = (
    "/",
    "/dev",
    "/etc/pirl",
    CA_DIR,
    "/proc",
    "/sys",
)  # where no volume may be mounted, nor below but at the root
ANNOTATION_BYTES = 128 << 10  # half of what an object may have: the program's specification is one, too


def _cores(text: str) -> str:
    """Return the quantity if a pod can have that many cores."""
    if not re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,3})?|[0-9]{1,8}m", text) or not re.search("[1-9]", text):
        raise ValueError("a positive number of cores is expected, as 8 or 500m")
    return text


def cores(text: str) -> float:
    """Return the number of a quantity of cores: 8 or 500m."""
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def to_bytes(text: str) -> float:
    """Return the bytes of a quantity as Kubernetes writes it: 4Gi."""
    number = re.match(r"[0-9.]*", text)
    return float(number[0] if number else 0) * BYTES[text[number.end() if number else 0 :]]


def _size(least: str) -> Any:
    """Return the check of a quantity of bytes that is at least `least`; a forgotten unit is found by it."""

    def check(text: str) -> str:
        if not re.fullmatch(r"[0-9]{1,16}(\.[0-9]{1,6})?([kMGTP]|[KMGTP]i)?", text) or to_bytes(text) < to_bytes(least):
            raise ValueError(f"a size of at least {least} is expected")
        return text

    return AfterValidator(check)


def _matching(pattern: str, expected: str, most: int) -> Any:
    """Return the check of a text by a pattern, which a message calls `expected`."""

    def check(text: str) -> str:
        if len(text) > most or not re.fullmatch(pattern, text):
            raise ValueError(f"expected {expected}")
        return text

    return AfterValidator(check)


def variable(name: str) -> str:
    """Return the name of an environment variable if a user may set it."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("a name of letters, digits and _ is expected")
    if RESERVED.fullmatch(name):
        raise ValueError("it is set for each pod, by the job")
    return name


def refuse_secrets(env: dict[str, str]) -> dict[str, str]:
    """Return the environment if no name is that of a secret."""
    if secret := [name for name in env if SECRET_NAMES.search(name)]:
        raise ValueError(f"put {', '.join(secret)} into the Secret: all who may see the pod could read it here")
    return env


def ca_environment(ca: str) -> dict[str, str]:
    """Return the variables by which clients of S3 and HTTPS find the certificate authorities; none without `ca`."""
    return dict.fromkeys(("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"), f"{CA_DIR}/ca.crt") if ca else {}


def _mount_path(path: str) -> str:
    """Return the path if a volume can be mounted there."""
    if not re.fullmatch(r"/[^:\0]*", path) or path != os.path.normpath(path):
        raise ValueError("an absolute path without ':', '..' and doubled or final slashes is expected")
    if path == "/tmp" or any(path == system or (system != "/" and path.startswith(f"{system}/")) for system in SYSTEM):
        raise ValueError("this path belongs to the pod's system")
    return path


def _one_claim_a_path(claims: dict[str, str]) -> dict[str, str]:
    """Return the mounts if their paths differ."""
    if len(set(claims.values())) < len(claims):
        raise ValueError("two claims are mounted at one path")
    return claims


DnsLabel = Annotated[str, _matching(DNS, "a DNS label: at most 63 of a-z, 0-9 and -", 63)]
DnsName = Annotated[str, _matching(rf"{DNS}(\.{DNS})*", "DNS labels of a-z, 0-9 and -, joined by dots", 253)]
LabelValue = Annotated[str, _matching(rf"({WORD})?", "a label's value: at most 63 letters, digits, - _ .", 63)]
LabelName = Annotated[
    str, _matching(rf"({DNS}(\.{DNS})*/)?{WORD}", "a label's name: [DNS name/]at most 63 letters, digits, - _ .", 317)
]
Image = Annotated[
    str,
    _matching(
        rf"([A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]{{1,5}})?/)?{PART}(/{PART})*"
        r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[a-f0-9]{64})?",
        "an image: [HOST[:PORT]/]name[:TAG][@sha256:...], the name in lower case",
        500,
    ),
]
ResourceName = Annotated[
    str, _matching(rf"({DNS}(\.{DNS})*/)?{WORD}", "a resource's name, as rdma/hca or nvidia.com/mig-3g.71gb", 317)
]
Queue = Annotated[str, _matching(rf"({DNS}(\.{DNS})*)?", "a DNS name of at most 63 characters, or none", 63)]
OptionalName = Annotated[str, _matching(rf"({DNS}(\.{DNS})*)?", "a DNS name, or none", 253)]
Cores = Annotated[str, AfterValidator(_cores)]
Memory = Annotated[str, _size("64Mi")]
Text = Annotated[str, Field(pattern=r"^[^\x00]*$", max_length=ANNOTATION_BYTES)]
Environment = Annotated[dict[Annotated[str, AfterValidator(variable)], Text], AfterValidator(refuse_secrets)]
Claims = Annotated[dict[DnsName, Annotated[str, AfterValidator(_mount_path)]], AfterValidator(_one_claim_a_path)]
Seconds = Annotated[float, Field(gt=0, le=1e9)]


class Toleration(Settings):
    """A taint of nodes that the pods accept, as Kubernetes writes it."""

    key: LabelName | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    tolerationSeconds: Annotated[int, Field(ge=0, lt=2**31)] | None = None

    @model_validator(mode="after")
    def _as_the_api_server_takes_it(self) -> Toleration:
        if self.operator == "Exists" and self.value:
            raise ValueError("operator Exists takes no value")
        if self.key is None and self.operator != "Exists":
            raise ValueError("without a key the operator has to be Exists")
        if self.tolerationSeconds is not None and self.effect != "NoExecute":
            raise ValueError("tolerationSeconds needs the effect NoExecute")
        return self


class JobSettings(Settings):
    """A job's pods, where they may run, and how long the launcher waits for what.

    `pirl train --backend NAME --job NAME=VALUE` sets each of these.
    """

    model_config = ConfigDict(coerce_numbers_to_str=True)

    namespace: DnsLabel = "pirl"
    image: Image = Field(
        default_factory=lambda: os.environ.get("PIRL_TRAINER_IMAGE") or IMAGE,
        validate_default=True,
    )
    nodes: Annotated[int, Field(ge=1, le=1000)] = 1
    """Pods, each of them on its own node where there are several."""
    gpus: Annotated[int, Field(ge=0, le=64)] = 0
    """GPUs of each pod."""
    processes: Annotated[int, Field(ge=0, le=256)] = 0
    """Ranks of each pod; 0: one for each GPU, or one without GPUs."""

    gpu_resource: ResourceName = "nvidia.com/gpu"
    """Name of the GPUs as the nodes offer them: another vendor's, or a MIG slice."""
    resources: dict[ResourceName, Annotated[str, _matching("[0-9]{1,9}[kMGT]?i?", "a quantity", 12)]] = Field(
        default_factory=dict
    )
    """Other resources of each pod: {"rdma/hca": "1", "ephemeral-storage": "200Gi"}."""
    ipc_lock: bool = False
    """Add the capability IPC_LOCK, which RDMA needs to pin memory."""

    cpu: Cores = "1"
    """Cores of each pod; with GPUs 9 for each rank if not given: its own, and 8 loading processes."""
    memory: Memory = "4Gi"
    """Each pod's, the shared memory of its loading processes included; with GPUs 16Gi for each rank if not given."""
    shared_memory: Annotated[str, _size("1Mi")] = "1Gi"
    """Size of /dev/shm; with GPUs 1Gi for each rank if not given."""

    queue: Queue = ""
    """Kueue's LocalQueue, in which the job waits suspended until there is room."""
    priority_class: OptionalName = ""
    node_selector: dict[LabelName, LabelValue] = Field(default_factory=dict)
    tolerations: list[Toleration] = Field(default_factory=list)
    """As Kubernetes writes them: {"key": "nvidia.com/gpu", "operator": "Exists"}."""
    spread: Literal["prefer", "require"] = "prefer"
    """Pods on different nodes: where possible, or else they wait."""

    service_account: DnsName = "pirl-trainer"
    secret: OptionalName = "pirl-s3"
    """Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL; may be absent (workload identity)."""
    pull_secrets: list[DnsName] = Field(default_factory=list)
    """Secrets with which the image is pulled."""
    ca: OptionalName = ""
    """ConfigMap with the certificate authorities of the storage as `ca.crt`."""
    env: Environment = Field(default_factory=dict)
    """Environment of the pods; no secrets, which belong into the Secret."""
    claims: Claims = Field(default_factory=dict)
    """PersistentVolumeClaims to mount read-only, and where: {"images": "/data"}."""
    labels: dict[LabelName, LabelValue] = Field(default_factory=dict)
    annotations: dict[LabelName, Text] = Field(default_factory=dict)

    max_restarts: Annotated[int, Field(ge=0, le=1000)] = 10
    """Times that all pods may restart, each from the last checkpoint, before the job has failed."""
    restart: Literal["", "pods", "containers"] = ""
    """After a failure: recreate all pods, or restart containers in their pods. "": the kind's default."""
    grace_s: Annotated[int, Field(ge=1, le=3600)] = 60
    """Time of a pod between SIGTERM and SIGKILL, for a last checkpoint."""
    ttl_s: Annotated[int, Field(ge=0, lt=2**31)] = 86400
    """A finished job is deleted after that long."""

    pull_s: Seconds = 300.0
    """Longest that an image may not be pullable, or a container not startable, before the launcher gives up."""
    start_s: Seconds = 3600.0
    """Longest that pods may wait for nodes or for a quota, at the start or after a restart. Not in a Kueue queue."""
    progress_s: Seconds = 1800.0
    """Longest that running pods may go without a new step."""
    run_s: Seconds | None = None
    """Longest for everything, without the time in a Kueue queue. None: as long as it takes."""
    leave: bool = False
    """Keep the job running when the launcher is stopped."""

    @field_validator("annotations")
    @classmethod
    def _annotations_fit(cls, annotations: dict[str, str]) -> dict[str, str]:
        if sum(map(len, map(str.encode, annotations.values()))) > ANNOTATION_BYTES:
            raise ValueError(f"more than {ANNOTATION_BYTES:,} bytes together")
        return annotations

    @model_validator(mode="before")
    @classmethod
    def _follow_from_gpus(cls, values: Any) -> Any:
        """Derive cpu, memory and shared memory from the GPUs where they are not given."""
        gpus, processes = (values.get(name, 0) for name in ("gpus", "processes"))
        if type(gpus) is not int or type(processes) is not int:
            return values  # refused by their own checks
        defaults = derived(gpus, processes)
        if "memory" in values:
            defaults.pop("shared_memory", None)
        return defaults | dict(values)

    @field_validator("resources")
    @classmethod
    def _not_named_twice(cls, resources: dict[str, str]) -> dict[str, str]:
        if own := sorted({"cpu", "memory"} & resources.keys()):
            raise ValueError(f"{', '.join(own)} is a setting of its own")
        return resources

    @model_validator(mode="after")
    def _fits_together(self) -> JobSettings:
        if self.gpus and cores(self.cpu) < self.ranks_per_pod:
            raise ValueError(f"{self.cpu} cores in a pod of {self.ranks_per_pod} ranks: each needs at least one")
        if self.gpu_resource in self.resources:
            raise ValueError(f"{self.gpu_resource} is counted by gpus: omit it from resources")
        if self.gpus and self.processes > self.gpus:
            raise ValueError(f"{self.processes} processes in a pod of {self.gpus} GPUs: each needs its own")
        if to_bytes(self.shared_memory) > to_bytes(self.memory):
            raise ValueError(f"shared_memory {self.shared_memory} is a part of memory, which is {self.memory}")
        return self

    @property
    def ranks_per_pod(self) -> int:
        return self.processes or self.gpus or 1


def job_settings(items: Iterable[str] = (), given: Mapping[str, Any] | None = None) -> JobSettings:
    """`JobSettings` of `given` and of NAME=VALUE items, whose value is JSON or a bare word. All problems at once.

    An empty text in `given` is the default.
    """
    values, problems = read_items(items, json_value, "name=value")
    defaults = {name: value for name, value in (given or {}).items() if value != ""}
    # what was given for `env` is not repeated: it may be the secret that does not belong there
    return validated(JobSettings, defaults | values, "the job's settings", problems, secret=("env",))
