"""What mean F-beta will a rule have on new images?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, vstack
from sklearn.base import clone

from heads.folds import check_folds
from heads.inputs import Matrix, check_missed, check_scores, check_truth, check_weights
from heads.metrics import bootstrap_interval, fbeta_per_image, weighted_mean


@dataclass(frozen=True)
class CrossValidated:
    """Mean F-beta of images that the rule had not seen.

    Attributes
    ----------
    score : float
    low, high : float
        Bootstrap interval at 95 %, over images, or over groups where there are any.
    fbeta : (n,) array
        Of each image.
    sets : (n, K) CSR, bool
        Label set of each image, by the rule of the other folds.
    folds : (F,) array
        Mean F-beta of each fold.
    """

    score: float
    low: float
    high: float
    fbeta: np.ndarray
    sets: csr_matrix
    folds: np.ndarray

    def __repr__(self) -> str:
        return (
            f"{self.score:.4f} [{self.low:.4f}, {self.high:.4f}] mean F-beta of "
            f"{len(self.fbeta):,} images, {len(self.folds)} folds"
        )


def cross_val_fbeta(
    rule: Any,
    P: np.ndarray,
    Y: Matrix,
    cv: Any = 5,
    mask: Matrix | None = None,
    sample_weight: np.ndarray | None = None,
    missed: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    head: Any = None,
    head_params: Mapping[str, Any] | None = None,
) -> CrossValidated:
    """Cross-validated mean F-beta of everything that is fitted on labels.

    In each fold the whole `rule` (calibration, shift, decision and the choice of their
    strengths) is fitted anew on the other folds.

    Parameters
    ----------
    rule : Decision
        Such as :class:`heads.CalibratedDecision`; cloned, and scored at its own ``beta``.
    P : (n, K) array, or (n, d) or (n, v, d) features if `head` is given
        Out-of-fold scores.
    Y : (n, K), dense or sparse
        True labels.
    cv : int, splitter or iterable of (train, test)
    mask, sample_weight, missed : optional
        Unknown labels, weights of rows, true labels outside the K classes.
    groups : (n,), optional
        Images that are never on both sides of a fold, nor of a resample of the interval.
    head : DropoutLogisticCV or DropoutRidgeCV, optional
        Then the head is fitted anew in each fold too, the rule on *its* out-of-fold scores.
        Without it, scores of the training rows come from heads that have seen test rows: a
        small optimism, in return for much less time.
    head_params : mapping, optional
        More arguments of ``head.fit``, such as coef_init.

    Returns
    -------
    CrossValidated
        Score with its interval, and label sets of all images.

    Raises
    ------
    ValueError
        If shapes differ, or a group cannot be kept whole.
    """
    if head is None:
        P = check_scores(P)
        if head_params:
            raise ValueError("head_params has no effect without head; leave it out")
    else:
        P = np.asarray(P)
    truth, unknown = check_truth(Y, mask, None if head is not None else P.shape)
    n = truth.shape[0]
    if len(P) != n:
        raise ValueError(f"P has {len(P)} rows, but Y has {n}")
    weight, outside = check_weights(sample_weight, n), check_missed(missed, n)
    groups = None if groups is None else np.asarray(groups)
    folds = check_folds(cv, P, truth, groups)
    parts = []
    for train, test in folds:
        known = {
            "mask": None if unknown is None else unknown[train],
            "sample_weight": weight[train],
            "groups": None if groups is None else groups[train],
        }
        if head is None:
            scores, held = P[train], P[test]
        else:
            fitted = clone(head).fit(P[train], truth[train], **known, **(head_params or {}))
            if not hasattr(fitted, "oof_predict_proba_"):
                raise ValueError(
                    f"head is {type(fitted).__name__}, which gives no out-of-fold scores; take "
                    "DropoutLogisticCV or DropoutRidgeCV"
                )
            scores, held = fitted.oof_predict_proba_, fitted.predict_proba(P[test])
        chain = _with_folds_for(rule, known["groups"], len(train))
        chain.fit(scores, truth[train], **known, missed=outside[train])
        parts.append(chain.predict(held))
    order = np.argsort(np.concatenate([test for _, test in folds]))
    sets = csr_matrix(vstack(parts, format="csr")[order], dtype=bool)
    values = fbeta_per_image(truth, sets, rule.beta, unknown, outside)
    low, high = bootstrap_interval(values, sample_weight=weight, groups=groups)
    return CrossValidated(
        weighted_mean(values, weight),
        low,
        high,
        values,
        sets,
        _fold_means(values, weight, (test for _, test in folds)),
    )


def images_needed(rule: Any, cv: int = 5) -> int:
    """Images that a figure of :func:`cross_val_fbeta` needs, where the rule has folds of its own.

    With fewer, the other folds might hold less images than the rule makes folds of them.
    """
    return 2 * max([cv, *_own_folds(rule).values()])


def _with_folds_for(rule: Any, groups: np.ndarray | None, images: int) -> Any:
    """A clone with no more folds of its own than groups; a fold may hold many small ones."""
    units = images if groups is None else len(np.unique(groups))
    few = {k: units for k, v in _own_folds(rule).items() if 2 <= units < v}
    return clone(rule).set_params(**few)


def _own_folds(rule: Any) -> dict[str, int]:
    """Parameters of the rule, and of its parts, that are numbers of folds."""
    params = rule.get_params().items()
    return {k: v for k, v in params if k.rpartition("__")[2] == "cv" and isinstance(v, int)}


def _fold_means(values: np.ndarray, weight: np.ndarray, tests: Iterable[np.ndarray]) -> np.ndarray:
    return np.array(
        [weight[t] @ values[t] / weight[t].sum() if weight[t].any() else np.nan for t in tests]
    )
