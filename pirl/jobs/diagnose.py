"""Diagnosis of pods that do not run: from their status and events to a sentence and a next step."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

from ..errors import EXIT_PREEMPTED, EXIT_USAGE
from .kind import Object, conditions, container_name

IMAGE = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
CONFIGURATION = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}


@dataclass(frozen=True)
class Trouble:
    """Something that keeps a pod from running. `permanent`: waiting will not fix it, as it may a lack of nodes."""

    where: str
    what: str
    hint: str
    permanent: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class End:
    """End of a container."""

    pod: str
    uid: str
    number: int
    """0 for the pod's first container, 1 for that after its first restart..."""
    exit_code: int
    reason: str
    lines: str
    """Its last lines."""

    def __str__(self) -> str:
        code = self.exit_code
        meanings = {
            EXIT_PREEMPTED: "preempted, its state saved",
            EXIT_USAGE: "settings that cannot work",
            137: "killed",
            143: "stopped by SIGTERM",
        }
        why = self.reason if self.reason not in ("", "Error", "Completed") else meanings.get(code, "")
        return f"{self.pod} ended with exit code {code}" + (f" ({why})" if why else "")

    @property
    def hint(self) -> str:
        if self.reason == "OOMKilled":
            return "give the pods more memory (job setting `memory`), or use fewer --workers"
        if self.exit_code == EXIT_USAGE:
            return "correct the settings that it names; no restart was tried, since it would not help"
        return "read the cause in its last lines; checkpoints are kept: run the same command again to resume"


def status(pod: Object) -> Object:
    """Return the status of the container that runs the program; empty if it has none yet."""
    name = container_name(pod)
    containers = (pod.get("status") or {}).get("containerStatuses") or []
    return next((item for item in containers if item["name"] == name), {})


def is_running(pod: Object) -> bool:
    """Return whether the program runs and its pod is not being deleted."""
    return "running" in status(pod).get("state", {}) and "deletionTimestamp" not in pod["metadata"]


def is_well(pod: Object) -> bool:
    """Return whether the program runs or has ended with exit code 0."""
    ended = status(pod).get("state", {}).get("terminated")
    return is_running(pod) or (ended is not None and ended["exitCode"] == 0)


def ends(pods: Iterable[Object]) -> list[End]:
    """Return the last end of each pod's container, if it has ended."""
    result = []
    for pod in pods:
        container = status(pod)
        state = container.get("state", {}).get("terminated")
        before = container.get("lastState", {}).get("terminated")
        number = container.get("restartCount", 0) - (0 if state else 1)
        if ended := state or before:
            result.append(
                End(
                    pod["metadata"]["name"],
                    pod["metadata"]["uid"],
                    max(number, 0),
                    ended["exitCode"],
                    ended.get("reason", ""),
                    (ended.get("message") or "").strip(),
                )
            )
    return result


def troubles(pods: Iterable[Object], events: Iterable[Object], refusals: Container[str]) -> list[Trouble]:
    """Return what keeps these pods, and those that are missing, from running.

    `refusals` are the reasons of events by which the job's operator reports that it cannot create pods. Those older
    than the newest pod are over.
    """
    pods, events = list(pods), list(events)
    result = [trouble for pod in pods if (trouble := _of_pod(pod, events))]
    newest = max((pod["metadata"].get("creationTimestamp", "") for pod in pods), default="")
    refused = [event for event in events if event.get("reason") in refusals]
    if refused and (time_of(refused[-1]) or newest) >= newest:
        result.append(_of_refusal(refused[-1]))
    return result


def time_of(event: Object) -> str:
    """Return the last time of an event; "" without any."""
    return event.get("lastTimestamp") or event.get("eventTime") or ""


def _of_pod(pod: Object, events: list[Object]) -> Trouble | None:
    """Return the trouble of one pod: its image, its configuration, its place on a node, or the node."""
    name, node = pod["metadata"]["name"], pod["spec"].get("nodeName", "")
    waiting = status(pod).get("state", {}).get("waiting") or {}
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    warnings = [event for event in events if event["involvedObject"]["name"] == name and event.get("type") == "Warning"]
    if reason in IMAGE:
        return _of_image(pod, reason, message, warnings)
    if reason in CONFIGURATION:
        return Trouble(name, f"{reason}: {message}", "correct the job's settings that it names", permanent=True)
    by_type = {item["type"]: item for item in conditions(pod)}
    scheduled = by_type.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return Trouble(
            name,
            f"no node can take it: {scheduled.get('message', scheduled.get('reason', ''))}",
            "free or add nodes, ask for less (nodes, gpus, cpu, memory), or correct node_selector and tolerations",
        )
    lost = [event for event in warnings if event.get("reason") in ("NodeNotReady", "TaintManagerEviction")]
    if "deletionTimestamp" in pod["metadata"] or (lost and by_type.get("Ready", {}).get("status") == "False"):
        why = by_type.get("DisruptionTarget", {}).get("message") or (lost[-1]["message"] if lost else "deleted")
        return Trouble(
            name,
            f"pod is being evicted from {node}: {why}",
            f"kubectl get node {node}; a pod of a node that is gone for good stays until the node is deleted",
        )
    if warnings and not is_running(pod) and reason == "ContainerCreating":
        return Trouble(name, f"{node}: {warnings[-1].get('message', '')}", f"kubectl describe pod {name}")
    return None


def _of_image(pod: Object, reason: str, message: str, warnings: list[Object]) -> Trouble:
    """Return the trouble with a pod's image; the kubelet's event has more detail than the status."""
    image = next(item["image"] for item in pod["spec"]["containers"] if item["name"] == container_name(pod))
    said = next((event["message"] for event in reversed(warnings) if "ull" in event.get("message", "")), message)
    return Trouble(
        pod["metadata"]["name"],
        f"{pod['spec'].get('nodeName', '')} cannot pull the image {image} ({reason}): {said}",
        "is the name right, is the image pushed, and may the nodes pull it (imagePullSecrets of the account)?",
        permanent=True,
    )


def _of_refusal(event: Object) -> Trouble:
    """Return the trouble behind an event of pods that cannot be created."""
    message = event.get("message", "").removeprefix("Error creating: ")
    if "exceeded quota" in message:
        hint = "kubectl describe quota shows what is used; free it or ask for less"
        return Trouble("pods are refused", message, hint)
    if "PodSecurity" in message:
        return Trouble("pods are refused", message, "the namespace's pod security standard forbids it", permanent=True)
    return Trouble("pods are refused", message, "fix what it names, then run the same command again", permanent=True)
