"""The DAG: what it compiles to, and what it does on this machine, in real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY
from images import folder_of_classes
from kfp import compiler

from pipelines.local import require_steps, run_local
from pipelines.pretrain import pirl_pretrain
from pirl.errors import PirlError, UsageError
from pirl.registry import Registry
from pirl.storage import Storage

STEPS = {"shard-train", "shard-test", "pretrain", "linear_eval", "gate", "report"}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("dag")
    (root / "tiny.toml").write_text(TINY)
    return {
        "train_source": str(folder_of_classes(root / "train", classes=3, images=8, width=24, height=20)),
        "test_source": str(folder_of_classes(root / "test", classes=3, images=2, width=24, height=20)),
        "root": str(root / "out"),
        "run": "tiny",
        "recipe": str(root / "tiny.toml"),
        "overrides": "train.epochs=1 loss.negatives=8",
        "processes": 1,
    }


@pytest.fixture(scope="module")
def rejected(arguments: dict[str, Any]) -> Storage:
    """The DAG with a gate that nothing passes."""
    return run_local(**arguments, min_gain=2.0)


@pytest.fixture(scope="module")
def facts(rejected: Storage) -> dict[str, Any]:
    """What the first run left, before anything repeats it."""
    return {name: rejected.read_bytes(name) for name in rejected.list() if not name.startswith("checkpoints")}


@pytest.fixture(scope="module")
def promoted(arguments: dict[str, Any], facts: dict[str, Any]) -> Storage:
    """The same run again, with a gate that everything passes."""
    return run_local(**arguments, min_gain=-1.0)


def test_a_rejected_run_says_why_and_is_not_registered(facts: dict[str, Any], arguments: dict[str, Any]) -> None:
    gate = json.loads(facts["gate.json"])
    assert gate["promote"] is False
    assert "not more than 200.00" in gate["reasons"][0]
    assert "registered.json" not in facts
    assert Registry(f"{arguments['root']}/registry").models() == []
    assert {name.split("/")[1].removesuffix(".json") for name in facts if name.startswith("steps/")} == STEPS
    assert b"not more than 200.00" in facts["report.html"]


def test_every_image_went_in(facts: dict[str, Any]) -> None:
    assert json.loads(facts["DONE.json"])["images_seen"] == 24
    evaluation = json.loads(facts["eval.json"])
    assert (evaluation["train_images"], evaluation["test_images"]) == (24, 6)
    assert evaluation["classes"] == ["class0", "class1", "class2"]


def test_repeating_it_trains_nothing_again_and_registers(
    promoted: Storage, facts: dict[str, Any], arguments: dict[str, Any]
) -> None:
    assert promoted.read_bytes("DONE.json") == facts["DONE.json"]
    assert promoted.read_bytes("metrics.jsonl") == facts["metrics.jsonl"]
    assert promoted.read_bytes("eval.json") == facts["eval.json"]
    champion = Registry(f"{arguments['root']}/registry").get("pirl", "champion", verify=True)
    assert champion.record["lineage"]["data_digest"] == json.loads(facts["DONE.json"])["data_digest"]
    assert champion.record["metrics"] == json.loads(facts["eval.json"])
    assert champion.version.encode() in promoted.read_bytes("report.html")


def test_registering_again_gives_the_same_version(promoted: Storage, arguments: dict[str, Any]) -> None:
    from pirl.registry import register_run

    before = promoted.read_json("registered.json")
    assert register_run(promoted.uri, f"{arguments['root']}/registry", "pirl").version == before["version"]
    assert len(Registry(f"{arguments['root']}/registry").versions("pirl")) == 1


def test_a_step_that_was_skipped_silently_is_an_error(promoted: Storage) -> None:
    with pytest.raises(PirlError, match="without having run shard-train, shard-test, pretrain"):
        require_steps(promoted, since=4e9)


def test_a_failing_step_stops_the_pipeline_with_its_name(
    arguments: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PirlError, match="'shard'"):
        run_local(**{**arguments, "root": str(tmp_path), "train_source": str(tmp_path / "nothing")})
    shown = capfd.readouterr()
    assert "nothing" in shown.out + shown.err
    assert "Traceback" not in shown.out + shown.err


def test_a_word_that_the_local_runner_would_change_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="python3"):
        run_local(**{**arguments, "root": "/tmp/python3-stuff"})


def test_it_compiles_to_what_a_backend_needs(tmp_path: Path) -> None:
    compiler.Compiler().compile(pirl_pretrain, str(tmp_path / "dag.yaml"))
    text = (tmp_path / "dag.yaml").read_text()
    spec = next(yaml.safe_load_all(text))
    assert spec["pipelineInfo"]["name"] == "pirl-pretrain"
    branches = {name: task for name, task in spec["root"]["dag"]["tasks"].items() if name.startswith("condition")}
    inside = [spec["components"][name]["dag"]["tasks"] for name in spec["components"] if "condition-" in name]
    steps = {name for tasks in [spec["root"]["dag"]["tasks"], *inside] for name in tasks}
    assert {"shard", "shard-2", "pretrain", "linear-eval", "gate", "register", "report"} <= steps
    assert len(branches) == 1, "one group with If and Else: a bare If is skipped silently by the local runner"
    for executor in spec["deploymentSpec"]["executors"].values():
        container = executor["container"]
        assert "latest" not in container["image"]
        assert "pip" not in " ".join(container["command"]), "images carry everything: nothing is installed at run time"
    assert "python3-" not in text, "the local runner would change the word"
    enabled = [
        task
        for tasks in [spec["root"]["dag"]["tasks"], *inside]
        for task in tasks.values()
        if task.get("cachingOptions", {}).get("enableCache")
    ]
    assert enabled == [], "a step knows by content whether its work is done; a cache would guess by names"
