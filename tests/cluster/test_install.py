"""`kubectl apply` of the manifests on a real API server: twice, deleted, and what each account may do.

The namespace `pirl` must not be there before: these tests install it, and delete it with all that is in it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from training import kubectl

MANIFESTS = Path(__file__).parents[2] / "manifests"
OURS = "app.kubernetes.io/part-of=pirl-pipeline"
LAUNCHER, TRAINER = (f"system:serviceaccount:pirl:pirl-{name}" for name in ("launcher", "trainer"))

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="needs a Kubernetes cluster: set KUBECONFIG"),
]


def applied(*arguments: str) -> dict[str, Any]:
    """Apply on the server; every object by name as it then is, with the times at which its fields were last set.

    Without what controllers write on their own: a quota's status, and the resource version that moves with it.
    """
    found = json.loads(kubectl("apply", "--server-side", "--show-managed-fields", *arguments, "-o", "json"))
    items = found["items"] if found["kind"] == "List" else [found]
    for item in items:
        item.pop("status", None)
        item["metadata"].pop("resourceVersion")
        fields = item["metadata"]["managedFields"]
        item["metadata"]["managedFields"] = [field for field in fields if field.get("subresource") != "status"]
    return {f"{item['kind']}/{item['metadata']['name']}": item for item in items}


def left_over() -> list[str]:
    """Objects of this installation that are still there, of every kind that can be listed and deleted."""
    kinds = kubectl("api-resources", "--verbs=list,delete", "-o", "name").split()
    found = kubectl("get", ",".join(kinds), "--all-namespaces", "-l", OURS, "-o", "json", "--ignore-not-found")
    items = json.loads(found)["items"] if found else []
    return [
        f"{item['kind']}/{item['metadata']['name']}"
        for item in items
        if item["metadata"].get("namespace", "pirl") == "pirl"  # others may hold other installations
    ]


@pytest.fixture(scope="module")
def nothing_there() -> None:
    if kubectl("get", "namespace", "pirl", "-o", "name", "--ignore-not-found"):
        pytest.skip("the namespace pirl is in use: these tests would delete it")


@pytest.fixture(params=["base", "dev", "prod"])
def installation(request: pytest.FixtureRequest, nothing_there: None) -> Iterator[tuple[str, str]]:
    """The arguments for `kubectl apply` and `delete`; everything is deleted afterwards."""
    where = ("-f", f"{MANIFESTS}/") if request.param == "base" else ("-k", str(MANIFESTS / "overlays" / request.param))
    yield where
    kubectl("delete", *where, "--ignore-not-found")


def test_applied_twice_changes_nothing_and_deleted_leaves_nothing(installation: tuple[str, str]) -> None:
    first = applied(*installation)
    assert len(first) >= 12
    assert applied(*installation) == first
    assert kubectl("diff", "--server-side", *installation) == ""
    assert "no matches" not in kubectl("get", *installation, "-o", "name")
    kubectl("delete", *installation)
    assert left_over() == []


def test_the_document_for_operators(nothing_there: None, tmp_path: Path) -> None:
    """All of its commands for the cluster, in their order, from the installation to the last trace of it."""
    (tmp_path / "manifests").symlink_to(MANIFESTS)
    (tmp_path / "storage.env").write_text("AWS_ACCESS_KEY_ID=test\nAWS_SECRET_ACCESS_KEY=not-in-use\n")
    text = (MANIFESTS.parent / "docs" / "operations.md").read_text()
    blocks = re.findall(r"^```sh cluster\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    try:
        for block in blocks:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, block + done.stdout + done.stderr
    finally:
        kubectl("delete", "namespace", "pirl", "--ignore-not-found")
    assert left_over() == []


@pytest.fixture(scope="module")
def installed(nothing_there: None) -> Iterator[None]:
    for overlay in ("dev", "cron"):
        applied("-k", str(MANIFESTS / "overlays" / overlay))
    yield
    for overlay in ("cron", "dev"):
        kubectl("delete", "-k", str(MANIFESTS / "overlays" / overlay))


def test_upgrading_between_overlays(installed: None) -> None:
    prod, dev = (str(MANIFESTS / "overlays" / name) for name in ("prod", "dev"))
    applied("-k", prod)
    quota = json.loads(kubectl("get", "resourcequota", "pirl", "-n", "pirl", "-o", "json"))
    assert quota["spec"]["hard"]["requests.nvidia.com/gpu"] == "32"
    kubectl("delete", "priorityclass", "pirl-training")
    applied("-k", dev)
    config = json.loads(kubectl("get", "configmap", "pirl-config", "-n", "pirl", "-o", "json"))
    assert config["data"]["PIRL_RECIPE"] == "demo"


def can_i(account: str, verb: str, what: str) -> bool:
    """`what` is RESOURCE or RESOURCE/SUBRESOURCE, which kubectl would take for a name."""
    resource, _, subresource = what.partition("/")
    more = [f"--subresource={subresource}"] if subresource else []
    return kubectl("auth", "can-i", verb, resource, *more, "-n", "pirl", f"--as={account}", ok=False).startswith("yes")


def rules(account: str) -> dict[str, set[str]]:
    """All that an account may do with objects: resource -> verbs, without what every account may ask about itself."""
    lines = kubectl("auth", "can-i", "--list", "--no-headers", "-n", "pirl", f"--as={account}").splitlines()
    found = {}
    for line in lines:
        name, _, rest = line.partition(" ")
        if name.startswith("[") or not name or name.startswith("self"):
            continue  # pages such as /healthz, and reviews of one's own rights
        found[name] = set(rest.rpartition("[")[2].rstrip("]").split())
    return found


def test_the_launcher_may_do_exactly_what_its_role_lists(installed: None) -> None:
    role = next(yaml.safe_load_all((MANIFESTS / "20-rbac.yaml").read_text()))
    listed = {
        f"{resource}.{group}" if group else resource: set(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert rules(LAUNCHER) == listed
    served = kubectl("api-resources", "-o", "name").split()
    for resource, verbs in listed.items():
        if "." in resource and resource not in served:
            continue  # `can-i` needs the kind: here Trainer is not installed
        for verb in verbs:
            assert can_i(LAUNCHER, verb, resource), (verb, resource)


def test_the_trainer_and_any_other_account_may_do_nothing(installed: None) -> None:
    assert rules(TRAINER) == {}
    assert rules("system:serviceaccount:pirl:default") == {}


@pytest.mark.parametrize(
    "what",
    [
        "get secrets",
        "list secrets",
        "create secrets",
        "create pods",
        "delete pods",
        "create pods/exec",
        "create pods/attach",
        "create pods/portforward",
        "get configmaps",
        "update pytorchjobs.kubeflow.org",
        "deletecollection pytorchjobs.kubeflow.org",
        "create roles.rbac.authorization.k8s.io",
        "create rolebindings.rbac.authorization.k8s.io",
        "bind roles.rbac.authorization.k8s.io",
        "escalate roles.rbac.authorization.k8s.io",
        "create serviceaccounts/token",
        "impersonate serviceaccounts",
        "create jobs.batch",
        "patch cronjobs.batch",
        "delete networkpolicies.networking.k8s.io",
        "get nodes",
        "patch namespaces",
    ],
)
def test_what_the_launcher_is_forbidden(installed: None, what: str) -> None:
    assert not can_i(LAUNCHER, *what.split())


def test_the_launcher_is_nobody_in_other_namespaces(installed: None) -> None:
    for resource in ("pods", "pytorchjobs.kubeflow.org", "secrets"):
        assert kubectl("auth", "can-i", "list", resource, "-n", "default", f"--as={LAUNCHER}", ok=False).startswith(
            "no"
        )


def pod(account: str = "pirl-trainer", **container: Any) -> dict[str, Any]:
    """A pod as restricted as it must be; `container` changes that."""
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, **container}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "probe", "namespace": "pirl"},
        "spec": {
            "serviceAccountName": account,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{"name": "c", "image": "localhost/none:1", "securityContext": security}],
        },
    }


def admitted(document: dict[str, Any], ok: bool = True) -> str:
    """What the API server would make of an object, all admission done, nothing stored."""
    return kubectl("create", "--dry-run=server", "-f", "-", "-o", "json", stdin=json.dumps(document), ok=ok)


def test_a_training_pod_gets_no_token(installed: None) -> None:
    spec = json.loads(admitted(pod()))["spec"]
    assert spec.get("volumes", []) == []
    launcher = json.loads(admitted(pod("pirl-launcher")))["spec"]
    assert any("projected" in volume for volume in launcher["volumes"])  # so the check above can fail


@pytest.mark.parametrize(
    "change",
    [
        {"privileged": True, "allowPrivilegeEscalation": True},
        {"runAsNonRoot": False},
        {"capabilities": {"add": ["NET_ADMIN"]}},
        {"allowPrivilegeEscalation": True},
    ],
)
def test_the_namespace_refuses_pods_that_are_not_restricted(installed: None, change: dict[str, Any]) -> None:
    assert "violates PodSecurity" in admitted(pod(**change), ok=False)


def test_the_namespace_takes_the_pod_of_the_cron_job(installed: None) -> None:
    cron = json.loads(kubectl("get", "cronjob", "pirl-retrain", "-n", "pirl", "-o", "json"))
    template = cron["spec"]["jobTemplate"]["spec"]["template"]
    made = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {"name": "probe", "namespace": "pirl"}}
    assert json.loads(admitted(made))["spec"]["serviceAccountName"] == "pirl-launcher"


def test_a_pod_without_requests_gets_those_of_the_limit_range(installed: None) -> None:
    container = json.loads(admitted(pod()))["spec"]["containers"][0]
    assert container["resources"]["requests"] == {"cpu": "500m", "memory": "1Gi"}


def test_no_gpu_in_dev(installed: None) -> None:
    greedy = pod()
    greedy["spec"]["containers"][0]["resources"] = {
        "requests": {"nvidia.com/gpu": "1"},
        "limits": {"nvidia.com/gpu": "1"},
    }
    assert "exceeded quota" in admitted(greedy, ok=False)
