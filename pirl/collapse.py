"""Collapse of a training: all embeddings in one point, as the last logged interval shows it."""

from __future__ import annotations

from .lines import MetricsLine

DRAWN = 0.85  # similarity to rows of other images: near 0 over the sphere, 0.64 for independent ones after a ReLU
MARGIN = 0.1  # by which an image's own row is closer than the rows of others


def collapse(line: MetricsLine | None) -> str:
    """Return why the last line of `metrics.jsonl` shows a collapse; "" where it shows none, or lacks the similarities.

    An image resembles the rows of other images as it resembles its own. In the first epoch the rows are random: both
    similarities are near 0, which is not a collapse.
    """
    if line is None:
        return ""
    own, drawn = line.get("pos_similarity"), line.get("neg_similarity")
    if own is None or drawn is None or not (drawn > DRAWN and own - drawn < MARGIN):
        return ""
    spread = line.get("embedding_std")
    text = f"the embeddings have collapsed: similarity to the own row {own:.3f}, to drawn rows {drawn:.3f}"
    return text if spread is None else f"{text}, spread {spread:.3f} (1: even over the sphere)"
