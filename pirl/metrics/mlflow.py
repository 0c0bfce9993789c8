"""A run of MLflow: the recipe as parameters, metrics by step.

`MLFLOW_TRACKING_URI` names the server or database, `MLFLOW_EXPERIMENT_NAME` the experiment (pirl). Without it a run on
a local disk gets a file store in RUN/sinks/mlflow.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from ..errors import StorageNotFoundError, UsageError
from ..run import SINKS, Run
from ..storage import local_path
from .background import Background

URI, EXPERIMENT = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"
FILE_STORE = "MLFLOW_ALLOW_FILE_STORE"
KEPT = "mlflow.json"
"""Object of RUN/sinks with the identity of the MLflow run, so that a resumed training continues it."""


class MLflow(Background):
    """One run of MLflow for a run of this library, however often it is resumed."""

    name = "mlflow"

    def open(self, step: int) -> None:
        """Open the MLflow run of this training, a new one at its first start."""
        uri = os.environ.get(URI) or self._file_store()
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric: Any = Metric
        self._client: Any = MlflowClient(tracking_uri=uri)
        sinks = self.context.run / SINKS
        try:
            kept = sinks.read_json(KEPT)
        except StorageNotFoundError:
            kept = {}
        if kept.get("tracking_uri") == uri:
            self._id = str(kept["run_id"])
            self._client.update_run(self._id, status="RUNNING")
            return
        name = os.environ.get(EXPERIMENT) or "pirl"
        experiment = self._client.get_experiment_by_name(name)
        identity = experiment.experiment_id if experiment else self._client.create_experiment(name)
        run = self._client.create_run(
            identity, run_name=Run(self.context.run).name, tags={"pirl.run": self.context.run.uri}
        )
        self._id = run.info.run_id
        if recipe := self.context.recipe:
            keys = {"recipe": recipe.name, **recipe.keys()}
            self._client.log_batch(self._id, params=[Param(key, str(value)) for key, value in keys.items()])
        sinks.write_json(KEPT, {"tracking_uri": uri, "run_id": self._id})

    def write(self, values: Mapping[str, float]) -> None:
        """Log the metrics of one step."""
        now, step = int(time.time() * 1000), int(values["step"])
        metrics = [self._metric(name, float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self, state: str) -> None:
        """Set how the run has ended."""
        status = {"done": "FINISHED", "preempted": "KILLED"}.get(state, "FAILED")
        self._client.set_terminated(self._id, status)

    def _file_store(self) -> str:
        if local_path(self.context.run) is None:
            raise UsageError(f"{URI} is not set, which a run in a remote storage needs", f"set {URI} to your server")
        os.environ.setdefault(FILE_STORE, "true")  # MLflow 3 refuses a file store without it
        return self.folder.resolve().as_uri()
