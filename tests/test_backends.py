"""Backends: every command, component and pipeline refuses an unknown one, and a new one is one file and one line."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
from test_launcher import TOYJOB, Scene, Steps, kubernetes, scene  # noqa: F401 fixtures

import components
from pipelines.arguments import complete
from pirl import backends, cli
from pirl.backends import BACKENDS, Backend, ClusterBackend, LocalBackend, open_backend
from pirl.errors import UsageError
from pirl.programs import Program, Training
from pirl.training.spec import TrainingSpec

SHARED = {"data": "s3://bucket-name/data", "out": "s3://bucket-name/run"}


class Notebook(Backend):
    """A toy: it remembers what it was asked to run."""

    def __init__(self, items: Iterable[str] = (), given: Mapping[str, Any] | None = None) -> None:
        self.ran: list[Program] = []

    @property
    def where(self) -> str:
        return "in a notebook"

    def check_location(self, option: str, uri: str) -> None:
        pass

    def require_access(self) -> None:
        pass

    def check(self, program: Program) -> list[str]:
        return ["noted"]

    def plan(self, program: Program) -> str:
        return f"a note about {program.out}\n"

    def run(self, program: Program, labels: Mapping[str, str] | None = None) -> int:
        self.ran.append(program)
        return 0


def pirl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    """Run the command line in this process; return its exit code, and what it printed."""
    monkeypatch.setattr("sys.argv", ["pirl", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out + shown.err


COMMANDS = {
    "train": ["train", "demo", "--data", SHARED["data"], "--out", SHARED["out"]],
    "run": ["run", "no-folder", "no-folder"],
    "retrain": ["retrain", "--train-source", "no-folder", "--test-source", "no-folder"],
    "doctor": ["doctor", "--cluster"],
    "eval": ["eval", "no-run", "--data", SHARED["data"], "--test", SHARED["data"]],
}


def test_every_command_with_a_backend_is_tested() -> None:
    """`submit` and `schedule` take it as an input of the pipeline: `backend=...`."""
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    taking = {name for name, each in commands.items() if any("--backend" in option.opts for option in each.params)}
    assert taking == set(COMMANDS)
    assert set(COMPONENTS) >= {"pretrain", "linear_eval", "retrain"}


def functions_with_a_backend() -> dict[str, Callable[..., object]]:
    """Return the functions of the components that take a backend, by name."""
    names = [module.name for module in pkgutil.iter_modules(components.__path__)]
    modules = [importlib.import_module(f"components.{name}") for name in names]
    functions = {name: getattr(module, name, None) for name, module in zip(names, modules)}
    return {
        name: each.python_func
        for name, each in functions.items()
        if hasattr(each, "python_func") and "backend" in inspect.signature(each.python_func).parameters
    }


COMPONENTS = functions_with_a_backend()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_an_unknown_backend(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, shown = pirl(capsys, monkeypatch, *COMMANDS[command], "--backend", "pytorch-job")
    assert code == 2
    assert "backend 'pytorch-job' does not exist. Did you mean 'pytorchjob'?" in " ".join(shown.split())


@pytest.mark.parametrize("name", COMPONENTS)
def test_components_refuse_an_unknown_backend(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The step ends before it reads anything, and trains nowhere."""
    function = COMPONENTS[name]
    given = {"root": str(tmp_path / "root"), "backend": "pytorch-job", "recipe": "demo"}
    texts = {
        key: given.get(key, "" if parameter.annotation in (str, "str") else 0)
        for key, parameter in inspect.signature(function).parameters.items()
    }
    with pytest.raises(SystemExit) as ended:
        function(**texts)
    assert ended.value.code == 2
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "Did you mean 'pytorchjob'?" in shown
    assert not list(tmp_path.rglob("runs"))


def test_pipelines_refuse_an_unknown_backend_and_settings_that_it_does_not_use() -> None:
    inputs = {"backend": {"defaultValue": "local"}, "nodes": {}, "job": {}}
    with pytest.raises(UsageError, match="Did you mean 'local'"):
        complete({"backend": "lokal"}, inputs)
    with pytest.raises(UsageError, match=r"nodes, keep: settings of a job"):
        complete({"nodes": 4, "job": "keep=3"}, inputs)
    assert complete({"nodes": 1, "job": ""}, inputs)


@pytest.mark.parametrize("item", ["nodes=2", "max_restarts=3"])
def test_settings_of_a_job_are_refused_on_this_machine(item: str) -> None:
    with pytest.raises(UsageError, match=r"(?s)settings of a job.*--backend cluster"):
        open_backend("local", [item])


def test_values_at_their_default_and_processes_are_no_settings_of_a_job() -> None:
    given = {"nodes": 1, "gpus": 0, "image": "", "namespace": "", "queue": "", "processes": 3}
    assert isinstance(open_backend("local", (), given), LocalBackend)


@pytest.mark.parametrize("option", ["data", "out"])
def test_pods_cannot_see_a_folder_of_this_machine(option: str, tmp_path: Path) -> None:
    program = Training(TrainingSpec.parse("demo", **{**SHARED, option: str(tmp_path)}))
    with pytest.raises(UsageError, match=rf"--{option} .* is on this machine"):
        open_backend("pytorchjob").check(program)


class TestExtension:
    """What docs/extending.md shows."""

    def test_a_new_backend_is_a_class_and_a_line(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        notebook = Notebook()
        monkeypatch.setitem(BACKENDS, "notebook", lambda items, given: notebook)
        code, shown = pirl(capsys, monkeypatch, *COMMANDS["train"], "--backend", "notebook", "--dry-run")
        assert (code, shown) == (0, "a note about s3://bucket-name/run\n")
        code, _ = pirl(capsys, monkeypatch, *COMMANDS["train"], "--backend", "notebook")
        assert code == 0
        assert [program.out for program in notebook.ran] == [SHARED["out"]]

    @pytest.mark.parametrize("scene", [TOYJOB], ids=["toyjob"], indirect=True)
    def test_a_new_kind_of_job_is_a_class_and_a_line(
        self,
        scene: Scene,  # noqa: F811
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """From the name of the backend to the end of the job, in the kind's own objects."""
        monkeypatch.setitem(BACKENDS, "toyjob", backends.partial(ClusterBackend, (TOYJOB.kind,)))
        backend = open_backend("toyjob", ["nodes=2", "image=i:1"])
        assert backend.where == "by a ToyJob of 2 pods, each of 0 GPUs and 1 rank"
        assert "kind: ToyRuntime" in backend.plan(scene.program)
        assert "kind: ToyJob" in backend.plan(scene.program)
        thread = threading.Thread(target=backend.run, args=(scene.program, {"who": "test"}), daemon=True)
        thread.start()
        scene.start_pods()
        scene.saying("launcher: running")
        (job,) = scene.server.all("toyjobs")
        assert job["metadata"]["labels"]["who"] == "test"
        scene.succeed()
        thread.join(60)
        assert "has succeeded" in scene.text()
