"""Label sets of the highest expected F-beta against trying every set in every world."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from heads import expected
from heads.decisions import ExpectedFBeta
from heads.expected import expected_fbeta_sets
from heads.metrics import fbeta, fbeta_per_image

SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=80)


def worlds(K: int) -> np.ndarray:
    """(2^K, K): all label sets."""
    return np.array(list(itertools.product([0, 1], repeat=K))).reshape(-1, K)


def chances(p: np.ndarray, every: np.ndarray) -> np.ndarray:
    """Probability of each truth."""
    return np.prod(np.where(every, p, 1 - p), axis=1)


def value_of_each_set(P: np.ndarray, beta: float) -> np.ndarray:
    """(n, 2^K) expected F-beta of each label set, summed over all truths."""
    every = worlds(P.shape[1]).astype(float)
    right, size = every @ every.T, every.sum(axis=1)
    scores = fbeta(right, size[None, :], size[:, None], beta)
    return np.array([scores @ chances(p, every) for p in P])


def value_of(p: np.ndarray, chosen: np.ndarray, beta: float) -> float:
    every = worlds(len(p))
    return float(chances(p, every) @ fbeta_per_image(every, np.tile(chosen, (len(every), 1)), beta))


@st.composite
def cases(draw, most: int = 9):
    rng = np.random.default_rng(draw(st.integers(0, 10**9)))
    n, K = draw(st.integers(1, 4)), draw(st.integers(1, most))
    P = rng.random((n, K)) ** draw(st.sampled_from([0.2, 1, 4, 20]))
    if draw(st.booleans()):
        P = np.round(P, 1)  # ties, zeros and ones
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    least = draw(st.sampled_from([0, 0, 1, 2]))
    top = draw(st.sampled_from([None, None, 1, 2, 3]))
    return P.astype(dtype), least, None if top is None else max(top, least)


@SETTINGS
@given(case=cases(), beta=st.sampled_from([0.3, 0.5, 1, 2, np.sqrt(2), 10]))
def test_no_set_promises_more(case, beta):
    P, least, most = case
    found = expected_fbeta_sets(P, beta, least, most)
    K = P.shape[1]
    size = worlds(K).sum(axis=1)
    allowed = (size >= min(least, K)) & (size <= (K if most is None else most))
    P = P.astype(np.float64)
    every_value = value_of_each_set(P, beta)
    for p, values, chosen, expected_value in zip(
        P, every_value, found.sets.toarray(), found.expected, strict=True
    ):
        assert expected_value == pytest.approx(values[allowed].max(), abs=1e-12)
        assert value_of(p, chosen, beta) == pytest.approx(expected_value, abs=1e-12)
        assert min(least, K) <= chosen.sum() <= (K if most is None else most)


@pytest.mark.parametrize("beta", [0.5, 1, 2])
def test_twelve_labels(beta):
    rng = np.random.default_rng(0)
    P = rng.random((3, 12)) ** np.array([[0.5], [2], [5]])
    found = expected_fbeta_sets(P, beta)
    best = value_of_each_set(P, beta).max(axis=1)
    np.testing.assert_allclose(found.expected, best, rtol=0, atol=1e-12)


def test_beta_counts_squared():
    """Two labels of one half: at beta 2 both, 5 tp / (4 |y| + |yhat|) in each of four worlds."""
    P = np.full((1, 2), 0.5)
    both = (0 + 2 * 5 / (4 + 2) + 10 / (8 + 2)) / 4
    one = (0 + 5 / (4 + 1) + 0 + 5 / (8 + 1)) / 4
    found = expected_fbeta_sets(P, 2)
    assert found.expected[0] == pytest.approx(max(both, one), abs=1e-15)
    assert found.sets.toarray().tolist() == [[True, True]]


def test_known_probabilities_give_the_truth():
    Y = np.random.default_rng(1).random((20, 30)) < 0.2
    Y[0] = False
    found = expected_fbeta_sets(Y.astype(float))
    np.testing.assert_array_equal(found.sets.toarray(), Y)
    np.testing.assert_array_equal(found.expected, 1)


def test_nothing_is_best_where_nothing_is_likely():
    found = expected_fbeta_sets(np.array([[0.01, 0.02], [0.01, 0.9]]))
    assert np.diff(found.sets.indptr).tolist() == [0, 1]
    assert found.expected[0] == pytest.approx(0.99 * 0.98)
    never_empty = expected_fbeta_sets(np.array([[0.01, 0.02]]), 0.5, min_labels=1)
    assert never_empty.sets.toarray().tolist() == [[False, True]]


# -------------------------------------------------------------- many labels


def all_prefixes(p: np.ndarray, beta: float) -> np.ndarray:
    """f(0) ... f(K) from tables over (labels right, labels missed), by definition."""
    p = np.sort(p.astype(np.float64))[::-1]
    inside = [np.ones(1)]
    for q in p:
        inside.append(np.convolve(inside[-1], [1 - q, q]))
    outside = [np.ones(1)]
    for q in p[::-1]:
        outside.append(np.convolve(outside[-1], [1 - q, q]))
    values = []
    for k, right in enumerate(inside):
        missed = outside[len(p) - k]
        tp, rest = np.arange(len(right))[:, None], np.arange(len(missed))
        values.append(right @ fbeta(tp, tp + rest, k, beta) @ missed)
    return np.array(values)


@pytest.mark.parametrize("first", [4, 64])  # 4: the others are in two groups
@pytest.mark.parametrize("beta", [0.5, 1.3, 2])
@pytest.mark.parametrize("centre", [-7, -5, -3, 0, 3])
def test_hundreds_of_labels(monkeypatch, beta, centre, first):
    monkeypatch.setattr(expected, "_FIRST", first)
    P = expit(np.random.default_rng(2).normal(centre, 2, size=(4, 200)))
    found = expected_fbeta_sets(P, beta)
    for p, value, size in zip(P, found.expected, np.diff(found.sets.indptr), strict=True):
        values = all_prefixes(p, beta)
        assert value == pytest.approx(values.max(), abs=1e-12)
        assert size == np.flatnonzero(values > values.max() - 1e-12)[0]


def flat_images() -> np.ndarray:
    """Images whose best set is all labels, or nearly none, with no step in the probabilities."""
    P = np.empty((6, 250))
    P[0] = 0.02
    P[1] = 0.001
    P[2] = np.linspace(0.6, 0, 250)
    P[3] = 0.5
    P[4] = np.r_[np.ones(3), np.full(247, 0.03)]
    P[5] = np.r_[np.full(100, 0.9), np.full(150, 1e-3)]
    return P


def test_images_that_need_more_labels_than_are_looked_at_first(monkeypatch):
    P = flat_images()
    whole = [all_prefixes(p, 2) for p in P]
    for first in (1, 2, 64):
        monkeypatch.setattr(expected, "_FIRST", first)
        found = expected_fbeta_sets(P)
        for values, value in zip(whole, found.expected, strict=True):
            assert value == pytest.approx(values.max(), abs=1e-12)
        assert found.bound.max() < 1e-14


def test_more_unlikely_labels_than_an_exponential_can_hold(monkeypatch):
    P = np.full((2, 60), 0.03)
    P[1, 0] = 0.9
    whole = expected_fbeta_sets(P)
    monkeypatch.setattr(expected, "_MEAN", 0.5)
    monkeypatch.setattr(expected, "_FIRST", 1)
    again = expected_fbeta_sets(P)
    np.testing.assert_allclose(again.expected, whole.expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("tail_tol", [1e-8, 1e-4, 1e-2])
@pytest.mark.parametrize("first", [2, 64])
def test_truncation_stays_within_its_bound(monkeypatch, tail_tol, first):
    monkeypatch.setattr(expected, "_FIRST", first)
    rng = np.random.default_rng(3)
    P = np.concatenate([expit(rng.normal(-5, 2, size=(6, 250))), flat_images()])
    found = expected_fbeta_sets(P, 2, tail_tol=tail_tol)
    assert found.bound.max() <= tail_tol
    sizes = np.diff(found.sets.indptr)
    for p, value, bound, size in zip(P, found.expected, found.bound, sizes, strict=True):
        values = all_prefixes(p, 2)
        assert abs(value - values[size]) <= bound + 1e-12
        assert values.max() - values[size] <= 2 * bound + 1e-12


def test_truncation_is_used(monkeypatch):
    """The bound would be that of rounding if everything were still computed."""
    P = expit(np.random.default_rng(4).normal(-6, 1, size=(5, 1000)))
    assert expected_fbeta_sets(P, tail_tol=1e-3).bound.max() > 1e-9
    assert expected_fbeta_sets(P).bound.max() < 1e-14


def test_half_precision_is_taken_for_what_it_is():
    P = expit(np.random.default_rng(9).normal(-6, 3, size=(70, 800))).astype(np.float16)
    P[0, :3] = 0, 1, -0.0
    half, double = expected_fbeta_sets(P), expected_fbeta_sets(P.astype(np.float64))
    assert (half.sets != double.sets).nnz == 0
    np.testing.assert_array_equal(half.expected, double.expected)


def test_what_is_promised_is_kept_when_labels_are_drawn():
    rng = np.random.default_rng(5)
    P = rng.random((4000, 20)) ** 4
    Y = rng.random(P.shape) < P
    found = expected_fbeta_sets(P)
    scores = fbeta_per_image(Y, found.sets)
    assert abs(scores.mean() - found.expected.mean()) < 4 * scores.std() / np.sqrt(len(P))


def test_order_of_images_and_labels_does_not_matter():
    rng = np.random.default_rng(6)
    P = rng.random((700, 90)) ** 6  # several blocks
    rows, labels = rng.permutation(700), rng.permutation(90)
    found, turned = expected_fbeta_sets(P), expected_fbeta_sets(P[rows][:, labels])
    np.testing.assert_array_equal(found.sets.toarray()[rows][:, labels], turned.sets.toarray())
    np.testing.assert_allclose(found.expected[rows], turned.expected, rtol=0, atol=1e-14)


def test_equal_probabilities_go_to_the_left():
    P = np.array([[0.3, 0.9, 0.3, 0.3, 0.3], [0.0, 0.0, 0.0, 0.0, 1.0]])
    found = expected_fbeta_sets(P, max_labels=3, min_labels=3)
    assert found.sets.toarray().astype(int).tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 1]]


def test_read_only_and_no_rows_or_labels():
    P = np.random.default_rng(7).random((5, 4))
    P.flags.writeable = False
    kept = P.copy()
    expected_fbeta_sets(np.asfortranarray(P))
    np.testing.assert_array_equal(P, kept)
    assert expected_fbeta_sets(P[:0]).sets.shape == (0, 4)
    empty = expected_fbeta_sets(P[:, :0])
    assert (empty.sets.shape, empty.expected.tolist()) == ((5, 0), [1] * 5)


# ------------------------------------------------------------ the estimator


def test_it_is_an_estimator():
    rule = ExpectedFBeta(beta=1, min_labels=1, max_labels=5, tail_tol=1e-6)
    parameters = {"beta": 1, "min_labels": 1, "max_labels": 5, "tail_tol": 1e-6}
    assert clone(rule).get_params() == parameters
    P = np.random.default_rng(8).random((10, 8)) ** 3
    with pytest.raises(NotFittedError):
        rule.predict(P)
    assert rule.fit(P, P > 0.5) is rule
    sets = rule.predict(P)
    assert (sets.dtype, sets.shape, rule.n_features_in_) == (bool, (10, 8), 8)
    assert rule.expected_.shape == (10,)
    assert 0 <= rule.bound_ <= 1e-6
    found = expected_fbeta_sets(P, 1, 1, 5, 1e-6)
    np.testing.assert_array_equal(sets.toarray(), found.sets.toarray())


@pytest.mark.parametrize(
    ("change", "options", "expected_message"),
    [
        ({}, {"beta": 0}, "beta is 0"),
        ({}, {"min_labels": -1}, "min_labels is -1"),
        ({}, {"min_labels": 3, "max_labels": 2}, "max_labels is 2"),
        ({}, {"tail_tol": 0}, "tail_tol is 0"),
        ({}, {"tail_tol": 1.5}, "tail_tol is 1.5"),
        ({(1, 2): np.nan}, {}, "P is nan at row 1, label 2"),
        ({(1, 2): 1.5}, {}, r"P is 1\.5 at row 1, label 2"),
        ({(0, 1): -0.5}, {}, r"P is -0\.5 at row 0, label 1"),
    ],
)
def test_wrong_arguments_are_named(change, options, expected_message):
    P = np.full((3, 4), 0.5)
    for at, value in change.items():
        P[at] = value
    with pytest.raises(ValueError, match=expected_message):
        expected_fbeta_sets(P, **options)


def test_labels_must_be_those_of_fit():
    P = np.full((3, 4), 0.5)
    rule = ExpectedFBeta().fit(P)
    with pytest.raises(ValueError, match="P has 3 labels, but ExpectedFBeta was fitted on 4"):
        rule.predict(P[:, 1:])
    with pytest.raises(ValueError, match="Y has shape"):
        rule.fit(P, np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"Y is 2\.0 at row 0, label 0"):
        rule.fit(P, np.full((3, 4), 2))
