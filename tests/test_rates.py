"""Biases that bring margins to known label rates."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from heads.rates import count_bias, labels_per_image, pooled_rates, rates_bias

RNG = np.random.default_rng(0)
MARGINS = RNG.normal(size=(200, 4)) - 1


def test_the_whole_way_has_the_rates_and_half_the_way_half_the_bias() -> None:
    rates = np.array([0.1, 0.2, 0.3, 0.6])
    bias = rates_bias(MARGINS, rates, 1.0)
    np.testing.assert_allclose(expit(MARGINS + bias).mean(axis=0), rates, rtol=1e-9)
    np.testing.assert_allclose(rates_bias(MARGINS, rates, 0.5), bias / 2)
    np.testing.assert_array_equal(rates_bias(MARGINS, rates, 0.0), 0)


def test_rates_that_are_expected_anyway_change_nothing() -> None:
    rates = expit(MARGINS).mean(axis=0)
    np.testing.assert_allclose(rates_bias(MARGINS, rates, 1.0), 0, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_it_stays_within_reason(scale: float) -> None:
    rates = np.array([1e-6, np.nan, 0.999, 0.5])
    bias = rates_bias(MARGINS * scale, rates, 1.0)
    assert np.abs(bias).max() <= 3
    assert bias[1] == 0
    assert np.isfinite(rates_bias(MARGINS[:2].astype(np.float32), rates, 1.0)).all()


def test_rates_are_pooled_over_what_is_known() -> None:
    first = np.array([[1, np.nan, np.nan], [0, 1, np.nan]])
    second = np.array([[1, 0, np.nan]])
    np.testing.assert_allclose(pooled_rates(first, second)[:2], [2.5 / 4, 1.5 / 3])
    assert np.isnan(pooled_rates(first, second)[2])


def test_the_number_of_labels_is_only_ever_raised() -> None:
    expected = float(expit(MARGINS).sum(axis=1).mean())
    bias = count_bias(MARGINS, expected + 0.5, 1.0)
    assert bias > 0
    assert expit(MARGINS + bias).sum(axis=1).mean() == pytest.approx(expected + 0.5, rel=1e-5)
    assert count_bias(MARGINS, expected + 0.5, 0.5) == pytest.approx(bias / 2)
    assert count_bias(MARGINS, expected - 0.5, 1.0) == 0
    assert count_bias(MARGINS, 4.0, 1.0) <= 3  # all labels, which no bias reaches


def test_labels_of_an_image_are_counted_among_known_entries() -> None:
    Y = np.array([[1, 0, np.nan], [1, np.nan, np.nan], [0, 1, np.nan]])
    assert labels_per_image(Y) == pytest.approx(2 / 3 + 1 / 2)
