"""PyTorchJob of the training operator: Workers only, joined by torchrun's c10d rendezvous.

Why this shape: a Master would bring an init container that the `restricted` standard refuses. `OnFailure` restarts any
container that ends badly, that of a preempted rank (exit code 75) included, and the operator replaces a pod that was
evicted; each start resumes from the last checkpoint. `ExitCode` would take 75 for a final failure, and restart what
ends by a signal forever. torchrun itself restarts nothing (maxRestarts 0): one mechanism, one count, `backoffLimit`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .kind import JobKind, Object, Operator, Phase, Resource, Verdict, owner, true_conditions
from .settings import JobSettings

if TYPE_CHECKING:
    from .cluster import Cluster

PREFIX = "training.kubeflow.org"  # of the operator's labels
BACKSTOP_S = 600  # that the operator's deadline stands behind the launcher's, in case the launcher has died


class PyTorchJob(JobKind):
    """`kubeflow.org/v1`, of the training operator 1.9."""

    name = "pytorchjob"
    resources = (Resource("kubeflow.org", "v1", "pytorchjobs", "PyTorchJob"),)
    container = "pytorch"
    operators = (Operator("training operator", "training-operator", "1.9"),)
    install = (
        "install the training operator: kubectl apply --server-side -k "
        '"github.com/kubeflow/training-operator.git/manifests/overlays/standalone?ref=v1.9.3"'
    )
    refusals = frozenset({"FailedCreatePod"})

    def specs(self, name: str, settings: JobSettings, template: Object) -> list[Object]:
        """Return the one spec: `nodes` workers."""
        policy: dict[str, Any] = {
            "cleanPodPolicy": "Running",
            "ttlSecondsAfterFinished": settings.ttl_s,
            # the operator counts every container's restarts, and one failure restarts them all
            "backoffLimit": settings.max_restarts * settings.nodes,
        }
        if settings.run_s is not None:
            policy["activeDeadlineSeconds"] = round(settings.run_s) + BACKSTOP_S
        return [
            {
                "nprocPerNode": str(settings.ranks_per_pod),
                "elasticPolicy": {
                    "rdzvBackend": "c10d",
                    "minReplicas": settings.nodes,
                    "maxReplicas": settings.nodes,
                    "maxRestarts": 0,
                },
                "runPolicy": policy,
                "pytorchReplicaSpecs": {
                    "Worker": {"replicas": settings.nodes, "restartPolicy": "OnFailure", "template": template}
                },
            }
        ]

    def pods(self, cluster: Cluster, job: Object) -> list[Object]:
        """Return the pods that this very job owns."""
        pods = cluster.pods_by_label(f"{PREFIX}/job-name={job['metadata']['name']}")
        return [pod for pod in pods if owner(pod) == job["metadata"]["uid"]]

    def index(self, pod: Object) -> int:
        """Return the N of `-worker-N`."""
        return int(pod["metadata"]["labels"][f"{PREFIX}/replica-index"])

    def verdict(self, job: Object) -> Verdict:
        """Return the judgement: Failed and Succeeded are final, whatever else holds."""
        holds = true_conditions(job)
        for condition, phase in (("Failed", Phase.FAILED), ("Succeeded", Phase.SUCCEEDED)):
            if condition in holds:
                return Verdict(phase, holds[condition])
        suspended = "Suspended" in holds or job["spec"].get("runPolicy", {}).get("suspend")
        return Verdict(Phase.SUSPENDED if suspended else Phase.ACTIVE)
