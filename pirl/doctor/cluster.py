"""Checks of a cluster before the first run, with the rights of the account that runs them.

The last one starts a job of one pod, as a training's is made. It finds API, operator, admission, image, Secret, network
and storage working together, or names the first that does not. The job is deleted afterwards.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import PirlError
from ..jobs import JobSettings
from ..jobs.cluster import AbsentError, Cluster, ClusterError, ForbiddenError, UnavailableError
from ..jobs.diagnose import Trouble, ends, troubles
from ..jobs.kind import JobKind, Object, Resource
from ..jobs.pod import build_job
from ..text import duration
from .check import Check

ACCOUNT = "pirl-launcher"
KFP_ACCOUNTS = {"kubeflow:pirl-launcher": "kfp", "kubeflow:pipeline-runner": "kfp-default-account"}
"""Accounts of KFP's steps, and the overlay that gives each the launcher's role."""
PERMANENT_S = 15.0
POLL_S = 1.0
KUEUE = "kueue.x-k8s.io"


def cluster_checks(kinds: Sequence[JobKind], settings: JobSettings, root: str) -> Iterator[Check]:
    """Yield each check as soon as it is made.

    Jobs are of the first of `kinds` that is served. `root` is the location of the runs; "" leaves the pod out.
    """
    try:
        survey = Survey(settings.namespace, kinds[0])
        yield Check("API server", "ok", f"Kubernetes {survey.version()}, namespace {settings.namespace}")
        served = [kind for kind in kinds if all(map(survey.serves, kind.resources))]
        survey.kind = served[0] if served else kinds[0]
        yield from _definitions(survey, kinds)
    except ClusterError as error:
        yield Check("API server", "bad", error.what, error.hint or "is it up, and is KUBECONFIG right?")
        return
    for checks in (_operators, _rights, _kfp_accounts, _gpus, _queue):
        try:
            yield from checks(survey, settings)
        except ClusterError as error:
            yield Check(checks.__name__.strip("_"), "bad", error.what, error.hint or "run it again")
    if not root:
        yield Check("pod", "note", "no pod was tried", "give --root s3://bucket/prefix, where runs are to be kept")
        return
    try:
        yield from _pod(survey, settings, root)
    except PirlError as error:
        yield Check("pod", "bad", error.what, error.hint or "fix what it names, then run this again")


@dataclass(frozen=True)
class Probe:
    """A command that writes and reads below `root`: `python -m pirl.doctor ROOT`."""

    root: str
    out: str
    module: str = "pirl.doctor"
    name: str = "doctor"

    def file(self) -> None:
        """Return None: it needs no specification."""

    def arguments(self, path: str) -> list[str]:
        """Return the root."""
        return [self.root]


class Survey(Cluster):
    """A launcher's calls, and some that only other accounts may make: these return None if refused."""

    def version(self) -> str:
        """Return the version of the API server."""
        from kubernetes import client

        return str(self._call(client.VersionApi(self.client).get_code)["gitVersion"])

    def image(self, deployment: str) -> str | None:
        """Return a Deployment's image; "" if none has this name, None if this account may not list them."""
        from kubernetes import client

        call = client.AppsV1Api(self.client).list_deployment_for_all_namespaces
        try:
            items = self._call(call, field_selector=f"metadata.name={deployment}")["items"]
        except ForbiddenError:
            return None
        return items[0]["spec"]["template"]["spec"]["containers"][0]["image"] if items else ""

    def gpus(self) -> list[int] | None:
        """Return the allocatable GPUs of each node."""
        try:
            nodes = self._call(self.core.list_node)["items"]
        except ForbiddenError:
            return None
        return [int(node["status"].get("allocatable", {}).get("nvidia.com/gpu", 0)) for node in nodes]

    def queue_versions(self) -> list[str]:
        """Return the versions of Kueue's API, the newest known first; empty without Kueue."""
        versions = ("v1beta2", "v1beta1")
        return [version for version in versions if self.serves(Resource(KUEUE, version, "localqueues", "LocalQueue"))]

    def queue(self, name: str, version: str) -> str | None:
        """Return the ClusterQueue of a LocalQueue of Kueue; raise `AbsentError` without the latter."""
        call = self.custom.get_namespaced_custom_object
        try:
            queue = self._call(call, KUEUE, version, self.namespace, "localqueues", name)
        except ForbiddenError:
            return None
        return str(queue["spec"]["clusterQueue"])


def _definitions(survey: Survey, kinds: Sequence[JobKind]) -> Iterator[Check]:
    """Check which kinds are served: one is needed, and the chosen one is named."""
    chosen = survey.kind
    for kind in kinds:
        missing = [str(resource) for resource in kind.resources if not survey.serves(resource)]
        if not missing:
            use = "used by these settings" if kind is chosen else f"served too; --backend {kind.name} uses it"
            yield Check(kind.title, "ok", f"{kind.resource}, {use}")
        elif kind is chosen:
            yield Check(kind.title, "bad", f"{', '.join(missing)} not served", kind.install)
        else:
            yield Check(kind.title, "note", f"{', '.join(missing)} not served", f"not needed: {chosen.title} is used")


def _operators(survey: Survey, _: JobSettings) -> Iterator[Check]:
    for name, deployment, version in survey.kind.operators:
        image = survey.image(deployment)
        if not image:
            why = "this account may not list Deployments" if image is None else f"no Deployment {deployment}"
            yield Check(name, "note", f"its version is unknown: {why}", "the pod below shows whether it works")
            continue
        tag = image.rpartition(":")[2].removeprefix("v")
        tried = tag == version or tag.startswith(f"{version}.")
        yield Check(name, "ok" if tried else "note", image, "" if tried else f"tried with version {version}")


def _rights(survey: Survey, _: JobSettings) -> Iterator[Check]:
    rights = survey.kind.rights
    subject, account = f"service account {ACCOUNT}", ACCOUNT
    if survey.may(rights[0], account) is None:
        subject, account = "this account", ""
    missing = [str(right) for right in rights if not survey.may(right, account)]
    if missing:
        yield Check("rights", "bad", f"{subject} may not {', '.join(missing)}", "kubectl apply -f manifests/")
    else:
        yield Check("rights", "ok", f"{subject} has all the rights of a launcher")


def _kfp_accounts(survey: Survey, _: JobSettings) -> Iterator[Check]:
    """Check which of the two accounts of KFP's steps may start jobs: that of the overlay, and KFP's default."""
    rights = survey.kind.rights
    for account, overlay in KFP_ACCOUNTS.items():
        answers = [survey.may(right, account) for right in rights]
        name = f"steps as {account}"
        if None in answers:
            yield Check(name, "note", "this account may not ask for the rights of others", "run it as an administrator")
        elif all(answers):
            yield Check(name, "ok", "has all the rights of a launcher")
        else:
            yield Check(name, "note", "may not start jobs", f"kubectl apply -k manifests/overlays/{overlay}")


def _gpus(survey: Survey, settings: JobSettings) -> Iterator[Check]:
    request = f"asked for: {settings.nodes} x {settings.gpus}"
    gpus = survey.gpus()
    if gpus is None:
        yield Check("GPUs", "note", f"this account may not list nodes; {request}", "kubectl get nodes, as one who may")
        return
    state = f"nodes with {', '.join(map(str, sorted(gpus, reverse=True)))} GPUs; {request}"
    if settings.gpus and sum(count >= settings.gpus for count in gpus) < settings.nodes:
        yield Check("GPUs", "bad", state, "add nodes, install the device plugin, or change --job nodes and gpus")
    else:
        yield Check("GPUs", "ok", state)


def _queue(survey: Survey, settings: JobSettings) -> Iterator[Check]:
    versions = survey.queue_versions()
    state = f"{KUEUE}/{', '.join(versions)}" if versions else "not installed"
    if not settings.queue:
        yield Check("Kueue", "ok", f"{state}; no queue is asked for")
        return
    if not versions:
        yield Check("Kueue", "bad", f"{state}, but queue {settings.queue} is asked for", QUEUE_FIX)
        return
    try:
        parent = survey.queue(settings.queue, versions[0])
    except AbsentError as error:
        yield Check("Kueue", "bad", f"no LocalQueue {settings.queue} ({error.what})", QUEUE_FIX)
        return
    if parent is None:
        yield Check("Kueue", "note", f"{state}; this account may not get LocalQueue {settings.queue}", QUEUE_FIX)
    else:
        yield Check("Kueue", "ok", f"{state}; LocalQueue {settings.queue} of ClusterQueue {parent}")


QUEUE_FIX = "kubectl get localqueues; manifests/overlays/kueue makes one"


def _pod(survey: Survey, settings: JobSettings, root: str) -> Iterator[Check]:
    """Run a job of one pod that writes and reads below `root`."""
    one = settings.model_copy(update={"nodes": 1, "max_restarts": 0, "ttl_s": 600})
    objects = build_job(survey.kind, Probe(root, f"{root.rstrip('/')}/doctor-{secrets.token_hex(3)}"), one)
    name = objects[-1]["metadata"]["name"]
    job = survey.create(objects)
    if job is None:
        raise ClusterError(f"a job {name} exists already", "run this again")
    try:
        survey.own(job)
        yield from _watch(survey, one, job)
    finally:
        survey.delete(name, job["metadata"]["uid"])


def _watch(survey: Survey, settings: JobSettings, job: Object) -> Iterator[Check]:
    """Follow the pod to its end, or until nothing more is to be expected."""
    started = time.monotonic()
    permanent_since: float | None = None
    trouble: Trouble | None = None
    while (waited := time.monotonic() - started) < settings.pull_s:
        time.sleep(POLL_S)
        try:
            pods = survey.pods(job)
            if ended := _end(survey, settings, pods, waited):
                yield ended
                return
            names = [*survey.kind.involved(job["metadata"]["name"]), *(pod["metadata"]["name"] for pod in pods)]
            present = troubles(pods, [event for name in names for event in survey.events(name)], survey.kind.refusals)
        except UnavailableError:
            continue
        trouble = next((item for item in present if item.permanent), present[0] if present else None)
        if not trouble or not trouble.permanent:
            permanent_since = None
        elif time.monotonic() - (permanent_since := permanent_since or time.monotonic()) > PERMANENT_S:
            break
    if trouble:
        yield Check("pod", "bad", str(trouble), trouble.hint)
    else:
        operators = "|".join(operator.deployment for operator in survey.kind.operators)
        hint = f"does the operator run? kubectl get pods -A | grep -E '{operators}'; {survey.kind.install}"
        yield Check("pod", "bad", f"nothing has run after {duration(waited)}", hint)


def _end(survey: Survey, settings: JobSettings, pods: list[Object], waited: float) -> Check | None:
    """Return the check of a pod that has ended, or None."""
    for end in ends(pods):
        if end.exit_code:
            return Check("pod", "bad", f"{end}: {end.lines}", "does the Secret exist, and may pods reach the storage?")
        lines = _plain(survey.log(next(pod for pod in pods if pod["metadata"]["name"] == end.pod)))
        return Check("pod", "ok", f"{settings.image} ran after {duration(waited)}: {lines}")
    return None


def _plain(log: str) -> str:
    return "; ".join(line.partition(" ")[2] for line in log.splitlines())
