"""Checks of this machine before a training."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from pathlib import Path

from ..errors import StorageError
from ..text import count
from .check import Check


def machine_checks() -> list[Check]:
    """Return all checks, in the order in which a user meets what they look at. No check changes anything."""
    return [_torch(), _cores(), _precision(), _shared_memory(), _data(), _storage(), _cluster(), _kfp()]


def _torch() -> Check:
    import torch

    gpus = torch.cuda.device_count()
    state = f"torch {torch.__version__}, {count(gpus, 'GPU') if gpus else 'no GPU'}"
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        return Check("torch", "bad", f"{state}; torchvision does not import: {error}", "install both from one index")
    return Check("torch", "ok", state)


def _cores() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < 2:
        return Check("cores", "note", "1 core", "training takes twice the time that the README names")
    return Check("cores", "ok", f"{cores} cores")


def _precision() -> Check:
    import torch

    if torch.cuda.is_available():
        return Check("bf16", "ok" if torch.cuda.is_bf16_supported() else "note", torch.cuda.get_device_name())
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    if names:
        return Check("bf16", "ok", ", ".join(names))
    return Check("bf16", "note", "this CPU has no bf16 instructions", "train.precision=fp32 is faster here")


def _shared_memory() -> Check:
    path = Path("/dev/shm")
    if not path.exists():
        return Check("/dev/shm", "note", "does not exist", "use --workers 0")
    free = shutil.disk_usage(path).free
    if free < 1 << 30:
        return Check("/dev/shm", "note", f"{free >> 20} MiB free", "mount more (docker run --shm-size) or --workers 0")
    return Check("/dev/shm", "ok", f"{free >> 30} GiB free")


def _data() -> Check:
    from ..shards.fashion import present_fashion_mnist

    where = present_fashion_mnist()
    if where is None:
        return Check("demo data", "note", "not on this machine yet", "`pirl demo` downloads or installs it")
    return Check("demo data", "ok", str(where))


def _storage() -> Check:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    bucket = os.environ.get("PIRL_BUCKET")
    if not bucket:
        state = f"endpoint {endpoint}" if endpoint else "no endpoint set"
        return Check("S3", "note", f"not checked ({state})", "set PIRL_BUCKET=s3://bucket to have it tried")
    from ..storage import open_storage

    try:
        open_storage(bucket).list("pirl-doctor")
    except StorageError as error:
        return Check("S3", "bad", error.what, error.hint)
    return Check("S3", "ok", f"{bucket} can be listed")


def _cluster() -> Check:
    kubeconfig = os.environ.get("KUBECONFIG", os.path.expanduser("~/.kube/config"))
    inside = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
    if not Path(kubeconfig).exists() and not inside.exists():
        return Check("cluster", "note", "none configured", "not needed here; set KUBECONFIG for one")
    try:
        from kubernetes import client, config

        config.load_config()
        version = client.VersionApi().get_code(_request_timeout=5)
    except Exception as error:  # whatever a client of some cluster may raise
        return Check("cluster", "bad", f"{kubeconfig}: {str(error).splitlines()[0]}", "is the cluster up?")
    return Check("cluster", "ok", f"Kubernetes {version.git_version}")


def _kfp() -> Check:
    try:
        return Check("kfp", "ok", f"kfp {importlib.metadata.version('kfp')}")
    except importlib.metadata.PackageNotFoundError:  # as in the trainer's image
        return Check("kfp", "note", "not installed", "not needed to train; pip install kfp to run pipelines")
