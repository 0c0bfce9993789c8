"""Trainings in real pods for tests: a namespace with what pods need, tiny shards in S3, and launchers as processes.

The pods run the image named by PIRL_TRAINER_IMAGE. Without it, on the cluster of the program PIRL_CLUSTER (with `load`,
`cut`, `stop`...), they run this checkout: a thin Debian with Python, and the library from read-only volumes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from conftest import IMAGES, TINY
from images import folder_of_classes

import pirl
from pirl.backends import KINDS
from pirl.jobs.kind import JobKind
from pirl.jobs.pytorchjob import PyTorchJob
from pirl.shards import open_source, write_shards
from pirl.storage import open_storage

ROOT = Path(__file__).parents[2]
THIN = "localhost/pirl-thin:1"
PROGRAM = os.environ.get("PIRL_CLUSTER", "")
STEPS_PER_EPOCH = 5


def needs_program() -> pytest.MarkDecorator:
    return pytest.mark.skipif(not PROGRAM, reason="breaks nodes and servers: set PIRL_CLUSTER to the program for that")


def program(*arguments: str, ok: bool = True) -> None:
    subprocess.run([PROGRAM, *arguments], check=ok, capture_output=True)


def kinds() -> list[Any]:
    """A parameter for each kind of job, skipped where the cluster does not serve it."""
    served = set()
    if os.environ.get("KUBECONFIG") and shutil.which("kubectl"):
        served = set(kubectl("api-resources", "-o", "name", ok=False).split())
    return [
        pytest.param(
            kind,
            id=kind.name,
            marks=pytest.mark.skipif(
                f"{kind.resource.plural}.{kind.resource.group}" not in served, reason=f"no {kind.title} on this cluster"
            ),
        )
        for kind in KINDS
    ]


def kubectl(*arguments: str, stdin: str | None = None, ok: bool = True) -> str:
    """What it says on its output; where it may fail (`ok` false), what it says at all."""
    done = subprocess.run(["kubectl", *arguments], input=stdin, capture_output=True, text=True, check=False)
    assert not ok or done.returncode == 0, done.stderr
    return done.stdout if ok else done.stdout + done.stderr


def until(what: Callable[[], Any], seconds: float, every_s: float = 0.5) -> Any:
    """What `what` returns, as soon as that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(every_s)
    raise AssertionError(f"did not happen in {seconds} s")


@dataclass
class Place:
    """A restricted namespace and an S3 prefix with shards, for the trainings of one test module."""

    namespace: str
    uri: str
    folder: Path
    kind: JobKind = field(default_factory=PyTorchJob)
    job: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    def options(self, **job: Any) -> list[str]:
        """The place's settings of a job, or others, as the commands take them."""
        return [
            text
            for name, value in {**self.job, **job}.items()
            for text in ("--job", f"{name}={value if isinstance(value, str) else json.dumps(value)}")
        ]

    def pods(self, name: str) -> list[dict[str, Any]]:
        """The job's pods by their index, those that are being deleted last."""
        items = json.loads(kubectl("get", "pods", "-n", self.namespace, "-l", f"pirl.dev/job={name}", "-o", "json"))
        return sorted(items["items"], key=lambda pod: ("deletionTimestamp" in pod["metadata"], self.kind.index(pod)))

    def pod(self, name: str, index: int) -> str:
        """The name of a pod of the job."""
        return next(pod["metadata"]["name"] for pod in self.pods(name) if self.kind.index(pod) == index)

    def jobs(self) -> list[str]:
        return kubectl("get", self.kind.resource.plural, "-n", self.namespace, "-o", "name").split()

    def delete_job(self, name: str) -> None:
        """Delete a job, if it exists, and wait until it is gone."""
        kubectl("delete", self.kind.command, name, "-n", self.namespace, "--ignore-not-found", "--wait=true")


@dataclass
class Training:
    """`pirl train` with a job as a process, and its output."""

    place: Place
    run: str
    epochs: int
    job: dict[str, Any]
    starts: int = 0

    @property
    def out(self) -> str:
        return f"{self.place.uri}/runs/{self.run}"

    @property
    def name(self) -> str:
        from pirl.jobs.pod import job_name

        return job_name(self.out)

    def start(self, **job: Any) -> None:
        command = [str(Path(sys.executable).with_name("pirl")), "train", str(self.place.folder / "tiny.toml")]
        command += ["--backend", self.place.kind.name, "--data", f"{self.place.uri}/data", "--out", self.out]
        command += ["--log-every", "1", "--checkpoint-every-s", "3"]
        command += self.place.options(**{**self.job, **job})
        command += [f"train.epochs={self.epochs}", "optim.base_lr=0.05"]
        self.starts += 1
        self.log = self.place.folder / f"{self.run}-{self.starts}.log"
        env = {**os.environ, **self.place.env}
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)

    def text(self) -> str:
        return self.log.read_text()

    def step(self) -> int:
        """The newest step in the launcher's log."""
        return max(map(int, re.findall(r"step (\d+)/", self.text())), default=0)

    def reach(self, step: int, seconds: float = 240) -> None:
        def there() -> bool:
            assert self.process.poll() is None or self.step() >= step, self.text()
            return self.step() >= step

        until(there, seconds)

    def end(self, seconds: float = 420) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end in {seconds} s:\n{self.text()}") from None

    def losses(self) -> list[tuple[int, float]]:
        lines = open_storage(self.out).read_bytes("metrics.jsonl").decode().splitlines()
        return [(line["step"], line["loss"]) for line in map(json.loads, lines)]

    def complete(self) -> None:
        """Every image of every epoch was seen, once."""
        done = open_storage(self.out).read_json("DONE.json")
        assert done["images_seen"] == self.epochs * IMAGES
        assert done["steps"] == self.epochs * STEPS_PER_EPOCH
        assert [step for step, _ in self.losses()] == list(range(1, done["steps"] + 1))

    def in_pod(self, pod: int, code: str) -> str:
        """Run Python in a worker."""
        name, container = self.place.pod(self.name, pod), self.place.kind.container
        return kubectl("exec", "-n", self.place.namespace, name, "-c", container, "--", "python", "-c", code)

    def signal_rank(self, pod: int, number: int) -> None:
        """Signal the process in a worker that computes, not the one that started it."""
        self.in_pod(
            pod,
            "import os\n"
            "for pid in filter(str.isdigit, os.listdir('/proc')):\n"
            "    words = open(f'/proc/{pid}/environ', 'rb').read().split(b'\\0')\n"
            "    if int(pid) != os.getpid() and any(word.startswith(b'LOCAL_RANK=') for word in words):\n"
            f"        os.kill(int(pid), {number}); break\n"
            "else: raise SystemExit('no rank here')",
        )


def thin_image(folder: Path) -> str:
    """Debian with the Python of this process, built once."""
    archive = folder / "thin.tar"
    if not archive.exists():
        for needed in ("debootstrap", "buildah"):
            if not shutil.which(needed):
                pytest.skip(f"needs an image with this library (PIRL_TRAINER_IMAGE), or {needed} to make a thin one")
        if sys.version_info[:2] != (3, 11):
            pytest.skip("Debian's Python is 3.11, this is another: set PIRL_TRAINER_IMAGE")
        rootfs = folder / "rootfs"
        script = (
            f"debootstrap --variant=minbase --include=python3-minimal,libpython3.11-stdlib bookworm {rootfs}\n"
            f"ln -sf python3 {rootfs}/usr/bin/python\n"
            f"c=$(buildah from scratch)\nbuildah add -q $c {rootfs} /\n"
            "buildah config --user 65532:65532 --env PYTHONUNBUFFERED=1 $c\n"
            f"buildah commit -q $c oci-archive:{archive}.new:{THIN}\nmv {archive}.new {archive}\n"
            f"buildah rm $c\nrm -rf {rootfs}\n"
        )
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["bash", "-euc", script], check=True, capture_output=True)
    program("load", str(archive))
    return THIN


def make_place(namespace: str, folder: Path, kind: JobKind | None = None) -> tuple[Place, list[dict[str, Any]]]:
    """The place, and the objects to delete when it is no longer needed."""
    bucket = f"{namespace}-{os.getpid()}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    place = Place(namespace, f"s3://{bucket}", folder, kind or PyTorchJob())
    (folder / "tiny.toml").write_text(TINY)
    source = folder_of_classes(folder / "images", classes=3, images=IMAGES // 3, width=24, height=20)
    write_shards(open_source(str(source)), open_storage(f"{place.uri}/data"), shard_bytes=16 << 10)

    restricted = {"pod-security.kubernetes.io/enforce": "restricted"}
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION")
    objects: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": restricted}},
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "pirl-s3", "namespace": namespace},
            "stringData": {key: os.environ[key] for key in keys if key in os.environ},
        },
    ]
    for name in ("10-service-accounts.yaml", "20-rbac.yaml"):  # as they are installed, in another namespace
        objects += yaml.safe_load_all(
            (ROOT / "manifests" / name).read_text().replace("namespace: pirl", f"namespace: {namespace}")
        )
    place.job = {
        "namespace": namespace,
        "nodes": 4,
        "cpu": "1",
        "memory": "1Gi",
        "shared_memory": "64Mi",
        "grace_s": 20,
    }
    place.job["env"] = {"OMP_NUM_THREADS": "1"}
    if image := os.environ.get("PIRL_TRAINER_IMAGE"):
        place.job["image"] = image
    else:
        place.job["image"] = thin_image(Path("/var/tmp/pirl-thin"))
        paths = {"source": Path(pirl.__file__).parents[1], "site-packages": Path(sysconfig.get_path("purelib"))}
        place.job["claims"] = {name: f"/opt/{name}" for name in paths}
        place.job["env"]["PYTHONPATH"] = ":".join(place.job["claims"].values())
        for name, path in paths.items():
            objects += read_only_volume(namespace, name, path)
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(objects))
    place.env["KUBECONFIG"] = str(launcher_kubeconfig(namespace, folder))
    return place, objects


def read_only_volume(namespace: str, name: str, path: Path) -> list[dict[str, Any]]:
    """A folder of the nodes' machine, for pods that may not mount one themselves."""
    size, modes, whole = {"storage": "1Gi"}, ["ReadOnlyMany"], f"{namespace}-{name}"
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": whole},
            "spec": {
                "capacity": size,
                "accessModes": modes,
                "storageClassName": "",
                "hostPath": {"path": str(path)},
                "claimRef": {"namespace": namespace, "name": name},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {
                "accessModes": modes,
                "storageClassName": "",
                "volumeName": whole,
                "resources": {"requests": size},
            },
        },
    ]


def launcher_kubeconfig(namespace: str, folder: Path) -> Path:
    """The launcher's own rights and no more: a test that passes shows that its Role is enough."""
    config = json.loads(kubectl("config", "view", "--raw", "--minify", "-o", "json"))
    token = kubectl("create", "token", "pirl-launcher", "-n", namespace, "--duration=4h").strip()
    config["users"] = [{"name": config["users"][0]["name"], "user": {"token": token}}]
    path = folder / "launcher.kubeconfig"
    path.write_text(json.dumps(config))
    return path


def remove_place(place: Place, objects: list[dict[str, Any]]) -> None:
    kubectl("delete", place.kind.resource.plural, "--all", "-n", place.namespace, "--wait=true")
    kubectl("delete", "--ignore-not-found", "-f", "-", stdin=yaml.safe_dump_all(objects))
    bucket = boto3.resource("s3").Bucket(place.uri.removeprefix("s3://"))
    bucket.objects.all().delete()
    bucket.delete()
