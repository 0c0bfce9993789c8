"""Recipes: one complete TOML file each, checked as a whole before anything runs.

A recipe holds the science (views, model, memory, loss, optimisation); machines, paths and process counts are arguments
of the commands. `key=value` overrides use the dotted names of the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, Field, ValidationError, model_validator

from .errors import ConfigError, StorageNotFoundError, UsageError, did_you_mean
from .sections import (
    DataConfig,
    EvalConfig,
    LossConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    ViewsConfig,
)
from .settings import Settings, all_at_once, describe, read_items
from .storage import split_file_uri

NOT_LEARNED = {"format", "name", "description", "published_top1", "eval"}
NEW_KEYS = [("views", "pretext"), ("train", "order"), ("loss", "shared_negatives"), ("memory", "precision")]
"""Keys that version 0.1 did not have; their defaults are what it did."""


class Recipe(Settings):
    """Everything that decides what is learned."""

    format: Literal[1]
    name: Annotated[str, Field(pattern=r"^[^\s./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,99}$")]
    """Part of the names of runs: neither slashes nor a leading dot."""
    description: str = Field("", max_length=10_000)
    published_top1: float | None = Field(None, ge=0, le=100)
    data: DataConfig = DataConfig()
    views: ViewsConfig = ViewsConfig()
    model: ModelConfig = ModelConfig()
    memory: MemoryConfig = MemoryConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        stem = self.model.stem_stride * (2 if self.model.stem == "imagenet" else 1)
        for name, size in (("image_size", self.views.image_size), ("patch_size", self.views.patch_size)):
            if math.ceil(size / (stem * 4)) < 2:  # also: oneDNN's bf16 gradient of such a convolution is wrong
                raise ValueError(
                    f"views.{name} {size} is too small for this trunk: its last stage would halve a map of one pixel"
                )
        if self.memory.init == "forward" and self.loss.negatives == "visited":
            raise ValueError(
                'loss.negatives "visited" leaves out rows without a visit, memory.init "forward" fills all rows'
            )
        if math.ceil(self.views.image_size / (stem * 8)) < 2:
            raise ValueError(
                f"views.image_size {self.views.image_size} is too small for this trunk: its last map is one pixel, and "
                "batch norm cannot work on a rank that has a single image"
            )
        return self

    @property
    def learning_rate(self) -> float:
        """Peak learning rate after linear scaling with the global batch."""
        return self.optim.base_lr * self.train.batch_size / 256

    def digest(self) -> str:
        """Return the SHA-256 over all that decides what is learned and is not at its default.

        A key that is added later, with a default that changes nothing, leaves the digests of existing runs as they are.
        """
        return hashlib.sha256(json.dumps(self.learned(), sort_keys=True).encode()).hexdigest()

    def learned(self) -> dict[str, Any]:
        """Return the settings that decide what is learned and are not at their defaults, by dotted key."""
        body = _flatten(self.model_dump(mode="json", exclude=NOT_LEARNED, exclude_defaults=True))
        return {key: value for key, value in body.items() if value != {}}

    def digests(self) -> set[str]:
        """Return all digests by which this recipe is recorded: `digest`, and that of version 0.1.

        Version 0.1 took every key but the name, the evaluation's included, and did not have the keys in `NEW_KEYS`.
        """
        body = self.model_dump(exclude={"name", "description", "published_top1"})
        for section, key in NEW_KEYS:
            if body[section].pop(key) != type(getattr(self, section)).model_fields[key].default:
                return {self.digest()}
        return {self.digest(), hashlib.sha256(tomli_w.dumps(_plain(body)).encode()).hexdigest()}

    def to_toml(self) -> str:
        return tomli_w.dumps(_plain(self.model_dump(exclude_none=True)))

    def differences(self, other: Recipe) -> list[str]:
        """Return `key: own value -> other value` for every setting that decides what is learned and differs."""
        own, others = self.keys(), other.keys()
        keys = dict.fromkeys([*own, *others])
        return [f"{key}: {own.get(key)!r} -> {others.get(key)!r}" for key in keys if own.get(key) != others.get(key)]

    def keys(self) -> dict[str, Any]:
        """Return all settings that decide what is learned, by dotted key."""
        return _flatten(self.model_dump(exclude=NOT_LEARNED))

    def rows(self, images: int) -> int:
        """Return the images that take part, and rows of the memory bank, of a data set of `images`."""
        return min(self.data.images or images, images)

    def steps_per_epoch(self, images: int) -> int:
        """Return the optimiser steps of one epoch over `images` images."""
        full, rest = divmod(images, self.train.batch_size)
        return full + (1 if rest and self.train.last_batch == "keep" else 0)

    def check_data(self, images: int) -> None:
        """Refuse what cannot work on a data set of `images` images."""
        rows = self.rows(images)
        others = rows - (self.loss.exclude_positive or self.loss.takes_all_rows)
        problems, proposed = [], []
        if self.train.batch_size > rows:
            problems.append(f"train.batch_size is {self.train.batch_size}, there are {rows} images to train on")
            proposed.append(f"train.batch_size={max(1, rows // 4)}")
        if not isinstance(self.loss.negatives, int):
            if others < 1:
                problems.append(f'loss.negatives is "{self.loss.negatives}", there are only {rows} rows')
        elif self.loss.negatives > others:
            problems.append(
                f"loss.negatives is {self.loss.negatives}, there are only {others} rows to draw from: they would repeat"
            )
            proposed.append(f"loss.negatives={max(1, rows // 2)}")
        if problems:
            hint = f"lower these settings, e.g. {' '.join(proposed)}" if others > 0 else "give at least two images"
            raise ConfigError("recipe and data do not fit: " + "; ".join(problems), hint)


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the library."""
    folder = resources.files("pirl") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name, path or URI, apply `section.key=value` overrides, validate all of it.

    `ConfigError` with every problem, or `UsageError` where the recipe does not exist.
    """
    if str(name).endswith(".toml"):
        text = _read_recipe(name)
    else:
        if str(name) not in recipe_names():
            raise UsageError(
                f"recipe {str(name)!r} not found.{did_you_mean(str(name), recipe_names())}",
                "`pirl recipes` lists them; a path or URI must end in .toml",
            )
        text = (resources.files("pirl") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    return parse_recipe(text, overrides, origin=str(name))


def _read_recipe(place: str | Path) -> str:
    """Return the text of a TOML file at a path or URI; a storage that is unavailable raises its own error."""
    hint = "give a recipe's name, or the path or URI of a TOML file"
    try:
        if "://" in str(place):
            folder, name = split_file_uri(str(place))
            return folder.read_bytes(name).decode()
        return Path(place).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read recipe {place}: {error}", hint) from None
    except StorageNotFoundError as error:
        raise UsageError(f"cannot read recipe {place}: {error.what}", hint) from None


def parse_recipe(text: str, overrides: Sequence[str] = (), origin: str = "recipe") -> Recipe:
    """Return the recipe in a text, as `load_recipe`, e.g. the `config.toml` of a run."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin} is not valid TOML: {error}", "correct that line; text needs quotes") from None
    problems = override(tree, overrides)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        problems += [describe(item, "recipe", "key", _keys(Recipe)) for item in error.errors()]
    if problems:
        raise all_at_once(origin, problems, "`pirl show RECIPE` prints every key with its value")
    return recipe


def override(tree: dict[str, Any], items: Iterable[str]) -> list[str]:
    """Set `section.key=value` items in a recipe's tree; returns every problem."""
    values, problems = read_items(items, toml_value, "section.key=value")
    for key, value in values.items():
        *path, last = key.split(".")
        section: Any = tree
        for part in path:
            section = section.setdefault(part, {}) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            problems.append(f"override {key!r}: {path[-1]!r} is not a section")
        elif isinstance(value, dict) or isinstance(section.get(last), dict):
            problems.append(f"override {key!r}: set one key of a section, as {key}.KEY=VALUE")
        else:
            section[last] = value
    return problems


def toml_value(text: str) -> Any:
    """Return the one TOML value that `text` is; a bare word is a string.

    Raises ValueError for a comment behind the value, which would be lost.
    """
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if text.strip()[:1] in set("'\"[{"):
            raise ValueError(f"not one TOML value: {str(error).lower()}") from None
        return text.strip()
    try:
        tomllib.loads(f"value = [{text}]")
    except tomllib.TOMLDecodeError:  # a comment has hidden the bracket
        raise ValueError("one TOML value is expected, without a comment") from None
    return value


def _keys(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _plain(value: Any) -> Any:
    """Return a value as TOML takes it, which has no null and no tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
