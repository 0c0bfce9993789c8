"""The trunk as others load it: safetensors in torchvision's key layout."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save

from .config import Recipe
from .errors import UsageError
from .evaluate import load_trunk
from .model import Trunk
from .storage import LocalStorage


def trunk_bytes(trunk: Trunk, recipe: Recipe) -> bytes:
    """A safetensors file: `torchvision.models.resnet50().load_state_dict(..., strict=False)` misses only `fc`.

    Its metadata names the architecture, which other layers, widths or stems than a standard ResNet need.
    """
    metadata = {"format": "pt", "recipe": recipe.name, **{k: str(v) for k, v in recipe.model.model_dump().items()}}
    tensors = {name: tensor.contiguous() for name, tensor in trunk.state_dict().items()}
    return save(tensors, metadata=metadata)


def export(checkpoint: str, out: Path) -> Path:
    """Write the trunk of a checkpoint to the file `out`."""
    if out.suffix != ".safetensors":
        raise UsageError(f"{out} should end in .safetensors", "that is the format of an exported trunk")
    recipe, _, trunk = load_trunk(checkpoint)
    LocalStorage(out.absolute().parent).write_bytes(out.name, trunk_bytes(trunk, recipe))
    return out
