"""The pipelines on a real KFP: what is uploaded, run, cached, refused, terminated and scheduled there.

Skipped without KFP_ENDPOINT. The same file ran on KFP 2.3.0, 2.5.0 and 2.17.0: docs/compatibility.md.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator

import pytest
import yaml
from kfp_runs import ACCOUNT, STEPS, Kfp, make_kfp, objects_of
from training import ROOT, kinds, kubectl, remove_place, until

from pirl.jobs.kind import JobKind
from pirl.registry import CHAMPION, open_registry
from pirl.storage import open_storage

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.kfp,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not (os.environ.get("KUBECONFIG") and os.environ.get("KFP_ENDPOINT")),
        reason="needs Kubeflow Pipelines on a cluster: set KUBECONFIG and KFP_ENDPOINT",
    ),
]


@pytest.fixture(scope="module")
def kfp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kfp]:
    kfp, objects = make_kfp(tmp_path_factory.mktemp("kfp"))
    yield kfp
    kubectl("delete", "--ignore-not-found", "--wait=false", "workflows.argoproj.io", "--all", "-n", STEPS)
    remove_place(kfp.place, objects)


def run_of(shown: str) -> str:
    """The id of the run in what a command printed."""
    found = re.search(r"runs/details/([0-9a-f-]{36})", shown) or re.search(r'"run_id": "([0-9a-f-]{36})"', shown)
    assert found, shown
    return found[1]


def commands(mark: str) -> str:
    """The block of commands with that mark."""
    text = (ROOT / "docs" / "operations.md").read_text()
    found = re.search(rf"^```sh {mark}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def run_name(kind: JobKind) -> str:
    return f"first-{kind.name}"


def checked(kfp: Kfp, run: str, name: str) -> None:
    """A run that trained, evaluated and registered, and left artifacts that the UI renders."""
    folder = open_storage(f"{kfp.place.uri}/pirl/runs/{name}")
    assert folder.read_json("DONE.json")["images_seen"] == 3 * 42
    gate = folder.read_json("gate.json")
    assert gate["promote"], gate
    version = folder.read_json("registered.json")["version"]
    artifacts = kfp.artifacts(run)
    page, summary = artifacts["report/page"].decode(), artifacts["report/summary"].decode()
    assert page == folder.read_bytes("report.html").decode()
    assert f"Registered as pirl {version}" in summary
    assert artifacts["register/card"].startswith(b"---") or artifacts["register/card"].startswith(b"#")


@pytest.mark.parametrize("kind", kinds())
def test_a_run_trains_evaluates_and_registers_and_again_repeats_nothing(kfp: Kfp, kind: JobKind) -> None:
    """`pirl submit`, with a parameter that is JSON in part: `env={"A":"B"}` and `claims`."""
    given = kfp.arguments(run_name(kind), kind.name, job=kfp.job(node_selector={"kubernetes.io/os": "linux"}))
    shown = kfp.submit(*given, "--wait")
    run = run_of(shown)
    assert "SUCCEEDED" in shown
    checked(kfp, run, run_name(kind))
    assert 1 <= len(kfp.pods(run, "pretrain")) <= 2

    before = open_storage(f"{kfp.place.uri}/pirl/runs/{run_name(kind)}").read_bytes("metrics.jsonl")
    shown = kfp.submit(*given, "--wait")
    again = run_of(shown)
    assert "SUCCEEDED" in shown
    assert kfp.jobs(again) == [], "nothing is trained or evaluated again"
    assert open_storage(f"{kfp.place.uri}/pirl/runs/{run_name(kind)}").read_bytes("metrics.jsonl") == before
    assert open_registry(f"{kfp.place.uri}/pirl/registry").pointer("pirl", CHAMPION)


def test_a_failing_step_is_named_and_gives_its_reason(kfp: Kfp) -> None:
    shown = kfp.submit(
        *kfp.arguments("none", "pytorchjob", train_source=f"{kfp.place.uri}/nothing"), "--wait", ok=False
    )
    run = run_of(shown)
    assert "FAILED in shard" in shown
    assert "Traceback" not in shown
    logs = kfp.logs(run)
    assert "nothing" in logs
    assert "step shard-train: no image in" in logs
    assert not kfp.pods(run, "pretrain")


@pytest.mark.parametrize("kind", kinds())
def test_a_terminated_run_leaves_no_job(kfp: Kfp, kind: JobKind) -> None:
    long = {"overrides": "train.epochs=20000", "options": "log_every=100"}
    shown = kfp.submit(*kfp.arguments(f"endless-{kind.name}", kind.name, **long))
    run = run_of(shown)
    until(lambda: kfp.jobs(run), 420, every_s=2)
    until(lambda: "running" in kfp.logs(run) or "step 100/" in kfp.logs(run), 240, every_s=2)
    kfp.call("curl", "-sS", "--fail", "-X", "POST", f"{kfp.endpoint}/apis/v2beta1/runs/{run}:terminate")
    started = time.monotonic()
    until(lambda: not kfp.jobs(run), 30, every_s=1)
    print(f"--- {kind.name}: the job was gone {time.monotonic() - started:.0f} s after the termination")
    until(lambda: kfp.state(run) in ("FAILED", "CANCELED"), 90, every_s=2)
    time.sleep(30)  # retries of the step: each would create the job again
    assert kfp.jobs(run) == []
    assert len(kfp.pods(run, "pretrain")) == 1


def test_the_stock_client_with_the_default_account(kfp: Kfp) -> None:
    """The document's commands, with the names of these tests for its bucket, run and nodes; `create` and `submit`."""
    kind = os.environ.get("PIRL_KFP_KIND", "trainjob")
    job = kfp.job(node_selector={"kubernetes.io/os": "linux"})
    text = commands("kfp").replace("s3://bucket", kfp.place.uri).replace("nodes=4 gpus=8", job)
    text = text.replace("run=first", f"run=first-{kind}").replace("backend=pytorchjob", f"backend={kind} min_gain=-1")

    def ended(state: str) -> list[str]:
        since = {run["run_id"] for run in kfp.runs()}
        kfp.call("bash", "-euo", "pipefail", "-c", text)
        new = [run["run_id"] for run in kfp.runs() if run["run_id"] not in since]
        assert len(new) == 2
        for run in new:
            until(lambda run=run: kfp.state(run) in ("FAILED", "SUCCEEDED"), 600, every_s=3)
            assert kfp.state(run) == state, kfp.logs(run)
        return new

    for run in ended("FAILED"):
        assert "`kubectl apply -f manifests/` gives these rights" in kfp.logs(run)
        assert not kfp.pods(run, "pretrain"), "found before the sharding"
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(objects_of("kfp-default-account")))
    ended("SUCCEEDED")


def test_a_schedule_trains_once_and_then_has_nothing_to_do(kfp: Kfp) -> None:
    given = [item for item in kfp.arguments("", "pytorchjob") if item.partition("=")[0] != "run"]
    given = [item for item in given if not item.startswith("root=")] + [f"root={kfp.place.uri}/scheduled"]
    words = ["schedule", "pirl-retrain", "--name", "kfp-suite", "--service-account", ACCOUNT]
    kfp.pirl(*words, "--cron", "*/2 * * * *", *given)
    schedule = json.loads(kfp.pirl("schedule", "list", "--json"))
    assert any(one["name"] == "kfp-suite" for one in schedule)

    def ended() -> list[str]:
        own = [
            one
            for one in reversed(kfp.runs())
            if "kfp-suite" in one["display_name"] and one["state"] in ("FAILED", "SUCCEEDED")
        ]
        return [one["run_id"] for one in own]

    try:
        first, second = until(lambda: ended()[:2] if len(ended()) > 1 else None, 1200, every_s=5)
    finally:
        kfp.pirl("schedule", "pause", "kfp-suite")
    assert [kfp.state(run) for run in (first, second)] == ["SUCCEEDED"] * 2
    assert "created job" in kfp.logs(first)
    assert "up to date" in kfp.logs(second)
    assert "created job" not in kfp.logs(second)
