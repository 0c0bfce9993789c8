"""shards -> a trained network, its memory bank and its checkpoints; here, or by a PyTorchJob."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def pretrain(
    data: str,
    root: str,
    run: str,
    recipe: str,
    overrides: str,
    processes: int,
    backend: str = "local",
    nodes: int = 1,
    gpus: int = 0,
    image: str = "",
    namespace: str = "",
    queue: str = "",
    job: str = "",
    kfp_run: str = "",
) -> str:
    """Train as ROOT/runs/RUN, or go on with it; returns the run's URI.

    `overrides` are key=value settings of the recipe separated by spaces. `backend` "local" trains on this machine in
    `processes` ranks (0 lets it decide); "pytorchjob" on the cluster in `nodes` pods of `gpus` GPUs and `processes`
    ranks each (0: one for each GPU), in Kueue's `queue` where one is named. Empty texts are the defaults of
    `pirl.jobs.JobSettings`; `job` has any other of its settings, as NAME=VALUE separated by spaces. `kfp_run` is the
    id of the KFP run, a label of the job.
    """
    import shlex

    from components.step import step
    from pirl.errors import UsageError
    from pirl.train import launch
    from pirl.training.spec import Options

    out = f"{root}/runs/{run}"
    options = Options(data=data, out=out, processes=processes or None)
    with step(out, "pretrain"):
        if backend == "local":
            code = launch(recipe, options, overrides.split())
            if code:
                raise SystemExit(code)
        elif backend == "pytorchjob":
            from pirl.jobs import job_settings, launch_job

            world = {"nodes": nodes, "gpus": gpus, "processes": processes}
            texts = {"image": image, "namespace": namespace, "queue": queue}
            settings = job_settings(shlex.split(job), world | texts)
            labels = {"pirl.dev/kfp-run": kfp_run} if kfp_run else {}
            launch_job(recipe, options, settings, overrides.split(), labels)
        else:
            raise UsageError(f"there is no backend {backend!r}", 'it is "local" or "pytorchjob"')
    return out
