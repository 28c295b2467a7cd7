"""A threshold for each class: no single one can be better, and none is without reason."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.special import expit
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from heads.ascent import Scored, class_thresholds, shrunk
from heads.decisions import GlobalThreshold, PerClassThreshold
from heads.inputs import check_rows
from heads.metrics import mean_fbeta
from heads.shrinkage import cautious

SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=120)


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10**9)))
    n, K = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    levels = draw(st.sampled_from([1, 3, 1000]))
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    P = (rng.integers(levels, size=(n, K)) / levels).astype(dtype)
    Y = (rng.random((n, K)) < draw(st.sampled_from([0, 0.3, 0.8]))).astype(float)
    options = {
        "mask": draw(st.sampled_from([None, rng.random((n, K)) < 0.3])),
        "sample_weight": draw(st.sampled_from([None, rng.integers(1, 4, size=n)])),
        "missed": draw(st.sampled_from([None, rng.integers(0, 3, size=n)])),
    }
    return P, Y, draw(st.sampled_from([0.5, 1, 2])), options


def scored(P, Y, beta, **options) -> Scored:
    return Scored.of(check_rows(P, Y, **options), beta)


@SETTINGS
@given(case=cases(), sparse=st.booleans())
def test_no_threshold_of_a_single_class_is_better(case, sparse):
    P, Y, beta, options = case
    given_options = dict(options)
    if sparse and options["mask"] is not None:
        given_options["mask"] = csr_matrix(options["mask"])
    data = scored(P, csr_matrix(Y) if sparse else Y, beta, **given_options)
    start = data.global_threshold()
    thresholds = class_thresholds(data, start)
    scores = P.astype(np.float64)

    def mean(t: np.ndarray) -> float:
        return mean_fbeta(Y, scores >= t, beta, **options)

    reached = mean(thresholds)
    assert reached >= mean(np.full(P.shape[1], start)) - 1e-12
    for k in range(P.shape[1]):
        known_positive = Y[:, k] > 0
        if options["mask"] is not None:
            known_positive &= ~options["mask"][:, k]
        if not known_positive.any():
            assert thresholds[k] == start
            continue
        for cut in (np.inf, *scores[:, k]):
            other = thresholds.copy()
            other[k] = cut
            assert mean(other) <= reached + 1e-7


@SETTINGS
@given(case=cases(), seed=st.integers(0, 100))
def test_weights_are_repeated_rows_and_zero_is_no_row(case, seed):
    P, Y, beta, options = case
    times = np.random.default_rng(seed).integers(0, 3, size=len(P))
    times[0] = 1
    rows = np.repeat(np.arange(len(P)), times)
    repeated = {
        name: value[rows] for name, value in options.items() if isinstance(value, np.ndarray)
    } | {"sample_weight": None}
    first = scored(P, Y, beta, **(options | {"sample_weight": times}))
    second = scored(P[rows], Y[rows], beta, **repeated)
    np.testing.assert_array_equal(
        class_thresholds(first, 0.4) > P.astype(float), class_thresholds(second, 0.4) > P
    )


def test_a_class_whose_scores_are_lower_gets_a_lower_threshold():
    rng = np.random.default_rng(0)
    Y = rng.random((300, 4)) < 0.3
    P = np.clip(0.5 + 0.3 * (Y - 0.5) + 0.05 * rng.normal(size=Y.shape), 0, 1)
    P[:, 2] /= 10
    rule = PerClassThreshold().fit(P, Y)
    assert np.argmin(rule.thresholds_) == 2
    assert rule.thresholds_[2] < 0.1 < rule.thresholds_[[0, 1, 3]].min()
    assert rule.score_ > GlobalThreshold().fit(P, Y).score_ + 0.05
    assert rule.score_ == pytest.approx(mean_fbeta(Y, rule.predict(P)))


def biased(n: int, seed: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores and truth of 60 labels, whose scores have biases of their own."""
    fixed = np.random.default_rng(0)
    base, bias = fixed.normal(-4, 1, 60), fixed.normal(0, spread, 60)
    rng = np.random.default_rng(seed)
    margin = base + rng.normal(0, 2, (n, 60))
    return expit(margin + bias), (rng.random((n, 60)) < expit(margin)).astype(float)


@pytest.mark.parametrize("spread", [0, 0.3, 1, 2])
def test_it_does_not_lose_to_the_global_threshold_on_new_images(spread):
    new_P, new_Y = biased(4000, 1000, spread)
    gains = []
    for seed in range(3):
        P, Y = biased(300, seed, spread)
        rules = PerClassThreshold().fit(P, Y), GlobalThreshold().fit(P, Y)
        own, shared = (mean_fbeta(new_Y, rule.predict(new_P)) for rule in rules)
        gains.append(own - shared)
    assert min(gains) >= -0.003
    if spread >= 1:
        assert min(gains) > 0.02


def test_without_reason_it_is_the_global_threshold():
    P, Y = biased(300, 0, 0)
    rule, shared = PerClassThreshold().fit(P, Y), GlobalThreshold().fit(P, Y)
    assert rule.strength_ == np.inf
    np.testing.assert_array_equal(rule.thresholds_, shared.threshold_)
    assert (rule.predict(P) != shared.predict(P)).nnz == 0


def test_thresholds_lie_between_the_own_and_the_shared_one():
    own, positives = np.array([0.1, 0.9, 0.5, 0.3]), np.array([1, 9, 100, 0])
    np.testing.assert_allclose(shrunk(own, 0.5, positives, 1), [0.3, 0.86, 0.5, 0.5])
    np.testing.assert_array_equal(shrunk(own, 0.5, positives, np.inf), 0.5)
    np.testing.assert_array_equal(shrunk(own, 0.5, positives, 0), [0.1, 0.9, 0.5, 0.5])


def test_caution_prefers_the_first_row_unless_another_is_clearly_better():
    rng = np.random.default_rng(1)
    noise = rng.normal(size=100)
    same = np.array([noise, noise + 0.1 * rng.normal(size=100)])
    assert cautious(same, np.ones(100)) == 0
    assert cautious(np.array([noise, noise + 0.1]), np.ones(100)) == 1
    chance = np.zeros(100)
    chance[:2] = 3, -2
    assert cautious(np.array([noise, noise + chance]), np.ones(100)) == 0
    even = np.tile([-1.0, 1.0], 50)  # of standard error 0.1
    slight = np.array([noise, noise + 0.15 + even])
    assert [cautious(slight, np.ones(100), errors) for errors in (1, 2)] == [1, 0]


def test_a_constant_added_to_all_scores_moves_the_thresholds_alone():
    P, Y = biased(200, 3, 1)
    P = np.round(P, 4)
    first, second = PerClassThreshold().fit(P, Y), PerClassThreshold().fit(P + 8, Y)
    np.testing.assert_allclose(first.thresholds_ + 8, second.thresholds_, rtol=0, atol=1e-12)
    assert (first.predict(P) != second.predict(P + 8)).nnz == 0


def test_groups_stay_whole_in_the_folds():
    P, Y = biased(40, 4, 1)
    groups = np.arange(40) // 10
    with pytest.raises(ValueError, match="n_splits is 5, but there are only 4 groups"):
        PerClassThreshold().fit(P, Y, groups=groups)
    PerClassThreshold(cv=4).fit(P, Y, groups=groups)


def test_limits_hold():
    P, Y = biased(200, 5, 1)
    for least, most in [(1, None), (0, 2), (2, 4), (3, 3)]:
        rule = PerClassThreshold(min_labels=least, max_labels=most, cv=3).fit(P, Y)
        sizes = np.diff(rule.predict(P).indptr)
        assert sizes.min() >= least
        assert most is None or sizes.max() <= most


def test_degenerate_truth():
    P = np.random.default_rng(6).random((12, 3))
    rule = PerClassThreshold(cv=3).fit(P, np.zeros((12, 3)))
    assert rule.predict(P).nnz == 0
    assert PerClassThreshold(cv=3).fit(P, np.ones((12, 3))).predict(P).nnz == 36
    constant = PerClassThreshold(cv=3).fit(np.full((12, 3), 0.5), P > 0.5)
    assert constant.predict(P[:, :3] * 0 + 0.5).nnz in (0, 36)


def test_no_labels_and_few_rows():
    rule = PerClassThreshold(cv=2).fit(np.zeros((3, 0)), np.zeros((3, 0)))
    assert rule.predict(np.zeros((5, 0))).shape == (5, 0)
    P = np.array([[0.2, 0.9], [0.4, 0.1]])
    assert PerClassThreshold(cv=2).fit(P, P > 0.3).predict(P[:1]).shape == (1, 2)


def test_it_is_an_estimator():
    rule = PerClassThreshold(beta=1, strengths=(0, 5))
    assert clone(rule).get_params()["strengths"] == (0, 5)
    P, Y = biased(100, 7, 1)
    with pytest.raises(NotFittedError):
        rule.predict(P)
    assert rule.fit(P, Y) is rule
    assert rule.cv_scores_["strength"].tolist() == [np.inf, 5, 0]
    assert rule.thresholds_.shape == (60,)


def test_wrong_arguments_are_named():
    P, Y = biased(20, 8, 1)
    with pytest.raises(ValueError, match="strengths has -1"):
        PerClassThreshold(strengths=(-1,)).fit(P, Y)
    with pytest.raises(ValueError, match="beta is 0"):
        PerClassThreshold(beta=0).fit(P, Y)
    P[3, 4] = np.nan
    with pytest.raises(ValueError, match="P is nan at row 3, label 4"):
        PerClassThreshold().fit(P, Y)


def test_strengths_that_can_be_read_only_once_are_refused():
    P = np.random.default_rng(0).random((12, 3))
    rule = PerClassThreshold(strengths=map(float, (1, 10)))
    for _ in range(2):
        with pytest.raises(ValueError, match="strengths is a map, read only once; give a list"):
            rule.fit(P, P > 0.5)


def test_folds_that_train_on_no_image_with_weight_are_left_out():
    rng = np.random.default_rng(0)
    P = rng.random((40, 5))
    Y, weight = rng.random((40, 5)) < P, np.repeat([1.0, 0, 0], [12, 8, 20])
    own, none = np.arange(20), np.arange(20, 40)
    # The last fold has no weight to train on; the images that it tests count for nothing.
    folds = [(own[6:], own[:6]), (own[:6], own[6:12]), (none, own[12:]), (own, none)]
    rule = PerClassThreshold(cv=folds).fit(P, Y, sample_weight=weight)
    fewer = PerClassThreshold(cv=[(own[6:12], own[:6]), (own[:6], own[6:12])])
    fewer.fit(P[:12], Y[:12])
    np.testing.assert_array_equal(rule.thresholds_, fewer.thresholds_)
    np.testing.assert_allclose(rule.cv_scores_["score"], fewer.cv_scores_["score"], rtol=1e-12)
    every = [(none, own), (own, none)]
    with pytest.raises(ValueError, match="no fold trains and tests on images with weight; give"):
        PerClassThreshold(cv=every).fit(P, Y, sample_weight=weight)
