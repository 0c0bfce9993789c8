"""Initial weights: the source library's outputs, refusals with names, resume, and the extension of a finished run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import resnet18, resnet34

from pirl.backends import LocalBackend
from pirl.config import Recipe
from pirl.embedding.loading import load
from pirl.errors import CheckpointError, PirlError, UsageError
from pirl.export.trunk import trunk_bytes
from pirl.initial.weights import check_origin, prepare_origin, read_initial
from pirl.model import Trunk, build_model
from pirl.programs import Training
from pirl.run import Run
from pirl.training.loop import train
from pirl.training.spec import TrainingSpec
from pirl.world import World

RESNET18 = ("model.block=basic", "model.layers=[2, 2, 2, 2]", "model.width=1", "model.stem=imagenet")
STEM = ("model.stem_stride=2", "views.image_size=64", "views.patch_crop_size=80", "views.patch_size=34")


def library(name: str) -> nn.Module:
    """Return a network of a library with random weights and with statistics of batch norm that are not the default."""
    torch.manual_seed(7)
    if name == "torchvision":
        network: nn.Module = resnet18()
    else:
        network = pytest.importorskip("timm").create_model("resnet18", pretrained=False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return network.eval()


def saved(tensors: dict[str, Tensor], path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return str(path)


def fitted(source: str, recipe: Recipe) -> nn.Module:
    """Return the network of a recipe with the initial weights of a place."""
    model = build_model(recipe)
    model.load_state_dict({**model.state_dict(), **read_initial(source, recipe).tensors})
    return model.eval()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_the_backbone_has_the_outputs_of_the_library(tmp_path: Path, name: str, suffix: str) -> None:
    recipe = tiny_recipe(*RESNET18, *STEM)
    network = library(name)
    source = saved(network.state_dict(), tmp_path / f"weights{suffix}")
    model = fitted(source, recipe)
    network.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.trunk(images), network(images), rtol=1e-6, atol=1e-6)
    assert read_initial(source, recipe).notes == [
        "initial weights: not read: fc.weight",
        "initial weights: not read: fc.bias",
    ]


def test_the_own_export_is_taken(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    trunk = Trunk(recipe.model)
    (path := tmp_path / "trunk.safetensors").write_bytes(trunk_bytes(trunk, recipe))
    tensors = read_initial(str(path), recipe).tensors
    assert all(torch.equal(tensors[f"trunk.{name}"], tensor) for name, tensor in trunk.state_dict().items())
    assert set(tensors) == {f"trunk.{name}" for name in trunk.state_dict()}


def broken(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        tensors = Trunk(tiny_recipe().model).state_dict()
        change(tensors)
        return saved(tensors, folder / "weights.pth")

    return make


REFUSED: list[tuple[Callable[[Path], str], str]] = [
    (lambda folder: saved(resnet34().state_dict(), folder / "weights.pth"), "another architecture: basic blocks 3"),
    (broken(lambda tensors: tensors.pop("layer2.0.conv1.weight")), "missing layer2.0.conv1.weight"),
    (broken(lambda tensors: tensors["bn1.weight"].fill_(float("nan"))), "bn1.weight has .* non-finite"),
    (broken(lambda tensors: tensors.update(extra=torch.zeros(1))), "unknown extra"),
    (lambda folder: str(folder / "absent.pth"), "is not a file"),
    (lambda folder: str(folder / "nothing"), "neither a run nor a registered model"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_wrong_weights_are_refused_before_the_ranks_start(
    tmp_path: Path, shards: str, make: Callable[[Path], str], message: str
) -> None:
    spec = spec_of(tmp_path / "run", shards, init=make(tmp_path))
    with pytest.raises(PirlError, match=message):
        LocalBackend().run(Training(spec))
    assert not Run.at(spec.out).exists()


def spec_of(out: Path, data: str, *overrides: str, **options: Any) -> TrainingSpec:
    return TrainingSpec(recipe=tiny_recipe(*overrides), data=data, out=str(out), processes=1, workers=0, **options)


def run_here(spec: TrainingSpec) -> Run:
    """Train in this process, as the launcher and its only rank do."""
    program = Training(spec)
    program.plan()
    program.prepare()
    train(spec.recipe, spec, World())
    return Run.at(spec.out)


def test_a_run_starts_from_weights_records_them_and_resumes_from_its_own(tmp_path: Path, shards: str) -> None:
    recipe = tiny_recipe()
    first, other = Trunk(recipe.model), Trunk(recipe.model)
    weights = saved(first.state_dict(), tmp_path / "first.pth")
    copy = saved(first.state_dict(), tmp_path / "copy.safetensors")
    changed = saved(other.state_dict(), tmp_path / "other.pth")
    spec = spec_of(tmp_path / "run", shards, init=weights, keep=100)
    run = run_here(spec)
    start = run.checkpoints().load("step-00000000")
    assert start is not None
    assert torch.equal(start[1]["model"]["trunk.conv1.weight"], first.state_dict()["conv1.weight"])
    record = run.initial()
    assert record is not None
    assert record.source == weights
    event = run.record().events[0]
    assert (event["init"], event["init_digest"]) == (weights, record.digest)

    Path(weights).unlink()  # the run has a checkpoint of its own: the place is not read again
    assert check_origin(spec) == []
    assert check_origin(spec.model_copy(update={"init": copy})) == []
    with pytest.raises(UsageError, match=r"started from .* differs"):
        check_origin(spec.model_copy(update={"init": changed}))
    plain = spec_of(tmp_path / "plain", shards)
    run_here(plain)
    with pytest.raises(UsageError, match="started from no given weights"):
        check_origin(plain.model_copy(update={"init": copy}))

    # a run is a source too: its heads are taken where they fit, only its backbone where they do not
    tensors = read_initial(run.uri, recipe).tensors
    assert set(tensors) == set(build_model(recipe).state_dict())
    narrow = tiny_recipe("model.embedding_dim=12")
    initial = read_initial(run.uri, narrow)
    assert all(name.startswith("trunk.") for name in initial.tensors)
    assert "backbone only" in initial.notes[0]
    assert torch.equal(load(run.uri).trunk.state_dict()["conv1.weight"].cpu(), tensors["trunk.conv1.weight"])


def test_weights_of_a_start_without_a_checkpoint_are_replaced(tmp_path: Path, shards: str) -> None:
    recipe = tiny_recipe()
    weights = saved(Trunk(recipe.model).state_dict(), tmp_path / "w.pth")
    spec = spec_of(tmp_path / "run", shards, init=weights)
    prepare_origin(spec)
    assert Run.at(spec.out).initial()
    Training(spec.model_copy(update={"init": ""})).prepare()
    assert Run.at(spec.out).initial() is None
    with pytest.raises(UsageError, match="no initial weights"):
        train(recipe, spec, World())


def test_damaged_weights_in_the_run_are_refused(tmp_path: Path, shards: str) -> None:
    spec = spec_of(tmp_path / "run", shards, init=saved(Trunk(tiny_recipe().model).state_dict(), tmp_path / "w.pth"))
    prepare_origin(spec)
    (tmp_path / "run" / "init.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        train(spec.recipe, spec, World())


def test_a_finished_run_is_extended_by_a_new_one(tmp_path: Path, shards: str, other_shards: str) -> None:
    old = run_here(spec_of(tmp_path / "old", shards, "train.epochs=1"))
    spec = spec_of(tmp_path / "new", shards, "train.epochs=2", "optim.base_lr=0.01", extend=old.uri, keep=100)
    new = run_here(spec)
    before, after = old.load()[1], new.checkpoints().load("step-00000000")
    assert after is not None
    assert torch.equal(before["bank"]["memory"], after[1]["bank"]["memory"])
    assert all(torch.equal(before["model"][name], tensor) for name, tensor in after[1]["model"].items())
    completion = new.completion()
    assert completion is not None
    assert completion.epochs == 2
    assert check_origin(spec) == []  # it resumes
    for changes, message in [
        ({"extend": str(tmp_path / "other")}, "extends .*old"),
        ({"out": str(tmp_path / "n2"), "data": other_shards}, "trained on other data"),
        ({"out": str(tmp_path / "n3"), "recipe": tiny_recipe("model.embedding_dim=12")}, "another recipe"),
        ({"out": str(tmp_path / "n4"), "init": "w.pth"}, "exclude each other"),
    ]:
        with pytest.raises(UsageError, match=message):
            check_origin(spec.model_copy(update=changes))
    (tmp_path / "old" / "DONE.json").unlink()
    with pytest.raises(UsageError, match="is not finished"):
        check_origin(spec.model_copy(update={"out": str(tmp_path / "n5")}))
