"""The gate between an evaluation and the registry, and the way of a run through it.

A run may become the champion if its backbone beats its own initial weights, and the champion on the same images. A
champion that was measured on other images is evaluated on those of the run. The decision names what it was asked, and
counts for that alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pirl import __version__
from pirl.collapse import collapse
from pirl.errors import DataError, RegistryError, UsageError, did_you_mean
from pirl.gains import Gain, caveats, labels_text, score_text, tuned_lines
from pirl.logs import info
from pirl.outputs import check_registry
from pirl.registry import CHAMPION, TRUNK, Provenance, Registry, Version, open_registry
from pirl.results import PROBES, Completion, Evaluation, GateDecision, GateQuestion, Lineage, ProbeSettings, Registered
from pirl.run import Run
from pirl.shards import Manifest
from pirl.storage import open_storage

METRIC, MIN_GAIN = "linear_1pct", 0.01
READY_HINT = "`pirl train`, `pirl eval` and `pirl register` come in this order"
EVALUATE_HINT = "run `pirl eval RUN --data URI --test URI`, then this command again"


def decide(
    run: str | Run,
    registry: str,
    model: str,
    metric: str = METRIC,
    min_gain: float = MIN_GAIN,
    dry_run: bool = False,
    progress: Callable[[str], None] = info,
) -> GateDecision:
    """Return whether a run may become a champion, with every reason; written to its `gate.json` but for a dry run.

    The trunk must beat its own initial weights in `metric` by more than `min_gain` (0.01 is a point of top-1) and than
    the errors of both; a negative `min_gain` asks for that alone. Neither its features nor the training's embeddings
    may have collapsed. It must beat the champion on the same images: a tie keeps the champion.
    """
    check_question(metric, min_gain)
    folder = run if isinstance(run, Run) else Run.at(run)
    evaluation = current_evaluation(folder)
    if metric not in evaluation.pretrained or metric not in evaluation.random:
        raise UsageError(
            f"the evaluation of {folder.uri} has no {metric}: it has {', '.join(evaluation.pretrained)}", EVALUATE_HINT
        )
    champion = find_champion(open_registry(registry), model)
    promote, reasons = _gain(evaluation, metric, min_gain)
    doubts = _doubts(folder, evaluation)
    promote = promote and not doubts
    reasons += [*doubts, *tuned_lines(evaluation), *caveats(evaluation)]
    if champion and not is_same_run(champion, folder, evaluation):
        better, reason = _compare(folder, evaluation, champion, metric, dry_run, progress)
        promote = promote and better
        reasons.append(reason)
    inputs = question(evaluation, registry, model, metric, min_gain, champion)
    decision = GateDecision(promote=promote, reasons=reasons, **inputs.model_dump())
    if not dry_run:
        folder.save_gate(decision)
    return decision


def check_question(metric: str, min_gain: float) -> None:
    """Raise `UsageError` for a metric that no evaluation has, or a threshold that is not finite."""
    if metric not in PROBES:
        raise UsageError(
            f"unknown metric {metric!r}.{did_you_mean(metric, PROBES)}", f"an evaluation has {', '.join(PROBES)}"
        )
    if not math.isfinite(min_gain):
        raise UsageError(f"the least gain is not a finite number: {min_gain}", "give a number such as 0.01")


def question(
    evaluation: Evaluation, registry: str, model: str, metric: str, min_gain: float, champion: Version | None
) -> GateQuestion:
    """Return what the gate is asked about an evaluation."""
    return GateQuestion(
        metric=metric,
        min_gain=min_gain,
        model=model,
        registry=open_registry(registry).uri,
        champion=champion.version if champion else "",
        weights=evaluation.weights,
        train_data=evaluation.train_data,
        test_data=evaluation.test_data,
    )


def current_evaluation(run: Run) -> Evaluation:
    """Return a run's evaluation; raise `RegistryError` where it is missing, or not of the run's weights."""
    evaluation = run.evaluation()
    if evaluation is None or not evaluation.pretrained:
        raise RegistryError(f"{run.uri} has no evaluation", "`pirl eval RUN --data URI --test URI` makes one")
    if reason := run.mismatch(evaluation):
        raise RegistryError(f"{run.uri} cannot be judged: {reason}", EVALUATE_HINT)
    return evaluation


def find_champion(registry: Registry, model: str) -> Version | None:
    """Return the champion of a model, None where it has none yet."""
    if not registry.has(model) or registry.pointer(model, CHAMPION) is None:
        return None
    return registry.get(model, CHAMPION)


def is_same_run(version: Version, run: Run, evaluation: Evaluation) -> bool:
    """Return whether a version holds the weights of an evaluation; version 0.1 recorded no more than the run's URI."""
    if version.lineage.weights and evaluation.weights:
        return version.lineage.weights == evaluation.weights
    return version.record.run_id == run.uri


def _gain(evaluation: Evaluation, metric: str, min_gain: float) -> tuple[bool, list[str]]:
    """Return whether the gain over random weights is enough, and the reason."""
    gain = Gain(
        metric, "top1", evaluation.pretrained[metric].top1, evaluation.random[metric].top1, evaluation.test_images
    )
    needed = max(min_gain, gain.spread) if min_gain >= 0 else min_gain
    enough = gain.gain > needed
    labels = f" ({labels_text(evaluation)})" if metric == "linear_1pct" else ""
    trained, random = (score_text(side, gain.images) for side in (gain.pretrained, gain.random))
    return enough, [
        f"{metric}{labels} top-1 is {trained} %, with random weights {random} %: {100 * gain.gain:+.2f} points, "
        f"{'' if enough else 'not '}more than {100 * needed:.2f}, "
        f"{'the errors of both' if needed == gain.spread else 'asked for'}"
    ]


def _doubts(run: Run, evaluation: Evaluation) -> list[str]:
    """Return the reasons for which no gain counts."""
    doubts = []
    if "pretrained" in evaluation.collapsed:
        doubts.append("the features have collapsed: they are the same for all training images")
    if evaluation.train_data and evaluation.train_data == evaluation.test_data:
        doubts.append("training and test images of the evaluation are the same")
    if reason := collapse(run.record().last):
        doubts.append(reason)
    return doubts


def _compare(
    run: Run,
    evaluation: Evaluation,
    champion: Version,
    metric: str,
    dry_run: bool,
    progress: Callable[[str], None],
) -> tuple[bool, str]:
    """Return whether a run beats the champion on the same images, and a sentence about it."""
    other = champion.evaluation
    where = ""
    if other is None or not _comparable(other, evaluation):
        other = _champion_evaluation(run, evaluation, champion, dry_run, progress)
        where = ", measured on the same images now"
    if metric not in other.pretrained:
        return False, f"the champion {champion.version} was not measured by {metric}"
    before, now = other.pretrained[metric].top1.mean, evaluation.pretrained[metric].top1
    champions = f"{score_text(other.pretrained[metric].top1, other.test_images)} %"
    outcome = "" if now.mean > before else ", as many" if now.mean == before else ", more"
    return now.mean > before, f"the champion {champion.version} has {champions}{where}{outcome}"


def _comparable(one: Evaluation, other: Evaluation) -> bool:
    """Return whether two evaluations have the same images and probes; each trunk has crops of its own recipe."""
    same = one.train_data == other.train_data and one.test_data == other.test_data
    return same and _probes(one.protocol) == _probes(other.protocol)


def _probes(settings: ProbeSettings) -> dict[str, object]:
    return settings.model_dump(exclude={"resize", "crop"})


def _champion_evaluation(
    run: Run, evaluation: Evaluation, champion: Version, dry_run: bool, progress: Callable[[str], None]
) -> Evaluation:
    """Return the scores of the champion's trunk on the images of an evaluation; kept in the run's folder."""
    from pirl.evaluate.fast import evaluate_trunk, read_kept  # it loads torch, which most decisions do not need
    from pirl.registry.load import load_version

    _require_shards(run, evaluation)
    recipe, trunk, weights = load_version(champion)
    kept = read_kept(run.champion_evaluation)
    if kept and kept.weights == weights and _comparable(kept, evaluation):
        return kept
    progress(f"evaluating the champion {champion.model} {champion.version} on the same images")
    result = evaluate_trunk(trunk, recipe, evaluation.train_uri, evaluation.test_uri)
    if not _comparable(result, evaluation):
        raise RegistryError(f"{run.uri} was evaluated by the protocol of another version", EVALUATE_HINT)
    if not dry_run:
        run.save_champion_evaluation(result)
    return result


def _require_shards(run: Run, evaluation: Evaluation) -> None:
    """Raise `RegistryError` unless the shards of an evaluation are where they were read."""
    for uri, digest in ((evaluation.train_uri, evaluation.train_data), (evaluation.test_uri, evaluation.test_data)):
        try:
            if uri and Manifest.load(open_storage(uri)).digest == digest:
                continue
        except DataError:
            pass
        raise RegistryError(
            f"{run.uri} cannot be compared with the champion, which was measured on other images: "
            f"the shards of its evaluation are not at {uri or 'a recorded location'}",
            EVALUATE_HINT,
        )


class RejectedError(RegistryError):
    """The gate does not let a run pass."""


def register_run(uri: str, registry: str, model: str) -> Version:
    """Register a run that passed the gate; it becomes latest and champion. The same weights give the same version.

    The scores are compared again where the champion is another one than the gate has seen, and once more when the
    pointer is moved: `RejectedError` where that is better.
    """
    run = Run.at(uri)
    evaluation = current_evaluation(run)
    completion, decision = _ready(run, evaluation)
    target = open_registry(registry)
    check_registry(registry)
    before = _registered_before(target, model, run, evaluation)
    if before and before.gated and not target.is_newer(before):
        return _note(run, registry, before)
    decision = _decide_again(run, evaluation, registry, model, decision)

    def still_better() -> bool:
        nonlocal decision
        decision = _decide_again(run, evaluation, registry, model, decision)
        return decision.promote

    if not decision.promote:
        raise _rejected(run, decision)
    trunk, provenance = _content(run, evaluation, completion, decision)
    run_id = before.record.run_id if before else run.uri
    files = {TRUNK: trunk}
    version = target.register(model, run_id=run_id, files=files, provenance=provenance, promote=True, ask=still_better)
    if not decision.promote:
        raise _rejected(run, decision)
    return _note(run, registry, version)


def _ready(run: Run, evaluation: Evaluation) -> tuple[Completion, GateDecision]:
    """Return what a registration needs besides the evaluation; raise `RegistryError` where it is missing."""
    completion, decision = run.completion(), run.gate()
    if completion is None:
        raise RegistryError(f"{run.uri} is not ready: its training is not finished", READY_HINT)
    if decision is None:
        raise RegistryError(f"{run.uri} is not ready: the gate has not decided yet", READY_HINT)
    if completion.checkpoint_name != evaluation.checkpoint_name:
        raise RegistryError(
            f"{run.uri} cannot be registered: its evaluation is of {evaluation.checkpoint_name}, "
            f"its training ended with {completion.checkpoint_name}",
            EVALUATE_HINT,
        )
    return completion, decision


def _decide_again(run: Run, evaluation: Evaluation, registry: str, model: str, decision: GateDecision) -> GateDecision:
    """Return the decision if it was made for this registry, model, champion and evaluation, else a new one."""
    champion = find_champion(open_registry(registry), model)
    metric = decision.metric or METRIC
    min_gain = MIN_GAIN if decision.min_gain is None else decision.min_gain
    if decision.answers(question(evaluation, registry, model, metric, min_gain, champion)):
        return decision
    return decide(run, registry, model, metric, min_gain)


def _registered_before(registry: Registry, model: str, run: Run, evaluation: Evaluation) -> Version | None:
    """Return the version of these weights, wherever the run's folder was when it was registered."""
    versions = registry.versions(model) if registry.has(model) else []
    return next((version for version in versions if _holds(version, run, evaluation)), None)


def _holds(version: Version, run: Run, evaluation: Evaluation) -> bool:
    """Return whether a version has the weights of the checkpoint that was evaluated.

    Version 0.1 recorded no digest of the weights, and its files have other bytes: the weights themselves are compared.
    """
    if version.lineage.weights:
        return version.lineage.weights == evaluation.weights
    if version.record.run_id != run.uri:
        return False
    from pirl.evaluate import load_trunk
    from pirl.model import weights_digest
    from pirl.registry.load import load_version

    trunk = load_trunk(Run(run.storage, evaluation.checkpoint_name))[2]
    return load_version(version)[2] == weights_digest(trunk.state_dict())


def _content(
    run: Run, evaluation: Evaluation, completion: Completion, decision: GateDecision
) -> tuple[bytes, Provenance]:
    """Return the trunk as safetensors and the provenance of a version, both of the weights that were evaluated."""
    from pirl.evaluate import load_trunk  # it loads torch, which most decisions do not need
    from pirl.export import trunk_bytes
    from pirl.model import weights_digest

    recipe, commit, trunk = load_trunk(Run(run.storage, evaluation.checkpoint_name))
    weights = weights_digest(trunk.state_dict())
    if evaluation.weights not in ("", weights):
        raise RegistryError(
            f"{run.uri} cannot be registered: {commit.name} holds other weights than those that were evaluated",
            EVALUATE_HINT,
        )
    lineage = Lineage(
        data_digest=completion.data_digest,
        recipe=recipe.name,
        recipe_digest=recipe.digest(),
        code_version=completion.version,
        registered_by=__version__,
        checkpoint=run.checkpoint_uri(commit.name),
        commit=commit.sha256,
        weights=weights,
        images_seen=completion.images_seen,
        epochs=completion.epochs,
    )
    provenance = Provenance(lineage=lineage, config=run.recipe(), metrics=evaluation, gate=decision)
    return trunk_bytes(trunk, recipe), provenance


def _note(run: Run, registry: str, version: Version) -> Version:
    """Note in the run's folder which version it became."""
    uri = open_registry(registry).uri
    run.save_registered(Registered(model=version.model, version=version.version, uri=version.uri, registry=uri))
    return version


def _rejected(run: Run, decision: GateDecision) -> RejectedError:
    return RejectedError(
        f"{run.uri} did not pass the gate: {'; '.join(decision.reasons)}", "train longer, or differently"
    )
