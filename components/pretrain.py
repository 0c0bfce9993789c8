"""The training as a step, in this process or by a job: shards -> a network, its memory bank, checkpoints."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def pretrain(
    data: str,
    root: str,
    run: str,
    recipe: str,
    overrides: str = "",
    options: str = "",
    backend: str = "local",
    job: str = "",
    kfp_run: str = "",
) -> str:
    """Train as ROOT/runs/RUN, or resume it; return the run's URI.

    `overrides` (of the recipe), `options` (`pirl train --help`) and `job` (settings of the job, on a cluster) are
    NAME=VALUE items separated by blanks. `kfp_run` is the id of the KFP run, a label of the job.
    """
    from components.step import labels_of, step
    from pirl.backends import prepare_training

    out = f"{root}/runs/{run}"
    with step(out, "pretrain"):
        chosen, training = prepare_training(
            recipe, data=data, out=out, overrides=overrides, options=options, backend=backend, job=job
        )
        if code := chosen.run(training, labels_of(kfp_run)):
            raise SystemExit(code)
    return out
