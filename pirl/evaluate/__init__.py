"""What a frozen trunk knows: linear probes and nearest neighbours on its features, beside its own initial weights."""

from __future__ import annotations

from pirl.evaluate.probe import (
    Features,
    Protocol,
    as_json,
    centre_crop,
    check_labels,
    evaluate,
    evaluate_run,
    extract,
    few_labels,
    linear_probe,
    load_pixels,
    load_trunk,
    nearest_neighbours,
    neighbours,
    probe,
    split_checkpoint_uri,
    spread,
)

__all__ = [
    "Features",
    "Protocol",
    "as_json",
    "centre_crop",
    "check_labels",
    "evaluate",
    "evaluate_run",
    "extract",
    "few_labels",
    "linear_probe",
    "load_pixels",
    "load_trunk",
    "nearest_neighbours",
    "neighbours",
    "probe",
    "split_checkpoint_uri",
    "spread",
]
