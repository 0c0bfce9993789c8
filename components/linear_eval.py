"""a trained network -> the probes of its frozen trunk, next to those of its initial weights."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def linear_eval(run: str, train_data: str, test_data: str, metrics: dsl.Output[dsl.Metrics]) -> str:
    """Probe the newest checkpoint of `run` into its eval.json; returns the run's URI."""
    from components.step import step
    from pirl.evaluate import evaluate_run

    with step(run, "linear_eval"):
        result = evaluate_run(run, train_data, test_data)
        for trunk in ("pretrained", "random"):
            for name, scores in getattr(result, trunk).items():
                metrics.log_metric(f"{trunk}_{name}_top1", scores.top1.mean)
    return run
