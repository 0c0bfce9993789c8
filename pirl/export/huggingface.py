"""A folder as on the Hugging Face hub, which `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

model.safetensors  the backbone       config.json               architecture and preprocessing, for timm
README.md          the model card     preprocessor_config.json  the same preprocessing, for transformers
"""

from __future__ import annotations

import math
from typing import Any

from pirl.config import Recipe
from pirl.errors import UsageError
from pirl.export.trunk import trunk_bytes
from pirl.model import Trunk
from pirl.storage import encode_json

NAMES = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}
BILINEAR = 2  # as PIL and transformers number it


def folder_files(trunk: Trunk, recipe: Recipe) -> dict[str, bytes]:
    """Return the files of the folder by name; `UsageError` where timm has no such network."""
    model = recipe.model
    if model.width != 1 or model.stem != "imagenet" or model.stem_stride != 2:
        raise UsageError(
            f"timm has no ResNet of width {model.width:g} with the stem {model.stem}, stride {model.stem_stride}; "
            "expected width 1, stem imagenet, stride 2",
            "export it as .safetensors, which states its architecture, or as .onnx",
        )
    name = NAMES.get((model.block, model.layers), "resnet18" if model.block == "basic" else "resnet50")
    config: dict[str, Any] = {
        "architecture": name,
        "num_classes": 0,
        "num_features": trunk.features,
        "pretrained_cfg": _preprocessing(recipe),
    }
    if (model.block, model.layers) not in NAMES:
        config["model_args"] = {"layers": list(model.layers)}
    return {
        "model.safetensors": trunk_bytes(trunk, recipe),
        "config.json": encode_json(config),
        "preprocessor_config.json": encode_json(_image_processor(recipe)),
        "README.md": _card(recipe, trunk, name).encode(),
    }


def _preprocessing(recipe: Recipe) -> dict[str, Any]:
    crop, resize = recipe.eval.crop, recipe.eval.resize
    share = crop / resize
    if math.floor(crop / share) != resize:  # timm rounds down
        share = crop / (resize + 1e-6)
    return {
        "input_size": [3, crop, crop],
        "crop_pct": share,
        "crop_mode": "center",
        "interpolation": "bilinear",
        "mean": list(recipe.views.mean),
        "std": list(recipe.views.std),
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "conv1",
        "classifier": "fc",
    }


def _image_processor(recipe: Recipe) -> dict[str, Any]:
    return {
        "do_resize": True,
        "size": {"shortest_edge": recipe.eval.resize},
        "resample": BILINEAR,
        "do_center_crop": True,
        "crop_size": {"height": recipe.eval.crop, "width": recipe.eval.crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(recipe.views.mean),
        "image_std": list(recipe.views.std),
    }


def _card(recipe: Recipe, trunk: Trunk, name: str) -> str:
    return f"""---
library_name: timm
pipeline_tag: image-feature-extraction
tags: [timm, image-feature-extraction, self-supervised, pirl]
---

# {recipe.name}

A {name} backbone, pretrained without labels by PIRL (Misra & van der Maaten, CVPR 2020). It turns an image into
{trunk.features} features; it has no classifier.

```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
features = model(transform(image).unsqueeze(0))
```

## Limits

- Images that are rare or absent in the pretraining data are represented badly, and its biases are kept.
- The weights are not a product: evaluate them on your own data before you decide by them.
"""
