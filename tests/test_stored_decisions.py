"""A fitted decision rule gives the same label sets after it was read from a file, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy.special import expit
from sklearn.base import clone
from sklearn.isotonic import IsotonicRegression
from sklearn.model_selection import KFold

from heads import (
    CalibratedDecision,
    ExpectedFBeta,
    GlobalThreshold,
    PerClassThreshold,
    PlattCalibration,
    PriorShift,
)
from heads.chain import NAMED, described, named_decision
from heads.stored_decisions import read_decision, write_decision

K = 9


def case(seed: int, n: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """Overconfident float32 probabilities and truth."""
    rng = np.random.default_rng(seed)
    margin = np.linspace(-4, -1, K) + rng.normal(0, 2, (n, K))
    return expit(2 * margin).astype(np.float32), (rng.random((n, K)) < expit(margin)).astype(float)


P, Y = case(0)
NEW_P, _ = case(1)

RULES = {
    **{name: named_decision(name, cv=3) for name in NAMED},
    "limits": named_decision(beta=0.5, min_labels=1, max_labels=2, cv=3),
    "limited cuts": named_decision("per-class", 1, 1, 3, cv=3),
    "one map for all": CalibratedDecision(calibration=PlattCalibration(strengths=())),
    "own maps": CalibratedDecision(calibration=PlattCalibration("temperature", [0.1], cv=3)),
    "a shift": CalibratedDecision(GlobalThreshold(1), "platt", PriorShift("bias"), beta=1),
    "known number": CalibratedDecision(
        None, "platt", PriorShift("bias", mean_labels=float(Y.sum(1).mean()))
    ),
    "cuts of classes": CalibratedDecision(PerClassThreshold(cv=3, strengths=(0.0,)), None),
    "expected alone": ExpectedFBeta(tail_tol=1e-3),
    "folds of one's own": PerClassThreshold(cv=KFold(3)),
}


def put(rule: Any, path: Path) -> Path:
    with h5py.File(path, "w") as file:
        write_decision(file, rule)
    return path


def get(path: Path, n_labels: int = K) -> Any:
    with h5py.File(path, "r") as file:
        return read_decision(file, n_labels)


@pytest.mark.parametrize("name", list(RULES))
def test_label_sets_are_the_same_after_reading(name: str, tmp_path: Path) -> None:
    rule = clone(RULES[name]).fit(P, Y)
    rule.predict(P[:5])
    found = get(put(rule, tmp_path / "rule.h5"))
    # What was read can be written.
    found = get(put(found, tmp_path / "copy.h5"))
    assert type(found) is type(rule)
    assert described(found) == described(rule)
    for scores in (NEW_P, NEW_P.astype(np.float64), NEW_P.astype(np.float16)):
        before, after = rule.predict(scores), found.predict(scores)
        np.testing.assert_array_equal(after.toarray(), before.toarray())
        if isinstance(rule, CalibratedDecision):
            np.testing.assert_array_equal(found.predict_proba(scores), rule.predict_proba(scores))
        if hasattr(rule, "expected_"):
            np.testing.assert_array_equal(found.expected_, rule.expected_)
    assert 0 < before.nnz < before.shape[0] * K


def test_a_rule_that_was_read_can_be_fitted_again(tmp_path: Path) -> None:
    rule = clone(RULES["limits"]).fit(P, Y)
    found = get(put(rule, tmp_path / "rule.h5"))
    again = clone(found).fit(P, Y)
    np.testing.assert_array_equal(again.predict(NEW_P).toarray(), rule.predict(NEW_P).toarray())
    assert again.calibration_.strength_ == rule.calibration_.strength_


def test_what_was_found_comes_back(tmp_path: Path) -> None:
    rule = CalibratedDecision(shift=PriorShift()).fit(P, Y)
    found = get(put(rule, tmp_path / "rule.h5"))
    assert found.calibration_.shared_ == rule.calibration_.shared_
    for key, values in rule.calibration_.cv_scores_.items():
        np.testing.assert_array_equal(found.calibration_.cv_scores_[key], values)
    assert found.shift_.diagnosis_ == rule.shift_.diagnosis_
    for threshold in (np.inf, -np.inf, 0.1):
        cut = GlobalThreshold().fit(P, Y)
        cut.threshold_ = threshold
        assert get(put(cut, tmp_path / "cut.h5")).threshold_ == threshold


def test_nothing_of_the_last_images_is_kept(tmp_path: Path) -> None:
    rule = clone(RULES["expected"]).fit(P, Y)
    rule.predict(NEW_P)
    found = get(put(rule, tmp_path / "rule.h5"))
    assert not hasattr(found, "expected_")
    assert not hasattr(found.decision_, "expected_")


def test_numbers_and_texts_are_all_there_is(tmp_path: Path) -> None:
    with h5py.File(put(clone(RULES["known number"]).fit(P, Y), tmp_path / "rule.h5")) as file:
        kinds: list[str] = []
        file.visititems(
            lambda _, item: kinds.append(item.dtype.kind) if hasattr(item, "dtype") else None
        )
        assert set(kinds) == {"f"}
        assert json.loads(file.attrs["params"]) == {"beta": 2, "calibration": "platt"} | {
            "decision": None
        }


# ------------------------------------------------------------------- faults


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    class Own(GlobalThreshold):
        pass

    with pytest.raises(ValueError, match="cannot store a Own in a decision; only Calibrated"):
        put(Own().fit(P, Y), tmp_path / "own.h5")
    chain = CalibratedDecision().fit(P, Y)
    chain.calibration_ = IsotonicRegression()
    with pytest.raises(ValueError, match="cannot store a IsotonicRegression in a decision"):
        put(chain, tmp_path / "chain.h5")
    with pytest.raises(ValueError, match="the CalibratedDecision is not fitted; fit it on out-of"):
        put(CalibratedDecision(), tmp_path / "new.h5")


def _attribute(where: str, name: str, value: Any) -> Callable[[h5py.File], None]:
    return lambda file: file[where].attrs.__setitem__(name, value)


def _without(name: str) -> Callable[[h5py.File], None]:
    return lambda file: file.__delitem__(name)


def _shorter(name: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        values = file[name][()]
        del file[name]
        file[name] = values[:-1]

    return change


@pytest.mark.parametrize(
    "damage",
    [
        _attribute("/", "class", "Popen"),
        _attribute("/", "class", "PlattCalibration"),
        _attribute("/", "params", '{"command": "rm"}'),
        _attribute("/", "fitted", "{}"),
        _attribute("/", "fitted", "{"),
        _attribute("/", "fitted", f'{{"n_features_in_": {K + 1}, "shift_": null}}'),
        _attribute("fitted/calibration_", "class", "Popen"),
        _attribute("fitted/calibration_", "fitted", '{"shared_": {"slope": 1}}'),
        _without("fitted/calibration_"),
        _without("fitted/decision_"),
        _without("fitted/calibration_/fitted/slope_"),
        _shorter("fitted/calibration_/fitted/intercept_"),
    ],
)
def test_a_damaged_rule_is_not_read(damage: Callable[[h5py.File], None], tmp_path: Path) -> None:
    path = put(clone(RULES["expected"]).fit(P, Y), tmp_path / "rule.h5")
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises((ValueError, KeyError, TypeError)):
        get(path)


def test_a_rule_of_other_labels_is_not_read(tmp_path: Path) -> None:
    for rule in (GlobalThreshold(), ExpectedFBeta()):
        path = put(rule.fit(P, Y), tmp_path / "rule.h5")
        with pytest.raises(ValueError, match="the decision is not one of 4 labels"):
            get(path, 4)


# ------------------------------------------------------------------- names


def test_the_named_rules_are_what_they_are_called() -> None:
    chain = named_decision(beta=1, min_labels=1, max_labels=4, cv=3, random_state=7)
    assert isinstance(chain, CalibratedDecision)
    plain = CalibratedDecision(beta=1, calibration=PlattCalibration(cv=3, random_state=7))
    fitted = chain.fit(P, Y)
    np.testing.assert_array_equal(fitted.predict_proba(NEW_P), plain.fit(P, Y).predict_proba(NEW_P))
    sizes = fitted.predict(NEW_P).sum(axis=1)
    assert sizes.min() >= 1
    assert sizes.max() <= 4
    told = described(fitted)
    assert told.startswith("the highest expected F1 after Platt scaling (strength ")
    assert told.endswith(", 1 or more labels an image, 4 or fewer labels an image")
    cut = named_decision("global").fit(P, Y)
    assert described(cut) == f"the cut {GlobalThreshold().fit(P, Y).threshold_:.4f}"
    own = named_decision("per-class", cv=3).fit(P, Y)
    assert described(own).startswith("a cut for each class, ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "best"}, "decision is 'best'; expected expected, global or per-class"),
        ({"beta": 0}, "beta is 0; expected a positive number"),
        ({"min_labels": -1}, "min_labels is -1"),
        ({"min_labels": 3, "max_labels": 2}, "max_labels is 2"),
        ({"name": "global", "max_labels": 0}, "max_labels is 0"),
    ],
)
def test_wrong_names_and_numbers_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named_decision(**arguments)
