"""Models on their way out: for torchvision and for VISSL, and the ways back, bit by bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import IMAGES, TINY, tiny_recipe
from images import folder_of_classes
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401
from safetensors import safe_open
from safetensors.torch import load_file
from test_import import equal, here
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck, ResNet
from vissl_files import LAYOUT, Values, checkpoint, optimizer_order, stretched, trunk_of, write  # noqa: F401

from pirl.checkpoint import Checkpoints, Commit, Cursor
from pirl.config import Recipe, parse_recipe
from pirl.errors import CheckpointError, UsageError
from pirl.evaluate import load_trunk
from pirl.export import examine, export, import_file, trunk_bytes
from pirl.export.vissl import completed_epochs, our_name, to_vissl, vissl_name
from pirl.model import build_model
from pirl.report import write_preview
from pirl.storage import open_storage
from pirl.training.loop import train
from pirl.training.spec import Options
from pirl.world import World

pytestmark = pytest.mark.usefixtures("stretched")


def saved(run: Path | str) -> tuple[Any, dict[str, Any]]:
    found = Checkpoints(open_storage(run) / "checkpoints").load()
    assert found
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: str) -> Path:
    """A finished training of the tiny recipe with a Z, whose momenta and rows are different everywhere."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train(tiny_recipe(), Options(data=shards, out=str(run)), World())
    return run


# --- torchvision ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An imported R50 with random values, and what was in its file."""
    folder = tmp_path_factory.mktemp("zoo")
    content = checkpoint("r50-200ep-linear", images=IMAGES, random=True)
    import_file(write(folder / "file.torch", content), str(folder / "run"))
    return folder / "run", content


def test_resnet50_loads_it_and_misses_only_fc(zoo: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, content = zoo
    path = Path(export(str(run), tmp_path / "trunk.safetensors"))
    network = resnet50()
    missing, unexpected = network.load_state_dict(load_file(path), strict=False)
    assert missing == ["fc.weight", "fc.bias"]
    assert unexpected == []
    trunk = content["classy_state_dict"]["base_model"]["model"]["trunk"]
    for name, tensor in network.state_dict().items():
        if not name.startswith("fc."):
            assert equal(tensor, trunk[f"_feature_blocks.{name}"]), name


def test_metadata_names_the_architecture(zoo: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    with safe_open(export(str(zoo[0]), tmp_path / "trunk.safetensors"), "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["recipe"] == "r50-200ep-linear"
    assert (metadata["block"], metadata["layers"], metadata["width"]) == ("bottleneck", "(3, 4, 6, 3)", "1.0")


def doubled(layers: list[int]) -> ResNet:
    """torchvision's ResNet with all planes twice as wide, built as docs/fidelity.md shows it."""
    page = (Path(__file__).parent.parent / "docs" / "fidelity.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    scope: dict[str, Any] = {}
    exec(code.partition("model = ")[0], scope)
    return scope["DoubleResNet"](Bottleneck, layers)


def test_width_2_loads_into_a_resnet_of_doubled_planes(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in doubled([3, 4, 6, 3]).state_dict().items()}
    expected = {name.removeprefix("_feature_blocks."): shape for name, shape in LAYOUT["trunks"]["r50w2"].items()}
    assert {name: shape for name, shape in shapes.items() if not name.startswith("fc.")} == expected
    assert shapes["fc.weight"] == [1000, 4096]

    recipe = Recipe.model_validate(
        {
            "format": 1,
            "name": "w2",
            "model": {"layers": (1, 1, 1, 1), "width": 2},
            "train": {"epochs": 1, "batch_size": 8},
        }
    )
    trunk = build_model(recipe).trunk.eval()
    (tmp_path / "trunk.safetensors").write_bytes(trunk_bytes(trunk, recipe))
    network = doubled([1, 1, 1, 1]).eval()
    missing, unexpected = network.load_state_dict(load_file(tmp_path / "trunk.safetensors"), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    network.fc = nn.Identity()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network(x), trunk(x))


# --- VISSL ---------------------------------------------------------------------------------------


def test_the_file_is_laid_out_as_vissl_reads_it(zoo: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Names, order and nesting against the recorded lists; loaded without any help, as VISSL would."""
    content = torch.load(export(str(zoo[0]), tmp_path / "out.torch", "vissl"), weights_only=True)
    assert (content["phase_idx"], content["train_phase_idx"], content["iteration"]) == (199, 199, 200)
    assert content["type"] == "consolidated"
    classy = content["classy_state_dict"]
    names = "train base_model meters optimizer phase_idx train_phase_idx num_updates losses hooks loss"
    assert set(names.split()) <= set(classy)
    assert classy["num_updates"] == 200 * 1024
    assert classy["base_model"]["meta"] == {"trunk": {}, "heads": []}
    model = classy["base_model"]["model"]
    assert {k: list(v.shape) for k, v in model["trunk"].items()} == LAYOUT["trunks"]["r50"]
    assert list(model["trunk"]) == list(LAYOUT["trunks"]["r50"])
    assert {k: list(v.shape) for k, v in model["heads"].items()} == LAYOUT["variants"]["r50_linear"]["heads"]
    assert list(model["heads"]) == list(LAYOUT["variants"]["r50_linear"]["heads"])
    optim = classy["optimizer"]["optim"]
    assert [len(group["params"]) for group in optim["param_groups"]] == [53, 106, 3, 3]
    assert [group["weight_decay"] for group in optim["param_groups"]] == [1e-4, 0, 1e-4, 0]
    order = [name for group in optimizer_order(model["trunk"], model["heads"]) for name in group]
    tensors = {**model["trunk"], **model["heads"]}
    assert [s["momentum_buffer"].shape for s in optim["state"].values()] == [tensors[name].shape for name in order]
    loss = content["loss"]
    assert [(name, tensor.dtype) for name, tensor in loss.items()] == [
        ("nce_average.memory", torch.float32),
        ("nce_average.params", torch.float32),
        ("nce_average.multinomial.prob", torch.float32),
        ("nce_average.multinomial.alias", torch.int64),
    ]
    assert loss["nce_average.memory"].data_ptr() == classy["loss"]["nce_average.memory"].data_ptr()  # stored once


def tensors_of(value: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor of a nested file, by its path."""
    if isinstance(value, Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {at: tensor for key, item in items for at, tensor in tensors_of(item, f"{path}/{key}").items()}


def test_from_vissl_and_back_every_tensor_is_the_same(zoo: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, content = zoo
    back = torch.load(export(str(run), tmp_path / "out.torch", "vissl"), weights_only=True)
    before, after = tensors_of(content), tensors_of(back)
    assert len(before) == 318 + 6 + 165 + 2 * 4
    for path, tensor in before.items():
        assert equal(after[path], tensor), path
    assert set(after) == set(before)
    for key in ("phase_idx", "train_phase_idx", "num_updates"):
        assert back["classy_state_dict"][key] == content["classy_state_dict"][key]
    groups = [c["classy_state_dict"]["optimizer"]["optim"]["param_groups"] for c in (content, back)]
    assert groups[0] == groups[1]


@pytest.mark.parametrize("name", ["r50-200ep-mlp", "r50w2-400ep-linear", "r50w2-400ep-mlp"])
def test_from_vissl_and_back_for_the_other_models(name: str, tmp_path: Path) -> None:
    """Without files: what an import holds, laid out for VISSL again."""
    content = checkpoint(name)
    content["classy_state_dict"]["optimizer"] = {"optim": {}}  # half of the memory that this test takes
    found = examine(write(tmp_path / "file.torch", content))
    commit = Commit("step", found.cursor, found.recipe.digest(), found.data_digest, 0, "")
    back = to_vissl(found.state, found.recipe, commit)
    assert set(tensors_of(back)) == set(tensors_of(content))
    model = content["classy_state_dict"]["base_model"]["model"]
    for part in ("trunk", "heads"):
        ours = back["classy_state_dict"]["base_model"]["model"][part]
        assert list(ours) == list(model[part])
        for key, tensor in model[part].items():  # of one value each: shape and that value are all of it
            assert ours[key].shape == tensor.shape
            assert ours[key].flatten()[0] == tensor.flatten()[0], key
    assert equal(back["loss"]["nce_average.params"], content["loss"]["nce_average.params"])
    assert back["classy_state_dict"].get("amp") == content["classy_state_dict"].get("amp")


def same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert set(first) == set(second)
    assert len(first) > 100
    for path, tensor in first.items():
        assert equal(tensor, second[path]), path
    for key in ("recipe", "data_digest", "scaler"):
        assert one[key] == other[key]
    assert one["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]


def test_ours_to_vissl_and_back_is_the_same_state(trained: Path, tmp_path: Path) -> None:
    path = Path(export(str(trained), tmp_path / "out.torch", "vissl"))
    found = import_file(path, str(tmp_path / "again"))
    assert found.lacks == []
    (commit, before), (again, after) = saved(trained), saved(tmp_path / "again")
    same_state(before, after)
    assert before["bank"]["z"].dtype == torch.float64  # more digits than VISSL's params have room for
    assert before["bank"]["z"].item() != before["bank"]["z"].float().item()
    assert (again.cursor, again.recipe_digest, again.data_digest) == (
        commit.cursor,
        commit.recipe_digest,
        commit.data_digest,
    )
    assert (tmp_path / "again" / "config.toml").read_text() == (trained / "config.toml").read_text()


def test_a_training_goes_on_as_if_it_had_never_been_a_vissl_file(tmp_path: Path, shards: str, trained: Path) -> None:
    """From the middle of an epoch, by way of VISSL's layout, to the same bytes at the end."""
    run = tmp_path / "run"
    recipe = tiny_recipe()
    options = Options(data=shards, out=str(run), checkpoint_every_s=0.0, keep=100)
    train(recipe, options, World())
    names = Checkpoints(open_storage(run) / "checkpoints").names()
    middle = "step-00000007"
    assert middle in names
    path = Path(export(f"{run}/checkpoints/{middle}", tmp_path / "middle.torch", "vissl"))
    content = torch.load(path, weights_only=True)
    assert (content["train_phase_idx"], content["iteration"], content["iteration_num"]) == (0, 7, 2)
    again = tmp_path / "again"
    import_file(path, str(again))
    assert not (again / "DONE.json").exists()
    train(recipe, Options(data=shards, out=str(again)), World())
    same_state(saved(trained)[1], saved(again)[1])


def test_the_first_checkpoint_of_a_training_goes_out_and_in(tmp_path: Path, trained: Path, shards: str) -> None:
    run = tmp_path / "run"
    train(tiny_recipe("train.epochs=1"), Options(data=shards, out=str(run), keep=9), World())
    path = Path(export(f"{run}/checkpoints/step-00000000", tmp_path / "first.torch", "vissl"))
    found = import_file(path, str(tmp_path / "again"))
    assert (found.lacks, found.epochs, found.cursor) == ([], 0, Cursor())
    assert found.state["bank"]["z"].item() == -1
    assert found.state["optimizer"]["state"] == {}


@pytest.mark.parametrize(
    ("last_batch", "epoch", "samples", "completed"),
    [
        ("keep", 0, 0, 0),
        ("keep", 2, 41, 2),
        ("keep", 2, 42, 3),
        ("drop", 2, 35, 2),
        ("drop", 2, 36, 3),
        ("drop", 3, 0, 3),
    ],
)
def test_completed_epochs(last_batch: str, epoch: int, samples: int, completed: int) -> None:
    recipe = tiny_recipe(f"train.last_batch={last_batch}")  # 42 images in batches of 9
    assert completed_epochs(Cursor(epoch, samples, 1), recipe, 42) == completed


def test_a_trunk_goes_out_as_a_trunk(tmp_path: Path) -> None:
    """No heads or bank that nobody trained."""
    content = {"model_state_dict": trunk_of("r50-800ep-mlp", Values())}
    import_file(write(tmp_path / "file.torch", content), str(tmp_path / "run"))
    back = torch.load(export(str(tmp_path / "run"), tmp_path / "out.torch", "vissl"), weights_only=True)
    assert set(back) == {"model_state_dict"}
    assert list(back["model_state_dict"]) == list(content["model_state_dict"])
    assert all(equal(back["model_state_dict"][name], tensor) for name, tensor in content["model_state_dict"].items())


def test_the_head_names_of_every_variant() -> None:
    for variant in LAYOUT["variants"].values():
        for name in variant["heads"]:
            assert our_name(name) == here(name)
            assert vissl_name(here(name)) == name
    assert our_name("2.0.clf.0.weight") == "2.0.clf.0.weight"


@pytest.mark.parametrize(("layout", "name"), [("torchvision", "trunk.pt"), ("vissl", "out.safetensors")])
def test_a_wrong_name_or_no_run(tmp_path: Path, trained: Path, layout: Any, name: str) -> None:
    with pytest.raises(UsageError, match="another suffix"):
        export(str(trained), tmp_path / name, layout)
    good = {"torchvision": "trunk.safetensors", "vissl": "out.torch"}[layout]
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        export(str(tmp_path / "nowhere"), tmp_path / good, layout)
    with pytest.raises(CheckpointError, match="complete checkpoint not found"):
        export(f"{trained}/checkpoints/step-00000099", tmp_path / good, layout)
    assert list(tmp_path.iterdir()) == []


def test_a_trunk_of_another_kind_goes_to_vissl_and_back(tmp_path: Path, trained: Path) -> None:
    """The recipe inside our file tells what names and shapes to expect."""
    path = Path(export(str(trained), tmp_path / "out.torch", "vissl"))
    found = examine(path)
    assert found.recipe == parse_recipe(TINY)
    assert found.candidates == ["tiny"]
    recipe, _, trunk = load_trunk(str(trained))
    assert all(equal(found.state["model"][f"trunk.{name}"], tensor) for name, tensor in trunk.state_dict().items())
    assert recipe == found.recipe


def test_what_goes_to_s3_is_written_there(
    trained: Path,
    tmp_path: Path,
    bucket: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not into a folder that is called "s3:"."""
    monkeypatch.chdir(tmp_path)
    out = f"{bucket}/models/trunk.safetensors"
    assert export(str(trained), out) == out
    recipe, _, trunk = load_trunk(str(trained))
    assert open_storage(f"{bucket}/models").read_bytes("trunk.safetensors") == trunk_bytes(trunk, recipe)
    images = folder_of_classes(tmp_path / "images", classes=1, images=2)
    sheet = write_preview(parse_recipe(TINY), str(images), f"{bucket}/sheets/sheet.html", count=1)
    assert sheet == f"{bucket}/sheets/sheet.html"
    assert b"<html" in open_storage(f"{bucket}/sheets").read_bytes("sheet.html")
    assert os.listdir(tmp_path) == ["images"]
    for uri in (f"{bucket}/", "s3://trunk.safetensors", "gs://bucket/trunk.safetensors"):
        with pytest.raises(UsageError):
            export(str(trained), uri)


def test_an_exported_trunk_is_the_same_bytes_in_every_process() -> None:
    code = (
        "import hashlib; from pirl.config import load_recipe; from pirl.model import build_model;"
        "from pirl.export import trunk_bytes; r = load_recipe('demo');"
        "print(hashlib.sha256(trunk_bytes(build_model(r).trunk, r)).hexdigest())"
    )
    digests = {subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(3)}
    assert len(digests) == 1, "the registry would take the same run for another one"
