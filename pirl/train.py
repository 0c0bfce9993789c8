"""Entry point of a training: start the ranks of this machine, or be one of them.

`python -m pirl.train SPEC.json` is the entry point everywhere. Alone it starts its processes as `torchrun` does, and
reads the same `PET_*` environment; started by `torchrun` it is one rank.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .errors import UsageError
from .launch import default_processes, report_outcome, run_ranks
from .outputs import check_run_output
from .run import Run
from .shards import Manifest
from .storage import open_storage
from .text import count
from .training.loop import train
from .training.spec import TrainingSpec
from .training.state import check_same_run
from .training.workers import loading_processes
from .world import World, start_world, stop_world


def plan(spec: TrainingSpec) -> list[str]:
    """Check recipe, data and run, and return in a few lines what a training would do."""
    recipe = spec.recipe
    manifest = Manifest.load(open_storage(spec.data))
    recipe.check_data(manifest.images)
    check_run_output(spec.out, data=spec.data)
    run = Run.at(open_storage(spec.out))
    check_same_run(run, recipe, manifest.digest)
    newest = run.checkpoints().newest()
    rows = recipe.rows(manifest.images)
    return [
        f"{recipe.name}: {count(recipe.train.epochs, 'epoch')} of {count(rows, 'image')}, "
        f"{count(recipe.steps_per_epoch(rows), 'step')} each, in batches of {recipe.train.batch_size}",
        f"learning rate {recipe.learning_rate:g}, {recipe.loss.negatives:,} negatives, "
        f"memory bank of {rows * recipe.model.embedding_dim * 4 / 2**20:.1f} MiB",
        f"in {count(spec.processes or default_processes(), 'process', 'processes')}, to {spec.out}, "
        f"from {newest or 'the start'}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the JSON file says: one rank under `torchrun`, else all ranks of this machine."""
    arguments = sys.argv[1:] if argv is None else argv

    def work() -> int:
        if len(arguments) != 1:
            raise UsageError(
                "python -m pirl.train takes one argument, the JSON file of a specification",
                "use `pirl train`; with --dry-run --json it prints such a file",
            )
        spec = TrainingSpec.read(arguments[0])
        if "RANK" not in os.environ:
            plan(spec)  # a mistake costs nothing as long as no process is started
            return run_ranks("pirl.train", arguments, spec.processes)
        world = start_world(spec.timeout_s)
        try:
            train(spec.recipe, with_workers(spec, world), world)
        finally:
            stop_world(world)
        return 0

    return report_outcome(work)


def with_workers(spec: TrainingSpec, world: World) -> TrainingSpec:
    """Return the specification with a number of loading processes, which -1 leaves to this machine."""
    if spec.workers >= 0:
        return spec
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return spec.model_copy(update={"workers": loading_processes(spec.recipe, world.size, ranks_here)})


if __name__ == "__main__":
    sys.exit(main())
