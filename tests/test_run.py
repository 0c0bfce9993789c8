"""A run's folder: typed contents, folders of version 0.1, damaged files."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from conftest import TINY, warned

from pirl.errors import CheckpointError, StorageError, StorageNotFoundError
from pirl.export.importing import Import
from pirl.layer_results import LayersHeader
from pirl.registry import Catalogue, Registry, Version, VersionRecord
from pirl.results import Completion, Evaluation, GateDecision, GateQuestion, Registered, StepRecord, WarmRecord
from pirl.run import Record, Run, Workspace
from pirl.runs import list_runs
from pirl.storage import open_storage
from pirl.training.state import TrainState

SCORES = {
    name: {"top1": {"mean": 0.5, "std": 0.01, "runs": [0.49, 0.51]}, "top5": {"mean": 1.0, "std": 0.0, "runs": [1.0]}}
    for name in ("linear", "linear_1pct", "knn")
}
OLD: dict[str, dict[str, Any]] = {  # as version 0.1 wrote them
    "DONE.json": {
        "steps": 10,
        "epochs": 2,
        "images_seen": 84,
        "seconds": 1.5,
        "checkpoint": "file:///gone/runs/a/checkpoints/step-00000010",
        "recipe": "tiny",
        "recipe_digest": "r",
        "data_digest": "d",
        "ranks": 1,
        "version": "0.1.0",
    },
    "eval.json": {
        "checkpoint": "file:///gone/runs/a/checkpoints/step-00000010",
        "train_data": "d",
        "test_data": "t",
        "train_images": 42,
        "test_images": 12,
        "classes": ["a", "b"],
        "protocol": {"seeds": [0, 1], "label_share": 0.01, "neighbours": 20, "resize": 16, "crop": 16},
        "pretrained": SCORES,
        "random": SCORES,
        "bank": {"top1": {"mean": 0.4, "std": 0.1, "runs": [0.4]}, "rows": 42, "dim": 8},
        "seconds": 2.0,
    },
    "gate.json": {"promote": True, "metric": "linear_1pct", "min_gain": 0.01, "reasons": ["good"]},
    "registered.json": {"model": "m", "version": "v0001", "uri": "file:///r/m/versions/v0001"},
    "steps/gate.json": {"step": "gate", "started": 2.0, "seconds": 0.1, "peak_rss_bytes": 5, "last_started": 2.0},
    "steps/pretrain.json": {"step": "pretrain", "started": 1.0, "seconds": 9.0, "peak_rss_bytes": 5},
}


@pytest.fixture
def old(tmp_path: Path) -> Run:
    """A run's folder of version 0.1."""
    run = Run.at(str(tmp_path / "runs" / "a"))
    for name, content in OLD.items():
        run.storage.write_json(name, content)
    run.storage.write_bytes("config.toml", TINY.encode())
    run.storage.write_bytes("metrics.jsonl", b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n')
    return run


def test_a_folder_of_version_0_1_is_read(old: Run) -> None:
    completion, evaluation, gate, registered = old.completion(), old.evaluation(), old.gate(), old.registered()
    assert completion
    assert (completion.steps, completion.checkpoint_name) == (10, "step-00000010")
    assert evaluation
    assert evaluation.pretrained["linear_1pct"].top1.mean == 0.5
    assert (evaluation.checkpoint_name, evaluation.weights, evaluation.commit) == ("step-00000010", "", "")
    assert evaluation.bank
    assert evaluation.protocol.label_share == 0.01
    assert evaluation.to_json()["protocol"] == OLD["eval.json"]["protocol"]
    assert gate
    assert (gate.promote, gate.reasons) == (True, ["good"])
    assert registered
    assert registered.version == "v0001"
    assert [step.step for step in old.steps()] == ["pretrain", "gate"]
    assert old.recipe().name == "tiny"


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    run = Run.at(str(tmp_path / "run"))
    completion = Completion(**OLD["DONE.json"])
    evaluation = Evaluation.parse(OLD["eval.json"], "here").model_copy(update={"weights": "w", "commit": "c"})
    gate = GateDecision(promote=False, reasons=["no"], metric="knn", min_gain=0.0, model="m", weights="w")
    run.complete(completion)
    run.save_evaluation(evaluation)
    run.save_gate(gate)
    run.save_registered(Registered(model="m", version="v1", uri="u"))
    run.save_warm_start(WarmRecord(source="old", rows=5, kept=4))
    run.save_step(StepRecord(step="gate", started=1, seconds=2))
    assert run.completion() == completion
    assert run.evaluation() == evaluation
    assert run.gate() == gate
    assert run.warm_start() == WarmRecord(source="old", rows=5, kept=4)
    assert run.storage.read_json("warm.json") == {"format": 1, "from": "old", "rows": 5, "kept": 4}
    assert run.storage.read_json("gate.json")["format"] == 1
    assert run.step("gate") == StepRecord(step="gate", started=1, seconds=2)


def test_a_decision_counts_for_its_question_only() -> None:
    question = GateQuestion(metric="knn", min_gain=0.01, model="m", registry="r", champion="v0001", weights="w")
    decision = GateDecision(promote=False, reasons=[], **question.model_dump())
    assert decision.answers(question)
    for change in ({"metric": "linear"}, {"min_gain": 0.0}, {"model": "n"}, {"registry": "s"}, {"champion": "v0002"}):
        assert not decision.answers(question.model_copy(update=change))
    assert not GateDecision.parse(OLD["gate.json"], "a folder of 0.1").answers(question)


def test_what_is_absent_is_none(tmp_path: Path) -> None:
    run = Run.at(str(tmp_path / "run"))
    contents = (run.completion(), run.evaluation(), run.gate(), run.registered(), run.layers(), run.warm_start())
    assert contents == (None,) * 6
    assert run.steps() == []
    assert (run.record().metrics, run.record().events) == ([], [])
    assert not run.exists()
    with pytest.raises(StorageNotFoundError, match="does not hold a run"):
        run.recipe()


@pytest.mark.parametrize("name", ["DONE.json", "eval.json", "gate.json", "registered.json"])
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 99}'])
def test_a_damaged_content_names_the_file_and_the_command_that_fixes_it(old: Run, name: str, content: str) -> None:
    old.storage.write_bytes(name, content.encode())
    read = {
        "DONE.json": old.completion,
        "eval.json": old.evaluation,
        "gate.json": old.gate,
        "registered.json": old.registered,
    }[name]
    with pytest.raises(StorageError) as caught:
        read()
    assert f"{old.uri}/{name}" in str(caught.value)
    assert caught.value.hint


def test_a_score_that_is_not_finite_is_damage(old: Run) -> None:
    text = json.dumps(OLD["eval.json"]).replace("0.5,", "NaN,", 1)
    old.storage.write_bytes("eval.json", text.encode())
    with pytest.raises(StorageError, match="finite"):
        old.evaluation()


def test_a_line_that_is_cut_off_is_left_out_with_a_warning(old: Run) -> None:
    whole = b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n'
    for tail in (b'{"step": 3, "lo', b"\xff\xfe", b"3\n"):
        old.storage.write_bytes("metrics.jsonl", whole + tail)
        with warned(r"metrics.jsonl has 1 line that cannot be read"):
            assert [line["step"] for line in old.record().metrics] == [1, 2]


def test_a_line_of_another_kind_is_left_out_and_a_newer_value_is_kept(old: Run) -> None:
    old.storage.write_bytes("metrics.jsonl", b'{"step": 1, "newer": 4}\n{"loss": 2.0}\n{"step": 2, "loss": "?"}\n')
    old.storage.write_bytes("events.jsonl", b'{"event": "start", "time": 5.0, "ranks": 1}\n{"event": "start"}\n')
    with warned(r"metrics.jsonl has 2 lines that cannot be read"):
        record = old.record()
    assert record.metrics == [{"step": 1, "newer": 4}]
    assert [event["event"] for event in record.events] == ["start"]


def test_a_result_by_layers_of_version_0_1_is_read(old: Run) -> None:
    """It had no format number, no digest of the weights and the URI of its checkpoint."""
    rates = {"res5": 0.5}
    head = {"layer": "res5", "pooling": "AvgPool2d()", "features": 8192, "batch_norm": True}
    epoch = {"epoch": 1, "lr": 0.01, "loss": {"res5": 2.0}, "top1": rates, "top5": rates, "seconds": 3.0}
    content = {
        "checkpoint": "file:///gone/runs/a/checkpoints/step-00000010",
        "train_data": "d",
        "test_data": "t",
        "train_images": 42,
        "test_images": 12,
        "classes": ["a", "b"],
        "protocol": {
            "name": "zoo",
            "epochs": 1,
            "batch_size": 8,
            "lr_drops": [],
            "resize": 16,
            "crop": 16,
            "heads": {"res5": head},
        },
        "differences": [],
        "top1": rates,
        "top5": rates,
        "epochs": [epoch],
        "seconds": 4.0,
    }
    old.storage.write_json("eval_zoo.json", content)
    layers = old.layers()
    assert layers
    assert (layers.top1, layers.epochs[0].loss, layers.protocol.heads["res5"].features) == (rates, {"res5": 2.0}, 8192)
    header = LayersHeader.model_validate(content)
    assert layers.measures(header)
    assert not layers.measures(header.model_copy(update={"weights": "w"}))
    assert (layers.format, layers.protocol.schedule, layers.ranks) == (1, "imagenet", 1)


@pytest.mark.parametrize("kind", [Run, Record, Version, VersionRecord, Registry, Catalogue, Import, TrainState])
def test_what_flows_between_steps_has_a_type(kind: type) -> None:
    """No value of a run's folder or of a registry, and no state of a training, is a dictionary of anything."""
    from pirl.checkpoint import Checkpoints, Commit, SavedTraining

    names = {"Checkpoints": Checkpoints, "Commit": Commit, "SavedTraining": SavedTraining}
    methods = [value for name, value in vars(kind).items() if inspect.isfunction(value) and not name.startswith("_")]
    methods += [value.fget for value in vars(kind).values() if isinstance(value, property) and value.fget]
    kinds = [hint for each in [kind, *methods] for hint in get_type_hints(each, localns=names).items()]
    hints = [f"{name}: {hint}" for name, hint in kinds]
    assert hints
    untyped = re.compile(r"(dict|Mapping)\[str, (typing\.Any|object)\]")
    assert [hint for hint in hints if untyped.search(hint)] == []


@pytest.mark.parametrize(
    ("uri", "checkpoint"),
    [("RUN", None), ("RUN/", None), ("RUN/checkpoints", None), ("RUN/checkpoints/step-00000007", "step-00000007")],
)
def test_every_way_to_name_a_run(tmp_path: Path, uri: str, checkpoint: str | None) -> None:
    run = Run.at(uri.replace("RUN", str(tmp_path / "run")))
    assert (run.uri, run.checkpoint, run.name) == (open_storage(tmp_path / "run").uri, checkpoint, "run")


def test_one_message_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    for read in (Run.at(str(tmp_path)).load, Run.at(str(tmp_path)).commit):
        with pytest.raises(CheckpointError, match="has no checkpoint") as caught:
            read()
        assert "pirl train" in caught.value.hint


def test_one_damaged_run_does_not_hide_the_others(old: Run, tmp_path: Path) -> None:
    for name, damage in (("eval.json", b"{"), ("metrics.jsonl", b'{"step": 1, "loss": 2.0}\n{"st')):
        broken = Run.at(str(tmp_path / "runs" / f"broken-{name}"))
        broken.storage.write_bytes("config.toml", b"")
        broken.storage.write_bytes(name, damage)
    with warned("left out") as printed:
        rows = {row.run: row for row in list_runs(str(tmp_path / "runs"))}
    assert sorted(rows) == ["a", "broken-eval.json", "broken-metrics.jsonl"]
    assert (rows["a"].state, rows["a"].step, rows["a"].linear_top1) == ("done", 2, 0.5)
    assert (rows["broken-metrics.jsonl"].step, rows["broken-eval.json"].linear_top1) == (1, None)
    assert {"broken-eval.json", "broken-metrics.jsonl"} <= set(printed.getvalue().split("/"))


def test_a_workspace(tmp_path: Path) -> None:
    workspace = Workspace(f"{tmp_path}/")
    assert workspace.run_uri("a") == f"{tmp_path}/runs/a"
    assert workspace.run("a").uri == f"file://{tmp_path}/runs/a"
    assert workspace.registry == f"{tmp_path}/registry"
    assert workspace.shards("train") == f"{tmp_path}/data/train"
    open_storage(workspace.shards("train", "12ab")).write_json("manifest.json", {})
    assert workspace.all_shards() == [f"{tmp_path}/data/train-12ab"]
