"""SGD on a cosine schedule, with weight decay on weights only (reference: no decay on batch norm and biases)."""

from __future__ import annotations

import math

import torch
from torch import nn

from .config import OptimConfig, Recipe


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Four groups in module order: convolution weights, batch-norm parameters, linear weights, linear biases."""
    groups: dict[str, list[torch.Tensor]] = {"conv": [], "norm": [], "linear": [], "bias": []}
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            groups["conv"].append(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            groups["norm"] += [module.weight, module.bias]
        elif isinstance(module, nn.Linear):
            groups["linear"].append(module.weight)
            groups["bias"].append(module.bias)
    decays = {"conv": True, "linear": True, "norm": config.decay_norm_and_bias, "bias": config.decay_norm_and_bias}
    return [
        {"name": name, "params": parameters, "weight_decay": config.weight_decay if decays[name] else 0.0}
        for name, parameters in groups.items()
    ]


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD, coupled L2 weight decay, no dampening; its learning rate is set by `set_learning_rate` before every step."""
    config = recipe.optim
    return torch.optim.SGD(
        parameter_groups(model, config),
        lr=recipe.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=recipe.train.precision
        != "fp16",  # fused momentum starts uninitialised if the scaler skips the first step
    )


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """Return the learning rate at `epoch`, fractional within one: epoch 0.5 is the middle of the first.

    Cosine from the peak to `end_lr_ratio` of it over all epochs, after a linear warm-up. With schedule "epoch" the
    value of an epoch's start holds for all of it, so the end value itself is never used.
    """
    config, epochs = recipe.optim, recipe.train.epochs
    if config.schedule == "epoch":
        epoch = math.floor(epoch)
    peak = recipe.learning_rate
    if epoch < config.warmup_epochs:
        return peak * epoch / config.warmup_epochs
    end = peak * config.end_lr_ratio
    span = max(epochs - config.warmup_epochs, 1e-12)
    return end + 0.5 * (peak - end) * (1 + math.cos(math.pi * (epoch - config.warmup_epochs) / span))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
