"""shards -> a trained network, its memory bank and its checkpoints."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def pretrain(data: str, root: str, run: str, recipe: str, overrides: str, processes: int) -> str:
    """Train on this machine as ROOT/runs/RUN, or go on with it; returns the run's URI.

    `overrides` are key=value settings separated by spaces; `processes` 0 lets the machine decide.
    """
    from components.step import step
    from pirl.train import Options, launch

    out = f"{root}/runs/{run}"
    with step(out, "pretrain"):
        code = launch(recipe, Options(data=data, out=out, processes=processes or None), overrides.split())
        if code:
            raise SystemExit(code)
    return out
