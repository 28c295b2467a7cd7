"""How wrong are the logits of an image, of which some labels may be unknown?

Losses are summed over classes: the mean over thousands of them would divide the
gradient away.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.loss import AsymmetricLossMultiLabel
from torch.nn import functional

from featcache.targets import Targets

Loss = Callable[[torch.Tensor, Targets], torch.Tensor]


def summed_loss(
    logits: torch.Tensor, targets: Targets, smoothing: float = 0.0, positive_weight: float = 1.0
) -> torch.Tensor:
    """Binary cross-entropy summed over known classes, shape (b,).

    sum_k -[w y_k log p_k + (1 - y_k) log(1 - p_k)] with y = confidence (1 - s) + s / 2.

    Parameters
    ----------
    logits : tensor of shape (b, K)
    targets : Targets
    smoothing : float
        s: how far targets move towards 1/2.
    positive_weight : float
        w: what a missed positive costs against a false one.
    """
    values = targets.values
    if smoothing:
        values = values * (1 - smoothing) + smoothing / 2
    weight = None if positive_weight == 1 else logits.new_tensor(positive_weight)
    loss = functional.binary_cross_entropy_with_logits(
        logits, values, reduction="none", pos_weight=weight
    )
    return _known_sum(loss, targets)


def _known_sum(loss: torch.Tensor, targets: Targets) -> torch.Tensor:
    if targets.known is not None:
        loss = loss * targets.known
    return loss.sum(1)


def asymmetric_loss(smoothing: float = 0.0, positive_weight: float = 1.0) -> Loss:
    """timm's asymmetric loss (Ridnik et al. 2021), summed over known classes.

    Sure negatives, of which an image has thousands, weigh next to nothing: a negative costs
    -q^4 log(1 - q) with q = max(p - 0.05, 0), a positive -(1 - p) log p.
    """
    element_wise = AsymmetricLossMultiLabel(
        smoothing=smoothing,
        reduction="none",
        pos_weight=None if positive_weight == 1 else torch.tensor(positive_weight),
    )

    def loss(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        return _known_sum(element_wise.to(logits.device)(logits, targets.values), targets)

    return loss


def training_loss(name: str, smoothing: float, positive_weight: float) -> Loss:
    """The loss of that name, ``bce`` or ``asymmetric``; (b,) of a batch."""
    if name == "asymmetric":
        return asymmetric_loss(smoothing, positive_weight)
    return lambda logits, targets: summed_loss(logits, targets, smoothing, positive_weight)
