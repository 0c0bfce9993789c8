"""key=value -> the typed arguments of a pipeline, checked before anything is paid for."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from pirl.backends import open_backend
from pirl.config import load_recipe
from pirl.errors import UsageError, did_you_mean
from pirl.settings import all_at_once

KINDS = {
    "STRING": "a text",
    "NUMBER_INTEGER": "a whole number",
    "NUMBER_DOUBLE": "a number",
    "BOOLEAN": "true or false",
    "LIST": "a JSON list",
    "STRUCT": "a JSON object",
}


def inputs_of(spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The parameters of a pipeline's spec; a backend wraps it where there is also one for the platform."""
    root = spec.get("pipeline_spec", spec)["root"]
    return root.get("inputDefinitions", {}).get("parameters", {})


def typed_arguments(pipeline: str, inputs: Mapping[str, dict[str, Any]], items: Iterable[str]) -> dict[str, Any]:
    """The items, each as the type of its input: a backend refuses "5" for a number and 5 for a text.

    Unknown names and wrong values are told all at once.
    """
    values, problems = {}, []
    for item in items:
        name, equals, text = item.partition("=")
        if not equals:
            problems.append(f"{item!r} is not of the form key=value")
        elif name not in inputs:
            problems.append(f"unknown argument {name!r}.{did_you_mean(name, inputs)}")
        else:
            kind = inputs[name]["parameterType"]
            try:
                values[name] = _value(kind, text)
            except ValueError:
                problems.append(f"{name}: not {KINDS[kind]} (got {text!r})")
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
    """The arguments of one of our own pipelines, checked as its steps would, and `run` named after its recipe."""
    checked = dict(values)
    for name in ("root", "train_source", "test_source"):
        if str(checked.get(name, "")).startswith(("/", ".", "~", "file:")):
            raise UsageError(
                f"{name} {checked[name]!r} is a folder of one machine, which the steps do not share",
                "use object storage: s3://BUCKET/PREFIX",
            )
    if "recipe" in checked:
        if checked["recipe"].endswith(".toml"):
            raise UsageError(
                f"the steps cannot read the file {checked['recipe']}",
                "name a recipe of `pirl recipes`, and change its settings by overrides='key=value key=value'",
            )
        recipe = load_recipe(checked["recipe"], str(checked.get("overrides", "")).split())
        if "run" in inputs and not checked.get("run"):
            checked["run"] = f"{recipe.name}-{recipe.digest()[:8]}"
    if "backend" in inputs:
        names = ("nodes", "gpus", "processes", "image", "namespace", "queue")
        given = {name: checked[name] for name in names if name in checked}
        open_backend(
            checked.get("backend", inputs["backend"].get("defaultValue", "local")),
            shlex.split(checked.get("job", "")),
            given,
        )
    return checked


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
    wanted = {"BOOLEAN": bool, "LIST": list, "STRUCT": dict}[kind]
    if not isinstance(value, wanted):
        raise ValueError(text)
    return value
