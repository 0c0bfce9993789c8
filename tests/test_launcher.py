"""The launcher as a state machine, against a small API server; `tests/cluster` has the same on a real one."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from faulty_s3 import FaultyS3
from kubernetes_server import SUSPENDED, WAYS, KubernetesServer, kubernetes  # noqa: F401 fixture
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401 fixtures

import pirl
from pirl.backends import open_backend
from pirl.errors import PirlError, StorageError, TrainingError, UsageError
from pirl.jobs import JobSettings, job_settings
from pirl.jobs.cluster import Cluster, ForbiddenError, UnavailableError
from pirl.jobs.kind import JobKind, Object, Operator, Phase, Resource, Verdict, true_conditions
from pirl.jobs.launcher import Launcher
from pirl.jobs.pod import job_name
from pirl.jobs.pytorchjob import PyTorchJob
from pirl.jobs.trainjob import JOBSET, TrainJob
from pirl.jobs.watch import queue_reason
from pirl.storage import open_storage

POLL_S = 0.02
OPERATORS = "pytorchjob|trainjob|training.kubeflow|trainer.kubeflow|jobset(?!ting)"
TIMEOUT_S = 60.0


@dataclass
class Steps:
    """A program of a few lines: it is complete when its marker exists."""

    out: str
    module: str = "steps"
    name: str = "steps"
    record: str = "record.jsonl"
    processes: int | None = None
    locations: Mapping[str, str] = field(default_factory=dict)

    def file(self) -> tuple[str, str]:
        return "steps.json", "{}"

    def arguments(self, path: str) -> list[str]:
        return [path, "--home", "$(HOME)"]

    def plan(self) -> list[str]:
        return ["some steps"]

    def prepare(self) -> None:
        open_storage(self.out).write_bytes("prepared", b"")

    def is_complete(self) -> bool:
        return open_storage(self.out).exists("marker")

    def update(self) -> None:
        open_storage(self.out).write_bytes("updated", b"")

    def describe(self, line: Mapping[str, Any]) -> str:
        return f"step {line['step']}"

    def reach(self, step: int) -> None:
        open_storage(self.out).write_bytes(self.record, f'{{"step": {step}}}\n'.encode())

    def complete(self) -> None:
        open_storage(self.out).write_bytes("marker", b"")


class ToyJob(JobKind):
    """A kind that shares nothing with PyTorchJob: two objects, other labels, other conditions."""

    name = "toyjob"
    resources = (Resource("toy.dev", "v7", "toyruntimes", "ToyRuntime"), Resource("toy.dev", "v7", "toyjobs", "ToyJob"))
    container = "node"
    operators = (Operator("Toys", "toy-controller", "7"),)
    install = "kubectl apply -f toy"
    refusals = frozenset({"ToyRefused"})

    def specs(self, name: str, settings: JobSettings, template: Object) -> list[Object]:
        return [{"template": template}, {"size": settings.nodes}]

    def pods(self, cluster: Cluster, job: Object) -> list[Object]:
        return cluster.pods_by_label(f"toy.dev/job={job['metadata']['name']}")

    def index(self, pod: Object) -> int:
        return int(pod["metadata"]["labels"]["toy.dev/index"])

    def verdict(self, job: Object) -> Verdict:
        holds = true_conditions(job)
        phases = {"Complete": Phase.SUCCEEDED, "Broken": Phase.FAILED}
        return next((Verdict(phases[name], holds[name]) for name in phases if name in holds), Verdict(Phase.ACTIVE))


@dataclass(frozen=True)
class Words:
    """What differs between the kinds in these tests."""

    kind: JobKind
    succeeded: str
    failed: str
    job_label: str
    index_label: str

    @property
    def plural(self) -> str:
        return self.kind.resource.plural

    @property
    def served(self) -> tuple[str, ...]:
        return tuple(resource.plural for resource in (*self.kind.resources, *OWN.get(self.kind.name, ())))

    def controller(self, server: KubernetesServer, job: Object) -> tuple[str, Object]:
        """Return the uid of the object that owns the job's pods, and labels that the pods have from it."""
        if self.kind.name != "trainjob":
            return job["metadata"]["uid"], {}
        reference = {"uid": job["metadata"]["uid"]}
        metadata = {"name": job["metadata"]["name"], "ownerReferences": [reference]}
        existing = server.objects.get(("jobsets", metadata["name"]))
        uid = (existing or server.create("jobsets", {"metadata": metadata}))["metadata"]["uid"]
        return uid, {"jobset.sigs.k8s.io/jobset-uid": uid}


PYTORCHJOB = Words(
    PyTorchJob(),
    "Succeeded",
    "Failed",
    "training.kubeflow.org/job-name",
    "training.kubeflow.org/replica-index",
)
TRAINJOB = Words(
    TrainJob(),
    "Complete",
    "Failed",
    "jobset.sigs.k8s.io/jobset-name",
    "batch.kubernetes.io/job-completion-index",
)
OWN = {"trainjob": (JOBSET,)}  # types that a kind's operator makes itself, and the launcher reads
TOYJOB = Words(ToyJob(), "Complete", "Broken", "toy.dev/job", "toy.dev/index")


class Clock:
    """The time of the launcher's clocks, which passes only when a test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


@dataclass
class Scene:
    """A launcher in a thread, and its cluster, in which the test plays the operator."""

    server: KubernetesServer
    words: Words
    program: Any
    capture: pytest.CaptureFixture[str]
    clock: Clock
    said: str = ""
    error: BaseException | None = None

    @contextmanager
    def launched(self, **job: Any) -> Iterator[Launcher]:
        """Run a launcher until it ends by itself."""
        settings = job_settings((), {"nodes": 2, "image": "i:1", **job})
        cluster = Cluster(settings.namespace, self.words.kind)
        launcher = Launcher(self.program, settings, cluster)

        def run() -> None:
            try:
                launcher.run()
            except BaseException as error:
                self.error = error

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield launcher
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), self.text()

    def text(self) -> str:
        shown = self.capture.readouterr()
        self.said += shown.out + shown.err
        return self.said

    def until(self, what: Callable[[], Any]) -> None:
        end = time.monotonic() + TIMEOUT_S
        while not what():
            assert time.monotonic() < end, self.text()
            assert self.error is None, self.error
            time.sleep(POLL_S)

    def saying(self, text: str) -> None:
        self.until(lambda: text in self.text())

    def elapse(self, until: Callable[[], Any]) -> None:
        """Let hours pass for the launcher, a minute at a time."""
        end = time.monotonic() + TIMEOUT_S
        while not until():
            assert time.monotonic() < end, self.text()
            self.clock.seconds += 60
            time.sleep(POLL_S)

    def fail(self) -> None:
        """Let time pass until the launcher fails."""
        self.elapse(lambda: self.error)

    def start_pods(self, state: Object | None = None, suffix: str = "", **container: Any) -> None:
        """Have the operator make two pods, which run or are in another state."""
        self.until(lambda: self.server.all(self.words.plural))
        (job,) = self.server.all(self.words.plural)
        uid, labels = self.words.controller(self.server, job)
        for index in range(2):
            name = f"{job['metadata']['name']}-{index}{suffix}"
            status = {"name": self.words.kind.container, "state": state or {"running": {}}, **container}
            self.server.create(
                "pods",
                {
                    "metadata": {
                        "name": name,
                        "labels": {
                            **labels,
                            self.words.job_label: job["metadata"]["name"],
                            self.words.index_label: str(index),
                        },
                        "annotations": {"kubectl.kubernetes.io/default-container": self.words.kind.container},
                        "ownerReferences": [{"uid": uid}],
                    },
                    "spec": {
                        "nodeName": f"node-{index}",
                        "containers": [{"name": "sidecar"}, {"image": "i:1"} | status],
                    },
                    "status": {"containerStatuses": [status]},
                },
            )
            self.server.logs[name] = f"2026-01-01T00:00:00.000000000Z line of rank {index}{suffix}\n"

    def succeed(self) -> None:
        self.program.complete()
        self.server.condition(self.words.plural, self.words.succeeded)


@pytest.fixture(params=[PYTORCHJOB, TRAINJOB, TOYJOB], ids=lambda words: words.kind.name)
def scene(
    request: pytest.FixtureRequest,
    kubernetes: KubernetesServer,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Scene:
    """Nothing is launched yet; once for each kind."""
    monkeypatch.setattr(Launcher, "poll_s", POLL_S)
    clock = Clock()
    monkeypatch.setattr("pirl.jobs.state.time", clock)
    kubernetes.served = request.param.served
    return Scene(kubernetes, request.param, Steps(f"{tmp_path}/run"), capsys, clock)


def test_from_creation_to_completion(scene: Scene) -> None:
    with scene.launched() as launcher:
        scene.start_pods()
        scene.saying("launcher: running")
        scene.succeed()
    assert scene.error is None
    assert f"created job pirl/{launcher.name}" in scene.text()
    assert scene.text().count("line of rank 0") == 1
    assert "line of rank 1" not in scene.text()
    assert f"job {launcher.name} has succeeded" in scene.text()
    created = [scene.server.all(resource.plural) for resource in scene.words.kind.resources]
    assert [len(objects) for objects in created] == [1] * len(scene.words.kind.resources)
    for (body,), resource in zip(created, scene.words.kind.resources, strict=True):
        assert (body["kind"], body["apiVersion"]) == (resource.kind, f"{resource.group}/{resource.version}")


@pytest.mark.parametrize("form", ["human", "json"])
def test_lines_of_a_pod_are_printed_in_the_form_of_the_console(
    scene: Scene, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod logs JSON: a person reads the words alone, a collector of logs gets every field."""
    monkeypatch.setenv("PIRL_LOG", form)
    lines = ['{"level": "info", "message": "step 1/2", "loss": 3.5}', '{"level": "warning", "message": "is slow"}']
    with scene.launched() as launcher:
        scene.server.logs[f"{launcher.name}-0"] = ""
        scene.start_pods()
        for second, line in enumerate([*lines, '{"level": "info", "event": "saved"}', "a plain line", "{}"]):
            scene.server.logs[f"{launcher.name}-0"] += f"2026-01-01T00:00:0{second + 1}.000000000Z {line}\n"
        scene.until(lambda: "a plain line" in scene.text())
        scene.succeed()
    printed = scene.text().splitlines()
    if form == "json":
        assert [line for line in printed if line in lines] == lines
    else:
        assert [line for line in printed if not line.startswith("launcher: ")][-4:] == [
            "step 1/2",
            "warning: is slow",
            "a plain line",
            "{}",
        ]
        assert "saved" not in scene.text()


@pytest.mark.parametrize("way", WAYS)
def test_an_api_server_that_is_unavailable_while_a_job_is_followed(scene: Scene, way: str) -> None:
    """No clock counts the outage."""
    with scene.launched(start_s=50, progress_s=50):
        scene.start_pods()
        scene.saying("launcher: running")
        scene.server.unavailable = way
        scene.until(lambda: scene.server.failed)
        before = scene.server.failed
        scene.elapse(lambda: scene.server.failed > before + 20)
        scene.server.unavailable = ""
        scene.saying("answered again")
        scene.succeed()
    assert scene.error is None
    assert "has succeeded" in scene.text()
    assert len(scene.server.all(scene.words.plural)) == 1
    assert not any(request.startswith("DELETE") for request in scene.server.requests)


@pytest.mark.parametrize("readable", [True, False])
def test_the_last_lines_of_a_log_are_read_or_reported(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, readable: bool
) -> None:
    """The node did not answer shortly before the end, so that its log is left alone for some seconds."""
    log, cut_off = Cluster.log, threading.Event()

    def failing(*arguments: Any, **more: Any) -> str:
        if cut_off.is_set():
            raise UnavailableError("dial tcp: i/o timeout")
        return log(*arguments, **more)

    monkeypatch.setattr(Cluster, "log", failing)
    with scene.launched() as launcher:
        scene.start_pods()
        scene.saying("line of rank 0")
        cut_off.set()
        scene.until(lambda: launcher.log.interrupted)
        scene.server.logs[f"{launcher.name}-0"] += "2026-01-01T00:00:01.000000000Z last line\n"
        if readable:
            cut_off.clear()
        scene.succeed()
    assert scene.error is None
    assert scene.text().count("last line\n") == readable
    assert (f"`kubectl logs {launcher.name}-0 -n pirl` prints them" in scene.text()) != readable


def test_storage_that_is_unavailable_while_a_job_is_followed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than steps may take, and at the end, when the marker is to be read; what is no outage is raised."""
    kind = type(open_storage(scene.program.out))
    size, fault = kind.size, StorageError("the bucket does not answer")
    fault.transient = True
    outage = threading.Event()

    def failing(storage: Any, name: str) -> int:
        if outage.is_set():
            raise fault
        return size(storage, name)

    monkeypatch.setattr(kind, "size", failing)
    with scene.launched() as launcher:
        scene.start_pods()
        scene.program.reach(3)
        scene.saying("launcher: running")
        outage.set()
        scene.until(lambda: not launcher.progress.available)
        before = scene.clock.seconds
        scene.elapse(lambda: scene.clock.seconds > before + 2 * launcher.settings.progress_s)
        scene.succeed()
        scene.saying("the bucket does not answer; the job keeps running")
        outage.clear()
    assert scene.error is None
    assert "answered again" in scene.text()


def test_a_job_without_a_new_step_fails_and_is_deleted(scene: Scene) -> None:
    with scene.launched() as launcher:
        scene.start_pods()
        scene.program.reach(7)
        scene.until(lambda: launcher.progress.last)
        scene.fail()
    assert isinstance(scene.error, TrainingError)
    assert f"job {launcher.name} runs without a new step for" in str(scene.error)
    assert "step 7" in str(scene.error)
    assert scene.server.all(scene.words.plural) == []
    assert scene.server.objects == {}, "pods, and what the job refers to, go with it"


def test_what_the_operator_reports_as_failed(scene: Scene) -> None:
    ended = {"terminated": {"exitCode": 1, "reason": "Error", "message": "no space left"}}
    with scene.launched() as launcher:
        scene.start_pods(state=ended, restartCount=1)
        scene.saying("ended with exit code 1")
        scene.server.condition(scene.words.plural, scene.words.failed, "too many restarts")
    assert isinstance(scene.error, TrainingError)
    for part in (f"job {launcher.name} has failed: too many restarts", "no space left"):
        assert part in str(scene.error)
    assert len(scene.server.all(scene.words.plural)) == 1, "it stays for inspection"


def test_settings_that_cannot_work_are_not_restarted(scene: Scene) -> None:
    with scene.launched():
        scene.start_pods(state={"terminated": {"exitCode": 2, "reason": "Error", "message": "unknown key"}})
    assert isinstance(scene.error, TrainingError)
    assert "unknown key" in str(scene.error)
    assert scene.server.all(scene.words.plural) == []


def test_a_complete_run_is_updated_without_a_job(scene: Scene) -> None:
    scene.program.complete()
    with scene.launched():
        pass
    assert scene.error is None
    assert open_storage(scene.program.out).exists("updated")
    assert not any(request.startswith("POST") for request in scene.server.requests)


@pytest.mark.parametrize(
    ("reason", "message", "shown"),
    [
        ("refusal", 'pods "x" is forbidden: violates PodSecurity "restricted"', "pod security standard forbids it"),
        ("image", "manifest unknown", "cannot pull the image i:1 (ErrImagePull)"),
    ],
)
def test_a_permanent_trouble_ends_the_wait(scene: Scene, reason: str, message: str, shown: str) -> None:
    with scene.launched() as launcher:
        if reason == "image":
            scene.start_pods(state={"waiting": {"reason": "ErrImagePull", "message": message}})
        else:
            refusal = next(iter(scene.words.kind.refusals))
            event = {"reason": refusal, "message": message, "involvedObject": {"name": launcher.name}}
            scene.server.events.append(event)
        scene.fail()
    assert isinstance(scene.error, TrainingError)
    assert shown in str(scene.error)
    assert scene.server.all(scene.words.plural) == []


def test_a_second_launcher_adopts_the_job_and_other_settings_are_refused(scene: Scene) -> None:
    with scene.launched(nodes=3, image="i:2") as other:
        scene.until(lambda: scene.server.all(scene.words.plural))
        with scene.launched(nodes=2, image="i:1"):
            pass
        assert isinstance(scene.error, UsageError)
        assert "3 -> 2" in str(scene.error)
        assert f"kubectl delete {scene.words.kind.command} {other.name} -n pirl" in str(scene.error)
        scene.error = None
        with scene.launched(nodes=3, image="i:2"):
            scene.saying("adopted job")
            scene.succeed()
    assert scene.error is None
    assert sum(request.startswith("POST") for request in scene.server.requests) == len(scene.words.kind.resources)


def test_a_job_that_somebody_deletes(scene: Scene) -> None:
    with scene.launched() as launcher:
        scene.start_pods()
        scene.saying("launcher: running")
        scene.server.delete(scene.words.plural, launcher.name)
    assert "was deleted by somebody else" in str(scene.error)


def test_an_ended_job_of_an_earlier_attempt_makes_room(scene: Scene) -> None:
    with scene.launched():
        scene.until(lambda: scene.server.all(scene.words.plural))
        scene.server.condition(scene.words.plural, scene.words.failed)
    scene.error = None
    with scene.launched():
        scene.saying("replacing an earlier job of this run")
        scene.start_pods()
        scene.succeed()
    assert scene.error is None


def test_success_without_the_marker_is_a_failure(scene: Scene) -> None:
    with scene.launched():
        scene.until(lambda: scene.server.all(scene.words.plural))
        scene.server.condition(scene.words.plural, scene.words.succeeded)
    assert isinstance(scene.error, TrainingError)
    assert "the completion marker in" in str(scene.error)


def test_a_cluster_that_does_not_serve_the_kind(scene: Scene) -> None:
    scene.server.served = ()
    with scene.launched():
        pass
    assert isinstance(scene.error, PirlError)
    assert scene.words.kind.install in str(scene.error)


def test_arguments_arrive_in_the_pod_as_they_were(scene: Scene) -> None:
    """Kubernetes replaces $(NAME) in arguments and environment, unless the dollar is doubled."""
    with scene.launched(env={"X": "a$(HOME)"}):
        scene.until(lambda: scene.server.all(scene.words.plural))
        scene.succeed()
    (first,) = scene.server.all(scene.words.kind.resources[0].plural)
    text = str(first["spec"])
    assert "'$$(HOME)'" in text
    assert "'a$$(HOME)'" in text


@pytest.mark.parametrize("scene", [PYTORCHJOB, TRAINJOB], ids=lambda words: words.kind.name, indirect=True)
def test_a_queue_that_nothing_manages_is_an_error(scene: Scene) -> None:
    """At once, and the job does not start past the quota."""
    with scene.launched(queue="team"):
        pass
    assert isinstance(scene.error, UsageError)
    assert "queue team is not managed" in str(scene.error)
    assert scene.server.all(scene.words.plural) == []


@pytest.mark.parametrize("scene", [PYTORCHJOB, TRAINJOB], ids=lambda words: words.kind.name, indirect=True)
def test_a_queue_that_kueue_manages(scene: Scene) -> None:
    """The job waits suspended, for longer than pods may wait, and runs when it is admitted."""
    scene.server.suspends = True
    for about, reason, message in (
        (
            job_name(scene.program.out, scene.program.module),
            "CreatedWorkload",
            "Created Workload: pirl/job-pirl-run-1f2e3",
        ),
        ("job-pirl-run-1f2e3", "Pending", "couldn't assign flavors to pod set node: insufficient unused quota for cpu"),
    ):
        scene.server.events.append({"involvedObject": {"name": about}, "reason": reason, "message": message})
    with scene.launched(queue="team") as launcher:
        scene.saying("launcher: suspended")
        scene.saying("in its queue: couldn't assign flavors to pod set node: insufficient unused quota for cpu")
        admitted = {"involvedObject": {"name": "job-pirl-run-1f2e3"}, "reason": "Admitted", "message": "Admitted"}
        scene.server.events.append({**admitted, "lastTimestamp": "2026-12-01T02:27:22Z"})
        assert "not started" in queue_reason(launcher.cluster, launcher.name)
        before = scene.clock.seconds
        scene.elapse(lambda: scene.clock.seconds > before + 2 * launcher.settings.start_s)
        (job,) = scene.server.all(scene.words.plural)
        SUSPENDED[scene.words.plural](job["spec"])["suspend"] = False
        scene.start_pods()
        scene.saying("launcher: running")
        scene.succeed()
    assert scene.error is None


@pytest.mark.parametrize("scene", [PYTORCHJOB, TRAINJOB], ids=lambda words: words.kind.name, indirect=True)
def test_an_account_without_the_rights_is_refused_before_the_sharding(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from components.shard import shard

    backend = scene.words.kind.name
    scene.server.forbidden = {("create", scene.words.plural), ("get", "pods")}
    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        shard.python_func(
            source="nothing", root=str(out), run="r", split="train", backend=backend, job="namespace=pirl"
        )
    shown = capsys.readouterr().err
    assert f"lacks rights of a launcher in namespace pirl: create {scene.words.plural}" in shown
    assert "overlays/kfp-default-account" in shown
    assert not (out / "data").exists()
    scene.server.forbidden = set()
    open_backend(backend).require_access()


def test_a_refusal_survives_a_pickle() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(ForbiddenError("may not create pods")))
    assert (type(error), error.what) == (ForbiddenError, "may not create pods")
    assert "manifests" in error.hint


@pytest.mark.parametrize("scene", [PYTORCHJOB], ids=["pytorchjob"], indirect=True)
def test_a_real_bucket_that_is_unavailable_while_a_job_is_followed(
    scene: Scene,
    s3_endpoint: str,  # noqa: F811
    bucket: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Connections are reset for longer than steps may take, and while the marker is to be read."""
    monkeypatch.setenv("PIRL_S3_ATTEMPTS", "1")
    monkeypatch.setenv("PIRL_STORAGE_PATIENCE_S", "0.1")
    with FaultyS3(s3_endpoint, share=0, slow_s=0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        scene.program = Steps(f"{bucket}/run")
        with scene.launched() as launcher:
            scene.start_pods()
            scene.program.reach(3)
            scene.until(lambda: launcher.progress.last.get("step") == 3)
            scene.program.complete()
            proxy.begin("reset")
            scene.until(lambda: proxy.faults["reset"] > 5)
            scene.server.condition(scene.words.plural, scene.words.succeeded)
            scene.saying("the job keeps running, trying again")
            proxy.end()
        assert scene.error is None
        assert "answered again" in scene.text()


def test_a_kind_is_named_by_its_own_module_alone() -> None:
    """The launcher, its diagnosis, its messages, the doctor and the rights hold for every kind."""
    library = Path(pirl.__file__).parent
    files = [*(library / "jobs").glob("*.py"), *(library / "doctor").glob("*.py"), library / "programs.py"]
    named = {path.name for path in files if re.search(OPERATORS, path.read_text(), re.IGNORECASE)}
    assert named == {"pytorchjob.py", "trainjob.py"}
