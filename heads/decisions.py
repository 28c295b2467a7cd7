"""Which labels does an image get, given its scores?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from heads.ascent import Scored, class_thresholds, held_out_fbeta, shrunk
from heads.cuts import Limits, apply_threshold, best_cut, best_global_threshold
from heads.expected import expected_fbeta_sets
from heads.folds import check_folds
from heads.inputs import LabelledRows, Matrix, check_beta, check_labels, check_rows
from heads.metrics import weighted_mean
from heads.shrinkage import cautious, check_strengths

__all__ = [
    "Decision",
    "ExpectedFBeta",
    "GlobalThreshold",
    "PerClassThreshold",
    "best_global_threshold",
]

_ERRORS = 2.0  # standard errors by which own thresholds must be better than cautious ones
Rule = TypeVar("Rule", bound="Decision")


class Decision(BaseEstimator, ABC):
    """A rule that gives label sets to scores; fitted on *out-of-fold* scores only.

    All rules take the same arguments, so that they can be exchanged.
    """

    beta: float
    n_features_in_: int
    _probabilities = False  # whether scores must be in [0, 1]
    _learns = True  # whether it needs labels

    def fit(
        self: Rule,
        P: np.ndarray,
        Y: Matrix | None = None,
        mask: Matrix | None = None,
        sample_weight: np.ndarray | None = None,
        missed: np.ndarray | None = None,
        groups: np.ndarray | None = None,
    ) -> Rule:
        """Fit the rule.

        Parameters
        ----------
        P : (n, K) array
            Out-of-fold scores, finite; never altered.
        Y : (n, K), dense or sparse, {0, 1}
            True labels; NaN (dense) is unknown.
        mask : (n, K), optional
            True where the label is unknown, which then does not count.
        sample_weight : (n,), optional
            Counts of images: thresholds of classes rest on the sum over their positives.
        missed : (n,) counts, optional
            True labels of each image outside the K classes; they count as misses.
        groups : (n,), optional
            Images that folds must keep together, for rules that make folds.

        Raises
        ------
        ValueError
            Naming the argument, and row and label where there is one.
        """
        check_beta(self.beta)
        rows = check_rows(
            P,
            Y,
            mask,
            sample_weight,
            missed,
            probabilities=self._probabilities,
            unlabelled=not self._learns,
            learns=self._learns,
        )
        self._fit(rows, groups)
        self.n_features_in_ = rows.P.shape[1]
        return self

    @abstractmethod
    def _fit(self, rows: LabelledRows, groups: np.ndarray | None) -> None:
        """Learn from rows that were checked."""

    @abstractmethod
    def predict(self, P: np.ndarray) -> csr_matrix:
        """Label sets of scores P (n, K); bool CSR of the same shape."""

    def _check_labels(self, P: np.ndarray) -> None:
        """Refuse scores of another number of labels than those of `fit`."""
        check_is_fitted(self, "n_features_in_")
        check_labels(P, self.n_features_in_, type(self).__name__)


class GlobalThreshold(Decision):
    """One threshold for all labels and images, at the best mean F-beta.

    Parameters
    ----------
    beta : float
        Recall counts beta times as much as precision.
    min_labels : int
        Each image gets at least its `min_labels` highest labels (1: never none).
    max_labels : int, optional
        Each image gets at most its `max_labels` highest labels.

    Attributes
    ----------
    threshold_ : float
        See :func:`best_global_threshold`.
    score_ : float
        Mean F-beta of the rows it was fitted on (so an optimistic figure).
    n_features_in_ : int
        Number of labels K.

    Examples
    --------
    >>> import numpy as np
    >>> P = np.array([[0.9, 0.6, 0.1], [0.8, 0.2, 0.3], [0.4, 0.7, 0.2]])
    >>> Y = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0]])
    >>> rule = GlobalThreshold(beta=2).fit(P, Y)
    >>> float(rule.threshold_)
    0.5
    >>> rule.predict(P).toarray().astype(int)
    array([[1, 1, 0],
           [1, 0, 0],
           [0, 1, 0]])
    """

    threshold_: float
    score_: float

    def __init__(self, beta: float = 2, min_labels: int = 0, max_labels: int | None = None) -> None:
        self.beta = beta
        self.min_labels = min_labels
        self.max_labels = max_labels

    def _fit(self, rows: LabelledRows, groups: np.ndarray | None) -> None:
        limits = Limits(self.min_labels, self.max_labels)
        self.threshold_, self.score_ = best_cut(rows, self.beta, limits)

    @classmethod
    def at(cls, threshold: float, n_labels: int) -> GlobalThreshold:
        """The rule of a threshold that is known already, for that many labels."""
        rule = cls()
        rule.threshold_, rule.n_features_in_ = threshold, n_labels
        return rule

    def predict(self, P: np.ndarray) -> csr_matrix:
        """Label sets of scores P (n, K); bool CSR of the same shape."""
        self._check_labels(P)
        return apply_threshold(P, self.threshold_, self.min_labels, self.max_labels)


class PerClassThreshold(Decision):
    """A threshold for each label, shrunk towards the global one.

    Coordinate ascent on the mean F-beta per image gives t_k; label k gets the threshold
    t + n_k / (n_k + strength) (t_k - t), with t the best global one and n_k its known
    positives. A label with no positives has t. The strength is chosen by
    cross-validation, the whole fit repeated in every fold: the largest whose mean is within
    two standard errors of the best one's, the error being that of the difference over images
    (at one error, thresholds from 300 images lost up to .004 of F2 now and then). Infinite
    strength is the global threshold, so that labels get thresholds of their own only where
    that is more than chance.

    Parameters
    ----------
    beta : float
        Recall counts beta times as much as precision.
    min_labels, max_labels : int
        Least and greatest number of labels of an image (None: any), kept by the margins
        P - t_k. The ascent itself does not know of them; its strength does.
    strengths : iterable of float
        What is compared, >= 0, in positives; infinity is always added.
    cv : int, splitter or iterable of (train, test)
    random_state : int
        Seed of the folds.

    Attributes
    ----------
    thresholds_ : (K,) array
    threshold_ : float
        The global one.
    strength_ : float
    cv_scores_ : dict of arrays
        "strength", descending, and the "score" of each: held-out mean F-beta. A fold that
        trains on images of weight 0 alone is left out.
    score_ : float
        Mean F-beta of the rows it was fitted on (so an optimistic figure).
    n_features_in_ : int
        Number of labels K.
    """

    thresholds_: np.ndarray
    threshold_: float
    strength_: float
    cv_scores_: dict[str, np.ndarray]
    score_: float

    def __init__(
        self,
        beta: float = 2,
        min_labels: int = 0,
        max_labels: int | None = None,
        strengths: Iterable[float] = (1.0, 3.0, 10.0, 30.0, 100.0),
        cv: Any = 5,
        random_state: int = 0,
    ) -> None:
        self.beta = beta
        self.min_labels = min_labels
        self.max_labels = max_labels
        self.strengths = strengths
        self.cv = cv
        self.random_state = random_state

    def _fit(self, rows: LabelledRows, groups: np.ndarray | None) -> None:
        strengths = check_strengths(self.strengths)
        limits = self.min_labels, self.max_labels
        Limits(*limits)
        data = Scored.of(rows, self.beta)
        folds = check_folds(self.cv, data.P, data.truth, groups, self.random_state)
        values, weight = held_out_fbeta(data, strengths, folds, *limits), data.weight
        if (unscored := np.isnan(values).any(axis=0)).any():
            values, weight = values[:, ~unscored], weight[~unscored]
        if not weight.any():
            raise ValueError(
                "no fold trains and tests on images with weight; give folds (cv) that spread them"
            )
        self.strength_ = strengths[cautious(values, weight, _ERRORS)]
        self.cv_scores_ = {
            "strength": np.array(strengths),
            "score": values @ weight / weight.sum(),
        }
        self.threshold_ = data.global_threshold(*limits)
        own = class_thresholds(data, self.threshold_)
        positives = data.weight @ data.truth
        self.thresholds_ = shrunk(own, self.threshold_, positives, self.strength_)
        scores = data.fbeta(apply_threshold(data.P, self.thresholds_, *limits))
        self.score_ = weighted_mean(scores, data.weight)

    def predict(self, P: np.ndarray) -> csr_matrix:
        """Label sets of scores P (n, K); bool CSR of the same shape."""
        self._check_labels(P)
        return apply_threshold(P, self.thresholds_, self.min_labels, self.max_labels)


class ExpectedFBeta(Decision):
    """The label set of the highest expected F-beta of each image.

    Probabilities must be calibrated (see :class:`heads.PlattCalibration`): from overconfident
    ones a tuned threshold is better. The labels of an image count as
    independent given its probabilities. Nothing is learnt from data.

    Parameters
    ----------
    beta : float
        Recall counts beta times as much as precision; any number > 0.
    min_labels : int
        Each image gets at least that many labels (1: never none).
    max_labels : int, optional
        Each image gets at most that many labels.
    tail_tol : float, optional
        By how much an expected F-beta may be off for the sake of speed; None: only by
        rounding. Halves the time at 1e-4.

    Attributes
    ----------
    expected_ : (n,) array
        Expected F-beta of each image that was predicted last: what the probabilities promise.
    bound_ : float
        `expected_`, and the same of any other label set, is off by at most this.
    n_features_in_ : int
        Number of labels K.

    See Also
    --------
    heads.expected : formulas, proofs and source.

    Examples
    --------
    Where nothing is sure, more labels promise more:

    >>> import numpy as np
    >>> P = np.array([[0.9, 0.2, 0.1], [0.2, 0.1, 0.1]])
    >>> rule = ExpectedFBeta(beta=2).fit(P, P > 0.5)
    >>> rule.predict(P).toarray().astype(int)
    array([[1, 0, 0],
           [0, 0, 0]])
    >>> rule.expected_.round(3)
    array([0.785, 0.648])
    """

    expected_: np.ndarray
    bound_: float
    _probabilities = True
    _learns = False

    def __init__(
        self,
        beta: float = 2,
        min_labels: int = 0,
        max_labels: int | None = None,
        tail_tol: float | None = None,
    ) -> None:
        self.beta = beta
        self.min_labels = min_labels
        self.max_labels = max_labels
        self.tail_tol = tail_tol

    def _fit(self, rows: LabelledRows, groups: np.ndarray | None) -> None:
        Limits(self.min_labels, self.max_labels)

    def predict(self, P: np.ndarray) -> csr_matrix:
        """Label sets of probabilities P (n, K); bool CSR. Sets ``expected_`` and ``bound_``."""
        self._check_labels(P)
        found = expected_fbeta_sets(P, self.beta, self.min_labels, self.max_labels, self.tail_tol)
        self.expected_ = found.expected
        self.bound_ = float(found.bound.max(initial=0))
        return found.sets
