"""VISSL's checkpoint layout: its names for our tensors, and its file from ours and back.

VISSL                                                          here
base_model.model.trunk  _feature_blocks.layer1.0.conv1.weight  trunk.layer1.0.conv1.weight
base_model.model.heads  0.0.clf.{i}.weight                     patch_head.project.{i}.weight
                        0.2.clf.0.weight                       patch_head.combine.weight
                        1.0.clf.{i}.weight                     image_head.{i}.weight
loss                    nce_average.memory (N, D)              bank.memory
                        nce_average.params (4,) [K, T, Z, m]   Z: bank.z, the others: the recipe
                        nce_average.multinomial.{prob, alias}  none: negatives are uniform
optimizer.optim         state, in four groups                  optimizer, in the same order
"""

from __future__ import annotations

import io
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pirl.checkpoint import Commit, Cursor, SavedTraining
from pirl.config import Recipe
from pirl.errors import CheckpointError
from pirl.export.safe_load import read_file

HEADS = (("patch_head.project.", "0.0.clf."), ("patch_head.combine.", "0.2.clf.0."), ("image_head.", "1.0.clf."))
WRAPPERS = ("module.", "trunk.", "base_model.", "_feature_blocks.")  # a trunk's names may begin with any of these
EVALUATION_HEAD = re.compile(r"\d+\.(channel_bn|clf\.clf\.0|clf\.0)\.\w+$")
EXTRAS = "pirl"  # the key of `Extras`, which VISSL does not read
AMP_SCALE = 65536.0


@dataclass(frozen=True)
class Extras:
    """The part of this library's files that VISSL's layout has no key for."""

    recipe: str
    """As TOML."""
    data_digest: str
    cursor: Cursor
    z: float


@dataclass
class Contents:
    """The content of a file, under our names. Only the trunk is always present."""

    trunk: dict[str, Tensor]
    heads: dict[str, Tensor] = field(default_factory=dict)
    loss: dict[str, Tensor] = field(default_factory=dict)
    momenta: list[list[Tensor | None]] = field(default_factory=list)
    """SGD's buffers by parameter group."""
    learning_rate: float | None = None
    """Of the last step."""
    scaler: dict[str, Any] = field(default_factory=dict)
    epochs: int = 0
    """Completed."""
    iteration: int = 0
    batch_size: int = 0
    """Global; 0: unknown."""
    extras: Extras | None = None
    """None: VISSL wrote the file."""
    ignored: list[str] = field(default_factory=list)

    @property
    def model(self) -> dict[str, Tensor]:
        return {**{f"trunk.{name}": tensor for name, tensor in self.trunk.items()}, **self.heads}

    @property
    def params(self) -> list[float]:
        """Return [K, T, Z, m] with the values of float32; empty without a bank."""
        params = self.loss.get("params")
        return params.flatten().tolist() if isinstance(params, Tensor) else []


def vissl_name(name: str) -> str:
    """Return the name of our parameter, as VISSL's trunk or heads call it."""
    if name.startswith("trunk."):
        return f"_feature_blocks.{name.removeprefix('trunk.')}"
    for own, vissl in HEADS:
        if name.startswith(own):
            return vissl + name.removeprefix(own)
    raise ValueError(name)


def our_name(name: str) -> str:
    """Return our name of a parameter of VISSL's heads; other names stay as they are."""
    for own, vissl in HEADS:
        if name.startswith(vissl):
            return own + name.removeprefix(vissl)
    return name


def trunk_name(name: str) -> str:
    """Return a trunk's parameter in torchvision's naming, whatever it was wrapped in."""
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def read_contents(path: Path) -> Contents:
    """Read a checkpoint of VISSL's, a trunk converted for it, or a plain state dict of a ResNet."""
    return contents_of(read_file(path), path)


def contents_of(content: Any, path: Path) -> Contents:
    """Return the content of a file that was read as plain values and tensors."""
    if isinstance(content, dict) and "classy_state_dict" in content:
        return _from_checkpoint(content, path)
    while isinstance(content, dict) and (inside := [k for k in ("model_state_dict", "state_dict") if k in content]):
        content = content[inside[0]]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no model", "expected a checkpoint of VISSL's, or names and tensors")
    heads = {name: value for name, value in content.items() if re.match(r"(module\.)?heads\.", str(name))}
    trunk = {name: value for name, value in content.items() if name not in heads}
    return _from_model(trunk, _renamed(heads, lambda name: name.partition("heads.")[2], path), path)


def _renamed(tensors: dict[str, Any], rename: Callable[[str], str], path: Path) -> dict[str, Any]:
    """Return the tensors under their new names; raise `CheckpointError` where two would get the same."""
    origin: dict[str, str] = {}
    for name in map(str, tensors):
        if (new := rename(name)) in origin:
            raise CheckpointError(
                f"{path} holds {new} twice: as {origin[new]} and as {name}",
                "remove the one that is not meant: they may be the weights of two networks",
            )
        origin[new] = name
    return {rename(str(name)): value for name, value in tensors.items()}


def _from_model(trunk: dict[str, Any], heads: dict[str, Any], path: Path) -> Contents:
    contents = Contents(_renamed(trunk, trunk_name, path))
    for name in ("fc.weight", "fc.bias"):  # torchvision's classifier: a trunk has none
        if contents.trunk.pop(name, None) is not None:
            contents.ignored.append(name)
    if heads and all(EVALUATION_HEAD.match(str(name)) for name in heads):
        contents.ignored.append("the heads of a linear evaluation")
    else:
        contents.heads = _renamed(heads, our_name, path)
    return contents


def _from_checkpoint(content: dict[str, Any], path: Path) -> Contents:
    try:
        classy = content["classy_state_dict"]
        model = classy["base_model"]["model"]
        contents = _from_model(model["trunk"], model.get("heads", {}), path)
        if not contents.heads:  # of an evaluation: its progress, optimiser and loss are not those of the trunk
            return contents
        phase = content.get("train_phase_idx", content.get("phase_idx"))
        contents.epochs = int(classy["train_phase_idx"] if phase is None else phase) + 1
        contents.iteration = int(content.get("iteration", 0))
        contents.batch_size = _global_batch(classy.get("num_updates", 0), contents.iteration)
        contents.extras = _extras(content.get(EXTRAS, {}))
        loss = content.get("loss") or classy.get("loss") or {}
        contents.loss = {name.removeprefix("nce_average."): value for name, value in loss.items()}
        optimizer = classy.get("optimizer", {}).get("optim", {})
        for group in optimizer.get("param_groups", []):
            contents.learning_rate = float(group["lr"])
            states = [optimizer["state"].get(index, {}) for index in group["params"]]
            contents.momenta.append([state.get("momentum_buffer") for state in states])
        contents.scaler = _scaler(classy.get("amp") or {})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{path} looks like a checkpoint of VISSL's, but is not laid out as one ({type(error).__name__}: {error})",
            "expected classy_state_dict / base_model / model / trunk and heads",
        ) from None
    return contents


def _extras(kept: dict[str, Any]) -> Extras | None:
    if not kept:
        return None
    return Extras(str(kept["recipe"]), str(kept["data_digest"]), Cursor(**kept["cursor"]), float(kept["z"]))


def _global_batch(images: float, iteration: int) -> int:
    return round(images / iteration) if iteration and images % iteration == 0 else 0


def _scaler(amp: dict[str, Any]) -> dict[str, Any]:
    """Return the loss scale as torch keeps it, from apex's state or torch's own."""
    apex = amp.get("loss_scaler0", {})
    return {
        "scale": float(apex.get("loss_scale", amp.get("scale", AMP_SCALE))),
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": int(apex.get("unskipped", amp.get("_growth_tracker", 0))),
    }


# --- to VISSL ------------------------------------------------------------------------------------


def to_vissl(saved: SavedTraining, recipe: Recipe, commit: Commit) -> dict[str, Any]:
    """Return the content of a VISSL checkpoint, for `torch.save`. Parts that an import lacked are left out.

    Equal tensors are shared: the file has each once.
    """
    trunk: OrderedDict[str, Tensor] = OrderedDict()
    heads: OrderedDict[str, Tensor] = OrderedDict()
    for name, tensor in saved["model"].items():
        (trunk if name.startswith("trunk.") else heads)[vissl_name(name)] = tensor.contiguous()
    lacks = saved.get("imported", {}).get("lacks", [])
    if "heads" in lacks:
        return {"model_state_dict": trunk}
    cursor, memory = commit.cursor, saved["bank"]["memory"]
    epochs = completed_epochs(cursor, recipe, len(memory))
    loss = OrderedDict() if "bank" in lacks else _loss(memory, saved["bank"]["z"].item(), recipe)
    scaler = saved["scaler"]
    classy = {
        "train": True,
        "base_model": {"model": {"trunk": trunk, "heads": heads}, "meta": {"trunk": {}, "heads": []}},
        "meters": [],
        "optimizer": {"optim": {} if "optimizer" in lacks else _optimizer(saved["optimizer"])},
        "phase_idx": epochs - 1,
        "train_phase_idx": epochs - 1,
        "num_updates": cursor.step * recipe.train.batch_size,
        "losses": [],
        "hooks": {},
        "loss": loss,
        "train_dataset_iterator": {},
    }
    if scaler:
        classy["amp"] = {"loss_scaler0": {"loss_scale": scaler["scale"], "unskipped": scaler["_growth_tracker"]}}
    return {
        "phase_idx": epochs - 1,
        "iteration": cursor.step,
        "loss": loss,
        "iteration_num": cursor.step - epochs * recipe.steps_per_epoch(len(memory)),
        "train_phase_idx": epochs - 1,
        "classy_state_dict": classy,
        "type": "consolidated",
        EXTRAS: asdict(Extras(recipe.to_toml(), commit.data_digest, cursor, saved["bank"]["z"].item())),
    }


def completed_epochs(cursor: Cursor, recipe: Recipe, rows: int) -> int:
    """Return the completed epochs: training leaves `cursor` at the end of the last one, not at the next start."""
    end = rows - rows % recipe.train.batch_size if recipe.train.last_batch == "drop" else rows
    return cursor.epoch + (cursor.samples >= end > 0)


def _loss(memory: Tensor, z: float, recipe: Recipe) -> OrderedDict[str, Tensor]:
    params = [recipe.loss.count(len(memory)), recipe.loss.temperature, z, recipe.memory.momentum]
    return OrderedDict(
        {
            "nce_average.memory": memory,
            "nce_average.params": torch.tensor(params, dtype=torch.float32),
            # the sampler's tables for uniform weights: keep what was drawn, always
            "nce_average.multinomial.prob": torch.ones(len(memory)),
            "nce_average.multinomial.alias": torch.zeros(len(memory), dtype=torch.int64),
        }
    )


def _optimizer(saved: dict[str, Any]) -> dict[str, Any]:
    kept = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "params")
    return {
        "state": {
            index: {"momentum_buffer": state["momentum_buffer"].contiguous()} for index, state in saved["state"].items()
        },
        "param_groups": [{key: group[key] for key in kept} for group in saved["param_groups"]],
    }


def vissl_bytes(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
