"""How much should the source domain count while a head adapts to a target domain?"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, issparse, vstack
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted

from heads.decisions import best_global_threshold
from heads.grouping import numbered
from heads.inputs import check_missed, check_truth, split_masked
from heads.markup import Markup
from heads.pareto import efficient
from heads.results import ShowsResults, pareto_table


class TwoDomainCV(ShowsResults):
    """A cross-validated head fitted on target rows and down-weighted source rows.

    For each weight w the head is fitted on all rows, a source row counting
    ``w n_target / n_source``, so that w compares whole domains. Out-of-fold
    rows of *each* domain are scored by mean F-beta per image at that domain's best
    global threshold. The pick is the best target score among those whose source
    score is at most ``max_source_loss`` below the unadapted head's; where none is,
    the one with the best source score, with a warning. With ``max_source_loss=None`` the
    target alone decides.

    Parameters
    ----------
    estimator : DropoutRidgeCV or DropoutLogisticCV
    source_weights : iterable of float
        Weights w >= 0 to compare; 0 fits on the target alone.
    max_source_loss : float or None
        Of F-beta.

    Attributes
    ----------
    estimator_ : fitted clone of `estimator`
    source_weight_ : float
    target_score_, source_score_ : float
        Out-of-fold F-beta of the pick.
    pareto_ : dict of arrays, a row a weight
        "source_weight", "dropout", "target_score", "source_score", "efficient".
    oof_predict_proba_, source_oof_predict_proba_ : (n, K) and (n_source, K)
    """

    def __init__(
        self,
        estimator: Any,
        source_weights: Iterable[float] = (0.0, 0.1, 0.3, 1.0),
        max_source_loss: float | None = 0.01,
    ) -> None:
        self.estimator = estimator
        self.source_weights = source_weights
        self.max_source_loss = max_source_loss

    def fit(
        self,
        X: Any,
        Y: Any,
        source: tuple[Any, Any],
        groups: Any = None,
        source_groups: Any = None,
        coef_init: Any = None,
        intercept_init: Any = None,
        mask: Any = None,
        source_mask: Any = None,
        shared_groups: bool = False,
        missed: Any = None,
        source_missed: Any = None,
    ) -> TwoDomainCV:
        """Fit at every weight and keep the pick.

        Parameters
        ----------
        X, Y : target features (n, d) or (n, v, d) and labels (n, K)
        source : (X_val, Y_val)
            The same for the source domain; as many views as X.
        groups, source_groups : (n,) and (n_source,), optional
        coef_init, intercept_init : W0 (K, d) and b0 (K,), optional
        mask, source_mask : optional
            True where a label is unknown.
        shared_groups : bool
            Whether equal values in `groups` and `source_groups` are one group, such as a scene
            that both domains have pictures of; else each domain has groups of its own.
        missed, source_missed : (n,) and (n_source,) counts, optional
            True labels outside the K, which count as misses.

        Raises
        ------
        ValueError
            If the domains disagree in views, features or labels, or a weight is negative.
        """
        X_val, Y_val = source
        Y, mask = _unmasked(Y, mask)
        Y_val, source_mask = _unmasked(Y_val, source_mask)
        rows_differ = len(X) != Y.shape[0] or len(X_val) != Y_val.shape[0]
        if rows_differ or X.shape[1:] != X_val.shape[1:] or Y.shape[1:] != Y_val.shape[1:]:
            raise ValueError(
                f"target X {X.shape}, Y {Y.shape} and source X {X_val.shape}, Y {Y_val.shape} "
                "must agree in rows, each in itself, and in views, features and labels"
            )
        weights = [float(w) for w in self.source_weights]
        if not weights or not all(0 <= w < np.inf for w in weights):
            raise ValueError(f"source_weights is {weights}; expected numbers >= 0, at least one")
        n, m = len(X), len(X_val)
        both = {
            "X": np.concatenate([X, X_val]),
            "Y": _stack(Y, Y_val),
            "groups": np.concatenate(numbered(groups, source_groups, n, m, shared_groups)),
            "mask": _joined_masks(mask, source_mask, Y, Y_val),
            "missed": np.r_[check_missed(missed, n), check_missed(source_missed, m)],
        }
        start = {"coef_init": coef_init, "intercept_init": intercept_init}
        beta = self.estimator.beta
        fits, rows, said = [], [], []
        for w in weights:
            head = clone(self.estimator)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if w > 0 or shared_groups:  # source scores too know no label of their groups
                    weight = np.r_[np.ones(n), np.full(m, w * n / m)]
                    head.fit(**both, sample_weight=weight, **start)
                    oof = head.oof_predict_proba_
                    target, source_oof = oof[:n], oof[n:]
                else:
                    head.fit(X, Y, groups=groups, mask=mask, missed=missed, **start)
                    target, source_oof = head.oof_predict_proba_, head.predict_proba(X_val)
            said.append([warning.message for warning in caught])
            scores = [
                _score(target, Y, mask, beta, missed),
                _score(source_oof, Y_val, source_mask, beta, source_missed),
            ]
            fits.append((head, target, source_oof))
            rows.append([w, np.mean(head.dropout_), *scores])
        self._pick(
            fits,
            np.array(rows),
            self._least_source_score(X_val, Y_val, start, source_mask, source_missed),
        )
        for message in said[weights.index(self.source_weight_)]:  # of the others none matters
            warnings.warn(message, stacklevel=2)
        return self

    def _least_source_score(
        self, X_val: Any, Y_val: Any, start: dict[str, Any], mask: Any, missed: Any
    ) -> float:
        if self.max_source_loss is None or start["coef_init"] is None:
            return -np.inf
        means = np.asarray(X_val, np.float32)
        means = means.mean(1) if means.ndim == 3 else means
        b0 = 0.0 if start["intercept_init"] is None else start["intercept_init"]
        margin = means @ np.asarray(start["coef_init"], np.float32).T + b0
        return _score(margin, Y_val, mask, self.estimator.beta, missed) - self.max_source_loss

    def _pick(
        self, fits: list[tuple[Any, np.ndarray, np.ndarray]], rows: np.ndarray, least: float
    ) -> None:
        weight, dropout, target, source = rows.T
        self.pareto_ = {
            "source_weight": weight,
            "dropout": dropout,
            "target_score": target,
            "source_score": source,
            "efficient": efficient(rows[:, 2:]),
        }
        allowed = source >= least
        if self.max_source_loss is not None and not allowed.any():
            warnings.warn(
                f"no source weight keeps the source's F-beta within {self.max_source_loss} of the "
                f"unadapted head's, {least + self.max_source_loss:.3f}: the nearest is taken; try "
                "other weights, or a larger max_source_loss: the target decides within it",
                stacklevel=3,
            )
        best = int(np.argmax(np.where(allowed, target, -np.inf) if allowed.any() else source))
        self.estimator_, self.oof_predict_proba_, self.source_oof_predict_proba_ = fits[best]
        self.source_weight_ = float(weight[best])
        self.target_score_, self.source_score_ = float(target[best]), float(source[best])

    def decision_function(self, X: Any) -> np.ndarray:
        """Margins of the pick."""
        check_is_fitted(self, "estimator_")
        margin: np.ndarray = self.estimator_.decision_function(X)
        return margin

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the pick."""
        check_is_fitted(self, "estimator_")
        probability: np.ndarray = self.estimator_.predict_proba(X)
        return probability

    def _results(self) -> list[Markup]:
        return pareto_table(self)


def _score(P: np.ndarray, Y: Any, mask: Any, beta: float, missed: Any) -> float:
    truth, unknown = check_truth(Y, mask, P.shape, soft=True)
    # Soft targets count as true from 1/2 on.
    return best_global_threshold(P, truth >= 0.5, beta, unknown, missed=missed)[1]


def _stack(Y: Any, Y_val: Any) -> Any:
    if issparse(Y) or issparse(Y_val):
        return csr_matrix(vstack([csr_matrix(Y), csr_matrix(Y_val)]))
    return np.concatenate([Y, Y_val])


def _unmasked(Y: Any, mask: Any) -> tuple[Any, Any]:
    """A masked array of numpy.ma, which stacking would forget, as plain targets and a mask."""
    if issparse(Y):
        return Y, mask
    Y, hidden = split_masked(Y)
    if hidden is None:
        return Y, mask
    if mask is not None:
        hidden = hidden | (mask.toarray() if issparse(mask) else np.asarray(mask, bool))
    return np.where(hidden, 0, Y), hidden


def _joined_masks(mask: Any, source_mask: Any, Y: Any, Y_val: Any) -> np.ndarray | None:
    if mask is None and source_mask is None:
        return None
    parts = [
        np.zeros(y.shape, bool) if part is None else part.toarray() if issparse(part) else part
        for part, y in ((mask, Y), (source_mask, Y_val))
    ]
    return np.concatenate(parts).astype(bool)
