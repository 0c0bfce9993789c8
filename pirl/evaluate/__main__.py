"""Entry point of an evaluation: `python -m pirl.evaluate SPEC.json`.

Alone it starts the ranks of this machine as `torchrun` does, by the same `PET_*` environment; under `torchrun` it is
one rank.
"""

from __future__ import annotations

import sys

from pirl.evaluate.start import start
from pirl.launch import exit_process

if __name__ == "__main__":
    exit_process(lambda: start(sys.argv[1:]))
