"""A run's summary in Markdown: the verdict with its reasons, the rates, the times of the steps."""

from __future__ import annotations

from pirl.report.facts import rates, read_run, verdict
from pirl.run import Run
from pirl.text import duration


def run_summary(uri: str) -> str:
    """Return the summary of the run at `uri`; raise `StorageNotFoundError` where it does not exist."""
    run = read_run(Run.at(uri))
    judgement = verdict(run)
    parts = [f"# {uri.rstrip('/').rpartition('/')[2]}", f"**{judgement.title}**", judgement.helped]
    if judgement.reasons:
        parts.append("\n".join(f"- {reason}" for reason in judgement.reasons))
    if rows := rates(run.evaluation) if run.evaluation else []:
        table = [
            "| probe of the frozen backbone | rate | pretrained | random weights | gain |",
            "|---|---|---|---|---|",
        ]
        for row in rows:
            title = f"{row.title}, {row.detail}" if row.detail else row.title
            table.append(f"| {title} | {row.rate} | {row.pretrained} | {row.random} | {row.gain_text} |")
        parts.append("\n".join(table))
    if run.steps:
        parts.append("Steps: " + ", ".join(f"{step.step} {duration(step.seconds)}" for step in run.steps))
    return "\n\n".join([*parts, ""])
