"""Calls to the API server, and no more: create, get and delete a job, list pods and events, read logs.

Every call reads the present state. There is no watch that could break, and nothing to catch up with after an outage.
"""

from __future__ import annotations

import json
from contextlib import redirect_stdout, suppress
from typing import Any

from ..errors import PirlError
from .kind import JobKind, Object, Resource, container_name

TIMEOUT_S = (5, 20)  # to connect, and without a byte
RIGHTS_HINT = (
    "`kubectl apply -f manifests/` gives these rights to the service account pirl-launcher; for KFP's steps, "
    "`kubectl apply -k manifests/overlays/kfp` and `pirl submit --service-account pirl-launcher`"
)


class ClusterError(PirlError):
    """The cluster refused a request, or cannot run the job."""


class UnavailableError(ClusterError):
    """The API server is unavailable. What runs keeps running, and the call can be repeated."""

    transient = True


class Cluster:
    """One namespace and one kind of job, with the rights of the current kubeconfig or of the pod's service account."""

    def __init__(self, namespace: str, kind: JobKind) -> None:
        from kubernetes import client, config

        try:
            with redirect_stdout(None):  # in a pod it prints that the pod's own account might not work
                config.load_config()
        except (config.ConfigException, OSError) as error:
            raise ClusterError(f"no cluster is configured: {error}", "set KUBECONFIG, or run this in a pod") from None
        self.namespace = namespace
        self.kind = kind
        settings = client.Configuration.get_default_copy()
        settings.retries = False  # the caller repeats the call, and says so
        self.client = client.ApiClient(settings)
        self.core = client.CoreV1Api(self.client)
        self.custom = client.CustomObjectsApi(self.client)

    def get(self, resource: Resource, name: str) -> Object | None:
        """Return the object, or None if it does not exist."""
        try:
            return self._call(self.custom.get_namespaced_custom_object, *self._path(resource), name)
        except AbsentError:
            return None

    def job(self, name: str) -> Object | None:
        """Return the job, or None if it does not exist."""
        return self.get(self.kind.resource, name)

    def create(self, objects: list[Object], **more: Any) -> Object | None:
        """Return the job as created, or None if one of that name exists. What it refers to is created anew first."""
        *parts, job = objects
        for resource, part in zip(self.kind.resources, parts, strict=False):
            if self._create(resource, part, **more) is None:  # of an earlier job that has gone
                self._delete(resource, part["metadata"]["name"])
                self._create(resource, part, **more)
        return self._create(self.kind.resource, job, **more)

    def delete(self, name: str, uid: str) -> None:
        """Delete this very job with its pods, and what it refers to. That it is gone or replaced is fine."""
        *parts, job = self.kind.resources
        if self._delete(job, name, {"uid": uid}):
            for resource in parts:
                self._delete(resource, name)

    def pods(self, job: Object) -> list[Object]:
        """Return the job's pods by their index."""
        return sorted(self.kind.pods(self, job), key=self.kind.index)

    def pods_by_label(self, selector: str) -> list[Object]:
        """Return the pods that have these labels."""
        return self._call(self.core.list_namespaced_pod, self.namespace, label_selector=selector)["items"]

    def events(self, about: str) -> list[Object]:
        """Return events about the object of this name, oldest first."""
        selector = f"involvedObject.name={about}"
        events = self._call(self.core.list_namespaced_event, self.namespace, field_selector=selector)["items"]
        return sorted(events, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")

    def log(self, pod: Object, since_s: int | None = None, previous: bool = False) -> str:
        """Return a container's log with a time before each line, or that of the one before its restart; "" for none."""
        more = {} if since_s is None else {"since_seconds": since_s}
        arguments = pod["metadata"]["name"], self.namespace
        try:
            return self._call_text(
                self.core.read_namespaced_pod_log,
                *arguments,
                container=container_name(pod),
                timestamps=True,
                previous=previous,
                **more,
            )
        except (AbsentError, _RefusedError):  # no container yet, or not any more
            return ""

    def _path(self, resource: Resource) -> tuple[str, str, str, str]:
        return resource.group, resource.version, self.namespace, resource.plural

    def _create(self, resource: Resource, body: Object, **more: Any) -> Object | None:
        try:
            return self._call(self.custom.create_namespaced_custom_object, *self._path(resource), body, **more)
        except _ConflictError:
            return None
        except AbsentError as error:
            if "namespaces" in error.what:
                raise ClusterError(error.what, "kubectl apply -f manifests/ makes the namespace") from None
            raise ClusterError(f"this cluster does not serve {resource} ({error.what})", self.kind.install) from None

    def _delete(self, resource: Resource, name: str, only: Object | None = None) -> bool:
        """Delete the object if it meets the preconditions `only`; return whether it was there and did."""
        body = {"preconditions": only, "propagationPolicy": "Background"}
        with suppress(AbsentError, _ConflictError):
            self._call(self.custom.delete_namespaced_custom_object, *self._path(resource), name, body=body)
            return True
        return False

    def _call(self, call: Any, *arguments: Any, **more: Any) -> Any:
        text = self._call_text(call, *arguments, **more)
        try:
            return json.loads(text)
        except ValueError:  # a proxy's page, or an answer that was cut off
            raise UnavailableError(f"the API server's answer is not JSON: {text[:80]!r}") from None

    def _call_text(self, call: Any, *arguments: Any, **more: Any) -> str:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            answer = call(*arguments, **more, _preload_content=False, _request_timeout=TIMEOUT_S)
            return answer.data.decode(errors="replace")
        except (HTTPError, OSError) as error:
            raise UnavailableError(f"the API server does not answer: {str(error).rpartition(': ')[2]}") from None
        except ApiException as error:
            message = _message(error)
            # 401: a token that is being replaced; 429 and 5xx: too much to do, a leader election, a webhook restarting
            if error.status in (0, 401, 408, 429) or error.status >= 500:
                raise UnavailableError(f"the API server answers {error.status}: {message}") from None
            kinds = {400: _RefusedError, 403: ForbiddenError, 404: AbsentError, 409: _ConflictError}
            raise kinds.get(error.status, ClusterError)(message) from None


class AbsentError(ClusterError):
    """The object or its type does not exist."""


class _ConflictError(ClusterError):
    pass


class _RefusedError(ClusterError):
    pass


class ForbiddenError(ClusterError):
    """The account lacks a right."""

    def __init__(self, what: str, hint: str = RIGHTS_HINT) -> None:
        super().__init__(what, hint)


def _message(error: Any) -> str:
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body or ""
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body.strip() or str(error.reason)
