"""Job settings: what API server, kubelet or first pod would refuse is refused before anything is created."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_launcher import TOYJOB, Steps

from pirl.backends import KINDS
from pirl.errors import UsageError
from pirl.jobs import job_settings
from pirl.jobs.kind import JobKind
from pirl.jobs.pod import build_job
from pirl.jobs.resources import formulas

LONG = "a" * 64
BAD: list[tuple[str, Any, str]] = [
    ("nodes", 0, "greater than or equal to 1"),
    ("nodes", 1001, "less than or equal to 1000"),
    ("namespace", "Team", "a DNS label"),
    ("namespace", LONG, "a DNS label"),
    ("image", "Foo/Bar:1", "an image"),
    ("image", "a:b:c", "an image"),
    ("image", f"a@sha256:{LONG}x", "an image"),
    ("queue", LONG, "at most 63"),
    ("secret", "a..b", "a DNS name"),
    ("service_account", "a.-b", "DNS labels"),
    ("priority_class", "High", "a DNS name"),
    ("cpu", 0, "positive"),
    ("cpu", "0.0", "positive"),
    ("cpu", "4Gi", "positive"),
    ("memory", 4, "at least 64Mi"),
    ("memory", "4m", "at least 64Mi"),
    ("shared_memory", "1K", "at least 1Mi"),
    ("shared_memory", "8Gi", "a part of memory"),
    ("resources", {"cpu": "3"}, "a setting of its own"),
    ("resources", {"rdma/hca": "one"}, "a quantity"),
    ("gpu_resource", "nvidia.com/", "a resource's name"),
    ("env", {"PET_NNODES": "3"}, "by the job"),
    ("env", {"RANK": "3"}, "by the job"),
    ("env", {"a b": "3"}, "letters, digits"),
    ("claims", {"a": "/tmp"}, "belongs to the pod's system"),
    ("claims", {"a": "/etc/pirl/x"}, "belongs to the pod's system"),
    ("claims", {"a": "/etc/ssl/pirl"}, "belongs to the pod's system"),
    ("claims", {"a": "/x/../y"}, "absolute path"),
    ("pull_secrets", ["Not_A_Name"], "DNS"),
    ("ca", "Not_A_Name", "DNS"),
    ("claims", {"a": "/data", "b": "/data"}, "two claims"),
    ("labels", {"a b": "c"}, "a label's name"),
    ("labels", {"a": LONG}, "a label's value"),
    ("node_selector", {"a": "b c"}, "a label's value"),
    ("annotations", {"a": "x" * 200_000}, "bytes|characters"),
    ("tolerations", [{"key": "a", "operator": "Exist"}], "'Exists' or 'Equal'"),
    ("tolerations", [{"key": "a", "operator": "Exists", "value": "b"}], "takes no value"),
    ("tolerations", [{"operator": "Equal"}], "has to be Exists"),
    ("tolerations", [{"key": "a", "seconds": 3}], "seconds"),
    ("run_s", 1e300, "less than or equal"),
    ("ttl_s", 3_000_000_000, "less than"),
    ("grace_s", 0, "greater than or equal"),
]


@pytest.mark.parametrize(("name", "value", "reason"), BAD, ids=[f"{name}={str(value)[:24]}" for name, value, _ in BAD])
def test_what_a_pod_would_refuse_is_refused_at_once(name: str, value: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as error:
        job_settings([f"{name}={json.dumps(value)}"])
    assert name in str(error.value)


GOOD = {
    "nodes": 4,
    "gpus": 8,
    "cpu": "48",
    "memory": "1.5Ti",
    "shared_memory": "16Gi",
    "image": f"registry.example.com:5000/team/x_y:1.2-3@sha256:{LONG}",
    "queue": "team-queue",
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}, {"operator": "Exists"}],
    "node_selector": {"example.com/pool": "gpu"},
    "labels": {"team": ""},
    "claims": {"images": "/data", "more": "/tmp/more"},
    "run_s": 86400,
}


@pytest.mark.parametrize("kind", [*KINDS, TOYJOB.kind], ids=lambda kind: kind.name)
def test_good_settings_arrive_in_the_job(kind: JobKind) -> None:
    settings = job_settings([f"{name}={json.dumps(value)}" for name, value in GOOD.items()])
    objects = build_job(kind, Steps("s3://bucket-name/run"), settings)
    text = json.dumps(objects)
    for value in ("48", "1.5Ti", "16Gi", GOOD["image"], "team-queue", "/tmp/more"):
        assert json.dumps(value) in text
    for value in (GOOD["tolerations"], GOOD["node_selector"]):
        assert json.dumps(value) in text, "without fields that were not given"


@pytest.mark.parametrize(
    ("items", "cpu", "memory", "shared_memory"),
    [
        ([], "1", "4Gi", "1Gi"),
        (["gpus=1"], "9", "16Gi", "1Gi"),
        (["gpus=8", "nodes=4"], "72", "128Gi", "8Gi"),
        (["gpus=8", "processes=4"], "36", "64Gi", "4Gi"),
        (["gpus=8", "cpu=48"], "48", "128Gi", "8Gi"),
        (["gpus=8", "memory=2Gi"], "72", "2Gi", "1Gi"),
        (["gpus=8", "shared_memory=16Gi"], "72", "128Gi", "16Gi"),
    ],
)
def test_resources_follow_from_the_gpus(items: list[str], cpu: str, memory: str, shared_memory: str) -> None:
    settings = job_settings(items)
    assert (settings.cpu, settings.memory, settings.shared_memory) == (cpu, memory, shared_memory)
    named = {line.partition(" ")[0] for line in formulas(settings.model_dump(), settings.ranks_per_pod)}
    given = {item.partition("=")[0] for item in items}
    if settings.gpus and "memory" not in given:
        assert named == {"cpu", "memory", "shared_memory"} - given


def test_ranks_need_cores() -> None:
    with pytest.raises(UsageError, match="4 cores in a pod of 8 ranks"):
        job_settings(["gpus=8", "cpu=4"])


def test_other_resources_reach_the_pod() -> None:
    items = ["gpus=2", "gpu_resource=amd.com/gpu", 'resources={"rdma/hca": "1"}', "ipc_lock=true"]
    (job,) = build_job(KINDS[1], Steps("s3://bucket/run"), job_settings(items))
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    limits = {"cpu": "18", "memory": "32Gi", "rdma/hca": "1", "amd.com/gpu": "2"}
    assert container["resources"] == {"requests": limits, "limits": limits}
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
