"""Calibration, shift and decision as one rule, and its honest score."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.special import expit, logit
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from heads.calibration import PlattCalibration
from heads.chain import CalibratedDecision, least_labels
from heads.decisions import ExpectedFBeta, GlobalThreshold, PerClassThreshold
from heads.metrics import mean_fbeta
from heads.nested import cross_val_fbeta
from heads.ridge import DropoutRidge, DropoutRidgeCV
from heads.shift import PriorShift


def case(seed: int, n: int = 300, K: int = 30, sharpness: float = 1.0):
    rng = np.random.default_rng(seed)
    margin = np.random.default_rng(0).normal(-3, 1, K) + rng.normal(0, 2, (n, K))
    Y = (rng.random((n, K)) < expit(margin)).astype(float)
    return expit(sharpness * margin), Y


def test_the_parts_follow_each_other():
    P, Y = case(0, sharpness=2)
    new_P, _ = case(1, sharpness=2)
    chain = CalibratedDecision(shift=PriorShift()).fit(P, Y)
    calibration = PlattCalibration().fit(P, Y)
    calibrated = calibration.transform(P)
    shift = PriorShift().fit(calibrated, Y)
    expected = shift.transform(calibration.transform(new_P))
    np.testing.assert_array_equal(chain.predict_proba(new_P), expected)
    rule = ExpectedFBeta().fit(expected)
    assert (chain.predict(new_P) != rule.predict(expected)).nnz == 0
    np.testing.assert_array_equal(chain.expected_, rule.expected_)


def test_overconfident_probabilities_are_put_right_before_the_decision():
    P, Y = case(2, sharpness=3)
    new_P, new_Y = case(3, n=3000, sharpness=3)
    chain = CalibratedDecision().fit(P, Y)
    raw = CalibratedDecision(calibration=None).fit(P, Y)
    score = mean_fbeta(new_Y, chain.predict(new_P))
    assert score > mean_fbeta(new_Y, raw.predict(new_P)) + 0.02
    assert score == pytest.approx(chain.expected_.mean(), abs=0.02)
    assert score > mean_fbeta(new_Y, GlobalThreshold().fit(P, Y).predict(new_P)) - 0.003


@pytest.mark.parametrize("decision", [GlobalThreshold(), PerClassThreshold(cv=3), ExpectedFBeta()])
def test_every_decision_and_argument_goes_through(decision):
    P, Y = case(4)
    rng = np.random.default_rng(0)
    chain = CalibratedDecision(decision, PlattCalibration(cv=3), PriorShift("bias"))
    chain.fit(
        P,
        csr_matrix(Y),
        mask=csr_matrix(rng.random(P.shape) < 0.1),
        sample_weight=rng.random(len(P)),
        missed=rng.integers(0, 2, len(P)),
        groups=np.arange(len(P)) // 2,
    )
    assert chain.predict(P).shape == P.shape
    assert hasattr(chain, "expected_") == isinstance(decision, ExpectedFBeta)


def test_parameters_are_left_alone():
    decision, calibration, shift = GlobalThreshold(), PlattCalibration(), PriorShift("bias")
    chain = CalibratedDecision(decision, calibration, shift)
    P, Y = case(5)
    chain.fit(P, Y)
    for part in (decision, calibration, shift):
        assert not [name for name in vars(part) if name.endswith("_")]
    assert clone(chain).get_params()["shift__form"] == "bias"
    with pytest.raises(NotFittedError):
        clone(chain).predict(P)


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        (CalibratedDecision(calibration="isotonic"), "calibration is 'isotonic'"),
        (CalibratedDecision(GlobalThreshold(beta=1)), "decision has beta 1"),
        (CalibratedDecision("global"), "decision is 'global'; expected a rule"),
        (CalibratedDecision(GlobalThreshold), "decision is .*; expected a rule"),
        (CalibratedDecision(beta=np.nan), "beta is nan"),
    ],
)
def test_wrong_parts_are_named(chain, expected):
    with pytest.raises(ValueError, match=expected):
        chain.fit(*case(6))


# ------------------------------------------------------- what every rule must stand

RULES = [GlobalThreshold(), PerClassThreshold(cv=3), ExpectedFBeta(), CalibratedDecision()]
Every = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)


@Every
def test_rows_without_labels_and_labels_without_positives(rule):
    P, Y = case(20, n=60)
    P[::3], Y[::3] = 0, 0
    P[:, 1], Y[:, 1] = 0, 0
    sets = clone(rule).fit(P, Y).predict(P).toarray()
    assert not sets[::3].any()
    assert not sets[:, 1].any()
    assert sets.any()


@Every
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_constant_scores_give_all_images_the_same(rule, value):
    P, Y = case(21, n=60)
    P[:] = value
    sets = clone(rule).fit(P, Y).predict(P).toarray()
    assert (sets == sets[0]).all()


@Every
def test_one_label(rule):
    P, Y = case(22, n=60)
    common = [int(Y.sum(axis=0).argmax())]
    sets = clone(rule).fit(P[:, common], Y[:, common]).predict(P[:, common])
    assert sets.shape == (60, 1)
    assert 0 < sets.nnz < 60


@Every
def test_scores_and_truth_that_are_none_are_named(rule):
    P, Y = case(23, n=60)
    fitted, bad, wrong = clone(rule).fit(P, Y), P.copy(), Y.astype(float)
    bad[3, 2], wrong[4, 1] = np.nan, 0.5
    for call in (lambda: clone(rule).fit(bad, Y), lambda: fitted.predict(bad)):
        with pytest.raises(ValueError, match="P is nan at row 3, label 2"):
            call()
    with pytest.raises(ValueError, match=r"Y is 0\.5 at row 4, label 1"):
        clone(rule).fit(P, wrong)


@Every
def test_label_sets_of_permuted_images_are_the_permuted_ones(rule):
    P, Y = case(24, n=60)
    order = np.random.default_rng(0).permutation(60)
    fitted = clone(rule).fit(P, Y)
    assert (fitted.predict(P)[order] != fitted.predict(P[order])).nnz == 0


# -------------------------------------------------------------- honest scores


def test_an_image_is_scored_by_a_rule_that_has_not_seen_it():
    """A threshold from the labels of the test rows would be right everywhere."""
    P, Y = case(7, n=100)
    found = cross_val_fbeta(GlobalThreshold(), P, Y, cv=4)
    folds = [np.arange(100) % 4 == f for f in range(4)]
    found = cross_val_fbeta(GlobalThreshold(), P, Y, cv=[(~test, test) for test in folds])
    for test in folds:
        rule = GlobalThreshold().fit(P[~test], Y[~test])
        assert (found.sets[test] != rule.predict(P[test])).nnz == 0
    assert found.score == pytest.approx(mean_fbeta(Y, found.sets))
    assert found.low < found.score < found.high
    assert found.folds.shape == (4,)
    assert found.folds.mean() == pytest.approx(found.score)


def test_the_estimate_is_that_of_new_images_where_the_fitted_score_is_not():
    P, Y = case(8, n=150)
    noise = np.random.default_rng(0).random(P.shape) ** 3
    new_P, new_Y = case(9, n=3000)
    new_noise = np.random.default_rng(1).random(new_P.shape) ** 3
    rule = PerClassThreshold(strengths=(0,), cv=3)
    fitted = clone(rule).fit(noise, Y)
    truth = mean_fbeta(new_Y, fitted.predict(new_noise))
    found = cross_val_fbeta(rule, noise, Y)
    assert found.score == pytest.approx(truth, abs=0.03)
    honest = cross_val_fbeta(CalibratedDecision(), P, Y)
    chain = CalibratedDecision().fit(P, Y)
    assert honest.score == pytest.approx(mean_fbeta(new_Y, chain.predict(new_P)), abs=0.03)


def test_groups_are_whole_in_folds_and_in_the_interval():
    P, Y = case(10, n=40)
    P, Y = np.repeat(P, 6, axis=0), np.repeat(Y, 6, axis=0)
    groups = np.repeat(np.arange(40), 6)
    grouped = cross_val_fbeta(GlobalThreshold(), P, Y, groups=groups)
    alone = cross_val_fbeta(GlobalThreshold(), P, Y)
    # Six copies of an image tell no more than one.
    assert grouped.high - grouped.low > 1.8 * (alone.high - alone.low)
    with pytest.raises(ValueError, match="in both train and test"):
        cross_val_fbeta(
            GlobalThreshold(), P, Y, groups=groups, cv=[(np.arange(239), np.array([239]))]
        )


def test_unknown_missed_and_weighted():
    P, Y = case(11, n=80)
    rng = np.random.default_rng(0)
    mask, weight = rng.random(P.shape) < 0.2, rng.integers(1, 4, 80)
    missed = rng.integers(0, 3, 80)
    options = {"sample_weight": weight, "missed": missed, "cv": 4}
    found = cross_val_fbeta(GlobalThreshold(), P, Y, mask=mask, **options)
    assert found.score == pytest.approx(
        mean_fbeta(Y, found.sets, mask=mask, missed=missed, sample_weight=weight)
    )
    missing = cross_val_fbeta(GlobalThreshold(), P, np.where(mask, np.nan, Y), **options)
    assert missing.score == found.score
    without = cross_val_fbeta(GlobalThreshold(), P, Y, mask=mask, sample_weight=weight, cv=4)
    assert found.score < without.score


def test_beta_is_that_of_the_rule():
    P, Y = case(12, n=60)
    found = cross_val_fbeta(GlobalThreshold(beta=0.5), P, Y)
    assert found.score == pytest.approx(mean_fbeta(Y, found.sets, beta=0.5))


def test_with_a_head_everything_is_fitted_in_each_fold():
    rng = np.random.default_rng(13)
    X = rng.normal(size=(90, 2, 5)).astype(np.float32)
    Y = (X.mean(1) @ rng.normal(size=(5, 4)) + rng.normal(size=(90, 4)) > 0.6).astype(float)
    head = DropoutRidgeCV([0.2], cv=3)
    parameters = {"coef_init": np.zeros((4, 5)), "intercept_init": np.zeros(4)}
    folds = [(np.arange(30, 90), np.arange(30)), (np.arange(60), np.arange(60, 90))]
    folds.append((np.r_[0:30, 60:90], np.arange(30, 60)))
    found = cross_val_fbeta(CalibratedDecision(), X, Y, head=head, head_params=parameters, cv=folds)
    for train, test in folds:
        fitted = clone(head).fit(X[train], Y[train], **parameters)
        chain = CalibratedDecision().fit(fitted.oof_predict_proba_, Y[train])
        sets = chain.predict(fitted.predict_proba(X[test]))
        assert (found.sets[test] != sets).nnz == 0
    assert found.score > 0.5


def test_a_constant_added_to_all_logits_changes_nothing():
    P, Y = case(14)
    moved = expit(logit(P) + 1)
    first, second = CalibratedDecision().fit(P, Y), CalibratedDecision().fit(moved, Y)
    np.testing.assert_allclose(first.predict_proba(P), second.predict_proba(moved), atol=1e-5)
    a, b = (GlobalThreshold().fit(p, Y).predict(p) for p in (P, moved))
    assert (a != b).nnz == 0


def test_what_a_head_must_be():
    P, Y = case(16, n=30)
    assert cross_val_fbeta(GlobalThreshold(), P.tolist(), Y, head=DropoutRidgeCV()).score > 0
    with pytest.raises(ValueError, match="head is DropoutRidge, which gives no out-of-fold scores"):
        cross_val_fbeta(GlobalThreshold(), P, Y, head=DropoutRidge())
    with pytest.raises(ValueError, match="head_params has no effect without head"):
        cross_val_fbeta(GlobalThreshold(), P, Y, head_params={"coef_init": P})


def test_lengths_must_agree():
    P, Y = case(15)
    with pytest.raises(ValueError, match="Y has shape"):
        cross_val_fbeta(GlobalThreshold(), P[1:], Y)
    with pytest.raises(ValueError, match="P has 299 rows, but Y has 300"):
        cross_val_fbeta(GlobalThreshold(), P[1:], Y, head=DropoutRidgeCV())


def test_an_image_gets_a_label_if_all_known_ones_have_one() -> None:
    Y, none = csr_matrix(np.eye(3)), np.zeros(3, int)
    assert least_labels(None, "expected", Y, none) == 1
    assert least_labels(None, "global", Y, none) == 0
    assert least_labels(0, "expected", Y, none) == 0
    assert least_labels(2, "expected", Y, none) == 2
    Y = csr_matrix(np.diag([1, 0, 1]))
    assert least_labels(None, "expected", Y, none) == 0
    assert least_labels(None, "expected", Y, np.array([0, 1, 0])) == 1  # outside the classes
