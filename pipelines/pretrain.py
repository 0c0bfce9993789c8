"""`pirl-pretrain`: images in, an evaluated and registered trunk out.

    shard -> pretrain -> linear_eval -> gate -> register -> report
                                          `-----else-----> report (why not)

Steps exchange URIs; large data stays in storage. Every step can be repeated: finished work makes it a no-op.
"""

from typing import Any

from kfp import dsl

from components.gate import gate
from components.linear_eval import linear_eval
from components.pretrain import pretrain
from components.register import register
from components.report import report
from components.shard import shard


def train_to_register(train: Any, test: Any, training: dict[str, Any], gating: dict[str, Any], evaluation: Any) -> None:
    """Add the steps that follow the tasks `train` and `test`, which make shards.

    `training` and `gating` are the steps' parameters, `evaluation` the options of the evaluation.
    """
    train_data, test_data = train.output, test.output
    # a placeholder has to be all of an argument: within a longer text the backend would leave it as it is
    trained = pretrain(data=train_data, **training, kfp_run=dsl.PIPELINE_JOB_ID_PLACEHOLDER)
    trained.after(test)  # which refuses classes that training does not have
    where = {"backend": training["backend"], "job": training["job"], "kfp_run": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
    evaluated = linear_eval(run=trained.output, train_data=train_data, test_data=test_data, options=evaluation, **where)
    checked = gate(run=evaluated.outputs["Output"], **gating)
    data = {"train_data": train_data, "test_data": test_data}
    # both branches, on a parameter that is the gate's only output: the local runner skips any other shape silently
    with dsl.If(checked.output == "promote", name="promote"):
        registered = register(run=trained.output, **{name: gating[name] for name in ("root", "model", "registry")})
        report(run=trained.output, verdict=registered.outputs["Output"], **data)
    with dsl.Else(name="reject"):
        report(run=trained.output, verdict=checked.output, **data)


@dsl.pipeline(
    name="pirl-pretrain", description="Self-supervised pretraining with PIRL: images in, a registered trunk out"
)
def pirl_pretrain(
    train_source: str,
    test_source: str,
    root: str,
    run: str,
    recipe: str,
    overrides: str = "",
    model: str = "pirl",
    metric: str = "linear_1pct",
    min_gain: float = 0.01,
    registry: str = "",
    options: str = "",
    backend: str = "local",
    job: str = "",
    source_options: str = "",
    evaluation: str = "",
) -> None:
    """Train, evaluate and register a model below `root`, a folder or an s3:// prefix.

    Its folders are data/, runs/RUN/, and registry/MODEL/ unless `registry` names another registry.

    `overrides` (of the recipe), `options` (of the training), `source_options` (of reading and sharding the images),
    `evaluation` (its options) and `job` (settings of the jobs that train and evaluate, where `backend` has jobs) are
    NAME=VALUE items separated by blanks.
    """
    where = {"root": root, "run": run, "options": source_options}
    gating = {"model": model, "metric": metric, "min_gain": min_gain, "registry": registry}
    later = {"recipe": recipe, "overrides": overrides, "training": options, "evaluation": evaluation, **gating}
    train = shard(source=train_source, split="train", backend=backend, job=job, **later, **where)
    test = shard(source=test_source, split="test", train_data=train.output, **where)
    train_to_register(
        train,
        test,
        {"root": root, "run": run, "recipe": recipe, "overrides": overrides}
        | {"options": options, "backend": backend, "job": job},
        {"root": root, **gating},
        evaluation,
    )
