"""Settings of the steps' pods on a cluster, written into a compiled pipeline; without effect on this machine.

Only fields that the backends of Kubeflow 1.9 (KFP 2.3.0) accept are written, because their drivers refuse a step with
any other. So one file runs on 2.3.0, 2.5.0 and 2.17.0. `restricted` is the exception.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from components.step import SECRET_DIR
from pirl.jobs.settings import CA_DIR, Toleration, ca_environment, to_bytes
from pirl.jobs.steps import StepSettings, step_settings

__all__ = ["StepSettings", "step_settings", "write_settings"]

COMPUTING = ("exec-pretrain", "exec-linear-eval", "exec-retrain")
"""Executors that use GPUs, if the training runs in the step itself."""
USER = 65532  # of the images


def write_settings(spec: dict[str, Any], settings: StepSettings) -> dict[str, Any]:
    """Write the settings into a pipeline's spec, and return those for Kubernetes, its second part."""
    executors = spec["deploymentSpec"]["executors"]
    names = [name for name, executor in executors.items() if "container" in executor]
    for name in names:
        container = executors[name]["container"]
        container["image"] = settings.image
        container["resources"] = _resources(settings, settings.gpus if name in COMPUTING else 0)
        environment = {**ca_environment(settings.ca), **settings.env}
        if environment:
            container["env"] = [{"name": key, "value": value} for key, value in environment.items()]
    for task in _tasks(spec):
        executor = spec["components"][task["componentRef"]["name"]].get("executorLabel")
        task["cachingOptions"] = {}  # because a step skips finished work itself, by content
        if executor in names and settings.retries:
            task["retryPolicy"] = {
                "maxRetryCount": settings.retries,
                "backoffDuration": f"{settings.retry_wait_s}s",
                "backoffFactor": 2.0,
                # Argo counts it from the first start: a longer step would not be retried, a retried one would be killed
                "backoffMaxDuration": f"{settings.timeout_s * (settings.retries + 1)}s",
            }
    pods = {name: _pod(settings) for name in names}
    return {"platforms": {"kubernetes": {"deploymentSpec": {"executors": pods}}}}


def _tasks(spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for dag in [spec["root"], *spec["components"].values()]:
        yield from dag.get("dag", {}).get("tasks", {}).values()


def _resources(settings: StepSettings, gpus: int) -> dict[str, Any]:
    """Return requests and limits, in cores and 10^9 bytes: the fields that every KFP 2 has."""
    cores = settings.cpu
    cpu = int(cores[:-1]) / 1000 if cores.endswith("m") else float(cores)
    memory = to_bytes(settings.memory) / 1e9
    resources: dict[str, Any] = {"cpuLimit": cpu, "cpuRequest": cpu, "memoryLimit": memory, "memoryRequest": memory}
    return resources | ({"accelerator": {"type": "nvidia.com/gpu", "count": str(gpus)}} if gpus else {})


def _pod(settings: StepSettings) -> dict[str, Any]:
    """Return a pod's settings in the form of KubernetesExecutorConfig."""
    pod: dict[str, Any] = {"activeDeadlineSeconds": str(settings.timeout_s)}
    if settings.secret:  # as files, because a variable cannot be optional on KFP 2.3.0 and 2.5.0
        pod["secretAsVolume"] = [{"secretName": settings.secret, "mountPath": SECRET_DIR, "optional": True}]
    if settings.ca:
        pod["configMapAsVolume"] = [{"configMapName": settings.ca, "mountPath": CA_DIR, "optional": False}]
    if settings.claims:
        pod["pvcMount"] = [{"constant": claim, "mountPath": path} for claim, path in settings.claims.items()]
    if settings.pull_secrets:
        pod["imagePullSecret"] = [{"secretName": name} for name in settings.pull_secrets]
    if settings.node_selector:
        pod["nodeSelector"] = {"labels": settings.node_selector}
    if settings.tolerations:
        pod["tolerations"] = [_toleration(item) for item in settings.tolerations]
    if settings.labels:
        pod["podMetadata"] = {"labels": settings.labels}
    if settings.restricted:
        pod["securityContext"] = {"runAsUser": str(USER), "runAsGroup": str(USER), "runAsNonRoot": True}
    return pod


def _toleration(item: Toleration) -> dict[str, Any]:
    return {name: str(value) for name, value in item.model_dump(exclude_none=True).items()}
