"""An evaluation by its specification: the protocol that it names, on its run and data; what is kept of an earlier one.

Ranks call `apply_protocol`. Before and after them, any process asks `kept_result`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pirl.errors import UsageError
from pirl.evaluate.execution import Execution
from pirl.evaluate.fast import evaluate_bank, evaluate_run, kept_bank, kept_evaluation
from pirl.evaluate.finetune import fine_tune, has_finetune
from pirl.evaluate.progress import Progress
from pirl.evaluate.schedules import SCHEDULES
from pirl.evaluate.spec import EvaluationOptions, EvaluationSpec
from pirl.evaluate.zoo import ZooProtocol, evaluate_layers, kept_layers
from pirl.layer_results import LayersEvaluation
from pirl.results import Evaluation
from pirl.run import Run
from pirl.settings import validated

Result = Evaluation | LayersEvaluation
"""Of the protocol zoo by layers, else an evaluation."""


def apply_protocol(spec: EvaluationSpec, execution: Execution | None = None) -> Result:
    """Return the result, the same on every rank; rank 0 has saved it in the run."""
    execution = execution or Execution()
    if spec.protocol == "zoo":
        return evaluate_layers(spec.run, spec.data, spec.test, zoo_protocol(spec), execution)
    if spec.protocol == "finetune":
        evaluation = evaluate_run(spec.run, spec.data, spec.test, execution)
        return fine_tune(spec.run, spec.data, spec.test, spec.finetune_protocol(), evaluation, execution)
    if spec.protocol == "bank":
        result = evaluate_bank(spec.run, spec.data, spec.test, execution=execution)
        if execution.world.is_main:
            Run.at(spec.run).save_bank_evaluation(result)
        return result
    return evaluate_run(spec.run, spec.data, spec.test, execution)


def zoo_protocol(spec: EvaluationOptions) -> ZooProtocol:
    """Return the settings of the protocol zoo."""
    epochs = spec.epochs or SCHEDULES[spec.schedule][0]
    rate = ZooProtocol.base_lr if spec.base_lr is None else spec.base_lr
    return ZooProtocol(epochs=epochs, base_lr=rate, schedule=spec.schedule)


def kept_result(spec: EvaluationSpec) -> Result | None:
    """Return the result in the run if it is that of the specification: same checkpoint, data and protocol."""
    run = Run.at(spec.run)
    if spec.protocol == "zoo":
        return kept_layers(run, spec.data, spec.test, zoo_protocol(spec))
    if spec.protocol == "bank":
        return kept_bank(run, spec.data, spec.test)
    kept = kept_evaluation(run, spec.data, spec.test)
    if spec.protocol == "finetune" and kept and not has_finetune(kept, spec.finetune_protocol()):
        return None
    return kept


def evaluate_options(
    run: str | Path | Run,
    data: str | Path,
    test: str | Path,
    *,
    progress: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Result:
    """Probe the frozen backbone of a run in this process; return the scores, of the protocol zoo by layers.

    data, test: labelled shards to train the probe on and to test it on. options: those of `pirl eval`, such as
    protocol, epochs and workers (none if not given).

        result = pirl.evaluate("runs/mine", "shards/train", "shards/test")
        result.pretrained["knn"].top1.mean
    """
    chosen = validated(EvaluationOptions, options, "options", entry="option")
    if chosen.processes > 1:
        raise UsageError(
            f"processes is {chosen.processes}, but `pirl.evaluate` runs in this process",
            "omit it, or use the command `pirl eval --processes`",
        )
    uri = run.uri if isinstance(run, Run) else str(run)
    spec = EvaluationSpec.parse(uri, data=str(data), test=str(test), options=chosen)
    return apply_protocol(spec, Execution(workers=max(0, chosen.workers), progress=Progress(progress)))
