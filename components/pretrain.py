"""shards -> a trained network, its memory bank and its checkpoints; here, or by a job on the cluster."""

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
    from pirl.backends import open_backend
    from pirl.programs import Training
    from pirl.training.spec import Options

    out = f"{root}/runs/{run}"
    given = {"nodes": nodes, "gpus": gpus, "image": image, "namespace": namespace, "queue": queue}
    with step(out, "pretrain"):
        chosen = open_backend(backend, shlex.split(job), {**given, "processes": processes})
        options = Options(data=data, out=out, processes=processes or None)
        labels = {"pirl.dev/kfp-run": kfp_run} if kfp_run else {}
        if code := chosen.run(Training(recipe, options, overrides.split()), labels):
            raise SystemExit(code)
    return out
