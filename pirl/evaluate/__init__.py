"""Evaluations of a backbone, by four protocols.

`fast`: features once, a linear probe and nearest neighbours, compared with the same backbone's initial weights.
`bank`: nearest neighbours in the memory bank, without reading the training images.
`finetune`: after `fast`, the whole network trained with 1 % and 10 % of the labels.
`zoo`: that of the published models, a linear classifier on every layer, trained on random crops for 28 epochs.

Names are loaded when they are used: `spec` alone loads no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pirl.evaluate.apply import apply_protocol
    from pirl.evaluate.crops import centre_crop
    from pirl.evaluate.execution import Execution
    from pirl.evaluate.fast import evaluate, evaluate_bank, evaluate_run, evaluate_trunk
    from pirl.evaluate.features import Features, extract
    from pirl.evaluate.finetune import fine_tune
    from pirl.evaluate.images import check_labels
    from pirl.evaluate.load import load_model, load_trunk, require_finite
    from pirl.evaluate.neighbours import nearest
    from pirl.evaluate.probe import Protocol, embed
    from pirl.evaluate.progress import Progress
    from pirl.evaluate.schedules import FinetuneProtocol
    from pirl.evaluate.zoo import ZooProtocol, evaluate_layers

MODULES = (
    "images",
    "load",
    "crops",
    "execution",
    "progress",
    "features",
    "neighbours",
    "probe",
    "fast",
    "zoo",
    "finetune",
    "schedules",
    "apply",
)

__all__ = [
    "Execution",
    "Features",
    "FinetuneProtocol",
    "Progress",
    "Protocol",
    "ZooProtocol",
    "apply_protocol",
    "centre_crop",
    "check_labels",
    "embed",
    "evaluate",
    "evaluate_bank",
    "evaluate_layers",
    "evaluate_run",
    "evaluate_trunk",
    "extract",
    "fine_tune",
    "load_model",
    "load_trunk",
    "nearest",
    "require_finite",
]


def __getattr__(name: str) -> Any:
    """Return a public name from the module that defines it."""
    if name in __all__:
        for module in (import_module(f"pirl.evaluate.{each}") for each in MODULES):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class CallablePackage(ModuleType):
    """This package, which can be called: `pirl.evaluate("runs/mine", "shards/train", "shards/test")`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Evaluate a run, as `pirl.evaluate.apply.evaluate_options`."""
        from pirl.evaluate.apply import evaluate_options

        return evaluate_options(*arguments, **options)


sys.modules[__name__].__class__ = CallablePackage
