"""Ridge heads with dropout marginalised: exact for every rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from sklearn.model_selection import BaseCrossValidator

from heads.base import LinearHead
from heads.calibration import PlattScaling, fit_platt
from heads.dropout import check_dropout, check_l2, default_dropouts, rho_from_dropout
from heads.folds import Fold, check_folds
from heads.parallel import Map, worker_threads
from heads.ridge_fit import FoldScores, RidgeFit, fit_folds, fit_whole
from heads.selection import OutOfFold, Search, select_dropout
from heads.training import TrainingSet, fold_targets


class DropoutRidge(LinearHead):
    """Least squares with dropout on the features, marginalised exactly.

    Minimises, for each label, with W = W0 + D and x~ the features after dropout,

        sum_i a_i E|y_i - b - W0 x_i - D x~_i|^2 + l2 |D|^2
      = sum_i a_i |y_i - b - W x_i|^2 + sum_j (rho m_j + l2) D_j^2,

    rho = p / (1 - p), m_j = sum_i a_i x_ij^2 over training rows. W0, b0 are the
    `coef_init`, `intercept_init` of `fit`, or zero; b is not penalised. W0 must
    live on the scale of the targets: a network's logits do not.

    Parameters
    ----------
    dropout : float
        Rate p in [0, 1). At 0 with l2 = 0 the answer is the limit p -> 0: least
        squares, of the smallest penalty where it is not unique.
    l2 : float
        Ridge penalty on D; with dropout 0 and no W0 this is scikit-learn's
        ``Ridge(alpha=l2)``.
    min_positives : int
        A label with fewer positive training images, or of one class, keeps W0
        and takes one bias shift, the mean residual of all such labels; without
        W0 and b0 its bias is its mean target.

    Attributes
    ----------
    coef_ : (K, d), intercept_ : (K,)
        float64 if X is, else float32.
    classes_ : (K,) label numbers (0 and 1 of one column), or the two values of a binary target
    coef_init_ : (K, d) or None
        W0 of the fit.
    n_features_in_ : int

    Notes
    -----
    A feature that is zero in all training rows keeps D = 0. Unknown targets are
    left out label by label: labels known on the same images share one
    factorisation, so the time grows with the number of different patterns.
    For n rows, n < d: O(n^2 d + n^3 + n^2 K), else O(n d (d + K) + d^3).

    `predict_proba` is the score clipped to [0, 1]; the cross-validated form
    calibrates. For a binary target `decision_function` is the score minus 1/2.
    """

    _half = 0.5

    def __init__(self, dropout: float = 0.5, l2: float = 0.0, min_positives: int = 1) -> None:
        self.dropout = dropout
        self.l2 = l2
        self.min_positives = min_positives

    def _fit(self, data: TrainingSet) -> None:
        rho = rho_from_dropout(check_dropout(self.dropout))
        model = fit_whole(data, check_l2(self.l2), self.min_positives)
        self.coef_, self.intercept_ = model.coefficients(rho)

    def _probability(self, X: np.ndarray) -> np.ndarray:
        return np.clip(self._margin(X), 0, 1)


class DropoutRidgeCV(LinearHead):
    """`DropoutRidge` at the rate that is best out of fold.

    Parameters
    ----------
    dropouts : rates in [0, 1)
        A grid of several rates grows by up to four where the best is at an end.
    l2 : float
        See `DropoutRidge`.
    cv : int, splitter, iterable of (train, test) or "loo"
        An int stands for that many folds of `MultilabelGroupKFold`. "loo" holds
        out one image, all its views (and its group), at a time by the formula
        r_g -> (I - H_gg)^-1 r_g; the penalty's second moments are those of all
        rows there, and which labels are rare is not decided anew.
    scoring : "fbeta", "average_precision", "log_loss" or "mse"
        "fbeta" is the mean F-beta per image at the best global threshold over
        all out-of-fold scores; "average_precision" that of each label in each
        fold, a mean over folds, then labels, with positives; the other two are
        means over known targets: "mse" judges scores, "log_loss" Platt-scaled ones.
    beta : float
    min_positives : int
        See `DropoutRidge`; it counts the training images of each fold anew.
    per_label : bool
        Each label takes the rate that is best for it; not with "fbeta".
    random_state : int
        Seed of the folds if `cv` is an int.

    Attributes
    ----------
    coef_, intercept_, classes_, coef_init_, n_features_in_
        Of the fit on all rows; see `DropoutRidge`.
    dropout_ : float, or (K,) with `per_label`
    best_score_ : float
        In the sign of `scoring`: larger is better for "fbeta", "average_precision".
    cv_results_ : dict of arrays, a row a rate in ascending order
        "dropout", "rho", "score" (what decides, but in TwoDomainCV: of all rows together, but for
        average precision),
        "fold_scores" (rates, folds), "mean_score", "std_score"; "threshold" for
        "fbeta", else "label_scores" (rates, K).
    oof_decision_function_, oof_predict_proba_ : (n, K)
        Held-out scores at the chosen rate, on the scale of `decision_function`
        (before a binary target's is set to 0 where both values are as likely) and
        `predict_proba`.
    calibration_ : PlattScaling
        The map from scores to probabilities, fitted on the held-out scores, of slope >= 0:
        where a falling one fits best, all probabilities are the base rate. A binary
        target's `decision_function` is then the score minus 1/2, whatever `predict` says.

    Notes
    -----
    Exact: each fold has its own second moments and a factorisation a rate.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(100, 40))
    >>> Y = X[:, :3] + 2 * rng.normal(size=(100, 3)) > 0.5
    >>> head = DropoutRidgeCV(dropouts=(0.1, 0.3, 0.5, 0.7, 0.9), scoring="mse").fit(X, Y)
    >>> float(round(head.dropout_, 2))
    0.7
    >>> head.predict_proba(X[:4]).shape
    (4, 3)
    """

    _half = 0.5
    _single = DropoutRidge

    def __init__(
        self,
        dropouts: Iterable[float] = default_dropouts(),
        l2: float = 0.0,
        cv: int | str | BaseCrossValidator | Iterable[Fold] = 5,
        scoring: str = "fbeta",
        beta: float = 2,
        min_positives: int = 1,
        per_label: bool = False,
        random_state: int = 0,
    ) -> None:
        self.dropouts = dropouts
        self.l2 = l2
        self.cv = cv
        self.scoring = scoring
        self.beta = beta
        self.min_positives = min_positives
        self.per_label = per_label
        self.random_state = random_state

    def _fit(self, data: TrainingSet) -> None:
        search = Search.checked(self.dropouts, self.scoring, self.beta, self.per_label)

        def scaling(scores: np.ndarray) -> PlattScaling:
            return fit_platt(scores, data.Y, data.known, data.weight, rising=True)

        def calibrate(scores: np.ndarray) -> np.ndarray:
            return scaling(scores).transform(scores)

        with worker_threads() as run:
            folds, evaluate, whole = self._plan(data, search.dropouts, run)
            quick = None
            if self.scoring == "mse" and isinstance(evaluate, FoldScores) and evaluate.has_moments:
                quick = evaluate.squared_errors
            judge = self._judged(lambda oof: calibrate(oof.margin))
            chosen = select_dropout(evaluate, data, folds, search, calibrate, quick, judge)
            scores = chosen.out_of_fold.margin
            rho = rho_from_dropout(chosen.dropout)
            last = (lambda: whole().coefficients(rho)), (lambda: scaling(scores))
            (self.coef_, self.intercept_), self.calibration_ = run(lambda made: made(), last)
        self.dropout_ = chosen.dropout if self.per_label else float(chosen.dropout)
        self.best_score_, self.cv_results_ = chosen.score, chosen.results
        self.oof_decision_function_ = scores
        self.oof_predict_proba_ = self.calibration_.transform(scores)

    def _plan(
        self, data: TrainingSet, dropouts: np.ndarray, run: Map
    ) -> tuple[list[Fold], Callable[[float], OutOfFold], Callable[[], RidgeFit]]:
        """The folds, a function of the rate that gives held-out scores, and one that fits all."""
        l2, every = check_l2(self.l2), np.arange(data.n_images)
        if isinstance(self.cv, str) and self.cv == "loo":
            whole = fit_whole(data, l2, self.min_positives)

            def held_out(dropout: float) -> OutOfFold:
                return OutOfFold(whole.held_out(float(rho_from_dropout(dropout))), None)

            return [(every, every)], held_out, lambda: whole
        folds = check_folds(
            self.cv, every, fold_targets(data, self._binary), data.groups, self.random_state
        )
        fits = fit_folds(data, folds, l2, self.min_positives, run)
        scores = FoldScores(data, fits, dropouts, run)
        return folds, scores, lambda: fit_whole(data, l2, self.min_positives, fits)

    def _probability(self, X: np.ndarray) -> np.ndarray:
        return self.calibration_.transform(self._margin(X))
