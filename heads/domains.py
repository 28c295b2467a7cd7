"""How much should the source domain count while a head adapts to a target domain?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, issparse, vstack
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted

from heads.base import LinearHead
from heads.decisions import best_global_threshold
from heads.grouping import numbered
from heads.inputs import (
    check_groups,
    check_missed,
    check_source,
    check_truth,
    refuse_no_list,
    split_masked,
)
from heads.markup import Markup
from heads.pareto import efficient
from heads.results import ShowsResults, pareto_table

_TIE = 1e-9  # of the source's score: what counts where targets' are equal


class TwoDomainCV(ShowsResults):
    """A cross-validated head fitted on target rows and down-weighted source rows.

    For each weight w the head is fitted on all rows, a source row counting
    ``w n_target / n_source``, so that w compares whole domains. Out-of-fold
    rows of *each* domain are scored by mean F-beta per image at that domain's best
    global threshold, at every weight and every dropout rate. The pick is the best target
    score among those whose source score is at most ``max_source_loss`` below the unadapted
    head's. At a weight where no rate is among them the rate is that which all rows together
    prefer; where no weight is, the one with the best source score is taken, with a warning.
    With ``max_source_loss=None``, or without W0, the target alone decides. Ties go to the better
    source score, then to the stronger rate, of two weights to the one given first.

    One rate a weight is compared, that which the estimator itself prefers, where its
    `scoring` is not "fbeta" or each label has a rate of its own. What the estimator's
    `cv_results_` say of all rows together decides only there.

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
    pareto_ : dict of arrays, a row a weight and rate
        "source_weight", "dropout", "target_score", "source_score", "efficient", "chosen".
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
            If the domains disagree in views, features or labels, a weight is negative, or
            `estimator` is no cross-validated head.
        """
        if not hasattr(self.estimator, "beta"):
            raise ValueError(
                f"estimator is {type(self.estimator).__name__}; give a head that chooses its rate "
                "out of fold, such as DropoutRidgeCV()"
            )
        X_val, Y_val = check_source(source)
        target = _Rows.of(X, Y, groups, mask, missed)
        home = _Rows.of(X_val, Y_val, source_groups, source_mask, source_missed, "source_groups")
        target.check_like(home)
        refuse_no_list(self.source_weights, "source_weights")
        weights = [float(w) for w in self.source_weights]
        if not weights or not all(0 <= w < np.inf for w in weights):
            raise ValueError(f"source_weights is {weights}; expected numbers >= 0, at least one")
        start = {"coef_init": coef_init, "intercept_init": intercept_init}
        # Not before a head has looked at what it is computed from.
        least = cache(partial(self._least_source_score, home, start))
        both = _joined(target, home, shared_groups)
        fits = []
        for w in weights:
            head, judge = clone(self.estimator), _Judge(target, home, self.estimator.beta, least)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if w > 0 or shared_groups:  # source scores too know no label of their groups
                    fit = _fit_both(head, both | start, w, judge)
                else:
                    fit = _fit_target(head, start, judge)
            judge.note(fit.rate, fit.target, fit.source)
            fits.append(replace(fit, tried=judge.seen, said=[w.message for w in caught]))
        best = fits[self._pick(weights, fits, least())]
        self.estimator_ = best.head
        self.oof_predict_proba_, self.source_oof_predict_proba_ = best.target, best.source
        for message in best.said:  # of the others none matters
            warnings.warn(message, stacklevel=2)
        return self

    def _least_source_score(self, source: _Rows, start: dict[str, Any]) -> float:
        if self.max_source_loss is None or start["coef_init"] is None:
            return -np.inf
        means = np.asarray(source.X, np.float32)
        means = means.mean(1) if means.ndim == 3 else means
        b0 = 0.0 if start["intercept_init"] is None else start["intercept_init"]
        margin = means @ np.asarray(start["coef_init"], np.float32).T + b0
        return source.score(margin, self.estimator.beta) - self.max_source_loss

    def _pick(self, weights: list[float], fits: list[_Fit], least: float) -> int:
        """The number of the fit that is taken; of the others their scores are kept."""
        rows = np.array(
            [
                (w, rate, *fit.tried[rate], i, rate == fit.rate)
                for i, (w, fit) in enumerate(zip(weights, fits, strict=True))
                for rate in sorted(fit.tried)
            ]
        )
        weight, dropout, target, source, number, fitted = rows.T
        best = int(np.argmax(np.where(fitted, _value(target, source, least), -np.inf)))
        if self.max_source_loss is not None and source[best] < least:
            warnings.warn(
                f"no source weight and dropout that were compared keep the source's F-beta within "
                f"{self.max_source_loss} of the unadapted head's, "
                f"{least + self.max_source_loss:.3f}: the nearest is taken; try other weights or "
                "rates, or a larger max_source_loss: the target decides within it",
                stacklevel=3,
            )
        self.pareto_ = {
            "source_weight": weight,
            "dropout": dropout,
            "target_score": target,
            "source_score": source,
            "efficient": efficient(rows[:, 2:4]),
            "chosen": np.arange(len(rows)) == best,
        }
        self.source_weight_ = float(weight[best])
        self.target_score_, self.source_score_ = float(target[best]), float(source[best])
        return int(number[best])

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


@dataclass(frozen=True)
class _Rows:
    """Labelled rows of one domain; see :meth:`TwoDomainCV.fit`."""

    X: Any
    Y: Any
    groups: Any
    mask: Any
    missed: Any

    @classmethod
    def of(cls, X: Any, Y: Any, groups: Any, mask: Any, missed: Any, name: str = "groups") -> _Rows:
        """With a masked array's mask beside it."""
        X = X if hasattr(X, "shape") else np.asarray(X)
        if issparse(X) or X.ndim not in (2, 3):
            what = "sparse" if issparse(X) else f"of shape {X.shape}"
            whose = "X" if name == "groups" else "X of the source"
            raise ValueError(f"{whose} is {what}; give an array (n, d) or (n, v, d)")
        Y, mask = _unmasked(Y, mask)
        groups = check_groups(groups, len(X), name)
        return cls(X, Y, groups, mask, missed)

    def __len__(self) -> int:
        return len(self.X)

    @property
    def fit(self) -> dict[str, Any]:
        """Arguments of a head's `fit`."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    def check_like(self, source: _Rows) -> None:
        """Refuse a source that this target cannot be joined with."""
        shapes = [(rows.X.shape, rows.Y.shape) for rows in (self, source)]
        rows_differ = any(x[0] != y[0] for x, y in shapes)
        (X, Y), (X_val, Y_val) = shapes
        if rows_differ or X[1:] != X_val[1:] or Y[1:] != Y_val[1:]:
            raise ValueError(
                f"target X {X}, Y {Y} and source X {X_val}, Y {Y_val} "
                "must agree in rows, each in itself, and in views, features and labels"
            )

    @cached_property
    def truth(self) -> tuple[Any, Any]:
        """Labels, soft ones from 1/2 on, and which of them are unknown."""
        labels, unknown = check_truth(self.Y, self.mask, self.Y.shape, soft=True)
        return labels >= 0.5, unknown

    def score(self, P: np.ndarray, beta: float) -> float:
        """Mean F-beta per image at the best cut."""
        if P.shape != self.Y.shape:
            check_truth(self.Y, self.mask, P.shape, soft=True)
        truth, unknown = self.truth
        return best_global_threshold(P, truth, beta, unknown, missed=self.missed)[1]


@dataclass(frozen=True)
class _Judge:
    """Scores of both domains by rate; `least` is what the source's should be."""

    target: _Rows
    source: _Rows
    beta: float
    least: Callable[[], float]
    seen: dict[float, tuple[float, float]] = field(default_factory=dict)

    def note(self, dropout: float, P: np.ndarray, P_source: np.ndarray) -> float | None:
        """Score a rate; what a search maximises, or None where the source loses too much."""
        target, source = self.target.score(P, self.beta), self.source.score(P_source, self.beta)
        self.seen[dropout] = target, source
        return float(_value(target, source, self.least())) if source >= self.least() else None


def _value(target: Any, source: Any, least: float) -> Any:
    """What is maximised: above all others, the target's score of those that keep `least`."""
    return np.where(source >= least, 2 + target + _TIE * source, source)


@dataclass(frozen=True)
class _Fit:
    """A head at one weight, its held-out scores, and the scores of all rates that it tried."""

    head: Any
    target: np.ndarray
    source: np.ndarray
    tried: dict[float, tuple[float, float]] = field(default_factory=dict)
    said: list[Any] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return float(np.mean(self.head.dropout_))


def _fit_both(head: Any, both: dict[str, Any], w: float, judge: _Judge) -> _Fit:
    """On all rows, of which all are held out once."""
    n, m = len(judge.target), len(judge.source)
    weight = np.r_[np.ones(n), np.full(m, w * n / m)]
    _fit_judged(
        head, lambda rate, P: judge.note(rate, P[:n], P[n:]), both | {"sample_weight": weight}
    )
    return _Fit(head, head.oof_predict_proba_[:n], head.oof_predict_proba_[n:])


def _fit_target(head: Any, start: dict[str, Any], judge: _Judge) -> _Fit:
    """On target rows alone: at each rate a fit on all of them tells the source's scores."""

    def note(rate: float, P: np.ndarray) -> float | None:
        single = head._at(rate).fit(**judge.target.fit, **start)
        if getattr(head, "probability", "platt") == "noise":
            return judge.note(rate, P, single.predict_proba(judge.source.X))
        scores = single.decision_function(judge.source.X)
        # In the order of Platt's probabilities, unless his map is flat.
        return judge.note(rate, P, scores if np.ptp(P) > 0 else np.full_like(scores, P.flat[0]))

    _fit_judged(head, note, judge.target.fit | start)
    return _Fit(head, head.oof_predict_proba_, head.predict_proba(judge.source.X))


def _fit_judged(
    head: Any, note: Callable[[float, np.ndarray], float | None], arguments: dict[str, Any]
) -> None:
    """Fit, with the rate that is best by both domains if the head can compare rates so."""
    judged = isinstance(head, LinearHead) and head._at(0.5) is not None
    if judged:
        head._judge = note
    head.fit(**arguments)
    if judged:
        del head._judge  # it holds all rows


def _joined(target: _Rows, source: _Rows, shared_groups: bool) -> dict[str, Any]:
    """Arguments of a head's `fit` on all rows."""
    n, m = len(target), len(source)
    return {
        "X": np.concatenate([target.X, source.X]),
        "Y": _stack(target.Y, source.Y),
        "groups": np.concatenate(numbered(target.groups, source.groups, n, m, shared_groups)),
        "mask": _joined_masks(target.mask, source.mask, target.Y, source.Y),
        "missed": np.r_[check_missed(target.missed, n), check_missed(source.missed, m)],
    }


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
