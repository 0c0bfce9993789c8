"""Optional libraries: the extras of the package, imported when they are used."""

from __future__ import annotations

from importlib.util import find_spec

from .errors import UsageError

EXTRAS = {
    "heif": ("pillow_heif",),
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow",),
    "wandb": ("wandb",),
    "sklearn": ("sklearn",),
    "parquet": ("pyarrow",),
    "timm": ("timm",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
}
"""Extra of pyproject.toml -> the modules that it installs."""

SINKS = ("tensorboard", "mlflow", "wandb")
"""Extras that are also sinks of metrics."""


def missing(extra: str) -> list[str]:
    """Return the modules of an extra that are not installed."""
    return [name for name in EXTRAS[extra] if find_spec(name) is None]


def require(extra: str, purpose: str) -> None:
    """Raise `UsageError` naming the extra where one of its modules is not installed."""
    if names := missing(extra):
        raise UsageError(
            f"{purpose} needs {', '.join(names)}, which is not installed", f"pip install 'pirl-pipeline[{extra}]'"
        )
