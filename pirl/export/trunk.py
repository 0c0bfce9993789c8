"""A backbone as one file: safetensors in torchvision's key layout, ONNX, or Detectron2's names."""

from __future__ import annotations

import io
import json
import pickle
import tempfile
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from pirl.config import Recipe
from pirl.errors import TrainingError, UsageError
from pirl.extras import require
from pirl.model import Trunk

TOLERANCE = 1e-5  # of ONNX's features, relative to the largest


def description(recipe: Recipe) -> dict[str, str]:
    """Return architecture and preprocessing as texts, for the metadata of a file."""
    values = {**recipe.model.model_dump(), "mean": recipe.views.mean, "std": recipe.views.std}
    values |= {**recipe.eval.model_dump(), "interpolation": "bilinear"}
    return {"recipe": recipe.name, **{key: str(value) for key, value in values.items()}}


def trunk_bytes(trunk: Trunk, recipe: Recipe) -> bytes:
    """Return a safetensors file: `torchvision.models.resnet50().load_state_dict(..., strict=False)` misses only `fc`.

    timm's ResNets have the same names. Its metadata names the architecture, which other layers, widths or stems than a
    standard ResNet need, and the preprocessing: mean and std of RGB in 0..1, the shorter side in pixels, and the side
    of the centre crop.
    """
    tensors = {name: tensor.contiguous() for name, tensor in trunk.state_dict().items()}
    return _settled(save(tensors, metadata={"format": "pt", **description(recipe)}))


def _settled(data: bytes) -> bytes:
    """Return a safetensors file with its metadata in a fixed order, because `save` orders it by process."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = {"__metadata__": dict(sorted(header.pop("__metadata__").items()))}
    text = json.dumps({**metadata, **header}, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= end - 8
    return data[:8] + text.ljust(end - 8) + data[end:]


def onnx_bytes(trunk: Trunk, recipe: Recipe) -> bytes:
    """Return an ONNX file: `images` (n, 3, crop, crop) float32, normalised -> `features` (n, D).

    onnxruntime must reproduce the features to 1e-5 of the largest; `TrainingError` where it does not. The preprocessing
    is in its metadata.
    """
    require("onnx", "an ONNX file")
    import onnx
    import onnxruntime

    side = recipe.eval.crop
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    network = trunk.eval().to(memory_format=torch.contiguous_format)
    with tempfile.TemporaryDirectory(prefix="pirl-onnx-") as folder:
        path = str(Path(folder) / "model.onnx")
        with redirect_stdout(io.StringIO()), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                network,
                (images,),
                path,
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("n")},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        model = onnx.load(path)
    for key, value in description(recipe).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.checker.check_model(model)
    data = model.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = network(images).numpy()
    difference = float(np.abs(session.run(None, {"images": images.numpy()})[0] - expected).max())
    if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise TrainingError(
            f"onnxruntime's features differ from the backbone's by {difference:.2g}, expected at most {TOLERANCE:g}",
            "use .safetensors, and report the versions of onnx, onnxruntime and torch",
        )
    return data


def detectron2_bytes(trunk: Trunk, recipe: Recipe) -> bytes:
    """Return a .pkl that Detectron2 takes as MODEL.WEIGHTS of a ResNet backbone.

    Names are those of its own converter of torchvision's weights. `preprocessing` in the file has its PIXEL_MEAN and
    PIXEL_STD; INPUT.FORMAT is RGB, RESNETS.STRIDE_IN_1X1 False.
    """
    if recipe.model.width != 1 or recipe.model.stem != "imagenet":
        raise UsageError(
            f"Detectron2 has no ResNet of width {recipe.model.width:g} with the stem {recipe.model.stem}",
            "expected width 1 and stem imagenet; export it as .safetensors",
        )
    tensors = {
        detectron2_name(name): tensor.detach().cpu().numpy()
        for name, tensor in trunk.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    preprocessing: dict[str, Any] = {
        "format": "RGB",
        "pixel_mean": [255 * value for value in recipe.views.mean],
        "pixel_std": [255 * value for value in recipe.views.std],
    }
    content = {"model": tensors, "__author__": "pirl", "matching_heuristics": True, "preprocessing": preprocessing}
    return pickle.dumps(content)


def detectron2_name(name: str) -> str:
    """Return Detectron2's name of a parameter of torchvision's ResNet."""
    if "layer" not in name:
        name = f"stem.{name}"
    for stage in (1, 2, 3, 4):
        name = name.replace(f"layer{stage}", f"res{stage + 1}")
    for layer in (1, 2, 3):
        name = name.replace(f"bn{layer}", f"conv{layer}.norm")
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
