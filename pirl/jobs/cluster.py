"""Calls to the API server, and no more: create, get and delete a job, list pods and events, read logs.

Every call reads the present state. Without a watch nothing can break, and an outage leaves no gap.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from datetime import UTC, datetime
from typing import Any

from ..errors import PirlError
from .diagnose import time_of
from .kind import SPEC_HASH, TTL, JobKind, Object, Phase, Resource, Right, conditions, container_name, owner

TIMEOUT_S = (5, 20)  # to connect, and without a byte
RIGHTS_HINT = (
    "`kubectl apply -f manifests/` gives these rights to the service account pirl-launcher; for KFP's steps, "
    "`kubectl apply -k manifests/overlays/kfp` and `pirl submit --service-account pirl-launcher`, or, for KFP's own "
    "account, `kubectl apply -k manifests/overlays/kfp-default-account`"
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
            with redirect_stdout(None):  # in a pod it warns about the pod's own account
                config.load_config()
        except (config.ConfigException, OSError) as error:
            raise ClusterError(f"no cluster is configured: {error}", "set KUBECONFIG, or run this in a pod") from None
        self.namespace = namespace
        self.kind = kind
        settings = client.Configuration.get_default_copy()
        settings.retries = False  # the caller repeats the call, and prints that
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

    def serves(self, resource: Resource) -> bool:
        """Return whether the API has this type of object."""
        try:
            types = self._call(self.custom.get_api_resources, resource.group, resource.version)["resources"]
        except AbsentError:
            return False
        return any(item["name"] == resource.plural for item in types)

    def create(self, objects: list[Object]) -> Object | None:
        """Return the job as created; None if it exists, or if an object of an earlier job has to go first."""
        *parts, job = objects
        for resource, part in zip(self.kind.resources, parts, strict=False):
            if self._create(resource, part) is None and not self._is_free(resource, part):
                return None
        return self._create(self.kind.resource, job)

    def own(self, job: Object) -> None:
        """Make the job the owner of the objects that it refers to, so that they go with it."""
        *parts, resource = self.kind.resources
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        reference = {"apiVersion": f"{resource.group}/{resource.version}", "kind": resource.kind, "name": name}
        patch = {"metadata": {"ownerReferences": [{**reference, "uid": uid}]}}  # the client sends a merge patch
        for part in parts:
            with suppress(AbsentError):
                self._call(self.custom.patch_namespaced_custom_object, *self._path(part), name, patch)

    def delete(self, name: str, uid: str) -> None:
        """Delete this very job with its pods, and what it owns. That it is gone or replaced is fine."""
        self._delete(self.kind.resource, name, {"uid": uid})

    def expire(self) -> list[str]:
        """Delete jobs that ended longer ago than their `ttl_s`, where the operator does not; return their names."""
        if self.kind.expires:
            return []
        now, names, call = datetime.now(UTC), [], self.custom.list_namespaced_custom_object
        selector = "app.kubernetes.io/managed-by=pirl"
        try:
            jobs = self._call(call, *self._path(self.kind.resource), label_selector=selector)["items"]
        except AbsentError:  # the creation names what is missing
            return []
        for job in jobs:
            ttl_s = job["metadata"].get("annotations", {}).get(TTL, "")
            ended = max((item.get("lastTransitionTime", "") for item in conditions(job)), default="")
            is_final = self.kind.verdict(job).phase in (Phase.SUCCEEDED, Phase.FAILED)
            if is_final and ttl_s.isdigit() and ended:
                age_s = (now - datetime.fromisoformat(ended.replace("Z", "+00:00"))).total_seconds()
                if age_s > int(ttl_s):
                    self.delete(job["metadata"]["name"], job["metadata"]["uid"])
                    names.append(job["metadata"]["name"])
        return names

    def pods(self, job: Object) -> list[Object]:
        """Return the job's pods by their index; of those with one index, the one that stays and is newest first."""
        pods = sorted(self.kind.pods(self, job), key=lambda pod: pod["metadata"].get("creationTimestamp", ""))
        return sorted(reversed(pods), key=lambda pod: (self.kind.index(pod), "deletionTimestamp" in pod["metadata"]))

    def pods_by_label(self, selector: str) -> list[Object]:
        """Return the pods that have these labels."""
        return self._call(self.core.list_namespaced_pod, self.namespace, label_selector=selector)["items"]

    def events(self, name: str) -> list[Object]:
        """Return events about the object of this name, oldest first."""
        selector = f"involvedObject.name={name}"
        events = self._call(self.core.list_namespaced_event, self.namespace, field_selector=selector)["items"]
        return sorted(events, key=time_of)

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

    def may(self, right: Right, account: str = "") -> bool | None:
        """Return whether this account, or a service account NAME or NAMESPACE:NAME, has a right in the namespace.

        None if this account may not ask that.
        """
        from kubernetes import client

        api = client.AuthorizationV1Api(self.client)
        resource, _, subresource = right.resource.partition("/")
        attributes = {"namespace": self.namespace, "verb": right.verb, "group": right.group, "resource": resource}
        spec: Object = {"resourceAttributes": {**attributes, "subresource": subresource}}
        try:
            if account:
                name = account if ":" in account else f"{self.namespace}:{account}"
                spec["user"] = f"system:serviceaccount:{name}"
                body = {"metadata": {"namespace": self.namespace}, "spec": spec}
                answer = self._call(api.create_namespaced_local_subject_access_review, self.namespace, body)
            else:
                answer = self._call(api.create_self_subject_access_review, {"spec": spec})
        except ForbiddenError:
            return None
        return bool(answer["status"]["allowed"])

    def require_rights(self) -> None:
        """Raise `ForbiddenError` where this account lacks a right of a launcher."""
        missing = [str(right) for right in self.kind.rights if self.may(right) is False]
        if missing:
            raise ForbiddenError(
                f"this account lacks rights of a launcher in namespace {self.namespace}: {', '.join(missing)}"
            )

    def _path(self, resource: Resource) -> tuple[str, str, str, str]:
        return resource.group, resource.version, self.namespace, resource.plural

    def _is_free(self, resource: Resource, part: Object) -> bool:
        """Return whether the object that exists is as `part`, and of no job; else delete one that a job has left."""
        name, metadata = part["metadata"]["name"], (self.get(resource, part["metadata"]["name"]) or {}).get("metadata")
        if metadata is None or self.job(name) is not None:
            return False
        same = metadata.get("annotations", {}).get(SPEC_HASH) == part["metadata"]["annotations"][SPEC_HASH]
        if same and "deletionTimestamp" not in metadata and not owner({"metadata": metadata}):
            return True
        self._delete(resource, name, {"uid": metadata["uid"]})
        return False

    def _create(self, resource: Resource, body: Object) -> Object | None:
        try:
            return self._call(self.custom.create_namespaced_custom_object, *self._path(resource), body)
        except _ConflictError:
            return None
        except AbsentError as error:
            if "namespaces" in error.what:
                raise ClusterError(error.what, "kubectl apply -f manifests/ makes the namespace") from None
            raise ClusterError(f"this cluster does not serve {resource} ({error.what})", self.kind.install) from None

    def _delete(self, resource: Resource, name: str, only: Object) -> None:
        """Delete the object if it exists and meets the preconditions `only`."""
        body = {"preconditions": only, "propagationPolicy": "Background"}
        with suppress(AbsentError, _ConflictError):
            self._call(self.custom.delete_namespaced_custom_object, *self._path(resource), name, body=body)

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
            if error.status == 403 and "admission webhook" in message:
                if "not found" in message:  # its cache is behind: an object was created a moment ago
                    raise UnavailableError(message) from None
                raise ClusterError(message, "correct the job's settings that it names") from None
            kinds = {400: _RefusedError, 403: ForbiddenError, 404: AbsentError, 409: _ConflictError}
            raise kinds.get(error.status, ClusterError)(message) from None


def served_kind(namespace: str, kinds: Sequence[JobKind]) -> JobKind:
    """Return the first of the kinds that the current cluster serves."""
    for kind in kinds:
        cluster = Cluster(namespace, kind)
        if all(map(cluster.serves, kind.resources)):
            return kind
    titles = " nor ".join(kind.title for kind in kinds)
    raise ClusterError(f"this cluster serves neither {titles}", f"{kinds[0].install}; `pirl doctor --cluster` has more")


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
