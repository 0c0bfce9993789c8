"""What a training asks of a cluster: nothing here changes what is learned."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from .. import __version__
from ..settings import Settings, json_value, read_items, validated

IMAGE = f"localhost/pirl-trainer:{__version__.replace('+', '-')}"
SECRET_NAMES = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|ACCESS_KEY|PRIVATE_KEY", re.IGNORECASE)

DnsLabel = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
DnsName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
MountPath = Annotated[str, Field(pattern=r"^/[^:]+$")]
Seconds = Annotated[float, Field(gt=0)]


class JobSettings(Settings):
    """One PyTorchJob: its pods, where they may run, and how long the launcher waits for what.

    `pirl train --backend pytorchjob --job NAME=VALUE` sets each of these.
    """

    model_config = ConfigDict(coerce_numbers_to_str=True)

    namespace: DnsLabel = "pirl"
    image: Annotated[str, Field(min_length=1, pattern=r"^\S+$")] = Field(
        default_factory=lambda: os.environ.get("PIRL_TRAINER_IMAGE") or IMAGE
    )
    nodes: Annotated[int, Field(ge=1, le=1000)] = 1
    """Pods, each of them on its own node where there are several."""
    gpus: Annotated[int, Field(ge=0, le=64)] = 0
    """GPUs of each pod."""
    processes: Annotated[int, Field(ge=0, le=256)] = 0
    """Ranks of each pod; 0: one for each GPU, or one without GPUs."""

    cpu: Quantity = "1"
    memory: Quantity = "4Gi"
    """Each pod's, the shared memory of its loading processes included."""
    shared_memory: Quantity = "1Gi"
    """Size of /dev/shm."""

    queue: DnsName | Literal[""] = ""
    """Kueue's LocalQueue, in which the job waits suspended until there is room."""
    priority_class: DnsName | Literal[""] = ""
    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: list[dict[str, Any]] = Field(default_factory=list)
    """As Kubernetes writes them: {"key": "nvidia.com/gpu", "operator": "Exists"}."""
    spread: Literal["prefer", "require"] = "prefer"
    """Pods on different nodes: where possible, or else they wait."""

    service_account: DnsName = "pirl-trainer"
    secret: DnsName | Literal[""] = "pirl-s3"
    """Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL; may be absent (workload identity)."""
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = Field(default_factory=dict)
    """Environment of the pods; no secrets, which belong into the Secret."""
    claims: dict[DnsName, MountPath] = Field(default_factory=dict)
    """PersistentVolumeClaims to mount read-only, and where: {"images": "/data"}."""
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)

    max_restarts: Annotated[int, Field(ge=0, le=1000)] = 10
    """Times that all pods may restart, each from the last checkpoint, before the job has failed."""
    grace_s: Annotated[int, Field(ge=1, le=3600)] = 60
    """Time of a pod between SIGTERM and SIGKILL, for a last checkpoint."""
    ttl_s: Annotated[int, Field(ge=0)] = 86400
    """A finished job is deleted after that long."""

    pull_s: Seconds = 300.0
    """Longest that an image may not be pullable, or a container not startable, before the launcher gives up."""
    start_s: Seconds = 3600.0
    """Longest that pods may wait for nodes or for a quota, at the start or after a restart. Not in a Kueue queue."""
    progress_s: Seconds = 1800.0
    """Longest that running pods may make no step."""
    run_s: Seconds | None = None
    """Longest for everything, without the time in a Kueue queue. None: as long as it takes."""
    leave: bool = False
    """Let the job go on when the launcher is told to stop."""

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        secret = [name for name in env if SECRET_NAMES.search(name)]
        if secret:
            raise ValueError(f"put {', '.join(secret)} into the Secret: all who may see the job could read it here")
        return env

    @model_validator(mode="after")
    def _one_process_for_each_gpu(self) -> JobSettings:
        if self.gpus and self.processes > self.gpus:
            raise ValueError(f"{self.processes} processes in a pod of {self.gpus} GPUs: each needs its own")
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
