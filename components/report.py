"""The report as a step: a run -> one page that shows it."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def report(
    run: str,
    train_data: str,
    test_data: str,
    verdict: str,
    page: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
) -> str:
    """Write the run's report.html; return its URI. `verdict` is a version's URI or "reject".

    The artifacts, which KFP's UI renders, are the same page, and the gate's reasons with the rates.
    """
    from pathlib import Path

    from components.step import step
    from pirl.report import render_report, save_report
    from pirl.report.summary import run_summary

    with step(run, "report"):
        text = render_report(run, train_data, test_data)
        Path(page.path).write_text(text)
        Path(summary.path).write_text(run_summary(run))
        return save_report(run, text)
