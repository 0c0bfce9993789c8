"""Each right of the launcher is needed: without it a launch fails on the real API server, and says which is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import yaml
from training import ROOT, Place, Training, kubectl, make_place, remove_place, until

from pirl.errors import EXIT_FAILURE, EXIT_PREEMPTED

ROLE = next(yaml.safe_load_all((ROOT / "manifests" / "20-rbac.yaml").read_text()))
RIGHTS = [
    (verb, resource)
    for rule in ROLE["rules"]
    if rule["apiGroups"][0] in ("", "kubeflow.org")  # a PyTorchJob's: the launches here are PyTorchJobs
    for resource in rule["resources"]
    for verb in rule["verbs"]
]  # those of each resource once: no resource stands in two rules

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="needs a Kubernetes cluster: set KUBECONFIG"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place, objects = make_place("pirl-rights", tmp_path_factory.mktemp("rights"))
    yield place
    remove_place(place, objects)


@pytest.fixture
def training(place: Place, request: pytest.FixtureRequest) -> Iterator[Training]:
    """A training of one pod, of as many steps as nobody waits for."""
    name = request.node.name.partition("[")[2].strip("]").replace("/", "-")
    found = Training(place, f"without-{name}", 2000, {"nodes": 1})
    yield found
    if found.process.poll() is None:
        found.process.kill()
    print(found.text())
    kubectl("delete", "pytorchjob", found.name, "-n", place.namespace, "--ignore-not-found", "--wait=true")


def allow(place: Place, without: tuple[str, str] | None = None) -> None:
    """Give the launcher its role, or all of it but one verb of one resource, and wait until that counts."""
    rules = [
        {"apiGroups": rule["apiGroups"], "resources": [resource], "verbs": [verb]}
        for rule in ROLE["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        if (verb, resource) != without
    ]
    metadata = {**ROLE["metadata"], "namespace": place.namespace}
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump({**ROLE, "metadata": metadata, "rules": rules}))
    account = f"system:serviceaccount:{place.namespace}:pirl-launcher"

    def counts() -> bool:
        return all(may(place, account, *right) == (right != without) for right in RIGHTS)

    until(counts, 30)


def may(place: Place, account: str, verb: str, what: str) -> bool:
    resource, _, subresource = what.partition("/")
    group = ".kubeflow.org" if resource == "pytorchjobs" else ""
    more = [f"--subresource={subresource}"] if subresource else []
    where = ["-n", place.namespace, f"--as={account}"]
    return kubectl("auth", "can-i", verb, resource + group, *more, *where, ok=False).startswith("yes")


@pytest.mark.parametrize(("verb", "resource"), RIGHTS)
def test_a_launch_without_it_fails_and_names_it(training: Training, verb: str, resource: str) -> None:
    allow(training.place, without=(verb, resource))
    training.start()
    if verb == "delete":
        until(lambda: "created job" in training.text(), 60)
        training.process.terminate()
        assert training.end(60) == EXIT_PREEMPTED
        assert "could not be deleted" in training.text()
    else:
        assert training.end(180) == EXIT_FAILURE, training.text()
        assert "`kubectl apply -f manifests/` gives these rights" in training.text()
    assert f'cannot {verb} resource "{resource}"' in training.text()
    assert "Traceback" not in training.text()


def test_all_of_them_are_enough(place: Place) -> None:
    allow(place)
    training = Training(place, "with-all", 2, {"nodes": 1})
    training.start()
    assert training.end() == 0, training.text()
    kubectl("delete", "pytorchjob", training.name, "-n", place.namespace)
