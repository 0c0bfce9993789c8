"""Exports for other libraries: each is loaded by that library, and has the features of the run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_recipe
from images import picture
from safetensors.torch import load_file

import pirl
from pirl.errors import UsageError
from pirl.evaluate import centre_crop
from pirl.export import export
from pirl.training.loop import train
from pirl.training.spec import Options
from pirl.world import World

ARCHITECTURE = ["model.width=1", "model.stem=imagenet", "model.stem_stride=2", "views.image_size=40"]
ARCHITECTURE += ["views.patch_crop_size=40", "views.patch_size=18", "views.mean=[0.4, 0.5, 0.6]"]
ARCHITECTURE += ["eval.resize=49", "eval.crop=40", "train.epochs=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: str) -> str:
    """A trained ResNet-10 of standard width."""
    run = tmp_path_factory.mktemp("layouts") / "run"
    train(tiny_recipe(*ARCHITECTURE), Options(data=shards, out=str(run)), World())
    return str(run)


@pytest.fixture(scope="module")
def encoder(run: str) -> pirl.Encoder:
    return pirl.load(run)


@pytest.fixture(scope="module")
def features(encoder: pirl.Encoder) -> np.ndarray:
    """Features of three images by the run itself."""
    return encoder.embed([picture(i, 70, 50) for i in range(3)]).features


def pixels(encoder: pirl.Encoder) -> torch.Tensor:
    """The same images as another library gets them: (3, 3, S, S) float, normalised."""
    crops = torch.from_numpy(np.stack([centre_crop(picture(i, 70, 50), encoder.recipe) for i in range(3)]))
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (encoder.recipe.views.mean, encoder.recipe.views.std)
    )
    return (crops.permute(0, 3, 1, 2).float() / 255 - mean) / std


def test_timm_loads_the_state_dict(run: str, encoder: pirl.Encoder, features: np.ndarray, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet18", num_classes=0, layers=[1, 1, 1, 1]).eval()
    network.load_state_dict(load_file(export(run, tmp_path / "trunk.safetensors")))
    with torch.no_grad():
        assert np.allclose(network(pixels(encoder)).numpy(), features, atol=1e-5)


def test_timm_loads_the_folder_with_its_preprocessing(run: str, features: np.ndarray, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    folder = export(run, tmp_path / "hub", "huggingface")
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    batch = torch.stack([transform(picture(i, 70, 50)) for i in range(3)])
    with torch.no_grad():
        assert np.allclose(network(batch).numpy(), features, atol=1e-4)
    processor = json.loads((tmp_path / "hub" / "preprocessor_config.json").read_text())
    assert (processor["size"], processor["crop_size"]["height"]) == ({"shortest_edge": 49}, 40)
    assert "timm.create_model" in (tmp_path / "hub" / "README.md").read_text()
    assert pirl.load(tmp_path / "hub" / "model.safetensors").weights == pirl.load(run).weights
    assert export(run, folder, "huggingface") == folder  # again, over itself


def test_onnxruntime_has_the_same_features(
    run: str, encoder: pirl.Encoder, features: np.ndarray, tmp_path: Path
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    session = runtime.InferenceSession(export(run, tmp_path / "model.onnx", "onnx"))
    metadata = session.get_modelmeta().custom_metadata_map
    assert (metadata["mean"], metadata["resize"], metadata["crop"]) == ("(0.4, 0.5, 0.6)", "49", "40")
    for count in (1, 3):
        result = session.run(None, {"images": pixels(encoder)[:count].numpy()})[0]
        assert np.abs(result - features[:count]).max() <= 1e-5 * max(1.0, np.abs(features).max())


def test_detectron2_gets_its_names(run: str, encoder: pirl.Encoder, tmp_path: Path) -> None:
    """Detectron2 is not on PyPI: the names are those of its converter for torchvision's ResNets."""
    content = pickle.loads(Path(export(run, tmp_path / "model.pkl", "detectron2")).read_bytes())
    tensors = encoder.trunk.state_dict()
    names = {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_mean": "bn1.running_mean",
        "res2.0.conv1.weight": "layer1.0.conv1.weight",
        "res2.0.conv2.norm.bias": "layer1.0.bn2.bias",
        "res5.0.shortcut.weight": "layer4.0.downsample.0.weight",
        "res5.0.shortcut.norm.weight": "layer4.0.downsample.1.weight",
    }
    for name, own in names.items():
        assert np.array_equal(content["model"][name], tensors[own].numpy()), name
    assert len(content["model"]) == sum(not name.endswith("num_batches_tracked") for name in tensors)
    assert content["matching_heuristics"] is True
    assert content["preprocessing"]["pixel_mean"] == pytest.approx([102, 127.5, 153])


@pytest.mark.parametrize(("layout", "out"), [("huggingface", "hub"), ("detectron2", "model.pkl")])
def test_networks_that_a_library_lacks_are_refused(layout: Any, out: str, shards: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    train(tiny_recipe("train.epochs=1"), Options(data=shards, out=run), World())
    with pytest.raises(UsageError, match=r"has no ResNet of width 0\.0625"):
        export(run, tmp_path / out, layout)


def test_a_folder_of_something_else_is_refused(run: str, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="is not empty and holds no exported model"):
        export(run, tmp_path, "huggingface")
    with pytest.raises(UsageError, match="another suffix"):
        export(run, tmp_path / "model.pt", "onnx")
