"""Exactness: every rate, every fold and every way to say the same thing give the same numbers."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.sparse import csr_matrix
from scipy.special import expit
from sklearn.linear_model import LogisticRegression, Ridge

from heads.calibration import fit_platt
from heads.folds import check_folds
from heads.moments import Moments
from heads.ridge import DropoutRidge, DropoutRidgeCV

SHAPES = [(40, 6), (12, 30), (3, 5), (30, 30)]


def make(n: int, d: int, n_labels: int = 4, seed: int = 0) -> dict[str, Any]:
    """Rows with a mean, labels with both classes, weights and a starting head."""
    rng = np.random.default_rng(seed)
    Y = (rng.random((n, n_labels)) < 0.4).astype(float)
    Y[0], Y[1] = 1, 0
    return {
        "X": rng.normal(0.5, 1, (n, d)),
        "Y": Y,
        "sample_weight": rng.uniform(0.2, 2, n),
        "coef_init": rng.normal(0, 0.3, (n_labels, d)),
        "intercept_init": rng.normal(0, 0.3, n_labels),
    }


def closed_form(
    X: np.ndarray,
    Y: np.ndarray,
    dropout: float,
    l2: float = 0.0,
    sample_weight: np.ndarray | None = None,
    coef_init: np.ndarray | None = None,
    intercept_init: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Normal equations with the intercept as one more feature; W and b."""
    n, d = X.shape
    a = np.ones(n) if sample_weight is None else sample_weight
    W0 = np.zeros((Y.shape[1], d)) if coef_init is None else coef_init
    m = (a[:, None] * X**2).sum(axis=0)
    design = np.hstack([X, np.ones((n, 1))])
    penalty = np.diag(np.append(dropout / (1 - dropout) * m + l2, 0))
    left = design.T @ (a[:, None] * design) + penalty
    solved = np.linalg.solve(left, design.T @ (a[:, None] * (Y - X @ W0.T)))
    return W0 + solved[:-1].T, solved[-1]


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize(("dropout", "l2"), [(0.3, 0.0), (0.9, 0.0), (0.5, 2.0), (0.0, 0.7)])
@pytest.mark.parametrize("start", [False, True])
def test_a_fit_is_the_closed_form(n: int, d: int, dropout: float, l2: float, start: bool) -> None:
    data = make(n, d)
    if not start:
        del data["coef_init"], data["intercept_init"]
    head = DropoutRidge(dropout, l2).fit(**data)
    W, b = closed_form(dropout=dropout, l2=l2, **data)
    assert_allclose(head.coef_, W, atol=1e-9)
    assert_allclose(head.intercept_, b, atol=1e-9)
    assert_allclose(head.decision_function(data["X"]), data["X"] @ W.T + b, atol=1e-8)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("n", "d"), [(3, 50), (10, 11), (20, 300)])
@pytest.mark.parametrize("twins", [False, True])
def test_the_limit_of_no_dropout_is_the_pseudo_inverse(
    n: int, d: int, twins: bool, dtype: type
) -> None:
    """Rows far from zero: neither their mean nor equal rows of other weights are data."""
    rng = np.random.default_rng(n)
    X, Z = (5 + np.abs(rng.normal(size=(rows, d))).astype(dtype) for rows in (n, 20))
    a = rng.choice([0.5, 1, 2.5], n)
    if twins:
        X[2], a[1:3] = X[1], (0.7, 2.2)
    Y = (rng.random((n, 4)) < 0.4).astype(float)
    Y[0], Y[1] = 1, 0
    x, z = X.astype(float), Z.astype(float)
    scale, root = 1 / np.sqrt(a @ x**2), np.sqrt(a)[:, None]
    mean, centre = np.average(x, axis=0, weights=a), np.average(Y, axis=0, weights=a)
    design = (x - mean) * scale * root
    D = scale[:, None] * (np.linalg.pinv(design, rcond=1e-9) @ ((Y - centre) * root))
    atol = 1e-9 if dtype is np.float64 else 2e-5
    head = DropoutRidge(0.0).fit(X, Y, sample_weight=a)
    assert_allclose(head.decision_function(Z), (z - mean) @ D + centre, atol=atol)
    # And what folds say is what fits without them say.
    both = np.concatenate([X, Z])
    folds = [(np.arange(n), np.arange(n, n + 20)), (np.arange(n, n + 20), np.arange(n))]
    truth, weight = np.concatenate([Y, np.eye(20, 4)]), np.concatenate([a, np.ones(20)])
    held_out = DropoutRidgeCV([0.0], cv=folds, scoring="mse").fit(both, truth, sample_weight=weight)
    assert_allclose(held_out.oof_decision_function_[n:], head.decision_function(Z), atol=atol)


def test_the_objective_is_the_expectation_over_dropout() -> None:
    """Monte-Carlo dropout: the minimum of the noisy loss is ours, and no neighbour is better."""
    data = make(30, 4, n_labels=1)
    a, X, y, p = data["sample_weight"], data["X"], data["Y"][:, 0], 0.4
    head = DropoutRidge(p).fit(**data)
    rng = np.random.default_rng(1)
    noisy = X * (rng.random((40_000, *X.shape)) < 1 - p) / (1 - p)

    def loss(W: np.ndarray, b: float) -> float:
        margin = b + X @ data["coef_init"][0] + noisy @ (W - data["coef_init"][0])
        return float((a * (y - margin) ** 2).sum(axis=1).mean())

    best = loss(head.coef_[0], head.intercept_[0])
    for step in rng.normal(0, 0.3, (10, 5)):
        assert loss(head.coef_[0] + step[:4], head.intercept_[0] + step[4]) > best


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("l2", [0.0, 0.5])
@pytest.mark.parametrize("start", [False, True])
def test_out_of_fold_scores_are_those_of_refits(n: int, d: int, l2: float, start: bool) -> None:
    data = make(n, d)
    if not start:
        del data["coef_init"], data["intercept_init"]
    splits = min(5, n)
    head = DropoutRidgeCV([0.4], l2, cv=splits, scoring="mse", min_positives=1).fit(**data)
    for train, test in check_folds(splits, data["X"], data["Y"]):
        fold = data | {name: data[name][train] for name in ("X", "Y", "sample_weight")}
        refit = DropoutRidge(0.4, l2).fit(**fold)
        assert_allclose(
            head.oof_decision_function_[test], refit.decision_function(data["X"][test]), atol=1e-9
        )


@pytest.mark.parametrize(("n", "d"), [(40, 6), (12, 30)])
def test_folds_that_do_not_partition_the_rows_are_refitted_too(n: int, d: int) -> None:
    data = make(n, d)
    folds = [(train[2:], test) for train, test in check_folds(3, data["X"], data["Y"])]
    head = DropoutRidgeCV([0.6], cv=folds, scoring="mse").fit(**data)
    for train, test in folds:
        fold = data | {name: data[name][train] for name in ("X", "Y", "sample_weight")}
        refit = DropoutRidge(0.6).fit(**fold)
        assert_allclose(
            head.oof_decision_function_[test], refit.decision_function(data["X"][test]), atol=1e-9
        )


@pytest.mark.parametrize(("n", "d"), [(30, 6), (12, 30)])
@pytest.mark.parametrize("grouped", [False, True])
def test_leaving_one_out_is_a_refit_without_it(n: int, d: int, grouped: bool) -> None:
    """By l2 alone there are no moments to hold fixed, and the formula is exact."""
    data = make(n, d)
    groups = np.arange(n) // 3 if grouped else np.arange(n)
    head = DropoutRidgeCV([0.0], l2=0.8, cv="loo", scoring="mse")
    head.fit(**data, groups=groups if grouped else None)
    for group in np.unique(groups):
        train, test = groups != group, groups == group
        fold = {name: data[name][train] for name in ("X", "Y", "sample_weight")}
        W, b = closed_form(dropout=0, l2=0.8, coef_init=data["coef_init"], **fold)
        assert_allclose(head.oof_decision_function_[test], data["X"][test] @ W.T + b, atol=1e-8)


def test_leaving_one_out_takes_all_views_of_an_image() -> None:
    data = make(20, 7)
    views = data["X"][:, None] + np.random.default_rng(1).normal(0, 0.3, (20, 3, 7))
    a = data["sample_weight"]
    head = DropoutRidgeCV([0.0], l2=0.8, cv="loo", scoring="mse")
    head.fit(views, data["Y"], sample_weight=a)
    for i in range(20):
        rest = np.delete(np.arange(20), i)
        W, b = closed_form(
            views[rest].reshape(-1, 7),
            np.repeat(data["Y"][rest], 3, axis=0),
            dropout=0,
            l2=0.8,
            sample_weight=np.repeat(a[rest] / 3, 3),
        )
        assert_allclose(head.oof_decision_function_[i], views[i].mean(axis=0) @ W.T + b, atol=1e-8)


def test_leaving_one_out_with_dropout_is_near_a_refit() -> None:
    data = make(60, 8)
    head = DropoutRidgeCV([0.5], cv="loo", scoring="mse").fit(**data)
    exact = np.empty_like(data["Y"])
    for i in range(60):
        rest = np.delete(np.arange(60), i)
        fold = data | {name: data[name][rest] for name in ("X", "Y", "sample_weight")}
        exact[i] = DropoutRidge(0.5).fit(**fold).decision_function(data["X"][[i]])[0]
    error = np.sqrt(np.mean((head.oof_decision_function_ - exact) ** 2))
    assert 0 < error < 0.05 * np.std(exact)


def test_leaving_one_out_is_refused_where_it_is_undefined() -> None:
    data = make(10, 20)
    with pytest.raises(ValueError, match="passes through its own training rows"):
        DropoutRidgeCV([0.0], cv="loo", scoring="mse").fit(data["X"], data["Y"])


@pytest.mark.parametrize(("n", "d"), [(40, 6), (12, 30)])
def test_without_dropout_it_is_scikit_learns_ridge(n: int, d: int) -> None:
    data = make(n, d)
    X, Y, a = data["X"], data["Y"], data["sample_weight"]
    head = DropoutRidge(0, l2=1.7).fit(X, Y, sample_weight=a)
    peer = Ridge(alpha=1.7).fit(X, Y, sample_weight=a)
    assert_allclose(head.coef_, peer.coef_, atol=1e-10)
    assert_allclose(head.intercept_, peer.intercept_, atol=1e-10)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_no_penalty_is_the_limit_of_little_dropout(n: int, d: int) -> None:
    data = make(n, d)
    limit = DropoutRidge(0.0).fit(data["X"], data["Y"])
    near = DropoutRidge(1e-8).fit(data["X"], data["Y"])
    assert_allclose(limit.coef_, near.coef_, atol=1e-4)
    if n <= d:
        assert_allclose(limit.decision_function(data["X"]), data["Y"], atol=1e-8)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_all_dropped_gives_back_the_start_with_a_new_intercept(n: int, d: int) -> None:
    data = make(n, d)
    head = DropoutRidge(1 - 1e-10).fit(**data)
    assert_allclose(head.coef_, data["coef_init"], atol=1e-6)
    left = data["Y"] - data["X"] @ data["coef_init"].T
    assert_allclose(
        head.intercept_, np.average(left, axis=0, weights=data["sample_weight"]), atol=1e-6
    )


@pytest.mark.parametrize(("n", "d"), [(40, 6), (12, 30)])
def test_weights_are_repeated_rows(n: int, d: int) -> None:
    data = make(n, d)
    times = np.random.default_rng(1).integers(0, 4, n)
    times[:2] = 1
    rows = np.repeat(np.arange(n), times)
    one = DropoutRidge(0.5).fit(data["X"], data["Y"], sample_weight=times)
    other = DropoutRidge(0.5).fit(data["X"][rows], data["Y"][rows])
    assert_allclose(one.coef_, other.coef_, atol=1e-10)
    assert_allclose(one.intercept_, other.intercept_, atol=1e-10)


@pytest.mark.parametrize(("n", "d"), [(40, 6), (12, 30)])
@pytest.mark.parametrize("how", ["nan", "mask", "sparse mask", "masked array", "both"])
def test_an_unknown_target_is_a_deleted_row_of_that_label(n: int, d: int, how: str) -> None:
    data = make(n, d)
    hidden = np.random.default_rng(2).random(data["Y"].shape) < 0.25
    hidden[:2] = False
    hidden[:, 3] = hidden[:, 2]
    Y = data.pop("Y")
    if how == "nan":
        head = DropoutRidge(0.5).fit(Y=np.where(hidden, np.nan, Y), **data)
    elif how == "masked array":  # of some type whose hidden values are anything
        masked = np.ma.masked_array(np.where(hidden, 7, Y).astype(np.int8), hidden)
        head = DropoutRidge(0.5).fit(Y=masked, **data)
    elif how == "both":
        some = np.random.default_rng(3).random(Y.shape) < 0.5
        masked = np.ma.masked_array(Y, hidden & some)
        head = DropoutRidge(0.5).fit(Y=masked, mask=hidden & ~some, **data)
    else:
        mask = hidden if how == "mask" else csr_matrix(hidden)
        head = DropoutRidge(0.5).fit(Y=Y, mask=mask, **data)
    for k in range(Y.shape[1]):
        rows = ~hidden[:, k]
        W, b = closed_form(
            data["X"][rows],
            Y[rows, k : k + 1],
            0.5,
            sample_weight=data["sample_weight"][rows],
            coef_init=data["coef_init"][k : k + 1],
        )
        assert_allclose(head.coef_[k], W[0], atol=1e-9)
        assert_allclose(head.intercept_[k], b[0], atol=1e-9)


@pytest.mark.parametrize("cv", [4, "loo"])
def test_unknown_targets_neither_train_nor_score_out_of_fold(cv: int | str) -> None:
    data = make(40, 6)
    hidden = np.random.default_rng(2).random(data["Y"].shape) < 0.25
    hidden[:2] = False
    heads = [
        DropoutRidgeCV([0.5], cv=cv, scoring="mse").fit(
            data["X"], np.where(hidden, filler, data["Y"]), mask=hidden
        )
        for filler in (0.0, 1.0)
    ]
    assert_array_equal(heads[0].oof_decision_function_, heads[1].oof_decision_function_)
    assert heads[0].best_score_ == heads[1].best_score_
    error = (heads[0].oof_decision_function_ - data["Y"])[~hidden]
    assert heads[0].best_score_ == pytest.approx(np.mean(error**2))


def test_views_are_rows_of_shared_weight() -> None:
    data = make(25, 6)
    views = data["X"][:, None] + np.random.default_rng(1).normal(0, 0.5, (25, 4, 6))
    head = DropoutRidge(0.5).fit(views, data["Y"], sample_weight=data["sample_weight"])
    rows = DropoutRidge(0.5).fit(
        views.reshape(-1, 6),
        np.repeat(data["Y"], 4, axis=0),
        sample_weight=np.repeat(data["sample_weight"] / 4, 4),
    )
    assert_allclose(head.coef_, rows.coef_, atol=1e-10)
    assert_allclose(
        head.decision_function(views),
        rows.decision_function(views.reshape(-1, 6)).reshape(25, 4, -1).mean(axis=1),
        atol=1e-10,
    )


def test_an_image_is_never_on_both_sides_of_a_fold() -> None:
    data = make(24, 6)
    views = data["X"][:, None] + np.random.default_rng(1).normal(0, 0.5, (24, 2, 6))
    folds = check_folds(4, data["X"], data["Y"])
    head = DropoutRidgeCV([0.5], cv=folds, scoring="mse").fit(views, data["Y"])
    for train, test in folds:
        refit = DropoutRidge(0.5).fit(views[train], data["Y"][train])
        assert_allclose(
            head.oof_decision_function_[test], refit.decision_function(views[test]), atol=1e-10
        )


@pytest.mark.parametrize(("n", "d"), [(40, 6), (12, 30)])
@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_scale_of_a_feature_does_not_matter(n: int, d: int, scale: float, dtype: type) -> None:
    data = make(n, d)
    factors = np.where(np.arange(d) % 2, scale, 1.0)
    plain = DropoutRidge(0.5).fit(data["X"], data["Y"])
    scaled = DropoutRidge(0.5).fit((data["X"] * factors).astype(dtype), data["Y"])
    tolerance = 1e-9 if dtype == np.float64 else 1e-4
    assert_allclose(scaled.coef_ * factors, plain.coef_, atol=tolerance)
    assert scaled.coef_.dtype == dtype


@pytest.mark.parametrize(("n", "d"), [(200, 20), (40, 60)])
@pytest.mark.parametrize("dropout", [0.0, 1e-3, 0.3])
def test_single_precision_survives_collinear_features(n: int, d: int, dropout: float) -> None:
    """Half of the features repeat others up to 1e-3, far off zero: condition 1e8 and more."""
    rng = np.random.default_rng(0)
    X = rng.normal(30, 1, (n, d))
    X[:, d // 2 :] = X[:, : d - d // 2] + 1e-3 * rng.normal(size=(n, d - d // 2))
    X = X.astype(np.float32)
    Y = (X[:, :3] > 30).astype(float)
    l2 = 0.1 if dropout == 0 else 0.0
    single = DropoutRidge(dropout, l2).fit(X, Y)
    double = DropoutRidge(dropout, l2).fit(X.astype(np.float64), Y)
    assert_allclose(
        single.decision_function(X), double.decision_function(X.astype(np.float64)), atol=5e-4
    )


@pytest.mark.parametrize(("n", "d"), [(40, 6), (12, 30)])
def test_a_feature_that_is_always_zero_keeps_its_weight(n: int, d: int) -> None:
    data = make(n, d)
    data["X"][:, [0, 4]] = 0
    head = DropoutRidge(0.5).fit(**data)
    assert_array_equal(head.coef_[:, [0, 4]], data["coef_init"][:, [0, 4]])
    rest = np.delete(np.arange(d), [0, 4])
    fold = data | {"X": data["X"][:, rest], "coef_init": data["coef_init"][:, rest]}
    assert_allclose(head.coef_[:, rest], closed_form(dropout=0.5, **fold)[0], atol=1e-9)


def test_a_constant_feature_is_left_to_the_intercept() -> None:
    data = make(40, 6)
    data["X"][:, 2] = 5
    head = DropoutRidge(0.5).fit(data["X"], data["Y"])
    assert_allclose(head.coef_[:, 2], 0, atol=1e-12)


def test_labels_do_not_see_each_other() -> None:
    data = make(40, 6, n_labels=5)
    order = np.array([3, 0, 4, 1, 2])
    head = DropoutRidgeCV([0.2, 0.5, 0.8], scoring="mse", cv=check_folds(4, data["X"], data["Y"]))
    one = head.fit(data["X"], data["Y"])
    scores, coef = one.oof_decision_function_, one.coef_
    other = head.fit(data["X"], data["Y"][:, order])
    assert_allclose(other.oof_decision_function_, scores[:, order], atol=1e-12)
    assert_allclose(other.coef_, coef[order], atol=1e-12)


def test_sparse_boolean_and_dense_targets_are_the_same() -> None:
    data = make(30, 6)
    heads = [
        DropoutRidge(0.5).fit(data["X"], form)
        for form in (data["Y"], csr_matrix(data["Y"]), data["Y"].astype(bool), data["Y"].tolist())
    ]
    for head in heads[1:]:
        assert_allclose(head.coef_, heads[0].coef_, atol=1e-12)


def test_soft_targets_are_fitted_as_they_are() -> None:
    data = make(30, 6)
    soft = data["Y"] * 0.7 + 0.1
    head = DropoutRidge(0.5).fit(data["X"], soft)
    assert_allclose(head.coef_, closed_form(data["X"], soft, 0.5)[0], atol=1e-10)


def test_half_precision_memory_maps_are_read_as_they_are(tmp_path: Any) -> None:
    data = make(30, 6)
    half = data["X"].astype(np.float16)
    np.save(tmp_path / "x.npy", half)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    one = DropoutRidge(0.5).fit(mapped, data["Y"])
    other = DropoutRidge(0.5).fit(half.astype(np.float32), data["Y"])
    assert one.coef_.dtype == np.float32
    assert_array_equal(one.coef_, other.coef_)
    assert_array_equal(one.decision_function(mapped), other.decision_function(half))


# ---------------------------------------------------------------- rare labels


def test_rare_labels_keep_their_weights_and_share_one_shift() -> None:
    data = make(40, 6, n_labels=6)
    data["Y"][:, 4:] = 0
    data["Y"][7, 4] = 1
    data["Y"][:, 5] = 1
    head = DropoutRidge(0.5, min_positives=2).fit(**data)
    assert_array_equal(head.coef_[4:], data["coef_init"][4:])
    shift = head.intercept_[4:] - data["intercept_init"][4:]
    assert shift[0] == pytest.approx(shift[1])
    left = (data["Y"] - data["X"] @ data["coef_init"].T - data["intercept_init"])[:, 4:]
    assert shift[0] == pytest.approx(np.average(left.mean(axis=1), weights=data["sample_weight"]))


def test_rare_labels_without_a_start_predict_their_mean() -> None:
    data = make(40, 6, n_labels=3)
    data["Y"][:, 1] = 0
    data["Y"][5, 1] = 1
    head = DropoutRidge(0.5, min_positives=2).fit(data["X"], data["Y"])
    assert_array_equal(head.coef_[1], 0)
    assert head.intercept_[1] == pytest.approx(1 / 40)


def test_a_label_without_a_known_image_keeps_its_start() -> None:
    data = make(30, 6)
    data["Y"][:, 2] = np.nan
    head = DropoutRidgeCV([0.5]).fit(**data)
    assert_array_equal(head.coef_[2], data["coef_init"][2])
    assert np.isfinite(head.oof_decision_function_).all()


# ------------------------------------------------------------------ selection


def test_a_leaked_label_does_not_help_and_a_real_one_does() -> None:
    """Features that only name the row tell nothing about held-out rows."""
    rng = np.random.default_rng(0)
    Y = (rng.random((60, 5)) < 0.3).astype(float)
    named = DropoutRidgeCV([0.5], scoring="mse").fit(np.eye(60), Y)
    assert named.best_score_ >= np.mean((Y - Y.mean(axis=0)) ** 2)
    real = DropoutRidgeCV([0.01], scoring="mse").fit(np.hstack([np.eye(60), Y]), Y)
    assert real.best_score_ < 0.5 * np.mean((Y - Y.mean(axis=0)) ** 2)


@pytest.mark.parametrize("scoring", ["fbeta", "average_precision", "log_loss", "mse"])
def test_the_best_rate_of_the_table_is_taken(scoring: str) -> None:
    data = make(60, 8)
    data["Y"][:, :2] = data["X"][:, :2] > 0.5
    head = DropoutRidgeCV([0.0, 0.01, 0.3, 0.6, 0.99], scoring=scoring)
    head.fit(data["X"], data["Y"])
    table = head.cv_results_
    largest = scoring in ("fbeta", "average_precision")
    best = table["score"].max() if largest else table["score"].min()
    assert head.best_score_ == best
    # Of equally good rates the strongest.
    assert head.dropout_ == table["dropout"][table["score"] == best].max()
    assert table["fold_scores"].shape == (len(table["dropout"]), 5)
    assert_allclose(table["mean_score"], table["fold_scores"].mean(axis=1))
    refit = DropoutRidge(head.dropout_).fit(data["X"], data["Y"])
    assert_allclose(head.coef_, refit.coef_, atol=1e-12)


def test_the_score_of_the_table_is_the_metric_of_the_held_out_scores() -> None:
    from heads.cuts import best_global_threshold
    from heads.metrics import log_loss

    data = make(60, 8)
    Y, a = data["Y"], data["sample_weight"]
    fitted = {
        scoring: DropoutRidgeCV([0.5], scoring=scoring, beta=1).fit(data["X"], Y, sample_weight=a)
        for scoring in ("fbeta", "log_loss", "mse")
    }
    oof = fitted["mse"].oof_decision_function_
    assert fitted["mse"].best_score_ == pytest.approx(
        np.average(((Y - oof) ** 2).mean(axis=1), weights=a)
    )
    P = fitted["log_loss"].oof_predict_proba_
    assert fitted["log_loss"].best_score_ == pytest.approx(log_loss(Y, P, sample_weight=a))
    score = best_global_threshold(fitted["fbeta"].oof_predict_proba_, Y, 1, sample_weight=a)[1]
    assert fitted["fbeta"].best_score_ == pytest.approx(score)


@pytest.mark.parametrize(("n", "d"), [(60, 8), (40, 60)])
@pytest.mark.parametrize("start", [False, True])
def test_squared_errors_come_from_moments_or_scores_alike(n: int, d: int, start: bool) -> None:
    """With more rows than features "mse" is scored without held-out scores."""
    data = make(n, d, n_labels=6)
    data["Y"][:, 4:] = 0
    data["Y"][[3, 9], 4] = 1
    if not start:
        del data["coef_init"], data["intercept_init"]
    head = DropoutRidgeCV([0.2, 0.9], scoring="mse", min_positives=3, cv=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the best dropout")
        head.fit(**data)
    errors = (data["Y"] - head.oof_decision_function_) ** 2
    assert head.best_score_ == pytest.approx(
        np.average(errors.mean(axis=1), weights=data["sample_weight"])
    )
    best = head.cv_results_["dropout"] == head.dropout_
    assert_allclose(
        head.cv_results_["label_scores"][best][0],
        np.average(errors, axis=0, weights=data["sample_weight"]),
    )


def test_each_label_may_take_its_own_rate() -> None:
    data = make(80, 6, n_labels=3)
    data["Y"][:, 0] = data["X"][:, 0] > 0.5
    rates = [0.0, 0.1, 0.5, 0.9, 0.99]
    head = DropoutRidgeCV(rates, scoring="mse", per_label=True, cv=4).fit(data["X"], data["Y"])
    table = head.cv_results_
    assert_array_equal(head.dropout_, table["dropout"][table["label_scores"].argmin(axis=0)])
    assert len(np.unique(head.dropout_)) > 1
    for k in range(3):
        refit = DropoutRidge(head.dropout_[k]).fit(data["X"], data["Y"])
        assert_allclose(head.coef_[k], refit.coef_[k], atol=1e-12)
    errors = np.mean((data["Y"] - head.oof_decision_function_) ** 2, axis=0)
    assert_allclose(errors, table["label_scores"].min(axis=0))
    with pytest.raises(ValueError, match="per_label=True needs"):
        DropoutRidgeCV(rates, per_label=True).fit(data["X"], data["Y"])


def test_a_grid_grows_where_the_best_is_at_its_end() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(100, 5))
    Y = (X[:, :3] + 0.3 * rng.normal(size=(100, 3)) > 0).astype(float)
    with pytest.warns(UserWarning, match="is the smallest that was tried; widen dropouts"):
        head = DropoutRidgeCV([0.98, 0.99], scoring="mse").fit(X, Y)
    rho = head.cv_results_["rho"]
    assert len(rho) == 6
    assert_allclose(rho[1:-1] / rho[:-2], 99 / 49)
    assert head.dropout_ == head.cv_results_["dropout"][0] < 0.98


def test_probabilities_are_calibrated_scores_on_one_scale() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 10))
    Y = (X[:, :6] + rng.normal(size=(300, 6)) > 0.5).astype(float)
    head = DropoutRidgeCV([0.3]).fit(X, Y)
    P = head.oof_predict_proba_
    assert abs(P.mean() - Y.mean()) < 0.01
    assert_array_equal(P, head.calibration_.transform(head.oof_decision_function_))
    assert_array_equal(
        head.predict_proba(X), head.calibration_.transform(head.decision_function(X))
    )
    likely = P > 0.6
    assert abs(P[likely].mean() - Y[likely].mean()) < 0.06


@pytest.mark.parametrize("scoring", ["log_loss", "mse", "fbeta"])
def test_held_out_scores_that_fall_leave_the_base_rate(scoring: str) -> None:
    """Nearly flat, a held-out score is the mean of the other targets: lowest at positives."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(100, 60)), np.arange(100) % 3 == 0
    head = DropoutRidgeCV([0.9999], cv="loo", scoring=scoring).fit(X, y)
    held_out = head.oof_decision_function_[:, 0]
    assert held_out[y].max() < held_out[~y].min()
    assert head.calibration_.slope == 0
    P = head.predict_proba(X)
    assert_array_equal(P, np.broadcast_to(P[0], P.shape))
    assert P[0, 1] == pytest.approx(y.mean(), abs=0.01)
    assert_array_equal(head.oof_predict_proba_, P[:, 1:])
    assert not head.predict(X).any()
    several = DropoutRidgeCV([0.9999], cv="loo", scoring=scoring).fit(X, y[:, None])
    scores = several.decision_function(X)[:, 0]
    assert_allclose(head.decision_function(X), scores - 0.5, atol=1e-12)
    assert np.ptp(scores) > 0
    if scoring == "log_loss":
        rate = P[0, 1]
        best = -np.mean(np.where(y, np.log(rate), np.log1p(-rate)))
        assert head.best_score_ == pytest.approx(best)


def test_probabilities_never_fall_with_the_score() -> None:
    """Of noise, one image held out: the leak is the best log-loss of all if it may be used."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        X, y = rng.normal(size=(60, 40)), rng.random(60) < 0.3
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the best dropout")
            head = DropoutRidgeCV(cv="loo", scoring="log_loss").fit(X, y)
        order = np.argsort(head.decision_function(X))
        assert (np.diff(head.predict_proba(X)[order, 1]) >= 0).all()
        assert head.best_score_ > 0.4


def test_calibration_of_many_scores_is_that_of_each() -> None:
    """Beyond 2^16 scores they are counted in bins."""
    rng = np.random.default_rng(0)
    scores = rng.normal(0.1, 0.2, (500, 200))
    Y = (rng.random((500, 200)) < expit(8 * scores - 3)).astype(float)
    known, weight = rng.random((500, 200)) < 0.8, rng.random(500)
    binned = fit_platt(scores, Y, known, weight)
    a = (weight[:, None] * known)[known]
    peer = LogisticRegression(C=np.inf, tol=1e-10)
    peer.fit(scores[known][:, None], Y[known], sample_weight=a)
    assert binned.slope == pytest.approx(peer.coef_[0, 0], rel=1e-3)
    assert binned.intercept == pytest.approx(peer.intercept_[0], rel=1e-3)


def test_a_plain_head_clips_its_scores() -> None:
    data = make(12, 30)
    head = DropoutRidge(0.01).fit(data["X"], data["Y"])
    scores = head.decision_function(3 * data["X"])
    assert scores.min() < 0
    assert scores.max() > 1
    assert_array_equal(head.predict_proba(3 * data["X"]), np.clip(scores, 0, 1))


# -------------------------------------------------------------------- moments


def test_moments_add_up_in_any_split() -> None:
    rng = np.random.default_rng(0)
    X, T, a = rng.normal(3, 1, (50, 4)), rng.normal(size=(50, 2)), rng.random(50)
    origin = X[:5].mean(axis=0)
    whole = Moments.of(X, T, a, origin)
    cut = Moments.zero(origin, 2)
    for at in (slice(0, 7), slice(7, 8), slice(8, 50)):
        cut = cut + Moments.of(X[at], T[at], a[at], origin)
    for one, other in zip(vars(whole).values(), vars(cut).values(), strict=True):
        assert_allclose(one, other)
    assert_allclose(whole.raw, (a[:, None] * X**2).sum(axis=0))
    assert_allclose(whole.mean_x, np.average(X, axis=0, weights=a))
    centred = X - whole.mean_x
    assert_allclose(whole.centred()[0], centred.T @ (a[:, None] * centred))
    D, b = rng.normal(size=(2, 4)), rng.normal(size=2)
    assert_allclose(whole.squared_error(D, b), a @ (T - X @ D.T - b) ** 2)
    with pytest.raises(ValueError, match="different origins"):
        whole + Moments.zero(origin + 1, 2)


# --------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Y": np.full((20, 4), 2.0)}, r"Y is 2.0 at row 0, label 0; targets must lie in \[0, 1\]"),
        ({"Y": np.zeros((19, 4))}, "Y has 19 rows, but X has 20"),
        ({"mask": np.zeros((20, 3), bool)}, r"mask has shape \(20, 3\)"),
        ({"mask": np.zeros((20, 4))}, "dtype float64; expected .* bool"),
        ({"coef_init": np.zeros((3, 5))}, r"coef_init has shape \(3, 5\); expected \(4, 5\)"),
        ({"coef_init": np.full((4, 5), np.nan)}, "expected .* finite numbers"),
        ({"intercept_init": np.zeros(3)}, r"intercept_init has shape \(3,\)"),
        ({"groups": np.zeros(3)}, r"groups has shape \(3,\)"),
        ({"groups": np.array(["a"] * 19 + [None])}, "groups is None at row 19; give every row a"),
        ({"groups": ["a"] * 19 + [np.nan]}, "groups is nan at row 19"),
        ({"groups": np.array([0.0] * 19 + [np.nan])}, "groups is nan at row 19; give every row a"),
        ({"Y": np.zeros((20, 0))}, r"Y has shape \(20, 0\); expected .* at least one"),
        ({"sample_weight": -np.ones(20)}, "sample_weight is -1.0 at row 0"),
        ({"X": np.full((20, 5), np.nan)}, "Input X contains NaN"),
        ({"X": np.zeros((20, 0, 5))}, "at least one view"),
    ],
)
def test_wrong_input_is_named(change: dict[str, Any], message: str) -> None:
    data = {key: value for key, value in make(20, 5).items() if key in ("X", "Y")}
    with pytest.raises(ValueError, match=message):
        DropoutRidge(0.5).fit(**(data | change))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (DropoutRidge(1.0), "dropout is 1.0"),
        (DropoutRidge(0.5, l2=-1), "l2 is -1"),
        (DropoutRidgeCV([0.5], scoring="auc"), "scoring is 'auc'"),
        (DropoutRidgeCV([0.5], beta=0), "beta is 0"),
        (DropoutRidgeCV([]), "dropouts is empty"),
        (DropoutRidgeCV([0.5], cv="oob"), "cv is 'oob'"),
    ],
)
def test_wrong_parameters_are_named(head: DropoutRidge | DropoutRidgeCV, message: str) -> None:
    data = make(20, 5)
    with pytest.raises(ValueError, match=message):
        head.fit(data["X"], data["Y"])
