"""The manifests as they stand: what they hold, how they are labelled, and that every overlay can be built."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from images import folder_of_classes
from kubernetes.utils import parse_quantity
from kubernetes_server import KubernetesServer, kubernetes  # noqa: F401 fixture
from test_launcher import Steps

from pirl import __version__
from pirl.backends import KINDS
from pirl.cli import app
from pirl.jobs import job_settings
from pirl.jobs.kind import JobKind
from pirl.jobs.pod import build_job
from pirl.settings import split_items
from pirl.text import count

MANIFESTS = Path(__file__).parent.parent / "manifests"
OVERLAYS = sorted(path.name for path in (MANIFESTS / "overlays").iterdir())
VERSION = __version__.replace("+", "-")
WORLD = ("nodes", "gpus", "processes")
BUILT_IN = {"Namespace", "ServiceAccount", "Role", "RoleBinding", "ConfigMap", "NetworkPolicy"}
QUEUES = {"ResourceFlavor", "ClusterQueue", "LocalQueue"}
NEED_CRDS = {
    "kueue": QUEUES,
    "kueue-v1beta1": QUEUES,
    "monitoring": {"PodMonitor", "PrometheusRule"},
    "profile": {"PodDefault"},
}

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


def documents(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


def kubectl(*arguments: str) -> str:
    done = subprocess.run(["kubectl", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def built(overlay: str) -> list[dict[str, Any]]:
    folder = MANIFESTS if overlay == "base" else MANIFESTS / "overlays" / overlay
    return documents(kubectl("kustomize", str(folder)))


def base() -> list[dict[str, Any]]:
    return [document for path in sorted(MANIFESTS.glob("*.yaml")) for document in documents(path.read_text())]


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {document["metadata"]["name"]: document for document in base() if document["kind"] == kind}


def pod_templates(value: Any) -> list[dict[str, Any]]:
    """Every pod template anywhere in an object."""
    if isinstance(value, list):
        return [found for item in value for found in pod_templates(item)]
    if not isinstance(value, dict):
        return []
    here = [value["template"]] if "containers" in value.get("template", {}).get("spec", {}) else []
    return here + [found for item in value.values() for found in pod_templates(item)]


def template_labels(kind: JobKind) -> dict[str, str]:
    """Labels of a job's pods as the operator creates them."""
    objects = build_job(kind, Steps("s3://bucket-name/run"), job_settings())
    (template,) = pod_templates(objects)
    labels: dict[str, str] = template["metadata"]["labels"]
    return labels


class TestBase:
    def test_what_apply_f_reads_is_what_apply_k_builds(self) -> None:
        """A file that only one of the two ways installs would be missed."""
        listed = yaml.safe_load((MANIFESTS / "base" / "kustomization.yaml").read_text())["resources"]
        files = sorted(path.name for path in MANIFESTS.iterdir() if path.suffix in (".yaml", ".yml", ".json"))
        assert files == sorted(listed)
        for name in files:
            assert (MANIFESTS / name).resolve() == (MANIFESTS / "base" / name).resolve()
        assert yaml.safe_load((MANIFESTS / "Kustomization").read_text())["resources"] == ["base"]

    def test_it_needs_nothing_that_may_be_missing_and_starts_nothing(self) -> None:
        assert {document["kind"] for document in base()} == BUILT_IN
        assert all("generateName" not in document["metadata"] for document in base())

    def test_the_namespace_enforces_restricted(self) -> None:
        labels = of_kind("Namespace")["pirl"]["metadata"]["labels"]
        assert {labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("enforce", "audit", "warn")} == {"restricted"}

    def test_the_trainer_has_no_token_and_no_role(self) -> None:
        assert of_kind("ServiceAccount")["pirl-trainer"]["automountServiceAccountToken"] is False
        subjects = [s["name"] for binding in of_kind("RoleBinding").values() for s in binding["subjects"]]
        assert subjects == ["pirl-launcher"]

    def test_the_launcher_has_no_wildcard_no_secret_and_makes_no_pod(self) -> None:
        for rule in of_kind("Role")["pirl-launcher"]["rules"]:
            words = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert "*" not in words
            assert "secrets" not in words
            assert not {"pods", "pods/exec"} & set(rule["resources"]) or not {"create", "delete"} & set(rule["verbs"])

    def test_the_launcher_has_the_rights_that_doctor_asks_for(self) -> None:
        rules = of_kind("Role")["pirl-launcher"]["rules"]
        given = {
            (verb, group, resource)
            for rule in rules
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }
        assert given == {right for kind in KINDS for right in kind.rights}

    def test_the_secret_is_not_installed_by_accident(self) -> None:
        example = documents((MANIFESTS / "secret.yaml.example").read_text())[0]
        assert (example["kind"], example["metadata"]["name"]) == ("Secret", "pirl-s3")
        assert set(example["stringData"].values()) == {""}


class TestNetwork:
    def test_all_is_refused_unless_allowed(self) -> None:
        spec = of_kind("NetworkPolicy")["default-deny"]["spec"]
        assert spec == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}

    def test_openings(self) -> None:
        policies = {name: policy["spec"] for name, policy in of_kind("NetworkPolicy").items() if name != "default-deny"}
        ports = {
            name: [(port["protocol"], port.get("port")) for rule in spec.get("egress", []) for port in rule["ports"]]
            for name, spec in policies.items()
        }
        assert ports["allow-dns"] == [("UDP", 53), ("TCP", 53)]
        assert ports["allow-object-storage"] == [("TCP", 443)]
        assert ports["allow-api-server"] == [("TCP", 443), ("TCP", 6443)]
        assert ports["allow-rendezvous"] == [("TCP", None)]  # gloo and NCCL take any port
        assert policies["allow-metrics"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": 9400}]
        # credentials of the node are to be had at a link-local address
        assert policies["allow-object-storage"]["egress"][0]["to"][0]["ipBlock"]["except"] == ["169.254.0.0/16"]

    def test_only_the_launcher_reaches_the_api_server_and_only_workers_each_other(self) -> None:
        policies = of_kind("NetworkPolicy")
        selected = policies["allow-api-server"]["spec"]["podSelector"]["matchLabels"]
        assert selected["app.kubernetes.io/component"] == "launcher"
        rendezvous = policies["allow-rendezvous"]["spec"]
        workers = rendezvous["podSelector"]
        for kind in KINDS:  # labels of our own, which every kind's pods have
            labels = template_labels(kind)
            assert workers["matchLabels"].items() <= labels.items()
            assert {item["key"] for item in workers["matchExpressions"]} <= labels.keys()
            assert policies["allow-metrics"]["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
        assert rendezvous["ingress"][0]["from"] == [{"podSelector": workers}]
        assert rendezvous["egress"][0]["to"] == [{"podSelector": workers}]


@needs_kubectl
class TestBuilt:
    @pytest.mark.parametrize("flag", ["-f", "-k"])
    def test_both_ways_find_the_same_objects(self, flag: str) -> None:
        found = kubectl("annotate", "--local", flag, f"{MANIFESTS}/", "a=b", "-o", "name").split()
        assert len(found) == len(base())

    @pytest.mark.parametrize("overlay", ["base", *OVERLAYS])
    def test_labels_and_names(self, overlay: str) -> None:
        objects = built(overlay)
        assert objects
        assert len({(o["kind"], o["metadata"]["name"]) for o in objects}) == len(objects)
        for document in objects:
            labels = document["metadata"]["labels"]
            assert labels["app.kubernetes.io/name"] == labels["app.kubernetes.io/part-of"] == "pirl-pipeline"
            assert labels["app.kubernetes.io/version"] == VERSION
            assert {"app.kubernetes.io/component", "app.kubernetes.io/managed-by"} <= labels.keys()
            assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", document["metadata"]["name"])

    @pytest.mark.parametrize("overlay", ["base", *OVERLAYS])
    def test_no_secret_no_training_and_images_of_this_version(self, overlay: str) -> None:
        objects = built(overlay)
        assert not {
            "Secret",
            "PyTorchJob",
            "TrainJob",
            "TrainingRuntime",
            "Pod",
            "Job",
            "ClusterRole",
            "ClusterRoleBinding",
        } & {document["kind"] for document in objects}
        for image in re.findall(r'"(\S*pirl-(?:trainer|python-steps):[^"]*)"', json.dumps(objects)):
            assert image.endswith(f":{VERSION}"), image

    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_only_some_overlays_need_other_kinds(self, overlay: str) -> None:
        foreign = {
            document["kind"]
            for document in built(overlay)
            if re.match(r"(kueue\.x-k8s\.io|monitoring\.coreos\.com|kubeflow\.org)/", document["apiVersion"])
        }
        assert foreign == NEED_CRDS.get(overlay, set())

    def test_a_profile_keeps_its_namespace_and_its_other_pods(self) -> None:
        objects = built("profile")
        assert {document["metadata"].get("namespace") for document in objects} == {"team"}
        assert "Namespace" not in {document["kind"] for document in objects}
        for policy in (document for document in objects if document["kind"] == "NetworkPolicy"):
            assert policy["spec"]["podSelector"], f"{policy['metadata']['name']} would isolate every pod"
        accounts = {s["name"] for o in objects if o["kind"] == "RoleBinding" for s in o["subjects"]}
        assert accounts == {"pirl-launcher", "default-editor"}
        labels = template_labels(KINDS[0])
        assert "pirl.dev/job" in labels
        assert labels["sidecar.istio.io/inject"] == "false"

    def test_an_air_gapped_site_gets_its_images_authorities_and_proxy(self) -> None:
        objects = built("air-gapped")
        config = next(document for document in objects if document["kind"] == "ConfigMap")["data"]
        settings = job_settings(split_items(config["PIRL_JOB"]))
        assert settings.pull_secrets == ["registry"]
        assert (settings.ca, settings.env["HTTPS_PROXY"]) == ("site-ca", config["HTTPS_PROXY"])
        assert config["PIRL_TRAINER_IMAGE"].startswith("registry.example/")
        for account in (document for document in objects if document["kind"] == "ServiceAccount"):
            assert account["imagePullSecrets"] == [{"name": "registry"}]

    @pytest.mark.parametrize(
        ("overlay", "policy", "egress"),
        [
            ("openshift", "allow-dns", {("openshift-dns", 5353), ("169.254.20.10/32", 5353)}),
            ("network", "allow-object-storage", {("10.245.0.1/32", 9000)}),
            ("network", "allow-dns", {("kube-system", 53), ("169.254.20.10/32", 53), ("10.245.0.1/32", 53)}),
        ],
    )
    def test_addresses_and_ports_of_a_site(self, overlay: str, policy: str, egress: set[tuple[str, int]]) -> None:
        found = next(o["spec"] for o in built(overlay) if o["metadata"]["name"] == policy)
        (rule,) = found["egress"]
        places = [
            to["ipBlock"]["cidr"] if "ipBlock" in to else next(iter(to["namespaceSelector"]["matchLabels"].values()))
            for to in rule["to"]
        ]
        assert {(place, port["port"]) for place in places for port in rule["ports"]} == egress

    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_pods_are_restricted(self, overlay: str) -> None:
        templates = pod_templates(built(overlay))
        assert bool(templates) == (overlay == "cron")
        for template in templates:
            spec = template["spec"]
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in spec["containers"]:
                security = container["securityContext"]
                assert security["allowPrivilegeEscalation"] is False
                assert security["readOnlyRootFilesystem"] is True
                assert security["capabilities"] == {"drop": ["ALL"]}
                assert "requests" in container["resources"]
            # the namespace denies all traffic but that of known labels: this pod needs the launcher's
            assert template["metadata"]["labels"]["app.kubernetes.io/component"] == "launcher"
            assert template["metadata"]["labels"]["app.kubernetes.io/name"] == "pirl-pipeline"

    def test_the_steps_on_kfp_have_kfps_role_and_the_launchers(self) -> None:
        """Under an account of their own: KFP's default one is every pipeline's of that backend."""
        objects = built("kfp")
        account = next(document for document in objects if document["kind"] == "ServiceAccount")["metadata"]
        bindings = [document for document in objects if document["kind"] == "RoleBinding"]
        ours = {(role["metadata"]["namespace"], name) for name, role in of_kind("Role").items()}
        refs = {(binding["metadata"]["namespace"], binding["roleRef"]["name"]) for binding in bindings}
        assert refs == {("kubeflow", "pipeline-runner")} | ours
        for binding in bindings:
            assert binding["subjects"] == [
                {"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}
            ]

    def test_the_default_account_of_kfp_gets_the_launchers_role_alone(self) -> None:
        (binding,) = built("kfp-default-account")
        assert (binding["kind"], binding["metadata"]["namespace"]) == ("RoleBinding", "pirl")
        assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) == ("Role", next(iter(of_kind("Role"))))
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "pipeline-runner", "namespace": "kubeflow"}]

    @pytest.mark.parametrize(("overlay", "version"), [("kueue", "v1beta2"), ("kueue-v1beta1", "v1beta1")])
    def test_the_queue_in_the_version_that_is_served(self, overlay: str, version: str) -> None:
        assert {document["apiVersion"] for document in built(overlay)} == {f"kueue.x-k8s.io/{version}"}

    def test_a_schedule_does_not_overlap_itself(self) -> None:
        spec = next(document for document in built("cron") if document["kind"] == "CronJob")["spec"]
        assert spec["concurrencyPolicy"] == "Forbid"

    @pytest.mark.parametrize(("overlay", "nodes", "gpus"), [("base", 1, 8), ("dev", 2, 0), ("prod", 4, 8)])
    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
    def test_the_schedule_trains_as_the_config_map_says(
        self,
        overlay: str,
        nodes: int,
        gpus: int,
        kind: JobKind,
        tmp_path: Path,
        kubernetes: KubernetesServer,  # noqa: F811
    ) -> None:
        """The command of the CronJob, with this environment alone, on images that exist, by the served kind."""
        kubernetes.served = tuple(resource.plural for resource in kind.resources)
        folder_of_classes(tmp_path / "photos", classes=2, images=2)
        folder_of_classes(tmp_path / "tests", classes=2, images=2, first=10)
        config = next(document for document in built(overlay) if document["kind"] == "ConfigMap")["data"]
        here = {"PIRL_TRAIN_SOURCE": "photos", "PIRL_TEST_SOURCE": "tests", "PIRL_ROOT": "root"}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        cron = next(document for document in built("cron") if document["kind"] == "CronJob")["spec"]
        container = cron["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
        done = subprocess.run(
            [*container["command"], "--dry-run"],
            cwd=tmp_path,
            env={**os.environ, "PATH": path, **config, **here},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        size = f"{count(nodes, 'pod')}, each of {count(gpus, 'GPU')} and {count(gpus or 1, 'rank')}"
        assert f"by a {kind.title} of {size}" in done.stdout

    @pytest.mark.parametrize("overlay", ["base", "dev", "prod"])
    def test_every_variable_of_the_config_map_has_a_reader(self, overlay: str) -> None:
        config = next(document for document in built(overlay) if document["kind"] == "ConfigMap")["data"]
        command = typer.main.get_command(app).commands["retrain"]  # type: ignore[attr-defined]
        read = {option.envvar for option in command.params}
        read |= {"PIRL_JOB", "PIRL_TRAINER_IMAGE", "AWS_REGION", "AWS_ENDPOINT_URL"}  # not by typer
        assert config.keys() <= read

    @pytest.mark.parametrize("overlay", ["dev", "prod"])
    def test_the_quota_has_room_for_the_training_and_its_launcher(self, overlay: str) -> None:
        objects = {document["kind"]: document for document in built(overlay)}
        config, hard = objects["ConfigMap"]["data"], objects["ResourceQuota"]["spec"]["hard"]
        job = job_settings(config["PIRL_JOB"].split(), {name: int(config[f"PIRL_{name.upper()}"]) for name in WORLD})
        assert int(hard["requests.nvidia.com/gpu"]) == job.nodes * job.gpus
        assert float(parse_quantity(hard["requests.cpu"])) >= job.nodes * parse_quantity(job.cpu) + 1
        for memory in ("requests.memory", "limits.memory"):
            assert parse_quantity(hard[memory]) >= job.nodes * parse_quantity(job.memory) + parse_quantity("8Gi")
        assert job.priority_class in ("", objects.get("PriorityClass", {"metadata": {"name": ""}})["metadata"]["name"])
