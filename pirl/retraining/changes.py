"""Changes since the registered versions: data, recipe and code are compared with theirs.

Everything is compared by content: the digest of the shards, of the recipe, and the version of this code. The name of a
run is made of the three, so that a schedule that is repeated, overlaps itself or broke off resumes the same run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pirl import __version__
from pirl.config import Recipe, parse_recipe
from pirl.errors import CheckpointError, DataError
from pirl.gate import METRIC, MIN_GAIN, find_champion, question
from pirl.registry import Version, open_registry
from pirl.results import Lineage
from pirl.run import Run, Workspace
from pirl.shards import DEFAULT, Decoding, Manifest, ShardReader, Source
from pirl.storage import open_storage

if TYPE_CHECKING:  # importing it loads torch, which a look into a registry does not need
    from pirl.initial.warm import WarmStart


@dataclass(frozen=True)
class Decision:
    """`retrain` or not, and every reason; `run` is the URI of the run that it is about."""

    retrain: bool
    reasons: list[str]
    run: str
    recipe: Recipe
    warm: WarmStart | None = None


def data_uri(root: str, split: str, source: Source, decoding: Decoding = DEFAULT) -> str:
    """Return where the shards of this state of a source belong: another state or decoding of it, another location."""
    key = source.fingerprint()
    if decoding != DEFAULT and not source.in_memory:
        key = hashlib.sha256(f"{key} {decoding}".encode()).hexdigest()
    return Workspace(root).shards(split, key[:12])


@dataclass(frozen=True)
class Gating:
    """The question to the gate about the new run."""

    registry: str
    model: str
    metric: str = METRIC
    min_gain: float = MIN_GAIN
    test_data: str = ""
    """URI of the shards that it will be tested on."""


def decide_retrain(
    root: str, gating: Gating, recipe: Recipe, data: str, warm_epochs: int | None = None, init: str = ""
) -> Decision:
    """Compare the shards at `data`, the recipe and the code with the champion's lineage.

    `warm_epochs` allows a warm start from the champion, where images were added and nothing else has changed: for that
    many epochs, 0 for as many as the recipe has.

    No retraining if the champion was made of the same; if another version was (an older champion was promoted by
    hand: the schedule does not undo that); or if a run of the same was trained and did not pass the same gate.
    """
    digest = Manifest.load(open_storage(data)).digest
    warm_recipe = parse_recipe(recipe.to_toml(), [f"train.epochs={warm_epochs}"]) if warm_epochs else recipe
    recipes = recipe.digests() | warm_recipe.digests()
    cold = _run(root, recipe, digest, f"init {init}" if init else "cold")
    registry, model = open_registry(gating.registry), gating.model
    versions = registry.versions(model) if registry.has(model) else []
    champion = find_champion(registry, model)
    current = champion.version if champion else "none"
    for version in reversed(versions):
        if _changes(version.lineage, digest, recipes) == []:
            reason = f"{model} {version.version} was made of the same data, recipe and code"
            if version.version != current:
                reason += f"; the champion is {current}, promote by hand to change that"
            return Decision(False, [reason], version.record.run_id, recipe)

    if champion is None:
        return _unless_rejected(Decision(True, [f"{model} has no champion yet"], cold, recipe), gating, None)
    changes = _changes(champion.lineage, digest, recipes)
    reasons = [f"champion {champion.version}: {change}" for change in changes]
    if warm_epochs is not None and [change.partition(" ")[0] for change in changes] == ["data"]:
        warm, reason = _warm(root, champion.lineage, data)
        reasons.append(reason)
        if warm:
            run = _run(root, warm_recipe, digest, "warm")
            return _unless_rejected(Decision(True, reasons, run, warm_recipe, warm), gating, champion)
    return _unless_rejected(Decision(True, reasons, cold, recipe), gating, champion)


def _changes(lineage: Lineage, digest: str, recipes: set[str]) -> list[str]:
    """Return what differs from a version's lineage, each with the old and the new value."""
    changes = []
    if lineage.data_digest != digest:
        changes.append(f"data changed ({_short(lineage.data_digest)} -> {digest[:12]})")
    if lineage.recipe_digest not in recipes:
        changes.append(f"recipe changed ({_short(lineage.recipe_digest)} -> {min(recipes)[:12]})")
    if lineage.code_version != __version__:
        changes.append(f"code changed ({lineage.code_version or 'unknown'} -> {__version__})")
    return changes


def _short(digest: str) -> str:
    return digest[:12] or "unknown"


def _run(root: str, recipe: Recipe, digest: str, start: str) -> str:
    key = hashlib.sha256("\n".join([digest, recipe.digest(), __version__, start]).encode()).hexdigest()
    return Workspace(root).run_uri(f"{recipe.name}-{key[:12]}")


def _unless_rejected(decision: Decision, gating: Gating, champion: Version | None) -> Decision:
    """Return `decision`, or that the model is up to date where the gate has rejected the run for the same question."""
    run = Run.at(decision.run)
    evaluation, gate = run.evaluation(), run.gate()
    if evaluation is None or gate is None or gate.promote:  # or it broke off between the gate and the registry
        return decision
    evaluation = evaluation.model_copy(update={"test_data": _digest_of(gating.test_data) or evaluation.test_data})
    inputs = question(evaluation, gating.registry, gating.model, gating.metric, gating.min_gain, champion)
    rejection = f"{decision.run} was trained on the same and did not pass the gate: {'; '.join(gate.reasons)}"
    if gate.answers(inputs):
        return replace(decision, retrain=False, reasons=[*decision.reasons, rejection])
    again = f"{decision.run} is trained; the gate has not been asked this question yet and decides again"
    return replace(decision, reasons=[*decision.reasons, again])


def _digest_of(data: str) -> str:
    """Return the digest of the shards at `data`; "" where it is empty, "unknown" where there are no shards yet."""
    if not data:
        return ""
    try:
        return Manifest.load(open_storage(data)).digest
    except DataError:
        return "unknown"


def _warm(root: str, champion: Lineage, data: str) -> tuple[WarmStart | None, str]:
    """Return a warm start, None where it is impossible, and a sentence about it.

    It needs the champion's shards below ROOT/data, images that were only added, and a checkpoint that still holds the
    registered weights.
    """
    from pirl.initial.warm import WarmStart, only_added  # loads torch, which a look into a registry does not need

    for uri in Workspace(root).all_shards():
        try:
            if Manifest.load(open_storage(uri)).digest != champion.data_digest:
                continue
        except DataError:
            continue
        if not only_added(ShardReader(uri), ShardReader(data)):
            return None, "a cold start: images were removed or changed, not only added"
        run = Run.at(champion.checkpoint)
        try:
            commit = run.commit()
        except CheckpointError as error:
            return None, f"a cold start: {error.what}"
        if champion.commit not in ("", commit.sha256):
            return None, f"a cold start: {champion.checkpoint} holds other weights than the champion's"
        return WarmStart(run.uri, commit.name, uri), "a warm start: images were only added"
    return None, "a cold start: the champion's shards are gone"
