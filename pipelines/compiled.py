"""The pipelines by name, and as the YAML that a KFP backend accepts."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler

from components.step import require_image
from pipelines.pretrain import pirl_pretrain
from pipelines.retrain import pirl_retrain
from pirl import __version__

PIPELINES = {"pirl-pretrain": pirl_pretrain, "pirl-retrain": pirl_retrain}


@dataclass(frozen=True)
class Compiled:
    """A pipeline's YAML: the pipeline itself, then the settings of its steps for Kubernetes."""

    name: str
    text: str

    @property
    def version(self) -> str:
        """Return its name on a backend, made of its content: the same pipeline is never uploaded twice."""
        return f"{__version__.replace('+', '-')}-{hashlib.sha256(self.text.encode()).hexdigest()[:12]}"

    @property
    def spec(self) -> dict[str, Any]:
        return next(yaml.safe_load_all(self.text))


def compiled(name: str) -> Compiled:
    """Return the pipeline of that name, with the image that PIRL_STEPS_IMAGE named when this process began."""
    require_image()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(PIPELINES[name], str(path))
        return Compiled(name, path.read_text())
