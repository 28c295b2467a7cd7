"""The map of features that all labels share: its optimum, its limits, and when it helps."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from heads import adapter
from heads.adapter import fit_adapter

RNG = np.random.default_rng(0)
N, D, K = 120, 5, 7
Z = RNG.normal(size=(N, D))
W, B = RNG.normal(size=(K, D)), RNG.normal(size=K) - 1
A = RNG.normal(size=(D, D)) / 2
Y = (RNG.random((N, K)) < expit(Z @ (W + W @ A).T + B + 0.5)).astype(float)
WEIGHT = RNG.uniform(0.5, 1.5, N)


def objective(head: tuple[np.ndarray, np.ndarray], strength: float) -> float:
    """As the module states it; A from W (I + A), which K > D determines."""
    fitted, b = head
    change = np.linalg.lstsq(W, fitted - W, rcond=None)[0]
    M = Z @ fitted.T + b
    loss = (WEIGHT[:, None] * (np.logaddexp(0, M) - Y * M)).sum()
    moved = ((b - B) ** 2).sum()
    return float(loss + strength * D / 2 * (change**2).sum() + adapter._BIAS / 2 * moved)


@pytest.mark.parametrize("strength", [0.01, 0.3, 5.0])
def test_it_is_the_optimum_of_the_objective(
    strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "_TOL", 1e-13)
    W_, b_ = fit_adapter(Z, Y, WEIGHT, W, B, strength)
    best = objective((W_, b_), strength)
    assert best < objective((W, B), strength)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        near = W_ + W @ rng.normal(size=(D, D)) * 1e-3, b_ + rng.normal(size=K) * 1e-3
        assert objective(near, strength) > best - 1e-9


def test_a_strong_pull_leaves_the_weights_and_fits_the_biases() -> None:
    W_, b_ = fit_adapter(Z, Y, WEIGHT, W, B, 1e9)
    np.testing.assert_allclose(W_, W, atol=1e-5)
    rates = (WEIGHT[:, None] * expit(Z @ W.T + b_)).sum(0), WEIGHT @ Y
    np.testing.assert_allclose(rates[0], rates[1], rtol=0.05)


def test_unknown_labels_count_nowhere() -> None:
    hidden = RNG.random(Y.shape) < 0.3
    hidden[:, 0] = False
    missing = np.where(hidden, np.nan, Y)
    first = fit_adapter(Z, missing, WEIGHT, W, B)
    # A label that is not known at all moves by the map alone.
    missing[:, 1] = np.nan
    W_, b_ = fit_adapter(Z, missing, WEIGHT, W, B)
    assert b_[1] == B[1]
    assert np.isfinite(W_).all()
    assert not np.array_equal(first[0], W_)


def test_a_rare_label_learns_from_the_others() -> None:
    """Without a single positive of its own, its weights follow the shift that all labels show."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(2000, D))
    truth = W + W @ A
    labels = (rng.random((2000, K)) < expit(features @ truth.T + B)).astype(float)
    labels[:, 0] = np.nan
    W_, _ = fit_adapter(features, labels, np.ones(2000), W, B, 0.01)
    assert np.linalg.norm(W_[0] - truth[0]) < 0.4 * np.linalg.norm(W[0] - truth[0])


def test_many_features_are_mapped_within_the_leading_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit_adapter(Z, Y, WEIGHT, W, B)
    monkeypatch.setattr(adapter, "_RANK", 2)
    W_, b_ = fit_adapter(Z, Y, WEIGHT, W, B)
    assert np.linalg.matrix_rank(W_ - W, tol=1e-8) == 2
    assert not np.allclose(W_, whole[0])
    assert b_.shape == (K,)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (12, 12), (1, 5)])
def test_leading_axes_are_eigenvectors_whichever_side_is_smaller(shape: tuple[int, int]) -> None:
    M = np.random.default_rng(3).normal(size=shape)
    e, vectors = adapter.leading_axes(M)
    rank = min(shape)
    np.testing.assert_allclose(e, np.linalg.eigvalsh(M.T @ M)[-rank:], atol=1e-9)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(rank), atol=1e-9)
    np.testing.assert_allclose(M.T @ (M @ vectors), vectors * e, atol=1e-8)


def test_of_more_features_than_rows_the_fit_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions in which there is no row and no weight have nothing to map."""
    monkeypatch.setattr(adapter, "_TOL", 1e-13)
    rng = np.random.default_rng(4)
    wide, _ = np.linalg.qr(rng.normal(size=(200, D)))  # features on a small part of 200 axes
    first = fit_adapter(Z, Y, WEIGHT, W, B, 1.0)
    second = fit_adapter(Z @ wide.T, Y, WEIGHT, W @ wide.T, B, D / 200)
    np.testing.assert_allclose(second[0] @ wide, first[0], atol=1e-5)
    np.testing.assert_allclose(second[1], first[1], atol=1e-5)


@pytest.mark.parametrize("features", [3, 400])
def test_many_labels_of_many_features_take_the_leading_ones(features: int) -> None:
    rng = np.random.default_rng(5)
    X, V = rng.normal(size=(300, features)), rng.normal(size=(270, features)) / 9
    labels = (rng.random((300, 270)) < expit(X @ V.T)).astype(float)
    W_, b_ = fit_adapter(X, labels, np.ones(300), V, np.zeros(270))
    before, after = (np.logaddexp(0, m) - labels * m for m in (X @ V.T, X @ W_.T + b_))
    assert after.sum() < before.sum()


@pytest.mark.parametrize("wide", [1, 9])
def test_a_last_layer_of_zeros_has_nothing_to_map(wide: int) -> None:
    X, none = np.tile(Z, wide), np.zeros((K, wide * D))
    W_, b_ = fit_adapter(X, Y, WEIGHT, none, B)
    np.testing.assert_array_equal(W_, 0)
    assert np.isfinite(b_).all()


def test_a_pull_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="shared_strength is 0"):
        fit_adapter(Z, Y, WEIGHT, W, B, 0)
