"""Shifts of label frequencies: known posteriors are found, and other shifts are told."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.special import expit, logit
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from heads.decisions import GlobalThreshold
from heads.metrics import log_loss, mean_fbeta
from heads.shift import PriorShift, matching_bias

OLD = np.array([0.5, 0.1, 0.3, 0.05])
NEW = np.array([0.2, 0.3, 0.3, 0.02])


def domain(seed: int, rate: np.ndarray, n: int = 4000, distance: float = 2.0):
    """Scores x | y normal with means 0 and `distance`, whatever the rates; P right for OLD."""
    rng = np.random.default_rng(seed)
    Y = (rng.random((n, len(rate))) < rate).astype(float)
    x = rng.normal(size=Y.shape) + distance * Y
    return posterior(x, OLD), Y, x


def posterior(x: np.ndarray, rate: np.ndarray) -> np.ndarray:
    return expit(2.0 * x - 2.0 + logit(rate))


def test_known_rates_give_the_posterior_of_the_new_domain():
    P, Y, x = domain(0, NEW)
    shift = PriorShift(pseudo_count=0).fit(P, Y, prior=OLD)
    np.testing.assert_allclose(shift.bias_, logit(Y.mean(axis=0)) - logit(OLD))
    np.testing.assert_allclose(shift.transform(P), posterior(x, NEW), atol=0.06)
    assert not shift.diagnosis_.violated


def test_without_the_old_rates_the_expected_numbers_become_right():
    P, Y, x = domain(1, NEW)
    shift = PriorShift(pseudo_count=0).fit(P, Y)
    np.testing.assert_allclose(shift.transform(P).mean(axis=0), Y.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(shift.rate_, Y.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(shift.bias_, logit(NEW) - logit(OLD), atol=0.2)
    np.testing.assert_allclose(shift.transform(P), posterior(x, NEW), atol=0.06)


@pytest.mark.parametrize("prior", [None, OLD])
def test_shifted_probabilities_are_better_on_new_images(prior):
    P, Y, _ = domain(2, NEW, n=300)
    new_P, new_Y, _ = domain(3, NEW)
    shifted = PriorShift().fit(P, Y, prior=prior).transform(new_P)
    assert log_loss(new_Y, shifted) < 0.95 * log_loss(new_Y, new_P)
    rule = GlobalThreshold().fit(P, Y)
    moved = GlobalThreshold().fit(PriorShift().fit(P, Y, prior=prior).transform(P), Y)
    assert mean_fbeta(new_Y, moved.predict(shifted)) > mean_fbeta(new_Y, rule.predict(new_P))


def test_few_labelled_rows_are_shrunk_towards_no_shift():
    P, Y, _ = domain(4, NEW, n=100)
    counted = Y.mean(axis=0)
    half = PriorShift(pseudo_count=100).fit(P, Y, prior=OLD)
    np.testing.assert_allclose(half.bias_, logit((counted + OLD) / 2) - logit(OLD))
    none = PriorShift(pseudo_count=1e12).fit(P, Y)
    np.testing.assert_allclose(none.bias_, 0, atol=1e-6)
    np.testing.assert_allclose(none.transform(P), P, atol=1e-6)


def test_one_bias_gives_the_mean_number_of_labels():
    P, Y, _ = domain(5, NEW)
    unlabelled = PriorShift("bias", mean_labels=1.5).fit(P)
    assert unlabelled.transform(P).sum(axis=1).mean() == pytest.approx(1.5, rel=1e-8)
    assert np.ptp(unlabelled.bias_) == 0
    assert unlabelled.diagnosis_ is None
    counted = PriorShift("bias").fit(P, Y)
    assert counted.transform(P).sum() == pytest.approx(Y.sum(), rel=1e-8)
    with pytest.warns(UserWarning, match="0.5[0-9] times the expected labels"):
        wrong = PriorShift("bias", mean_labels=1.5).fit(P, Y)
    assert wrong.bias_ == pytest.approx(unlabelled.bias_)


def test_a_given_number_of_labels_counts_those_of_unknown_truth():
    P, Y, _ = domain(5, NEW)
    mask = np.random.default_rng(0).random(P.shape) < 0.9
    with pytest.warns(UserWarning, match="does not explain"):
        shift = PriorShift("bias", mean_labels=1.5).fit(P, Y, mask=mask)
    assert shift.transform(P).sum(axis=1).mean() == pytest.approx(1.5, rel=1e-8)


def test_many_logits_are_counted_in_cells():
    P = np.random.default_rng(6).random((5000, 20)) ** 4
    assert P.size > 1 << 16
    shift = PriorShift("bias", mean_labels=3).fit(P)
    assert shift.transform(P).sum(axis=1).mean() == pytest.approx(3, rel=1e-6)


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 3, 6]), share=st.floats(1e-6, 0.999))
def test_the_bias_matches_whatever_the_logits(seed, scale, share):
    rng = np.random.default_rng(seed)
    margin, a = scale * rng.normal(size=(12, 3)), rng.random((12, 3)) + 0.1
    wanted = share * a.sum(axis=0)
    bias = matching_bias(margin, a, wanted)
    np.testing.assert_allclose((a * expit(margin + bias)).sum(axis=0), wanted, rtol=1e-7)


@pytest.mark.parametrize("form", ["labels", "bias"])
def test_unknown_labels_and_weights(form):
    P, Y, _ = domain(7, NEW, n=200)
    rng = np.random.default_rng(0)
    mask, times = rng.random(P.shape) < 0.3, rng.integers(0, 3, len(P))
    rows = np.repeat(np.arange(len(P)), times)
    repeated = PriorShift(form).fit(P[rows], Y[rows], mask=mask[rows])
    for known in (mask, csr_matrix(mask)):
        weighted = PriorShift(form).fit(P, csr_matrix(Y), mask=known, sample_weight=times)
        np.testing.assert_allclose(weighted.bias_, repeated.bias_, atol=1e-9)
    missing = PriorShift(form).fit(P, np.where(mask, np.nan, Y), sample_weight=times)
    np.testing.assert_allclose(missing.bias_, repeated.bias_, atol=1e-9)
    other = np.where(mask, 1 - Y, Y)
    flipped = PriorShift(form).fit(P, other, mask=mask, sample_weight=times)
    np.testing.assert_allclose(flipped.bias_, repeated.bias_, atol=1e-9)


def test_a_label_that_is_known_nowhere_stays_as_it_is():
    P, Y, _ = domain(8, NEW, n=50)
    Y[:, 1] = np.nan
    for prior in (None, OLD):
        assert PriorShift().fit(P, Y, prior=prior).bias_[1] == 0


def test_labels_that_never_occur_do_not_vanish():
    P, Y, _ = domain(9, NEW, n=100)
    Y[:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for form in ("labels", "bias"):
            shift = PriorShift(form).fit(P, Y)
            assert np.isfinite(shift.bias_).all()
            assert shift.transform(P).max() < P.max()
        assert np.isfinite(PriorShift(pseudo_count=0).fit(P, Y).bias_).all()


# ------------------------------------------------------------------ diagnosis


def test_a_shift_of_images_is_told():
    """In the new domain labels are harder to tell, so that P is overconfident."""
    P, Y, _ = domain(10, NEW, distance=0.8)
    with pytest.warns(UserWarning, match="label shift does not explain these rows"):
        shift = PriorShift().fit(P, Y)
    assert shift.diagnosis_.violated
    assert shift.diagnosis_.slope < 0.7
    assert shift.diagnosis_.slope_z < -3


def test_wrong_old_rates_are_told():
    P, Y, _ = domain(11, OLD / 4)
    with pytest.warns(UserWarning, match="times the expected labels"):
        shift = PriorShift().fit(P, Y, prior=OLD / 4)
    assert shift.diagnosis_.ratio < 0.8
    assert shift.diagnosis_.ratio_z < -3


def test_a_true_label_shift_is_no_cause_for_alarm():
    alarms = 0
    for seed in range(20):
        P, Y, _ = domain(20 + seed, NEW, n=500)
        found = PriorShift().fit(P, Y, prior=OLD).diagnosis_
        alarms += found.violated
        assert abs(found.slope - 1) < 0.35
    assert alarms == 0


def test_a_few_rows_are_not_enough_to_raise_alarm():
    P, Y, _ = domain(12, NEW, n=8, distance=0.8)
    assert not PriorShift().fit(P, Y).diagnosis_.violated


# --------------------------------------------------------------- the estimator


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_types(dtype):
    P, Y, _ = domain(13, NEW, n=100)
    P = P.astype(dtype)
    P.flags.writeable = False
    out = PriorShift().fit(P, Y).transform(P)
    assert out.dtype == (np.float64 if dtype == np.float64 else np.float32)


def test_it_is_an_estimator():
    shift = PriorShift("bias", 10, 2.5)
    parameters = {"form": "bias", "pseudo_count": 10, "mean_labels": 2.5}
    assert clone(shift).get_params() == parameters
    with pytest.raises(NotFittedError):
        shift.transform(np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda P, Y: PriorShift("em").fit(P, Y), "form is 'em'"),
        (lambda P, Y: PriorShift().fit(P), "form 'labels' counts labels"),
        (lambda P, Y: PriorShift(mean_labels=3).fit(P, Y), "takes no mean_labels"),
        (lambda P, Y: PriorShift("bias").fit(P), "needs labels Y or mean_labels"),
        (lambda P, Y: PriorShift("bias").fit(P, Y, prior=OLD), "prior has no effect"),
        (lambda P, Y: PriorShift("bias", mean_labels=0).fit(P), "mean_labels is 0"),
        (lambda P, Y: PriorShift("bias", mean_labels=4).fit(P), "lower mean_labels"),
        (lambda P, Y: PriorShift("bias").fit(P, Y * 0 + 1), "which no bias gives"),
        (lambda P, Y: PriorShift().fit(P, Y * np.nan), "no entry of Y is known"),
        (lambda P, Y: PriorShift(pseudo_count=-1).fit(P, Y), "pseudo_count is -1"),
        (lambda P, Y: PriorShift().fit(P, Y, prior=OLD[1:]), r"prior has shape \(3,\)"),
        (lambda P, Y: PriorShift().fit(P, Y, prior=OLD * 3), r"prior is 1.5 at label 0"),
        (lambda P, Y: PriorShift().fit(P, Y, prior=OLD * [1, 0, 1, 1]), "prior is 0.0 at label 1"),
        (lambda P, Y: PriorShift().fit(P + 1, Y), r"P is 1.* at row 0, label 0"),
        (lambda P, Y: PriorShift().fit(P[:0], Y[:0]), r"P has shape \(0, 4\)"),
        (lambda P, Y: PriorShift().fit(P, Y).transform(P[:, 1:]), "P has 3 labels"),
    ],
)
def test_wrong_arguments_are_named(call, expected):
    P, Y, _ = domain(14, NEW, n=50)
    with pytest.raises(ValueError, match=expected):
        call(P, Y)
