"""Entry point of a training: `python -m pirl.train SPEC.json`.

Alone it starts the ranks of this machine as `torchrun` does, by the same `PET_*` environment; under `torchrun` it is
one rank.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .launch import exit_process, report_outcome
from .training.start import start


def main(argv: Sequence[str] | None = None) -> int:
    """Train by the JSON file of a specification; return the exit code."""
    return report_outcome(lambda: start(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    exit_process(main)
