"""The report as a step: a run -> one page that shows it."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def report(run: str, train_data: str, test_data: str, verdict: str) -> str:
    """Write the run's report.html; return its URI. `verdict` is a version's URI or "reject"."""
    from components.step import step
    from pirl.report import write_report

    with step(run, "report"):
        return write_report(run, train_data, test_data)
