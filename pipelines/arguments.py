"""Typed arguments of a pipeline from key=value items, checked before anything is paid for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from pirl.arguments import gated_evaluation
from pirl.backends import open_backend
from pirl.config import Recipe, load_recipe
from pirl.errors import UsageError, did_you_mean
from pirl.gate import MIN_GAIN, check_question
from pirl.registry import check_name, open_registry
from pirl.settings import Collector, all_at_once, join_items, split_items
from pirl.shards import sharding_options
from pirl.storage import local_path, open_storage, split_file_uri
from pirl.training.spec import training_options

MOVED = {"processes": "options", "nodes": "job", "gpus": "job", "image": "job", "namespace": "job", "queue": "job"}
"""Arguments of version 0.1, and the text of items that has them now."""
TEXTS = ("overrides", "options", "source_options", "evaluation", "job", "registry")
KINDS = {
    "STRING": "a text",
    "NUMBER_INTEGER": "a whole number",
    "NUMBER_DOUBLE": "a number",
    "BOOLEAN": "true or false",
    "LIST": "a JSON list",
    "STRUCT": "a JSON object",
}


def inputs_of(spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the parameters of a pipeline's spec; a backend wraps it where there is also one for the platform."""
    root = spec.get("pipeline_spec", spec)["root"]
    return root.get("inputDefinitions", {}).get("parameters", {})


def typed_arguments(pipeline: str, inputs: Mapping[str, dict[str, Any]], items: Iterable[str]) -> dict[str, Any]:
    """Return each item with the type of its input, because a backend refuses "5" for a number and 5 for a text.

    All unknown names and wrong values are raised at once.
    """
    values: dict[str, Any] = {}
    problems, moved = [], []
    for item in items:
        name, equals, text = item.partition("=")
        if not equals:
            problems.append(f"{item!r} is not of the form key=value")
        elif name in values:
            problems.append(f"{name} is given twice")
        elif name in MOVED and name not in inputs and MOVED[name] in inputs:
            moved.append((MOVED[name], item))
        elif name not in inputs:
            problems.append(f"unknown argument {name!r}.{did_you_mean(name, inputs)}")
        else:
            kind = inputs[name]["parameterType"]
            try:
                values[name] = _value(kind, text)
            except ValueError:
                problems.append(f"{name}: not {KINDS[kind]} (got {text!r})")
    for name, item in moved:
        values[name] = f"{values.get(name, '')} {join_items([item])}".strip()
    if problems:
        raise all_at_once(pipeline, problems, f"the arguments are {', '.join(inputs)}")
    return values


def require_all(pipeline: str, inputs: Mapping[str, dict[str, Any]], values: Mapping[str, Any]) -> None:
    """Fail where an input without a default has no value."""
    missing = [
        f"{name} is missing"
        for name, given in inputs.items()
        if name not in values and "defaultValue" not in given and not given.get("isOptional")
    ]
    if missing:
        raise all_at_once(pipeline, missing, "give each as key=value")


def complete(values: dict[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of one of this code's pipelines, checked as its steps would, and `run` named by its recipe.

    All problems are raised at once.
    """
    checked = dict(values)
    given = {name: field.get("defaultValue", "") for name, field in inputs.items()} | values
    texts = {name: str(given.get(name, "")) for name in TEXTS}
    problems = Collector("the arguments")
    for name in ("root", "train_source", "test_source"):
        if name in values:
            problems.run(partial(require_shared, name, str(values[name])))
    problems.run(lambda: _check_sources(*(str(values.get(name, "")) for name in ("train_source", "test_source"))))
    if texts["registry"]:
        problems.run(lambda: open_registry(texts["registry"]))
    if "model" in given:
        problems.run(lambda: check_name(given["model"], "model"))
    if "metric" in given:
        problems.run(lambda: check_question(given["metric"], given.get("min_gain", MIN_GAIN)))
    options = problems.run(lambda: training_options(texts["options"]))
    problems.run(lambda: sharding_options(texts["source_options"]))
    problems.run(lambda: gated_evaluation(texts["evaluation"]))
    settings = {"processes": options.processes} if options else {}
    settings |= {name: values[name] for name in MOVED if name in values}  # of a pipeline of version 0.1
    problems.run(lambda: open_backend(given.get("backend", "local"), split_items(texts["job"]), settings))
    if "recipe" in values:
        recipe = problems.run(lambda: _recipe(given["recipe"], texts["overrides"]))
        if "run" in inputs and not checked.get("run") and recipe:
            checked["run"] = f"{recipe.name}-{recipe.digest()[:8]}"
    problems.run(lambda: _check_run(str(checked.get("run", ""))))
    problems.finish()
    return checked


def require_shared(name: str, uri: str) -> None:
    """Raise `UsageError` unless all steps can see the location: object storage, or a data set that images bring."""
    if name != "root" and re.fullmatch(r"fashion-mnist:(train|test)", uri):
        return
    if local_path(open_storage(uri)) is not None:
        raise UsageError(
            f"{name} {uri!r} is a folder of one machine, which the steps do not share",
            "use object storage: s3://BUCKET/PREFIX",
        )


def _recipe(name: str, overrides: str) -> Recipe:
    if name.endswith(".toml") and local_path(split_file_uri(name)[0]) is not None:
        raise UsageError(
            f"the steps cannot read the file {name}, which is on this machine",
            "name a recipe of `pirl recipes` with overrides='key=value key=value', or s3://BUCKET/recipe.toml",
        )
    return load_recipe(name, split_items(overrides))


def _check_sources(train: str, test: str) -> None:
    if train and train.rstrip("/") == test.rstrip("/"):
        raise UsageError(
            f"train_source and test_source are the same: {train}",
            "name test images that the classifier is not trained on",
        )


def _check_run(name: str) -> None:
    if "/" in name or name in (".", ".."):
        raise UsageError(f"run {name!r} is not a name for a run: expected one without slashes", "e.g. run=first")


def _value(kind: str, text: str) -> Any:
    if kind == "STRING":
        return text
    if kind == "NUMBER_INTEGER":
        return int(text)
    if kind == "NUMBER_DOUBLE":
        number = float(text)
        if not math.isfinite(number):  # JSON has no word for it
            raise ValueError(text)
        return number
    value = json.loads(text)
    expected = {"BOOLEAN": bool, "LIST": list, "STRUCT": dict}[kind]
    if not isinstance(value, expected):
        raise ValueError(text)
    return value
