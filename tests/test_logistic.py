"""Stationarity of each objective, its limits, and every way to say the same thing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.sparse import csr_matrix
from scipy.special import expit, logit
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold

from heads.blending import Blend
from heads.cuts import best_global_threshold
from heads.decisions import GlobalThreshold
from heads.folds import check_folds
from heads.logistic import DropoutLogistic, DropoutLogisticCV
from heads.logistic_folds import Paths
from heads.losses import residual, tail
from heads.metrics import log_loss
from heads.rare import logistic_rare_bias
from heads.ridge import DropoutRidge, DropoutRidgeCV
from heads.training import check_training_set

SHAPES = [(40, 6), (14, 30), (3, 5)]
TIGHT: dict[str, Any] = {"tol": 1e-14, "max_iter": 5000}
Noise = pytest.mark.parametrize("noise", ["quadratic", "gaussian"])


def make(n: int, d: int, n_labels: int = 4, seed: int = 0) -> dict[str, Any]:
    """Rows with a mean, labels with both classes, weights and a starting head."""
    rng = np.random.default_rng(seed)
    Y = (rng.random((n, n_labels)) < 0.4).astype(float)
    Y[0], Y[1] = 1, 0
    return {
        "X": rng.normal(0.5, 1, (n, d)),
        "Y": Y,
        "sample_weight": rng.uniform(0.2, 2, n),
        "coef_init": rng.normal(0, 0.5, (n_labels, d)),
        "intercept_init": rng.normal(0, 0.5, n_labels),
    }


def loss(margin: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, margin) - y * margin


def objective(
    noise: str, data: dict[str, Any], k: int, dropout: float, l2: float
) -> Callable[[np.ndarray], float]:
    """f(D, b) of label k in one vector, written down from its definition."""
    X, y, a = data["X"], data["Y"][:, k], data["sample_weight"]
    offset = 0.0 if "coef_init" not in data else X @ data["coef_init"][k]
    rho = dropout / (1 - dropout)
    rate = np.average(y, weights=a)
    xi = np.linspace(-9, 9, 1001)
    weights = np.exp(-(xi**2) / 2) / np.exp(-(xi**2) / 2).sum()

    def f(at: np.ndarray) -> float:
        D, b = at[:-1], at[-1]
        margin = offset + b + X @ D
        penalty = l2 / 2 * D @ D
        if noise == "quadratic":
            m = a @ X**2
            return float(a @ loss(margin, y) + penalty + rho * rate * (1 - rate) / 2 * m @ D**2)
        s = np.sqrt(rho * X**2 @ D**2)
        noisy = loss(margin[:, None] + s[:, None] * xi, y[:, None])
        return float(a @ (noisy @ weights) + penalty)

    return f


def gradient(f: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences."""
    return np.array([(f(at + step * e) - f(at - step * e)) / (2 * step) for e in np.eye(len(at))])


@Noise
@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize(("dropout", "l2"), [(0.3, 0.0), (0.8, 0.0), (0.5, 0.6), (0.0, 0.7)])
@pytest.mark.parametrize("start", [False, True])
def test_the_gradient_vanishes(
    noise: str, n: int, d: int, dropout: float, l2: float, start: bool
) -> None:
    data = make(n, d)
    if not start:
        del data["coef_init"], data["intercept_init"]
    head = DropoutLogistic(dropout, l2, noise=noise, **TIGHT).fit(**data)
    D = head.coef_ - data["coef_init"] if start else head.coef_
    for k in range(4):
        f = objective(noise, data, k, dropout, l2)
        at = np.append(D[k], head.intercept_[k])
        scale = np.abs(gradient(f, np.zeros(d + 1))).max()
        # The Gaussian expectation is a quadrature, good to some 1e-6.
        assert np.abs(gradient(f, at)).max() < scale * (1e-6 if noise == "quadratic" else 1e-4)


@Noise
def test_no_neighbour_is_better_under_monte_carlo_dropout(noise: str) -> None:
    """Against dropout itself, at frequent labels.

    Measured on labels with a base rate of .3 to .5: the minimum of either
    approximation loses less than 1 % of the dropout loss against the best of
    its neighbours along the line to plain and to no weights.
    """
    data = make(60, 5)
    del data["coef_init"], data["intercept_init"]
    p, a = 0.4, data["sample_weight"]
    head = DropoutLogistic(p, noise=noise, **TIGHT).fit(**data)
    kept = np.random.default_rng(1).random((20_000, 60, 5)) < 1 - p
    noisy = data["X"] * kept / (1 - p)
    for k in range(2):

        def dropped(scale: float, k: int = k) -> float:
            margin = noisy @ (scale * head.coef_[k]) + head.intercept_[k]
            return float((loss(margin, data["Y"][:, k]) @ a).mean())

        assert dropped(1.0) < 1.01 * min(dropped(scale) for scale in (0.0, 0.5, 0.8, 1.25, 2.0))


@pytest.mark.parametrize(("base_rate", "tolerance"), [(0.4, 0.02), (0.02, 0.5)])
def test_gaussian_loss_against_monte_carlo_dropout(base_rate: float, tolerance: float) -> None:
    """The loss that is minimised is near that of dropout, rare labels apart.

    For the frequent label it is within 2 %; for the rare one, whose loss hangs on a
    few rows with a large, skewed margin noise, it may be off by tens of per cent.
    """
    rng = np.random.default_rng(0)
    X = np.maximum(rng.normal(0.5, 1, (300, 40)), 0)
    score = X[:, :8].sum(axis=1)
    Y = (score > np.quantile(score, 1 - base_rate))[:, None].astype(float)
    p = 0.5
    head = DropoutLogistic(p, noise="gaussian", **TIGHT).fit(X, Y)
    at = np.append(head.coef_[0], head.intercept_[0])
    data = {"X": X, "Y": Y, "sample_weight": np.ones(300)}
    kept = rng.random((4000, 300, 40)) < 1 - p
    margin = np.einsum("rij,ij->ri", kept, X * head.coef_[0]) / (1 - p) + head.intercept_[0]
    exact = loss(margin, Y[:, 0]).mean(axis=0).sum()
    near = objective("gaussian", data, 0, p, 0)(at)
    assert abs(near / exact - 1) < tolerance


@pytest.mark.parametrize(("n", "d"), [(60, 6), (20, 30)])
@Noise
def test_without_dropout_it_is_scikit_learns_logistic_regression(
    noise: str, n: int, d: int
) -> None:
    data = make(n, d)
    X, Y, a = data["X"], data["Y"], data["sample_weight"]
    head = DropoutLogistic(0, l2=1.3, noise=noise, **TIGHT).fit(X, Y, sample_weight=a)
    for k in range(4):
        peer = LogisticRegression(C=1 / 1.3, tol=1e-10, max_iter=10_000)
        peer.fit(X, Y[:, k], sample_weight=a)
        assert_allclose(head.coef_[k], peer.coef_[0], atol=1e-5)
        assert_allclose(head.intercept_[k], peer.intercept_[0], atol=1e-5)
        assert_allclose(head.predict_proba(X)[:, k], peer.predict_proba(X)[:, 1], atol=1e-5)


@Noise
def test_little_dropout_approaches_maximum_likelihood(noise: str) -> None:
    data = make(60, 4)
    head = DropoutLogistic(1e-8, noise=noise, **TIGHT).fit(data["X"], data["Y"])
    for k in range(4):
        peer = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000)
        peer.fit(data["X"], data["Y"][:, k])
        assert_allclose(head.coef_[k], peer.coef_[0], atol=1e-4)


@Noise
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_all_dropped_gives_back_the_start_with_a_new_intercept(noise: str, n: int, d: int) -> None:
    data = make(n, d)
    head = DropoutLogistic(1 - 1e-9, noise=noise, **TIGHT).fit(**data)
    assert_allclose(head.coef_, data["coef_init"], atol=1e-5)
    residual = expit(data["X"] @ head.coef_.T + head.intercept_) - data["Y"]
    assert_allclose(data["sample_weight"] @ residual, 0, atol=1e-4)


@Noise
@pytest.mark.parametrize(("n", "d"), [(40, 6), (14, 30)])
def test_out_of_fold_scores_are_those_of_refits(noise: str, n: int, d: int) -> None:
    data = make(n, d)
    folds = check_folds(4, data["X"], data["Y"])
    head = DropoutLogisticCV([0.4], noise=noise, cv=folds, scoring="log_loss", **TIGHT)
    head.fit(**data)
    for train, test in folds:
        fold = data | {name: data[name][train] for name in ("X", "Y", "sample_weight")}
        refit = DropoutLogistic(0.4, noise=noise, **TIGHT).fit(**fold)
        X = data["X"][test]
        assert_allclose(head.oof_decision_function_[test], refit.decision_function(X), atol=1e-4)
        assert_allclose(head.oof_predict_proba_[test], refit.predict_proba(X), atol=1e-4)


@Noise
def test_a_rate_of_a_path_is_the_rate_alone(noise: str) -> None:
    """Warm starts change the way, not the end."""
    data = make(40, 6)
    noisy = data["X"][:, :4] + np.random.default_rng(1).normal(0, 0.7, (40, 4))
    data["Y"] = (noisy > 0.5).astype(float)
    scores = []
    for rates in ([0.5], [0.01, 0.5, 0.9, 0.999]):
        head = DropoutLogisticCV(rates, noise=noise, scoring="log_loss", cv=4, **TIGHT)
        head.fit(data["X"], data["Y"])
        table = head.cv_results_
        scores.append(table["fold_scores"][table["dropout"] == 0.5][0])
    assert_allclose(scores[0], scores[1], rtol=1e-5)


@Noise
@pytest.mark.parametrize(("n", "d"), [(40, 6), (14, 30)])
def test_weights_are_repeated_rows(noise: str, n: int, d: int) -> None:
    data = make(n, d)
    times = np.random.default_rng(1).integers(0, 4, n)
    times[:2] = 1
    rows = np.repeat(np.arange(n), times)
    head = DropoutLogistic(0.5, noise=noise, **TIGHT)
    coef = head.fit(data["X"], data["Y"], sample_weight=times).coef_
    assert_allclose(coef, head.fit(data["X"][rows], data["Y"][rows]).coef_, atol=1e-5)


@Noise
@pytest.mark.parametrize(("n", "d"), [(40, 6), (14, 30)])
def test_an_unknown_target_is_a_deleted_row_of_that_label(noise: str, n: int, d: int) -> None:
    data = make(n, d)
    hidden = np.random.default_rng(2).random(data["Y"].shape) < 0.25
    hidden[:2] = False
    head = DropoutLogistic(0.5, noise=noise, **TIGHT)
    Y = data.pop("Y")
    one = head.fit(Y=np.where(hidden, np.nan, Y), **data)
    coef, intercept = one.coef_, one.intercept_
    assert_array_equal(head.fit(Y=Y, mask=csr_matrix(hidden), **data).coef_, coef)
    for k in range(4):
        rows = ~hidden[:, k]
        alone = head.fit(
            data["X"][rows],
            Y[rows][:, [k]],
            sample_weight=data["sample_weight"][rows],
            coef_init=data["coef_init"][[k]],
            intercept_init=data["intercept_init"][[k]],
        )
        assert_allclose(coef[k], alone.coef_[0], atol=1e-5)
        assert_allclose(intercept[k], alone.intercept_[0], atol=1e-5)


@Noise
def test_views_are_rows_of_shared_weight(noise: str) -> None:
    data = make(25, 6)
    views = data["X"][:, None] + np.random.default_rng(1).normal(0, 0.5, (25, 4, 6))
    a = data["sample_weight"]
    head = DropoutLogistic(0.5, noise=noise, **TIGHT)
    coef = head.fit(views, data["Y"], sample_weight=a).coef_
    margins = head.decision_function(views)
    rows = head.fit(
        views.reshape(-1, 6), np.repeat(data["Y"], 4, axis=0), sample_weight=np.repeat(a / 4, 4)
    )
    assert_allclose(coef, rows.coef_, atol=1e-6)
    each = rows.decision_function(views.reshape(-1, 6)).reshape(25, 4, -1)
    assert_allclose(margins, each.mean(axis=1), atol=1e-5)
    # Scores may be asked for other numbers of views than training had.
    assert_allclose(rows.decision_function(views[:, :1]), each[:, 0], atol=1e-6)


@Noise
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "d"), [(40, 6), (14, 30)])
def test_the_scale_of_a_feature_does_not_matter(noise: str, dtype: type, n: int, d: int) -> None:
    data = make(n, d)
    factors = np.where(np.arange(d) % 3, np.where(np.arange(d) % 2, 1e-4, 1e4), 1.0)
    head = DropoutLogistic(0.5, noise=noise, tol=1e-10, max_iter=1000)
    plain = head.fit(data["X"], data["Y"]).coef_
    scaled = head.fit((data["X"] * factors).astype(dtype), data["Y"]).coef_
    assert scaled.dtype == dtype
    assert_allclose(scaled * factors, plain, atol=1e-4 * np.abs(plain).max() * 10)


@Noise
@pytest.mark.parametrize("l2", [0.0, 0.5])
@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_a_feature_that_is_always_zero_keeps_its_weight(
    noise: str, l2: float, dropout: float
) -> None:
    data = make(40, 6)
    data["X"][:, [0, 4]] = 0
    head = DropoutLogistic(dropout, l2, noise=noise).fit(**data)
    assert_array_equal(head.coef_[:, [0, 4]], data["coef_init"][:, [0, 4]])
    assert np.isfinite(head.coef_).all()


@Noise
def test_labels_do_not_see_each_other(noise: str) -> None:
    data = make(40, 6, n_labels=5)
    order = np.array([3, 0, 4, 1, 2])
    head = DropoutLogistic(0.5, noise=noise, **TIGHT)
    coef = head.fit(data["X"], data["Y"]).coef_
    assert_allclose(head.fit(data["X"], data["Y"][:, order]).coef_, coef[order], atol=1e-6)
    assert_allclose(head.fit(data["X"], data["Y"][:, :1]).coef_, coef[:1], atol=1e-6)


def test_soft_targets_are_fitted_as_they_are() -> None:
    data = make(30, 6)
    data["Y"] = data["Y"] * 0.7 + 0.1
    del data["coef_init"], data["intercept_init"]
    head = DropoutLogistic(0.5, **TIGHT).fit(**data)
    for k in range(4):
        f = objective("quadratic", data, k, 0.5, 0)
        assert np.abs(gradient(f, np.append(head.coef_[k], head.intercept_[k]))).max() < 1e-5


def test_probabilities_average_the_noise() -> None:
    data = make(40, 6)
    head = DropoutLogistic(0.6).fit(**data)
    X = data["X"]
    v = 1.5 * X**2 @ (head.coef_ - data["coef_init"]).T ** 2
    margin = X @ head.coef_.T + head.intercept_
    assert_allclose(head.predict_proba(X), expit(margin / np.sqrt(1 + np.pi * v / 8)), atol=1e-12)
    assert_array_equal(head.predict(X), margin >= 0)


def test_many_labels_are_fitted_like_few() -> None:
    """More labels than go through one product."""
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(50, 5)), (rng.random((50, 300)) < 0.3).astype(float)
    head = DropoutLogistic(0.5, **TIGHT)
    coef = head.fit(X, Y).coef_
    assert_allclose(coef[290:], head.fit(X, Y[:, 290:]).coef_, atol=1e-6)


# ---------------------------------------------------------------- rare labels


@Noise
@pytest.mark.parametrize(("views", "per_label"), [(1, False), (2, True)])
def test_held_out_scores_are_those_of_weights_kept_instead(
    noise: str, views: int, per_label: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(120, 6) | {"X": np.random.default_rng(1).normal(size=(120, views, 6))}
    data["Y"][2:, 3] = 0  # rare in one fold, without a positive in the others
    head = DropoutLogisticCV(
        (0.2, 0.5, 0.8), noise=noise, scoring="log_loss", per_label=per_label, cv=3, tol=1e-12
    )
    kept = []

    def paths(*arguments: Any, weights: bool) -> Paths:
        made = Paths(*arguments)
        kept.append(made.keep_weights)
        made.keep_weights = weights
        return made

    fits = []
    for weights in (True, False):
        monkeypatch.setattr("heads.logistic.Paths", partial(paths, weights=weights))
        monkeypatch.setattr("heads.logistic_fit._LABELS", (1, 2 if weights else 256))
        fits.append(clone(head).fit(**data))
    assert kept == [True, True]  # as many images as here are few weights
    for name in ("oof_decision_function_", "oof_predict_proba_", "coef_", "intercept_"):
        assert_allclose(getattr(fits[0], name), getattr(fits[1], name), rtol=1e-6, atol=1e-8)
    assert_array_equal(fits[0].dropout_, fits[1].dropout_)


@Noise
def test_labels_without_positives_take_their_base_rate(noise: str) -> None:
    data = make(40, 6, n_labels=4)
    data["Y"][:, 1] = 0
    data["Y"][:, 2] = 1
    data["Y"][:, 3] = 0
    data["Y"][7, 3] = 1
    a = data["sample_weight"]
    head = DropoutLogistic(0.5, noise=noise, min_positives=2)
    head.fit(data["X"], data["Y"], sample_weight=a)
    assert_array_equal(head.coef_[1:], 0)
    positives = np.array([0, a.sum(), a[7]])
    assert_allclose(head.intercept_[1:], logit((positives + 0.5) / (a.sum() + 1)))
    assert np.any(head.coef_[0])


@pytest.mark.parametrize("positives", [0, 1, 30])
@pytest.mark.parametrize("level", [-20.0, -3.0, 4.0])
def test_rare_labels_share_a_shift_that_matches_their_number(positives: int, level: float) -> None:
    rng = np.random.default_rng(0)
    X, W0 = rng.normal(size=(40, 6)), rng.normal(size=(8, 6))
    Y = np.zeros((40, 8))
    Y.flat[rng.permutation(40 * 8)[:positives]] = 1
    data = check_training_set(X, Y, None, None, None, W0, np.full(8, level))
    bias = logistic_rare_bias(data, np.arange(40), np.arange(8))
    shift = bias - level
    assert_allclose(shift, shift[0])
    expected = expit(X @ W0.T + bias).sum() + expit(shift[0])
    assert expected == pytest.approx(positives + 0.5, rel=1e-4)


def test_rare_labels_keep_their_weights_in_every_fold() -> None:
    data = make(60, 6, n_labels=6)
    data["Y"][:, 3:] = 0
    data["Y"][[5, 9], 4] = 1
    data["Y"][8, 5] = 1
    head = DropoutLogisticCV([0.5], min_positives=3, cv=5).fit(**data)
    assert_array_equal(head.coef_[3:], data["coef_init"][3:])
    shift = head.intercept_[3:] - data["intercept_init"][3:]
    assert_allclose(shift, shift[0])
    base = data["X"] @ data["coef_init"].T + data["intercept_init"]
    for _, test in check_folds(5, data["X"], data["Y"]):
        moved = (head.oof_decision_function_ - base)[test][:, 3:]
        assert_allclose(moved, moved[0, 0], atol=1e-9)


@Noise
def test_a_positive_that_is_alone_in_its_fold_does_no_harm(noise: str) -> None:
    data = make(40, 6)
    data["Y"][:, 2] = 0
    data["Y"][11, 2] = 1
    head = DropoutLogisticCV([0.5], noise=noise, cv=5, scoring="log_loss")
    head.fit(data["X"], data["Y"])
    assert np.isfinite(head.oof_decision_function_).all()
    assert head.oof_predict_proba_[11, 2] == pytest.approx(0.5 / 33)


def test_separable_labels_stay_finite_with_dropout() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(30, 60))
    Y = (X[:, :5] > 0.5).astype(float)
    for noise in ("quadratic", "gaussian"):
        head = DropoutLogistic(0.3, noise=noise, max_iter=2000).fit(X, Y)
        assert_array_equal(head.predict(X), Y)
        assert np.abs(head.coef_).max() < 100


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_the_residual_is_sigma_less_y_at_every_margin(zero: float) -> None:
    margin = np.array([[-30.0, -1.0, zero, 1.0, 30.0]])
    for y in (0.0, 0.3, 1.0):
        Y = np.full_like(margin, y)
        assert_allclose(residual(margin, tail(margin), Y), expit(margin) - y, atol=1e-15)


@pytest.mark.parametrize("noise", ["quadratic", "gaussian"])
def test_an_offset_of_zero_is_no_offset(noise: str) -> None:
    data = make(60, 8)
    fits = [
        DropoutLogistic(0.4, noise=noise, **TIGHT).fit(data["X"], data["Y"], coef_init=W0)
        for W0 in (None, np.zeros((data["Y"].shape[1], 8)))
    ]
    assert_allclose(fits[0].coef_, fits[1].coef_, atol=1e-4)
    assert fits[1].n_iter_.max() < 100


# ------------------------------------------------------------- hard problems


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_coarse_path_towards_start_weights_does_not_run_away(dtype: type) -> None:
    rng = np.random.default_rng(0)
    X = np.maximum(rng.normal(size=(150, 60)), 0).astype(dtype)
    Y = (X @ rng.normal(size=(60, 8)) > 1) * 1.0
    start = {"coef_init": np.zeros((8, 60)), "intercept_init": np.full(8, -3.0)}
    path = DropoutLogisticCV((0.999, 0.9, 0.61), noise="gaussian", scoring="log_loss")
    path.fit(X, Y, **start)
    alone = DropoutLogisticCV((0.61,), noise="gaussian", scoring="log_loss").fit(X, Y, **start)
    score = path.cv_results_["score"][path.cv_results_["dropout"] == 0.61]
    assert score == pytest.approx(alone.best_score_, abs=1e-3)


def test_features_of_unlike_scale_in_float32_are_all_used() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 3)) * [1e4, 1, 0.1]
    y = (X[:, 1] + 0.3 * rng.logistic(size=300) > 0) * 1.0
    head = DropoutLogistic(0.0, l2=1.0, tol=1e-9).fit(X.astype(np.float32), y[:, None])
    peer = LogisticRegression(C=1, tol=1e-9, max_iter=10_000).fit(X, y)
    assert_allclose(head.coef_[0, 1:], peer.coef_[0, 1:], rtol=2e-2, atol=2e-2)


def test_folds_of_rank_deficient_rows_are_solved_in_their_own_span() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(700, 60)) @ rng.normal(size=(60, 260))
    Y = (X @ rng.normal(size=(260, 3)) / 20 + rng.logistic(size=(700, 3)) > 1) * 1.0
    folds = check_folds(3, X, Y)
    head = DropoutLogisticCV([0.5], cv=folds, scoring="log_loss", tol=1e-10).fit(X, Y)
    for train, test in folds:
        alone = DropoutLogistic(0.5, tol=1e-10).fit(X[train], Y[train]).predict_proba(X[test])
        assert_allclose(head.oof_predict_proba_[test], alone, atol=1e-3)


def test_few_negatives_of_little_weight_give_finite_numbers() -> None:
    weight, Y = np.full(50, 1e9), np.ones((50, 1))
    weight[0], Y[0] = 1, 0
    X = np.random.default_rng(0).random((50, 5), np.float32)
    head = DropoutLogistic().fit(X, Y, sample_weight=weight)
    assert np.isfinite(head.coef_).all()
    assert 15 < head.intercept_[0] + head.coef_[0] @ X.mean(axis=0) < 30  # about log(5e10)


@Noise
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e2, 1e3, 1e4, 1e5])
def test_wild_start_weights_do_no_worse_than_no_change(
    noise: str, dtype: type, size: float
) -> None:
    data = make(60, 8)
    data["coef_init"] = size * np.random.default_rng(1).normal(size=data["coef_init"].shape)
    head = DropoutLogistic(0.5, noise=noise).fit(**(data | {"X": data["X"].astype(dtype)}))
    for k in range(data["Y"].shape[1]):
        f = objective(noise, data, k, 0.5, 0.0)
        still = np.append(np.zeros(8), data["intercept_init"][k])
        there = np.append(head.coef_[k] - data["coef_init"][k], head.intercept_[k])
        assert f(there) <= f(still)


def test_binary_targets_take_scikit_learns_splitters() -> None:
    data = make(60, 8)
    head = DropoutLogisticCV([0.5], cv=StratifiedKFold(3), scoring="log_loss")
    assert head.fit(data["X"], data["Y"][:, 0] > 0.5).oof_predict_proba_.shape[0] == 60


def test_average_precision_needs_a_positive() -> None:
    data = make(60, 8)
    head = DropoutLogisticCV([0.5], scoring="average_precision")
    with pytest.raises(ValueError, match="no label is positive"):
        head.fit(data["X"], np.zeros((60, 3)))


# ------------------------------------------------------------------ selection


def within_folds(
    Y: np.ndarray, P: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]], a: np.ndarray
) -> float:
    """Average precision of scikit-learn, of each label in each fold that has a positive."""
    labels = []
    for k in range(Y.shape[1]):
        some = [test for _, test in folds if a[test] @ Y[test, k] > 0]
        values = [
            average_precision_score(Y[test, k], P[test, k], sample_weight=a[test]) for test in some
        ]
        labels += [np.mean(values)] if values else []
    return float(np.mean(labels))


@pytest.mark.parametrize("scoring", ["fbeta", "average_precision", "log_loss", "mse"])
def test_the_score_of_the_table_is_the_metric_of_the_held_out_scores(scoring: str) -> None:
    data = make(60, 8)
    Y, a = data["Y"], data["sample_weight"]
    data["Y"][:, :2] = data["X"][:, :2] > 0.5
    data["Y"][:, 2] = 0
    data["Y"][7, 2] = 1  # in one fold alone
    folds = check_folds(4, data["X"], Y)
    head = DropoutLogisticCV(
        [0.0, 0.2, 0.6, 0.95, 0.999], l2=0.01, scoring=scoring, beta=1, cv=folds
    )
    head.fit(data["X"], Y, sample_weight=a)
    P = head.oof_predict_proba_
    score = {
        "average_precision": lambda: within_folds(Y, P, folds, a),
        "fbeta": lambda: best_global_threshold(P, Y, 1, sample_weight=a)[1],
        "log_loss": lambda: log_loss(Y, P, sample_weight=a),
        "mse": lambda: np.average(((Y - P) ** 2).mean(axis=1), weights=a),
    }[scoring]()
    assert head.best_score_ == pytest.approx(score)
    pick = max if scoring in ("fbeta", "average_precision") else min
    assert head.best_score_ == pick(head.cv_results_["score"])


def test_each_label_may_take_its_own_rate() -> None:
    data = make(80, 6, n_labels=3)
    noisy = data["X"][:, :2] + np.random.default_rng(1).normal(0, 0.7, (80, 2))
    data["Y"][:, :2] = noisy > 0.5
    rates = [0.001, 0.1, 0.5, 0.9, 0.99]
    head = DropoutLogisticCV(rates, scoring="log_loss", per_label=True, cv=4, **TIGHT)
    head.fit(data["X"], data["Y"])
    table = head.cv_results_
    assert_array_equal(head.dropout_, table["dropout"][table["label_scores"].argmin(axis=0)])
    assert len(np.unique(head.dropout_)) > 1
    for k in range(3):
        alone = DropoutLogistic(head.dropout_[k], **TIGHT).fit(data["X"], data["Y"][:, [k]])
        assert_allclose(head.coef_[k], alone.coef_[0], atol=1e-6)
        assert_allclose(
            head.predict_proba(data["X"])[:, k], alone.predict_proba(data["X"])[:, 0], atol=1e-6
        )


def test_the_default_grid_suits_the_noise() -> None:
    data = make(60, 5)
    noisy = data["X"][:, :4] + np.random.default_rng(1).normal(0, 0.7, (60, 4))
    weakest = {}
    for noise in ("quadratic", "gaussian"):
        head = DropoutLogisticCV(noise=noise, scoring="log_loss", cv=3)
        head.fit(data["X"], (noisy > 0.5).astype(float))
        weakest[noise] = head.cv_results_["rho"][-10]
    assert weakest == pytest.approx({"quadratic": 0.125, "gaussian": 1.0})


def test_features_that_only_name_the_row_do_not_help_out_of_fold() -> None:
    rng = np.random.default_rng(0)
    Y = (rng.random((60, 5)) < 0.3).astype(float)
    head = DropoutLogisticCV([0.5], scoring="log_loss").fit(np.eye(60), Y)
    chance = log_loss(Y, np.broadcast_to(Y.mean(axis=0), Y.shape))
    assert head.best_score_ >= chance
    real = DropoutLogisticCV([0.1], scoring="log_loss").fit(np.hstack([np.eye(60), Y]), Y)
    assert real.best_score_ < chance / 2


# --------------------------------------------------------------------- faults


def test_labels_that_do_not_converge_are_named() -> None:
    data = make(40, 6)
    with pytest.warns(ConvergenceWarning, match=r"4 labels \(0, 1, 2, 3\) did not converge in 2 "):
        head = DropoutLogistic(0.1, max_iter=2).fit(data["X"], data["Y"])
    assert_array_equal(head.n_iter_, 2)
    with pytest.warns(ConvergenceWarning) as caught:
        DropoutLogisticCV([0.1], max_iter=2).fit(data["X"], data["Y"])
    # Labels of the folds' fits may be others than those of the last fit: the two are told apart.
    in_folds = ["at some rate of a fold" in str(warning.message) for warning in caught]
    assert in_folds == [True, False]


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (DropoutLogistic(1.0), "dropout is 1.0"),
        (DropoutLogistic(noise="cauchy"), "noise is 'cauchy'"),
        (DropoutLogistic(tol=0), "tol is 0"),
        (DropoutLogistic(max_iter=0), "max_iter 0"),
        (DropoutLogistic(min_positives=-1), "min_positives is -1"),
        (DropoutLogisticCV(cv="loo"), "no closed form for one image left out"),
        (DropoutLogisticCV([0.5], per_label=True), "per_label=True needs"),
    ],
)
def test_wrong_parameters_are_named(
    head: DropoutLogistic | DropoutLogisticCV, message: str
) -> None:
    data = make(20, 5)
    with pytest.raises(ValueError, match=message):
        head.fit(data["X"], data["Y"])


def test_platt_probabilities_are_scaled_held_out_margins() -> None:
    data = make(60, 8, seed=3)
    X, Y, start = data["X"], data["Y"], data["coef_init"]
    rows = {"X": X, "Y": Y, "coef_init": start, "intercept_init": data["intercept_init"]}
    noise, platt = (
        DropoutLogisticCV(dropouts=(0.1, 0.3), cv=3, probability=probability).fit(**rows)
        for probability in ("noise", "platt")
    )
    # The same head; only what it says differs.
    assert_array_equal(platt.coef_, noise.coef_)
    assert_array_equal(platt.oof_decision_function_, noise.oof_decision_function_)
    assert not hasattr(noise, "calibration_")
    scaling = platt.calibration_
    expected = expit(scaling.slope * platt.oof_decision_function_ + scaling.intercept)
    assert_allclose(platt.oof_predict_proba_, expected, rtol=1e-12)
    expected = expit(scaling.slope * (X @ platt.coef_.T + platt.intercept_) + scaling.intercept)
    assert_allclose(platt.predict_proba(X), expected, rtol=1e-12)
    # Scaled on held-out rows, they are no worse there than the plain margin's.
    plain = log_loss(Y, expit(platt.oof_decision_function_))
    assert log_loss(Y, platt.oof_predict_proba_) < plain + 1e-3
    with pytest.raises(ValueError, match="probability is 'raw'; expected noise or platt"):
        DropoutLogisticCV(probability="raw").fit(X, Y)


def test_held_out_margins_that_fall_leave_the_base_rate() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(90, 60)), np.arange(90) % 3 == 0
    each = [(np.delete(np.arange(90), i), np.array([i])) for i in range(90)]
    head = DropoutLogisticCV([0.9999], cv=each, probability="platt").fit(X, y)
    held_out = head.oof_decision_function_[:, 0]
    assert held_out[y].max() < held_out[~y].min()
    assert head.calibration_.slope == 0
    P = head.predict_proba(X)
    assert_array_equal(P, np.broadcast_to(P[0], P.shape))
    assert P[0, 1] == pytest.approx(y.mean(), abs=0.01)
    assert np.isfinite(head.decision_function(X)).all()


def test_the_sign_of_a_binary_decision_is_that_of_platts_probability() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 30))
    y = X[:, 0] + rng.normal(size=200) > 0.8
    head = DropoutLogisticCV([0.1, 0.3], cv=3, probability="platt").fit(X, y)
    scaling, margin = head.calibration_, X @ head.coef_[0] + head.intercept_[0]
    assert_allclose(head.decision_function(X), margin + scaling.intercept / scaling.slope)
    assert_array_equal(head.decision_function(X) > 0, head.predict(X))
    assert (margin > 0).sum() != head.predict(X).sum()


def test_a_head_that_is_fitted_again_forgets_its_calibration() -> None:
    data = make(40, 6)
    head = DropoutLogisticCV([0.3], cv=3, probability="platt").fit(data["X"], data["Y"])
    again = head.set_params(probability="noise").fit(data["X"], data["Y"])
    assert not hasattr(again, "calibration_")


@Noise
def test_an_intercept_alone_stands_beside_weights_of_zero(noise: str) -> None:
    data = make(40, 6)
    data["Y"][:, 1:3] = 0
    W0 = data.pop("coef_init")
    alone = DropoutLogistic(0.5, noise=noise, **TIGHT).fit(**data)
    beside = DropoutLogistic(0.5, noise=noise, **TIGHT).fit(**data, coef_init=0 * W0)
    assert_allclose(alone.intercept_, beside.intercept_, atol=1e-9)
    shift = alone.intercept_[1:3] - data["intercept_init"][1:3]
    assert shift[0] == pytest.approx(shift[1])


@pytest.mark.parametrize(
    "fit",
    [
        lambda X, Y: DropoutLogisticCV((0.5,)).fit(X, Y),
        lambda X, Y: DropoutRidgeCV((0.5,)).fit(X, Y),
        lambda X, Y: DropoutRidge().fit(X, np.zeros(Y.shape), mask=np.isnan(Y)),
        lambda X, Y: DropoutRidgeCV((0.5,)).fit(X, np.arange(len(X)) % 2, mask=np.isnan(Y[:, 0])),
        lambda X, Y: GlobalThreshold().fit(expit(X[:, :4]), Y),
        lambda X, Y: Blend().fit([expit(X[:, :4])] * 2, Y),
    ],
)
def test_nothing_is_learnt_from_no_truth(fit: Callable[..., object]) -> None:
    data = make(40, 6)
    with pytest.raises(ValueError, match="no entry of Y is known; give at least one label"):
        fit(data["X"], np.full(data["Y"].shape, np.nan))
