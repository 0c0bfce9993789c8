"""What a command accepts arrives in the ranks, in the pods and in the steps of a pipeline as it was."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import yaml
from conftest import pirl_train

from components.pretrain import pretrain
from components.retrain import retrain
from components.shard import shard
from pipelines.arguments import complete, inputs_of, typed_arguments
from pipelines.compiled import compiled
from pirl import cli, launch, programs
from pirl.config import load_recipe
from pirl.errors import UsageError
from pirl.settings import Settings, join_items
from pirl.shards import ArraySource
from pirl.shards.spec import ShardingOptions, SourceOptions
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


def sources(rng: random.Random) -> ShardingOptions:
    values = {
        "image": rng.choice(["jpg", "each", ".png", "mask.png", "é", "a'b", '"q"', "-x", "1", "true"]),
        "label": rng.choice(["cls", "json:label", "json:two words", "json:a'b", "kind.txt", "0"]),
        "background": rng.choice(["none", "black", "#102030", "rgb(1, 2, 3)"]),
        "exif": "ignore",
        "max_pixels": rng.randint(1, 10**10),
        "max_bad_share": rng.choice([0, 0.5, 1e-3]),
    }
    return ShardingOptions(**{name: values[name] for name in rng.sample(sorted(values), rng.randint(0, 6))})


def flags(options: Settings) -> list[str]:
    given = options.model_dump(exclude_defaults=True)
    return [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in given.items()]


Request = tuple[str, SourceOptions]


@dataclass
class Ways:
    """Each way of a request, and what arrives at its end; no rank is started, and no data is looked at."""

    rng: random.Random
    folder: Path
    capsys: pytest.CaptureFixture[str]
    arrived: list[TrainingSpec] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

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

    def shard_command(self) -> tuple[Request, Request]:
        own, source = sources(self.rng), self.rng.choice(["-d/x", "a b", "it's", "s3://bucket/x y"])
        self.command("shard", *flags(own), "--", source, "out")
        return self.requests.pop(), (source, own)

    def preview_command(self) -> tuple[Request, Request]:
        own = SourceOptions(**dict(sources(self.rng).model_dump(include=set(SourceOptions.model_fields))))
        self.command("preview", "demo", "a b", *flags(own))
        return self.requests.pop(), ("a b", own)

    def run_command_to_step(self) -> tuple[Request, Request]:
        own = sources(self.rng)
        toys = [
            ArraySource("toy", np.full((4, 8, 8), grey, np.uint8), np.zeros(4, np.int64), ["a"], "a/")
            for grey in range(2)
        ]
        tiny = ["loss.negatives=1", "train.batch_size=2"]
        opened: list[Request] = []
        open_source = mock.patch(
            "pirl.shards.open_source", lambda *request: opened.append(request) or toys[len(opened) - 1]
        )
        with open_source, mock.patch("pipelines.local.run_local") as run_local:
            self.command("run", "a b", "it's", *flags(own), f"--root={self.folder}", *tiny)
        assert opened == [("a b", own), ("it's", own)]
        arguments = run_local.call_args.kwargs
        return self.step(arguments["train_source"], arguments["source_options"]), ("a b", own)

    def retrain_command(self) -> tuple[Request, Request]:
        own = sources(self.rng)
        given = own.model_dump(exclude_defaults=True)
        words = flags(ShardingOptions(**dict(list(given.items())[::2])))
        environment = {f"PIRL_{name.upper()}": str(value) for name, value in list(given.items())[1::2]}
        with mock.patch.dict("os.environ", environment):
            self.command("retrain", "--train-source=a b", "--test-source=c", *words)
        return self.requests.pop(), ("a b", own)

    def pipeline_to_step(self) -> tuple[Request, Request]:
        own, values = self.submitted("pirl-pretrain", "run=a b")
        return self.step(values["train_source"], values["source_options"]), (values["train_source"], own)

    def pipeline_to_retraining(self) -> tuple[Request, Request]:
        own, values = self.submitted("pirl-retrain")
        with suppress(UsageError):
            retrain.python_func(**values)
        return self.requests.pop(), (values["train_source"], own)

    def submitted(self, pipeline: str, *more: str) -> tuple[ShardingOptions, dict[str, Any]]:
        """Return random options of a source, and the arguments of a pipeline that was submitted with them."""
        own, inputs = sources(self.rng), inputs_of(compiled(pipeline).spec)
        places = [f"{name}=s3://bucket/{name}" for name in ("train_source", "test_source", "root")]
        given = [*places, "recipe=demo", f"source_options={join_items(own.items())}", *more]
        values = complete(typed_arguments(pipeline, inputs, given), inputs)
        defaults = {name: field["defaultValue"] for name, field in inputs.items() if "defaultValue" in field}
        return own, defaults | values

    def step(self, source: str, options: str) -> Request:
        with suppress(UsageError):
            shard.python_func(source=source, root="s3://bucket/r", run="r", split="train", options=options)
        return self.requests.pop()

    def command(self, *words: str) -> None:
        with mock.patch("sys.argv", ["pirl", *words]), suppress(SystemExit):
            cli.main()

    def open(self, source: str, options: SourceOptions) -> None:
        """End a command or step where it opens its source."""
        self.requests.append((source, options))
        raise UsageError("opened", "stop")

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
    monkeypatch.setattr(programs.Training, "prepare", lambda self: None)
    monkeypatch.setattr("components.step.step", lambda *_: nullcontext())
    for _ in range(30):
        arrived, wanted = way(ways)
        assert arrived == wanted


@pytest.mark.parametrize(
    "way",
    [
        Ways.shard_command,
        Ways.preview_command,
        Ways.run_command_to_step,
        Ways.retrain_command,
        Ways.pipeline_to_step,
        Ways.pipeline_to_retraining,
    ],
)
def test_options_of_a_source_arrive(
    way: Callable[[Ways], tuple[Request, Request]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ways = Ways(random.Random(1), tmp_path, capsys)
    for place in ("pirl.report.sheet", "pirl.retraining.retrain", "pirl.shards"):  # imports before it replaces
        monkeypatch.setattr(f"{place}.open_source", ways.open)
    monkeypatch.setattr("components.step.step", lambda *_: nullcontext())
    monkeypatch.setattr("components.step.reporting_errors", lambda *_: nullcontext())
    for _ in range(30):
        arrived, expected_request = way(ways)
        assert arrived == expected_request
