"""The DAG: what it compiles to, and what it does on this machine, in real processes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY
from images import folder_of_classes
from kfp import dsl, local

from components.register import register
from components.report import report
from components.shard import shard
from pipelines.compiled import compiled
from pipelines.local import require_steps, run_local
from pipelines.retrain import pirl_retrain
from pirl import __version__
from pirl.errors import PirlError, UsageError
from pirl.jobs.settings import SECRET_NAMES
from pirl.registry import open_registry
from pirl.storage import Storage, open_storage

STEPS = {"shard-train", "shard-test", "pretrain", "linear_eval", "gate", "report"}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("dag")
    (root / "tiny.toml").write_text(TINY)
    return {
        "train_source": str(folder_of_classes(root / "train", classes=3, images=8, width=24, height=20)),
        "test_source": str(folder_of_classes(root / "test", classes=3, images=2, width=24, height=20, first=99)),
        "root": str(root / "out"),
        "run": "tiny",
        "recipe": str(root / "tiny.toml"),
        "overrides": "train.epochs=1 loss.negatives=8 views.image_scale=[0.3, 1.0] 'description=it\"s a \\ test'",
        "options": "processes=1 log_every=2",
    }


@pytest.fixture(scope="module")
def console() -> io.StringIO:
    """Lines that the steps of the rejected run have printed, which the runner prints again."""
    return io.StringIO()


@pytest.fixture(scope="module")
def rejected(arguments: dict[str, Any], console: io.StringIO) -> Storage:
    """The DAG with a gate that nothing passes."""
    with redirect_stdout(console), redirect_stderr(console):
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
    assert open_registry(f"{arguments['root']}/registry").models() == []
    assert {name.split("/")[1].removesuffix(".json") for name in facts if name.startswith("steps/")} == STEPS
    assert b"not more than 200.00" in facts["report.html"]


def test_the_console_has_paths_as_a_person_writes_them(rejected: Storage, console: io.StringIO) -> None:
    printed = console.getvalue()
    assert rejected.uri.removeprefix("file://") in printed
    kfp = re.compile(r"\s*(Output:|\"|\S+: ')|.*KFP")  # the runner's own lines: arguments and outputs of its steps
    lines = [line for line in printed.splitlines() if "file:///" in line and not kfp.match(line)]
    assert lines == [], "\n".join(lines)


def test_every_image_went_in(facts: dict[str, Any]) -> None:
    assert json.loads(facts["DONE.json"])["images_seen"] == 24
    recipe = tomllib.loads(facts["config.toml"].decode())
    assert (recipe["views"]["image_scale"], recipe["description"]) == ([0.3, 1.0], 'it"s a \\ test')
    assert [json.loads(line)["step"] for line in facts["metrics.jsonl"].splitlines()] == [2, 3]
    evaluation = json.loads(facts["eval.json"])
    assert (evaluation["train_images"], evaluation["test_images"]) == (24, 6)
    assert evaluation["classes"] == ["class0", "class1", "class2"]


def test_repeating_it_trains_nothing_again_and_registers(
    promoted: Storage, facts: dict[str, Any], arguments: dict[str, Any]
) -> None:
    assert promoted.read_bytes("DONE.json") == facts["DONE.json"]
    assert promoted.read_bytes("metrics.jsonl") == facts["metrics.jsonl"]
    assert promoted.read_bytes("eval.json") == facts["eval.json"]
    champion = open_registry(f"{arguments['root']}/registry").get("pirl", "champion", verify=True)
    assert champion.lineage.data_digest == json.loads(facts["DONE.json"])["data_digest"]
    assert champion.record.metrics
    assert champion.record.metrics.to_json() == json.loads(facts["eval.json"])
    assert champion.version.encode() in promoted.read_bytes("report.html")


def test_registering_again_gives_the_same_version(promoted: Storage, arguments: dict[str, Any]) -> None:
    from pirl.gate import register_run

    before = promoted.read_json("registered.json")
    assert register_run(promoted.uri, f"{arguments['root']}/registry", "pirl").version == before["version"]
    assert len(open_registry(f"{arguments['root']}/registry").versions("pirl")) == 1


def test_the_artifacts_are_what_the_ui_renders(promoted: Storage, arguments: dict[str, Any], tmp_path: Path) -> None:
    places = {name: str(tmp_path / name) for name in ("page", "summary", "card", "trunk")}
    data = {f"{split}_data": f"{arguments['root']}/data/{split}" for split in ("train", "test")}
    page, summary = dsl.HTML(uri=places["page"]), dsl.Markdown(uri=places["summary"])
    where = report.python_func(run=promoted.uri, **data, verdict="", page=page, summary=summary)
    assert Path(page.path).read_text() == open_storage(where.rpartition("/")[0]).read_bytes("report.html").decode()
    text = Path(summary.path).read_text()
    assert text.startswith("# tiny\n\n**Registered as pirl v0001**")
    assert "| nearest neighbours |" in text
    for reason in promoted.read_json("gate.json")["reasons"]:
        assert f"- {reason}" in text
    trunk, card = dsl.Model(uri=places["trunk"]), dsl.Markdown(uri=places["card"])
    given = {"run": promoted.uri, "root": arguments["root"], "model": "pirl"}
    version = register.python_func(**given, trunk=trunk, card=card)
    assert trunk.metadata == {"version": "v0001", "uri": version}
    assert json.loads(Path(trunk.path).read_text())["uri"] == version
    assert Path(card.path).read_text() == open_storage(version).read_bytes("README.md").decode()


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


@pytest.mark.slow
def test_a_scheduled_run_registers_and_the_next_has_nothing_to_do(
    arguments: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = {key: value for key, value in arguments.items() if key not in ("root", "run")}
    for tick in range(2):
        local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "kfp"))
        pirl_retrain(**given, root=str(tmp_path / "out"), min_gain=-1.0)
        shown = capfd.readouterr()
        assert ("up to date" in shown.out + shown.err) == (tick == 1)
    assert [version.version for version in open_registry(str(tmp_path / "out" / "registry")).versions("pirl")] == [
        "v0001"
    ]


def test_a_word_that_the_local_runner_would_change_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="python3"):
        run_local(**{**arguments, "root": "/tmp/python3-stuff"})


COMMITTED = Path(__file__).parent.parent / "pipelines"


def compile_in_another_process(out: Path, **environment: str) -> str:
    program = "import sys; from pirl.cli import main; sys.argv = ['pirl', 'compile', sys.argv[1]]; main()"
    kept = {name: value for name, value in os.environ.items() if name != "PIRL_STEPS_IMAGE"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(out)], env={**kept, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out.read_text()


def test_the_committed_yaml_is_current_and_names_an_image_by_version(tmp_path: Path) -> None:
    text = compile_in_another_process(tmp_path / "a.yaml")
    committed = (COMMITTED / "pirl-pretrain.yaml").read_text()
    assert committed == text, "run `pirl compile`, and commit pipelines/pirl-pretrain.yaml"
    assert f"localhost/pirl-python-steps:{__version__}" in text
    other = compile_in_another_process(tmp_path / "b.yaml", PIRL_STEPS_IMAGE="registry.example.com/python-steps:7")
    assert other == text.replace(f"localhost/pirl-python-steps:{__version__}", "registry.example.com/python-steps:7")


def test_steps_without_an_image_are_not_compiled(tmp_path: Path) -> None:
    for image in ("", " ", ":7"):
        with pytest.raises(AssertionError, match=r"PIRL_STEPS_IMAGE is '.*expected the name of an image"):
            compile_in_another_process(tmp_path / "a.yaml", PIRL_STEPS_IMAGE=image)
        assert not (tmp_path / "a.yaml").exists()


def test_credentials_stand_nowhere(tmp_path: Path) -> None:
    secrets = {"AWS_ACCESS_KEY_ID": "AKIAPIRLTEST", "AWS_SECRET_ACCESS_KEY": "verysecretpirl"}
    text = compile_in_another_process(tmp_path / "a.yaml", **secrets)
    assert not any(value in text for value in secrets.values())
    pipeline, _ = yaml.safe_load_all(text)
    inputs = pipeline["root"]["inputDefinitions"]["parameters"]
    assert [name for name in inputs if SECRET_NAMES.search(name)] == []


@pytest.mark.parametrize("step", ["pretrain", "retrain"])
def test_every_setting_of_the_training_is_an_argument_and_the_run_s_id_a_label(step: str) -> None:
    spec = compiled(f"pirl-{step}").spec
    given = spec["root"]["dag"]["tasks"][step]["inputs"]["parameters"]
    assert set(given) == set(spec["components"][f"comp-{step}"]["inputDefinitions"]["parameters"])
    assert given.pop("kfp_run") == {"runtimeValue": {"constant": "{{$.pipeline_job_uuid}}"}}
    constants = {name for name, value in given.items() if "runtimeValue" in value}
    assert constants == set()


def test_it_compiles_to_what_a_backend_needs() -> None:
    text = (COMMITTED / "pirl-pretrain.yaml").read_text()
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
    assert ".uri = " not in text, "a backend fails a step whose artifact is not in the run's own place for artifacts"
    enabled = [
        task
        for tasks in [spec["root"]["dag"]["tasks"], *inside]
        for task in tasks.values()
        if task.get("cachingOptions", {}).get("enableCache")
    ]
    assert enabled == [], "a step knows by content whether its work is done; a cache would guess by names"


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGHUP, signal.SIGKILL))],
    ids=["SIGTERM", "SIGHUP", "SIGKILL"],
)
def test_a_runner_that_is_stopped_takes_its_step_with_it(
    arguments: dict[str, Any], tmp_path: Path, number: signal.Signals
) -> None:
    command = [str(Path(sys.executable).with_name("pirl")), "run", arguments["train_source"], arguments["test_source"]]
    command += ["--recipe", arguments["recipe"], "--root", str(tmp_path), "--processes", "1"]
    command += ["train.epochs=20000", "loss.negatives=8"]
    with (tmp_path / "log").open("wb") as log:
        runner = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def of_the_run() -> list[str]:
        found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
        return [line for line in found.splitlines() if str(tmp_path) in line and "<defunct>" not in line]

    def until(what: Any, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, "\n".join([*of_the_run(), (tmp_path / "log").read_text()])
            time.sleep(0.2)

    until(lambda: list(tmp_path.glob("runs/*/metrics.jsonl")), 180)
    runner.send_signal(number)
    assert runner.wait(120) not in (0, None)
    until(lambda: not of_the_run(), 120)
    if number is not signal.SIGKILL:
        said = (tmp_path / "log").read_text()
        assert "stopped by a signal at step" in said
        assert "the pipeline stopped" in said
        assert list(tmp_path.glob("runs/*/checkpoints/*/COMMIT.json"))


def test_classes_are_compared_before_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for first, (split, classes) in enumerate((("train", 3), ("test", 2), ("other", 4), ("copy", 3))):
        shape = {"images": 2, "width": 24, "height": 20, "first": 100 * (first % 3)}
        folder_of_classes(tmp_path / split, classes=classes, **shape)

    def sharded(split: str, train_data: str = "", **later: Any) -> str:
        folders = {"root": str(tmp_path / "out"), "run": "r", "split": split}
        return shard.python_func(source=str(tmp_path / split), train_data=train_data, **folders, **later)

    train = sharded("train")
    assert "6 images, 3 classes: class0, class1, class2" in capsys.readouterr().out
    sharded("test", train)
    assert "1 class without a test image: class2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        sharded("other", train)
    assert "class3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sharded("copy", train)
    assert "training and test images are the same" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ({"recipe": "dem"}, "'dem'"),
        ({"overrides": "train.epoch=3"}, "epochs"),
        ({"training": "worker=3"}, "'workers'"),
        ({"evaluation": "protocol=zoo"}, "the gate does not read the protocol zoo"),
        ({"metric": "linaer"}, "Did you mean 'linear'"),
        ({"min_gain": float("nan")}, "the least gain is not a finite number"),
        ({"model": "a/b"}, "not a name for a model"),
        ({"registry": "ftp://host"}, "not a storage location"),
    ],
    ids=str,
)
def test_the_first_step_refuses_what_a_later_one_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], later: dict[str, Any], message: str
) -> None:
    """A run that was started in KFP's UI was not checked by `pirl submit`."""
    images = folder_of_classes(tmp_path / "images", classes=2, images=2, width=24, height=20)
    arguments = {"recipe": "demo", "model": "pirl", "metric": "linear", **later}
    with pytest.raises(SystemExit):
        shard.python_func(source=str(images), root=str(tmp_path / "out"), run="r", split="train", **arguments)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out/data").exists()
    tasks = compiled("pirl-pretrain").spec["root"]["dag"]["tasks"]
    assert set(tasks["pretrain"]["dependentTasks"]) == {"shard", "shard-2"}
