"""Which dropout rate is best out of fold?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_matrix

from heads.cuts import apply_threshold, best_global_threshold
from heads.dropout import check_dropouts, dropout_from_rho, rho_from_dropout
from heads.entry_losses import log_losses, squared_errors
from heads.folds import Fold
from heads.inputs import check_beta
from heads.metrics import average_precision, mean_fbeta
from heads.training import TrainingSet

SCORINGS = ("fbeta", "average_precision", "log_loss", "mse")
_MAXIMISED = ("fbeta", "average_precision")
_EXTENSIONS = 4  # rates that an end of the grid may grow by
_LEAST_RATIO = 2.0  # of rho, from a rate to the next beyond the grid


@dataclass(frozen=True)
class Start:
    """Coefficients of the folds, W0 and b0 apart, from whose mean the last fit starts.

    Attributes
    ----------
    D : (K, d), b : (K,)
        Sums over the folds.
    folds : (K,) int
        How many are in.
    """

    D: np.ndarray
    b: np.ndarray
    folds: np.ndarray

    @classmethod
    def zero(cls, data: TrainingSet) -> Start:
        K = data.n_labels
        D = np.zeros((K, data.n_features), data.dtype)
        return cls(D, np.zeros(K, data.dtype), np.zeros(K, int))

    def add(self, labels: np.ndarray, D: np.ndarray, b: np.ndarray) -> None:
        """Add the coefficients of some labels in one fold."""
        self.D[labels] += D
        self.b[labels] += b
        self.folds[labels] += 1

    def mean(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(k, d) and (k,) means of some labels, and whether (k,) any fold has them."""
        number = np.maximum(self.folds[labels], 1).astype(self.b.dtype)
        return self.D[labels] / number[:, None], self.b[labels] / number, self.folds[labels] > 0

    def copy(self) -> Start:
        """The same in arrays of its own."""
        return Start(self.D.copy(), self.b.copy(), self.folds.copy())

    def take(self, other: Start, labels: np.ndarray) -> None:
        """Take some labels from another."""
        for name in ("D", "b", "folds"):
            getattr(self, name)[labels] = getattr(other, name)[labels]


@dataclass(frozen=True)
class OutOfFold:
    """Held-out scores of all images at one rate.

    Attributes
    ----------
    margin : (n, K)
        On the scale of ``decision_function``.
    probability : (n, K) or None
        None if it is yet to be calibrated from the margins.
    start : Start or None
        For a fit on all rows at that rate.
    """

    margin: np.ndarray
    probability: np.ndarray | None
    start: Start | None = None


@dataclass(frozen=True)
class Search:
    """How rates are compared.

    Attributes
    ----------
    dropouts : ascending rates
    scoring : "fbeta", "average_precision", "log_loss" or "mse"
        F-beta per image at the best global threshold, or average precision, to be
        maximised; or mean log-loss, or mean squared error, over known entries, to
        be minimised. Average precision is that of each label in each fold, whose
        fits have intercepts of their own; a mean over folds, then over labels,
        that have a positive.
    beta : float
    per_label : bool
        Each label takes its own rate, by any scoring but F-beta.
    """

    dropouts: np.ndarray
    scoring: str
    beta: float
    per_label: bool

    @classmethod
    def checked(
        cls, dropouts: Iterable[float], scoring: str, beta: float, per_label: bool
    ) -> Search:
        """Refuse what cannot be searched."""
        if scoring not in SCORINGS:
            raise ValueError(f"scoring is {scoring!r}; expected one of {', '.join(SCORINGS)}")
        if per_label and scoring == "fbeta":
            raise ValueError(
                "scoring='fbeta' judges all labels together; per_label=True needs another scoring"
            )
        return cls(check_dropouts(dropouts), scoring, check_beta(beta), per_label)


@dataclass
class Selected:
    """The outcome of a search: one rate, or one a label, and its out-of-fold scores."""

    dropout: np.ndarray
    score: float
    results: dict[str, np.ndarray]
    out_of_fold: OutOfFold


@dataclass(frozen=True)
class _Score:
    """Score of one rate: over all rows, in each fold (F,), of each label (K,) if defined."""

    pooled: float
    folds: np.ndarray
    labels: np.ndarray | None
    threshold: float


class _Scorer:
    def __init__(
        self,
        data: TrainingSet,
        folds: list[Fold],
        search: Search,
        calibrate: Callable[[np.ndarray], np.ndarray] | None,
    ) -> None:
        self.data, self.tests, self.search = data, [test for _, test in folds], search
        self.calibrate = calibrate
        self.truth = _truth(data) if search.scoring in _MAXIMISED else None

    def score(self, oof: OutOfFold) -> _Score:
        if self.truth is None:
            return self._loss(oof)
        P = oof.margin if oof.probability is None else oof.probability
        return self._fbeta(P) if self.search.scoring == "fbeta" else self._precision(P)

    def _precision(self, P: np.ndarray) -> _Score:
        assert self.truth is not None
        values = np.full((len(self.tests), self.data.n_labels), np.nan)
        for fold, test in enumerate(self.tests):
            if self.data.weight[test].any():
                values[fold] = average_precision(
                    self.truth[test], P[test], None, sample_weight=self.data.weight[test]
                )
        labels = _mean_defined(values, 0)
        if np.isnan(labels).all():
            raise ValueError(
                "no label is positive in a fold; average precision is undefined: "
                "give labels with positives or another scoring"
            )
        return _Score(float(_mean_defined(labels, 0)), _mean_defined(values, 1), labels, np.nan)

    def _fbeta(self, P: np.ndarray) -> _Score:
        truth, weight, beta = self.truth, self.data.weight, self.search.beta
        missed = self.data.missed
        assert truth is not None
        threshold, pooled = best_global_threshold(P, truth, beta, None, weight, missed)
        chosen = apply_threshold(P, threshold)
        per_fold = [
            mean_fbeta(truth[test], chosen[test], beta, None, missed[test], 1.0, weight[test])
            if weight[test].any()
            else np.nan
            for test in self.tests
        ]
        return _Score(pooled, np.array(per_fold), None, threshold)

    def _loss(self, oof: OutOfFold) -> _Score:
        data, P = self.data, oof.probability
        if self.search.scoring == "mse":
            P = oof.margin if P is None else P
        elif P is None:
            assert self.calibrate is not None
            P = self.calibrate(oof.margin)
        entry_losses = log_losses if self.search.scoring == "log_loss" else squared_errors
        sums = np.empty((len(self.tests), data.n_labels))
        for fold, test in enumerate(self.tests):
            losses = entry_losses(data.Y[test], P[test])
            if data.known is not None:
                losses *= data.known[test]
            sums[fold] = data.weight[test].astype(losses.dtype) @ losses
        return self.from_sums(sums)

    def from_sums(self, sums: np.ndarray) -> _Score:
        """The score of weighted sums of losses (F, K)."""
        data = self.data
        weights = np.empty_like(sums)
        for fold, test in enumerate(self.tests):
            a = data.weight[test]
            weights[fold] = a.sum() if data.known is None else a @ data.known[test]
        if not weights.sum() > 0:
            raise ValueError("no target with a positive weight is known; nothing can be scored")
        with np.errstate(invalid="ignore"):
            folds = sums.sum(axis=1) / weights.sum(axis=1)
            labels = sums.sum(axis=0) / weights.sum(axis=0)
        return _Score(float(sums.sum() / weights.sum()), folds, labels, np.nan)


def _mean_defined(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of what is not NaN; NaN where nothing is."""
    defined = ~np.isnan(values)
    number = defined.sum(axis=axis)
    total = np.where(defined, values, 0).sum(axis=axis)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _truth(data: TrainingSet) -> csr_matrix | np.ndarray:
    """Labels that hold (soft ones: from 1/2 on); dense with NaN if some are unknown."""
    truth = data.Y >= 0.5
    if data.known is None:
        return csr_matrix(truth)
    return np.where(data.known, truth, np.nan)


class _Best:
    """The best rate so far, of all labels or of each, with its scores."""

    def __init__(self, search: Search, n_labels: int) -> None:
        self.search = search
        self.sign = -1.0 if search.scoring in _MAXIMISED else 1.0
        size = n_labels if search.per_label else 1
        self.cost = np.full(size, np.inf)
        self.dropout = np.zeros(size)
        self.offers = 0
        self.oof: OutOfFold | None = None

    def offer(self, dropout: float, score: _Score, oof: OutOfFold | None) -> None:
        """Compare a rate; without `oof`, its scores are to be filled in later."""
        scores = score.labels if self.search.per_label else None
        cost = self.sign * (np.array([score.pooled]) if scores is None else scores)
        # Of equal rates the stronger one: it leaves less to chance.
        better = (cost < self.cost) | ((cost == self.cost) & (dropout > self.dropout))
        if not self.offers:
            better[:] = True
        self.offers += 1
        self.cost = np.where(better, cost, self.cost)
        self.dropout = np.where(better, dropout, self.dropout)
        if oof is not None:
            self._take(oof, better)

    def fill(self, evaluate: Callable[[float], OutOfFold]) -> None:
        """Evaluate the rates that were chosen."""
        for dropout in np.unique(self.dropout):
            self._take(evaluate(float(dropout)), self.dropout == dropout)

    def _take(self, oof: OutOfFold, better: np.ndarray) -> None:
        if self.oof is None or (better.all() and len(better) == 1):
            self.oof = oof
        elif len(better) > 1:
            self.oof.margin[:, better] = oof.margin[:, better]
            if self.oof.probability is not None and oof.probability is not None:
                self.oof.probability[:, better] = oof.probability[:, better]
            if self.oof.start is not None and oof.start is not None:
                self.oof.start.take(oof.start, better)


def select_dropout(
    evaluate: Callable[[float], OutOfFold],
    data: TrainingSet,
    folds: list[Fold],
    search: Search,
    calibrate: Callable[[np.ndarray], np.ndarray] | None = None,
    squared_errors: Callable[[float], np.ndarray] | None = None,
    judge: Callable[[float, OutOfFold], float | None] | None = None,
) -> Selected:
    """Score every rate out of fold, from the strongest down, and pick the best.

    A grid of several rates grows beyond an end at which the best rate lies, by
    at most four rates; if the best is still at an end, a warning says so.

    Parameters
    ----------
    evaluate : function of a rate
        Gives new arrays of held-out scores of all images.
    calibrate : function of margins, optional
        Gives probabilities where `evaluate` does not.
    squared_errors : function of a rate, optional
        Gives weighted sums (folds, K) of squared errors, for scoring by "mse"
        where that is cheaper than the scores; these are made for the best rate only.
    judge : function of a rate and its held-out scores, optional
        A score, above 1, of rates that come before all others; None of others, which the
        search then scores itself.
    """
    scorer = _Scorer(data, folds, search, calibrate)
    best = _Best(search, data.n_labels)
    scores: dict[float, _Score] = {}
    costs: dict[float, float] = {}

    def run(dropout: float) -> None:
        if squared_errors is None:
            oof = evaluate(dropout)
            scores[dropout] = scorer.score(oof)
        else:
            oof = None
            scores[dropout] = scorer.from_sums(squared_errors(dropout))
        score = scores[dropout]
        judged = judge(dropout, oof) if judge is not None and oof is not None else None
        if judged is not None:
            score = replace(score, pooled=judged)
        costs[dropout] = best.sign * score.pooled
        best.offer(dropout, score, oof)

    for dropout in search.dropouts[::-1]:
        run(float(dropout))
    if len(search.dropouts) > 1:
        _extend(run, costs)
    if best.oof is None:
        best.fill(evaluate)
    assert best.oof is not None
    chosen = best.dropout if search.per_label else best.dropout[0]
    results = _results(scores)
    score = results["score"][results["dropout"] == best.dropout[0]]
    pooled = scorer.score(best.oof).pooled if search.per_label else float(score[0])
    return Selected(np.asarray(chosen), pooled, results, best.oof)


def _extend(run: Callable[[float], None], costs: dict[float, float]) -> None:
    """Add rates beyond the end where the best one is."""
    for _ in range(_EXTENSIONS):
        following = _beyond(costs)
        if following is None:
            return
        run(following)
    if _beyond(costs) is not None:
        best = min(costs, key=costs.__getitem__)
        end = "largest" if best == max(costs) else "smallest"
        warnings.warn(
            f"the best dropout, {best:.4g}, is the {end} that was tried; widen dropouts",
            UserWarning,
            stacklevel=5,
        )


def _beyond(cost_of: dict[float, float]) -> float | None:
    """The next rate if one at an end of those tried is better than all others, else None."""
    rates = sorted(cost_of)
    costs = np.array([cost_of[p] for p in rates])
    rho = rho_from_dropout(np.array(rates))
    if costs[-1] < costs[:-1].min():
        ratio = rho[-1] / rho[-2] if rho[-2] > 0 else _LEAST_RATIO
        following = float(dropout_from_rho(rho[-1] * max(ratio, _LEAST_RATIO)))
        return following if following < 1 else None
    if costs[0] < costs[1:].min() and rho[0] > 0:
        return float(dropout_from_rho(rho[0] / max(rho[1] / rho[0], _LEAST_RATIO)))
    return None


def _results(scores: dict[float, _Score]) -> dict[str, np.ndarray]:
    """The table of a search, one row a rate, ascending."""
    rates = sorted(scores)
    folds = np.array([scores[p].folds for p in rates])
    table = {
        "dropout": np.array(rates),
        "rho": rho_from_dropout(np.array(rates)),
        "score": np.array([scores[p].pooled for p in rates]),
        "mean_score": np.nanmean(folds, axis=1),
        "std_score": np.nanstd(folds, axis=1),
        "fold_scores": folds,
    }
    by_label = [scores[p].labels for p in rates]
    if all(labels is not None for labels in by_label):
        table["label_scores"] = np.array(by_label)
    else:
        table["threshold"] = np.array([scores[p].threshold for p in rates])
    return table
