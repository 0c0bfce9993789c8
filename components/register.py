"""The registration as a step: a run that passed the gate -> an immutable version, the new champion."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def register(
    run: str,
    root: str,
    model: str,
    trunk: dsl.Output[dsl.Model],
    card: dsl.Output[dsl.Markdown],
    registry: str = "",
) -> str:
    """Register the run's trunk in `registry`, or in ROOT/registry; return the version's URI.

    The artifacts are the version, by its metadata and its record, and its model card, which KFP's UI renders.
    """
    import json
    from pathlib import Path

    from components.step import step
    from pirl.gate import register_run
    from pirl.registry import model_card
    from pirl.run import Workspace

    with step(run, "register"):
        version = register_run(run, registry or Workspace(root).registry, model)
        Path(card.path).write_text(model_card(version.record))
        # its folder is not the uri: a backend fails the step where that is outside of the run's own place for artifacts
        Path(trunk.path).write_text(json.dumps({"uri": version.uri, **version.record.to_json()}, indent=1))
        trunk.metadata.update({"version": version.version, "uri": version.uri})
    return version.uri
