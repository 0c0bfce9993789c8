"""What a frozen trunk knows, by two protocols.

`probe` is the fast one: features once, a linear probe and nearest neighbours, beside the same trunk's initial weights.
`zoo` is that of the published models: a linear classifier on every layer, trained on random crops for 28 epochs.
"""

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
from pirl.evaluate.zoo import ZooProtocol, evaluate_layers

__all__ = [
    "Features",
    "Protocol",
    "ZooProtocol",
    "as_json",
    "centre_crop",
    "check_labels",
    "evaluate",
    "evaluate_layers",
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
