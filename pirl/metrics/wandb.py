"""A run of Weights & Biases, with the settings of `WANDB_*`.

Without a login (`WANDB_API_KEY` or `wandb login`) and without `WANDB_MODE` the run is offline: its files in
RUN/sinks/wandb are for `wandb sync`.
"""

from __future__ import annotations

import hashlib
import netrc
import os
from collections.abc import Mapping
from typing import Any

from ..run import Run
from .background import Background

HOST = "api.wandb.ai"


class WandB(Background):
    """One run of Weights & Biases for a run of this library, however often it is resumed."""

    name = "wandb"

    def open(self, step: int) -> None:
        """Open the run; its id is a function of the URI, so that a resumed training continues it."""
        import wandb

        recipe = self.context.recipe
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "pirl",
            name=os.environ.get("WANDB_NAME") or Run(self.context.run).name,
            id=os.environ.get("WANDB_RUN_ID") or hashlib.sha256(self.context.run.uri.encode()).hexdigest()[:16],
            resume="allow",
            mode=None if os.environ.get("WANDB_MODE") or has_login() else "offline",
            dir=str(self.folder),
            config={"recipe": recipe.name, "run": self.context.run.uri, **recipe.keys()} if recipe else None,
            settings=wandb.Settings(silent=True, console="off", disable_git=True),
        )
        self._run.define_metric("*", step_metric="step")  # its own counter refuses steps that are made again

    def write(self, values: Mapping[str, float]) -> None:
        """Log the metrics of one step."""
        self._run.log(dict(values))

    def finish(self, state: str) -> None:
        """Close the run."""
        self._run.finish(exit_code=0 if state == "done" else 1)


def has_login() -> bool:
    """Return whether a key of Weights & Biases is set or stored."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False
