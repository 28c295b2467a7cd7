"""Which labels does an image get, given its scores?"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from heads.cuts import apply_threshold, best_global_threshold
from heads.inputs import Matrix, check_scores

__all__ = ["GlobalThreshold", "best_global_threshold"]


class GlobalThreshold(BaseEstimator):
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
    """

    threshold_: float
    score_: float
    n_features_in_: int

    def __init__(self, beta: float = 2, min_labels: int = 0, max_labels: int | None = None) -> None:
        self.beta = beta
        self.min_labels = min_labels
        self.max_labels = max_labels

    def fit(
        self,
        P: np.ndarray,
        Y: Matrix,
        mask: Matrix | None = None,
        sample_weight: np.ndarray | None = None,
        missed: np.ndarray | None = None,
    ) -> GlobalThreshold:
        """Find the threshold; parameters as of :func:`best_global_threshold`."""
        self.threshold_, self.score_ = best_global_threshold(
            P, Y, self.beta, mask, sample_weight, missed, self.min_labels, self.max_labels
        )
        self.n_features_in_ = np.shape(P)[1]
        return self

    def predict(self, P: np.ndarray) -> csr_matrix:
        """Label sets of scores P (n, K); bool CSR of the same shape."""
        check_is_fitted(self, "threshold_")
        P = check_scores(P)
        if P.shape[1] != self.n_features_in_:
            raise ValueError(
                f"P has {P.shape[1]} labels, but the threshold was fitted on {self.n_features_in_}"
            )
        return apply_threshold(P, self.threshold_, self.min_labels, self.max_labels)
