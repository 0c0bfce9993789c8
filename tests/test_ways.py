"""What a command accepts arrives in the ranks, in the pods and in the steps of a pipeline as it was."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from conftest import pirl_train

from components.pretrain import pretrain
from pipelines.arguments import complete, inputs_of, typed_arguments
from pipelines.compiled import compiled
from pirl import launch, programs
from pirl.config import load_recipe
from pirl.settings import join_items
from pirl.training.spec import TrainingOptions, TrainingSpec

ODD = [
    " ",
    "  ",
    "'",
    '"',
    "$(HOME)",
    "$HOME",
    "`x`",
    "\\",
    "{{a}}",
    "é",
    "*",
    ";",
    "&",
    "-",
    "--",
    "=",
    "#",
    "[/b]",
    "%",
]


def overrides(rng: random.Random) -> list[str]:
    """Items that are right, in several spellings, some of them with blanks and quotes."""
    low = rng.choice([0.1, 0.3])
    choices = [
        f"views.image_scale=[{low}, 1.0]",
        f"views.image_scale = [ {low},1.0 ]",
        f"train.epochs={rng.randint(1, 99)}",
        "model.head=mlp",
        'model.head="linear"',
        "loss.exclude_positive=false",
        "optim.base_lr=3e-2",
        f"description={json.dumps(text(rng), ensure_ascii=False)}",
        f"name='two {rng.choice(string.ascii_lowercase)} words'",
    ]
    chosen: dict[str, str] = {}
    for item in rng.sample(choices, rng.randint(0, 4)):
        chosen.setdefault(item.partition("=")[0].strip(), item)
    return list(chosen.values())


def text(rng: random.Random) -> str:
    return "".join(rng.choice(["a", "b3", *ODD]) for _ in range(rng.randint(1, 6)))


def options(rng: random.Random) -> TrainingOptions:
    values = {
        "processes": rng.randint(1, 9),
        "workers": rng.randint(-1, 9),
        "log_every": rng.randint(1, 99),
        "checkpoint_every_s": rng.choice([0, 0.5, 1e6]),
        "keep": rng.randint(1, 9),
        "keep_best": True,
        "timeout_s": rng.choice([1, 3.25]),
    }
    return TrainingOptions(**{name: values[name] for name in rng.sample(sorted(values), rng.randint(0, 4))})


def flags(options: TrainingOptions) -> list[str]:
    given = options.model_dump(exclude_defaults=True)
    return [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in given.items()]


@dataclass
class Ways:
    """Each way of a request, and what arrives at its end; no rank is started, and no data is looked at."""

    rng: random.Random
    folder: Path
    capsys: pytest.CaptureFixture[str]
    arrived: list[TrainingSpec] = field(default_factory=list)

    def run_ranks(self, module: str, arguments: list[str], processes: int) -> int:
        assert module == "pirl.train"
        self.arrived.append(TrainingSpec.read(arguments[0]).model_copy(update={"processes": processes}))
        return 0

    def command_to_ranks(self) -> tuple[TrainingSpec, TrainingSpec]:
        items, own = overrides(self.rng), options(self.rng)
        data = self.rng.choice(["-d/x", "a b", "it's", "s3://bucket/x y"])
        out = self.rng.choice(["~/run", "-o", "r [lr=0.1]"])
        assert pirl_train("demo", f"--data={data}", f"--out={out}", *flags(own), *items) == 0
        return self.arrived[-1], expected(items, own, data, out)

    def command_to_pods(self) -> tuple[TrainingSpec, TrainingSpec]:
        items, own = overrides(self.rng), options(self.rng)
        data, out = "s3://bucket/data $(HOME)", "s3://bucket/runs/a b"
        self.capsys.readouterr()
        job = ["--backend=pytorchjob", "--job=image=i:1", "--dry-run"]
        assert pirl_train("demo", f"--data={data}", f"--out={out}", *job, *flags(own), *items) == 0
        manifest = next(yaml.safe_load_all(self.capsys.readouterr().out))
        worker = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
        (argument,) = worker["spec"]["containers"][0]["args"]
        file = self.folder / argument.rpartition("/")[2]
        file.write_text(worker["metadata"]["annotations"][f"pirl.dev/{file.name}"], encoding="utf-8")
        return TrainingSpec.read(str(file)), expected(items, own.model_copy(update={"processes": 0}), data, out)

    def pipeline_to_ranks(self) -> tuple[TrainingSpec, TrainingSpec]:
        items, own = overrides(self.rng), options(self.rng)
        given = [
            "train_source=s3://bucket/train",
            "test_source=s3://bucket/test",
            "root=s3://bucket/root",
            "recipe=demo",
            "run=a b",
            f"overrides={join_items(items)}",
            f"options={join_items(own.items())}",
        ]
        values = complete(typed_arguments("pirl-pretrain", INPUTS, given), INPUTS)
        data, out = "s3://bucket/root/data/train", "s3://bucket/root/runs/a b"
        step = {name: values[name] for name in ("root", "run", "recipe", "overrides", "options")}
        assert pretrain.python_func(data=data, **step) == out
        return self.arrived[-1], expected(items, own, data, out)


def expected(items: list[str], own: TrainingOptions, data: str, out: str) -> TrainingSpec:
    return TrainingSpec(recipe=load_recipe("demo", items), data=data, out=out, **dict(own))


INPUTS = inputs_of(compiled("pirl-pretrain").spec)


@pytest.mark.parametrize("way", [Ways.command_to_ranks, Ways.command_to_pods, Ways.pipeline_to_ranks])
def test_what_is_accepted_arrives(
    way: Callable[[Ways], tuple[TrainingSpec, TrainingSpec]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ways = Ways(random.Random(0), tmp_path, capsys)
    monkeypatch.setattr(launch, "run_ranks", ways.run_ranks)
    monkeypatch.setattr(programs, "plan", lambda spec: [])
    monkeypatch.setattr("components.step.step", lambda *_: nullcontext())
    for _ in range(30):
        arrived, wanted = way(ways)
        assert arrived == wanted
