"""Retraining of a model after changes of data, recipe or code; up to date without them."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def retrain(
    train_source: str,
    test_source: str,
    root: str,
    recipe: str,
    overrides: str,
    model: str,
    metric: str,
    min_gain: float,
    warm_epochs: int,
    registry: str,
    options: str,
    backend: str,
    job: str,
    source_options: str = "",
    kfp_run: str = "",
) -> None:
    """Train, evaluate and register as `pirl retrain`, only after a change; decide that within seconds.

    `overrides`, `options` and `job` as in the step `pretrain`; `source_options` as `options` of the step `shard`.
    `kfp_run` is the id of the KFP run, a label of the job.
    """
    from components.step import labels_of, reporting_errors
    from pirl.backends import open_backend
    from pirl.retraining.retrain import Retraining, keep_up_to_date
    from pirl.settings import split_items
    from pirl.shards import sharding_options
    from pirl.training.spec import training_options

    with reporting_errors("retrain"):
        own = training_options(options)
        code = keep_up_to_date(
            Retraining(
                train_source=train_source,
                test_source=test_source,
                root=root,
                registry=registry or f"{root}/registry",
                model=model,
                recipe=recipe,
                overrides=tuple(split_items(overrides)),
                metric=metric,
                min_gain=min_gain,
                warm_epochs=warm_epochs if warm_epochs >= 0 else None,
                options=own,
                source_options=sharding_options(source_options),
                backend=open_backend(backend, split_items(job), {"processes": own.processes}),
                labels=labels_of(kfp_run),
            )
        )
    if code:
        raise SystemExit(code)
