"""An encoder from wherever weights lie: a run, a checkpoint, a registered version, or a file."""

from __future__ import annotations

import ast
from pathlib import Path, PurePath
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from pirl.config import Recipe, load_recipe, recipe_names
from pirl.embedding.encoder import Encoder
from pirl.errors import CheckpointError, UsageError
from pirl.evaluate import load_trunk
from pirl.export.identify import identify
from pirl.export.vissl import read_contents
from pirl.model import Trunk
from pirl.registry import CHAMPION, Registry, Version, open_registry
from pirl.registry.load import load_version
from pirl.registry.record import RECORD
from pirl.run import Run, split_checkpoint_uri
from pirl.storage import expand_home, open_storage

TORCH_SUFFIXES = (".pth", ".pt", ".torch")
FORMS = "give a run, one of its checkpoints, a registry, a model or a version in it, or a file of weights"


def load(
    source: str | Path | Run | Version,
    *,
    model: str | None = None,
    version: str = CHAMPION,
    recipe: str | Path | None = None,
    device: str | torch.device | None = None,
) -> Encoder:
    """Return the encoder of a run, a checkpoint, a registered version, or a file of weights.

    source: URI of a run or of RUN/checkpoints/step-N; of a registry, a model or a version in it; or the path of a file:
    an export (.safetensors), or a checkpoint of torchvision's or VISSL's layout (.pth, .torch). model and version: in a
    registry; its only model and its champion by default. recipe: of a file that does not name its own.

        encoder = pirl.load("runs/mine")
    """
    if isinstance(source, Version):
        return _encoder(*load_version(source)[:2], source.uri, device)
    if isinstance(source, Run):
        return _encoder(*_of_run(source), source.uri, device)
    text = str(source)
    suffix = PurePath(text).suffix
    if suffix == ".safetensors" or suffix in TORCH_SUFFIXES:
        path = expand_home(text)
        if not path.is_file():
            raise UsageError(f"{text} is not a file", FORMS)
        read = _read_safetensors if suffix == ".safetensors" else _read_checkpoint
        return _encoder(*read(path, recipe), text, device)
    if recipe is not None:
        raise UsageError(f"{text} names its own recipe, expected none", "omit recipe")
    if text.startswith("model-registry+"):
        return load(_version(open_registry(text), model, version), device=device)
    run = Run.at(text)
    if model is None and (split_checkpoint_uri(text)[1] or run.exists()):
        return _encoder(*_of_run(run), run.uri, device)
    return load(registered_version(text, model, version), device=device)


def _encoder(recipe: Recipe, trunk: Trunk, origin: str, device: str | torch.device | None) -> Encoder:
    return Encoder(trunk, recipe, origin, device)


def _of_run(run: Run) -> tuple[Recipe, Trunk]:
    recipe, _, trunk = load_trunk(run)
    return recipe, trunk


def registered_version(uri: str, model: str | None = None, version: str = CHAMPION) -> Version:
    """Return the version that a registry's URI names, or that of a model or a version in it."""
    storage = open_storage(uri)
    *above, name = storage.uri.rstrip("/").split("/")
    if storage.exists(RECORD) and len(above) > 2:  # REGISTRY/MODEL/versions/vNNNN
        return open_registry("/".join(above[:-2])).get(above[-2], name)
    if "versions/" in storage.children():
        return open_registry("/".join(above)).get(name, version)
    registry = open_registry(uri)
    if not registry.models():
        raise UsageError(f"{uri} holds neither a run nor a registered model", FORMS)
    return _version(registry, model, version)


def _version(registry: Registry, model: str | None, version: str) -> Version:
    names = registry.models()
    if model is None and len(names) != 1:
        raise UsageError(f"{registry.uri} holds {len(names)} models: {', '.join(names)}", "name one: model=...")
    return registry.get(model or names[0], version)


def _read_safetensors(path: Path, recipe: str | Path | None) -> tuple[Recipe, Trunk]:
    """Return recipe and backbone of a file of `pirl export`."""
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", "export or copy it again") from None
    chosen = load_recipe(recipe) if recipe is not None else recipe_of(metadata, path)
    return chosen, _trunk(chosen, tensors, path)


def recipe_of(metadata: dict[str, str], path: Path) -> Recipe:
    """Return what the metadata of an exported file states: architecture, normalisation, resize and crop.

    Files of version 0.1 have the architecture and the recipe's name alone.
    """
    values: dict[str, Any] = {key: _value(text) for key, text in metadata.items()}
    name = str(values.get("recipe", ""))
    views = {key: values[key] for key in ("mean", "std") if key in values}
    if "layers" not in values or not (views or name in recipe_names()):
        raise UsageError(
            f"{path} does not state its architecture, mean and std",
            "give recipe=..., the name or the TOML file of the recipe that it was trained by",
        )
    base = load_recipe(name).model_dump() if name in recipe_names() else _blank(name or "exported")
    architecture = {key: values[key] for key in type(load_recipe("demo").model).model_fields if key in values}
    base["model"] = {**base["model"], **architecture}
    base["views"] = {**base["views"], **views}
    base["eval"] = {**base["eval"], **{key: values[key] for key in ("resize", "crop") if key in values}}
    try:
        return Recipe.model_validate(base)
    except ValidationError as error:
        raise CheckpointError(f"{path} has metadata that is not of a backbone: {error}", "export it again") from None


def _blank(name: str) -> dict[str, Any]:
    return {"format": 1, "name": name, "model": {}, "views": {}, "eval": {}, "train": {"epochs": 1, "batch_size": 1}}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _read_checkpoint(path: Path, recipe: str | Path | None) -> tuple[Recipe, Trunk]:
    """Return recipe and backbone of a file of `torch.save`: VISSL's, torchvision's, or a plain state dict."""
    contents = read_contents(path)
    chosen = load_recipe(recipe) if recipe is not None else identify(contents, path)[0]
    return chosen, _trunk(chosen, contents.trunk, path)


def _trunk(recipe: Recipe, tensors: dict[str, Any], path: Path) -> Trunk:
    trunk = Trunk(recipe.model)
    try:
        trunk.load_state_dict({name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")})
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} does not fit the architecture of recipe {recipe.name}: {str(error).splitlines()[-1].strip()}",
            "give the recipe that it was trained by",
        ) from None
    return trunk
