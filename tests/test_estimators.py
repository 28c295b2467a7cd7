"""Heads among scikit-learn's tools."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.sparse import csr_matrix
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from heads.logistic import DropoutLogistic, DropoutLogisticCV
from heads.ridge import DropoutRidge, DropoutRidgeCV

HEADS = [
    DropoutRidge(),
    DropoutRidgeCV(),
    DropoutLogistic(),
    DropoutLogistic(noise="gaussian"),
    DropoutLogisticCV(),
]
EXPECTED_FAILURES = {
    "check_supervised_y_2d": (
        "scikit-learn wants a column of targets to be flattened, with a warning; here (n, 1) is "
        "a multilabel target of one label, and its scores stay (n, 1)"
    ),
}
Each = pytest.mark.parametrize("head", HEADS, ids=repr)


def make(n: int = 60, d: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, d))
    return X, (X[:, :3] + 0.7 * rng.normal(size=(n, 3)) > 0).astype(int)


# The checks' toy data are often best at an end of the grid, which is a warning.
@pytest.mark.filterwarnings("ignore:the best dropout")
@parametrize_with_checks(HEADS, expected_failed_checks=lambda head: EXPECTED_FAILURES)
def test_scikit_learns_checks(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


@Each
def test_clones_have_the_parameters_and_none_of_the_fit(head: Any) -> None:
    X, Y = make()
    fitted = clone(head).set_params(l2=0.5).fit(X, Y)
    again = clone(fitted)
    assert again.get_params() == fitted.get_params()
    with pytest.raises(NotFittedError):
        again.predict(X)


@Each
def test_shapes_of_several_labels(head: Any) -> None:
    X, Y = make()
    fitted = clone(head).fit(X, Y)
    assert fitted.coef_.shape == (3, 5)
    assert fitted.intercept_.shape == (3,)
    assert fitted.decision_function(X).shape == fitted.predict_proba(X).shape == Y.shape
    assert_array_equal(fitted.predict(X), fitted.predict_proba(X) >= 0.5)
    assert_array_equal(fitted.classes_, np.arange(3))
    assert is_classifier(fitted)
    assert clone(head).fit(X, Y[:, :1]).decision_function(X).shape == (60, 1)


@Each
@pytest.mark.parametrize("names", [("no", "yes"), (-1, 1), (False, True)])
def test_shapes_of_a_binary_target(head: Any, names: tuple[Any, Any]) -> None:
    X, Y = make()
    y = np.array(names)[Y[:, 0]]
    fitted = clone(head).fit(X, y)
    several = clone(head).fit(X, Y[:, :1])
    assert_allclose(fitted.coef_, several.coef_)
    assert_allclose(fitted.intercept_, several.intercept_)
    P = fitted.predict_proba(X)
    assert P.shape == (60, 2)
    assert_allclose(P.sum(axis=1), 1)
    assert_allclose(P[:, 1], several.predict_proba(X)[:, 0])
    assert_array_equal(fitted.classes_, names)
    assert_array_equal(fitted.predict(X), np.array(names)[(P[:, 1] >= 0.5).astype(int)])
    scores = fitted.decision_function(X)
    assert scores.shape == (60,)
    assert_array_equal(scores >= 0, P[:, 1] >= 0.5)


@Each
def test_unknown_values_of_a_binary_target_are_left_out(head: Any) -> None:
    X, Y = make()
    y, mask = Y[:, 0], (Y[:, 0] == 1) & (np.arange(60) % 4 > 0)
    fitted = clone(head).fit(X, np.array(["no", "yes"])[y], mask=mask)
    assert fitted.predict_proba(X)[:, 1].mean() < 0.4
    for other in (mask[:, None], csr_matrix(mask[:, None])):
        again = clone(head).fit(X, y, mask=other)
        assert_array_equal(again.coef_, fitted.coef_)
        assert_array_equal(again.predict_proba(X), fitted.predict_proba(X))
    # What is unknown may be anything.
    for filler in (1.0, -7.0, np.nan):
        again = clone(head).fit(X, np.where(mask, filler, y), mask=mask)
        assert_array_equal(again.coef_, fitted.coef_)
        assert_array_equal(again.classes_, [0, 1])
    again = clone(head).fit(X, np.ma.masked_array(np.where(mask, -7, y), mask))
    assert_array_equal(again.coef_, fitted.coef_)
    hidden = clone(head).fit(X, y, mask=y == 1)  # both values are named, one is never known
    assert np.isfinite(hidden.predict_proba(X)).all()
    assert hidden.predict_proba(X)[:, 1].max() < 0.1


@pytest.mark.parametrize("head", [DropoutRidge(), DropoutLogistic()], ids=repr)
def test_unknown_values_of_a_binary_target_are_as_if_not_there(head: Any) -> None:
    X, Y = make()
    mask = (Y[:, 0] == 1) & (np.arange(60) % 4 > 0)
    fitted = clone(head).fit(X, Y[:, 0], mask=mask)
    column = clone(head).fit(X, Y[:, :1], mask=mask[:, None])
    assert_array_equal(fitted.coef_, column.coef_)
    fewer = clone(head).fit(X[~mask], Y[~mask, 0])
    assert_allclose(fitted.predict_proba(X), fewer.predict_proba(X), atol=1e-6)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros(59, bool), r"mask has shape \(59,\), dtype bool; expected \(60,\) bool"),
        (np.zeros(60), r"mask has shape \(60,\), dtype float64; expected \(60,\) bool"),
        (np.full(60, np.nan), "dtype float64; expected"),
        (np.zeros((1, 60), bool), r"mask has shape \(1, 60\), .* expected \(60, 1\) bool"),
        (csr_matrix((60, 2), dtype=bool), r"mask has shape \(60, 2\)"),
    ],
)
def test_masks_of_a_binary_target_that_are_refused(mask: Any, message: str) -> None:
    X, Y = make()
    with pytest.raises(ValueError, match=message):
        DropoutRidge().fit(X, Y[:, 0], mask=mask)


@pytest.mark.parametrize("head", [DropoutRidge(), DropoutLogistic()], ids=repr)
def test_pipelines_and_grid_searches(head: Any) -> None:
    X, Y = make()
    name = type(head).__name__.lower()
    search = GridSearchCV(
        make_pipeline(StandardScaler(), head),
        {f"{name}__dropout": [0.1, 0.5, 0.999]},
        cv=4,
        scoring="roc_auc",
    )
    search.fit(X, Y, **{f"{name}__sample_weight": np.linspace(1, 2, 60)})
    assert search.best_score_ > 0.8
    assert search.predict(X).shape == (60, 3)


@pytest.mark.parametrize("scoring", ["roc_auc", "average_precision"])
@pytest.mark.parametrize("head", [DropoutRidge(), DropoutLogistic()], ids=repr)
def test_a_column_is_scored_as_a_binary_target_is(head: Any, scoring: str) -> None:
    X, Y = make()
    found, expected = (
        GridSearchCV(head, {"dropout": [0.1, 0.5, 0.9999]}, scoring=scoring, cv=4).fit(X, target)
        for target in (Y[:, :1], Y[:, 0])
    )
    key = "mean_test_score"
    assert_allclose(found.cv_results_[key], expected.cv_results_[key], atol=1e-12)
    assert found.best_score_ > 0.8
    assert_array_equal(found.best_estimator_.classes_, [0, 1])
    assert found.predict(X).shape == (60, 1)


def test_groups_go_through_scikit_learns_splitters() -> None:
    X, Y = make()
    groups = np.arange(60) // 6
    head = DropoutRidgeCV([0.5], cv=GroupKFold(5), scoring="mse").fit(X, Y, groups=groups)
    scores = cross_val_predict(
        DropoutRidge(0.5), X, Y, groups=groups, cv=GroupKFold(5), method="decision_function"
    )
    assert_allclose(head.oof_decision_function_, scores)


@Each
def test_another_number_of_features_is_refused(head: Any) -> None:
    X, Y = make()
    fitted = clone(head).fit(X, Y)
    with pytest.raises(ValueError, match=r"X has 4 features, but Dropout.* is expecting 5"):
        fitted.predict(X[:, :4])
    with pytest.raises(ValueError, match=r"X has 4 features, but Dropout.* is expecting 5"):
        fitted.predict(np.zeros((2, 3, 4)))


@Each
def test_two_fits_and_a_pickled_one_are_the_same_bits(head: Any) -> None:
    X, Y = make()
    one, other = clone(head).fit(X, Y), clone(head).fit(X, Y)
    assert_array_equal(one.coef_, other.coef_)
    copied = pickle.loads(pickle.dumps(one))
    assert_array_equal(copied.predict_proba(X), one.predict_proba(X))


def test_more_than_two_classes_are_refused() -> None:
    X, _ = make()
    with pytest.raises(ValueError, match="Only binary classification is supported"):
        DropoutRidge().fit(X, np.arange(60) % 3)
    with pytest.raises(ValueError, match="only one class: 1"):
        DropoutRidge().fit(X, np.ones(60, int))
    with pytest.raises(ValueError, match="the target y is None"):
        DropoutRidge().fit(X)
