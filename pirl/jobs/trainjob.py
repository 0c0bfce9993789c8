"""TrainJob of Kubeflow Trainer 2: a TrainingRuntime of the job's name, which JobSet runs as one indexed Job.

Why a runtime of its own: a TrainJob has no place for most settings of a pod, and the fields that override a runtime's
template differ between Trainer 2.0, 2.1 and 2.2. Only fields that 2.0 to 2.3 share are used here.

Restarts: by default the failure of one pod recreates all of them (`restart=pods`), up to `max_restarts` times. Each
attempt begins with a new rendezvous. A program that refuses its settings (exit code 2) ends the job at once.
`restart=containers` restarts containers in their pods instead, and counts each container's restarts.

No TTL and no deadline in the template: Trainer 2.3 recreates a failed JobSet after its TTL, and later versions refuse
both. The launcher has its own deadlines, and deletes ended jobs after `ttl_s`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import EXIT_USAGE
from .kind import JobKind, Object, Operator, Phase, Resource, Right, Verdict, owner, true_conditions
from .settings import JobSettings

if TYPE_CHECKING:
    from .cluster import Cluster

GROUP, VERSION = "trainer.kubeflow.org", "v1alpha1"
JOBSET = Resource("jobset.x-k8s.io", "v1alpha2", "jobsets", "JobSet")
NODE = "node"  # Trainer's name of the replicated job, and of the container that trains
JOBSET_NAME = "jobset.sigs.k8s.io/jobset-name"
JOBSET_UID = "jobset.sigs.k8s.io/jobset-uid"
INDEX = "batch.kubernetes.io/job-completion-index"


class TrainJob(JobKind):
    """`trainer.kubeflow.org/v1alpha1`, of Kubeflow Trainer 2.0 to 2.3."""

    name = "trainjob"
    resources = (
        Resource(GROUP, VERSION, "trainingruntimes", "TrainingRuntime"),
        Resource(GROUP, VERSION, "trainjobs", "TrainJob"),
    )
    container = NODE
    operators = (
        Operator("Trainer", "kubeflow-trainer-controller-manager", "2.0"),
        Operator("JobSet", "jobset-controller-manager", "0.10"),
    )
    install = (
        "install Kubeflow Trainer: kubectl apply --server-side -k "
        '"https://github.com/kubeflow/trainer.git/manifests/overlays/manager?ref=v2.0.0"'
    )
    refusals = frozenset({"TrainJobResourcesCreationFailed", "JobCreationFailed", "FailedCreate"})
    restarts = ("pods", "containers")
    expires = False
    reads = (Right("get", JOBSET.group, JOBSET.plural),)

    def specs(self, name: str, settings: JobSettings, template: Object) -> list[Object]:
        """Return the runtime's spec, with all that pods need, and the job's, with the world's size."""
        recreate = (settings.restart or self.restarts[0]) == "pods"
        pod = {**template, "spec": {**template["spec"], "restartPolicy": "Never" if recreate else "OnFailure"}}
        job: Object = {"backoffLimit": 0 if recreate else settings.max_restarts * settings.nodes, "template": pod}
        failure: Object = {"maxRestarts": settings.max_restarts if recreate else 0}
        if recreate:
            refused = {"containerName": NODE, "operator": "In", "values": [EXIT_USAGE]}
            job["podFailurePolicy"] = {"rules": [{"action": "FailJob", "onExitCodes": refused}]}
            failure["rules"] = [
                {"name": "refusedSettings", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
            ]
        node = {
            "name": NODE,
            "template": {"metadata": {"labels": {f"{GROUP}/trainjob-ancestor-step": "trainer"}}, "spec": job},
        }
        runtime = {
            "mlPolicy": {"numNodes": settings.nodes, "torch": {}},
            "template": {"spec": {"failurePolicy": failure, "replicatedJobs": [node]}},
        }
        # without numProcPerNode, Trainer derives the ranks from the CPU request
        trainer = {"numNodes": settings.nodes, "numProcPerNode": settings.ranks_per_pod}
        reference = {"apiGroup": GROUP, "kind": self.resources[0].kind, "name": name}
        return [runtime, {"runtimeRef": reference, "trainer": trainer}]

    def pods(self, cluster: Cluster, job: Object) -> list[Object]:
        """Return the pods of the JobSet that this very job owns."""
        name = job["metadata"]["name"]
        jobset = cluster.get(JOBSET, name)
        if jobset is None or owner(jobset) != job["metadata"]["uid"]:
            return []
        uid = jobset["metadata"]["uid"]
        pods = cluster.pods_by_label(f"{JOBSET_NAME}={name}")
        return [pod for pod in pods if pod["metadata"]["labels"].get(JOBSET_UID) == uid]

    def index(self, pod: Object) -> int:
        """Return the completion index in the Job."""
        return int(pod["metadata"]["labels"][INDEX])

    def involved(self, name: str) -> tuple[str, ...]:
        """Return the name that TrainJob and JobSet share, and that of the Job."""
        return name, f"{name}-{NODE}-0"

    def verdict(self, job: Object) -> Verdict:
        """Return the judgement: Failed and Complete are final, whatever else holds."""
        holds = true_conditions(job)
        for condition, phase in (("Failed", Phase.FAILED), ("Complete", Phase.SUCCEEDED)):
            if condition in holds:
                return Verdict(phase, holds[condition])
        suspended = "Suspended" in holds or job["spec"].get("suspend")
        return Verdict(Phase.SUSPENDED if suspended else Phase.ACTIVE)
