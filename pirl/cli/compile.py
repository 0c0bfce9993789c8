"""`pirl compile`: the pipeline as YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app, console


@app.command("compile")
def compile_pipeline(out: Annotated[Path, typer.Argument(help="File to write.")] = Path("pirl-pretrain.yaml")) -> None:
    """Compile the pipeline to YAML for a KFP cluster.

    Example: pirl compile pirl-pretrain.yaml
    """
    from kfp import compiler

    from pipelines.pretrain import pirl_pretrain

    compiler.Compiler().compile(pirl_pretrain, str(out))
    console.print(str(out), soft_wrap=True)
