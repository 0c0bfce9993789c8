"""The pipelines by name, and as the YAML that a KFP backend accepts."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler

from pipelines.cluster import StepSettings, write_settings
from pipelines.pretrain import pirl_pretrain
from pipelines.retrain import pirl_retrain
from pirl import __version__
from pirl.jobs.steps import require_image

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

    def objects(self, namespace: str) -> str:
        """Return it as a Pipeline and a PipelineVersion, for `kubectl apply` and Argo CD.

        They need a KFP 2.14 or newer that keeps its pipelines in Kubernetes.
        """
        spec, platform = yaml.safe_load_all(self.text)
        api, description = "pipelines.kubeflow.org/v2beta1", spec["pipelineInfo"].get("description", "")
        version = {
            "displayName": self.version,
            "description": description,
            "pipelineName": self.name,
            "pipelineSpec": spec,
            "platformSpec": platform,
        }
        documents = (
            ("Pipeline", self.name, {"displayName": self.name, "description": description}),
            ("PipelineVersion", f"{self.name}-{self.version}", version),
        )
        return yaml.safe_dump_all(
            {"apiVersion": api, "kind": kind, "metadata": {"name": name, "namespace": namespace}, "spec": content}
            for kind, name, content in documents
        )


def compiled(name: str, settings: StepSettings | None = None) -> Compiled:
    """Return the pipeline of that name, its steps with these settings on a cluster.

    The image is by default the one that PIRL_STEPS_IMAGE named when this process began.
    """
    require_image()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(PIPELINES[name], str(path))
        text = path.read_text()
    heading = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    spec = next(yaml.safe_load_all(text))
    platform = write_settings(spec, settings or StepSettings())
    return Compiled(name, heading + yaml.safe_dump_all([spec, platform]))
