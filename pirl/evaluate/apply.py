"""An evaluation by its specification: the protocol that it names, on its run and data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pirl.evaluate.fast import evaluate_bank, evaluate_run
from pirl.evaluate.spec import EvaluationOptions, EvaluationSpec
from pirl.evaluate.zoo import ZooProtocol, evaluate_layers
from pirl.results import Evaluation
from pirl.run import Run
from pirl.settings import validated


def apply_protocol(
    spec: EvaluationSpec, progress: Callable[[str], None] = lambda text: None
) -> Evaluation | dict[str, Any]:
    """Return the result: of the protocol zoo the content of `eval_zoo.json`, else an evaluation."""
    if spec.protocol == "zoo":
        protocol = ZooProtocol() if spec.epochs is None else ZooProtocol(epochs=spec.epochs)
        return evaluate_layers(spec.run, spec.data, spec.test, protocol, spec.workers, progress)
    if spec.protocol == "bank":
        return evaluate_bank(spec.run, spec.data, spec.test)
    return evaluate_run(spec.run, spec.data, spec.test, progress)


def evaluate_options(
    run: str | Path | Run,
    data: str | Path,
    test: str | Path,
    *,
    progress: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Evaluation | dict[str, Any]:
    """Probe the frozen backbone of a run, as `pirl eval`; return the scores, of the protocol zoo a dictionary.

    data, test: labelled shards to train the probe on and to test it on. options: those of the command, such as
    protocol, epochs and workers.

        result = pirl.evaluate("runs/mine", "shards/train", "shards/test")
        result.pretrained["knn"].top1.mean
    """
    chosen = validated(EvaluationOptions, options, "options", entry="option")
    uri = run.uri if isinstance(run, Run) else str(run)
    return apply_protocol(EvaluationSpec.parse(uri, data=str(data), test=str(test), options=chosen), progress)
