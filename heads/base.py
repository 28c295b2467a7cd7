"""What do all heads share towards scikit-learn?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from scipy.sparse import issparse
from sklearn.base import ClassifierMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data

from heads.inputs import refuse_all_unknown
from heads.markup import Markup
from heads.results import ShowsResults, rates_table
from heads.selection import OutOfFold
from heads.training import (
    TrainingSet,
    check_binary_target,
    check_features,
    check_targets,
    check_training_set,
    view_means,
)


def label_numbers(n_labels: int) -> np.ndarray:
    """``classes_`` of a head of several labels; of one column, 0 and 1.

    scikit-learn's scorers take a column for a binary target, and ``classes_[-1]`` for what
    high scores stand for.
    """
    return np.arange(max(2, n_labels))


class LinearHead(ClassifierMixin, ShowsResults, ABC):
    """A linear classifier of several labels, each yes or no, or of one binary target.

    Subclasses give `_fit` and `_probability`.
    """

    coef_: np.ndarray
    intercept_: np.ndarray
    coef_init_: np.ndarray | None
    classes_: np.ndarray
    n_features_in_: int
    _judge: Callable[[float, np.ndarray], float | None] | None = None  # of rates; TwoDomainCV's
    _single: ClassVar[type[LinearHead] | None] = None  # of a cross-validated one
    scoring: str
    per_label: bool
    _half: ClassVar[float] = 0.0  # the margin that stands for 1/2 where no calibration says so

    def fit(
        self,
        X: Any,
        Y: Any = None,
        sample_weight: Any = None,
        groups: Any = None,
        coef_init: Any = None,
        intercept_init: Any = None,
        mask: Any = None,
        *,
        missed: Any = None,
        y: Any = None,
    ) -> LinearHead:
        """Fit the head.

        Parameters
        ----------
        X : (n, d) or (n, v, d) array
            float16, float32 (computed in float32) or float64, memory-mapped or
            not. With views, each view of an image trains with weight a_i / v.
        Y : (n, K) dense or sparse, or (n,)
            Targets in [0, 1], NaN (dense) or masked (numpy.ma) where unknown; or
            one binary target, whose two values may be anything.
        sample_weight : (n,), optional
            a_i >= 0, counts of images: the smoothing of rare labels and of the
            calibration depends on their sum, so give them a mean of about 1.
        groups : (n,), optional
            Images of equal value are never split between folds. Used by the
            cross-validated forms alone.
        coef_init, intercept_init : (K, d) and (K,), optional
            W0 and b0; the weights shrink towards W0.
        mask : (n, K) bool, dense or sparse, optional
            True marks an *unknown* target, as in numpy.ma. (n,) or a column of one
            binary target.
        missed : (n,) counts, optional
            True labels outside the K: misses wherever F-beta is scored, by which rates are chosen.
        y
            Another name of Y, for callers that know scikit-learn's only.

        Returns
        -------
        self
        """
        Y = y if Y is None else Y
        if Y is None:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None"
            )
        X = self._check_X(X, reset=True)
        Y = Y if issparse(Y) else np.asanyarray(Y)  # which leaves a masked array its mask
        if Y.ndim > 1:
            Y, known = check_targets(Y, mask)
            self.classes_ = label_numbers(Y.shape[1])
            self._binary = False
        else:
            Y, known, self.classes_ = check_binary_target(Y, mask)
            self._binary = True
        refuse_all_unknown(None if known is None else ~known, Y.shape)
        start = coef_init, intercept_init
        data = check_training_set(X, Y, known, sample_weight, groups, *start, missed)
        self.coef_init_ = data.coef_init
        self._fit(data)
        return self

    def _at(self, dropout: float) -> LinearHead | None:
        """The head without cross-validation at one rate, if a judge can choose among several.

        It can where they are compared by F-beta.
        """
        if self._single is None or self.scoring != "fbeta" or self.per_label:
            return None
        head = self._single()
        own = self.get_params(deep=False)
        head.set_params(**{k: v for k, v in own.items() if k in head.get_params(deep=False)})
        return head.set_params(dropout=dropout)

    def _judged(
        self, probability: Callable[[OutOfFold], np.ndarray]
    ) -> Callable[[float, OutOfFold], float | None] | None:
        """The judge, if there is one, of held-out scores as `oof_predict_proba_` has them."""
        judge = self._judge
        if judge is None:
            return None
        return lambda dropout, oof: judge(dropout, probability(oof))

    @abstractmethod
    def _fit(self, data: TrainingSet) -> None:
        """Set the fitted attributes."""

    @abstractmethod
    def _probability(self, X: np.ndarray) -> np.ndarray:
        """(n, K) probabilities of mean features (n, d)."""

    def _margin(self, X: np.ndarray) -> np.ndarray:
        """(n, K) margins of mean features (n, d)."""
        return X @ self.coef_.T + self.intercept_

    def _zero_margin(self) -> float:
        """The margin at which both values of a binary target are equally likely."""
        scaling = getattr(self, "calibration_", None)
        if scaling is None or scaling.slope <= 0:  # flat, there is no such margin
            return self._half
        return -scaling.intercept / scaling.slope

    def _check_X(self, X: Any, reset: bool) -> np.ndarray:
        """Features as (n, d) or (n, v, d); their number, and names if any, set or compared."""
        checked = check_features(X, self)
        if checked.ndim == 2:
            validate_data(self, X=X, reset=reset, skip_check_array=True)
        elif reset:
            self.n_features_in_ = checked.shape[2]
            if hasattr(self, "feature_names_in_"):
                del self.feature_names_in_
        elif checked.shape[2] != self.n_features_in_:
            raise ValueError(
                f"X has {checked.shape[2]} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input"
            )
        return checked

    def _means(self, X: Any) -> np.ndarray:
        """Mean features (n, d) over the views, in the type of the coefficients."""
        check_is_fitted(self)
        X = self._check_X(X, reset=False)
        views = X if X.ndim == 3 else X[:, None, :]
        dtype = np.promote_types(self.coef_.dtype, X.dtype if X.dtype == np.float64 else np.float32)
        return view_means(views, np.arange(len(views)), dtype)

    def decision_function(self, X: Any) -> np.ndarray:
        """Mean margin over the views: W x + b.

        Returns
        -------
        (n, K), or (n,) for a binary target, then minus the margin at which both
        classes are equally likely.
        """
        margin = self._margin(self._means(X))
        return margin[:, 0] - margin.dtype.type(self._zero_margin()) if self._binary else margin

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (n, K) of the labels; (n, 2) of the classes of a binary target."""
        P = self._probability(self._means(X))
        return np.hstack([1 - P, P]) if self._binary else P

    def predict(self, X: Any) -> np.ndarray:
        """Labels with P >= 1/2 as (n, K) zeros and ones; (n,) classes of a binary target."""
        positive = self._probability(self._means(X)) >= 0.5
        return self.classes_[positive[:, 0].astype(int)] if self._binary else positive.astype(int)

    def _results(self) -> list[Markup]:
        return rates_table(self)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        tags.classifier_tags.multi_label = True
        return tags
