"""The gate as a step: an evaluation -> "promote" or "reject", on which the pipeline branches."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def gate(run: str, root: str, model: str, metric: str, min_gain: float, registry: str = "") -> str:
    """Return "promote" if pretraining helped enough and no champion is better, else "reject"; write gate.json."""
    from components.step import step
    from pirl.gate import decide
    from pirl.logs import info
    from pirl.run import Workspace

    with step(run, "gate"):
        decision = decide(run, registry or Workspace(root).registry, model, metric, min_gain)
        for reason in decision.reasons:
            info(reason)
        return "promote" if decision.promote else "reject"
