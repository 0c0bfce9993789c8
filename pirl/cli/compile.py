"""`pirl compile`: a pipeline as YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError, did_you_mean
from .app import app, console


@app.command("compile")
def compile_pipeline(
    out: Annotated[Path | None, typer.Argument(help="File to write; else pipelines/NAME.yaml.")] = None,
    pipeline: Annotated[str, typer.Option(help="Pipeline.")] = "pirl-pretrain",
) -> None:
    """Compile a pipeline to YAML for a KFP cluster. PIRL_STEPS_IMAGE names the image of its steps.

    Example: pirl compile pirl-pretrain.yaml
    """
    from pipelines.compiled import PIPELINES, compiled

    if pipeline not in PIPELINES:
        raise UsageError(
            f"pipeline {pipeline!r} does not exist.{did_you_mean(pipeline, PIPELINES)}",
            f"the pipelines are {', '.join(PIPELINES)}",
        )
    out = out or Path("pipelines") / f"{pipeline}.yaml"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(compiled(pipeline).text)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}", "name another file") from None
    console.print(str(out))
