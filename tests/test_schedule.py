"""`pirl schedule`: one enabled recurring run of a name, whatever happened before."""

from __future__ import annotations

import json

import pytest
from kfp_server import KfpServer
from test_submit import ARGUMENTS, Pirl, pirl, server  # noqa: F401

from pirl.cli.schedule import six_fields
from pirl.errors import UsageError

WEEKLY = ["schedule", "pirl-pretrain", "--cron", "0 2 * * 0", *ARGUMENTS]


def test_one_enabled_schedule_with_typed_arguments(pirl: Pirl, server: KfpServer) -> None:  # noqa: F811
    code, shown = pirl(*WEEKLY, "min_gain=0.5")
    assert code == 0, shown
    assert "created" in shown
    (made,) = server.schedules
    assert (made["display_name"], made["mode"], made["status"]) == ("pirl-pretrain", "ENABLE", "ENABLED")
    assert (made["no_catchup"], made["max_concurrency"]) == (True, "1")
    assert made["trigger"] == {"cron_schedule": {"cron": "0 0 2 * * 0"}}
    assert made["runtime_config"]["parameters"]["min_gain"] == 0.5
    assert server.runs == []
    code, shown = pirl(*WEEKLY, "min_gain=0.5")
    assert code == 0
    assert "unchanged" in shown
    assert server.schedules == [made]


@pytest.mark.parametrize("change", [["--cron", "0 3 * * 0"], ["min_gain=0.25"], ["model=other"]])
def test_a_change_replaces_it(pirl: Pirl, server: KfpServer, change: list[str]) -> None:  # noqa: F811
    pirl(*WEEKLY)
    before = server.schedules[0]["recurring_run_id"]
    code, shown = pirl(*WEEKLY, *change)
    assert code == 0, shown
    assert "updated" in shown
    assert [one["recurring_run_id"] == before for one in server.schedules] == [False]
    assert server.requests[-1] == f"DELETE /apis/v2beta1/recurringruns/{before}"  # after the new one was made


def test_a_failure_in_between_leaves_one_that_works_and_is_mended(
    pirl: Pirl,  # noqa: F811
    server: KfpServer,  # noqa: F811
) -> None:
    pirl(*WEEKLY)
    server.refuse = "POST .*/recurringruns"
    assert pirl(*WEEKLY, "model=other")[0] == 1
    assert [one["runtime_config"]["parameters"].get("model") for one in server.schedules] == [None]
    server.refuse = "DELETE"
    assert pirl(*WEEKLY, "model=other")[0] == 1
    assert len(server.schedules) == 2
    server.refuse = ""
    assert "updated" in pirl(*WEEKLY, "model=other")[1]
    assert [one["runtime_config"]["parameters"]["model"] for one in server.schedules] == ["other"]


def test_a_run_that_goes_is_not_deleted_with_its_schedule(pirl: Pirl, server: KfpServer) -> None:  # noqa: F811
    pirl(*WEEKLY)
    run = server.tick(server.schedules[0], "RUNNING")
    assert "updated" in pirl(*WEEKLY, "model=other")[1]
    assert [one["status"] for one in server.schedules] == ["DISABLED", "ENABLED"]
    pirl("schedule", "pause", "pirl-pretrain")
    pirl("schedule", "resume", "pirl-pretrain")
    assert [one["status"] for one in server.schedules] == ["DISABLED", "ENABLED"]
    code, shown = pirl("schedule", "delete", "pirl-pretrain")
    assert code == 1
    assert run["run_id"] in shown
    run["state"] = "SUCCEEDED"
    assert "updated" in pirl(*WEEKLY, "model=other")[1]
    assert [one["status"] for one in server.schedules] == ["ENABLED"]


def test_a_retraining(pirl: Pirl, server: KfpServer) -> None:  # noqa: F811
    code, shown = pirl("schedule", "pirl-retrain", "--cron", "@daily", *ARGUMENTS, "warm_epochs=5")
    assert code == 0, shown
    (made,) = server.schedules
    assert made["runtime_config"]["parameters"]["warm_epochs"] == 5
    assert "run" not in made["runtime_config"]["parameters"]


def test_list_pause_resume_delete(pirl: Pirl, server: KfpServer) -> None:  # noqa: F811
    pirl(*WEEKLY)
    pirl(*WEEKLY, "--name", "second")
    rows = json.loads(pirl("schedule", "list", "--json")[1])
    assert [(row["name"], row["enabled"], row["cron"]) for row in rows] == [
        ("second", True, "0 0 2 * * 0"),
        ("pirl-pretrain", True, "0 0 2 * * 0"),
    ]
    assert pirl("schedule", "pause", "second")[0] == 0
    assert [one["status"] for one in server.schedules] == ["ENABLED", "DISABLED"]
    assert pirl("schedule", "resume", "second")[0] == 0
    assert [one["status"] for one in server.schedules] == ["ENABLED", "ENABLED"]
    pirl("schedule", "pause", "second")
    assert "updated" in pirl(*WEEKLY, "--name", "second")[1]  # to set it is to want it running
    assert [one["status"] for one in server.schedules] == ["ENABLED", "ENABLED"]
    assert pirl("schedule", "delete", "second")[0] == 0
    assert [one["display_name"] for one in server.schedules] == ["pirl-pretrain"]
    code, shown = pirl("schedule", "pause", "pirl-pretain")
    assert code == 2
    assert "'pirl-pretrain'" in shown


def test_a_dry_run_changes_nothing(pirl: Pirl, server: KfpServer) -> None:  # noqa: F811
    code, shown = pirl(*WEEKLY, "--dry-run")
    assert code == 0
    assert "0 0 2 * * 0" in shown
    assert {request.split()[0] for request in server.requests} == {"GET"}


@pytest.mark.parametrize(
    ("cron", "six"), [("0 2 * * 0", "0 0 2 * * 0"), ("30 0 2 * * MON-FRI", "30 0 2 * * MON-FRI"), ("@daily", "@daily")]
)
def test_cron_expressions(cron: str, six: str) -> None:
    assert six_fields(cron) == six


@pytest.mark.parametrize("cron", ["", "2 * *", "0 2 * * 0 1 1", "a b c; d e", "@sometimes"])
def test_no_cron_expression(cron: str) -> None:
    with pytest.raises(UsageError, match="is not valid"):
        six_fields(cron)
