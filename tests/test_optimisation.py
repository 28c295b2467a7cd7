"""First weights, average and learning rate, against formulas written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from torch import nn

from featcache.annotations import Labels, Unlisted
from featcache.optimisation import initialise_head, learning_rate, make_average
from featcache.settings import TrainingConfig

CONFIG: dict[str, Any] = {"images": "i", "labels": ["l"], "arch": "a", "out": "o"}


def logit(p: float) -> float:
    return math.log(p / (1 - p))


@pytest.mark.parametrize("unlisted", ["negative", "unknown"])
def test_the_bias_is_the_logit_of_the_prior_among_known_labels(unlisted: Unlisted) -> None:
    positives = csr_matrix([[1.0, 0, 0.5], [1, 0, 0], [0, 0, 0], [0, 0, 0]])
    negatives = csr_matrix([[0, 0, 0], [0, 1, 1], [1, 0, 1], [0, 0, 0]])
    labels = Labels(list("abcd"), list("xyz"), positives, negatives, unlisted)
    layer = nn.Linear(2, 3)
    before = layer.weight.detach().clone()
    initialise_head(layer, labels)
    known = (4, 4, 4) if unlisted == "negative" else (3, 1, 3)
    expected = [logit((p + 0.5) / (n + 1)) for p, n in zip((2, 0, 0.5), known, strict=True)]
    assert layer.bias.tolist() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(layer.weight, before * 0.1)


def test_the_average_follows_at_once_and_then_slowly() -> None:
    model = nn.Linear(1, 1, bias=False)
    assert make_average(model, 0.0) is None
    average = make_average(model, 0.9)
    assert average is not None
    expected, seen = 0.0, []
    for step in range(1, 60):
        with torch.no_grad():
            model.weight.fill_(float(step % 7))
        average.update(model, step)
        t = step - 1
        decay = min(0.9, 1 - (1 + t) ** (-2 / 3)) if t else 0.0
        expected = decay * expected + (1 - decay) * (step % 7)
        seen.append((average.module.weight.item(), expected))
    np.testing.assert_allclose(*np.array(seen).T, rtol=1e-4)


def test_rates_of_a_plateau_schedule() -> None:
    config = TrainingConfig(**CONFIG, lr=0.4, warmup_steps=4, reduction=0.5)
    rates = [learning_rate(config, done, 100, done // 3) for done in range(8)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.2, 0.2, 0.2, 0.1, 0.1])
