"""From scores to label sets in one step: calibration, then a shift, then a decision."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted

from heads.calibration import PlattCalibration
from heads.cuts import Limits
from heads.decisions import Decision, ExpectedFBeta, GlobalThreshold, PerClassThreshold
from heads.inputs import LabelledRows, check_beta

NAMED = ("expected", "global", "per-class")  # the recommended one first


class CalibratedDecision(Decision):
    """Calibration -> shift -> decision, fitted one after the other on the same out-of-fold scores.

    As it is, the recommended chain: ``CalibratedDecision().fit(P, Y).predict(P_new)`` gives the
    label sets of the highest expected F-beta under Platt-scaled probabilities.

    Parameters
    ----------
    decision : Decision, optional
        None: ``ExpectedFBeta(beta)``.
    calibration : "platt", an estimator with fit and transform, or None
        "platt": :class:`heads.PlattCalibration`; None: probabilities are taken as they are.
    shift : PriorShift, optional
        Only of use where the calibration is none, or of another domain: a calibration on
        the same rows has the right frequencies already.
    beta : float
        Recall counts beta times as much as precision.

    Attributes
    ----------
    calibration_, shift_, decision_ : fitted parts; None where there is none
    expected_ : (n,) array
        After `predict`, if the decision gives it: expected F-beta of each image.
    n_features_in_ : int
        Number of labels K.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> Y = rng.random((300, 5)) < 0.3
    >>> P = np.clip(0.1 * Y + rng.normal(0.05, 0.03, (300, 5)), 0, 1)  # far too low, but telling
    >>> rule = CalibratedDecision(beta=2).fit(P, Y)
    >>> float(P[Y].mean().round(2)), float(rule.predict_proba(P)[Y].mean().round(2))
    (0.15, 0.88)
    >>> rule.predict(P).shape
    (300, 5)
    """

    calibration_: Any
    shift_: Any
    decision_: Any

    def __init__(
        self,
        decision: Any = None,
        calibration: Any = "platt",
        shift: Any = None,
        beta: float = 2,
    ) -> None:
        self.decision = decision
        self.calibration = calibration
        self.shift = shift
        self.beta = beta

    def _fit(self, rows: LabelledRows, groups: np.ndarray | None) -> None:
        if not (self.decision is None or isinstance(self.decision, Decision)):
            raise ValueError(
                f"decision is {self.decision!r}; expected a rule such as GlobalThreshold()"
            )
        decision = ExpectedFBeta(self.beta) if self.decision is None else clone(self.decision)
        if decision.beta != self.beta:
            raise ValueError(
                f"decision has beta {decision.beta}, but the chain has beta {self.beta}; give both "
                "the same"
            )
        P, Y = rows.P, rows.truth
        known = {"mask": rows.unknown, "sample_weight": rows.weight}
        self.calibration_ = self.shift_ = None
        if isinstance(self.calibration, str):
            if self.calibration != "platt":
                raise ValueError(
                    f"calibration is {self.calibration!r}; expected 'platt', an estimator or None"
                )
            self.calibration_ = PlattCalibration()
        elif self.calibration is not None:
            self.calibration_ = clone(self.calibration)
        if self.calibration_ is not None:
            P = self.calibration_.fit(P, Y, **known, groups=groups).transform(P)
        if self.shift is not None:
            self.shift_ = clone(self.shift)
            P = self.shift_.fit(P, Y, **known).transform(P)
        self.decision_ = decision.fit(P, Y, **known, missed=rows.missed, groups=groups)

    def predict_proba(self, P: np.ndarray) -> np.ndarray:
        """Calibrated and shifted probabilities (n, K)."""
        check_is_fitted(self, "decision_")
        for part in (self.calibration_, self.shift_):
            P = P if part is None else part.transform(P)
        return P

    def predict(self, P: np.ndarray) -> csr_matrix:
        """Label sets of probabilities P (n, K); bool CSR of the same shape."""
        P = self.predict_proba(P)
        sets: csr_matrix = self.decision_.predict(P)
        if hasattr(self.decision_, "expected_"):
            self.expected_ = self.decision_.expected_
        return sets


def named_decision(
    name: str = "expected",
    beta: float = 2,
    min_labels: int = 0,
    max_labels: int | None = None,
    cv: int = 5,
    random_state: int = 0,
) -> Decision:
    """A rule by its name, to be fitted on out-of-fold probabilities.

    Parameters
    ----------
    name : "expected", "global" or "per-class"
        expected: :class:`CalibratedDecision` as it is; global: :class:`heads.GlobalThreshold`;
        per-class: :class:`heads.PerClassThreshold`.
    beta, min_labels, max_labels
        Of the rule.
    cv, random_state : int
        Folds by which strengths of shrinkage are chosen.

    Raises
    ------
    ValueError
        If a value is out of range.
    """
    check_beta(beta)
    Limits(min_labels, max_labels)
    if name == "expected":
        return CalibratedDecision(
            ExpectedFBeta(beta, min_labels, max_labels),
            PlattCalibration(cv=cv, random_state=random_state),
            beta=beta,
        )
    if name == "global":
        return GlobalThreshold(beta, min_labels, max_labels)
    if name == "per-class":
        return PerClassThreshold(beta, min_labels, max_labels, cv=cv, random_state=random_state)
    raise ValueError(f"decision is {name!r}; expected {', '.join(NAMED[:-1])} or {NAMED[-1]}")


def least_labels(asked: int | None, name: str, truth: csr_matrix, missed: np.ndarray) -> int:
    """What is asked for or, by expected F-beta, 1 if none of the images is without a label.

    Labels count as independent: of an image whose probabilities add up to 1 the rule believes
    that it has none with probability 1/e, and leaves its set empty too often.
    """
    if asked is not None:
        return asked
    return int(name == "expected" and never_empty(np.diff(truth.indptr) + missed))


def never_empty(labels: np.ndarray) -> bool:
    """Whether each of some images has a label, from how many it has."""
    return len(labels) > 0 and bool(labels.min() > 0)


def refuse_many(min_labels: int | None, n_labels: int, file: object) -> None:
    """No image can get more labels than there are classes in the file.

    Raises
    ------
    ValueError
        Naming the option.
    """
    if min_labels is not None and min_labels > n_labels:
        raise ValueError(
            f"--min-labels {min_labels}: {file} has only {n_labels:,} classes; give at most that"
        )


def described(rule: Decision) -> str:
    """A fitted rule in a line."""
    inner: Any = getattr(rule, "decision_", rule)
    if isinstance(inner, ExpectedFBeta):
        text = f"the highest expected F{inner.beta:g}"
    elif isinstance(inner, PerClassThreshold):
        low, high = inner.thresholds_.min(), inner.thresholds_.max()
        text = f"a cut for each class, {low:.4f} to {high:.4f} around {inner.threshold_:.4f}"
    elif isinstance(inner, GlobalThreshold):
        text = f"the cut {inner.threshold_:.4f}"
    else:
        text = type(inner).__name__
    calibration = getattr(rule, "calibration_", None)
    if isinstance(calibration, PlattCalibration):
        text += f" after Platt scaling (strength {calibration.strength_:g})"
    elif calibration is not None:
        text += f" after {type(calibration).__name__}"
    if getattr(rule, "shift_", None) is not None:
        text += " and a shift of label rates"
    least, most = getattr(inner, "min_labels", 0), getattr(inner, "max_labels", None)
    if least:
        text += f", {least} or more labels an image"
    if most is not None:
        text += f", {most} or fewer labels an image"
    return text
