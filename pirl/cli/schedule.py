"""`pirl schedule`: runs of a pipeline by the clock, on a KFP backend."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from ..errors import PirlError, UsageError
from .app import DRY_RUN_HELP, Commands, Json, app, console, show_rows
from .submit import (
    Arguments,
    EndpointOption,
    Experiment,
    Namespace,
    Pipeline,
    ServiceAccount,
    StepItems,
    Upload,
    connect,
    preflight,
    print_plan,
    resolve,
)

Name = Annotated[str, typer.Argument(help="Name of a schedule, as in `pirl schedule list`.")]


class PipelineOrVerb(Commands):
    """`pirl schedule PIPELINE` is `pirl schedule set PIPELINE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["set", *args]
        return super().parse_args(ctx, args)


group = typer.Typer(cls=PipelineOrVerb, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(group, name="schedule")


@group.callback()
def schedule() -> None:
    """Run a pipeline on KFP by the clock: pirl-retrain, which trains when something has changed, or another.

    Example: pirl schedule pirl-retrain --cron "0 2 * * 0" recipe=demo train_source=s3://bucket/train \
test_source=s3://bucket/test root=s3://bucket/pirl
    """


@group.command("set")
def set_schedule(
    pipeline: Pipeline,
    arguments: Arguments = None,
    cron: Annotated[
        str, typer.Option(help='When, in UTC unless the backend is set otherwise: "0 2 * * 0", or with seconds first.')
    ] = "",
    name: Annotated[str, typer.Option(help="Name of the schedule; else the pipeline's.")] = "",
    endpoint: EndpointOption = "",
    namespace: Namespace = "",
    experiment: Experiment = "pirl",
    service_account: ServiceAccount = "",
    upload: Upload = True,
    step: StepItems = None,
    dry_run: Annotated[bool, typer.Option(help=DRY_RUN_HELP)] = False,
) -> None:
    """Let there be one schedule of that name (`set` may be left away), enabled, with this version and these arguments.

    A tick waits for the run before it, and missed ticks are not made up for.

    Example: pirl schedule pirl-retrain --cron "0 2 * * 0" recipe=demo train_source=s3://bucket/train \
test_source=s3://bucket/test root=s3://bucket/pirl
    """
    six = six_fields(cron)
    name = name or pipeline
    backend: Any = connect(endpoint, namespace) if endpoint or not dry_run else None
    version, values = resolve(backend, pipeline, arguments or [], step, upload, dry_run)
    if dry_run:
        print_plan(f"would schedule {name} at {six}:", pipeline, version, values)
        preflight(pipeline, values, step, service_account)
        return
    done = backend.schedule(name, version, values, six, experiment, service_account)
    console.print(f"{name}: {done}, {six}, version {version.name}")


@group.command("list")
def list_schedules(endpoint: EndpointOption = "", namespace: Namespace = "", as_json: Json = False) -> None:
    """List the backend's schedules.

    Example: pirl schedule list --endpoint http://localhost:8888
    """
    backend = connect(endpoint, namespace)
    show_rows([vars(one) for one in backend.schedules()], as_json, hide=("id", "pipeline_id", "version_id", "error"))


@group.command()
def pause(name: Name, endpoint: EndpointOption = "", namespace: Namespace = "") -> None:
    """Start no more runs until `resume`.

    Example: pirl schedule pause pirl-retrain
    """
    backend = connect(endpoint, namespace)
    for one in backend.find_schedules(name):
        backend.pause(one)
    console.print(f"{name}: paused")


@group.command()
def resume(name: Name, endpoint: EndpointOption = "", namespace: Namespace = "") -> None:
    """Continue after `pause`, with the next tick.

    Example: pirl schedule resume pirl-retrain
    """
    backend = connect(endpoint, namespace)
    backend.resume(backend.find_schedules(name)[0])  # an older one of the name only waits for its last run
    console.print(f"{name}: resumed")


@group.command()
def delete(name: Name, endpoint: EndpointOption = "", namespace: Namespace = "") -> None:
    """Delete a schedule, unless a run of it still goes: Kubernetes would delete that with it.

    Example: pirl schedule delete pirl-retrain
    """
    backend = connect(endpoint, namespace)
    schedules = backend.find_schedules(name)
    if active := [run for one in schedules for run in backend.active_runs(one)]:
        raise PirlError(
            f"{name} has a run that still goes, {active[0]}, which would be deleted with it",
            f"`pirl schedule pause {name}`, and delete it when the run has ended or was terminated",
        )
    for one in schedules:
        backend.delete(one)
    console.print(f"{name}: deleted")


def six_fields(cron: str) -> str:
    """KFP's form, with the seconds first, of a cron expression of five fields, of six, or like @daily."""
    fields = cron.split()
    if len(fields) == 1 and re.fullmatch(r"@(yearly|annually|monthly|weekly|daily|midnight|hourly|every)", fields[0]):
        return cron
    if len(fields) not in (5, 6) or not all(re.fullmatch(r"[\w*/,?-]+", field) for field in fields):
        raise UsageError(
            f"cron expression {cron!r} is not valid",
            '--cron "MINUTE HOUR DAY MONTH WEEKDAY", for instance "0 2 * * 0" for Sundays at two',
        )
    return " ".join(["0", *fields] if len(fields) == 5 else fields)
