"""`pirl submit`: a run of a pipeline on a KFP backend."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import typer

from .. import logs
from ..errors import EXIT_FAILURE, PirlError, UsageError, did_you_mean
from .app import DRY_RUN_HELP, app, console
from .options import items_from

Pipeline = Annotated[str, typer.Argument(metavar="PIPELINE", help="Name of a pipeline: pirl-pretrain, pirl-retrain.")]
Arguments = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="Arguments of the pipeline.")]
EndpointOption = Annotated[
    str,
    typer.Option(
        envvar=["KFP_ENDPOINT", "KF_PIPELINES_ENDPOINT"], help="Address of KFP's API; a token for it is in KFP_TOKEN."
    ),
]
Namespace = Annotated[str, typer.Option(help="Your profile's namespace, on a backend of several users.")]
Experiment = Annotated[str, typer.Option(help="KFP's experiment, made if it is not there.")]
ServiceAccount = Annotated[str, typer.Option(help="Service account of the steps; else the backend's default.")]
StepItems = Annotated[
    list[str] | None,
    typer.Option(
        "--step",
        metavar="NAME=VALUE",
        help="Setting of the steps' pods (docs/configuration.md), or all of them in PIRL_STEP; may be repeated.",
    ),
]
Upload = Annotated[
    bool, typer.Option("--upload/--no-upload", help="Upload this code's pipeline if the backend has another.")
]


@app.command()
def submit(
    pipeline: Pipeline,
    arguments: Arguments = None,
    endpoint: EndpointOption = "",
    namespace: Namespace = "",
    experiment: Experiment = "pirl",
    service_account: ServiceAccount = "",
    upload: Upload = True,
    step: StepItems = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until the run has ended; a failed one is a failure.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the run as JSON.")] = False,
    dry_run: Annotated[bool, typer.Option(help=DRY_RUN_HELP)] = False,
) -> None:
    """Run a pipeline on KFP: by its name, in its newest version, with arguments that were checked.

    A pipeline of this code is uploaded first, if the backend does not have it as it is here.

    Example: pirl submit pirl-pretrain recipe=r50-200ep-mlp root=s3://bucket/pirl \
train_source=s3://bucket/train test_source=s3://bucket/test backend=pytorchjob job='nodes=4 gpus=8' --wait
    """
    backend: Any = connect(endpoint, namespace) if endpoint or not dry_run else None
    version, values = resolve(backend, pipeline, arguments or [], step, upload, dry_run)
    name = f"{pipeline} {values['run']}" if values.get("run") else pipeline
    if dry_run:
        print_plan("would run", pipeline, version, values)
        preflight(pipeline, values, step, service_account)
        return
    run_id = backend.run(version, name, values, experiment, service_account)
    link = backend.link(run_id)
    if as_json:
        result = {"run_id": run_id, "name": name, "version": version.name, "arguments": values, "url": link}
        logs.output(f"{json.dumps(result)}\n")
    else:
        console.print(f"{name}, version {version.name}: {link}")
    if wait:
        backend.wait(run_id, lambda state: None if as_json else console.print(state))


@app.command()
def upload(
    pipeline: Pipeline, endpoint: EndpointOption = "", namespace: Namespace = "", step: StepItems = None
) -> None:
    """Upload a pipeline of this code to KFP, if it is not there, and print the id of its version.

    It is what the stock client takes: kfp run create -e EXPERIMENT -n PIPELINE -v VERSION.

    Example: pirl upload pirl-pretrain
    """
    from pipelines.cluster import step_settings
    from pipelines.compiled import PIPELINES, compiled

    if pipeline not in PIPELINES:
        raise UsageError(
            f"pipeline {pipeline!r} does not exist in this code.{did_you_mean(pipeline, PIPELINES)}",
            f"here are {', '.join(PIPELINES)}",
        )
    backend = connect(endpoint, namespace)
    package = compiled(pipeline, step_settings(step or items_from("PIRL_STEP")()))
    version = backend.newest(pipeline, package.version) or backend.upload(package)
    logs.output(f"{version.version_id}\n")


def connect(endpoint: str, namespace: str) -> Any:
    """Return the `Backend` at `endpoint`."""
    if not endpoint:
        raise UsageError("no KFP backend is named", "--endpoint http://HOST:8888, or KFP_ENDPOINT in the environment")
    from pipelines.backend import Backend

    return Backend(endpoint, namespace, os.environ.get("KFP_TOKEN", ""))


def resolve(
    backend: Any, pipeline: str, items: list[str], step: list[str] | None, upload: bool, dry_run: bool
) -> tuple[Any, dict[str, Any]]:
    """Return the `Version` to run and its checked arguments; upload nothing before that, nor in a dry run."""
    from pipelines.arguments import complete, inputs_of, require_all, typed_arguments
    from pipelines.cluster import step_settings
    from pipelines.compiled import PIPELINES, compiled

    settings = step_settings(step or items_from("PIRL_STEP")())
    package: Any = compiled(pipeline, settings) if pipeline in PIPELINES and upload else None
    if backend is None and package is None:
        raise UsageError(
            f"pipeline {pipeline!r} does not exist in this code.{did_you_mean(pipeline, PIPELINES)}",
            f"here are {', '.join(PIPELINES)}; --endpoint asks a backend for others",
        )
    version: Any = backend.newest(pipeline, package.version if package else "") if backend else None
    if package is None and version is None:
        raise PirlError(
            f"the backend has no pipeline {pipeline!r}.{did_you_mean(pipeline, PIPELINES)}",
            "look at its name" if pipeline not in PIPELINES else "upload it: leave --no-upload away",
        )
    inputs = inputs_of(package.spec if package else version.spec)
    values = typed_arguments(pipeline, inputs, items)
    if pipeline in PIPELINES:
        values = complete(values, inputs)
    require_all(pipeline, inputs, values)
    if backend and package and version is None and not dry_run:
        version = backend.upload(package)
    return version, values


def print_plan(action: str, pipeline: str, version: Any, values: dict[str, Any]) -> None:
    """Print the pipeline, version and arguments of a dry run."""
    source = f"version {version.name}" if version else "this code's version, to be uploaded first"
    console.print(f"{action} {pipeline}, {source}")
    for name, value in values.items():
        console.print(f"  {name} = {json.dumps(value)}")


def preflight(pipeline: str, values: dict[str, Any], step: list[str] | None, service_account: str) -> None:
    """Print images, account and checks of a dry run; end with 1 where a check has failed."""
    from pipelines.cluster import step_settings
    from pipelines.compiled import PIPELINES

    from .preflight import print_pods

    if pipeline not in PIPELINES:
        return
    settings = step_settings(step or items_from("PIRL_STEP")())
    if print_pods(values, settings.image, service_account):
        raise typer.Exit(EXIT_FAILURE)
