"""A few rows set apart: the inverse is that of a dense matrix, the minimum is the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from heads import losses
from heads.curvature import Curvature, rows_apart
from heads.logistic import DropoutLogistic, DropoutLogisticCV

N, D = 1700, 260  # rows and features from which on some are set apart


def rare(n: int = N, views: int = 1) -> dict[str, Any]:
    """Labels of a few per cent, which a few rows decide, and unlike directions of features."""
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(n, 40)) * np.arange(1, 41) ** -0.5
    seen = latent[:, None] + 0.1 * rng.normal(size=(n, views, 40))
    X = seen @ rng.normal(size=(40, D)) + 0.5 * rng.normal(size=(n, views, D))
    score = latent @ rng.normal(size=(40, 4))
    score = 10 * score / score.std(axis=0) + rng.logistic(size=(n, 4))
    order = np.argsort(np.argsort(-score, axis=0), axis=0)
    return {"X": X if views > 1 else X[:, 0], "Y": (order < [60, 30, 15, 8]).astype(float)}


@given(
    k=st.integers(1, 20), r=st.integers(1, 9), s=st.integers(1, 6), seed=st.integers(0, 2**32 - 1)
)
def test_the_inverse_is_that_of_the_dense_matrix(k: int, r: int, s: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(12, r))
    apart = np.stack([rng.choice(12, s, replace=False) for _ in range(k)])
    h, D, D_b = rng.gamma(1, size=(k, s)), rng.gamma(2, size=(k, r)), rng.gamma(2, size=k)
    curvature = Curvature(D, D_b, images, apart, h)
    kept = rng.random(k) < 0.7
    for labels in (np.ones(k, bool), kept):
        if labels is kept:
            curvature.keep(kept)
        g, g_b = rng.normal(size=(labels.sum(), r)), rng.normal(size=labels.sum())
        v, v_b = curvature.solve(g, g_b)
        for at, label in enumerate(np.flatnonzero(labels)):
            rows = np.hstack([images[apart[label]], np.ones((s, 1))])
            M = np.diag(np.append(D[label], D_b[label])) + (rows.T * h[label]) @ rows
            expected = np.linalg.solve(M, np.append(g[at], g_b[at]))
            assert_allclose(np.append(v[at], v_b[at]), expected, atol=1e-8)


@pytest.mark.parametrize(
    ("n", "views", "features", "number"),
    [
        (N, 1, D, 17),
        (1500, 1, D, 0),  # too few rows
        (N, 1, 255, 0),  # too short ones
        (100_000, 1, D, 24),
        (6400, 50, D, 16),
        (6400, 64, D, 0),  # too few images
    ],
)
def test_rows_are_set_apart_where_that_pays(n: int, views: int, features: int, number: int) -> None:
    assert rows_apart(n, views, features) == number


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_minimum_is_the_same_in_fewer_iterations(
    dtype: type, views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = rare(views=views)
    data["X"] = data["X"].astype(dtype)
    head = DropoutLogistic(0.2, tol=1e-7)
    here = head.fit(**data)
    W, b, n_iter = here.coef_, here.intercept_, here.n_iter_
    monkeypatch.setattr(losses, "rows_apart", lambda *_: 0)
    plain = head.fit(**data)
    scale = np.abs(plain.coef_).max()
    assert_allclose(W, plain.coef_, atol=2e-3 * scale)
    assert_allclose(b, plain.intercept_, rtol=1e-3)
    assert n_iter.sum() < 0.9 * plain.n_iter_.sum()


def test_the_gradient_vanishes_at_the_minimum() -> None:
    """Of sum_i a_i (log(1 + exp mu_i) - y_i mu_i) + l2 / 2 |w|^2, as scikit-learn's."""
    data = rare()
    rng = np.random.default_rng(1)
    a = rng.uniform(0.2, 2, N)
    head = DropoutLogistic(0, l2=1.3, tol=1e-12, max_iter=5000).fit(**data, sample_weight=a)
    left = expit(data["X"] @ head.coef_.T + head.intercept_) - data["Y"]
    assert_allclose((left.T * a) @ data["X"] + 1.3 * head.coef_, 0, atol=2e-4)
    assert_allclose(a @ left, 0, atol=2e-4)
    peer = LogisticRegression(C=1 / 1.3, tol=1e-10, max_iter=10_000)
    peer.fit(data["X"], data["Y"][:, 3], sample_weight=a)
    assert_allclose(head.coef_[3], peer.coef_[0], atol=1e-5)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("dropout", [0.0, 1e-6, 1 - 1e-9])
def test_separated_labels_of_many_rows_stay_finite(dropout: float) -> None:
    """All curvature sinks to nothing, or all but that of a few rows does."""
    data = rare()
    data["Y"] = (data["X"][:, :4] > np.quantile(data["X"][:, :4], 0.97, axis=0)).astype(float)
    head = DropoutLogistic(dropout, max_iter=60).fit(**data)
    assert np.isfinite(head.coef_).all()
    P = head.predict_proba(data["X"])
    assert np.isfinite(P).all()
    if dropout < 0.5:
        assert ((P > 0.5) == (data["Y"] > 0.5)).mean() > 0.99


def test_held_out_scores_are_those_of_refits_with_rows_apart() -> None:
    data = rare(2200)
    half = np.arange(2200) % 2
    folds = [(np.flatnonzero(half != f), np.flatnonzero(half == f)) for f in (0, 1)]
    folds = [
        (np.r_[train, test[:800]], test[800:]) for train, test in folds
    ]  # 1,900 rows train; the others are tested below
    rest = np.setdiff1d(np.arange(2200), np.r_[folds[0][1], folds[1][1]])
    folds.append((np.setdiff1d(np.arange(2200), rest), rest))
    head = DropoutLogisticCV([0.5], cv=folds, scoring="log_loss", tol=1e-8).fit(**data)
    for train, test in folds[:2]:
        refit = DropoutLogistic(0.5, tol=1e-8).fit(data["X"][train], data["Y"][train])
        expected = refit.decision_function(data["X"][test])
        assert_allclose(head.oof_decision_function_[test], expected, atol=2e-3)


@pytest.mark.parametrize("l2", [0.1, 0.001])
def test_a_weakly_penalised_label_does_not_stop_early(l2: float) -> None:
    """Its curvature sinks on the way: an old M would foretell next to no excess."""
    data = rare()
    X, y = data["X"], data["Y"][:, 1]

    def loss(w: np.ndarray, b: float) -> float:
        margin = X @ w + b
        return float((np.logaddexp(0, margin) - y * margin).sum() + l2 / 2 * w @ w)

    peer = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=20_000).fit(X, y)
    head = DropoutLogistic(0, l2=l2, tol=1e-6, max_iter=2000).fit(X, y[:, None])
    excess = loss(head.coef_[0], head.intercept_[0]) - loss(peer.coef_[0], peer.intercept_[0])
    base = losses.base_rate_loss(y[None], np.ones(N))[0]
    assert excess < 20 * 1e-6 * base


def test_far_rows_do_not_turn_the_direction_round() -> None:
    """In float32 what a row of huge weight takes off has no digits left but for a bound."""
    rng = np.random.default_rng(0)
    images = (1e4 * rng.normal(size=(30, 300))).astype(np.float32)
    images[10:20] = images[:10]  # pairs
    apart = np.tile(np.arange(20), (3, 1))
    D, D_b = np.full((3, 300), 1e-3, np.float32), np.full(3, 1e-3, np.float32)
    curvature = Curvature(D, D_b, images, apart, np.full((3, 20), 0.25, np.float32))
    for number in range(50):
        g = rng.normal(size=(3, 300)).astype(np.float32)
        g_b = rng.normal(size=3).astype(np.float32)
        if number % 2:  # along the rows
            g += images[apart].sum(axis=1)
        v, v_b = curvature.solve(g, g_b)
        assert (np.einsum("kj,kj->k", v.astype(float), g) + v_b.astype(float) * g_b > 0).all()
