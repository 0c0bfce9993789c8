"""PIRL (Misra & van der Maaten, CVPR 2020): pretext-invariant representation learning as a training pipeline.

    pirl.shard("photos/train", "shards/train")
    run = pirl.pretrain("demo", "shards/train", "runs/mine")
    names, features = pirl.load("runs/mine").embed("photos/test")
    result = pirl.evaluate("runs/mine", "shards/train", "shards/test")

Names are loaded when they are used: `import pirl` alone loads neither torch nor numpy.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pirl.api import pretrain, shard
    from pirl.embedding import Embeddings, Encoder, load
    from pirl.embedding.transformer import Embedder
    from pirl.errors import PirlError
    from pirl.evaluate.apply import evaluate_options as evaluate
    from pirl.run import Run

try:
    __version__ = version("pirl-pipeline")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

MODULES = {
    "Embedder": "pirl.embedding.transformer",
    "Embeddings": "pirl.embedding",
    "Encoder": "pirl.embedding",
    "PirlError": "pirl.errors",
    "Run": "pirl.run",
    "load": "pirl.embedding",
    "pretrain": "pirl.api",
    "shard": "pirl.api",
}
"""Public name -> the module that defines it. `evaluate` is a package that can be called."""

__all__ = [
    "Embedder",
    "Embeddings",
    "Encoder",
    "PirlError",
    "Run",
    "__version__",
    "evaluate",
    "load",
    "pretrain",
    "shard",
]


def __getattr__(name: str) -> Any:
    """Return a public name from the module that defines it."""
    if name == "evaluate":
        return import_module("pirl.evaluate")
    if name in MODULES:
        return getattr(import_module(MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the names of the package, public ones first loaded or not."""
    return sorted({*globals(), *__all__})
