"""An evaluation -> one word, on which the pipeline branches."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def gate(run: str, root: str, model: str, metric: str, min_gain: float, registry: str = "") -> str:
    """ "promote" if pretraining helped enough and no champion is better, else "reject"; the reasons go to gate.json."""
    from components.step import step
    from pirl.registry import decide

    with step(run, "gate"):
        return "promote" if decide(run, registry or f"{root}/registry", model, metric, min_gain) else "reject"
