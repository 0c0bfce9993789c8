"""Runs on a real KFP for tests: account and Secret, images and a recipe in S3, and the commands of a user.

KFP_ENDPOINT names the backend; its steps are pods of the namespace KFP_NAMESPACE (kubeflow). The steps run the image
PIRL_STEPS_IMAGE, or, without it, this checkout as trainings do (`training`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import yaml
from conftest import TINY
from images import folder_of_classes
from training import ROOT, Place, kubectl, make_place, read_only_volume

import pirl
from pirl.backends import KINDS

NAMESPACE = "pirl-kfp"
STEPS = os.environ.get("KFP_NAMESPACE", "kubeflow")
ACCOUNT = "pirl-launcher"
BIN = Path(sys.executable).parent


def objects_of(overlay: str) -> list[dict[str, Any]]:
    """An overlay of the manifests, its jobs in the namespace of these tests and its steps in that of KFP."""
    text = kubectl("kustomize", str(ROOT / "manifests" / "overlays" / overlay))
    text = text.replace("namespace: pirl\n", f"namespace: {NAMESPACE}\n").replace(
        "namespace: kubeflow\n", f"namespace: {STEPS}\n"
    )
    return list(yaml.safe_load_all(text))


@dataclass
class Kfp:
    """A KFP installation prepared for this project's steps, and a place for their jobs."""

    place: Place
    step: list[str]
    endpoint: str = os.environ.get("KFP_ENDPOINT", "")

    @property
    def folder(self) -> Path:
        return self.place.folder

    def job(self, **settings: Any) -> str:
        """Return the text `job` of a pipeline: that of the place, and others."""
        values = {**self.place.job, "nodes": 2, **settings}
        return " ".join(
            f"{name}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"
            for name, value in values.items()
        )

    def arguments(self, run: str, kind: str, **more: Any) -> list[str]:
        """Return the arguments of a run of `pirl-pretrain` as key=value items."""
        uri = self.place.uri
        values = {"run": run, "recipe": f"{uri}/recipe.toml", "root": f"{uri}/pirl", "min_gain": -1.0}
        values |= {f"{split}_source": f"{uri}/{split}" for split in ("train", "test")}
        values |= {"backend": kind, "job": self.job(), "options": "log_every=1"}
        return [f"{name}={value}" for name, value in (values | more).items()]

    def call(self, *words: str, seconds: float = 1200, ok: bool | None = True) -> str:
        """Return all that a command prints; `ok`: whether it must succeed, None: either."""
        started = time.monotonic()
        env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PIRL_STEP": " ".join(self.step), "COLUMNS": "250"}
        done = subprocess.run(
            words, cwd=self.folder, env=env, capture_output=True, text=True, check=False, timeout=seconds
        )
        shown = done.stdout + done.stderr
        print(f"--- {' '.join(words)[:200]}: exit {done.returncode} after {time.monotonic() - started:.0f} s\n{shown}")
        assert ok is None or (done.returncode == 0) == ok, shown
        return shown

    def pirl(self, *words: str, ok: bool | None = True) -> str:
        return self.call("pirl", *words, ok=ok)

    def submit(self, *words: str, ok: bool | None = True) -> str:
        """`pirl submit pirl-pretrain` with this project's account."""
        return self.pirl("submit", "pirl-pretrain", *words, "--service-account", ACCOUNT, ok=ok)

    def get(self, path: str) -> dict[str, Any]:
        """Return an answer of KFP's API."""
        return json.loads(self.call("curl", "-sS", "--fail", f"{self.endpoint}/apis/v2beta1/{path}"))

    def runs(self) -> list[dict[str, Any]]:
        """Return the newest runs of the backend, the newest first."""
        return self.get("runs?page_size=100&sort_by=created_at%20desc").get("runs", [])

    def state(self, run: str) -> str:
        return str(self.get(f"runs/{run}").get("state"))

    def jobs(self, run: str) -> list[str]:
        """Return the jobs of every kind that a KFP run has started and that are still there."""
        found = []
        for kind in KINDS:
            names = kubectl(
                "get", kind.command, "-n", NAMESPACE, "-l", f"pirl.dev/kfp-run={run}", "-o", "name", ok=False
            )
            found += [line for line in names.splitlines() if "/" in line and " " not in line]
        return found

    def pods(self, run: str, task: str = "") -> list[dict[str, Any]]:
        """Return the pods of a run's steps that ran this project's code."""
        items = json.loads(kubectl("get", "pods", "-n", STEPS, "-l", f"pipeline/runid={run}", "-o", "json"))["items"]
        own = [pod for pod in items if any("kfp.dsl.executor_main" in str(c) for c in pod["spec"]["containers"])]
        return [pod for pod in own if f'"--function_to_execute", "{task}"' in json.dumps(pod) or not task]

    def logs(self, run: str) -> str:
        selector = f"pipeline/runid={run}"
        return kubectl("logs", "-n", STEPS, "-l", selector, "-c", "main", "--prefix", "--tail=60", ok=False)

    def artifacts(self, run: str) -> dict[str, bytes]:
        """Return the files of a run's artifacts by step and name: `report/page`."""
        bucket, _, prefix = os.environ.get("KFP_ARTIFACTS", "mlpipeline/v2/artifacts").partition("/")
        files = boto3.resource("s3").Bucket(bucket).objects.filter(Prefix=f"{prefix}/")
        found = {}
        for file in files:
            parts = file.key.split("/")
            if run in parts:
                found[f"{parts[parts.index(run) + 1]}/{parts[-1]}"] = file.get()["Body"].read()
        return found


def upload(folder: Path, uri: str) -> None:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    for path in sorted(folder.rglob("*.*")):
        boto3.client("s3").upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder)}")


def make_kfp(folder: Path) -> tuple[Kfp, list[dict[str, Any]]]:
    """Return the installation, and the objects to delete when it is no longer needed."""
    place, objects = make_place(NAMESPACE, folder)
    upload(
        folder_of_classes(folder / "photos" / "train", classes=3, images=14, width=24, height=20), f"{place.uri}/train"
    )
    test = folder_of_classes(folder / "photos" / "test", classes=3, images=5, width=24, height=20, first=5000)
    upload(test, f"{place.uri}/test")
    bucket = place.uri.removeprefix("s3://")
    boto3.client("s3").put_object(
        Bucket=bucket, Key="recipe.toml", Body=TINY.replace("base_lr = 0.8", "base_lr = 0.05").encode()
    )
    own = objects_of("kfp")
    secret = next(item for item in objects if item["kind"] == "Secret")
    own.append({**secret, "metadata": {**secret["metadata"], "namespace": STEPS}})
    env = {"OMP_NUM_THREADS": "1"}
    step = ["cpu=100m", "memory=3Gi", "retries=1", "retry_wait_s=1"]
    image = os.environ.get("PIRL_STEPS_IMAGE")
    if not image:
        image = place.job["image"]
        paths = {"source": Path(pirl.__file__).parents[1], "site-packages": Path(sysconfig.get_path("purelib"))}
        env["PYTHONPATH"] = ":".join(f"/opt/{name}" for name in paths)
        step.append("claims=" + json.dumps({name: f"/opt/{name}" for name in paths}, separators=(",", ":")))
        for name, path in paths.items():
            own += read_only_volume(STEPS, name, path)
    step += [f"image={image}", "env=" + json.dumps(env, separators=(",", ":"))]
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(own))
    return Kfp(place, step), own + objects
