"""Weights of heads by held-out margins."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from heads.stacking import stacked_weights

RNG = np.random.default_rng(0)
TRUE = RNG.normal(size=(400, 5)) * 2 - 1
Y = (RNG.random(TRUE.shape) < expit(TRUE)).astype(float)


def noisy(spread: float) -> np.ndarray:
    return TRUE + spread * RNG.normal(size=TRUE.shape)


def test_they_are_those_of_a_logistic_regression_where_none_is_negative() -> None:
    margins = np.stack([noisy(1.0), noisy(1.5)])
    peer = LogisticRegression(C=1e9, tol=1e-8).fit(margins.reshape(2, -1).T, Y.ravel())
    assert (peer.coef_ > 0).all()
    expected = peer.coef_[0] / peer.coef_.sum()
    np.testing.assert_allclose(stacked_weights(margins, Y), expected, atol=2e-3)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_head_that_knows_nothing_gets_nothing_whatever_the_scale(scale: float) -> None:
    margins = scale * np.stack([noisy(0.5), -noisy(0.5), RNG.normal(size=TRUE.shape)])
    weights = stacked_weights(margins, Y)
    assert weights.sum() == pytest.approx(1)
    assert weights[0] > 0.9
    assert weights[1] == 0


def test_equal_heads_and_useless_ones_count_alike() -> None:
    one = noisy(1.0)
    np.testing.assert_allclose(stacked_weights(np.stack([one, one]), Y), 0.5)
    np.testing.assert_allclose(stacked_weights(-np.stack([one, one, one]), Y), 1 / 3)
    unknown = np.full_like(Y, np.nan)
    np.testing.assert_allclose(stacked_weights(np.stack([one, one]), unknown), 0.5)


def test_unknown_entries_do_not_count() -> None:
    margins = np.stack([noisy(1.0), noisy(1.0)])
    half = np.where(RNG.random(Y.shape) < 0.5, Y, np.nan)
    spoilt = np.where(np.isnan(half), 1e6, margins)
    np.testing.assert_array_equal(stacked_weights(spoilt, half), stacked_weights(margins, half))
    assert np.isfinite(logit(stacked_weights(margins, half))).all()
