from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from heads.dropout import (
    check_dropout,
    check_dropouts,
    default_dropouts,
    dropout_from_rho,
    margin_variance,
    noise_averaged_probability,
    rho_from_dropout,
    second_moments,
)
from heads.gaussian import expected_tail


@given(st.floats(0, 0.999))
@settings(derandomize=True, deadline=None, database=None)
def test_rate_and_rho_invert_each_other(p: float) -> None:
    assert dropout_from_rho(rho_from_dropout(p)) == pytest.approx(p, abs=1e-12)


def test_the_default_grid_is_geometric_in_rho() -> None:
    rho = rho_from_dropout(np.array(default_dropouts()))
    np.testing.assert_allclose(rho[1:] / rho[:-1], rho[1] / rho[0])
    assert rho[0] < 1 < rho[-1]


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, float("nan")])
def test_a_rate_outside_its_range_is_refused(dropout: float) -> None:
    with pytest.raises(ValueError, match=r"expected a rate in \[0, 1\)"):
        check_dropout(dropout)


def test_rates_are_sorted_and_made_unique() -> None:
    np.testing.assert_array_equal(check_dropouts([0.5, 0.1, 0.5]), [0.1, 0.5])
    with pytest.raises(ValueError, match="dropouts is empty"):
        check_dropouts([])
    np.testing.assert_array_equal(check_dropouts({0.5, 0.1}), [0.1, 0.5])


def test_rates_that_can_be_read_only_once_are_refused() -> None:
    rates = (p / 10 for p in (2, 5))
    with pytest.raises(ValueError, match="dropouts is a generator, read only once; give a list"):
        check_dropouts(rates)
    assert list(rates) == [0.2, 0.5]


@pytest.mark.parametrize("rates", [0.5, None, "0.5"])
def test_what_is_no_list_of_rates_is_refused(rates: Any) -> None:
    with pytest.raises(ValueError, match=f"dropouts is {rates!r}; give a list of numbers"):
        check_dropouts(rates)


def test_moments_are_raw_and_weighted() -> None:
    rng = np.random.default_rng(0)
    X, a = rng.normal(3, 1, (2500, 4)), rng.random(2500)
    expected = [sum(a[i] * X[i, j] ** 2 for i in range(2500)) for j in range(4)]
    np.testing.assert_allclose(second_moments(X, a), expected)
    np.testing.assert_allclose(second_moments(X.astype(np.float32), a), expected, rtol=1e-5)


def test_margin_variance_is_that_of_dropped_features() -> None:
    rng = np.random.default_rng(0)
    X, D = rng.normal(1, 1, (3, 6)), rng.normal(0, 1, (2, 6))
    p = np.array([0.3, 0.7])
    for k in range(2):
        kept = rng.random((200_000, 6)) < 1 - p[k]
        margins = (X[:, None, :] * kept / (1 - p[k])) @ D[k]
        np.testing.assert_allclose(
            margin_variance(X, D, rho_from_dropout(p))[:, k], margins.var(axis=1), rtol=0.02
        )
        np.testing.assert_allclose(X @ D[k], margins.mean(axis=1), atol=0.05)


def test_averaged_probability_is_near_the_mean_of_sigma() -> None:
    xi = np.random.default_rng(0).normal(size=200_000)
    for margin in (-4.0, -1.0, 0.5, 3.0):
        for variance in (0.0, 1.0, 20.0):
            exact = expit(margin + np.sqrt(variance) * xi).mean()
            near = noise_averaged_probability(np.array(margin), np.array(variance))
            assert abs(near - exact) < 0.02


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("variance", [0.0, 1e-9, 0.5, 4.0, 15.9, 16.1, 300.0, 1e6])
def test_the_expected_tail_and_slope_are_the_integrals(variance: float, dtype: type) -> None:
    margin = np.linspace(-30, 30, 121)
    xi = np.linspace(-9, 9, 20_001)
    weights = np.exp(-(xi**2) / 2)
    weights /= weights.sum()
    s = expit(-np.abs(margin[:, None]) + np.sqrt(variance) * xi)
    row = margin[None, :].astype(dtype)
    tail, slope = expected_tail(row, np.full_like(row, variance))
    assert tail.dtype == slope.dtype == dtype
    np.testing.assert_allclose(tail[0], s @ weights, atol=1e-5)
    np.testing.assert_allclose(slope[0], (s * (1 - s)) @ weights, atol=1e-5)
    if variance < 5:
        # Tails keep their digits: labels that are fitted well live there.
        np.testing.assert_allclose(tail[0], s @ weights, rtol=1e-3)


def test_the_expected_tail_survives_huge_margins() -> None:
    margin = np.array([[-1e6, -200.0, 200.0, 1e6]], np.float32)
    tail, slope = expected_tail(margin, np.ones_like(margin))
    assert np.all((tail >= 0) & (tail < 1e-6))
    assert np.all((slope >= 0) & (slope < 1e-6))
