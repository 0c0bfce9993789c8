"""Entry point of a training: `python -m pirl.train SPEC.json`.

Alone it starts the ranks of this machine as `torchrun` does, by the same `PET_*` environment; under `torchrun` it is
one rank.
"""

from __future__ import annotations

import sys

from .launch import exit_process
from .training.start import start

if __name__ == "__main__":
    exit_process(lambda: start(sys.argv[1:]))
