"""Alerts and dashboard of `manifests/overlays/monitoring`, by the real `promtool` and a real Prometheus."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from conftest import TINY, TRAIN
from test_manifests import pod_templates
from test_operations import TEXT

from pirl.backends import KINDS
from pirl.jobs.kind import JobKind
from pirl.jobs.pod import METRICS_PORT, build_job
from pirl.jobs.settings import JobSettings
from pirl.metrics.table import METRICS, TASKS
from pirl.programs import Training
from pirl.training.spec import TrainingSpec

OVERLAY = Path(__file__).parent.parent / "manifests" / "overlays" / "monitoring"
GROUPS = yaml.safe_load((OVERLAY / "alerts.yaml").read_text())["spec"]["groups"]
RULES = {rule["alert"]: rule for group in GROUPS for rule in group["rules"]}
DASHBOARD = json.loads((OVERLAY / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = {f"{panel['title']} {target['refId']}": target["expr"] for panel in PANELS for target in panel["targets"]}

needs_prometheus = pytest.mark.skipif(
    shutil.which("promtool") is None or shutil.which("prometheus") is None,
    reason="promtool and prometheus are not installed (Debian: apt-get install prometheus)",
)

Fires = set[tuple[str, str]]  # alert, and the rank where it names one


def training(
    length: int = 120, ranks: tuple[tuple[int, int, int], ...] = ((6, 18, 36), (7, 20, 33), (6, 19, 35)), **changes: Any
) -> dict[str, str]:
    """Series of the run `a` by a sample a minute, as promtool writes them, that end after `length` minutes.

    ranks: seconds a minute of each in data, forward and backward. changes: other values; None for no such series.
    """
    names = {
        "steps": "pirl_training_steps_total",
        "restarts": "pirl_training_restarts_total",
        "failures": "pirl_checkpoint_failures_total",
        "saved": "pirl_checkpoint_last_success_timestamp_seconds",
        "bad": "pirl_training_nonfinite_timestamp_seconds",
    }
    usual = {"steps": "0+60", "restarts": "0", "failures": "0", "saved": "0+60", "bad": None}
    values = {key: changes.get(key, f"{text}x{length} stale" if text else None) for key, text in usual.items()}
    found = {f'{names[key]}{{namespace="pirl",pod="a-0",run="a"}}': text for key, text in values.items() if text}
    up = changes.get("up", f"1x{length} stale")
    if (progress := changes.get("evaluation")) is not None:
        found = {
            f'pirl_evaluation_progress_ratio{{namespace="pirl",phase="{phase}",pod="a-e",run="a"}}': text
            for phase, text in progress.items()
        }
        ranks = ()
    found['up{job="pirl/pirl-training",namespace="pirl",pirl_dev_run="a"}'] = up
    for rank, parts in enumerate(ranks):
        for part, seconds in zip(("data", "forward", "backward"), parts, strict=True):
            labels = f'namespace="pirl",part="{part}",pod="a-{rank}",rank="{rank}",run="a"'
            found[f"pirl_training_step_seconds_total{{{labels}}}"] = f"0+{seconds}x{length} stale"
    return found


def in_another_pod(series: dict[str, str], **values: str) -> dict[str, str]:
    """And rank 0 is in the pod `a-9` later."""
    more = {"steps": "pirl_training_steps_total", "restarts": "pirl_training_restarts_total"}
    return series | {f'{more[key]}{{namespace="pirl",pod="a-9",run="a"}}': text for key, text in values.items()}


class Case(NamedTuple):
    """At these minutes exactly these alerts fire."""

    name: str
    series: dict[str, str]
    fires: dict[int, Fires]


def alert(name: str, rank: str = "") -> Fires:
    return {(f"Pirl{name}", rank)}


NONE: Fires = set()
CASES = [
    Case("healthy, and finished after 70 minutes", training(70), dict.fromkeys((1, 5, 16, 40, 70, 71, 76, 90), NONE)),
    Case(
        "restarted once in its pod, where counters begin anew",
        training(steps="0+60x30 _x3 0+60x60 stale", restarts="0x30 _x3 1x60 stale"),
        dict.fromkeys((30, 33, 35, 45, 60, 110), NONE),
    ),
    Case(
        "restarted once in another pod",
        in_another_pod(
            training(steps="0+60x30 stale", restarts="0x30 stale"), steps="_x34 0+60x60", restarts="_x34 1x60"
        ),
        dict.fromkeys((30, 33, 35, 45, 60), NONE),
    ),
    Case(
        "no more steps, and deleted at last",
        training(90, steps="0+60x30 1800x59 stale"),
        {30: NONE, 43: NONE, 46: alert("TrainingStalled"), 90: alert("TrainingStalled"), 97: NONE},
    ),
    Case(
        "an evaluation whose second phase stalls, and deleted at last",
        training(evaluation={"features": "0+0.05x20 1x69 stale", "probes": "_x20 0+0.02x30 0.6x38 stale"}),
        {15: NONE, 30: NONE, 58: NONE, 74: alert("EvaluationStalled"), 88: alert("EvaluationStalled"), 102: NONE},
    ),
    Case(
        "an evaluation one of whose pods does not answer",
        training(evaluation={"features": "0+0.001x120 stale"}, up="0x40 1x80"),
        {14: NONE, 20: alert("TrainingSilent"), 45: NONE},
    ),
    Case("never a first step", training(steps="0x120"), {8: NONE, 12: alert("TrainingStalled")}),
    Case("a first step after six minutes", training(steps="0x6 0+60x90"), dict.fromkeys((6, 8, 12, 20), NONE)),
    Case(
        "pods that answer late",
        training(up="0x20 1x60"),
        {14: NONE, 16: alert("TrainingSilent"), 20: alert("TrainingSilent"), 22: NONE},
    ),
    Case(
        "waits for images",
        training(60, ranks=((30, 10, 20),) * 3),
        {14: NONE, 25: alert("DataStarved"), 60: alert("DataStarved"), 75: NONE},
    ),
    Case("the host waits, and its GPU works", training(ranks=((40, 20, 38),) * 3), dict.fromkeys((20, 60), NONE)),
    Case(
        "a loss that is none, a restart, and the end of the job",
        training(45, bad="_x30 1740x15 stale"),
        {29: NONE, 31: alert("LossNotFinite"), 50: alert("LossNotFinite"), 60: NONE},
    ),
    Case(
        "a loss that is none, once",
        training(bad="_x30 1740x90"),
        {31: alert("LossNotFinite"), 88: alert("LossNotFinite"), 90: NONE, 110: NONE},
    ),
    Case(
        "nothing saved any more, and deleted at last",
        training(100, saved="0+60x30 1800x69 stale"),
        {30: NONE, 69: NONE, 72: alert("CheckpointTooOld"), 100: alert("CheckpointTooOld"), 101: NONE},
    ),
    Case("resumed after a day", training(saved="-86400x5 300+60x80"), dict.fromkeys((1, 5, 7, 20), NONE)),
    Case("one save failed", training(failures="0x30 1x60"), dict.fromkeys((31, 40), NONE)),
    Case(
        "saves fail for some minutes",
        training(failures="0x30 1 2 3 4 5 5x60"),
        {30: NONE, 31: NONE, 35: alert("CheckpointFailing"), 52: NONE},
    ),
    Case(
        "three restarts within ten minutes, then quiet",
        training(restarts="0x20 _ 1x2 _ 2x2 _ 3x90"),
        {25: NONE, 30: alert("TrainingRestarts"), 75: alert("TrainingRestarts"), 82: NONE},
    ),
    Case(
        "restarts from pod to pod, then finished",
        in_another_pod(training(40, restarts="0x20 1 1 stale"), restarts="_x24 2x4 3x12 stale"),
        {26: NONE, 31: alert("TrainingRestarts"), 40: alert("TrainingRestarts"), 52: NONE},
    ),
    Case(
        "one rank computes more slowly",
        training(60, ranks=((3, 20, 37), (3, 20, 37), (3, 38, 19))),
        {14: NONE, 25: alert("SlowRank", "2"), 60: alert("SlowRank", "2"), 76: NONE},
    ),
    Case(
        "rank 0 waits for data, and the others in `forward` for rank 0",
        training(ranks=((24, 18, 18), (3, 39, 18), (3, 39, 18))),
        {30: alert("SlowRank", "0")},
    ),
    Case("the same with two ranks", training(ranks=((20, 18, 22), (3, 35, 22))), {30: alert("SlowRank", "0")}),
    Case("one rank of two", training(ranks=((3, 18, 39), (20, 18, 22))), {30: alert("SlowRank", "1")}),
    Case("one rank is faster", training(ranks=((3, 5, 52), (3, 20, 37), (3, 20, 37))), dict.fromkeys((30, 60), NONE)),
    Case("one rank alone", training(ranks=((6, 30, 20),)), dict.fromkeys((20, 60), NONE)),
]


def test_every_alert_fires_in_a_case_and_is_over_in_it() -> None:
    for name in RULES:
        assert any(
            name in {each for each, _ in case.fires[minute]} and not case.fires[max(case.fires)]
            for case in CASES
            for minute in case.fires
        ), name


@needs_prometheus
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_alerts_fire_when_they_should_and_only_then(case: Case, tmp_path: Path) -> None:
    def sample(name: str, rank: str) -> dict[str, Any]:
        run = "pirl_dev_run" if name == "PirlTrainingSilent" else "run"
        labels = {"alertname": name, "alertstate": "firing", "namespace": "pirl", run: "a"}
        labels |= {"severity": RULES[name]["labels"]["severity"]} | ({"rank": rank} if rank else {})
        return {"labels": "ALERTS{" + ",".join(f'{k}="{v}"' for k, v in labels.items()) + "}", "value": 1}

    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "promql_expr_test": [
            {
                "expr": 'ALERTS{alertstate="firing"}',
                "eval_time": f"{minute}m",
                "exp_samples": [sample(*each) for each in fires],
            }
            for minute, fires in case.fires.items()
        ],
    }
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump({"groups": GROUPS}))
    whole = {"rule_files": ["alerts.yaml"], "evaluation_interval": "1m", "tests": [test]}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(whole))
    done = subprocess.run(["promtool", "test", "rules", tmp_path / "test.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_promtool_finds_nothing_to_say_about_the_rules(tmp_path: Path) -> None:
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump({"groups": GROUPS}))
    command = ["promtool", "check", "rules", "--lint-fatal", "--lint=all", tmp_path / "alerts.yaml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", RULES)
def test_an_alert_says_which_run_how_bad_and_where_to_read_on(name: str) -> None:
    rule = RULES[name]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert re.search(r"{{ \$labels\.(pirl_dev_)?run }}", rule["annotations"]["summary"])
    assert re.search(r"{{ \$labels\.(pirl_dev_)?run }}", rule["annotations"]["description"])
    assert rule["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
    assert f"\n### {name}\n" in TEXT


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_monitor_finds_the_pods_of_a_training(kind: JobKind) -> None:
    spec = yaml.safe_load((OVERLAY / "pod-monitor.yaml").read_text())["spec"]
    program = Training(TrainingSpec.parse("demo", data="s3://bucket/data", out="s3://bucket/run"))
    (template,) = pod_templates(build_job(kind, program, JobSettings(image="i:1")))
    assert spec["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert set(spec["podTargetLabels"]) <= template["metadata"]["labels"].keys()
    ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
    assert [ports[endpoint["port"]] for endpoint in spec["podMetricsEndpoints"]] == [METRICS_PORT]


def test_every_panel_can_be_read_by_a_stranger() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert all(target["legendFormat"] for target in panel["targets"])
    taken = [
        (x, y)
        for area in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(area["x"], area["x"] + area["w"])
        for y in range(area["y"], area["y"] + area["h"])
    ]
    assert len(taken) == len(set(taken)), "panels overlap"
    assert max(x for x, _ in taken) < 24, "Grafana's grid has 24 columns"


def test_the_dashboard_shows_every_metric_of_a_training() -> None:
    shown = set(re.findall(r"pirl_\w+", " ".join(QUERIES.values())))
    shown = {name.removesuffix("_bucket") for name in shown}
    by_alert = {"pirl_training_nonfinite_timestamp_seconds"}
    derived = {"pirl_training_images_total"}  # its rate is shown as the training itself tells it
    evaluation = {"pirl_evaluation_progress_ratio", "pirl_evaluation_throughput"}
    assert shown | by_alert | derived == METRICS.keys() - {metric.name for metric in TASKS} | evaluation


@pytest.fixture(scope="module")
def ask(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Asks the HTTP API of a Prometheus with these alerts, which scrapes a training of two ranks."""
    folder = tmp_path_factory.mktemp("monitoring")
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        port, web = one.getsockname()[1], two.getsockname()[1]
    (folder / "tiny.toml").write_text(TINY)
    (folder / "alerts.yaml").write_text(yaml.safe_dump({"groups": GROUPS}))
    target = {"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "pirl", "pod": "run-0", "pirl_dev_run": "run"}}
    settings = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["alerts.yaml"],
        "scrape_configs": [{"job_name": "pirl/pirl-training", "static_configs": [target]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    train = [*TRAIN, folder / "tiny.toml", "train.epochs=100000", "--data", shards]
    train += ["--out", folder / "run", "--processes", "2", "--log-every", "1", "--checkpoint-every-s", "1"]
    prometheus = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    prometheus += [f"--web.listen-address=127.0.0.1:{web}", "--log.level=warn"]
    environment = {**os.environ, "PIRL_METRICS_PORT": str(port), "OMP_NUM_THREADS": "1"}

    def asked(path: str, **values: Any) -> Any:
        query = urllib.parse.urlencode(values)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{web}/api/v1/{path}?{query}", timeout=10) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            pytest.fail(f"{values}: {error.read().decode()}")

    log = (folder / "log").open("ab")
    started = [subprocess.Popen(command, env=environment, stdout=log, stderr=log) for command in (train, prometheus)]
    try:
        deadline = time.monotonic() + 300
        while True:
            assert time.monotonic() < deadline, (folder / "log").read_text()
            assert [process.poll() for process in started] == [None, None], (folder / "log").read_text()
            time.sleep(0.5)
            try:  # a rate needs several scrapes of a training that steps and saves
                found = asked("query", query="count_over_time((pirl_checkpoints_total > 1)[1m:1s])")["result"]
            except OSError:
                continue
            if found and float(found[0]["value"][1]) >= 8:
                break
        yield asked
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(60)
        log.close()


def filled(query: str, **variables: str) -> str:
    """As Grafana puts its variables in."""
    variables = {"namespace": "pirl", "run": "run", "__rate_interval": "30s", **variables}
    return re.sub(r"\$(\w+)", lambda found: variables[found[1]], query)


@needs_prometheus
@pytest.mark.parametrize("name", QUERIES)
def test_a_query_of_the_dashboard_finds_what_a_training_tells(name: str, ask: Callable[..., Any]) -> None:
    result = ask("query", query=filled(QUERIES[name]))["result"]
    if name.startswith(("GPU memory", "Evaluation")):
        assert result == []  # there is none in a training on a CPU
        return
    legend = next(
        target["legendFormat"] for panel in PANELS for target in panel["targets"] if target["expr"] == QUERIES[name]
    )
    assert result
    for series in result:
        assert set(re.findall(r"{{(\w+)}}", legend)) <= series["metric"].keys(), "a legend without its label"
        assert float(series["value"][1]) >= 0  # and a number
    assert len({json.dumps(series["metric"], sort_keys=True) for series in result}) == len(result)
    assert ask("query", query=filled(QUERIES[name], run="another"))["result"] == []


@needs_prometheus
def test_the_variables_of_the_dashboard_list_the_run(ask: Callable[..., Any]) -> None:
    found = {}
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
            found[variable["name"]] = ask(f"label/{label}/values", **{"match[]": filled(metric)})
    assert found == {"namespace": ["pirl"], "run": ["run"]}


@needs_prometheus
def test_a_real_training_sets_no_alert_off(ask: Callable[..., Any]) -> None:
    """Prometheus itself has evaluated each of them, without an error."""
    rules = [rule for group in ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == RULES.keys()
    for rule in rules:
        assert (rule["health"], rule.get("lastError", "")) == ("ok", "")
        assert rule["state"] != "firing", rule
        ask("query", query=RULES[rule["name"]]["expr"])
    assert ask("query", query='up{job=~".*/pirl-training"}')["result"][0]["value"][1] == "1"
