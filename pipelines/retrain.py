"""`pirl-retrain`: the pipeline of a schedule. Up to date, it is one pod of some seconds without a training.

It has one step, which is `pirl retrain`, because every step costs a pod, also when it is a no-op.
"""

from kfp import dsl

from components.retrain import retrain


@dsl.pipeline(name="pirl-retrain", description="A new champion when images, recipe or code have changed, else nothing")
def pirl_retrain(
    train_source: str,
    test_source: str,
    root: str,
    recipe: str,
    overrides: str = "",
    model: str = "pirl",
    metric: str = "linear_1pct",
    min_gain: float = 0.01,
    warm_epochs: int = -1,
    registry: str = "",
    options: str = "",
    backend: str = "local",
    job: str = "",
    source_options: str = "",
) -> None:
    """Train, evaluate and register a model if its images, recipe or code have changed.

    The arguments are those of `pirl-pretrain` without `run`, which is named after the training; `warm_epochs` as in
    `pirl retrain`.
    """
    retrain(
        train_source=train_source,
        test_source=test_source,
        root=root,
        recipe=recipe,
        overrides=overrides,
        model=model,
        metric=metric,
        min_gain=min_gain,
        warm_epochs=warm_epochs,
        registry=registry,
        options=options,
        backend=backend,
        job=job,
        source_options=source_options,
        kfp_run=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
    )
