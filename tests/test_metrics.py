"""Scores: agreement with scikit-learn, unknown and missed labels, intervals, faults."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array, csr_matrix, issparse
from sklearn import metrics as sk

from heads.metrics import (
    average_precision,
    bootstrap_interval,
    fbeta_per_image,
    log_loss,
    macro_fbeta,
    mean_fbeta,
    micro_fbeta,
    paired_bootstrap_interval,
)

SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=40)
KINDS = {
    "dense": np.asarray,
    "bool": lambda A: np.asarray(A).astype(bool),
    "csr": csr_matrix,
    "csr bool": lambda A: csr_matrix(A, dtype=bool),
    "coo": lambda A: csr_matrix(A).tocoo(),
    "csr array": csr_array,
}


def case(seed: int, n: int = 30, K: int = 7, density: float = 0.3):
    rng = np.random.default_rng(seed)
    Y = (rng.random((n, K)) < density).astype(float)
    Yhat = (rng.random((n, K)) < density).astype(float)
    P = np.round(rng.random((n, K)), 1)  # many ties
    weights = rng.integers(1, 5, size=n) / 2
    mask = rng.random((n, K)) < 0.3
    return Y, Yhat, P, weights, mask


# ---------------------------------------------------------------- label sets


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.5, 1, 2])
def test_fbeta_agrees_with_scikit_learn(beta, kind):
    Y, Yhat, _, weights, _ = case(0)
    Y[3] = Yhat[3] = 0
    Y[:, 2] = Yhat[:, 2] = 0
    options = {"beta": beta, "zero_division": 1.0}
    given_as = KINDS[kind](Y), KINDS[kind](Yhat)
    for sample_weight in (None, weights):
        expected = [
            sk.fbeta_score(Y, Yhat, average=average, sample_weight=sample_weight, **options)
            for average in ("samples", "macro", "micro")
        ]
        got = [
            score(*given_as, beta=beta, sample_weight=sample_weight)
            for score in (mean_fbeta, macro_fbeta, micro_fbeta)
        ]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.5, 2])
@pytest.mark.parametrize("empty", [0.0, 1.0])
def test_each_image_agrees_with_scikit_learn(beta, empty):
    Y, Yhat, *_ = case(11, n=200, K=5)
    assert ((Y.sum(1) == 0) & (Yhat.sum(1) == 0)).any()
    expected = [
        sk.fbeta_score(y, yhat, beta=beta, zero_division=empty)
        for y, yhat in zip(Y, Yhat, strict=True)
    ]
    got = fbeta_per_image(Y, Yhat, beta, empty=empty)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
    per_class = [
        sk.fbeta_score(Y[:, k], Yhat[:, k], beta=beta, zero_division=empty) for k in range(5)
    ]
    got = macro_fbeta(Y, Yhat, beta, empty=empty)
    assert got == pytest.approx(np.mean(per_class), abs=1e-12)


def test_known_values_of_fbeta():
    Y = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    Yhat = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    # 5 TP / (4 |y| + |yhat|)
    np.testing.assert_array_equal(fbeta_per_image(Y, Yhat), [5 / 10, 1, 0, 0])
    np.testing.assert_array_equal(fbeta_per_image(Y, Yhat, empty=0.0), [5 / 10, 0, 0, 0])


def test_missed_labels_count_as_true_and_never_right():
    Y, Yhat, *_ = case(1)
    missed = np.arange(len(Y)) % 3
    wide = np.hstack([Y, np.zeros((len(Y), 2))])
    wide[missed >= 1, -2] = wide[missed >= 2, -1] = 1
    wide_hat = np.hstack([Yhat, np.zeros((len(Y), 2))])
    np.testing.assert_array_equal(
        fbeta_per_image(Y, Yhat, missed=missed), fbeta_per_image(wide, wide_hat)
    )
    assert micro_fbeta(Y, Yhat, missed=missed) == pytest.approx(micro_fbeta(wide, wide_hat))
    nothing = np.zeros((1, 2))
    assert fbeta_per_image(nothing, nothing, missed=np.array([1])) == 0


@pytest.mark.parametrize("kind", ["dense", "csr"])
@pytest.mark.parametrize("mask_kind", ["dense", "csr"])
@pytest.mark.parametrize("score", [fbeta_per_image, macro_fbeta, micro_fbeta])
def test_unknown_labels_count_neither_as_truth_nor_as_prediction(score, kind, mask_kind):
    Y, Yhat, _, _, mask = case(2)
    got = score(KINDS[kind](Y), KINDS[kind](Yhat), mask=KINDS[mask_kind](mask))
    np.testing.assert_array_equal(got, score(Y * ~mask, Yhat * ~mask))
    missing = np.where(mask, np.nan, Y)
    np.testing.assert_array_equal(got, score(missing, Yhat))


def test_mask_and_nan_add_up():
    Y, Yhat, _, _, mask = case(3)
    missing = Y.copy()
    missing[::2, 0] = np.nan
    both = mask | np.isnan(missing)
    for given_mask in (mask, csr_matrix(mask)):
        np.testing.assert_array_equal(
            fbeta_per_image(missing, Yhat, mask=given_mask), fbeta_per_image(Y, Yhat, mask=both)
        )
        for values in (missing, missing.astype(np.float32)):
            masked = np.ma.masked_array(values, mask[::-1])
            np.testing.assert_array_equal(
                fbeta_per_image(masked, Yhat, mask=given_mask),
                fbeta_per_image(Y, Yhat, mask=both | mask[::-1]),
            )
    masked = np.ma.masked_array(np.where(mask, 7, Y).astype(int), mask)
    np.testing.assert_array_equal(
        fbeta_per_image(masked, Yhat), fbeta_per_image(Y, Yhat, mask=mask)
    )


@SETTINGS
@given(seed=st.integers(0, 10**6), beta=st.sampled_from([0.5, 1, 2]))
def test_weights_are_repeated_rows(seed, beta):
    Y, Yhat, P, _, mask = case(seed, n=8, K=4)
    times = np.random.default_rng(seed).integers(0, 3, size=8)
    times[0] = 1
    rows = np.repeat(np.arange(8), times)
    for score in (mean_fbeta, macro_fbeta, micro_fbeta):
        weighted = score(Y, Yhat, beta=beta, mask=mask, sample_weight=times)
        assert weighted == pytest.approx(score(Y[rows], Yhat[rows], beta=beta, mask=mask[rows]))
    for average in ("macro", "micro"):
        weighted = average_precision(Y, P, average, mask=mask, sample_weight=times)
        repeated = average_precision(Y[rows], P[rows], average, mask=mask[rows])
        assert weighted == pytest.approx(repeated, nan_ok=True)
    weighted = log_loss(Y, P, mask=mask, sample_weight=times)
    assert weighted == pytest.approx(log_loss(Y[rows], P[rows], mask=mask[rows]))


def test_inputs_are_left_alone():
    Y, Yhat, P, _, mask = case(4)
    stored = csr_matrix(Y)
    stored.data[0] = 0  # an explicit zero
    kept = [A.copy() for A in (Y, Yhat, P, mask, stored.data)]
    mean_fbeta(stored, Yhat, mask=mask)
    average_precision(Y, P, mask=mask)
    log_loss(stored, P, mask=csr_matrix(mask))
    for before, after in zip(kept, (Y, Yhat, P, mask, stored.data), strict=True):
        np.testing.assert_array_equal(before, after)


def test_sparse_label_sets_are_never_made_dense():
    """A dense array of this shape would take 8 TB."""
    n, K = 1_000_000, 1_000_000
    rng = np.random.default_rng(0)
    Y = csr_matrix((np.ones(100), (rng.integers(n, size=100), np.arange(100))), shape=(n, K))
    mask = csr_matrix((np.ones(50, bool), (Y.nonzero()[0][:50], Y.nonzero()[1][:50])), shape=(n, K))
    assert mean_fbeta(Y, Y, mask=mask) == 1
    assert micro_fbeta(Y, csr_matrix((n, K)), mask=mask) == 0
    assert micro_fbeta(Y, csr_matrix((n, K)), mask=Y) == 1


# -------------------------------------------------------------------- scores


@pytest.mark.parametrize("kind", ["dense", "bool", "csr", "coo"])
def test_average_precision_agrees_with_scikit_learn(kind):
    Y, _, P, weights, _ = case(5, n=60)
    for scores in (P, P - 0.5, np.random.default_rng(0).random(P.shape).astype(np.float32)):
        for sample_weight in (None, weights):
            for average in ("macro", "micro", None):
                np.testing.assert_allclose(
                    average_precision(KINDS[kind](Y), scores, average, sample_weight=sample_weight),
                    sk.average_precision_score(
                        Y, scores, average=average, sample_weight=sample_weight
                    ),
                    rtol=0,
                    atol=1e-12,
                )


@pytest.mark.parametrize("mask_kind", ["dense", "csr"])
def test_average_precision_leaves_unknown_entries_out(mask_kind):
    Y, _, P, _, mask = case(6)
    got = average_precision(Y, P, None, mask=KINDS[mask_kind](mask))
    for label in range(Y.shape[1]):
        rows = ~mask[:, label]
        expected = sk.average_precision_score(Y[rows, label], P[rows, label])
        assert got[label] == pytest.approx(expected, abs=1e-12)
    micro = average_precision(Y, P, "micro", mask=KINDS[mask_kind](mask))
    assert micro == pytest.approx(sk.average_precision_score(Y[~mask], P[~mask]), abs=1e-12)


def test_a_class_without_positives_has_no_average_precision():
    Y, _, P, _, _ = case(7)
    Y[:, 1] = 0
    values = average_precision(Y, P, None)
    assert np.isnan(values).tolist() == [False, True] + [False] * 5
    assert average_precision(Y, P) == pytest.approx(np.nanmean(values))
    assert np.isnan(average_precision(np.zeros_like(Y), P))
    assert np.isnan(average_precision(np.zeros_like(Y), P, "micro"))


def test_a_perfect_ranking_and_constant_scores():
    Y = case(8)[0]
    assert average_precision(Y, Y) == 1
    np.testing.assert_allclose(average_precision(Y, np.ones_like(Y), None), Y.mean(axis=0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log_loss_agrees_with_scikit_learn(dtype):
    Y, _, P, weights, mask = case(9)
    P = P.astype(dtype)  # with zeros and ones, which are clipped
    assert P.min() == 0
    every = np.repeat(weights[:, None], Y.shape[1], axis=1)
    # scikit-learn clips by the type's rounding too, but then goes on in single precision.
    eps = np.finfo(dtype).eps
    exact = np.clip(P.astype(np.float64), eps, 1 - eps)
    for mask_as in (np.asarray, csr_matrix):
        for Y_as in (np.asarray, csr_matrix):
            got = log_loss(Y_as(Y), P, mask=mask_as(mask), sample_weight=weights)
            expected = sk.log_loss(Y[~mask], exact[~mask], sample_weight=every[~mask])
            assert got == pytest.approx(expected, abs=1e-12)
    assert log_loss(Y, P) == pytest.approx(sk.log_loss(Y.ravel(), exact.ravel()), abs=1e-12)


def test_log_loss_of_soft_targets_is_the_mixture():
    rng = np.random.default_rng(0)
    Y, P = rng.random((20, 3)), rng.uniform(0.05, 0.95, (20, 3))
    expected = -np.mean(Y * np.log(P) + (1 - Y) * np.log(1 - P))
    assert log_loss(Y, P) == pytest.approx(expected, abs=1e-12)
    assert log_loss(csr_matrix(Y), P) == pytest.approx(expected, abs=1e-12)


def test_log_loss_over_several_blocks(monkeypatch):
    Y, _, P, weights, mask = case(10)
    whole = log_loss(Y, P, mask, weights)
    monkeypatch.setattr("heads.metrics._BLOCK", 20)
    assert log_loss(Y, P, mask, weights) == pytest.approx(whole, abs=1e-14)


def test_half_precision_scores_are_not_clipped_coarsely():
    P = np.array([[1e-4]], dtype=np.float16)
    assert log_loss(np.ones((1, 1)), P) == pytest.approx(-np.log(float(P[0, 0])))


# ----------------------------------------------------------------- intervals


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval(
            rng.exponential(size=100), n_resamples=200, confidence=0.9, random_state=trial
        )
        covered += low <= 1.0 <= high
    assert 0.82 <= covered / 200 <= 0.95


def test_interval_has_the_width_of_the_normal_one():
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap_interval(values, n_resamples=4000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    np.testing.assert_allclose(
        [low, high], values.mean() + half * np.array([-1, 1]), atol=0.15 * half
    )


def test_intervals_repeat_with_the_seed_and_differ_without():
    values = np.random.default_rng(2).random(50)
    assert bootstrap_interval(values) == bootstrap_interval(values, random_state=0)
    assert bootstrap_interval(values) != bootstrap_interval(values, random_state=1)
    assert bootstrap_interval(np.full(5, 0.25)) == (0.25, 0.25)


def test_rows_of_weight_zero_are_no_rows():
    values = np.array([0.1, 0.9, 5.0])
    weighted = bootstrap_interval(values, sample_weight=np.array([1, 1, 0]))
    assert weighted == bootstrap_interval(values[:2])


def test_pairing_takes_the_common_part_out():
    rng = np.random.default_rng(3)
    common = rng.normal(size=200)
    first, second = common + 0.1, common + 0.01 * rng.normal(size=200)
    low, high = paired_bootstrap_interval(first, second)
    assert 0.09 < low < 0.1 < high < 0.11
    assert paired_bootstrap_interval(first, first) == (0, 0)


# -------------------------------------------------------------------- faults


def _nan(Y):
    Y = Y.copy()
    Y[7, 3] = np.nan
    return Y


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("score", [average_precision, log_loss])
def test_scores_that_are_not_finite_are_named(score, bad):
    Y, _, P, _, _ = case(0)
    P[4, 2] = bad
    with pytest.raises(ValueError, match=f"P is {bad} at row 4, label 2"):
        score(Y, P)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda Y, P: mean_fbeta(Y, P[:, 1:] > 0), r"Yhat has shape \(30, 6\)"),
        (lambda Y, P: mean_fbeta(Y, Y, mask=P[1:] > 0), "mask has shape"),
        (lambda Y, P: mean_fbeta(Y * np.nan, Y, mask=P[1:] > 0), "mask has shape"),
        (lambda Y, P: mean_fbeta(2 * Y, Y), "Y is 2.0 at row 0, label"),
        (lambda Y, P: mean_fbeta(Y, _nan(Y)), "Yhat is nan at row 7, label 3"),
        (lambda Y, P: mean_fbeta(Y, csr_matrix(_nan(Y))), "Yhat is nan at row 7, label 3"),
        (lambda Y, P: mean_fbeta(Y, P), "Yhat is 0.[0-9]* at row 0, label .; expected True or"),
        (lambda Y, P: mean_fbeta(Y, csr_matrix(P)), "Yhat is 0.[0-9]* at row 0, label ."),
        (lambda Y, P: mean_fbeta(Y, Y, mask=2 * Y), "mask is 2.0 at row 0, label ."),
        (lambda Y, P: mean_fbeta(Y, Y, mask=_nan(Y)), "mask is nan at row 7, label 3"),
        (lambda Y, P: mean_fbeta(csr_matrix(_nan(Y)), Y), "Y is nan at row 7, label 3"),
        (lambda Y, P: mean_fbeta(Y, Y, beta=0), "beta is 0"),
        (lambda Y, P: mean_fbeta(Y, Y, missed=[1]), r"missed has shape \(1,\); expected \(30,\)"),
        (lambda Y, P: mean_fbeta(Y, Y, missed=-np.ones(30)), "missed is -1.0 at row 0"),
        (lambda Y, P: mean_fbeta(Y, Y, sample_weight=np.zeros(30)), "zero everywhere"),
        (lambda Y, P: mean_fbeta(Y, Y, sample_weight=-np.ones(30)), "sample_weight is -1.0 at row"),
        (lambda Y, P: mean_fbeta(Y, Y, sample_weight=np.ones(3)), "sample_weight has shape"),
        (lambda Y, P: mean_fbeta(Y[:0], Y[:0]), "no images"),
        (lambda Y, P: mean_fbeta(Y[0], Y), r"Y has shape \(7,\)"),
        (lambda Y, P: average_precision(Y, csr_matrix(P)), "P is sparse"),
        (lambda Y, P: average_precision(Y, P[:, 1:]), "the scores have shape"),
        (lambda Y, P: average_precision(Y, P, "weighted"), "average is 'weighted'"),
        (lambda Y, P: log_loss(Y, P + 1), "P is 1.[0-9]* at row 0, label"),
        (lambda Y, P: log_loss(Y - 0.5, P), "Y is -0.5 at row 0"),
        (lambda Y, P: log_loss(Y, P, mask=np.ones_like(Y)), "no entry of Y is known"),
        (lambda Y, P: bootstrap_interval(P), "values must be"),
        (lambda Y, P: bootstrap_interval([]), "values must be"),
        (lambda Y, P: bootstrap_interval([np.nan]), "values must be"),
        (lambda Y, P: bootstrap_interval([1.0], confidence=95), "confidence is 95"),
        (lambda Y, P: paired_bootstrap_interval([1.0, 2.0], [1.0]), "pair the same images"),
    ],
)
def test_wrong_arguments_are_named(call, expected):
    Y, _, P, _, _ = case(0)
    with pytest.raises(ValueError, match=expected):
        call(Y, P)


def test_results_are_arrays_and_floats():
    Y, Yhat, P, _, _ = case(0)
    values = fbeta_per_image(csr_matrix(Y), csr_matrix(Yhat))
    assert not issparse(values)
    assert values.shape == (30,)
    assert values.dtype == np.float64
    for value in (mean_fbeta(Y, Yhat), macro_fbeta(Y, Yhat), micro_fbeta(Y, Yhat), log_loss(Y, P)):
        assert type(value) is float
