"""A KFP backend: versions of pipelines, runs of them, and schedules (KFP's recurring runs)."""

from __future__ import annotations

import io
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp
from kfp_server_api import ApiException, V2beta1Pipeline
from kfp_server_api.exceptions import OpenApiException
from urllib3.exceptions import HTTPError

from pipelines.compiled import Compiled
from pirl.errors import PirlError, UsageError, did_you_mean

FINAL = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED", "ERROR")
LONGEST_OUTAGE_S = 300.0
HINTS = {
    401: "set KFP_TOKEN to a token of the backend",
    403: "set KFP_TOKEN to a token of the backend, and --namespace to one of yours",
    404: "look at --endpoint: it is the address of KFP's API, for instance http://localhost:8888",
}


@dataclass(frozen=True)
class Version:
    """A version of a pipeline on a backend, with its spec as the backend has it."""

    pipeline_id: str
    version_id: str
    name: str
    spec: dict[str, Any]


@dataclass(frozen=True)
class Schedule:
    """A recurring run."""

    id: str
    name: str
    enabled: bool
    cron: str
    pipeline_id: str
    version_id: str
    arguments: dict[str, Any]
    max_concurrency: int
    no_catchup: bool
    service_account: str
    error: str = ""


class Backend:
    """KFP's API (v2beta1) at `endpoint`. `namespace` is the profile's on a backend of several users.

    A refusal by the backend, or a backend that is unavailable, is a `PirlError`.
    """

    def __init__(self, endpoint: str, namespace: str = "", token: str = "") -> None:
        if not endpoint.startswith(("http://", "https://")):
            raise UsageError(f"{endpoint!r} is not a KFP API's address", "http://HOST:8888 or https://HOST/pipeline")
        self.endpoint, self.namespace = endpoint.rstrip("/"), namespace
        with self._call("report its health"):
            self._client = _Client(host=self.endpoint, namespace=namespace or "kubeflow", existing_token=token or None)
            if namespace:  # because without one the client has checked its health already
                self._client.get_kfp_healthz()

    def newest(self, pipeline: str, name: str = "") -> Version | None:
        """Return the newest version of a pipeline, or the newest of those that are named `name`; None without one."""
        with self._call(f"find the pipeline {pipeline}"):
            pipelines = self._client.list_pipelines(
                filter=_named(pipeline), page_size=2, namespace=self.namespace or None
            ).pipelines
            if not pipelines:
                return None
            versions = self._client.list_pipeline_versions(
                pipelines[0].pipeline_id, sort_by="created_at desc", page_size=1, filter=_named(name) if name else None
            ).pipeline_versions
        if not versions:
            return None
        version = versions[0]
        return Version(version.pipeline_id, version.pipeline_version_id, version.display_name, version.pipeline_spec)

    def upload(self, pipeline: Compiled) -> Version:
        """Make this the pipeline's newest version."""
        with self._call(f"take the pipeline {pipeline.name}"), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{pipeline.name}.yaml"
            path.write_text(pipeline.text)
            pipelines = self._client.list_pipelines(
                filter=_named(pipeline.name), page_size=2, namespace=self.namespace or None
            ).pipelines
            if pipelines:
                pipeline_id = pipelines[0].pipeline_id
            else:  # `upload_pipeline` would also make a version, of the pipeline's name instead of its own
                made = self._client.pipelines.pipeline_service_create_pipeline(
                    V2beta1Pipeline(
                        display_name=pipeline.name,
                        name=pipeline.name,
                        description=pipeline.spec["pipelineInfo"].get("description"),
                        namespace=self.namespace or None,
                    )
                )
                pipeline_id = made.pipeline_id
            version = self._client.upload_pipeline_version(str(path), pipeline.version, pipeline_id=pipeline_id)
        return Version(pipeline_id, version.pipeline_version_id, pipeline.version, pipeline.spec)

    def run(
        self, version: Version, name: str, arguments: dict[str, Any], experiment: str, service_account: str = ""
    ) -> str:
        """Start a run; return its id."""
        with self._call(f"run {name}"):
            started = self._client.run_pipeline(
                self._experiment(experiment),
                name,
                params=arguments,
                pipeline_id=version.pipeline_id,
                version_id=version.version_id,
                service_account=service_account or None,
            )
        return started.run_id

    def link(self, run_id: str) -> str:
        """Return the address of the run's page, at `KF_PIPELINES_UI_ENDPOINT` or, without it, at `endpoint`."""
        return f"{os.environ.get('KF_PIPELINES_UI_ENDPOINT') or self.endpoint}/#/runs/details/{run_id}"

    def wait(self, run_id: str, progress: Callable[[str], None], every_s: float = 5.0) -> None:
        """Wait until the run has ended, through restarts of the backend; raise `PirlError` unless it SUCCEEDED."""
        state, answered = None, time.monotonic()
        while True:
            try:
                with self._call("report the run's state"):
                    run = self._client.get_run(run_id)
                answered = time.monotonic()
            except UnansweredError:
                if time.monotonic() - answered > LONGEST_OUTAGE_S:
                    raise
                time.sleep(every_s)
                continue
            if run.state != state:
                state = run.state
                progress(f"{state or 'not started'}")
            if state in FINAL:
                break
            time.sleep(every_s)
        if state != "SUCCEEDED":
            if not _failed_steps(run):  # because the backend reports the steps a moment later than the run
                time.sleep(every_s)
                with self._call("report the run's state"):
                    run = self._client.get_run(run_id)
            stopped = any(past.state == "CANCELING" for past in run.state_history or [])
            where = f" in {', '.join(failed)}" if (failed := _failed_steps(run)) else ""
            raise PirlError(
                f"the run {run_id} ended as {state}{where}" + (", because it was terminated" if stopped else ""),
                f"its steps' logs: {self.link(run_id)}, or "
                f"kubectl -n {self.namespace or 'kubeflow'} logs -l pipeline/runid={run_id} -c main --prefix --tail=30",
            )

    def schedules(self, name: str = "") -> list[Schedule]:
        """Return all schedules, or those of that name, the newest first; a name is not unique on a backend."""
        schedules: list[Schedule] = []
        token = ""
        while True:
            with self._call("list schedules"):
                page = self._client.list_recurring_runs(
                    page_token=token,
                    page_size=100,
                    sort_by="created_at desc",
                    namespace=self.namespace or None,
                    filter=_named(name) if name else None,
                )
            schedules += page.recurring_runs or []
            token = page.next_page_token
            if not token:
                return [_schedule(one) for one in schedules]

    def schedule(
        self,
        name: str,
        version: Version,
        arguments: dict[str, Any],
        cron: str,
        experiment: str,
        service_account: str = "",
    ) -> str:
        """Make this the one enabled schedule of that name; return "created", "updated" or "unchanged".

        A backend cannot change a schedule: a new one is made before the old one is retired, so that whatever breaks in
        between leaves one that works, and the same call again leaves only one. An old one with an active run is
        paused, because Kubernetes would delete the run with it; a later call deletes it.
        """
        existing = self.schedules(name)
        same = [
            one
            for one in existing
            if (one.cron, one.version_id, one.arguments) == (cron, version.version_id, arguments)
            and (one.max_concurrency, one.no_catchup) == (1, True)
            and service_account in ("", one.service_account)
        ]
        if same:
            kept = same[0].id
            done = "unchanged" if same[0].enabled and len(existing) == 1 else "updated"
            if not same[0].enabled:
                self.resume(same[0])
        else:
            done = "updated" if existing else "created"
            with self._call(f"schedule {name}"):
                made = self._client.create_recurring_run(
                    self._experiment(experiment),
                    name,
                    cron_expression=cron,
                    params=arguments,
                    pipeline_id=version.pipeline_id,
                    version_id=version.version_id,
                    max_concurrency=1,
                    no_catchup=True,
                    enabled=True,
                    service_account=service_account or None,
                )
            kept = made.recurring_run_id
        for one in existing:
            if one.id != kept and self.active_runs(one):
                self.pause(one)
            elif one.id != kept:
                self.delete(one)
        return done

    def find_schedules(self, name: str) -> list[Schedule]:
        """Return the schedules of that name, at least one; raise `UsageError` without one."""
        schedules = self.schedules(name)
        if not schedules:
            nearest = did_you_mean(name, [one.name for one in self.schedules()])
            raise UsageError(f"schedule {name!r} does not exist.{nearest}", "see `pirl schedule list`")
        return schedules

    def pause(self, schedule: Schedule) -> None:
        with self._call(f"pause {schedule.name}"):
            self._client.disable_recurring_run(schedule.id)

    def resume(self, schedule: Schedule) -> None:
        with self._call(f"resume {schedule.name}"):
            self._client.enable_recurring_run(schedule.id)

    def active_runs(self, schedule: Schedule) -> list[str]:
        """Return the ids of its runs that have not ended, among the newest hundred of the backend."""
        with self._call(f"list the runs of {schedule.name}"):
            runs = self._client.list_runs(
                page_size=100, sort_by="created_at desc", namespace=self.namespace or None
            ).runs
        return [run.run_id for run in runs or [] if run.recurring_run_id == schedule.id and run.state not in FINAL]

    def delete(self, schedule: Schedule) -> None:
        """Delete a schedule with all that it started, because its runs' Workflows belong to it."""
        with self._call(f"delete {schedule.name}"):
            self._client.delete_recurring_run(schedule.id)

    def _experiment(self, name: str) -> str:
        return self._client.create_experiment(name, namespace=self.namespace or None).experiment_id

    @contextmanager
    def _call(self, doing: str) -> Iterator[None]:
        """Suppress the client's own messages, and raise its errors as `PirlError`."""
        disabled = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                yield
        except ApiException as error:
            kind = UnansweredError if error.status in (None, 0, 429) or error.status >= 500 else PirlError
            hint = HINTS.get(error.status, "correct the request by its reason, or look at the backend's log")
            raise kind(f"{self.endpoint} did not {doing}: {_reason(error)}", hint) from None
        except HTTPError as error:
            raise UnansweredError(
                f"{self.endpoint} does not answer: {error.__class__.__name__}",
                "look at --endpoint; kubectl -n kubeflow port-forward svc/ml-pipeline 8888 leads to one in a cluster",
            ) from None
        except (OpenApiException, TimeoutError) as error:
            raise PirlError(f"{self.endpoint} did not answer as KFP does: {error}", HINTS[404]) from None
        finally:
            logging.disable(disabled)


class _Client(kfp.Client):
    """KFP's client with one short health check.

    The original repeats it at a wrong address for 25 s, names no reason, and takes a login page for an empty answer.
    """

    def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
        health, _, headers = self._healthz_api.healthz_service_get_healthz_with_http_info()
        if "json" not in headers.get("Content-Type", ""):
            raise OpenApiException("it sent a page, of a login perhaps: set KFP_TOKEN to a token of the backend")
        return health


class UnansweredError(PirlError):
    """The backend is unavailable, which is transient."""


def _named(name: str) -> str:
    """Return KFP's filter for objects of that name."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def _failed_steps(run: Any) -> list[str]:
    """Return the names of a run's steps that failed.

    The backend lists each node of the workflow, of which a step has several: NAME, NAME-driver, NAME(0), executor...
    """
    tasks = (run.run_details.task_details if run.run_details else None) or []
    steps = {name.removesuffix("-driver") for task in tasks if (name := str(task.display_name)).endswith("-driver")}
    failed = {str(task.display_name).removesuffix("-driver") for task in tasks if task.state == "FAILED"}
    return sorted(name for name in steps & failed if name != "root" and not name.startswith("condition-"))


def _schedule(one: Any) -> Schedule:
    trigger = one.trigger.cron_schedule if one.trigger else None
    reference = one.pipeline_version_reference
    return Schedule(
        id=one.recurring_run_id,
        name=one.display_name or "",
        enabled=one.status == "ENABLED",
        cron=(trigger.cron if trigger else None) or "",
        pipeline_id=(reference.pipeline_id if reference else None) or "",
        version_id=(reference.pipeline_version_id if reference else None) or "",
        arguments=(one.runtime_config.parameters if one.runtime_config else None) or {},
        max_concurrency=int(one.max_concurrency or 0),
        no_catchup=bool(one.no_catchup),
        service_account=one.service_account or "",
        error=(one.error.message if one.error else None) or "",
    )


def _reason(error: ApiException) -> str:
    try:
        body = json.loads(error.body)
        text = body.get("message") or body.get("error") or error.reason
    except (TypeError, ValueError, AttributeError):
        text = error.reason
    return f"{error.status} {str(text)[:500]}"
