"""Evaluations of a frozen trunk, by two protocols.

`probe` is the fast one: features once, a linear probe and nearest neighbours, beside the same trunk's initial weights;
and nearest neighbours in the memory bank, for which the training images need not be looked at again.
`zoo` is that of the published models: a linear classifier on every layer, trained on random crops for 28 epochs.
"""

from __future__ import annotations

from pirl.evaluate.fast import evaluate, evaluate_bank, evaluate_run, evaluate_trunk
from pirl.evaluate.load import load_model, load_trunk, require_finite
from pirl.evaluate.probe import (
    Features,
    Protocol,
    as_json,
    bank_neighbours,
    centre_crop,
    check_labels,
    embed,
    extract,
    few_labels,
    linear_probe,
    load_pixels,
    nearest_neighbours,
    neighbours,
    probe,
    spread,
)
from pirl.evaluate.zoo import ZooProtocol, evaluate_layers

__all__ = [
    "Features",
    "Protocol",
    "ZooProtocol",
    "as_json",
    "bank_neighbours",
    "centre_crop",
    "check_labels",
    "embed",
    "evaluate",
    "evaluate_bank",
    "evaluate_layers",
    "evaluate_run",
    "evaluate_trunk",
    "extract",
    "few_labels",
    "linear_probe",
    "load_model",
    "load_pixels",
    "load_trunk",
    "nearest_neighbours",
    "neighbours",
    "probe",
    "require_finite",
    "spread",
]
