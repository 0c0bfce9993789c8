"""TrainJob: the fields of its objects, their ownership, recreated pods, expiry, and the choice between kinds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from kubernetes_server import KubernetesServer
from test_launcher import TRAINJOB, Scene, Steps, kubernetes, scene  # noqa: F401 fixtures

from pirl.backends import open_backend
from pirl.doctor import cluster_checks
from pirl.errors import PirlError, TrainingError, UsageError
from pirl.jobs import job_settings
from pirl.jobs.cluster import Cluster
from pirl.jobs.kind import Object
from pirl.jobs.pod import build_job
from pirl.jobs.trainjob import TrainJob

of_trainjobs = pytest.mark.parametrize("scene", [TRAINJOB], ids=["trainjob"], indirect=True)
PROGRAM = Steps("s3://bucket-name/run")
STABLE = {  # fields that Trainer 2.0 to 2.3 share
    "runtime": {"mlPolicy", "template"},
    "job": {"runtimeRef", "trainer"},
    "trainer": {"numNodes", "numProcPerNode"},
}


def objects(**job: Any) -> list[Object]:
    return build_job(TrainJob(), PROGRAM, job_settings((), {"nodes": 4, "image": "i:1", **job}))


class TestObjects:
    def test_only_fields_that_all_versions_share(self) -> None:
        runtime, job = objects(gpus=8)
        assert set(runtime["spec"]) == STABLE["runtime"]
        assert set(job["spec"]) == STABLE["job"]
        assert set(job["spec"]["trainer"]) == STABLE["trainer"]
        assert job["spec"]["trainer"] == {"numNodes": 4, "numProcPerNode": 8}
        assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"] == job["metadata"]["name"]
        (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
        assert node["name"] == node["template"]["spec"]["template"]["spec"]["containers"][0]["name"] == "node"

    def test_ranks_are_stated_without_gpus_too(self) -> None:
        """Trainer would else start one for each core that is requested."""
        assert objects(cpu="48")[1]["spec"]["trainer"]["numProcPerNode"] == 1

    def test_no_ttl_and_no_deadline_in_the_objects(self) -> None:
        text = json.dumps(objects(run_s=3600, ttl_s=77))
        assert not {word for word in ("ttlSeconds", "activeDeadline") if word in text}
        assert objects(ttl_s=77)[1]["metadata"]["annotations"]["pirl.dev/ttl-s"] == "77"

    @pytest.mark.parametrize(
        ("restart", "policy", "backoff", "restarts"), [("", "Never", 0, 3), ("containers", "OnFailure", 12, 0)]
    )
    def test_restarts_of_all_pods_or_of_containers(
        self, restart: str, policy: str, backoff: int, restarts: int
    ) -> None:
        spec = objects(restart=restart, max_restarts=3)[0]["spec"]["template"]["spec"]
        (node,) = spec["replicatedJobs"]
        assert node["template"]["spec"]["template"]["spec"]["restartPolicy"] == policy
        assert (node["template"]["spec"]["backoffLimit"], spec["failurePolicy"]["maxRestarts"]) == (backoff, restarts)
        # the API server takes a pod failure policy with restartPolicy Never only
        assert ("podFailurePolicy" in node["template"]["spec"]) == (policy == "Never")

    def test_a_kind_refuses_restarts_that_it_cannot_do(self) -> None:
        with pytest.raises(UsageError, match=r"restart=pods does not suit a PyTorchJob"):
            open_backend("pytorchjob", ["restart=pods"])


@of_trainjobs
class TestOwnership:
    def test_the_runtime_goes_with_the_job(self, scene: Scene) -> None:  # noqa: F811
        with scene.launched() as launcher:
            scene.start_pods()
            scene.saying("launcher: running")
            (runtime,), (job,) = scene.server.all("trainingruntimes"), scene.server.all("trainjobs")
            (reference,) = runtime["metadata"]["ownerReferences"]
            assert (reference["uid"], reference["kind"]) == (job["metadata"]["uid"], "TrainJob")
            scene.server.delete("trainjobs", launcher.name)
        assert scene.server.objects == {}

    @pytest.mark.parametrize("left", ["same", "other", "owned"])
    def test_a_runtime_that_an_earlier_launcher_has_left(self, scene: Scene, left: str) -> None:  # noqa: F811
        """The same is used; another one, or one that the garbage collector will delete, is replaced."""
        runtime, _ = build_job(TrainJob(), scene.program, job_settings((), {"nodes": 2, "image": "i:1"}))
        if left == "other":
            runtime["metadata"]["annotations"]["pirl.dev/spec-hash"] = "of other settings"
        if left == "owned":
            runtime["metadata"]["ownerReferences"] = [{"uid": "of a job that has gone"}]
        uid = scene.server.create("trainingruntimes", runtime)["metadata"]["uid"]
        with scene.launched():
            scene.start_pods()
            (found,) = scene.server.all("trainingruntimes")
            assert (found["metadata"]["uid"] == uid) == (left == "same")
            scene.succeed()
        assert scene.error is None

    def test_a_webhook_that_does_not_see_the_new_runtime_yet(self, scene: Scene) -> None:  # noqa: F811
        denied = 'admission webhook "validator.trainjob" denied the request: TrainingRuntime "x" not found'
        scene.server.denials = [denied, denied]
        with scene.launched():
            scene.start_pods()
            scene.succeed()
        assert scene.error is None
        assert scene.server.denials == []

    def test_a_webhook_that_refuses_the_job(self, scene: Scene) -> None:  # noqa: F811
        scene.server.denials = ['admission webhook "validator.trainjob" denied the request: numNodes is wrong']
        with scene.launched():
            pass
        assert "numNodes is wrong" in str(scene.error)
        assert "correct the job's settings" in str(scene.error)
        assert "rights" not in str(scene.error)

    def test_pods_of_an_earlier_jobset_do_not_count(self, scene: Scene) -> None:  # noqa: F811
        with scene.launched() as launcher:
            scene.start_pods()
            scene.saying("launcher: running")
            (job,) = scene.server.all("trainjobs")
            assert len(launcher.cluster.pods(job)) == 2
            scene.server.objects["jobsets", launcher.name]["metadata"]["uid"] = "of a newer one"
            assert launcher.cluster.pods(job) == []
            scene.server.objects["jobsets", launcher.name]["metadata"]["ownerReferences"] = [{"uid": "another job"}]
            assert launcher.cluster.pods(job) == []
            scene.succeed()


@of_trainjobs
class TestRecreatedPods:
    def test_the_log_of_pods_that_were_replaced_is_kept(self, scene: Scene) -> None:  # noqa: F811
        """Their last lines too, which were written after the launcher had last read."""
        with scene.launched() as launcher:
            scene.start_pods()
            scene.saying("line of rank 0")
            scene.server.logs[f"{launcher.name}-0"] += "2026-01-01T00:00:01.000000000Z last line\n"
            for index in range(2):
                scene.server.objects["pods", f"{launcher.name}-{index}"]["metadata"]["deletionTimestamp"] = "now"
            scene.start_pods(suffix="b")
            scene.saying("line of rank 0b")
            scene.succeed()
        assert scene.error is None
        assert scene.text().index("last line") < scene.text().index("line of rank 0b")
        assert scene.text().count("last line") == 1

    def test_a_refusal_of_the_job_controller_is_found(self, scene: Scene) -> None:  # noqa: F811
        with scene.launched() as launcher:
            job = f"{launcher.name}-node-0"
            message = 'Error creating: pods "x" is forbidden: exceeded quota: small'
            event = {"reason": "FailedCreate", "message": message, "involvedObject": {"name": job}}
            scene.server.events.append(event)
            scene.fail()
        assert isinstance(scene.error, TrainingError)
        assert "exceeded quota: small" in str(scene.error)


@of_trainjobs
@pytest.mark.parametrize(("ended", "expires"), [("2026-01-01T00:00:00Z", True), ("2999-01-01T00:00:00Z", False)])
def test_an_ended_job_is_deleted_after_its_ttl(scene: Scene, ended: str, expires: bool) -> None:  # noqa: F811
    """By the next launcher in the namespace: templates may have no TTL."""
    old = objects()[1]
    old["status"] = {"conditions": [{"type": "Complete", "status": "True", "lastTransitionTime": ended}]}
    scene.server.create("trainjobs", old)
    assert Cluster("pirl", TrainJob()).expire() == ([old["metadata"]["name"]] if expires else [])
    assert bool(scene.server.all("trainjobs")) != expires


SERVED = {
    "both": ("trainingruntimes", "trainjobs", "pytorchjobs"),
    "trainjob": ("trainingruntimes", "trainjobs"),
    "pytorchjob": ("pytorchjobs",),
    "neither": (),
}


@pytest.mark.parametrize(
    ("served", "title"),
    [("both", "TrainJob"), ("trainjob", "TrainJob"), ("pytorchjob", "PyTorchJob"), ("neither", "")],
)
def test_the_backend_cluster_takes_what_is_served(
    served: str,
    title: str,
    kubernetes: KubernetesServer,  # noqa: F811
) -> None:
    kubernetes.served = SERVED[served]
    backend = open_backend("cluster", ["image=i:1"])
    if title:
        assert f"by a {title} of 1 pod" in backend.where
        assert f"kind: {title}" in backend.plan(PROGRAM)
    else:
        with pytest.raises(PirlError, match=r"neither TrainJob nor PyTorchJob") as error:
            backend.plan(PROGRAM)
        assert "install Kubeflow Trainer" in str(error.value)


@pytest.mark.parametrize("served", SERVED)
@pytest.mark.parametrize("queue", ["", "team"])
def test_doctor_reports_what_is_installed(
    served: str,
    queue: str,
    kubernetes: KubernetesServer,  # noqa: F811
) -> None:
    kubernetes.served = SERVED[served]
    for deployment in ("kubeflow-trainer-controller-manager", "jobset-controller-manager", "training-operator"):
        containers = [{"image": f"x/{deployment}:v2.0.0"}]
        spec = {"template": {"spec": {"containers": containers}}}
        kubernetes.create("deployments", {"metadata": {"name": deployment}, "spec": spec})
    backend: Any = open_backend("cluster", ["image=i:1", *([f"queue={queue}"] if queue else [])])
    checks = {check.name: check for check in cluster_checks(backend.kinds, backend.settings, "")}
    states = {name: check.state for name, check in checks.items()}
    expected = {"both": "ok ok", "trainjob": "ok note", "pytorchjob": "note ok", "neither": "bad note"}
    assert f"{states['TrainJob']} {states['PyTorchJob']}" == expected[served]
    assert {"Trainer", "JobSet"} <= states.keys() or {"training operator"} <= states.keys()
    assert states["Kueue"] == ("bad" if queue else "ok")
    assert "not installed" in checks["Kueue"].finding


def test_the_plan_has_the_runtime_before_the_job() -> None:
    text = open_backend("trainjob", ["image=i:1"]).plan(PROGRAM)
    assert text.index("kind: TrainingRuntime") < text.index("kind: TrainJob")
