"""Checks of a cluster before the first run, with the rights of the account that runs them.

The last one starts a job of one pod, as a training's is made. It finds API, operator, admission, image, Secret, network
and storage working together, or names the first that does not. The job is deleted afterwards.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import PirlError
from ..jobs import JobSettings
from ..jobs.cluster import AbsentError, Cluster, ClusterError, ForbiddenError, UnavailableError
from ..jobs.diagnose import Trouble, ends, troubles
from ..jobs.kind import JobKind, Object, Right
from ..jobs.pod import build_job
from ..text import duration
from .check import Check

ACCOUNT = "pirl-launcher"
PERMANENT_S = 15.0
POLL_S = 1.0


def cluster_checks(kind: JobKind, settings: JobSettings, root: str) -> Iterator[Check]:
    """Yield each check as soon as it is made. `root` is the location of the runs; "" leaves the pod out."""
    try:
        survey = Survey(settings.namespace, kind)
        yield Check("API server", "ok", f"Kubernetes {survey.version()}, namespace {settings.namespace}")
        yield from _definitions(survey)
    except ClusterError as error:
        yield Check("API server", "bad", error.what, error.hint or "is it up, and is KUBECONFIG right?")
        return
    for check in (_operator, _rights, _gpus, _queue):
        try:
            yield check(survey, settings)
        except ClusterError as error:
            yield Check(check.__name__.strip("_"), "bad", error.what, error.hint or "run it again")
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
        """Return nothing: it needs no specification."""

    def arguments(self, path: str) -> list[str]:
        """Return the root."""
        return [self.root]


class Survey(Cluster):
    """A launcher's calls, and some that only other accounts may make: these return None if refused."""

    def version(self) -> str:
        from kubernetes import client

        return str(self._call(client.VersionApi(self.client).get_code)["gitVersion"])

    def serves(self, group: str, version: str, plural: str) -> bool:
        """Return whether the API has this type of object."""
        try:
            types = self._call(self.custom.get_api_resources, group, version)["resources"]
        except AbsentError:
            return False
        return any(item["name"] == plural for item in types)

    def operator(self) -> str | None:
        """Return the operator's image; "" if no Deployment has its name, None if this account may not see it."""
        from kubernetes import client

        call = client.AppsV1Api(self.client).list_deployment_for_all_namespaces
        try:
            items = self._call(call, field_selector=f"metadata.name={self.kind.operator.deployment}")["items"]
        except ForbiddenError:
            return None
        return items[0]["spec"]["template"]["spec"]["containers"][0]["image"] if items else ""

    def may(self, right: Right, account: str = "") -> bool | None:
        """Return whether this account, or a service account of the namespace, has a right in it."""
        from kubernetes import client

        api = client.AuthorizationV1Api(self.client)
        resource, _, subresource = right.resource.partition("/")
        asked = {"namespace": self.namespace, "verb": right.verb, "group": right.group, "resource": resource}
        spec: Object = {"resourceAttributes": {**asked, "subresource": subresource}}
        try:
            if account:
                spec["user"] = f"system:serviceaccount:{self.namespace}:{account}"
                body = {"metadata": {"namespace": self.namespace}, "spec": spec}
                answer = self._call(api.create_namespaced_local_subject_access_review, self.namespace, body)
            else:
                answer = self._call(api.create_self_subject_access_review, {"spec": spec})
        except ForbiddenError:
            return None
        return bool(answer["status"]["allowed"])

    def gpus(self) -> list[int] | None:
        """Return the allocatable GPUs of each node."""
        try:
            nodes = self._call(self.core.list_node)["items"]
        except ForbiddenError:
            return None
        return [int(node["status"].get("allocatable", {}).get("nvidia.com/gpu", 0)) for node in nodes]

    def queue(self, name: str) -> str | None:
        """Return the ClusterQueue behind a LocalQueue of Kueue; raise `AbsentError` without the latter."""
        call = self.custom.get_namespaced_custom_object
        try:
            queue = self._call(call, "kueue.x-k8s.io", "v1beta1", self.namespace, "localqueues", name)
        except ForbiddenError:
            return None
        return str(queue["spec"]["clusterQueue"])


def _definitions(survey: Survey) -> Iterator[Check]:
    for resource in survey.kind.resources:
        if survey.serves(resource.group, resource.version, resource.plural):
            yield Check(resource.kind, "ok", str(resource))
        else:
            yield Check(resource.kind, "bad", f"{resource} is not served", survey.kind.install)


def _operator(survey: Survey, _: JobSettings) -> Check:
    image, (deployment, version) = survey.operator(), survey.kind.operator
    if not image:
        why = "this account may not see it" if image is None else f"no Deployment {deployment}"
        return Check("operator", "note", f"its version is unknown: {why}", "the pod below shows whether it works")
    tag = image.rpartition(":")[2].removeprefix("v")
    tried = tag == version or tag.startswith(f"{version}.")
    return Check("operator", "ok" if tried else "note", image, "" if tried else f"tried with version {version}")


def _rights(survey: Survey, _: JobSettings) -> Check:
    rights = survey.kind.rights
    subject, account = f"service account {ACCOUNT}", ACCOUNT
    if survey.may(rights[0], account) is None:
        subject, account = "this account", ""
    missing = [str(right) for right in rights if not survey.may(right, account)]
    if missing:
        return Check("rights", "bad", f"{subject} may not {', '.join(missing)}", "kubectl apply -f manifests/")
    return Check("rights", "ok", f"{subject} has all the rights of a launcher")


def _gpus(survey: Survey, settings: JobSettings) -> Check:
    asked = f"asked for: {settings.nodes} x {settings.gpus}"
    found = survey.gpus()
    if found is None:
        return Check("GPUs", "note", f"this account may not see nodes; {asked}", "kubectl get nodes, as one who may")
    have = f"nodes with {', '.join(map(str, sorted(found, reverse=True)))} GPUs; {asked}"
    if settings.gpus and sum(count >= settings.gpus for count in found) < settings.nodes:
        return Check("GPUs", "bad", have, "add nodes, install the device plugin, or change --job nodes and gpus")
    return Check("GPUs", "ok", have)


def _queue(survey: Survey, settings: JobSettings) -> Check:
    if not settings.queue:
        return Check("queue", "ok", "none is asked for")
    try:
        behind = survey.queue(settings.queue)
    except AbsentError as error:
        return Check("queue", "bad", f"no LocalQueue {settings.queue} ({error.what})", QUEUE_FIX)
    if behind is None:
        return Check("queue", "note", f"this account may not see LocalQueue {settings.queue}", QUEUE_FIX)
    return Check("queue", "ok", f"{settings.queue} of ClusterQueue {behind}")


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
            if found := _end(survey, settings, pods, waited):
                yield found
                return
            names = [job["metadata"]["name"], *(pod["metadata"]["name"] for pod in pods)]
            known = troubles(pods, [event for name in names for event in survey.events(name)], survey.kind.refusals)
        except UnavailableError:
            continue
        trouble = next((item for item in known if item.permanent), known[0] if known else None)
        if not trouble or not trouble.permanent:
            permanent_since = None
        elif time.monotonic() - (permanent_since := permanent_since or time.monotonic()) > PERMANENT_S:
            break
    if trouble:
        yield Check("pod", "bad", str(trouble), trouble.hint)
    else:
        deployment = survey.kind.operator.deployment
        hint = f"does the operator run? kubectl get pods -A | grep {deployment}; {survey.kind.install}"
        yield Check("pod", "bad", f"nothing has run after {duration(waited)}", hint)


def _end(survey: Survey, settings: JobSettings, pods: list[Object], waited: float) -> Check | None:
    """Return the check of a pod that has ended; None while none has."""
    for end in ends(pods):
        if end.exit_code:
            return Check("pod", "bad", f"{end}: {end.lines}", "does the Secret exist, and may pods reach the storage?")
        lines = _plain(survey.log(next(pod for pod in pods if pod["metadata"]["name"] == end.pod)))
        return Check("pod", "ok", f"{settings.image} ran after {duration(waited)}: {lines}")
    return None


def _plain(log: str) -> str:
    return "; ".join(line.partition(" ")[2] for line in log.splitlines())
