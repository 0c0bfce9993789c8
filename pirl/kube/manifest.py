"""The PyTorchJob of a training: Workers only, joined by torchrun's c10d rendezvous, in restricted pods.

Why this shape: a Master would bring an init container that the `restricted` standard refuses. `OnFailure` restarts any
container that ends badly, that of a preempted rank (exit code 75) included, and the operator replaces a pod that was
evicted; each start goes on from the last checkpoint. `ExitCode` would take 75 for a final failure, and restart what
ends by a signal forever. torchrun itself restarts nothing (maxRestarts 0): one mechanism, one count, `backoffLimit`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import yaml

from .. import __version__
from ..config import Recipe
from ..storage import open_storage
from ..train import Options
from .settings import JobSettings

Object = dict[str, Any]  # of Kubernetes, as its API has it
API = ("kubeflow.org", "v1", "pytorchjobs")
CONTAINER = "pytorch"  # the operator looks for this name
METRICS_PORT = 9400
RECIPE = "pirl.dev/recipe.toml"  # the annotation that brings the recipe into the pods
SPEC_HASH = "pirl.dev/spec-hash"
SETTINGS_DIR = "/etc/pirl"


def job_name(out: str) -> str:
    """The same for every launcher of the run `out`, so that two of them cannot start two jobs. At most 44 characters:
    the operator adds `-worker-N`, and the name of a Service may have 63."""
    uri = open_storage(out).uri
    return f"pirl-{_slug(uri.rpartition('/')[2], 28)}-{hashlib.sha256(uri.encode()).hexdigest()[:10]}"


def build_job(
    recipe: Recipe, options: Options, settings: JobSettings, labels: Mapping[str, str] | None = None
) -> Object:
    """The object to create. `labels` (the KFP run's id, for instance) do not take part in its hash."""
    ours = {
        "app.kubernetes.io/name": "pirl-pipeline",
        "app.kubernetes.io/component": "trainer",
        "app.kubernetes.io/part-of": "pirl-pipeline",
        "app.kubernetes.io/managed-by": "pirl",
        "app.kubernetes.io/version": __version__.replace("+", "-"),
        "pirl.dev/run": _slug(options.out.rstrip("/").rpartition("/")[2], 63),
        "pirl.dev/recipe": _slug(recipe.name, 63),
    }
    pod_labels = {**settings.labels, "sidecar.istio.io/inject": "false", **ours}
    spec: dict[str, Any] = {
        "nprocPerNode": str(settings.ranks_per_pod),
        "elasticPolicy": {
            "rdzvBackend": "c10d",
            "minReplicas": settings.nodes,
            "maxReplicas": settings.nodes,
            "maxRestarts": 0,
        },
        "runPolicy": {
            "cleanPodPolicy": "Running",
            "ttlSecondsAfterFinished": settings.ttl_s,
            # the operator counts every container's restarts, and one failure restarts them all
            "backoffLimit": settings.max_restarts * settings.nodes,
        },
        "pytorchReplicaSpecs": {
            "Worker": {
                "replicas": settings.nodes,
                "restartPolicy": "OnFailure",
                "template": {
                    "metadata": {
                        "labels": pod_labels,
                        "annotations": {
                            **settings.annotations,
                            "sidecar.istio.io/inject": "false",  # a sidecar outlives the training, and cuts its sockets
                            RECIPE: recipe.to_toml(),
                        },
                    },
                    "spec": _pod(job_name(options.out), options, settings),
                },
            }
        },
    }
    if settings.run_s is not None:  # for the launcher that is no more: its own clock comes first
        spec["runPolicy"]["activeDeadlineSeconds"] = round(settings.run_s) + 600
    queue = {"kueue.x-k8s.io/queue-name": settings.queue} if settings.queue else {}
    digest = hashlib.sha256(json.dumps([spec, queue], sort_keys=True).encode()).hexdigest()
    return {
        "apiVersion": f"{API[0]}/{API[1]}",
        "kind": "PyTorchJob",
        "metadata": {
            "name": job_name(options.out),
            "namespace": settings.namespace,
            "labels": {**settings.labels, **ours, **queue, **(labels or {})},
            "annotations": {**settings.annotations, "pirl.dev/out": options.out, SPEC_HASH: digest},
        },
        "spec": spec,
    }


def to_yaml(job: Mapping[str, Any]) -> str:
    """The object as `kubectl create -f` takes it."""

    class BlockText(yaml.SafeDumper):
        """Text of several lines, the recipe, as a block that a person can read."""

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    BlockText.add_representer(str, text)
    return yaml.dump(job, Dumper=BlockText, sort_keys=False)


def _pod(name: str, options: Options, settings: JobSettings) -> Object:
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


def _slug(text: str, most: int) -> str:
    """The nearest text that Kubernetes takes as a label and as part of a name."""
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:most].strip("-")
    return slug or "run"
