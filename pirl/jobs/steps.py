"""Settings of the pods of a pipeline's steps on KFP."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import ConfigDict, Field

from .. import __version__
from ..errors import UsageError
from ..settings import Settings, json_value, read_items, validated
from .settings import (
    Claims,
    Cores,
    DnsName,
    Environment,
    Image,
    LabelName,
    LabelValue,
    Memory,
    OptionalName,
    Toleration,
)

STEPS_IMAGE = os.environ.get("PIRL_STEPS_IMAGE", f"localhost/pirl-python-steps:{__version__.replace('+', '-')}")
"""Compiled into the pipeline; the name holds "python" because the local runner asks for it."""


def require_image(image: str = STEPS_IMAGE) -> None:
    """Raise `UsageError` unless the steps have an image."""
    if not re.fullmatch(r"[^\s@:/][^\s]*", image):
        raise UsageError(
            f"PIRL_STEPS_IMAGE is {image!r}, expected the name of an image",
            "name the image of the steps, or unset the variable for this version's own",
        )


class StepSettings(Settings):
    """Pods of a pipeline's steps; fixed when the pipeline is compiled.

    `pirl submit --step NAME=VALUE` sets each of these, also `pirl compile` and `pirl schedule`.
    """

    model_config = ConfigDict(coerce_numbers_to_str=True)

    image: Image = Field(default_factory=lambda: STEPS_IMAGE, validate_default=True)
    """Image of all steps."""
    cpu: Cores = "1"
    """Request and limit of each step."""
    memory: Memory = "4Gi"
    """Request and limit of each step."""
    gpus: Annotated[int, Field(ge=0, le=64)] = 0
    """GPUs of the steps that train and evaluate, for `backend=local`."""
    retries: Annotated[int, Field(ge=0, le=100)] = 2
    """Repetitions of a failed step; each step resumes finished work."""
    retry_wait_s: Annotated[int, Field(ge=0, le=3600)] = 15
    """Seconds before the first repetition; doubled before each further one."""
    timeout_s: Annotated[int, Field(ge=60, lt=2**31)] = 14 * 86400
    """Seconds that a step may take."""
    secret: OptionalName = "pirl-s3"
    """Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION.

    The Secret and each of its keys may be absent. Empty: no Secret is mentioned, for a workload identity.
    """
    pull_secrets: list[DnsName] = Field(default_factory=list)
    """Secrets with which images are pulled."""
    node_selector: dict[LabelName, LabelValue] = Field(default_factory=dict)
    tolerations: list[Toleration] = Field(default_factory=list)
    """As Kubernetes writes them: {"key": "dedicated", "operator": "Exists"}."""
    labels: dict[LabelName, LabelValue] = Field(default_factory=dict)
    """Labels of the pods, for instance those that a PodDefault selects."""
    env: Environment = Field(default_factory=dict)
    """Environment, for instance HTTPS_PROXY; no secrets, which belong into the Secret."""
    claims: Claims = Field(default_factory=dict)
    """PersistentVolumeClaims to mount, and where: {"images": "/data"}; read-only where the claim is."""
    ca: OptionalName = ""
    """ConfigMap with the certificate authorities of storage and registry as `ca.crt`."""
    restricted: bool = False
    """Run as a user that is not root, as the pod security level `restricted` asks for. Needs KFP 2.16 or newer."""


def step_settings(items: Iterable[str] = ()) -> StepSettings:
    """Return the settings of NAME=VALUE items, whose value is JSON or a bare word. Raise all problems at once."""
    values, problems = read_items(items, json_value, "name=value")
    if "image" not in values:
        require_image()
    return validated(StepSettings, values, "the steps' settings", problems, secret=("env",))
