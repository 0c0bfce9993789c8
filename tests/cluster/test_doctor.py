"""`pirl doctor --cluster` on a real cluster: what it finds where all is well, and what it says of what is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from training import Place, kubectl, make_place, remove_place, until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="needs a Kubernetes cluster: set KUBECONFIG"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place, objects = make_place("pirl-doctor", tmp_path_factory.mktemp("doctor"))
    yield place
    remove_place(place, objects)


def doctor(place: Place, root: str = "", as_launcher: bool = True, **job: Any) -> tuple[int, dict[str, dict[str, str]]]:
    """Its exit code, and what it says of each thing."""
    command = [str(Path(sys.executable).with_name("pirl")), "doctor", "--cluster", "--json"]
    command += [*(["--root", root] if root else []), *place.options(**job)]
    env = {**os.environ, **(place.env if as_launcher else {})}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)}


@pytest.mark.parametrize("as_launcher", [True, False], ids=["launcher", "administrator"])
def test_all_is_well(place: Place, as_launcher: bool) -> None:
    code, found = doctor(place, f"{place.uri}/runs", as_launcher)
    assert code == 0
    assert {name for name, check in found.items() if check["state"] == "bad"} == set()
    assert found["PyTorchJob"]["state"] == found["rights"]["state"] == found["pod"]["state"] == "ok"
    assert f"{place.uri}/runs can be written, listed and read" in found["pod"]["finding"]
    assert (found["GPUs"]["state"] == "note") == as_launcher, "only an administrator may look at nodes"
    until(lambda: not place.jobs(), 30)


def test_rights_that_are_missing(place: Place) -> None:
    role = ["role", "pirl-launcher", "-n", place.namespace]
    before = kubectl("get", *role, "-o", "yaml")
    logs = next(i for i, rule in enumerate(yaml.safe_load(before)["rules"]) if "pods/log" in rule["resources"])
    kubectl("patch", *role, "--type=json", f'--patch=[{{"op": "remove", "path": "/rules/{logs}"}}]')
    try:
        for as_launcher in (True, False):
            found = until(lambda who=as_launcher: _bad(doctor(place, as_launcher=who)[1], "rights"), 30)
            assert "may not get pods/log" in found["finding"]
            assert found["fix"] == "kubectl apply -f manifests/"
    finally:
        kubectl("replace", "--force", "-f", "-", stdin=before)


def test_gpus_and_a_queue_that_are_not_there(place: Place) -> None:
    code, found = doctor(place, as_launcher=False, gpus=7, cpu="7", queue="nowhere")
    assert code == 1
    assert found["GPUs"]["state"] == "bad"
    assert "asked for: 4 x 7" in found["GPUs"]["finding"]
    assert found["Kueue"]["state"] == "bad"
    assert "nowhere" in found["Kueue"]["finding"]


def test_an_image_that_is_not_there(place: Place) -> None:
    code, found = doctor(place, f"{place.uri}/runs", image="localhost/no-such-image:1")
    assert code == 1
    assert "cannot pull the image localhost/no-such-image:1" in found["pod"]["finding"]
    assert "imagePullSecrets" in found["pod"]["fix"]


def test_a_storage_that_pods_cannot_use(place: Place) -> None:
    code, found = doctor(place, "s3://pirl-no-such-bucket/runs")
    assert code == 1
    assert "pirl-no-such-bucket" in found["pod"]["finding"]


def test_a_namespace_that_is_not_there(place: Place) -> None:
    code, found = doctor(place, f"{place.uri}/runs", as_launcher=False, namespace="pirl-nowhere")
    assert code == 1
    assert "pirl-nowhere" in found["pod"]["finding"]
    assert "kubectl apply -f manifests/" in found["pod"]["fix"]


def _bad(found: dict[str, dict[str, str]], name: str) -> dict[str, str] | None:
    return found[name] if found[name]["state"] == "bad" else None
