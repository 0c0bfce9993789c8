"""The model card of a version: its training, its scores, code that loads it, its limits."""

from __future__ import annotations

from collections.abc import Mapping

from pirl.config import ModelConfig, Recipe, ViewsConfig
from pirl.gains import caveats, row_title, score_text
from pirl.registry.record import VersionRecord
from pirl.results import Evaluation, Score


def model_card(record: VersionRecord) -> str:
    """Return the model card in Markdown, of a record that may lack everything but its run."""
    views = record.config.views if record.config else ViewsConfig()
    title = f"{record.name or 'model'} {record.version}".strip()
    lineage = record.lineage.model_dump(exclude_defaults=True)
    return "\n\n".join(
        [
            f"# {title}",
            "The trunk of a residual network, pretrained without labels by PIRL (Misra & van der Maaten, CVPR 2020): "
            f"the network learned to give an image and what the pretext {views.pretext} makes of it the same "
            "embedding. It turns an image into a feature vector; it has no classifier.",
            "## How it was trained",
            _facts({"run": record.run_id, "registered": record.created, **lineage}),
            "## What was measured",
            _measured(record.metrics),
            "## How to load it",
            _loading(record.config),
            "## Limits",
            "- Whatever is rare or absent in the pretraining images is represented badly, and their biases are kept.\n"
            "- Features of other kinds of images, sizes or normalisations were not tested.\n"
            "- The weights are not a product: evaluate them on your own data before you decide by them.",
            "",
        ]
    )


def _facts(facts: Mapping[str, object]) -> str:
    return "\n".join(f"- {name.replace('_', ' ')}: `{value}`" for name, value in facts.items() if value != "")


def _measured(evaluation: Evaluation | None) -> str:
    """Return a table of the rates in percent, of the pretrained trunk and of its initial weights."""
    if not evaluation or not evaluation.pretrained:
        return "Nothing: this version was registered without an evaluation."
    initial = evaluation.scores("random")
    rows = ["| probe of the frozen trunk | pretrained | random weights |", "|---|---|---|"]
    for probe, scores in evaluation.scores("pretrained").items():
        for rate, value in scores.rates().items():
            label = f"{row_title(probe, evaluation)}, {rate.replace('top', 'top-')}"
            other = initial[probe].rates().get(rate) if probe in initial else None
            sides = (_percent(side, evaluation) for side in (value, other))
            rows.append(f"| {label} | {' | '.join(sides)} |")
    counts = (
        (evaluation.train_images, "labelled training images"),
        (evaluation.test_images, "test images"),
    )
    size = ", ".join(f"{images:,} {what}" for images, what in counts if images)
    return (
        "\n".join(rows)
        + "\n\nPercent of test images whose class was found: mean ± standard error, of the probe's seeds and of the "
        "test images. The random column is the same network before training: only the difference was learned. The "
        "pretraining itself was run once, so its own spread is unknown.\n\n"
        + "".join(f"{line[0].upper()}{line[1:]}.\n\n" for line in caveats(evaluation))
        + f"Evaluated on one data set only{f' ({size})' if size else ''}, digest of its test split "
        f"`{evaluation.test_data or 'unknown'}`. The figures are no forecast for other data."
    )


def _percent(score: Score | None, evaluation: Evaluation) -> str:
    return score_text(score, evaluation.test_images) if score else "not measured"


def _loading(recipe: Recipe | None) -> str:
    """Return code that runs unchanged in the folder of trunk.safetensors."""
    load = 'weights = load_file("trunk.safetensors")  # keys are those of torchvision\'s ResNet'
    text = ""
    if recipe:
        text += _code(
            "from safetensors.torch import load_file",
            "from pirl.config import ModelConfig",
            "from pirl.model import Trunk",
            load,
            f"trunk = Trunk(ModelConfig.model_validate({recipe.model.model_dump(mode='json')!r}))",
            "trunk.load_state_dict(weights)",
            "trunk.eval()",
        )
    model = recipe.model if recipe else ModelConfig()
    if model.width == 1:
        block = "BasicBlock" if model.block == "basic" else "Bottleneck"
        lines = [
            "import torch",
            "from safetensors.torch import load_file",
            "from torchvision.models import resnet",
            load,
            f"net = resnet.ResNet(resnet.{block}, {list(model.layers)})",
        ]
        if model.stem == "small" or model.stem_stride != 2:
            kernel = 3 if model.stem == "small" else 7
            stride = model.stem_stride
            lines.append(f"net.conv1 = torch.nn.Conv2d(3, 64, {kernel}, {stride}, {kernel // 2}, bias=False)")
        if model.stem == "small":
            lines.append("net.maxpool = torch.nn.Identity()")
        lines += [
            "net.fc = torch.nn.Identity()  # the weights have no classifier",
            "net.load_state_dict(weights)",
            "net.eval()",
        ]
        text += "\nOr without this project:\n\n" if recipe else "The record has no architecture. A ResNet-50:\n\n"
        text += _code(*lines)
    else:
        text += "\ntorchvision has no ResNet of this width; the keys are its keys, the shapes are not.\n"
    if recipe:
        mean, std = (", ".join(f"{x:g}" for x in values) for values in (recipe.views.mean, recipe.views.std))
        text += f"\nInput: RGB in 0..1, minus mean ({mean}), divided by std ({std})."
    return text.rstrip()


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```", ""])
