"""What the launcher asks of the API server, and no more: create, get and delete a job, list pods and events, read logs.

Everything is asked anew each time. There is no watch that could break, and nothing to catch up with after an outage.
"""

from __future__ import annotations

import json
from contextlib import redirect_stdout, suppress
from typing import Any, NamedTuple

from ..errors import PirlError
from .pod import CONTAINER, Object
from .pytorchjob import API

TIMEOUT_S = (5, 20)  # to connect, and without a byte

INSTALL = (
    "install the training operator: kubectl apply --server-side -k "
    '"github.com/kubeflow/training-operator.git/manifests/overlays/standalone?ref=v1.9.3"'
)


class ClusterError(PirlError):
    """The cluster refused, or is not one that can run the job."""


class UnreachableError(ClusterError):
    """The API server did not answer, or not now: what runs, runs on, and the question can be asked again."""


class Right(NamedTuple):
    """A verb on a resource of an API group; a resource may be RESOURCE/SUBRESOURCE."""

    verb: str
    group: str
    resource: str

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}"


RIGHTS = (
    *(Right(verb, API[0], API[2]) for verb in ("create", "get", "delete")),
    Right("list", "", "pods"),
    Right("list", "", "events"),
    Right("get", "", "pods/log"),
)
"""Of whoever runs a launcher, and all that `manifests/` gives its service account."""


class Cluster:
    """One namespace, as the current kubeconfig or the pod's own service account may see it."""

    def __init__(self, namespace: str) -> None:
        from kubernetes import client, config

        try:
            with redirect_stdout(None):  # in a pod it prints that the pod's own account might not work
                config.load_config()
        except (config.ConfigException, OSError) as error:
            raise ClusterError(f"no cluster is configured: {error}", "set KUBECONFIG, or run this in a pod") from None
        self.namespace = namespace
        settings = client.Configuration.get_default_copy()
        settings.retries = False  # the caller asks again anyway, and tells the user
        self.client = client.ApiClient(settings)
        self.core = client.CoreV1Api(self.client)
        self.custom = client.CustomObjectsApi(self.client)

    def job(self, name: str) -> Object | None:
        """The PyTorchJob, or None where there is none."""
        try:
            return self._ask(self.custom.get_namespaced_custom_object, *self._jobs(), name)
        except AbsentError:
            return None

    def create(self, body: Object, **more: Any) -> Object | None:
        """The job as created; None where one of that name exists."""
        try:
            return self._ask(self.custom.create_namespaced_custom_object, *self._jobs(), body, **more)
        except _ConflictError:
            return None
        except AbsentError as error:
            if "namespaces" in error.what:
                raise ClusterError(error.what, "kubectl apply -f manifests/ makes the namespace") from None
            raise ClusterError(f"this cluster has no {API[2]}.{API[0]} ({error.what})", INSTALL) from None

    def delete(self, name: str, uid: str) -> None:
        """Delete this very job, and its pods with it; that it is gone already, or replaced, is fine."""
        body = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        with suppress(AbsentError, _ConflictError):
            self._ask(self.custom.delete_namespaced_custom_object, *self._jobs(), name, body=body)

    def pods(self, job: str) -> list[Object]:
        """The job's pods by their index."""
        selector = f"training.kubeflow.org/job-name={job}"
        pods = self._ask(self.core.list_namespaced_pod, self.namespace, label_selector=selector)["items"]
        return sorted(pods, key=pod_index)

    def events(self, about: str) -> list[Object]:
        """Events about the object of this name, oldest first."""
        selector = f"involvedObject.name={about}"
        events = self._ask(self.core.list_namespaced_event, self.namespace, field_selector=selector)["items"]
        return sorted(events, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")

    def log(self, pod: str, since_s: int | None = None, previous: bool = False) -> str:
        """Log with a timestamp before each line, of the container or of the one before its restart; "" for none."""
        more = {} if since_s is None else {"since_seconds": since_s}
        read = self.core.read_namespaced_pod_log
        try:
            return self._ask_text(
                read, pod, self.namespace, container=CONTAINER, timestamps=True, previous=previous, **more
            )
        except (AbsentError, _RefusedError):  # no container yet, or none any more
            return ""

    def _jobs(self) -> tuple[str, str, str, str]:
        return API[0], API[1], self.namespace, API[2]

    def _ask(self, call: Any, *arguments: Any, **more: Any) -> Any:
        return json.loads(self._ask_text(call, *arguments, **more))

    def _ask_text(self, call: Any, *arguments: Any, **more: Any) -> str:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            answer = call(*arguments, **more, _preload_content=False, _request_timeout=TIMEOUT_S)
            return answer.data.decode(errors="replace")
        except HTTPError as error:
            raise UnreachableError(f"the API server does not answer: {str(error).rpartition(': ')[2]}") from None
        except ApiException as error:
            message = _message(error)
            # 401: a token that is being replaced; 429 and 5xx: too much to do, a leader election, a webhook restarting
            if error.status in (0, 401, 408, 429) or error.status >= 500:
                raise UnreachableError(f"the API server answers {error.status}: {message}") from None
            kinds = {400: _RefusedError, 403: ForbiddenError, 404: AbsentError, 409: _ConflictError}
            raise kinds.get(error.status, ClusterError)(message) from None


def pod_index(pod: Object) -> int:
    """The N of `-worker-N`."""
    return int(pod["metadata"]["labels"]["training.kubeflow.org/replica-index"])


class AbsentError(ClusterError):
    """There is no such object, or no such kind."""


class _ConflictError(ClusterError):
    pass


class _RefusedError(ClusterError):
    pass


class ForbiddenError(ClusterError):
    """The asking account may not."""

    def __init__(self, what: str) -> None:
        super().__init__(
            what,
            "`kubectl apply -f manifests/` gives these rights to the service account pirl-launcher; for KFP's steps, "
            "`kubectl apply -k manifests/overlays/kfp` and `pirl submit --service-account pirl-launcher`",
        )


def _message(error: Any) -> str:
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body or ""
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body.strip() or str(error.reason)
