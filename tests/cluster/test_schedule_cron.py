"""Scheduled retraining by the CronJob of `manifests/`, every minute, on a real cluster.

Its pods have the launcher's service account and no more; what they train is a PyTorchJob of two workers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from images import folder_of_classes, jpeg
from training import Place, kubectl, make_place, read_only_volume, remove_place, until

from pirl.registry import CHAMPION, open_registry

MANIFESTS = Path(__file__).parents[2] / "manifests"
NAMESPACE = "pirl-cron"
SECONDS = 480  # for a training with all around it, on a machine that has other things to do

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="needs a Kubernetes cluster: set KUBECONFIG"),
]


def config(place: Place) -> dict[str, Any]:
    """The ConfigMap of an installation that trains what is in the volume `images`, in this place."""
    words = [
        f"{name}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"
        for name, value in place.job.items()
        if name != "nodes"
    ]
    data = {
        "PIRL_ROOT": place.uri,
        "PIRL_MODEL": "tiny",
        "PIRL_RECIPE": "/images/tiny.toml",
        "PIRL_TRAIN_SOURCE": "/images/train",
        "PIRL_TEST_SOURCE": "/images/test",
        "PIRL_MIN_GAIN": "-1",
        "PIRL_WARM_EPOCHS": "10",
        "PIRL_BACKEND": "pytorchjob",
        "PIRL_NODES": "2",
        "PIRL_JOB": " ".join(words),
    }
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "pirl-config", "namespace": place.namespace},
        "data": data,
    }


def cron_job(place: Place) -> dict[str, Any]:
    """The overlay's own, every minute; with the images in a volume, and the library too where its image has none."""
    cron = yaml.safe_load(kubectl("kustomize", str(MANIFESTS / "overlays" / "cron")))
    cron["metadata"]["namespace"] = place.namespace
    cron["spec"]["schedule"] = "* * * * *"
    pod = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    container["image"] = place.job["image"]
    libraries = place.job.get("claims", {})
    for name, path in {**libraries, "images": "/images"}.items():
        pod["volumes"].append({"name": name, "persistentVolumeClaim": {"claimName": name, "readOnly": True}})
        container["volumeMounts"].append({"name": name, "mountPath": path, "readOnly": True})
    if libraries:
        assert container["command"][0] == "pirl"  # a script that the thin image lacks
        start = "import sys; from pirl.cli import main; sys.argv[0] = 'pirl'; main()"
        container["command"] = ["python", "-c", start, *container["command"][1:]]
        container["env"] += [{"name": name, "value": value} for name, value in place.job["env"].items()]
    return cron


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place, objects = make_place(NAMESPACE, tmp_path)
    images = tmp_path / "photos"
    folder_of_classes(images / "train", classes=3, images=14, width=24, height=20)
    folder_of_classes(images / "test", classes=3, images=5, width=24, height=20, first=5000)
    recipe = (tmp_path / "tiny.toml").read_text()
    (images / "tiny.toml").write_text(recipe.replace("epochs = 3", "epochs = 60"))
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)  # pods are another user
    volume = read_only_volume(NAMESPACE, "images", images)
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(volume))
    objects += volume
    try:
        yield place
    finally:
        kubectl("delete", "cronjobs,jobs", "--all", "-n", NAMESPACE, "--wait=true", "--cascade=foreground")
        remove_place(place, objects)


def jobs() -> list[dict[str, Any]]:
    """Of the CronJob, oldest first."""
    found = json.loads(kubectl("get", "jobs", "-n", NAMESPACE, "-o", "json"))["items"]
    return sorted(found, key=lambda job: job["metadata"]["creationTimestamp"])


def log(job: str) -> str:
    return kubectl("logs", "-n", NAMESPACE, f"job/{job}", ok=False)


def ended(job: str) -> None:
    """Wait for its end, which must be a good one, and show its log."""

    def over() -> dict[str, Any] | None:
        status = json.loads(kubectl("get", "job", job, "-n", NAMESPACE, "-o", "json"))["status"]
        assert not status.get("failed"), log(job)
        return status if status.get("succeeded") else None

    status = until(over, SECONDS, every_s=1)
    print(f"--- {job}, {status['startTime']} to {status['completionTime']}\n{log(job)}")


def next_tick(after: set[str]) -> str:
    def new() -> list[str]:
        return [job["metadata"]["name"] for job in jobs() if job["metadata"]["name"] not in after]

    return str(until(new, 130)[0])


def test_the_first_tick_trains_the_second_skips_the_third_has_new_data(place: Place) -> None:
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all([config(place), cron_job(place)]))

    first = next_tick(set())
    until(lambda: "created job" in log(first), SECONDS)
    # somebody does not want to wait for the schedule: the same training is followed, not started twice
    kubectl("create", "job", "by-hand", "--from=cronjob/pirl-retrain", "-n", NAMESPACE)
    until(lambda: "adopted job" in log("by-hand"), SECONDS)
    assert len(place.jobs()) == 1
    ended(first)
    assert "tiny has no champion yet" in log(first)
    ended("by-hand")
    assert "created job" not in log("by-hand")
    registry = open_registry(f"{place.uri}/registry")
    assert [version.version for version in registry.versions("tiny")] == ["v0001"]
    during = {job["metadata"]["name"] for job in jobs()}
    assert len(during) <= 3  # the first, the one by hand, and one tick of all those that came meanwhile

    trained = place.jobs()
    second = next_tick(during)
    ended(second)
    assert "v0001 was made of the same data, recipe and code" in log(second)
    assert "up to date" in log(second).splitlines()[-1]
    assert place.jobs() == trained

    seen = {job["metadata"]["name"] for job in jobs()}
    new = place.folder / "photos" / "train" / "class0" / "new.jpg"
    (place.folder / "new").write_bytes(jpeg(1000, 24, 20))
    (place.folder / "new").rename(new)
    third = next_tick(seen)
    ended(third)
    assert "champion v0001: data changed" in log(third)
    assert "42 rows of the bank kept, 1 new" in log(third)
    assert "created job" in log(third)
    assert registry.pointer("tiny", CHAMPION) == "v0002"
