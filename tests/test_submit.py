"""`pirl submit` and the stock client against a server that checks KFP's requests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kfp_server import KfpServer
from kubernetes_server import KubernetesServer, kubernetes  # noqa: F401 fixture
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401 fixtures

from pipelines import backend as backend_module
from pirl.cli import main
from pirl.storage import open_storage

ARGUMENTS = ["train_source=s3://bucket/train", "test_source=s3://bucket/test"]
ARGUMENTS += ["recipe=demo", "root=s3://bucket/pirl"]


@pytest.fixture
def server() -> Iterator[KfpServer]:
    server = KfpServer()
    yield server
    server.stop()
    assert server.complaints == []  # nothing was sent that the contract does not have


@pytest.fixture
def pirl(
    server: KfpServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """(exit code, all that was shown) of the command line on the server."""
    monkeypatch.setenv("KFP_ENDPOINT", server.url)

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["pirl", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out + shown.err

    return call


Pirl = Callable[..., tuple[int, str]]


def test_a_name_becomes_a_run_of_its_uploaded_version_with_typed_arguments(pirl: Pirl, server: KfpServer) -> None:
    older = ["nodes=4", "gpus=8", "processes=2"]  # as version 0.1 had them
    code, shown = pirl("submit", "pirl-pretrain", *ARGUMENTS, "min_gain=0.5", *older, "backend=pytorchjob", "--json")
    assert code == 0, shown
    (version,) = server.versions
    (run,) = server.runs
    assert run["pipeline_version_reference"] == {
        "pipeline_id": version["pipeline_id"],
        "pipeline_version_id": version["pipeline_version_id"],
    }
    given = run["runtime_config"]["parameters"]
    assert (given["min_gain"], given["job"], given["root"]) == (0.5, "nodes=4 gpus=8", "s3://bucket/pirl")
    assert given["options"] == "processes=2"
    assert given["run"].startswith("demo-")  # after the recipe and its content
    told = json.loads(shown)
    assert (told["run_id"], told["version"]) == (run["run_id"], version["display_name"])
    assert set(version["pipeline_spec"]) == {"pipeline_spec", "platform_spec"}


def test_the_same_pipeline_is_uploaded_once_and_a_changed_one_again(
    pirl: Pirl, server: KfpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        assert pirl("submit", "pirl-pretrain", *ARGUMENTS)[0] == 0
    assert (len(server.pipelines), len(server.versions), len(server.runs)) == (1, 1, 2)
    monkeypatch.setattr("pipelines.compiled.__version__", "9.9.9")
    assert pirl("submit", "pirl-pretrain", *ARGUMENTS)[0] == 0
    assert [version["display_name"][:6] for version in server.versions] == ["0.1.0-", "9.9.9-"]
    newest = server.versions[-1]["pipeline_version_id"]
    assert server.runs[-1]["pipeline_version_reference"]["pipeline_version_id"] == newest
    monkeypatch.undo()
    monkeypatch.setenv("KFP_ENDPOINT", server.url)
    # without uploading, the newest that is there
    code, shown = pirl("submit", "pirl-pretrain", *ARGUMENTS, "--no-upload", "--endpoint", server.url)
    assert code == 0, shown
    assert server.runs[-1]["pipeline_version_reference"]["pipeline_version_id"] == newest


def test_a_wrong_argument_is_told_with_the_nearest_and_nothing_is_sent(pirl: Pirl, server: KfpServer) -> None:
    code, shown = pirl("submit", "pirl-pretrain", *ARGUMENTS, "jop=nodes=4", "min_gain=much", "warm_epochs=1", "oops")
    assert code == 2
    for part in ("4 problems", "'jop'", "'job'", "min_gain: not a number", "'warm_epochs'", "'oops'"):
        assert part in shown
    code, shown = pirl("submit", "pirl-pretrain", "recipe=demo")
    assert code == 2
    assert "train_source is missing" in shown
    assert "root is missing" in shown
    assert not any(request.startswith("POST") for request in server.requests)


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        (["root=/tmp/here"], "s3://"),
        (["root=gs://bucket/x"], "'gs://bucket/x' is not a storage location"),
        (["root=s3://b/x"], "'b' is not a bucket name"),
        (["train_source=http://host/images"], "not a storage location"),
        (["train_source=photos/train"], "a folder of one machine"),
        (["test_source=fashion-mnist:tset"], "fashion-mnist"),
        (["recipe=mine.toml"], "overrides="),
        (["recipe=file:///home/mine.toml"], "which is on this machine"),
        (["recipe=dem"], "demo"),
        (["overrides=train.epoch=3"], "epochs"),
        (["overrides=views.image_scale=[0.3, 2.0]"], "image_scale"),
        (["overrides=train.epochs=[3"], "not closed"),
        (["options=worker=3"], "'workers'"),
        (["options=checkpoint_every_s=NaN"], "checkpoint_every_s"),
        (["backend=spark"], "pytorchjob"),
        (["backend=pytorchjob", "job=nodes=0"], "nodes"),
        (["backend=pytorchjob", "job=nodes=5000"], "nodes"),
        (["nodes=4"], "nodes"),  # of a job, and there is none
        (["model=a/b"], "'a/b' is not a name for a model"),
        (["metric=linaer"], "Did you mean 'linear'"),
        (["min_gain=nan"], "min_gain"),
        (["run=../x"], "without slashes"),
        (["registry=ftp://host"], "not a storage location"),
        (["test_source=s3://bucket/train/"], "the same"),
        (["evaluation=protocol=nosuch"], "unknown protocol"),
        (["evaluation=protocol=zoo"], "the gate does not read the protocol zoo"),
    ],
    ids=str,
)
def test_what_a_step_would_refuse_is_refused_before(
    pirl: Pirl, server: KfpServer, argument: list[str], told: str
) -> None:
    changed = [item.partition("=")[0] for item in argument]
    kept = [item for item in ARGUMENTS if item.partition("=")[0] not in changed]
    code, shown = pirl("submit", "pirl-pretrain", *kept, *argument)
    assert code == 2
    assert told in shown
    assert server.runs == []


def test_problems_of_several_arguments_are_told_at_once(pirl: Pirl, server: KfpServer) -> None:
    wrong = ["overrides=train.epoch=3 model.width=0", "options=keep=0", "model=a/b", "metric=x", "backend=spark"]
    code, shown = pirl("submit", "pirl-pretrain", *ARGUMENTS, *wrong)
    assert code == 2
    for part in ("6 problems", "train.epoch", "model.width", "keep", "'a/b'", "metric 'x'", "'spark'"):
        assert part in shown


def test_settings_of_the_job_are_checked_before(pirl: Pirl, server: KfpServer) -> None:
    code, shown = pirl("submit", "pirl-pretrain", *ARGUMENTS, "backend=pytorchjob", "job=max_restart=3")
    assert code == 2
    assert "max_restarts" in shown
    assert server.runs == []


def test_an_unknown_pipeline(pirl: Pirl, server: KfpServer) -> None:
    code, shown = pirl("submit", "pirl-pretain", "a=1")
    assert code == 1
    assert "'pirl-pretrain'" in shown
    assert server.runs == []


@pytest.mark.usefixtures("s3_environment")
def test_a_dry_run_changes_nothing(pirl: Pirl, server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # no storage there, and no cluster
    monkeypatch.setenv("KUBECONFIG", "/nonexistent")
    code, shown = pirl("submit", "pirl-pretrain", *ARGUMENTS, "--dry-run")
    assert code == 0
    assert "to be uploaded first" in shown
    assert 'root = "s3://bucket/pirl"' in shown
    assert "image of the steps: localhost/pirl-python-steps" in shown
    assert "account of the steps" not in shown
    job = ["backend=trainjob", "job=image=registry.example.com/trainer:7"]
    code, shown = pirl("submit", "pirl-pretrain", *ARGUMENTS, *job, "--step", "image=r.io/steps:7", "--dry-run")
    assert code == 0, shown
    assert "image of the steps: r.io/steps:7\nimage of the job: registry.example.com/trainer:7\n" in shown
    assert "kfp-default-account" in shown
    assert "root: note, not checked from this machine" in shown
    assert "cluster: note, not checked from this machine" in shown
    code, shown = pirl("submit", "pirl-pretrain", *ARGUMENTS, *job, "--service-account", "pirl-launcher", "--dry-run")
    assert "account of the steps: pirl-launcher\n" in shown
    assert {request.split()[0] for request in server.requests} == {"GET"}
    monkeypatch.delenv("KFP_ENDPOINT")
    assert pirl("submit", "pirl-pretrain", *ARGUMENTS, "--dry-run")[0] == 0
    code, shown = pirl("submit", "pirl-pretrain", *ARGUMENTS)
    assert code == 2
    assert "KFP_ENDPOINT" in shown


def test_a_dry_run_lists_storage_and_cluster(
    pirl: Pirl,
    server: KfpServer,
    kubernetes: KubernetesServer,  # noqa: F811
    bucket: str,  # noqa: F811
) -> None:
    open_storage(f"{bucket}/train").write_bytes("a/1.jpg", b"x")
    open_storage(f"{bucket}/test").write_bytes("a/2.jpg", b"x")
    given = ["recipe=demo", f"root={bucket}/pirl", f"train_source={bucket}/train", "backend=pytorchjob"]
    code, shown = pirl("submit", "pirl-pretrain", *given, f"test_source={bucket}/tset", "--dry-run")
    assert code == 1, shown
    assert f"test_source: bad, {bucket}/tset has no objects" in shown
    assert f"train_source: ok, {bucket}/train can be listed" in shown
    assert "API server: ok" in shown
    assert "PyTorchJob: ok" in shown
    code, shown = pirl("submit", "pirl-pretrain", *given, f"test_source={bucket}/test", "--dry-run")
    assert code == 0, shown
    given += [f"test_source={bucket}/test", "job=queue=nowhere"]
    code, shown = pirl("submit", "pirl-pretrain", *given, "--dry-run")
    assert code == 1
    assert "Kueue: bad, not installed, but queue nowhere is asked for" in shown


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["PENDING", "RUNNING", "SUCCEEDED"], 0),
        (["RUNNING", "FAILED"], 1),
        (["CANCELING", "CANCELED"], 1),
        (["RUNNING", "CANCELING", "FAILED"], 1),
        (["SKIPPED"], 1),
    ],
)
def test_waiting_ends_with_the_run_and_tells_how(
    pirl: Pirl, server: KfpServer, monkeypatch: pytest.MonkeyPatch, states: list[str], code: int
) -> None:
    monkeypatch.setattr(backend_module.time, "sleep", lambda seconds: None)
    server.states, server.failed_tasks, server.down = [*states], ["pretrain"] if "FAILED" in states else [], 3
    monkeypatch.setenv("KF_PIPELINES_UI_ENDPOINT", "https://kfp.example.com")
    got, shown = pirl("submit", "pirl-pretrain", *ARGUMENTS, "--wait")
    assert got == code, shown
    assert states[-1] in shown
    assert ("FAILED in pretrain" in shown) == ("FAILED" in states)
    assert ("because it was terminated\n" in shown) == ("CANCELING" in states)
    (run,) = server.runs
    assert f"https://kfp.example.com/#/runs/details/{run['run_id']}" in shown
    assert (f"pipeline/runid={run['run_id']}" in shown) == (code != 0)
    assert server.down == 0  # it was away for a while, and waited for


def test_a_backend_that_is_not_there_or_wants_a_token(
    pirl: Pirl, server: KfpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, shown = pirl("submit", "pirl-pretrain", *ARGUMENTS, "--endpoint", "http://127.0.0.1:9")
    assert code == 1
    assert "port-forward" in shown
    assert "Traceback" not in shown
    server.token = "sesame"
    code, shown = pirl("submit", "pirl-pretrain", *ARGUMENTS)
    assert code == 1
    assert "KFP_TOKEN" in shown
    assert "Traceback" not in shown
    monkeypatch.setenv("KFP_TOKEN", "sesame")
    assert pirl("submit", "pirl-pretrain", *ARGUMENTS)[0] == 0
    assert not any(b"sesame" in body for body in server.bodies)


def test_a_login_page_is_not_taken_for_an_empty_backend(pirl: Pirl, server: KfpServer) -> None:
    server.page = True
    for words in (["schedule", "list"], ["schedule", "list", "--namespace", "mine"]):
        code, shown = pirl(*words)
        assert code == 1
        assert "KFP_TOKEN" in shown


def test_no_credentials_are_sent(pirl: Pirl, server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAPIRLTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "verysecretpirl")
    assert pirl("submit", "pirl-pretrain", *ARGUMENTS)[0] == 0
    sent = b"".join(server.bodies)
    assert b"pirl-s3" in sent  # the Secret's name is all that goes there
    assert b"AKIAPIRLTEST" not in sent
    assert b"verysecretpirl" not in sent


def stock(server: KfpServer, *words: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "kfp"
    return subprocess.run([program, "--endpoint", server.url, *words], capture_output=True, text=True)


def test_upload_prints_the_version_that_the_stock_client_takes(pirl: Pirl, server: KfpServer) -> None:
    ids = [pirl("upload", "pirl-pretrain") for _ in range(2)]
    (version,) = server.versions
    assert ids == [(0, f"{version['pipeline_version_id']}\n")] * 2
    by_name = ["-e", "mine", "-n", "pirl-pretrain", "-v", ids[0][1].strip(), *ARGUMENTS, "run=first"]
    done = stock(server, "run", "create", *by_name)
    assert done.returncode == 0, done.stdout + done.stderr
    code, shown = pirl("upload", "pirl-pretain")
    assert code == 2
    assert "'pirl-pretrain'" in shown


@pytest.mark.parametrize(
    "text",
    [
        'node_selector={"disk":"ssd"}',
        'nodes=2 env={"A":"1","B":"x y"} tolerations=[{"key":"dedicated","operator":"Exists"}]',
        'image=localhost/steps:1 labels={"team": "vision"}',
    ],
)
def test_settings_with_json_in_them_survive_the_stock_client(server: KfpServer, text: str) -> None:
    from pirl.jobs.settings import job_settings
    from pirl.settings import split_items

    file = str(Path(__file__).parent.parent / "pipelines" / "pirl-pretrain.yaml")
    done = stock(server, "run", "create", "-e", "mine", "-f", file, *ARGUMENTS, "run=first", f"job={text}")
    assert done.returncode == 0, done.stdout + done.stderr
    sent = server.runs[-1]["runtime_config"]["parameters"]["job"]
    assert sent == text
    assert job_settings(split_items(sent), {})


def test_the_stock_client_runs_the_compiled_file(server: KfpServer) -> None:
    file = str(Path(__file__).parent.parent / "pipelines" / "pirl-pretrain.yaml")
    done = stock(server, "run", "create", "-e", "mine", "-f", file, *ARGUMENTS, "run=first", "min_gain=0.5")
    assert done.returncode == 0, done.stdout + done.stderr
    given: dict[str, Any] = server.runs[0]["runtime_config"]["parameters"]
    assert (given["run"], given["min_gain"]) == ("first", 0.5)
    assert stock(server, "pipeline", "create", "-p", "pirl-pretrain", file).returncode == 0
    version = server.versions[0]["pipeline_version_id"]
    by_name = ["run", "submit", "-e", "mine", "-n", "pirl-pretrain", "-v", version, *ARGUMENTS, "run=second"]
    done = stock(server, *by_name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert server.runs[1]["pipeline_version_reference"]["pipeline_version_id"] == version
    assert stock(server, "run", "submit", "-e", "mine", "pirl-pretrain").returncode != 0  # why there is `pirl submit`
