"""`pirl-retrain`: what a schedule runs. Unchanged, it is one pod of some seconds, and no training.

One step, as every step of a schedule that has nothing to do costs a pod; what it does is `pirl retrain`.
"""

from kfp import dsl

from components.retrain import retrain
from pipelines.cluster import on_cluster


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
) -> None:
    """The arguments of `pirl-pretrain`, but for `run`, which is named after what is trained;
    `warm_epochs` as in `pirl retrain`."""
    task = retrain(
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
        kfp_run=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
    )
    on_cluster(task)
