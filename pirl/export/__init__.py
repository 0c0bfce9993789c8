"""Models as others have them: trunks in torchvision's key layout, whole trainings in VISSL's, in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from safetensors.torch import save

from pirl.checkpoint import Checkpoints
from pirl.config import Recipe, parse_recipe
from pirl.errors import CheckpointError, UsageError
from pirl.evaluate import load_trunk, split_checkpoint_uri
from pirl.export.importing import Import, examine, import_file
from pirl.export.vissl import to_vissl, vissl_bytes
from pirl.model import Trunk
from pirl.outputs import check_file_output
from pirl.storage import LocalStorage, open_storage

__all__ = ["Import", "examine", "export", "import_file", "trunk_bytes"]

SUFFIXES = {"torchvision": ".safetensors", "vissl": ".torch"}


def trunk_bytes(trunk: Trunk, recipe: Recipe) -> bytes:
    """A safetensors file: `torchvision.models.resnet50().load_state_dict(..., strict=False)` misses only `fc`.

    Its metadata names the architecture, which other layers, widths or stems than a standard ResNet need.
    """
    metadata = {"format": "pt", "recipe": recipe.name, **{k: str(v) for k, v in recipe.model.model_dump().items()}}
    tensors = {name: tensor.contiguous() for name, tensor in trunk.state_dict().items()}
    return _settled(save(tensors, metadata=metadata))


def _settled(data: bytes) -> bytes:
    """The same safetensors file with its metadata in a fixed order: it comes in another order in every process."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = {"__metadata__": dict(sorted(header.pop("__metadata__").items()))}
    text = json.dumps({**metadata, **header}, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= end - 8
    return data[:8] + text.ljust(end - 8) + data[end:]


def export(checkpoint: str, out: Path, layout: Literal["torchvision", "vissl"] = "torchvision") -> Path:
    """Write a checkpoint to the file `out`: its trunk as safetensors for torchvision, or all of it for VISSL."""
    if out.suffix != SUFFIXES[layout]:
        raise UsageError(f"{out} should end in {SUFFIXES[layout]}", f"that is what {layout}'s files are called")
    check_file_output(out)
    if layout == "torchvision":
        recipe, _, trunk = load_trunk(checkpoint)
        data = trunk_bytes(trunk, recipe)
    else:
        run, name = split_checkpoint_uri(checkpoint)
        found = Checkpoints(open_storage(run) / "checkpoints").load(name)
        if found is None:
            raise CheckpointError(f"{run} has no checkpoint", "give the --out of a `pirl train` that has started")
        commit, saved = found
        recipe = parse_recipe(saved["recipe"], origin=f"the recipe inside {commit.name}")
        data = vissl_bytes(to_vissl(saved, recipe, commit))
    LocalStorage(out.absolute().parent).write_bytes(out.name, data)
    return out
