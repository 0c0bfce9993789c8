"""Faults on a real cluster, done to real pods: the training ends exactly as an undisturbed one, or says what is wrong.

Every training is of 4 pods, and its launcher has the rights of the service account that `manifests/` installs.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from training import Place, Training, kinds, kubectl, make_place, needs_program, program, remove_place, until

from pirl.errors import EXIT_FAILURE, EXIT_PREEMPTED, EXIT_USAGE

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="needs a Kubernetes cluster: set KUBECONFIG"),
]
EPOCHS = 60
MIDDLE = 103  # a step in mid-epoch, with checkpoints before it


@pytest.fixture(scope="module", params=kinds())
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Once for each kind of job that the cluster serves."""
    kind = request.param
    place, objects = make_place(f"pirl-faults-{kind.name}", tmp_path_factory.mktemp("faults"), kind)
    yield place
    remove_place(place, objects)


@pytest.fixture
def training(place: Place, request: pytest.FixtureRequest) -> Iterator[Training]:
    """One that is not started yet; its job is deleted afterwards."""
    name = request.node.name.removeprefix("test_").replace("_", "-").replace("[", "-").strip("]")
    found = Training(place, name, EPOCHS, {})
    yield found
    if found.starts and found.process.poll() is None:
        found.process.kill()
    print(found.text())
    place.delete_job(found.name)


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> list[tuple[int, float]]:
    """The loss of every step of a training to which nothing happens."""
    training = Training(place, "undisturbed", EPOCHS, {})
    training.start()
    training.reach(1)
    nodes = {pod["spec"]["nodeName"] for pod in place.pods(training.name)}  # the operator deletes those that are left
    assert training.end() == 0, training.text()
    training.complete()
    assert len(nodes) == min(4, len(kubectl("get", "nodes", "-o", "name").split())), "each pod has its own node"
    return training.losses()


def ended_well(training: Training, undisturbed: list[tuple[int, float]]) -> None:
    assert training.end() == 0, training.text()
    training.complete()
    assert training.losses() == undisturbed, "the same loss at every step: nothing was lost, nothing done twice"


@contextmanager
def stopped(part: str) -> Iterator[None]:
    program("stop", part)
    try:
        yield
    finally:
        program("start", part, ok=False)  # it may complain of other parts, which were changed since they were started


def test_a_killed_rank(training: Training, undisturbed: list[tuple[int, float]]) -> None:
    training.start()
    training.reach(MIDDLE)
    training.signal_rank(2, signal.SIGKILL)
    ended_well(training, undisturbed)
    assert re.search(rf"{training.name}-(worker|node-0)-2\S* ended with exit code 1", training.text())


@pytest.mark.parametrize("pod", [0, 3])
def test_a_deleted_pod(training: Training, undisturbed: list[tuple[int, float]], pod: int) -> None:
    training.start()
    training.reach(MIDDLE)
    name = training.place.pod(training.name, pod)
    kubectl("delete", "pod", name, "-n", training.place.namespace, "--wait=false")
    ended_well(training, undisturbed)


@needs_program()
def test_a_node_cut_off_and_healed(training: Training, undisturbed: list[tuple[int, float]]) -> None:
    training.start()
    training.reach(MIDDLE)
    node = training.place.pods(training.name)[1]["spec"]["nodeName"]
    program("cut", node)
    try:
        time.sleep(60)
        assert training.process.poll() is None, training.text()
    finally:
        program("heal", node)
    ended_well(training, undisturbed)


@needs_program()
def test_a_kubelet_that_stops(training: Training, undisturbed: list[tuple[int, float]]) -> None:
    training.start()
    training.reach(MIDDLE)
    node = training.place.pods(training.name)[2]["spec"]["nodeName"]
    with stopped(f"{node}.kubelet"):
        ended_well(training, undisturbed)
    until(lambda: "NotReady" not in kubectl("get", "node", node), 60)


@needs_program()
def test_the_api_server_away_for_30_s(training: Training, undisturbed: list[tuple[int, float]]) -> None:
    training.start()
    training.reach(MIDDLE)
    with stopped("kube-apiserver"):
        time.sleep(30)
    ended_well(training, undisturbed)
    assert "the API server" in training.text()
    assert "answered again" in training.text()


@needs_program()
def test_storage_away_for_30_s(training: Training, undisturbed: list[tuple[int, float]]) -> None:
    training.start()
    training.reach(MIDDLE)
    with stopped("versitygw"):
        time.sleep(30)
    ended_well(training, undisturbed)


def test_a_killed_launcher_adopts_its_job(training: Training, undisturbed: list[tuple[int, float]]) -> None:
    training.start()
    training.reach(MIDDLE)
    training.process.kill()
    training.process.wait()
    uid = [pod["metadata"]["uid"] for pod in training.place.pods(training.name)]
    training.start()
    training.reach(MIDDLE + 10)
    assert [pod["metadata"]["uid"] for pod in training.place.pods(training.name)] == uid
    assert [job for job in training.place.jobs() if "adopts" in job] == [
        f"{training.place.kind.command}.{training.place.kind.resource.group}/{training.name}"
    ]
    ended_well(training, undisturbed)
    assert "adopted job" in training.text()
    assert "created job" not in training.text()


def test_a_launcher_that_is_told_to_stop(training: Training, undisturbed: list[tuple[int, float]]) -> None:
    training.start()
    training.reach(MIDDLE)
    training.process.terminate()
    assert training.end(30) == EXIT_PREEMPTED, training.text()
    until(lambda: not training.place.pods(training.name), 60)
    training.start()
    ended_well(training, undisturbed)
    assert training.step() > MIDDLE


def test_a_job_deleted_by_hand(training: Training, undisturbed: list[tuple[int, float]]) -> None:
    training.start()
    training.reach(MIDDLE)
    training.place.delete_job(training.name)
    assert training.end(60) == EXIT_FAILURE
    assert f"job {training.name} was deleted by somebody else" in training.text()
    training.start()
    ended_well(training, undisturbed)
    assert "resuming from" in training.text()


def test_an_image_that_does_not_exist(training: Training) -> None:
    training.start(image="localhost/no-such-image:1", pull_s=10)
    assert training.end(90) == EXIT_FAILURE
    assert "cannot pull the image localhost/no-such-image:1" in training.text()
    assert "is the image pushed" in training.text()
    assert re.search(rf"{training.name}-(worker|node-0)-", training.text())
    until(lambda: not training.place.jobs() or training.name not in str(training.place.jobs()), 60)


def test_a_quota_that_forbids_the_pods(training: Training) -> None:
    namespace = training.place.namespace
    kubectl("create", "quota", "small", "-n", namespace, "--hard=pods=2")
    try:
        training.start(start_s=15)
        assert training.end(90) == EXIT_FAILURE
    finally:
        kubectl("delete", "quota", "small", "-n", namespace)
    assert "exceeded quota: small" in training.text()
    assert "kubectl describe quota" in training.text()


@needs_program()
def test_gpus_that_no_node_has_left(training: Training) -> None:
    program("gpus", "8")
    try:
        until(lambda: kubectl("get", "nodes", "-o", r"jsonpath={..allocatable.nvidia\.com/gpu}") == "8 8 8 8", 60)
        other = Training(training.place, "other", EPOCHS, {})
        other.start(nodes=1, gpus=8)
        until(lambda: "running" in other.text(), 60)
        training.start(nodes=4, gpus=8, processes=1, start_s=15)
        assert training.end(90) == EXIT_FAILURE
        assert "Insufficient nvidia.com/gpu" in training.text()
        assert "ask for less" in training.text()
        other.process.terminate()
        other.end(60)
    finally:
        program("gpus", "0")
    training.place.delete_job(other.name)


def test_a_rank_that_hangs(training: Training, undisturbed: list[tuple[int, float]]) -> None:
    training.start(progress_s=45)  # more than four cold starts take on two cores
    training.reach(MIDDLE)
    training.signal_rank(1, signal.SIGSTOP)
    assert training.end(120) == EXIT_FAILURE
    assert "runs without a new step for" in training.text()
    until(lambda: not training.place.pods(training.name), 90)
    training.start()
    ended_well(training, undisturbed)


def test_a_job_of_other_settings_is_not_adopted(training: Training) -> None:
    training.start(image="localhost/no-such-image:1")
    until(lambda: "created job" in training.text(), 30)
    other = Training(training.place, training.run, EPOCHS, {}, starts=7)
    other.start(nodes=2)
    assert other.end(30) == EXIT_USAGE
    assert "4 -> 2" in other.text()
    assert f"kubectl delete {training.place.kind.command}" in other.text()
    training.process.terminate()
    assert training.end(30) == EXIT_PREEMPTED
