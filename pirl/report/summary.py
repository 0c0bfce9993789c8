"""A run's summary in Markdown: the verdict with its reasons, the rates, the times of the steps."""

from __future__ import annotations

from pirl.gains import gains, row_title, score_text
from pirl.report.facts import points, read_run, verdict
from pirl.run import Run
from pirl.text import duration


def run_summary(uri: str) -> str:
    """Return the summary of the run at `uri`; raise `StorageNotFoundError` where it does not exist."""
    run = read_run(Run.at(uri))
    judgement = verdict(run)
    parts = [f"# {uri.rstrip('/').rpartition('/')[2]}", f"**{judgement.title}**", judgement.helped]
    if judgement.reasons:
        parts.append("\n".join(f"- {reason}" for reason in judgement.reasons))
    if evaluation := run.evaluation:
        table = [
            "| probe of the frozen backbone | rate | pretrained | random weights | gain | pretraining |",
            "|---|---|---|---|---|---|",
        ]
        for row in gains(evaluation):
            sides = (score_text(side, row.images) for side in (row.pretrained, row.random))
            title = row_title(row.probe, evaluation)
            table.append(f"| {title} | {row.rate} | {' | '.join(sides)} | {points(row.gain)} | {row.decision} |")
        parts.append("\n".join(table))
    if run.steps:
        parts.append("Steps: " + ", ".join(f"{step.step} {duration(step.seconds)}" for step in run.steps))
    return "\n\n".join([*parts, ""])
