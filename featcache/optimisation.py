"""How do weights begin and move: the head, the optimiser, its rate, their average?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from featcache.annotations import Labels
from featcache.errors import InputError
from featcache.networks import LastLayer
from featcache.settings import TrainingConfig


def initialise_head(layer: LastLayer, labels: Labels) -> None:
    """Small weights and a bias at logit(prior): the first loss is that of the label frequencies.

    The prior of a class is its share among the images of which it is known, counting
    confidences, with half an image more on either side.
    """
    positives = np.asarray(labels.positives.sum(0)).ravel()
    known = np.full(len(labels.classes), float(len(labels.ids)))
    if labels.unlisted == "unknown":
        known = np.asarray(labels.positives.getnnz(axis=0), float)
        if labels.negatives is not None:
            known += labels.negatives.getnnz(axis=0)
    prior = (positives + 0.5) / (known + 1.0)
    with torch.no_grad():
        layer.weight.mul_(0.1)
        if layer.bias is not None:
            layer.bias.copy_(torch.from_numpy(np.log(prior / (1 - prior))))


def make_optimizer(network: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """timm's optimiser of that name; no weight decay on biases and norms.

    Raises
    ------
    InputError
        If there is none, or it does not take these settings.
    """
    name = config.optimizer.lower()
    extra: dict[str, Any] = {}
    if name not in ("sgd", "momentum", "nesterov", "rmsprop"):
        extra["betas"] = (config.momentum, config.beta2)
    if name in ("sgd", "adam", "adamw"):
        extra["fused"] = True  # one call instead of dozens for each tensor
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            network,
            opt=config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **extra,
        )
    except (ValueError, AssertionError, TypeError) as error:
        raise InputError(f"--optimizer {config.optimizer!r}: {error}") from error
    return optimizer


def make_average(network: nn.Module, decay: float) -> ModelEmaV3 | None:
    """A moving average of the network's weights and statistics; None without a decay.

    The decay of step t is min(decay, 1 - (1 + t)^(-2/3)), so that the first weights are soon
    forgotten.
    """
    return ModelEmaV3(network, decay=decay, use_warmup=True) if decay else None


def learning_rate(config: TrainingConfig, done: int, total: int, reductions: int) -> float:
    """After ``done`` of ``total`` steps: linear warm-up times cosine, or times the reductions."""
    factor = min(1.0, (done + 1) / max(1, config.warmup_steps))
    if config.schedule == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * done / total))
    else:
        factor *= config.reduction**reductions
    return config.lr * factor
