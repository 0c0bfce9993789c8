"""The model card of a version: its training, its scores, code that loads it, its limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pirl.config import ViewsConfig
from pirl.gains import caveats, row_title, score_text
from pirl.results import Evaluation, Score
from pirl.views import open_pretext


def model_card(record: Mapping[str, Any]) -> str:
    """Return the model card in Markdown.

    Read from the record, each of them optional: `lineage` (data_digest, recipe, code_version, checkpoint...),
    `metrics` (the content of eval.json), `config` (the resolved recipe; its model and views sections give the code).
    """
    config = record.get("config") or {}
    title = f"{record.get('name', 'model')} {record.get('version', '')}".strip()
    return "\n\n".join(
        [
            f"# {title}",
            "The trunk of a residual network, pretrained without labels by PIRL (Misra & van der Maaten, CVPR 2020): "
            f"the network learned to give an image and {_invariance(config)} the same embedding. "
            "It turns an image into a feature vector; it has no classifier.",
            "## How it was trained",
            _facts({"run": record.get("run_id"), "registered": record.get("created"), **record.get("lineage", {})}),
            "## What was measured",
            _measured(record.get("metrics") or {}),
            "## How to load it",
            _loading(config),
            "## Limits",
            "- Whatever is rare or absent in the pretraining images is represented badly, and their biases are kept.\n"
            "- Features of other kinds of images, sizes or normalisations were not tested.\n"
            "- The weights are not a product: evaluate them on your own data before you decide by them.",
            "",
        ]
    )


def _invariance(config: Mapping[str, Any]) -> str:
    return open_pretext(ViewsConfig.model_validate(config.get("views") or {})).invariance


def _facts(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name.replace('_', ' ')}: `{value}`" for name, value in facts.items() if value is not None)


def _measured(metrics: Mapping[str, Any]) -> str:
    """Return a table of the rates in percent, of the pretrained trunk and of its initial weights."""
    if not metrics.get("pretrained"):
        return "Nothing: this version was registered without an evaluation."
    evaluation = Evaluation.model_validate({"checkpoint": "", "train_data": "", "test_data": "", **metrics})
    initial = evaluation.scores("random")
    rows = ["| probe of the frozen trunk | pretrained | random weights |", "|---|---|---|"]
    for probe, scores in evaluation.scores("pretrained").items():
        for rate, value in scores.rates().items():
            label = f"{row_title(probe, evaluation)}, {rate.replace('top', 'top-')}"
            other = initial[probe].rates().get(rate) if probe in initial else None
            sides = (_percent(side, evaluation) for side in (value, other))
            rows.append(f"| {label} | {' | '.join(sides)} |")
    size = ", ".join(
        f"{metrics[key]:,} {what}"
        for key, what in (("train_images", "labelled training images"), ("test_images", "test images"))
        if key in metrics
    )
    return (
        "\n".join(rows)
        + "\n\nPercent of test images whose class was found: mean ± standard error, of the probe's seeds and of the "
        "test images. The random column is the same network before training: only the difference was learned. The "
        "pretraining itself was run once, so its own spread is unknown.\n\n"
        + "".join(f"{line[0].upper()}{line[1:]}.\n\n" for line in caveats(evaluation))
        + f"Evaluated on one data set only{f' ({size})' if size else ''}, digest of its test split "
        f"`{metrics.get('test_data', 'unknown')}`. The figures are no forecast for other data."
    )


def _percent(value: Score | None, evaluation: Evaluation) -> str:
    return score_text(value, evaluation.test_images) if value else "not measured"


def _loading(config: Mapping[str, Any]) -> str:
    """Return code that runs unchanged in the folder of trunk.safetensors."""
    model, views = config.get("model"), config.get("views", {})
    load = 'weights = load_file("trunk.safetensors")  # keys are those of torchvision\'s ResNet'
    text = ""
    if model:
        text += _code(
            "from safetensors.torch import load_file",
            "from pirl.config import ModelConfig",
            "from pirl.model import Trunk",
            load,
            f"trunk = Trunk(ModelConfig.model_validate({dict(model)!r}))",
            "trunk.load_state_dict(weights)",
            "trunk.eval()",
        )
    if not model or model.get("width", 1) == 1:
        block = "BasicBlock" if model and model.get("block") == "basic" else "Bottleneck"
        layers = list(model["layers"]) if model and "layers" in model else [3, 4, 6, 3]
        lines = [
            "import torch",
            "from safetensors.torch import load_file",
            "from torchvision.models import resnet",
            load,
            f"net = resnet.ResNet(resnet.{block}, {layers})",
        ]
        if model and (model.get("stem") == "small" or model.get("stem_stride", 2) != 2):
            kernel = 3 if model.get("stem") == "small" else 7
            stride = model.get("stem_stride", 2)
            lines.append(f"net.conv1 = torch.nn.Conv2d(3, 64, {kernel}, {stride}, {kernel // 2}, bias=False)")
        if model and model.get("stem") == "small":
            lines.append("net.maxpool = torch.nn.Identity()")
        lines += [
            "net.fc = torch.nn.Identity()  # the weights have no classifier",
            "net.load_state_dict(weights)",
            "net.eval()",
        ]
        text += "\nOr without this project:\n\n" if model else "The record has no architecture. A ResNet-50:\n\n"
        text += _code(*lines)
    else:
        text += "\ntorchvision has no ResNet of this width; the keys are its keys, the shapes are not.\n"
    if "mean" in views and "std" in views:
        mean, std = (", ".join(f"{x:g}" for x in views[key]) for key in ("mean", "std"))
        text += f"\nInput: RGB in 0..1, minus mean ({mean}), divided by std ({std})."
    return text.rstrip()


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```", ""])
