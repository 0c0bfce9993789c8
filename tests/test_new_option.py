"""A new option of training or evaluation is one edit: commands, pipelines, ranks and pods have it by that."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pirl

ROOT = Path(pirl.__file__).parent.parent
BEFORE = "    log_every: int = Field"
FIELD = '    toy: int = Field(7, ge=0, le=9)\n    """A toy that nobody needs."""\n'

PROGRAM = """
import contextlib, io, sys
from unittest import mock

import yaml

from components.pretrain import pretrain
from pirl import backends, cli, launch, programs
from pirl.training.spec import TrainingSpec

assert cli.__file__.startswith(sys.argv[1]), cli.__file__
specs = []


def run_ranks(module, arguments, processes):
    specs.append(TrainingSpec.read(arguments[0]))
    return 0


def said(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), mock.patch("sys.argv", ["pirl", *words]):
        with contextlib.suppress(SystemExit):
            cli.main()
    return out.getvalue()


for command in ("train", "run", "retrain"):
    shown = " ".join(said(command, "--help").split())
    assert "--toy" in shown and "A toy that nobody needs." in shown, shown

submit = ["submit", "pirl-pretrain", "train_source=s3://bucket/a", "test_source=s3://bucket/b", "root=s3://bucket/c"]
assert 'options = "toy=3"' in said(*submit, "recipe=demo", "options=toy=3", "--dry-run"), said(*submit)
assert "toy" in said(*submit, "recipe=demo", "options=toy=33", "--dry-run").partition("error")[2]

with mock.patch.object(launch, "run_ranks", run_ranks), mock.patch.object(programs, "plan", lambda spec: []):
    with mock.patch("components.step.step", lambda *_: contextlib.nullcontext()):
        pretrain.python_func(data="d", root="r", run="x", recipe="demo", options="toy=4")
    said("train", "demo", "--data=d", "--out=o", "--toy=5")
    job = yaml.safe_load(
        backends.open_backend("pytorchjob", ["image=i:1"]).plan(
            programs.Training(TrainingSpec.parse("demo", data="s3://bucket/d", out="s3://bucket/o", options="toy=6"))
        )
    )
assert [spec.toy for spec in specs] == [4, 5]
pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
assert '"toy": 6' in pod["metadata"]["annotations"]["pirl.dev/training.json"]
print("everywhere")
"""


EVALUATION_BEFORE = "    epochs: int | None = Field"
EVALUATION_PROGRAM = """
import contextlib, io, sys
from unittest import mock

from components.linear_eval import linear_eval
from pirl import cli, launch
from pirl.evaluate.spec import EvaluationSpec

assert cli.__file__.startswith(sys.argv[1]), cli.__file__
specs = []


def pirl_eval(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), mock.patch("sys.argv", ["pirl", "eval", *words]):
        with contextlib.suppress(SystemExit):
            cli.main()
    return out.getvalue()


shown = " ".join(pirl_eval("--help").split())
assert "--toy" in shown and "A toy that nobody needs." in shown, shown


def run_ranks(module, arguments, processes):
    specs.append(EvaluationSpec.read(arguments[0]))
    return 0


missing = mock.patch.multiple("pirl.programs.EvaluationProgram", result=lambda self: None, plan=lambda self: [])
with mock.patch.object(launch, "run_ranks", run_ranks), missing:
    with mock.patch("components.step.step", lambda *_: contextlib.nullcontext()):
        linear_eval.python_func(run="r", train_data="d", test_data="t", metrics=None, confusion=None, options="toy=4")
    with mock.patch("pirl.cli.evaluate.show_scores"):
        pirl_eval("r", "--data=d", "--test=t", "--toy=5")
assert [(spec.run, spec.data, spec.test, spec.toy) for spec in specs] == [("r", "d", "t", 4), ("r", "d", "t", 5)]
print("everywhere")
"""


@pytest.mark.parametrize(
    ("module", "before", "program"),
    [("training", BEFORE, PROGRAM), ("evaluate", EVALUATION_BEFORE, EVALUATION_PROGRAM)],
)
def test_an_option_is_one_edit(tmp_path: Path, module: str, before: str, program: str) -> None:
    for name in ("pirl", "components", "pipelines"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    spec = tmp_path / "pirl" / module / "spec.py"
    text = spec.read_text()
    assert text.count(before) == 1
    spec.write_text(text.replace(before, FIELD + before))
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.stdout.endswith("everywhere\n"), done.stdout + done.stderr
