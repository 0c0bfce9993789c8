"""An evaluation by its specification: the protocol that it names, on its run and data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pirl.evaluate.fast import evaluate_bank, evaluate_run
from pirl.evaluate.spec import EvaluationSpec
from pirl.evaluate.zoo import ZooProtocol, evaluate_layers
from pirl.results import Evaluation


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
