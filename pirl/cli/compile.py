"""`pirl compile`: a pipeline as YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError, did_you_mean
from .app import app, console
from .options import items_from
from .submit import StepItems


@app.command("compile")
def compile_pipeline(
    out: Annotated[Path | None, typer.Argument(help="File to write; else pipelines/NAME.yaml.")] = None,
    pipeline: Annotated[str, typer.Option(help="Pipeline.")] = "pirl-pretrain",
    step: StepItems = None,
    kubernetes_manifests: Annotated[
        bool, typer.Option("--kubernetes-manifests", help="Write Pipeline and PipelineVersion for `kubectl apply`.")
    ] = False,
    namespace: Annotated[str, typer.Option(help="Namespace of these objects: that of KFP.")] = "kubeflow",
) -> None:
    """Compile a pipeline to YAML for a KFP cluster. PIRL_STEPS_IMAGE names the image of its steps.

    Example: pirl compile pirl-pretrain.yaml --step memory=8Gi

    Example: pirl compile objects.yaml --kubernetes-manifests
    """
    from pipelines.cluster import step_settings
    from pipelines.compiled import PIPELINES, compiled

    if pipeline not in PIPELINES:
        raise UsageError(
            f"pipeline {pipeline!r} does not exist.{did_you_mean(pipeline, PIPELINES)}",
            f"the pipelines are {', '.join(PIPELINES)}",
        )
    package = compiled(pipeline, step_settings(step or items_from("PIRL_STEP")()))
    out = out or Path("pipelines") / f"{pipeline}.yaml"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(package.objects(namespace) if kubernetes_manifests else package.text)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}", "name another file") from None
    console.print(str(out))
