"""Import and export: backbones in the layouts of other libraries, whole trainings in VISSL's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Literal

from pirl.config import Recipe, parse_recipe
from pirl.errors import UsageError
from pirl.evaluate import load_trunk
from pirl.export.huggingface import folder_files
from pirl.export.importing import Import, examine, import_file
from pirl.export.trunk import detectron2_bytes, onnx_bytes, trunk_bytes
from pirl.export.vissl import to_vissl, vissl_bytes
from pirl.model import Trunk
from pirl.outputs import check_file_output, check_outside
from pirl.run import Run
from pirl.storage import local_path, open_storage, split_file_uri, write_file

__all__ = ["Import", "Layout", "examine", "export", "import_file", "trunk_bytes"]

Layout = Literal["torchvision", "vissl", "onnx", "detectron2", "huggingface"]
FILES: dict[str, Callable[[Trunk, Recipe], bytes]] = {
    "torchvision": trunk_bytes,
    "onnx": onnx_bytes,
    "detectron2": detectron2_bytes,
}
SUFFIXES = {"torchvision": ".safetensors", "vissl": ".torch", "onnx": ".onnx", "detectron2": ".pkl"}


def export(checkpoint: str, out: str | Path, layout: Layout = "torchvision") -> str:
    """Write a checkpoint to the file at `out`, a path or a URI; return its location.

    torchvision: its backbone as safetensors, which is also timm's layout; onnx; detectron2; huggingface: a folder.
    vissl: all of the training.
    """
    if layout == "huggingface":
        return _export_folder(checkpoint, out)
    _, name = split_file_uri(out)
    if PurePath(name).suffix != SUFFIXES[layout]:
        raise UsageError(f"{out} has another suffix than {layout}'s files", f"end it in {SUFFIXES[layout]}")
    check_file_output(out)
    if layout in FILES:
        recipe, _, trunk = load_trunk(checkpoint)
        data = FILES[layout](trunk, recipe)
    else:
        commit, saved = Run.at(checkpoint).load()
        recipe = parse_recipe(saved["recipe"], origin=f"the recipe inside {commit.name}")
        data = vissl_bytes(to_vissl(saved, recipe, commit))
    return write_file(out, data)


def _export_folder(checkpoint: str, out: str | Path) -> str:
    folder = open_storage(out)
    check_outside(folder.uri)
    if (others := folder.children()) and "config.json" not in others:
        raise UsageError(f"{out} is not empty and holds no exported model", "choose a new or empty folder")
    folder.require_writable()
    recipe, _, trunk = load_trunk(checkpoint)
    for name, data in folder_files(trunk, recipe).items():
        folder.write_bytes(name, data)
    return str(local_path(folder) or folder.uri)
