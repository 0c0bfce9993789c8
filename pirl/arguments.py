"""Arguments of a whole pipeline, refused by its first step: a training would come before the step that reads them."""

from __future__ import annotations

from pirl.config import load_recipe
from pirl.errors import UsageError
from pirl.evaluate.spec import EvaluationOptions, evaluation_options
from pirl.gate import check_question
from pirl.registry import check_name, open_registry
from pirl.settings import split_items
from pirl.training.spec import training_options


def check_arguments(
    recipe: str,
    overrides: str,
    options: str,
    evaluation: str,
    model: str,
    metric: str,
    min_gain: float,
    registry: str,
) -> None:
    """Raise `UsageError` for what the training, the evaluation, the gate or the registration would refuse."""
    load_recipe(recipe, split_items(overrides))
    training_options(options)
    gated_evaluation(evaluation)
    check_question(metric, min_gain)
    check_name(model, "model")
    if registry:
        open_registry(registry)


def gated_evaluation(options: str) -> EvaluationOptions:
    """Return the options of an evaluation before a gate, which reads the protocol fast."""
    chosen = evaluation_options(options)
    if chosen.protocol != "fast":
        raise UsageError(
            f"the gate does not read the protocol {chosen.protocol}: expected fast",
            "omit it; `pirl eval --protocol` evaluates the finished run by another one",
        )
    return chosen
