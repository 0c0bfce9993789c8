"""The evaluation as a step: a trained network -> probes of its frozen trunk and of its initial weights."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def linear_eval(run: str, train_data: str, test_data: str, metrics: dsl.Output[dsl.Metrics], options: str = "") -> str:
    """Probe the newest checkpoint of `run` into its folder; return the run's URI.

    `options` (`pirl eval --help`) are NAME=VALUE items separated by blanks. The gate reads the protocol fast.
    """
    from components.step import step
    from pirl.evaluate import apply_protocol
    from pirl.evaluate.spec import EvaluationSpec
    from pirl.results import Evaluation

    with step(run, "linear_eval"):
        result = apply_protocol(EvaluationSpec.parse(run, data=train_data, test=test_data, options=options))
        if isinstance(result, Evaluation):
            for trunk in ("pretrained", "random"):
                for name, scores in getattr(result, trunk).items():
                    metrics.log_metric(f"{trunk}_{name}_top1", scores.top1.mean)
    return run
