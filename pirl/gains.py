"""Gain of pretraining over random weights: each rate with its error, a decision, and caveats of the evaluation.

Console, report, gate and model card read an evaluation by this module, so that they agree.
"""

from __future__ import annotations

from dataclasses import dataclass

from .results import Evaluation, FewLabels, Score
from .text import count, percent, score

ROWS = {"linear": "linear, all labels", "linear_1pct": "linear", "knn": "nearest neighbours"}
"""Probe -> its line in a table; that of few labels continues with their number."""
FEW_TEST_IMAGES = 300  # below that, a rate of one half has an error of about 3 points
DECISIONS = {"good": "helped", "open": "no difference shown", "bad": "hurt"}


@dataclass(frozen=True)
class Gain:
    """One rate of one probe, of the pretrained backbone and of random weights, as shares of 1."""

    probe: str
    rate: str
    pretrained: Score
    random: Score
    images: int
    """Test images; 0: unknown, as in folders of version 0.1."""

    @property
    def gain(self) -> float:
        """Difference of the means."""
        return self.pretrained.mean - self.random.mean

    @property
    def spread(self) -> float:
        """Both errors together: a difference counts where it is larger."""
        return self.pretrained.error(self.images) + self.random.error(self.images)

    @property
    def tone(self) -> str:
        """Return good or bad where the difference exceeds the spread, else open."""
        if abs(self.gain) <= self.spread:
            return "open"
        return "good" if self.gain > 0 else "bad"

    @property
    def decision(self) -> str:
        """The decision in words."""
        return DECISIONS[self.tone]


def gains(evaluation: Evaluation) -> list[Gain]:
    """Return the rates that both backbones have. Top-5 of five classes or fewer is always 100 % and left out."""
    few = len(evaluation.classes) <= 5
    pretrained, random = evaluation.scores("pretrained"), evaluation.scores("random")
    return [
        Gain(probe, rate, value, random[probe].rates()[rate], evaluation.test_images)
        for probe, scores in pretrained.items()
        if probe in random
        for rate, value in scores.rates().items()
        if rate in random[probe].rates() and not (few and rate == "top5")
    ]


def score_text(value: Score, images: int) -> str:
    """Return a rate in percent with its error on `images` test images: 12.50 ± 0.31."""
    return score(value.mean, value.error(images))


def row_title(probe: str, evaluation: Evaluation) -> str:
    """Return the name of a probe's line in a table."""
    if probe == "linear_1pct":
        return f"{ROWS[probe]}, {labels_text(evaluation)}"
    if tuned := evaluation.fine_tuned().get(probe):
        return f"fine-tuned, {number_text(tuned.labels, evaluation.train_images)}"
    return ROWS.get(probe, probe)


def labels_text(evaluation: Evaluation) -> str:
    """Return how many labels the probe with few labels had: 1 label per class (16.7 %)."""
    few = evaluation.few_labels
    if few is None:  # version 0.1 recorded the share that was asked for
        return f"{100 * evaluation.protocol.label_share:g} % of the labels"
    return number_text(few, evaluation.train_images)


def number_text(few: FewLabels, images: int) -> str:
    """Return a number of labels: 1 label per class (16.7 %)."""
    number = count(few.most, "label") if few.least == few.most else f"{few.least} to {count(few.most, 'label')}"
    return f"{number} per class ({few_share(few, images)})"


def few_share(few: FewLabels, images: int) -> str:
    """Return the share of the labels in percent, with three digits."""
    return f"{100 * few.labels / max(images, 1):.3g} %"


def tuned_lines(evaluation: Evaluation) -> list[str]:
    """Return a line for each result of fine-tuning. They are shown, and decide nothing."""
    lines = []
    for gain in gains(evaluation):
        if gain.probe in evaluation.fine_tuned():
            trained, random = (score_text(side, gain.images) for side in (gain.pretrained, gain.random))
            lines.append(
                f"{row_title(gain.probe, evaluation)}: {gain.rate.replace('top', 'top-')} is {trained} %, "
                f"from random weights {random} %: {100 * gain.gain:+.2f} points ({gain.decision})"
            )
    return lines


def caveats(evaluation: Evaluation) -> list[str]:
    """Return sentences on what an evaluation cannot show."""
    lines = []
    images = evaluation.test_images
    if shared := evaluation.shared_images:
        lines.append(
            f"{shared:,} of {count(images, 'test image')} "
            f"{'is a training image' if shared == 1 else 'are training images'} too "
            f"({percent(shared / max(images, 1))} %): their rates show memory, not features"
        )
    if 0 < images < FEW_TEST_IMAGES:
        lines.append(
            f"only {count(images, 'test image')}: one image is {percent(1 / images)} points, so small differences are "
            "chance"
        )
    if evaluation.unfinished:
        lines.append(f"measured before the end of the training: {evaluation.unfinished}")
    return lines
