"""Import and export: trunks in torchvision's key layout, whole trainings in VISSL's."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Literal

from safetensors.torch import save

from pirl.config import Recipe, parse_recipe
from pirl.errors import UsageError
from pirl.evaluate import load_trunk
from pirl.export.importing import Import, examine, import_file
from pirl.export.vissl import to_vissl, vissl_bytes
from pirl.model import Trunk
from pirl.outputs import check_file_output
from pirl.run import Run
from pirl.storage import split_file_uri, write_file

__all__ = ["Import", "examine", "export", "import_file", "trunk_bytes"]

SUFFIXES = {"torchvision": ".safetensors", "vissl": ".torch"}


def trunk_bytes(trunk: Trunk, recipe: Recipe) -> bytes:
    """Return a safetensors file: `torchvision.models.resnet50().load_state_dict(..., strict=False)` misses only `fc`.

    Its metadata names the architecture, which other layers, widths or stems than a standard ResNet need, and the
    preprocessing: mean and std of RGB in 0..1, the shorter side in pixels, and the side of the centre crop.
    """
    values = {**recipe.model.model_dump(), "mean": recipe.views.mean, "std": recipe.views.std}
    values |= {**recipe.eval.model_dump(), "interpolation": "bilinear"}
    metadata = {"format": "pt", "recipe": recipe.name, **{key: str(value) for key, value in values.items()}}
    tensors = {name: tensor.contiguous() for name, tensor in trunk.state_dict().items()}
    return _settled(save(tensors, metadata=metadata))


def _settled(data: bytes) -> bytes:
    """Return a safetensors file with its metadata in a fixed order, because `save` orders it by process."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = {"__metadata__": dict(sorted(header.pop("__metadata__").items()))}
    text = json.dumps({**metadata, **header}, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= end - 8
    return data[:8] + text.ljust(end - 8) + data[end:]


def export(checkpoint: str, out: str | Path, layout: Literal["torchvision", "vissl"] = "torchvision") -> str:
    """Write a checkpoint to the file at `out`, a path or a URI; return its location.

    That is its trunk as safetensors for torchvision, or all of it for VISSL.
    """
    _, name = split_file_uri(out)
    if PurePath(name).suffix != SUFFIXES[layout]:
        raise UsageError(f"{out} has another suffix than {layout}'s files", f"end it in {SUFFIXES[layout]}")
    check_file_output(out)
    if layout == "torchvision":
        recipe, _, trunk = load_trunk(checkpoint)
        data = trunk_bytes(trunk, recipe)
    else:
        commit, saved = Run.at(checkpoint).load()
        recipe = parse_recipe(saved["recipe"], origin=f"the recipe inside {commit.name}")
        data = vissl_bytes(to_vissl(saved, recipe, commit))
    return write_file(out, data)
