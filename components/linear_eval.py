"""The evaluation as a step: a trained network -> probes of its frozen trunk and of its initial weights."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def linear_eval(
    run: str,
    train_data: str,
    test_data: str,
    metrics: dsl.Output[dsl.Metrics],
    confusion: dsl.Output[dsl.ClassificationMetrics],
    options: str = "",
    backend: str = "local",
    job: str = "",
    kfp_run: str = "",
) -> str:
    """Probe the newest checkpoint of `run` into its folder; return the run's URI.

    `options` (`pirl eval --help`) and `job` (settings of the job, on a cluster) are NAME=VALUE items separated by
    blanks. The gate reads the protocol fast, whose probe on all labels has the confusion matrix; finetune begins with
    it. `kfp_run` is the id of the KFP run, a label of the job.
    """
    from components.step import labels_of, step
    from pirl.backends import prepare_evaluation
    from pirl.results import Evaluation

    with step(run, "linear_eval"):
        chosen, program = prepare_evaluation(
            run, data=train_data, test=test_data, options=options, backend=backend, job=job
        )
        if program.result() is None:
            if code := chosen.run(program, labels_of(kfp_run)):
                raise SystemExit(code)
        else:
            program.update()
        result = program.result()
        if isinstance(result, Evaluation):
            for trunk in ("pretrained", "random"):  # last in the name: the UI sorts, and compares what is adjacent
                for name, scores in result.scores(trunk).items():
                    metrics.log_metric(f"{name}_top1_{trunk}", scores.top1.mean)
            if result.confusion:  # at most 21 rows, which the UI can draw
                confusion.log_confusion_matrix(result.confusion.names(result.classes), result.confusion.counts)
    return run
