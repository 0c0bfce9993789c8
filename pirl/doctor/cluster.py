"""A look at a cluster before the first run, with the rights of whoever asks.

It ends with a job of one pod, as a training's is made: API, operator, admission, image, Secret, network and storage are
all found to work together, or the first of them that does not is named. The job is deleted afterwards.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

from ..config import load_recipe
from ..errors import PirlError
from ..jobs import JobSettings, build_job
from ..jobs.cluster import INSTALL, RIGHTS, AbsentError, Cluster, ClusterError, ForbiddenError, Right, UnreachableError
from ..jobs.diagnose import Trouble, ends, troubles
from ..jobs.pod import Object
from ..jobs.pytorchjob import API
from ..text import duration
from ..training.spec import Options
from .check import Check

OPERATOR = "1.9"  # what the launcher was tried with
ACCOUNT = "pirl-launcher"
HOPELESS_S = 15.0
POLL_S = 1.0


def cluster_checks(settings: JobSettings, root: str) -> Iterator[Check]:
    """One after the other, each as soon as it is known. `root` is the place of the runs; "" leaves the pod away."""
    try:
        survey = Survey(settings.namespace)
        yield Check("API server", "ok", f"Kubernetes {survey.version()}, namespace {settings.namespace}")
        yield from _definition(survey)
    except ClusterError as error:
        yield Check("API server", "bad", error.what, error.hint or "is it up, and is KUBECONFIG right?")
        return
    for look in (_operator, _rights, _gpus, _queue):
        try:
            yield look(survey, settings)
        except ClusterError as error:
            yield Check(look.__name__.strip("_"), "bad", error.what, error.hint or "run it again")
    if not root:
        yield Check("pod", "note", "no pod was tried", "give --root s3://bucket/prefix, where runs are to be kept")
        return
    try:
        yield from _pod(survey, settings, root)
    except PirlError as error:
        yield Check("pod", "bad", error.what, error.hint or "mend what it names, then run this again")


class Survey(Cluster):
    """What a launcher may ask, and what only some accounts may: those answers are None where they are refused."""

    def version(self) -> str:
        from kubernetes import client

        return str(self._ask(client.VersionApi(self.client).get_code)["gitVersion"])

    def has_definition(self) -> bool:
        """Whether PyTorchJobs are known here."""
        try:
            found = self._ask(self.custom.get_api_resources, API[0], API[1])
        except AbsentError:
            return False
        return any(item["name"] == API[2] for item in found["resources"])

    def operator(self) -> str | None:
        """The operator's image; "" where no Deployment of its name is there."""
        from kubernetes import client

        ask = client.AppsV1Api(self.client).list_deployment_for_all_namespaces
        try:
            found = self._ask(ask, field_selector="metadata.name=training-operator")["items"]
        except ForbiddenError:
            return None
        return found[0]["spec"]["template"]["spec"]["containers"][0]["image"] if found else ""

    def may(self, right: Right, account: str = "") -> bool | None:
        """Whether the asking account, or a service account of this namespace, has a right there."""
        from kubernetes import client

        api = client.AuthorizationV1Api(self.client)
        resource, _, subresource = right.resource.partition("/")
        asked = {"namespace": self.namespace, "verb": right.verb, "group": right.group, "resource": resource}
        spec: Object = {"resourceAttributes": {**asked, "subresource": subresource}}
        try:
            if account:
                spec["user"] = f"system:serviceaccount:{self.namespace}:{account}"
                body = {"metadata": {"namespace": self.namespace}, "spec": spec}
                answer = self._ask(api.create_namespaced_local_subject_access_review, self.namespace, body)
            else:
                answer = self._ask(api.create_self_subject_access_review, {"spec": spec})
        except ForbiddenError:
            return None
        return bool(answer["status"]["allowed"])

    def gpus(self) -> list[int] | None:
        """GPUs that each node has to give."""
        try:
            nodes = self._ask(self.core.list_node)["items"]
        except ForbiddenError:
            return None
        return [int(node["status"].get("allocatable", {}).get("nvidia.com/gpu", 0)) for node in nodes]

    def queue(self, name: str) -> str | None:
        """The cluster queue behind a LocalQueue of Kueue; `AbsentError` where it is not there."""
        ask = self.custom.get_namespaced_custom_object
        try:
            found = self._ask(ask, "kueue.x-k8s.io", "v1beta1", self.namespace, "localqueues", name)
        except ForbiddenError:
            return None
        return str(found["spec"]["clusterQueue"])


def _definition(survey: Survey) -> Iterator[Check]:
    kind = f"{API[2]}.{API[0]}/{API[1]}"
    yield (
        Check("PyTorchJob", "ok", kind)
        if survey.has_definition()
        else Check("PyTorchJob", "bad", f"no {kind} here", INSTALL)
    )


def _operator(survey: Survey, _: JobSettings) -> Check:
    image = survey.operator()
    if not image:
        why = "this account may not see it" if image is None else "no Deployment training-operator"
        return Check("operator", "note", f"its version is unknown: {why}", "the pod below tells whether it works")
    tried = f":v{OPERATOR}." in image or f":{OPERATOR}." in image or image.endswith((f":v{OPERATOR}", f":{OPERATOR}"))
    return Check("operator", "ok" if tried else "note", image, "" if tried else f"tried with version {OPERATOR}")


def _rights(survey: Survey, _: JobSettings) -> Check:
    who, account = f"service account {ACCOUNT}", ACCOUNT
    if survey.may(RIGHTS[0], account) is None:
        who, account = "this account", ""
    missing = [str(right) for right in RIGHTS if not survey.may(right, account)]
    if missing:
        return Check("rights", "bad", f"{who} may not {', '.join(missing)}", "kubectl apply -f manifests/")
    return Check("rights", "ok", f"{who} may do all that a launcher does")


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
    """A job of one pod that writes and reads below `root`."""
    one = settings.model_copy(update={"nodes": 1, "max_restarts": 0, "ttl_s": 600})
    body = build_job(load_recipe("demo"), Options(root, f"{root.rstrip('/')}/doctor-{secrets.token_hex(3)}"), one)
    container = body["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    container |= {"command": ["python", "-m", "pirl.doctor"], "args": [root]}
    name = body["metadata"]["name"]
    created = survey.create(body)
    if created is None:
        raise ClusterError(f"a job {name} is there already", "run this again")
    try:
        yield from _watch(survey, one, name)
    finally:
        survey.delete(name, created["metadata"]["uid"])


def _watch(survey: Survey, settings: JobSettings, name: str) -> Iterator[Check]:
    started = time.monotonic()
    hopeless_since: float | None = None
    trouble: Trouble | None = None
    while (waited := time.monotonic() - started) < settings.pull_s:
        time.sleep(POLL_S)
        try:
            pods = survey.pods(name)
            for end in ends(pods):
                lines = end.lines if end.exit_code else _plain(survey.log(end.pod))
                if end.exit_code:
                    yield Check("pod", "bad", f"{end}: {lines}", "is the Secret there, and may pods reach the storage?")
                else:
                    yield Check("pod", "ok", f"{settings.image} ran after {duration(waited)}: {lines}")
                return
            found = troubles(pods, [event for pod in [name, *_names(pods)] for event in survey.events(pod)])
        except UnreachableError:
            continue
        trouble = next((item for item in found if item.hopeless), found[0] if found else None)
        if trouble and trouble.hopeless:
            hopeless_since = hopeless_since or time.monotonic()
            if time.monotonic() - hopeless_since > HOPELESS_S:
                break
        else:
            hopeless_since = None
    if trouble:
        yield Check("pod", "bad", str(trouble), trouble.hint)
    else:
        hint = "does the training operator run? kubectl get pods -A | grep training-operator; " + INSTALL
        yield Check("pod", "bad", f"nothing has run after {duration(waited)}", hint)


def _names(pods: list[Object]) -> list[str]:
    return [pod["metadata"]["name"] for pod in pods]


def _plain(log: str) -> str:
    return "; ".join(line.partition(" ")[2] for line in log.splitlines())
