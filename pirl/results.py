"""Typed contents of a run's folder: what one step writes and a later step reads.

Each is one JSON object with a `format` number. A reader ignores fields that it does not have, and gives fields that an
older version did not write their defaults.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pirl.errors import StorageError
from pirl.text import score

FORMAT = 1
Side = Literal["pretrained", "random"]
PROBES = ("linear", "linear_1pct", "knn")
"""Names of the probes in an evaluation."""


class Content(BaseModel):
    """A JSON object in a run's folder."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    made_by: ClassVar[str] = "the step that writes it"

    def to_json(self) -> dict[str, Any]:
        """Return the plain object, without fields that are not set."""
        return self.model_dump(mode="json", exclude_none=True, by_alias=True)

    @classmethod
    def parse(cls, value: Any, origin: str) -> Self:
        """Return the content in `value`; raise `StorageError` naming `origin` and what is wrong."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            reasons = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'content'}: {e['msg']}" for e in error.errors()[:3])
        raise StorageError(
            f"{origin} is damaged, or of a newer version: {reasons}", f"delete it, then run {cls.made_by}"
        )


class Versioned(Content):
    """A content with a format number of its own."""

    format: int = Field(default=FORMAT, ge=1, le=FORMAT)


class Completion(Versioned):
    """`DONE.json`: written last by rank 0, when the recipe's last step is saved."""

    made_by = "the same `pirl train` again"

    steps: int
    epochs: int
    images_seen: int
    seconds: float
    checkpoint: str
    """Name of the last checkpoint; a URI in folders of version 0.1."""
    recipe: str
    recipe_digest: str
    data_digest: str
    ranks: int
    """0: unknown, as the run was imported."""
    version: str
    """Of pirl-pipeline."""
    imported: str | None = None
    """Name of the file that the run was made of."""

    @property
    def checkpoint_name(self) -> str:
        return self.checkpoint.rpartition("/")[2]


class Score(Content):
    """A share of 1: the mean of several runs and their standard deviation, or one run and its standard error."""

    mean: float = Field(allow_inf_nan=False)
    std: float = Field(allow_inf_nan=False)
    runs: list[float] = []

    def __str__(self) -> str:
        return f"{score(self.mean, self.std)} %"

    def error(self, images: int) -> float:
        """Return the standard error of the rate on `images` test images: spread of the runs and sampling error.

        The `std` of one run holds the sampling error already. A rate of 0 or 1 has an error too: one success and one
        failure are added (Agresti and Coull). 0 images: unknown, so `std` alone.
        """
        if images < 1:
            return self.std
        share = (self.mean * images + 1) / (images + 2)
        sampling = math.sqrt(share * (1 - share) / (images + 2))
        return math.hypot(self.std, sampling) if len(self.runs) > 1 else max(self.std, sampling)


class Scores(Content):
    """The rates of one probe."""

    top1: Score
    top5: Score | None = None

    def rates(self) -> dict[str, Score]:
        """Return the rates that were measured, by name."""
        return {"top1": self.top1} | ({"top5": self.top5} if self.top5 else {})


class BankScores(Content):
    """Nearest neighbours among the memory bank's own rows."""

    top1: Score
    rows: int
    dim: int


class ProbeSettings(Content):
    """The protocol as it was applied. Further settings are kept as they are."""

    model_config = ConfigDict(frozen=True, extra="allow")

    label_share: float = 0.01
    neighbours: int = 20


class Confusion(Content):
    """Counts of test images by true class (row) and predicted class (column), of a linear probe on all labels."""

    classes: list[int]
    """Numbers of the classes with a row of their own: those with the most errors, at most 20."""
    counts: list[list[int]]
    """The last row and column are all other classes, if there are any."""

    def names(self, classes: list[str]) -> list[str]:
        """Return the names of rows and columns."""
        others = ["other classes"] if len(self.counts) > len(self.classes) else []
        return [classes[number] for number in self.classes] + others


class FewLabels(Content):
    """Labels of the probe with few labels."""

    labels: int
    least: int
    most: int
    """Of one class."""


class FineTuned(Content):
    """The whole network, fine-tuned with a share of the labels: from pretrained and from random weights."""

    share: float
    """Share of each class's labels that was asked for."""
    labels: FewLabels
    images: str = ""
    """SHA-256 of the ids of the images with labels."""
    pretrained: Scores
    random: Scores

    @property
    def name(self) -> str:
        """Name among the probes: finetune_1pct."""
        return f"finetune_{100 * self.share:g}pct"


class FineTuning(Content):
    """The protocol finetune: its settings and a result for each share of the labels."""

    protocol: dict[str, Any]
    results: list[FineTuned]
    differences: list[str] = []
    """Deviations from the settings of the paper."""
    ranks: int = 1
    seconds: float = 0.0


class Evaluation(Versioned):
    """`eval.json`: the probes of a frozen backbone, next to those of the same backbone with its initial weights.

    It belongs to the weights that it was measured on: `weights` and `commit` identify them wherever the folder is.
    """

    made_by = "`pirl eval RUN --data URI --test URI`"

    checkpoint: str
    """Name of the checkpoint; a URI in folders of version 0.1."""
    weights: str = ""
    """SHA-256 of the backbone's tensors (`pirl.model.weights_digest`); empty in folders of version 0.1."""
    commit: str = ""
    """SHA-256 of the checkpoint's parts (`Commit.sha256`); empty in folders of version 0.1."""
    train_data: str
    test_data: str
    """Digests of the shards."""
    train_uri: str = ""
    test_uri: str = ""
    """Locations of the shards when they were read."""
    train_images: int = 0
    test_images: int = 0
    classes: list[str] = []
    untested: list[str] = []
    """Classes without a test image."""
    few_labels: FewLabels | None = None
    """Absent in folders of version 0.1."""
    shared_images: int = 0
    """Test images that are training images too, by size and checksum."""
    unfinished: str = ""
    """The run's progress when it was evaluated, where its training was not finished."""
    protocol: ProbeSettings = ProbeSettings()
    pretrained: dict[str, Scores] = {}
    random: dict[str, Scores] = {}
    confusion: Confusion | None = None
    """Of the pretrained backbone's probe `linear` with its first seed; absent in folders of version 0.1."""
    collapsed: list[str] = []
    """Of "pretrained" and "random": backbones whose features do not vary over the training images."""
    bank: BankScores | None = None
    finetune: FineTuning | None = None
    steps: dict[str, int] = {}
    """Steps of each linear probe."""
    differences: list[str] = []
    """Deviations from the protocol that a large data set has made necessary."""
    ranks: int = 1
    seconds: float = 0.0

    @property
    def checkpoint_name(self) -> str:
        return self.checkpoint.rpartition("/")[2]

    def fine_tuned(self) -> dict[str, FineTuned]:
        """Return the results of fine-tuning by name."""
        return {each.name: each for each in self.finetune.results} if self.finetune else {}

    def scores(self, side: Side) -> dict[str, Scores]:
        """Return the scores from pretrained or random weights: those of the frozen backbone, then fine-tuned ones."""
        probes = self.pretrained if side == "pretrained" else self.random
        tuned = {
            name: each.pretrained if side == "pretrained" else each.random for name, each in self.fine_tuned().items()
        }
        return {**probes, **tuned}


class GateQuestion(Content):
    """Question to a gate. A decision counts for the same question only."""

    metric: str = ""
    min_gain: float | None = Field(default=None, allow_inf_nan=False)
    model: str = ""
    registry: str = ""
    champion: str = ""
    """Version that is the champion; empty without one."""
    weights: str = ""
    train_data: str = ""
    test_data: str = ""
    """Digests of the run's backbone and of the data of its evaluation."""


class GateDecision(Versioned, GateQuestion):
    """`gate.json`: whether a run may become the champion, with every reason."""

    made_by = "`pirl register RUN`"

    promote: bool
    reasons: list[str]

    def answers(self, question: GateQuestion) -> bool:
        """Return whether this decision was made for that question."""
        return GateQuestion.model_validate(self.model_dump()) == question


class Registered(Versioned):
    """`registered.json`: the version that the run became."""

    made_by = "`pirl register RUN`"

    model: str
    version: str
    uri: str
    registry: str = ""


class Lineage(Content):
    """Origin of a registered version. Version 0.1 recorded neither `weights` nor `commit`."""

    data_digest: str = ""
    recipe: str = ""
    recipe_digest: str = ""
    code_version: str = ""
    registered_by: str = ""
    checkpoint: str = ""
    """URI, below the run as it was named when it was registered."""
    commit: str = ""
    """SHA-256 of that checkpoint's parts."""
    weights: str = ""
    """SHA-256 of the backbone's tensors."""
    images_seen: int = 0
    epochs: int = 0


class StepRecord(Content):
    """`steps/NAME.json`: time and memory of one step of the pipeline."""

    made_by = "the pipeline again"

    step: str
    started: float
    seconds: float
    peak_rss_bytes: int = 0
    last_started: float = 0.0


class WarmRecord(Versioned):
    """`warm.json`: the checkpoint that a run began with, and how many rows of its memory bank were kept."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    source: str = Field(alias="from")
    rows: int
    kept: int


class InitialRecord(Versioned):
    """`init.json`: the place of the weights that a run started from, and their digest."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    source: str = Field(alias="from")
    digest: str
    """Of the weights, whatever file they came from."""
    sha256: str
    """Of the copy in the run."""
