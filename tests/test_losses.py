"""Losses against formulas written out, with unknown labels and soft targets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from featcache.losses import Loss, asymmetric_loss, summed_loss, training_loss
from featcache.targets import Targets


def problem(seed: int = 0, n: int = 5, K: int = 7) -> tuple[torch.Tensor, Targets]:
    rng = np.random.default_rng(seed)
    values = (rng.random((n, K)) < 0.4) * rng.choice([0.5, 0.8, 1.0], (n, K))
    known = (rng.random((n, K)) < 0.7) | (values > 0)
    return torch.tensor(rng.normal(0, 2, (n, K)), dtype=torch.float32), Targets(
        torch.tensor(values, dtype=torch.float32), torch.tensor(known), torch.zeros(n)
    )


def smoothed(y: float, smoothing: float) -> float:
    return y + smoothing * (0.5 - y)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_cross_entropy_with_a_weight_of_positives(smoothing: float, weight: float) -> None:
    logits, targets = problem()
    result = training_loss("bce", smoothing, weight)(logits, targets)
    assert targets.known is not None
    for i, row in enumerate(logits.tolist()):
        expected = 0.0
        for k, z in enumerate(row):
            if targets.known[i, k]:
                y, p = smoothed(float(targets.values[i, k]), smoothing), 1 / (1 + math.exp(-z))
                expected -= weight * y * math.log(p) + (1 - y) * math.log(1 - p)
        assert result[i].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_asymmetric_loss_of_sure_labels(weight: float) -> None:
    logits, targets = problem(1)
    targets.values = targets.values.ceil()
    result = training_loss("asymmetric", 0.0, weight)(logits, targets)
    assert targets.known is not None
    for i, row in enumerate(logits.tolist()):
        expected = 0.0
        for k, z in enumerate(row):
            p = 1 / (1 + math.exp(-z))
            q = max(p - 0.05, 0)
            if targets.known[i, k] and targets.values[i, k]:
                expected -= weight * (1 - p) * math.log(p)
            elif targets.known[i, k]:
                expected -= q**4 * math.log(1 - q)
        assert result[i].item() == pytest.approx(expected, rel=1e-4)


LOSSES = [
    training_loss("bce", 0.1, 2.0),
    training_loss("asymmetric", 0.1, 2.0),
    summed_loss,
    asymmetric_loss(),
]


@pytest.mark.parametrize("loss", LOSSES)
def test_unknown_labels_neither_cost_nor_teach(loss: Loss) -> None:
    logits, targets = problem(2)
    assert targets.known is not None
    logits.requires_grad_()
    before = loss(logits, targets)
    (gradient,) = torch.autograd.grad(before.sum(), logits)
    assert (gradient[~targets.known] == 0).all()
    assert (gradient[targets.known] != 0).any()
    moved = logits.detach().masked_fill(~targets.known, 5.0)
    torch.testing.assert_close(loss(moved, targets), before.detach())


@pytest.mark.parametrize("loss", LOSSES)
def test_an_image_costs_the_same_alone_and_in_a_batch(loss: Loss) -> None:
    logits, targets = problem(3)
    assert targets.known is not None
    whole = loss(logits, targets)
    for i in range(len(logits)):
        one = Targets(targets.values[[i]], targets.known[[i]], targets.outside[[i]])
        torch.testing.assert_close(loss(logits[[i]], one)[0], whole[i])


def test_a_soft_target_pulls_towards_its_confidence() -> None:
    logits = torch.tensor([[math.log(0.7 / 0.3), 0.0]], requires_grad=True)
    targets = Targets(torch.tensor([[0.7, 0.7]]), None, torch.zeros(1))
    (gradient,) = torch.autograd.grad(summed_loss(logits, targets).sum(), logits)
    assert gradient[0, 0].item() == pytest.approx(0, abs=1e-6)
    assert gradient[0, 1].item() == pytest.approx(0.5 - 0.7)
