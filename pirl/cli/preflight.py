"""Checks of a dry run of a pipeline on a cluster: storage, images, account, and what would refuse the job."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..backends import ClusterBackend, open_backend
from ..doctor import Check, cluster_checks
from ..errors import PirlError
from ..settings import split_items
from ..storage import open_storage
from .app import console

SOURCES = ("train_source", "test_source")


def print_pods(values: dict[str, Any], image: str, service_account: str) -> bool:
    """Print images and account of the steps and of the job, and the checks; return whether a check has failed."""
    backend = open_backend(str(values.get("backend", "local")), split_items(str(values.get("job", ""))))
    images = {"the steps": image}
    if isinstance(backend, ClusterBackend):
        images["the job"] = backend.settings.image
    for name, image in images.items():
        console.print(f"image of {name}: {image}")
        if image.startswith("localhost/"):
            console.print("  -> only this machine has it: name one of a registry (--step image=..., job='image=...')")
    if isinstance(backend, ClusterBackend):
        console.print(f"account of the steps: {service_account or 'the default of KFP, pipeline-runner'}")
        if not service_account:
            overlay = "manifests/overlays/kfp-default-account"
            console.print(f"  -> it may start no job without `kubectl apply -k {overlay}`; else use --service-account")
    checks = [*storage_checks(values), *(job_checks(backend) if isinstance(backend, ClusterBackend) else [])]
    for check in checks:
        console.print(f"{check.name}: {check.state}, {check.finding}")
        if check.fix and check.state != "ok":
            console.print(f"  -> {check.fix}")
    return any(check.state == "bad" for check in checks)


def storage_checks(values: dict[str, Any]) -> Iterator[Check]:
    """Yield whether root and sources can be listed from this machine; a note where it has no access to them."""
    for name in ("root", *SOURCES):
        uri = str(values.get(name, ""))
        if "://" not in uri:
            continue
        try:
            empty = not open_storage(uri).children()
        except PirlError as error:
            yield Check(name, "note", f"not checked from this machine: {error.what}", error.hint)
            continue
        if empty and name in SOURCES:
            yield Check(name, "bad", f"{uri} has no objects", "name the folder of the images")
        else:
            yield Check(name, "ok", f"{uri} can be listed")


def job_checks(backend: ClusterBackend) -> Iterator[Check]:
    """Yield the checks of `pirl doctor --cluster` that start nothing; one note where this machine has no cluster."""
    for check in cluster_checks(backend.kinds, backend.settings, ""):
        if check.name == "API server" and check.state == "bad":
            yield Check("cluster", "note", f"not checked from this machine: {check.finding}", check.fix)
        elif check.name != "pod":
            yield check
