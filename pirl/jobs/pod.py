"""The pods of a job: restricted, with the recipe as a file and one container that trains."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import yaml

from ..storage import open_storage
from ..training.spec import Options
from .settings import JobSettings

Object = dict[str, Any]  # of Kubernetes, as its API has it
CONTAINER = "pytorch"  # the operator looks for this name
METRICS_PORT = 9400
RECIPE = "pirl.dev/recipe.toml"  # the annotation that brings the recipe into the pods
SPEC_HASH = "pirl.dev/spec-hash"
SETTINGS_DIR = "/etc/pirl"


def job_name(out: str) -> str:
    """The same for every launcher of the run `out`, so that two of them cannot start two jobs. At most 44 characters:
    the operator adds `-worker-N`, and the name of a Service may have 63."""
    uri = open_storage(out).uri
    return f"pirl-{slug(uri.rpartition('/')[2], 28)}-{hashlib.sha256(uri.encode()).hexdigest()[:10]}"


def to_yaml(job: Mapping[str, Any]) -> str:
    """The object as `kubectl create -f` takes it."""

    class BlockText(yaml.SafeDumper):
        """Text of several lines, the recipe, as a block that a person can read."""

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    BlockText.add_representer(str, text)
    return yaml.dump(job, Dumper=BlockText, sort_keys=False)


def pod_spec(name: str, options: Options, settings: JobSettings) -> Object:
    resources = {"cpu": settings.cpu, "memory": settings.memory}
    if settings.gpus:
        resources["nvidia.com/gpu"] = str(settings.gpus)
    same_job = {"matchLabels": {"training.kubeflow.org/job-name": name}}
    spread = {"prefer": "ScheduleAnyway", "require": "DoNotSchedule"}[settings.spread]
    pod: dict[str, Any] = {
        "serviceAccountName": settings.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": settings.grace_s,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "runAsGroup": 65532,
            "fsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": spread,
                "labelSelector": same_job,
            }
        ],
        "affinity": {  # the scheduler may weigh a preferred spread lower than an image that is already there
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {
                        "weight": 100,
                        "podAffinityTerm": {"topologyKey": "kubernetes.io/hostname", "labelSelector": same_job},
                    }
                ]
            }
        },
        "containers": [
            {
                "name": CONTAINER,
                "image": settings.image,
                "command": ["python", "-m", "pirl.train", f"{SETTINGS_DIR}/recipe.toml"],
                # without the number of processes: it comes from the operator's PET_NPROC_PER_NODE
                "args": replace(options, processes=None).arguments(),
                "env": [
                    {"name": key, "value": value}
                    for key, value in {
                        "HOME": "/tmp",
                        "PIRL_METRICS_PORT": str(METRICS_PORT),
                        **settings.env,
                    }.items()
                ],
                "ports": [{"name": "metrics", "containerPort": METRICS_PORT}],
                "resources": {"requests": resources, "limits": resources},
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                    "readOnlyRootFilesystem": True,
                },
                "terminationMessagePolicy": "FallbackToLogsOnError",  # the last lines, also when the node is gone
                "volumeMounts": [
                    {"name": "settings", "mountPath": SETTINGS_DIR, "readOnly": True},
                    {"name": "shared-memory", "mountPath": "/dev/shm"},
                    {"name": "tmp", "mountPath": "/tmp"},
                    *(
                        {"name": f"claim-{index}", "mountPath": path, "readOnly": True}
                        for index, path in enumerate(settings.claims.values())
                    ),
                ],
            }
        ],
        "volumes": [
            {
                "name": "settings",
                "downwardAPI": {
                    "items": [{"path": "recipe.toml", "fieldRef": {"fieldPath": f"metadata.annotations['{RECIPE}']"}}]
                },
            },
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}},
            {"name": "tmp", "emptyDir": {}},
            *(
                {"name": f"claim-{index}", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
                for index, claim in enumerate(settings.claims)
            ),
        ],
    }
    if settings.secret:
        pod["containers"][0]["envFrom"] = [{"secretRef": {"name": settings.secret, "optional": True}}]
    if settings.priority_class:
        pod["priorityClassName"] = settings.priority_class
    if settings.node_selector:
        pod["nodeSelector"] = settings.node_selector
    if settings.tolerations:
        pod["tolerations"] = settings.tolerations
    return pod


def slug(text: str, most: int) -> str:
    """The nearest text that Kubernetes takes as a label and as part of a name."""
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:most].strip("-")
    return slug or "run"
