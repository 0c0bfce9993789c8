"""What has changed -> a new champion; or nothing to do."""

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
    processes: int,
    backend: str,
    nodes: int,
    gpus: int,
    image: str,
    namespace: str,
    queue: str,
    job: str,
    kfp_run: str = "",
) -> None:
    """Decide within seconds, and train, evaluate and register only if there is something new. As `pirl retrain`.

    `kfp_run` is the id of the KFP run, a label of the job.
    """
    import shlex

    from components.step import told
    from pirl.backends import open_backend
    from pirl.retrain import Retraining, keep_up_to_date

    with told("retrain"):
        given = {"nodes": nodes, "gpus": gpus, "image": image, "namespace": namespace, "queue": queue}
        chosen = open_backend(backend, shlex.split(job), {**given, "processes": processes})
        code = keep_up_to_date(
            Retraining(
                train_source=train_source,
                test_source=test_source,
                root=root,
                registry=f"{root}/registry",
                model=model,
                recipe=recipe,
                overrides=tuple(overrides.split()),
                metric=metric,
                min_gain=min_gain,
                warm_epochs=warm_epochs if warm_epochs >= 0 else None,
                processes=processes,
                backend=chosen,
                labels={"pirl.dev/kfp-run": kfp_run} if kfp_run else {},
            )
        )
    if code:
        raise SystemExit(code)
