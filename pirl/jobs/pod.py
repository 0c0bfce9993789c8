"""The objects of a job: restricted pods with the program's specification as a file, in the frame of a kind."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from .. import __version__
from ..storage import open_storage
from .kind import DEFAULT_CONTAINER, SPEC_HASH, TTL, JobKind, Object
from .settings import CA_DIR, JobSettings, ca_environment

if TYPE_CHECKING:
    from ..programs import Command

METRICS_PORT = 9400
TRAINING = "pirl.train"
"""Module whose jobs are named after the run alone."""
SETTINGS_DIR = "/etc/pirl"


def job_name(out: str, module: str = TRAINING) -> str:
    """Return the job's name: the same for every launcher of `module` for the run `out`, so that two start one job.

    At most 44 characters: operators add `-worker-N`, and the name of a Service may have 63.
    """
    uri = open_storage(out).uri
    if module == TRAINING:
        return f"pirl-{slug(uri.rpartition('/')[2], 28)}-{hashlib.sha256(uri.encode()).hexdigest()[:10]}"
    purpose = slug(module.rpartition(".")[2], 8)
    digest = hashlib.sha256(f"{module} {uri}".encode()).hexdigest()[:10]
    return f"pirl-{purpose}-{slug(uri.rpartition('/')[2], 19)}-{digest}"


def build_job(
    kind: JobKind, program: Command, settings: JobSettings, labels: Mapping[str, str] | None = None
) -> list[Object]:
    """Return the objects to create, the job last. `labels` (the KFP run's id) do not take part in their hash."""
    name = job_name(program.out, program.module)
    own = {
        "app.kubernetes.io/name": "pirl-pipeline",
        "app.kubernetes.io/component": "trainer",
        "app.kubernetes.io/part-of": "pirl-pipeline",
        "app.kubernetes.io/managed-by": "pirl",
        "app.kubernetes.io/version": __version__.replace("+", "-"),
        "pirl.dev/job": name,
        "pirl.dev/run": slug(program.out.rstrip("/").rpartition("/")[2], 63),
        "pirl.dev/recipe": slug(program.name, 63),
    }
    queue = {"kueue.x-k8s.io/queue-name": settings.queue} if settings.queue else {}
    specs = kind.specs(name, settings, _template(kind, program, settings, own))
    digest = hashlib.sha256(json.dumps([specs, queue], sort_keys=True).encode()).hexdigest()
    expiry = {} if kind.expires else {TTL: str(settings.ttl_s)}
    return [
        {
            "apiVersion": f"{resource.group}/{resource.version}",
            "kind": resource.kind,
            "metadata": {
                "name": name,
                "namespace": settings.namespace,
                "labels": {**settings.labels, **own, **queue, **(labels or {})},
                "annotations": {**settings.annotations, **expiry, "pirl.dev/out": program.out, SPEC_HASH: digest},
            },
            "spec": spec,
        }
        for resource, spec in zip(kind.resources, specs, strict=True)
    ]


def is_same(job: Object, body: Object) -> bool:
    """Return whether the job was made from the same specification as `body`."""
    return job["metadata"].get("annotations", {}).get(SPEC_HASH) == body["metadata"]["annotations"][SPEC_HASH]


def differences(new: Any, old: Any, path: str = "spec") -> list[str]:
    """Return `path: old -> new` of each leaf of `new` that differs in `old`, which may have more."""
    if isinstance(new, dict) and isinstance(old, dict):
        return [line for key in new for line in differences(new[key], old.get(key), f"{path}.{key}")]
    if isinstance(new, list) and isinstance(old, list) and len(new) == len(old):
        pairs = enumerate(zip(new, old, strict=True))
        return [line for index, (a, b) in pairs for line in differences(a, b, f"{path}[{index}]")]
    return [] if new == old else [f"{path}: {old!r} -> {new!r}"]


def to_yaml(objects: Sequence[Object]) -> str:
    """Return the objects as `kubectl create -f` takes them."""

    class BlockText(yaml.SafeDumper):
        """Text of several lines, the recipe, as a block that a person can read."""

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    BlockText.add_representer(str, text)
    return yaml.dump_all(objects, Dumper=BlockText, sort_keys=False)


def _template(kind: JobKind, program: Command, settings: JobSettings, own: Mapping[str, str]) -> Object:
    """Return the template of a pod. A sidecar of Istio would outlive the training and cut its sockets."""
    no_sidecar = {"sidecar.istio.io/inject": "false"}
    file = program.file()
    files = {f"pirl.dev/{file[0]}": file[1]} if file else {}
    pod: Object = {
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
        **_spread(settings, own["pirl.dev/job"]),
        "containers": [_container(kind, program, settings)],
        "volumes": _volumes(settings, list(files)),
    }
    if settings.pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in settings.pull_secrets]
    if settings.priority_class:
        pod["priorityClassName"] = settings.priority_class
    if settings.node_selector:
        pod["nodeSelector"] = settings.node_selector
    if settings.tolerations:
        pod["tolerations"] = [item.model_dump(exclude_none=True) for item in settings.tolerations]
    annotations = {**settings.annotations, **no_sidecar, DEFAULT_CONTAINER: kind.container, **files}
    return {"metadata": {"labels": {**settings.labels, **no_sidecar, **own}, "annotations": annotations}, "spec": pod}


def _spread(settings: JobSettings, name: str) -> Object:
    """Return the rules that put pods on different nodes.

    Both of them: the scheduler may weigh a preferred spread lower than an image that a node already has.
    """
    same_job = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"pirl.dev/job": name}}}
    otherwise = {"prefer": "ScheduleAnyway", "require": "DoNotSchedule"}[settings.spread]
    preferred = [{"weight": 100, "podAffinityTerm": same_job}]
    return {
        "topologySpreadConstraints": [{"maxSkew": 1, "whenUnsatisfiable": otherwise, **same_job}],
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}},
    }


def _container(kind: JobKind, program: Command, settings: JobSettings) -> Object:
    """Return the container that runs the program."""
    resources = {"cpu": settings.cpu, "memory": settings.memory, **settings.resources}
    if settings.gpus:
        resources[settings.gpu_resource] = str(settings.gpus)
    capabilities = {"drop": ["ALL"], **({"add": ["IPC_LOCK"]} if settings.ipc_lock else {})}
    file = program.file()
    environment = {
        "HOME": "/tmp",
        "PIRL_METRICS_PORT": str(METRICS_PORT),
        **ca_environment(settings.ca),
        **settings.env,
    }
    container: Object = {
        "name": kind.container,
        "image": settings.image,
        "command": ["python", "-m", program.module],
        "args": [_literal(text) for text in program.arguments(f"{SETTINGS_DIR}/{file[0]}" if file else "")],
        "env": [{"name": key, "value": _literal(value)} for key, value in environment.items()],
        "ports": [{"name": "metrics", "containerPort": METRICS_PORT}],
        "resources": {"requests": resources, "limits": resources},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": capabilities,
            "readOnlyRootFilesystem": True,
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",  # the last lines, also when the node is gone
        "volumeMounts": [
            {"name": "settings", "mountPath": SETTINGS_DIR, "readOnly": True},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            {"name": "tmp", "mountPath": "/tmp"},
            *([{"name": "ca", "mountPath": CA_DIR, "readOnly": True}] if settings.ca else []),
            *(
                {"name": f"claim-{index}", "mountPath": path, "readOnly": True}
                for index, path in enumerate(settings.claims.values())
            ),
        ],
    }
    if settings.secret:
        container["envFrom"] = [{"secretRef": {"name": settings.secret, "optional": True}}]
    return container


def _volumes(settings: JobSettings, files: Sequence[str]) -> list[Object]:
    """Return the volumes; `files` are annotations of the pod, each mounted as a file of its last part's name."""
    items = [
        {"path": name.rpartition("/")[2], "fieldRef": {"fieldPath": f"metadata.annotations['{name}']"}}
        for name in files
    ]
    return [
        {"name": "settings", "downwardAPI": {"items": items}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}},
        {"name": "tmp", "emptyDir": {}},
        *([{"name": "ca", "configMap": {"name": settings.ca}}] if settings.ca else []),
        *(
            {"name": f"claim-{index}", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
            for index, claim in enumerate(settings.claims)
        ),
    ]


def _literal(text: str) -> str:
    """Return the text as Kubernetes takes it for itself: `$(NAME)` would be replaced by a variable."""
    return text.replace("$(", "$$(")


def slug(text: str, most: int) -> str:
    """Return the nearest text that Kubernetes takes as a label and as part of a name."""
    short = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:most].strip("-")
    return short or "run"
