"""The PyTorchJob of a training: Workers only, joined by torchrun's c10d rendezvous, in restricted pods.

Why this shape: a Master would bring an init container that the `restricted` standard refuses. `OnFailure` restarts any
container that ends badly, that of a preempted rank (exit code 75) included, and the operator replaces a pod that was
evicted; each start goes on from the last checkpoint. `ExitCode` would take 75 for a final failure, and restart what
ends by a signal forever. torchrun itself restarts nothing (maxRestarts 0): one mechanism, one count, `backoffLimit`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..config import Recipe
from ..training.spec import Options
from .pod import RECIPE, SPEC_HASH, Object, job_name, pod_spec, slug
from .settings import JobSettings

API = ("kubeflow.org", "v1", "pytorchjobs")


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
        "pirl.dev/run": slug(options.out.rstrip("/").rpartition("/")[2], 63),
        "pirl.dev/recipe": slug(recipe.name, 63),
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
                    "spec": pod_spec(job_name(options.out), options, settings),
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
