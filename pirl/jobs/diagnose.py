"""Why pods do not run: from their status and events to a sentence and a next step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import EXIT_PREEMPTED, EXIT_USAGE
from .pod import CONTAINER, Object

IMAGE = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
CONFIGURATION = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}


@dataclass(frozen=True)
class Trouble:
    """Something that keeps a pod from running. `hopeless`: waiting for nodes or for a quota will not mend it."""

    where: str
    what: str
    hint: str
    hopeless: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class End:
    """How a container ended."""

    pod: str
    uid: str
    number: int
    """0 for the pod's first container, 1 for that after its first restart..."""
    exit_code: int
    reason: str
    lines: str
    """The last lines that it wrote."""

    def __str__(self) -> str:
        code = self.exit_code
        known = {
            EXIT_PREEMPTED: "stopped, its state saved",
            EXIT_USAGE: "settings that cannot work",
            137: "killed",
            143: "told to stop",
        }
        why = self.reason if self.reason not in ("", "Error", "Completed") else known.get(code, "")
        return f"{self.pod} ended with exit code {code}" + (f" ({why})" if why else "")

    @property
    def hint(self) -> str:
        if self.reason == "OOMKilled":
            return "give the pods more memory (job setting `memory`), or use fewer --workers"
        if self.exit_code == EXIT_USAGE:
            return "correct the settings that it names; a restart would not help, so there was none"
        return "its last lines say why; the checkpoints are kept: run the same command again to go on"


def conditions(thing: Object) -> list[Object]:
    """The conditions of a job or a pod; empty where it has no status yet."""
    return (thing.get("status") or {}).get("conditions") or []


def status(pod: Object) -> Object:
    """The status of the training's container; empty where it has none yet."""
    found = (pod.get("status") or {}).get("containerStatuses") or []
    return next((item for item in found if item["name"] == CONTAINER), {})


def is_running(pod: Object) -> bool:
    return "running" in status(pod).get("state", {}) and "deletionTimestamp" not in pod["metadata"]


def is_well(pod: Object) -> bool:
    """Running, or ended as it should."""
    ended = status(pod).get("state", {}).get("terminated")
    return is_running(pod) or (ended is not None and ended["exitCode"] == 0)


def ends(pods: Iterable[Object]) -> list[End]:
    """How the containers of these pods ended: the last one of each that has ended."""
    found = []
    for pod in pods:
        container = status(pod)
        state = container.get("state", {}).get("terminated")
        before = container.get("lastState", {}).get("terminated")
        number = container.get("restartCount", 0) - (0 if state else 1)
        if ended := state or before:
            found.append(
                End(
                    pod["metadata"]["name"],
                    pod["metadata"]["uid"],
                    max(number, 0),
                    ended["exitCode"],
                    ended.get("reason", ""),
                    (ended.get("message") or "").strip(),
                )
            )
    return found


def troubles(pods: Iterable[Object], events: Iterable[Object]) -> list[Trouble]:
    """What keeps these pods, and those that should be there, from running."""
    pods, events = list(pods), list(events)
    found = [trouble for pod in pods if (trouble := _of_pod(pod, events))]
    refused = [event for event in events if event.get("reason") == "FailedCreatePod"]
    if refused:
        found.append(_of_refusal(refused[-1]))
    return found


def _of_pod(pod: Object, events: list[Object]) -> Trouble | None:
    name, node = pod["metadata"]["name"], pod["spec"].get("nodeName", "")
    waiting = status(pod).get("state", {}).get("waiting") or {}
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    mine = [event for event in events if event["involvedObject"]["name"] == name and event.get("type") == "Warning"]
    if reason in IMAGE:
        image = next(item["image"] for item in pod["spec"]["containers"] if item["name"] == CONTAINER)
        told = next((event["message"] for event in reversed(mine) if "ull" in event.get("message", "")), message)
        return Trouble(
            name,
            f"{node} cannot pull the image {image} ({reason}): {told}",
            "is the name right, is the image pushed, and may the nodes pull it (imagePullSecrets of the account)?",
            hopeless=True,
        )
    if reason in CONFIGURATION:
        return Trouble(name, f"{reason}: {message}", "correct the job's settings that it names", hopeless=True)
    known = {item["type"]: item for item in conditions(pod)}
    scheduled = known.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return Trouble(
            name,
            f"no node can take it: {scheduled.get('message', scheduled.get('reason', ''))}",
            "free or add nodes, ask for less (nodes, gpus, cpu, memory), or correct node_selector and tolerations",
        )
    lost = [event for event in mine if event.get("reason") in ("NodeNotReady", "TaintManagerEviction")]
    if "deletionTimestamp" in pod["metadata"] or (lost and known.get("Ready", {}).get("status") == "False"):
        why = known.get("DisruptionTarget", {}).get("message") or (lost[-1]["message"] if lost else "deleted")
        return Trouble(
            name,
            f"{node} is being left: {why}",
            f"kubectl get node {node}; a pod of a node that is gone for good stays until the node is deleted",
        )
    if mine and not is_running(pod) and reason == "ContainerCreating":
        return Trouble(name, f"{node}: {mine[-1].get('message', '')}", f"kubectl describe pod {name}")
    return None


def _of_refusal(event: Object) -> Trouble:
    message = event.get("message", "").removeprefix("Error creating: ")
    if "exceeded quota" in message:
        return Trouble(
            "pods are refused", message, "kubectl describe quota tells what is used; free it or ask for less"
        )
    if "PodSecurity" in message:
        return Trouble("pods are refused", message, "the namespace's pod security standard forbids it", hopeless=True)
    return Trouble("pods are refused", message, "mend what it names, then run the same command again", hopeless=True)
