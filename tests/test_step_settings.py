"""Settings of the steps' pods, as they stand in a compiled pipeline."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.step import SECRET_DIR, labels_of, load_credentials
from pipelines.cluster import step_settings
from pipelines.compiled import PIPELINES, Compiled, compiled
from pirl.backends import KINDS
from pirl.cli import main
from pirl.doctor.cluster import Probe
from pirl.errors import ConfigError, UsageError
from pirl.jobs.kind import JobKind
from pirl.jobs.pod import build_job, to_yaml
from pirl.jobs.settings import job_settings

MESSAGES = json.loads((Path(__file__).parent / "data" / "kfp-2.3.0-fields.json").read_text())
EVERY = [
    "cpu=500m",
    "memory=2Gi",
    "gpus=2",
    "retries=4",
    "retry_wait_s=7",
    "timeout_s=3600",
    "secret=storage",
    'pull_secrets=["registry"]',
    'node_selector={"pool": "cpu"}',
    'tolerations=[{"key": "dedicated", "operator": "Exists"}]',
    'labels={"team": "vision"}',
    'claims={"images": "/data"}',
    'env={"HTTPS_PROXY": "http://proxy:3128"}',
    "ca=company-ca",
]


def documents(pipeline: Compiled) -> tuple[dict[str, Any], dict[str, Any]]:
    spec, platform = yaml.safe_load_all(pipeline.text)
    return spec, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def tasks(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for dag in [spec["root"], *spec["components"].values()]:
        yield from dag.get("dag", {}).get("tasks", {}).items()


def unknown_fields(value: Any, message: str, path: str) -> list[str]:
    """Fields that the message of KFP 2.3.0 does not have; its driver ends a step by the first of them."""
    if not message:
        return []
    shape, _, name = message.rpartition(":")
    if message in ("list", "map"):
        return []
    if shape:
        items = value.items() if shape == "map" else enumerate(value)
        return [line for key, item in items for line in unknown_fields(item, name, f"{path}.{key}")]
    fields = MESSAGES[message]
    return [f"{path}.{key}" for key in value if key not in fields] + [
        line for key in value if key in fields for line in unknown_fields(value[key], fields[key], f"{path}.{key}")
    ]


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("items", [[], EVERY], ids=["defaults", "every setting"])
def test_every_field_is_one_of_kfp_2_3_0(name: str, items: list[str]) -> None:
    spec, pods = documents(compiled(name, step_settings(items)))
    assert unknown_fields(spec, "PipelineSpec", "pipeline") == []
    assert unknown_fields(spec["deploymentSpec"], "PipelineDeploymentConfig", "deployment") == []
    for pod in pods.values():
        assert unknown_fields(pod, "KubernetesExecutorConfig", "pod") == []
    # its driver, and that of 2.5.0, takes a task's display name for its key
    names = [(key, task["taskInfo"]["name"]) for key, task in tasks(spec) if not key.startswith("condition-")]
    assert all(key == shown for key, shown in names)


def test_the_check_of_fields_finds_one_that_is_newer() -> None:
    newer = {"secretAsEnv": [{"secretName": "s", "optional": True}]}
    assert unknown_fields(newer, "KubernetesExecutorConfig", "pod") == ["pod.secretAsEnv.0.optional"]


@pytest.mark.parametrize("name", PIPELINES)
def test_every_step_has_requests_limits_retries_and_a_timeout(name: str) -> None:
    spec, pods = documents(compiled(name))
    executors = {key for key, one in spec["deploymentSpec"]["executors"].items() if "container" in one}
    assert set(pods) == executors
    for key in executors:
        resources = spec["deploymentSpec"]["executors"][key]["container"]["resources"]
        assert resources["cpuRequest"] == resources["cpuLimit"] == 1.0
        assert resources["memoryRequest"] == resources["memoryLimit"] == pytest.approx(4 * 2**30 / 1e9)
        assert "accelerator" not in resources
        assert int(pods[key]["activeDeadlineSeconds"]) == 14 * 86400
        assert pods[key]["secretAsVolume"] == [{"secretName": "pirl-s3", "mountPath": SECRET_DIR, "optional": True}]
    for _, task in tasks(spec):
        executor = spec["components"][task["componentRef"]["name"]].get("executorLabel")
        assert ("retryPolicy" in task) == (executor in executors)


def test_every_setting_stands_in_every_pod() -> None:
    spec, pods = documents(compiled("pirl-pretrain", step_settings([*EVERY, "restricted=true", "image=h.io/steps:7"])))
    for name, executor in spec["deploymentSpec"]["executors"].items():
        container = executor["container"]
        assert container["image"] == "h.io/steps:7"
        assert container["resources"]["cpuLimit"] == 0.5
        assert container["resources"]["memoryLimit"] == pytest.approx(2 * 2**30 / 1e9)
        wanted = {"type": "nvidia.com/gpu", "count": "2"} if name in ("exec-pretrain", "exec-linear-eval") else None
        assert container["resources"].get("accelerator") == wanted
        environment = {item["name"]: item["value"] for item in container["env"]}
        assert environment["HTTPS_PROXY"] == "http://proxy:3128"
        assert environment["AWS_CA_BUNDLE"] == environment["SSL_CERT_FILE"] == "/etc/ssl/pirl/ca.crt"
        pod = pods[name]
        assert pod["secretAsVolume"][0]["secretName"] == "storage"
        assert pod["configMapAsVolume"][0]["configMapName"] == "company-ca"
        assert pod["imagePullSecret"] == [{"secretName": "registry"}]
        assert pod["nodeSelector"] == {"labels": {"pool": "cpu"}}
        assert pod["tolerations"] == [{"key": "dedicated", "operator": "Exists"}]
        assert pod["podMetadata"] == {"labels": {"team": "vision"}}
        assert pod["pvcMount"] == [{"constant": "images", "mountPath": "/data"}]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["activeDeadlineSeconds"] == "3600"
    retries = {task["retryPolicy"]["maxRetryCount"] for _, task in tasks(spec) if "retryPolicy" in task}
    assert retries == {4}
    longest = {task["retryPolicy"]["backoffMaxDuration"] for _, task in tasks(spec) if "retryPolicy" in task}
    assert longest == {"18000s"}, "all attempts together: Argo counts it from the first start"


def test_without_a_secret_or_retries_nothing_of_them_is_written() -> None:
    spec, pods = documents(compiled("pirl-retrain", step_settings(["secret=", "retries=0"])))
    assert all("secretAsVolume" not in pod for pod in pods.values())
    assert all("retryPolicy" not in task for _, task in tasks(spec))


@pytest.mark.parametrize(
    ("item", "part"),
    [
        ("cpus=2", "Did you mean 'cpu'"),
        ("memory=4", "at least 64Mi"),
        ('env={"AWS_SECRET_ACCESS_KEY": "x"}', "into the Secret"),
        ("timeout_s=0", "timeout_s"),
        ("image=UPPER CASE", "image"),
        ("secret=Not_A_Name", "DNS name"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_compiled(item: str, part: str) -> None:
    with pytest.raises((UsageError, ConfigError)) as error:
        step_settings([item])
    assert part in f"{error.value}"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_job_has_pull_secrets_and_certificate_authorities(kind: JobKind) -> None:
    settings = job_settings(['pull_secrets=["registry"]', "ca=company-ca"])
    text = to_yaml(build_job(kind, Probe("s3://bucket", "s3://bucket/out"), settings))
    pod = next(part for part in parts(list(yaml.safe_load_all(text))) if "containers" in part)
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert {"name": "ca", "configMap": {"name": "company-ca"}} in pod["volumes"]
    (container,) = pod["containers"]
    assert {"name": "ca", "mountPath": "/etc/ssl/pirl", "readOnly": True} in container["volumeMounts"]
    assert {"name": "AWS_CA_BUNDLE", "value": "/etc/ssl/pirl/ca.crt"} in container["env"]


def parts(value: Any) -> Iterator[dict[str, Any]]:
    """Every object within a value."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from parts(item)


def test_credentials_are_read_from_the_files_of_the_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-the-pod")
    load_credentials(str(tmp_path / "absent"))
    assert "AWS_SECRET_ACCESS_KEY" not in os.environ
    (tmp_path / "AWS_ACCESS_KEY_ID").write_text("of-the-secret")
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text("secret\n")
    (tmp_path / "AWS_ENDPOINT_URL").write_text("")  # left empty, as in manifests/secret.yaml.example
    load_credentials(str(tmp_path))
    assert os.environ["AWS_ACCESS_KEY_ID"] == "of-the-pod"
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "secret"
    assert "AWS_ENDPOINT_URL" not in os.environ
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")


def test_a_placeholder_that_the_backend_left_is_no_label() -> None:
    assert labels_of("0bd4ee2e-1d0f") == {"pirl.dev/kfp-run": "0bd4ee2e-1d0f"}
    assert labels_of("{{$.pipeline_job_uuid}}") == labels_of("") == {}


def test_the_command_takes_settings_and_writes_objects_for_kubectl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "objects.yaml"
    monkeypatch.setenv("PIRL_STEP", "memory=3Gi cpu=2")
    words = ["pirl", "compile", str(out), "--pipeline", "pirl-retrain", "--kubernetes-manifests", "--namespace", "mine"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        main()
    pipeline, version = yaml.safe_load_all(out.read_text())
    assert (pipeline["kind"], pipeline["metadata"]) == ("Pipeline", {"name": "pirl-retrain", "namespace": "mine"})
    assert version["spec"]["pipelineName"] == "pirl-retrain"
    assert version["metadata"]["name"].startswith("pirl-retrain-")
    container = version["spec"]["pipelineSpec"]["deploymentSpec"]["executors"]["exec-retrain"]["container"]
    assert container["resources"]["cpuLimit"] == 2.0
    assert set(version["spec"]["platformSpec"]["platforms"]) == {"kubernetes"}
