"""Files of VISSL's model zoo into runs: what each is, that all of it arrives, and what is refused and how."""

from __future__ import annotations

import json
import pickle
import struct
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import IMAGES, TINY, shards_of
from images import folder_of_classes
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50
from vissl_files import (
    VARIANT,
    Values,
    checkpoint,
    heads_of,
    optimizer_of,
    optimizer_order,
    stretched,  # noqa: F401
    trunk_of,
    write,
)

from pirl import cli
from pirl.checkpoint import Checkpoints
from pirl.config import ModelConfig, load_recipe, parse_recipe
from pirl.errors import CheckpointError, PirlError, UsageError
from pirl.evaluate import Protocol, evaluate, load_trunk
from pirl.export import examine, import_file
from pirl.export.identify import identify, misfits
from pirl.export.safe_load import read_file
from pirl.export.vissl import read_contents
from pirl.loss import Contrast
from pirl.memory import MemoryBank
from pirl.model import PIRL, Trunk, build_model
from pirl.optim import build_optimizer
from pirl.shards import Manifest
from pirl.storage import open_storage
from pirl.training.loop import train
from pirl.training.spec import Options
from pirl.training.state import TrainState
from pirl.world import World

LINEAR = "r50-200ep-linear"
pytestmark = pytest.mark.usefixtures("stretched")


@dataclass
class Shown:
    code: int
    out: str
    err: str


@pytest.fixture
def pirl(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Shown]:
    """Run a `pirl` command in this process. A traceback fails the test: it is an exception here."""

    def run(*arguments: object) -> Shown:
        monkeypatch.setattr(sys, "argv", ["pirl", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        shown = capfd.readouterr()
        return Shown(exit.value.code if isinstance(exit.value.code, int) else 0, shown.out, shown.err)

    return run


def saved(run: Path) -> dict[str, Any]:
    found = Checkpoints(open_storage(run) / "checkpoints").load()
    assert found
    return found[1]


def here(name: str) -> str:
    """Where a tensor of VISSL's trunk or heads belongs in ours, spelt out."""
    if name.startswith("_feature_blocks."):
        return "trunk." + name.removeprefix("_feature_blocks.")
    head, part, _, layer, kind = name.split(".")
    if head == "1":
        return f"image_head.{layer}.{kind}"
    return f"patch_head.project.{layer}.{kind}" if part == "0" else f"patch_head.combine.{kind}"


def equal(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)


# --- what a file is ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANT)
def test_each_of_the_six_is_recognised(name: str, tmp_path: Path, pirl: Callable[..., Shown]) -> None:
    path = write(tmp_path / "file.torch", checkpoint(name))
    shown = pirl("import", path, "--out", tmp_path / "run", "--dry-run")
    assert shown.code == 0, shown.err
    first, *notes = shown.out.splitlines()
    recipe = load_recipe(name)
    heads = 6 if recipe.model.head == "linear" else 10
    z = "Z 90" if recipe.loss.kind == "nce" else "no Z"
    assert first == (
        f"{name}: trunk (318 tensors), heads ({heads} tensors), memory bank of 40 rows, {z}, optimiser, "
        f"after epoch {recipe.train.epochs} of {recipe.train.epochs}"
    )
    assert not any("set apart" in note for note in notes)  # its settings are the recipe's to the last one
    assert any("image_head_relu is 'every'" in note for note in notes) == (
        recipe.model.image_head_relu == "every" and recipe.model.head == "mlp"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda content: None, ["r50-200ep-linear"]),  # the learning rate tells
        (lambda content: content["classy_state_dict"].pop("optimizer"), ["r50-200ep-linear", "r50-800ep-linear"]),
    ],
)
def test_which_length_a_checkpoint_on_the_way_is_of(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], expected: list[str]
) -> None:
    content = checkpoint(LINEAR, phase=100)
    change(content)
    found = examine(write(tmp_path / "file.torch", content))
    assert found.candidates == expected
    assert found.epochs == 101
    assert found.recipe.name == "r50-200ep-linear"
    chosen = examine(tmp_path / "file.torch", recipe="r50-800ep-linear")
    assert (chosen.candidates, chosen.recipe.train.epochs) == (["r50-800ep-linear"], 800)


def test_a_trunk_alone_does_not_tell_its_training(tmp_path: Path) -> None:
    found = examine(write(tmp_path / "file.torch", trunk_of("r50w2-400ep-mlp", Values())))
    assert found.candidates == ["r50w2-400ep-linear", "r50w2-400ep-mlp"]
    assert any("--recipe NAME chooses" in note for note in found.notes)


def test_settings_that_differ_from_the_recipe_are_taken_from_the_file(tmp_path: Path) -> None:
    content = checkpoint(LINEAR, images_per_step=256)
    content["loss"]["nce_average.params"] = torch.tensor([4096, 0.2, 88.0, 0.25])
    found = examine(write(tmp_path / "file.torch", content))
    assert found.candidates == [LINEAR]  # by its learning rate, which is that of 8 GPUs
    recipe = found.recipe
    assert (recipe.loss.negatives, recipe.loss.temperature, recipe.memory.momentum) == (4096, 0.2, 0.25)
    assert (recipe.train.batch_size, recipe.learning_rate) == (256, pytest.approx(0.03))
    told = "\n".join(found.notes)
    for line in ("loss.negatives: 32000 -> 4096", "temperature: 0.07 -> 0.2", "momentum: 0.5 -> 0.25", "1024 -> 256"):
        assert line in told
    overridden = examine(tmp_path / "file.torch", overrides=["loss.negatives=100"])
    assert overridden.recipe.loss.negatives == 100


def test_a_training_longer_than_any_recipe_keeps_its_length(tmp_path: Path) -> None:
    found = examine(write(tmp_path / "file.torch", checkpoint(LINEAR, phase=999)))
    assert found.recipe.train.epochs == 1000
    assert found.lacks == []


def test_another_image_head_by_an_override(tmp_path: Path) -> None:
    """The R50 head as a later VISSL trains it has the same names and shapes: only the user knows."""
    path = write(tmp_path / "file.torch", checkpoint("r50-200ep-mlp"))
    found = examine(path, overrides=["model.image_head_relu=hidden"])
    assert found.recipe.model.image_head_relu == "hidden"
    assert found.candidates == ["r50-200ep-mlp"]


# --- that all of it arrives ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A complete checkpoint of R50 with different values everywhere, in the old serialisation of 2020."""
    content = checkpoint(LINEAR, images=IMAGES, random=True, phase=99)
    return write(tmp_path_factory.mktemp("zoo") / "model_phase99.torch", content, legacy=True), content


@pytest.fixture(scope="module")
def imported(random_file: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory, shards: str) -> Path:
    run = tmp_path_factory.mktemp("imported") / "run"
    import_file(random_file[0], str(run), shards)
    return run


def test_every_tensor_arrives_bit_by_bit(random_file: tuple[Path, dict[str, Any]], imported: Path, shards: str) -> None:
    _, content = random_file
    state = saved(imported)
    model = content["classy_state_dict"]["base_model"]["model"]
    theirs = {**model["trunk"], **model["heads"]}
    assert len(state["model"]) == len(theirs) == 324
    for name, tensor in theirs.items():
        assert equal(state["model"][here(name)], tensor), name
    assert equal(state["bank"]["memory"], content["loss"]["nce_average.memory"])
    assert state["bank"]["z"].item() == content["loss"]["nce_average.params"][2].item()
    assert state["data_digest"] == Manifest.load(open_storage(shards)).digest
    assert state["imported"]["lacks"] == []
    (event,) = [json.loads(line) for line in (imported / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["file"], event["recipe"]) == ("import", "model_phase99.torch", LINEAR)


def test_momentum_reaches_the_parameter_it_belongs_to(random_file: tuple[Path, dict[str, Any]], imported: Path) -> None:
    _, content = random_file
    classy = content["classy_state_dict"]
    model = classy["base_model"]["model"]
    order = [name for group in optimizer_order(model["trunk"], model["heads"]) for name in group]
    recipe = load_recipe(LINEAR)
    network = build_model(recipe)
    optimizer = build_optimizer(network, recipe)
    bank, criterion = MemoryBank(IMAGES, 128, recipe.memory), Contrast(recipe.loss, World())
    state = TrainState(network, bank, criterion, optimizer, torch.amp.GradScaler(enabled=False))
    state.load_dict(saved(imported))
    names = {name: parameter for name, parameter in network.named_parameters()}
    for index, name in enumerate(order):
        ours = optimizer.state[names[here(name)]]["momentum_buffer"]
        assert equal(ours, classy["optimizer"]["optim"]["state"][index]["momentum_buffer"]), name
    assert {group["lr"] for group in optimizer.param_groups} == {classy["optimizer"]["optim"]["param_groups"][0]["lr"]}


def test_the_cursor_stands_at_the_start_of_the_next_epoch(
    imported: Path, shards: str, pirl: Callable[..., Shown]
) -> None:
    checkpoints = Checkpoints(open_storage(imported) / "checkpoints")
    cursor = checkpoints.commit(checkpoints.newest() or "").cursor
    assert (cursor.epoch, cursor.samples, cursor.step) == (100, 0, 100)
    assert parse_recipe((imported / "config.toml").read_text()) == load_recipe(LINEAR)
    assert not (imported / "DONE.json").exists()
    # the zoo's 32,000 negatives do not fit 42 images: what comes after the check of the run is not reached
    shown = pirl("train", imported / "config.toml", "--data", shards, "--out", imported, "--dry-run")
    assert "loss.negatives is 32000" in shown.err


def test_the_trunk_computes_what_torchvision_computes(
    random_file: tuple[Path, dict[str, Any]], imported: Path, tmp_path: Path
) -> None:
    _, content = random_file
    recipe, commit, trunk = load_trunk(str(imported))
    assert (recipe.name, commit.name) == (LINEAR, "step-00000100")
    theirs = resnet50()
    theirs.fc = nn.Identity()
    names = content["classy_state_dict"]["base_model"]["model"]["trunk"]
    theirs.load_state_dict({name.removeprefix("_feature_blocks."): tensor for name, tensor in names.items()})
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(trunk(x), theirs.eval()(x))


@pytest.mark.parametrize("legacy", [False, True])
def test_numpy_arrays_and_numbers_and_dictionaries_of_a_foreign_class(
    tmp_path: Path, legacy: bool, foreign: type[dict[str, Any]]
) -> None:
    trunk = {f"trunk.{name}": tensor.numpy() for name, tensor in trunk_of(LINEAR, Values()).items()}
    path = write(tmp_path / "converted_vissl_rn50.torch", {"model_state_dict": foreign(trunk)}, legacy)
    found = examine(path)
    assert len(found.contents.trunk) == 318
    assert all(isinstance(tensor, Tensor) for tensor in found.contents.trunk.values())
    for name, tensor in trunk_of(LINEAR, Values()).items():
        assert equal(found.state["model"][here(name)], tensor), name

    content = checkpoint(LINEAR)
    content["classy_state_dict"]["losses"] = [np.float32(12.5), np.float64(11.25)]
    content["classy_state_dict"]["optimizer"] = foreign(content["classy_state_dict"]["optimizer"])
    content["classy_state_dict"]["optimizer"]["parameters"] = {"lr": 0.12}  # as versions before 0.5 had it
    path = write(tmp_path / "file.torch", content, legacy)
    assert examine(path).lacks == []
    assert read_file(path)["classy_state_dict"]["losses"] == [12.5, 11.25]


@pytest.fixture(params=["vissl.config.attr_dict", "vissl.utils.hydra_config"])
def foreign(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[dict[str, Any]]]:
    """A dictionary's subclass, which files name by its module; the module is there while the file is written."""
    kind = type("AttrDict", (dict,), {"__module__": request.param})
    module = types.ModuleType(request.param)
    module.AttrDict = kind  # type: ignore[attr-defined]
    parts = request.param.split(".")
    for end in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    monkeypatch.setitem(sys.modules, request.param, module)
    return kind


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i4", "i8", ">f4"])
def test_numpy_arrays_are_read_as_they_are(tmp_path: Path, dtype: str) -> None:
    values = np.arange(12).reshape(3, 4).astype(dtype)
    arrays = {"c": values, "fortran": np.asfortranarray(values), "scalar": values[1, 2], "empty": values[:0]}
    read = read_file(write(tmp_path / "file.torch", arrays))
    for name in ("c", "fortran"):
        assert read[name].tolist() == values.tolist()
        assert read[name].dtype == torch.from_numpy(values.astype(values.dtype.newbyteorder("="))).dtype
    assert read["scalar"] == 6
    assert read["empty"].shape == (0, 4)


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "_feature_blocks.",
        "trunk._feature_blocks.",
        "trunk.base_model._feature_blocks.",
        "base_model._feature_blocks.",
        "module.",
    ],
)
def test_trunks_under_any_prefix(tmp_path: Path, prefix: str) -> None:
    plain = {name.removeprefix("_feature_blocks."): tensor for name, tensor in trunk_of(LINEAR, Values()).items()}
    content = {prefix + name: tensor for name, tensor in plain.items()}
    for wrapped in (content, {"model_state_dict": content}, {"state_dict": content, "epoch": 3}):
        found = read_contents(write(tmp_path / "file.torch", wrapped))
        assert not found.heads
        assert list(found.trunk) == list(plain)
        assert all(equal(found.trunk[name], tensor) for name, tensor in plain.items())


def test_a_flat_model_with_its_heads(tmp_path: Path) -> None:
    values = Values()
    flat = {f"trunk.{name}": tensor for name, tensor in trunk_of("r50-800ep-mlp", values).items()}
    flat |= {f"heads.{name}": tensor for name, tensor in heads_of("r50-800ep-mlp", values).items()}
    found = examine(write(tmp_path / "file.torch", flat))
    assert found.candidates == ["r50-200ep-mlp", "r50-800ep-mlp"]
    assert found.lacks == ["bank", "optimizer"]


def test_after_a_linear_evaluation_the_trunk_is_taken_alone(tmp_path: Path) -> None:
    content = checkpoint(LINEAR, phase=27)
    model = content["classy_state_dict"]["base_model"]["model"]
    model["trunk"] = {f"base_model.{name}": tensor for name, tensor in model["trunk"].items()}
    model["heads"] = {"0.channel_bn.weight": torch.ones(64), "0.clf.clf.0.weight": torch.ones(1000, 9216)}
    model["heads"] |= {"6.clf.0.weight": torch.ones(1000, 2048), "6.clf.0.bias": torch.ones(1000)}
    content["classy_state_dict"]["meters"] = [{"top1": {"scores": torch.ones(7)}}]
    found = examine(write(tmp_path / "file.torch", content))
    assert found.lacks == ["heads", "bank", "optimizer"]
    assert len(found.candidates) == 4  # the evaluation's epochs and rates say nothing of the training
    assert "not read: the heads of a linear evaluation" in found.notes
    assert found.cursor.step == 0


def test_small_differences_are_mended_and_told(tmp_path: Path) -> None:
    trunk = {name: tensor for name, tensor in resnet50().state_dict().items() if "num_batches_tracked" not in name}
    trunk["conv1.weight"] = trunk["conv1.weight"].double()
    trunk["layer1.0.bn1.weight"] = trunk["layer1.0.bn1.weight"].half()
    found = examine(write(tmp_path / "file.torch", trunk))
    notes = "\n".join(found.notes)
    for part in ("fc.weight", "fc.bias", "53 counters", "float64 to float32", "float16 to float32"):
        assert part in notes
    assert found.state["model"]["trunk.conv1.weight"].dtype == torch.float32


def test_loss_scale_of_mixed_precision(tmp_path: Path) -> None:
    content = checkpoint("r50w2-400ep-linear")
    scaler = examine(write(tmp_path / "file.torch", content)).state["scaler"]
    assert (scaler["scale"], scaler["_growth_tracker"], scaler["growth_interval"]) == (4096.0, 77, 2000)
    enabled = torch.amp.GradScaler("cpu", enabled=True)
    enabled.load_state_dict(scaler)
    assert enabled.state_dict() == scaler
    del content["classy_state_dict"]["amp"]
    assert examine(write(tmp_path / "file.torch", content)).state["scaler"]["scale"] == 65536.0
    assert examine(write(tmp_path / "file.torch", checkpoint(LINEAR))).state["scaler"] == {}


def test_a_finished_training_is_complete(tmp_path: Path, shards: str) -> None:
    path = write(tmp_path / "file.torch", checkpoint(LINEAR, images=IMAGES))
    found = import_file(path, str(tmp_path / "run"), shards)
    assert found.lacks == []
    done = json.loads((tmp_path / "run" / "DONE.json").read_text())
    assert (done["steps"], done["epochs"], done["images_seen"]) == (200, 200, 200 * IMAGES)
    assert done["data_digest"] == Manifest.load(open_storage(shards)).digest
    assert done["imported"] == "file.torch"


def test_a_checkpoint_from_within_an_epoch_begins_it_again(tmp_path: Path) -> None:
    content = checkpoint(LINEAR, images=4000, phase=9)  # 4 steps an epoch
    content["iteration"] = 42
    content["classy_state_dict"]["num_updates"] = 42 * 1024
    found = examine(write(tmp_path / "file.torch", content))
    assert (found.cursor.epoch, found.cursor.samples, found.cursor.step) == (10, 0, 40)
    assert any("within epoch 11" in note for note in found.notes)
    content["iteration"] = 39
    content["classy_state_dict"]["num_updates"] = 39 * 1024
    found = examine(write(tmp_path / "file.torch", content))
    assert any("counts 39 steps, 10 epochs of 4,000 images in batches of 1024 make 40" in note for note in found.notes)


# --- what an import becomes ----------------------------------------------------------------------

NARROW = TINY.replace('block = "basic"', 'block = "bottleneck"')


def narrow_checkpoint(toml: Path, images: int = IMAGES) -> dict[str, Any]:
    """A checkpoint of a small model as VISSL would write it, after one of three epochs; names from `here` backwards."""
    recipe = parse_recipe(toml.read_text())
    network = build_model(recipe)
    content = checkpoint(LINEAR, images=images, phase=0, images_per_step=9)
    model = content["classy_state_dict"]["base_model"]["model"]
    state = network.state_dict()
    model["trunk"] = OrderedDict(
        (f"_feature_blocks.{k.removeprefix('trunk.')}", v) for k, v in state.items() if k.startswith("trunk.")
    )
    candidates = [
        f"{head}.clf.{layer}.{kind}"
        for head in ("0.0", "0.2", "1.0")
        for layer in (0, 1, 2)
        for kind in ("weight", "bias")
    ]
    model["heads"] = OrderedDict(
        (name, state[here(name)])
        for name in candidates
        if here(name) in state and not name.startswith(("0.2.clf.1", "0.2.clf.2"))
    )
    content["classy_state_dict"]["optimizer"]["optim"] = optimizer_of(
        model["trunk"], model["heads"], Values(random=True), 0.02
    )
    memory = torch.nn.functional.normalize(torch.randn(images, 8))
    content["loss"] |= {"nce_average.memory": memory, "nce_average.params": torch.tensor([16, 0.07, 90.0, 0.5])}
    return content


def test_a_training_continues_from_a_complete_file(tmp_path: Path, shards: str) -> None:
    toml = tmp_path / "narrow.toml"
    toml.write_text(NARROW)
    path = write(tmp_path / "file.torch", narrow_checkpoint(toml))
    run = tmp_path / "run"
    found = import_file(path, str(run), shards, recipe=str(toml))
    assert (found.lacks, found.epochs, found.cursor.step) == ([], 1, 5)
    recipe = parse_recipe((run / "config.toml").read_text())
    done = train(recipe, Options(data=shards, out=str(run)), World())
    assert (done.steps, done.images_seen) == (15, 3 * IMAGES)
    state = saved(run)
    assert state["bank"]["z"].item() == 90.0  # kept, not estimated again
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert events[:2] == ["import", "resume"]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [15]


def test_without_its_data_a_training_is_not_continued_but_evaluated(
    tmp_path: Path, shards: str, pirl: Callable[..., Shown]
) -> None:
    toml = tmp_path / "narrow.toml"
    toml.write_text(NARROW)
    path = write(tmp_path / "file.torch", narrow_checkpoint(toml))
    shown = pirl("import", path, "--out", tmp_path / "run", "--recipe", toml)
    assert shown.code == 0
    assert "import with --data" in shown.out
    refused = pirl("train", toml, "--data", shards, "--out", tmp_path / "run")
    assert refused.code == 2
    assert "unknown" in refused.err
    quick = Protocol(seeds=(0,), epochs=1, min_steps=20, batch_size=16)
    test = shards_of(folder_of_classes(tmp_path / "test", classes=3, images=4, first=900), tmp_path / "test-shards")
    result = evaluate(str(tmp_path / "run"), shards, test, quick)
    assert 0 <= result.pretrained["knn"].top1.mean <= 1


def test_a_trunk_alone_is_marked_and_never_resumed(tmp_path: Path, shards: str, pirl: Callable[..., Shown]) -> None:
    toml = tmp_path / "narrow.toml"
    toml.write_text(NARROW)
    trunk = narrow_checkpoint(toml)["classy_state_dict"]["base_model"]["model"]["trunk"]
    path = write(tmp_path / "file.torch", trunk)
    shown = pirl("import", path, "--out", tmp_path / "run", "--recipe", toml, "--data", shards)
    assert shown.code == 0, shown.err
    assert "not resumed" in shown.out
    state = saved(tmp_path / "run")
    fresh = build_model(parse_recipe(NARROW)).state_dict()
    for name, tensor in state["model"].items():
        expected = trunk[f"_feature_blocks.{name.removeprefix('trunk.')}"] if name.startswith("trunk.") else fresh[name]
        assert equal(tensor, expected), name
    assert state["bank"]["memory"].shape == (IMAGES, 8)
    assert state["imported"]["lacks"] == ["heads", "bank", "optimizer"]
    assert not (tmp_path / "run" / "DONE.json").exists()
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    refused = pirl("train", toml, "--data", shards, "--out", tmp_path / "run")
    assert refused.code == 2
    assert "trunk only" in refused.err
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before
    assert pirl("export", tmp_path / "run", tmp_path / "trunk.safetensors").code == 0


def test_an_optimiser_in_another_order_is_left_out(tmp_path: Path) -> None:
    content = checkpoint(LINEAR)
    groups = content["classy_state_dict"]["optimizer"]["optim"]["param_groups"]
    groups[0]["params"] += groups[2].pop("params")
    groups[2]["params"] = []
    found = examine(write(tmp_path / "file.torch", content))
    assert found.lacks == ["optimizer"]
    assert any("groups of [56, 106, 0, 3] tensors, ours of [53, 106, 3, 3]" in note for note in found.notes)
    assert found.data_digest == "no optimizer"


def test_parameters_go_by_their_place_not_their_number(tmp_path: Path) -> None:
    """Before torch 1.5 an optimiser's state was keyed by addresses."""
    content = checkpoint(LINEAR)
    optim = content["classy_state_dict"]["optimizer"]["optim"]
    address = {index: 140_000_000_000_000 + 72 * (index * 101 % 165) for index in range(165)}
    optim["state"] = {address[index]: state for index, state in optim["state"].items()}
    for group in optim["param_groups"]:
        group["params"] = [address[index] for index in group["params"]]
    plain = checkpoint(LINEAR)["classy_state_dict"]["optimizer"]["optim"]["state"]
    state = examine(write(tmp_path / "file.torch", content)).state["optimizer"]["state"]
    assert all(equal(state[index]["momentum_buffer"], plain[index]["momentum_buffer"]) for index in range(165))


def test_a_run_that_is_there_is_never_written_over(
    tmp_path: Path, imported: Path, random_file: tuple[Path, Any]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in imported.rglob("*")}
    with pytest.raises(UsageError, match="holds a run already"):
        import_file(random_file[0], str(imported))
    assert {file: file.stat().st_mtime_ns for file in imported.rglob("*")} == before


# --- what is refused -----------------------------------------------------------------------------


class Hostile:
    """Creates a file when it is unpickled without care."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.victim,)


class HostileByEval(Hostile):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.victim)!r}, 'w')",)


@pytest.mark.parametrize("kind", [Hostile, HostileByEval])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "inside an array"])
def test_a_hostile_pickle_is_refused_and_not_executed(
    tmp_path: Path, kind: type[Hostile], form: str, pirl: Callable[..., Shown]
) -> None:
    victim, path = tmp_path / "victim", tmp_path / "file.torch"
    content = {"model_state_dict": {"conv1.weight": torch.ones(3), "extra": kind(victim)}}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    elif form == "inside an array":
        write(path, {"model_state_dict": {"conv1.weight": np.array([kind(victim)], dtype=object)}})
    else:
        write(path, content, legacy=form == "legacy")
    shown = pirl("import", path, "--out", tmp_path / "run")
    assert shown.code == 1
    assert "refused" in shown.err
    assert "nothing in it was run" in shown.err
    assert not victim.exists()
    assert not (tmp_path / "run").exists()
    if form in ("zip", "legacy"):
        torch.load(path, weights_only=False)  # it is a real one: torch's unsafe way runs it
        assert victim.exists()


@pytest.mark.filterwarnings("ignore:.*jit:FutureWarning")
def test_a_model_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it holds torch\.nn\.modules\.linear\.Linear"):
        read_file(write(tmp_path / "file.torch", nn.Linear(2, 2)))
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_file(tmp_path / "script.pt")


def unreadable(kind: str) -> Tensor:
    if kind == "stretched":
        return torch.ones(1).expand(10**12, 128)
    if kind == "sparse":
        return torch.eye(3).to_sparse()
    if kind == "quantised":
        return torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8)
    return torch.ones(3, 3, device="meta")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("stretched", r"has the shape \(1000000000000, 128\), 512,000,000,000,000 bytes, of which the file holds 4"),
        ("sparse", r"is sparse"),
        ("quantised", r"is quantised"),
        ("meta", r"has no values"),
    ],
)
def test_a_tensor_that_cannot_be_read_as_it_is_is_refused_before(
    tmp_path: Path, kind: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few bytes that stand for 512 TB would otherwise fill the memory; the others end in a traceback."""
    monkeypatch.undo()  # what `stretched` allows
    content = {"model_state_dict": {"conv1.weight": torch.ones(3), "layer": [unreadable(kind)]}}
    with pytest.raises(CheckpointError, match=rf"is refused: model_state_dict.layer.0 {says}") as caught:
        examine(write(tmp_path / "file.torch", content))
    assert caught.value.hint


@pytest.mark.parametrize("names", [("conv1.weight", "module.conv1.weight"), ("heads.a", "module.heads.a")])
def test_two_names_for_one_tensor_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    """The last one won, whichever network it was of."""
    content = {name: torch.full((3,), float(index)) for index, name in enumerate(names)} | {"bn1.weight": torch.ones(3)}
    with pytest.raises(CheckpointError, match=f"twice: as {names[0]} and as {names[1]}"):
        examine(write(tmp_path / "file.torch", content))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_file(tmp_path: Path, legacy: bool, pirl: Callable[..., Shown]) -> None:
    trunk = {name: tensor for name, tensor in resnet18().state_dict().items() if "layer1" in name}
    data = write(tmp_path / "whole.torch", trunk, legacy).read_bytes()
    path = tmp_path / "cut.torch"
    for length in (4, 10, 100, 1000, 5000, len(data) // 2, len(data) - 200):
        path.write_bytes(data[:length])
        shown = pirl("import", path, "--out", tmp_path / "run")
        assert shown.code == 1, length
        assert "truncated or damaged" in shown.err, (length, shown.err)
        assert "->" in shown.err


def test_random_damage_raises_nothing_but_checkpoint_errors(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    trunk = {name: tensor for name, tensor in trunk_of(LINEAR, Values()).items() if "layer1.0" in name}
    trunk["_feature_blocks.array"] = np.ones(3)
    for legacy in (False, True):
        data = write(tmp_path / "whole.torch", {"model_state_dict": trunk}, legacy).read_bytes()
        for _ in range(150):
            damaged = bytearray(data)
            for _ in range(int(generator.integers(1, 6))):
                damaged[int(generator.integers(4, min(len(damaged), 6000)))] = int(generator.integers(256))
            (tmp_path / "file.torch").write_bytes(damaged)
            with pytest.raises(PirlError) as caught:
                examine(tmp_path / "file.torch")
            assert caught.value.hint


@pytest.mark.parametrize(
    ("data", "code", "says"),
    [
        (b"", 1, "not a file of torch.save"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), 1, "not a file of torch.save"),
        (struct.pack("<Q", 20) + b'{"__metadata__":{}}' + bytes(40), 1, "not a file of torch.save"),
        (None, 2, "cannot read"),
    ],
    ids=["empty", "image", "safetensors", "absent"],
)
def test_not_a_torch_file_at_all(
    tmp_path: Path, data: bytes | None, code: int, says: str, pirl: Callable[..., Shown]
) -> None:
    if data is not None:
        (tmp_path / "file.torch").write_bytes(data)
    shown = pirl("import", tmp_path / "file.torch", "--out", tmp_path / "run")
    assert shown.code == code
    assert says in shown.err


@pytest.mark.parametrize(
    "content",
    [
        {},
        [1, 2],
        "text",
        {"model_state_dict": {}},
        {"lr": 0.1, "epoch": 3},
        {"classy_state_dict": {"base_model": {}}},
        {"classy_state_dict": 3},
        {"classy_state_dict": {"base_model": {"model": {"trunk": [1], "heads": {}}}}},
    ],
    ids=str,
)
def test_files_without_a_model(tmp_path: Path, content: Any) -> None:
    with pytest.raises(CheckpointError, match=r"holds no model|not laid out as one"):
        examine(write(tmp_path / "file.torch", content))


def test_a_checkpoint_whose_parts_are_odd_is_an_error_not_a_bug(tmp_path: Path) -> None:
    changes: list[Callable[[dict[str, Any]], Any]] = [
        lambda c: c["classy_state_dict"].update(optimizer=3),
        lambda c: c["classy_state_dict"]["optimizer"].update(optim={"param_groups": [{"lr": 1}]}),
        lambda c: c["classy_state_dict"]["optimizer"]["optim"]["param_groups"][0].update(lr="fast"),
        lambda c: c.update(loss={"nce_average.memory": 3, "nce_average.params": "x"}),
        lambda c: c["loss"].pop("nce_average.params"),
        lambda c: c.update(loss={"nce_average.params": torch.ones(4)}),
        lambda c: c["loss"].update({"nce_average.params": torch.ones(3)}),
        lambda c: c["loss"].update({"nce_average.memory": torch.ones(128)}),
        lambda c: c["loss"].update({"nce_average.memory": torch.ones(0, 128)}),
        lambda c: c.update(train_phase_idx="last"),
        lambda c: c.update(pirl={"recipe": "x"}),
        lambda c: c.update(pirl=[1]),
        lambda c: c["classy_state_dict"]["base_model"]["model"]["trunk"].update({"_feature_blocks.conv1.weight": 3}),
        lambda c: c["classy_state_dict"].update(amp={"loss_scaler0": 4}),
    ]
    for change in changes:
        content = checkpoint(LINEAR)
        change(content)
        with pytest.raises(PirlError) as caught:
            examine(write(tmp_path / "file.torch", content))
        assert caught.value.hint


@pytest.mark.parametrize(
    ("trunk", "says"),
    [
        (resnet18, "basic blocks 2+2+2+2, width 1"),
        (lambda: torch.nn.Sequential(nn.Conv2d(3, 4, 1)), "not a ResNet"),
    ],
)
def test_another_architecture(
    tmp_path: Path, trunk: Callable[[], nn.Module], says: str, pirl: Callable[..., Shown]
) -> None:
    path = write(tmp_path / "file.torch", trunk().state_dict())
    shown = pirl("import", path, "--out", tmp_path / "run")
    assert shown.code == 1
    assert f"is of another architecture: {says}; expected bottleneck blocks 3+4+6+3, width 1 or" in shown.err
    assert len(shown.err.splitlines()) == 2  # and no list of hundreds of names


def test_a_width_that_no_recipe_has(tmp_path: Path, pirl: Callable[..., Shown]) -> None:
    path = write(tmp_path / "file.torch", {"conv1.weight": torch.ones(256, 3, 7, 7), **names_of_r50()})
    shown = pirl("import", path, "--out", tmp_path / "run")
    assert "bottleneck blocks 3+4+6+3, width 4; expected" in shown.err
    assert "model.width=4" in shown.err
    with torch.device("meta"):
        network = Trunk(ModelConfig(width=4))
    wide = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in network.state_dict().items() if tensor.ndim}
    found = read_contents(write(path, wide))
    recipe, candidates, _ = identify(found, path, overrides=["model.width=4"])
    assert recipe.model.width == 4
    assert len(candidates) == 6
    with torch.device("meta"):
        assert misfits(found, PIRL(recipe.model)) == []


def names_of_r50() -> dict[str, Tensor]:
    """All names but the first, each of one value."""
    names = [name.removeprefix("_feature_blocks.") for name in trunk_of(LINEAR, Values())]
    return {name: torch.ones(1) for name in names if name != "conv1.weight"}


def test_every_wrong_name_and_shape_is_listed_at_once(tmp_path: Path, pirl: Callable[..., Shown]) -> None:
    content = checkpoint("r50-800ep-mlp")
    model = content["classy_state_dict"]["base_model"]["model"]
    trunk, heads = model["trunk"], model["heads"]
    trunk["_feature_blocks.layer2.1.bn2.wieght"] = trunk.pop("_feature_blocks.layer2.1.bn2.weight")
    del trunk["_feature_blocks.layer4.2.conv3.weight"]
    trunk["_feature_blocks.layer3.0.conv1.weight"] = torch.ones(256, 512, 3, 3)
    heads["1.0.clf.1.weight"] = heads.pop("1.0.clf.2.weight")
    trunk["_feature_blocks.fcc.weight"] = torch.ones(2)
    shown = pirl("import", write(tmp_path / "file.torch", content), "--out", tmp_path / "run")
    assert shown.code == 1
    first, *lines, hint = shown.err.splitlines()
    assert "7 problems" in first
    assert "r50-" in first
    text = "\n".join(lines)
    for part in (
        "missing layer2.1.bn2.weight. Did you mean 'layer2.1.bn2.wieght'?",
        "unknown layer2.1.bn2.wieght. Did you mean 'layer2.1.bn2.weight'?",
        "missing layer4.2.conv3.weight",
        "layer3.0.conv1.weight has the shape (256, 512, 3, 3), expected (256, 512, 1, 1)",
        "missing heads 1.0.clf.2.weight. Did you mean 'heads 1.0.clf.1.weight'?",
        "unknown heads 1.0.clf.1.weight",
        "unknown fcc.weight",
    ):
        assert part in text, part
    assert len(lines) == 7
    assert hint.strip().startswith("->")
    assert not (tmp_path / "run").exists()


def test_values_that_are_not_finite_are_counted_by_tensor(tmp_path: Path) -> None:
    content = checkpoint(LINEAR)
    classy = content["classy_state_dict"]
    broken = torch.ones(64)
    broken[3], broken[5] = float("nan"), float("inf")
    classy["base_model"]["model"]["trunk"]["_feature_blocks.bn1.running_var"] = broken
    content["loss"]["nce_average.memory"][7] = float("nan")
    classy["optimizer"]["optim"]["state"][0]["momentum_buffer"] = torch.full((64, 3, 7, 7), -float("inf"))
    with pytest.raises(CheckpointError) as caught:
        examine(write(tmp_path / "file.torch", content))
    assert "3 problems" in caught.value.what
    assert "bn1.running_var has 2 of 64 non-finite values" in caught.value.what
    assert "nce_average.memory has 128 of 5,120 non-finite values" in caught.value.what
    assert "momentum 0 has 9,408 of 9,408 non-finite values" in caught.value.what


def test_a_bank_of_another_size_than_the_data(tmp_path: Path, shards: str, pirl: Callable[..., Shown]) -> None:
    path = write(tmp_path / "file.torch", checkpoint(LINEAR, images=IMAGES - 1))
    shown = pirl("import", path, "--out", tmp_path / "run", "--data", shards)
    assert shown.code == 1
    assert "memory bank of 41 rows, and" in shown.err
    assert "has 42 images" in shown.err
    assert not (tmp_path / "run").exists()
    assert pirl("import", path, "--out", tmp_path / "run", "--data", tmp_path / "nowhere").code == 1


def test_wrong_arguments(tmp_path: Path, pirl: Callable[..., Shown]) -> None:
    path = write(tmp_path / "file.torch", trunk_of(LINEAR, Values()))
    shown = pirl("import", path, "--out", tmp_path / "run", "--recipe", "r50-200ep-liner")
    assert shown.code == 2
    assert "Did you mean 'r50-200ep-linear'" in shown.err
    shown = pirl("import", path, "--out", tmp_path / "run", "train.epoch=3")
    assert shown.code == 2
    assert "Did you mean 'train.epochs'" in shown.err
    assert not (tmp_path / "run").exists()
