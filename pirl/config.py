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

from .errors import ConfigError, UsageError, did_you_mean
from .settings import Settings, all_at_once, describe, read_items

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=100)]
Pixels = Annotated[int, Field(ge=4, le=4096)]
Pair = tuple[float, float]
Blocks = Annotated[int, Field(ge=1, le=128)]
Mean = Annotated[float, Field(ge=0, le=1)]
Spread = Annotated[float, Field(ge=0.001, le=100)]
PAIRS = {
    "image_scale": (1e-6, 1.0),
    "patch_scale": (1e-6, 1.0),
    "image_ratio": (0.01, 100.0),
    "patch_ratio": (0.01, 100.0),
    "blur_sigma": (0.01, 100.0),
}
"""Least and largest value of the pairs: shares of the image's area, width over height, pixels."""
NOT_LEARNED = {"format", "name", "description", "published_top1", "eval"}
NEW_KEYS = [("train", "order"), ("loss", "shared_negatives")]
"""Keys that version 0.1 did not have; their defaults are what it did."""
MOST_SCORE = 50.0  # of the NCE loss: exp(50) times a million negatives is far below the largest float32


class DataConfig(Settings):
    """Which images of the data set take part."""

    images: int = Field(0, ge=0, le=2**40)
    """Pretrain on at most this many images, evenly spaced over the ids (0: all). The memory bank has a row for each."""


class ViewsConfig(Settings):
    """The two views of an image: a crop of it, and the patches of a jigsaw cut from a second, independent crop."""

    image_size: Pixels = 224
    image_scale: Pair = (0.08, 1.0)
    image_ratio: Pair = (0.75, 4 / 3)
    patch_crop_size: Pixels = 255
    patch_scale: Pair = (0.6, 1.0)
    patch_ratio: Pair = (0.75, 4 / 3)
    grid: int = Field(3, ge=1, le=5)
    patch_size: int = Field(64, ge=2, le=4096)
    resampling: Literal["exact", "near"] = "exact"
    """exact: the crops' pixels are PIL's; near: within one level of them, in a third of the time."""
    photometric: Literal["base", "blur"] = "base"
    brightness: Strength = 0.4
    contrast: Strength = 0.4
    saturation: Strength = 0.4
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    jitter_probability: Probability = 1.0
    posterize_probability: Probability = 0.66
    """Chance of the group posterize, sharpness, solarize, autocontrast ("base" only)."""
    gray_probability: Probability = 0.2
    flip_probability: Probability = 0.5
    blur_probability: Probability = 0.5
    """Chance of a Gaussian blur ("blur" only)."""
    blur_sigma: Pair = (0.1, 2.0)
    mean: tuple[Mean, Mean, Mean] = (0.485, 0.456, 0.406)
    std: tuple[Spread, Spread, Spread] = (0.229, 0.224, 0.225)

    @property
    def patches(self) -> int:
        return self.grid * self.grid

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of an image's crop: height, width, colours."""
        return self.image_size, self.image_size, 3

    @property
    def patch_shape(self) -> tuple[int, int, int, int]:
        """Of all patches of an image: patches, height, width, colours."""
        return self.patches, self.patch_size, self.patch_size, 3

    @property
    def cell(self) -> int:
        """Side of one jigsaw cell in pixels of the patch crop."""
        return self.patch_crop_size // self.grid

    @model_validator(mode="after")
    def _check(self) -> ViewsConfig:
        if self.patch_size > self.cell:
            raise ValueError(
                f"patch_size {self.patch_size} is larger than a cell of the {self.grid}x{self.grid} grid over "
                f"patch_crop_size {self.patch_crop_size}, which is {self.cell} pixels"
            )
        for name, (least, most) in PAIRS.items():
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise ValueError(f"{name} must be a rising pair from {least:g} to {most:g}, not [{low:g}, {high:g}]")
        return self


class ModelConfig(Settings):
    """Trunk and projection heads."""

    block: Literal["basic", "bottleneck"] = "bottleneck"
    layers: tuple[Blocks, Blocks, Blocks, Blocks] = (3, 4, 6, 3)
    width: float = Field(1.0, ge=1 / 64, le=16)
    """Multiplies the stem and all planes, inner and outer (w2 of the zoo), unlike torchvision's wide_resnet50_2."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """imagenet: 7x7 stride 2 and a max pool; small: 3x3 and no pool, for images of 32 pixels or so."""
    stem_stride: Literal[1, 2] = 2
    head: Literal["linear", "mlp"] = "linear"
    image_head_relu: Literal["every", "hidden", "none"] = "every"
    """MLP head of the images: ReLU after every layer (zoo, R50), after the hidden one only, or none (zoo, R50w2)."""
    embedding_dim: int = Field(128, ge=2, le=8192)


class MemoryConfig(Settings):
    """The memory bank: one L2-normalised embedding per image."""

    momentum: float = Field(0.5, ge=0, lt=1)
    """Weight of the old row in an update (the paper's m, section 3.2)."""
    init: Literal["shared", "rank_mean"] = "shared"
    """shared: unit rows, the same on all ranks; rank_mean: the mean of one bank per rank, rows of norm ~1/sqrt(W)."""


class LossConfig(Settings):
    """Noise contrastive estimation against the memory bank."""

    kind: Literal["nce", "cross_entropy"] = "nce"
    temperature: float = Field(0.07, ge=0.01, le=100)
    negatives: Annotated[int, Field(ge=1, lt=2**31)] | Literal["all"] = 32000
    """How many rows an image is contrasted with, drawn for each image and view; "all": every other row of the bank."""
    shared_negatives: bool = False
    """One sample of the rows a step for all images, every (N/K)-th from a random start, instead of draws for each."""
    patch_weight: Probability = 0.5
    """Weight of the patches' term; the image's term has 1 - patch_weight (the paper's lambda)."""
    exclude_positive: bool = False
    """Never draw the image's own row as a negative: as in the paper; the reference draws it as any other row."""

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if self.negatives == "all" and self.shared_negatives:
            raise ValueError('shared_negatives chooses a sample of the rows, and negatives is "all"')
        if self.kind == "nce" and self.temperature * MOST_SCORE < 1:
            raise ValueError(
                f"temperature must be at least {1 / MOST_SCORE:g} for the loss nce, not {self.temperature:g}"
            )
        return self

    def count(self, rows: int) -> int:
        """Return K, the negatives of an image, with a bank of `rows` rows."""
        return rows - 1 if self.negatives == "all" else self.negatives

    def describe(self) -> str:
        """Return the negatives in words."""
        if self.negatives == "all":
            return "all other rows as negatives"
        return f"{self.negatives:,} negatives{', one sample a step' if self.shared_negatives else ''}"

    @property
    def draws_per_image(self) -> bool:
        """True where negatives are drawn for each image and view, as in the paper."""
        return self.negatives != "all" and not self.shared_negatives


class OptimConfig(Settings):
    """SGD with momentum on a cosine schedule."""

    base_lr: float = Field(0.03, gt=0, le=1000)
    """Learning rate for a global batch of 256; scaled linearly with the global batch."""
    end_lr_ratio: float = Field(0.001, ge=0, le=1)
    schedule: Literal["epoch", "step"] = "epoch"
    """Set the learning rate once an epoch, as the reference does, or at every step."""
    warmup_epochs: float = Field(0.0, ge=0, le=1_000_000)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(1e-4, ge=0, le=10)
    decay_norm_and_bias: bool = False

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class TrainConfig(Settings):
    """How long, in what batches, in what precision."""

    epochs: int = Field(ge=1, le=1_000_000)
    batch_size: int = Field(ge=1, le=2**20)
    """Global: over all ranks."""
    last_batch: Literal["keep", "drop"] = "keep"
    """The rest of an epoch after its full batches: a smaller batch, dealt evenly, or dropped."""
    order: Literal["sorted", "permutation"] = "sorted"
    """Order of an epoch's images. sorted: by random keys, as in version 0.1, which every rank draws and sorts;
    permutation: a keyed permutation, of which any part costs as much at any number of images (`pirl.order`)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = Field(0, ge=0, lt=2**63)


class EvalConfig(Settings):
    """How images are shown to a frozen trunk."""

    resize: Pixels = 256
    """The shorter side, in pixels."""
    crop: Pixels = 224
    """Side of the centre crop."""

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        if self.crop > self.resize:
            raise ValueError(f"the crop of {self.crop} pixels does not fit into images resized to {self.resize}")
        return self


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
        own, others = (_flatten(recipe.model_dump(exclude=NOT_LEARNED)) for recipe in (self, other))
        keys = dict.fromkeys([*own, *others])
        return [f"{key}: {own.get(key)!r} -> {others.get(key)!r}" for key in keys if own.get(key) != others.get(key)]

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
        others = rows - (self.loss.exclude_positive or self.loss.negatives == "all")
        problems, proposed = [], []
        if self.train.batch_size > rows:
            problems.append(f"train.batch_size is {self.train.batch_size}, there are {rows} images to train on")
            proposed.append(f"train.batch_size={max(1, rows // 4)}")
        if self.loss.negatives == "all":
            if others < 1:
                problems.append(f'loss.negatives is "all", there are only {rows} rows')
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
    """Read a recipe by name or path, apply `section.key=value` overrides, validate all of it.

    `ConfigError` with every problem, or `UsageError` where the recipe does not exist.
    """
    path = Path(name)
    if path.suffix == ".toml":
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"cannot read recipe {path}: {error}", "give a recipe's name or the path of a TOML file"
            ) from None
    else:
        if str(name) not in recipe_names():
            raise UsageError(
                f"recipe {str(name)!r} not found.{did_you_mean(str(name), recipe_names())}",
                "`pirl recipes` lists them; a path must end in .toml",
            )
        text = (resources.files("pirl") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    return parse_recipe(text, overrides, origin=str(name))


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
