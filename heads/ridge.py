"""Ridge heads with dropout marginalised: exact for every rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from sklearn.model_selection import BaseCrossValidator

from heads.base import LinearHead
from heads.calibration import PlattScaling, fit_platt
from heads.dropout import check_dropout, default_dropouts, rho_from_dropout
from heads.folds import Fold, check_folds
from heads.moments import Moments
from heads.rare import squared_rare_bias, trainable
from heads.selection import OutOfFold, Search, select_dropout
from heads.systems import FeatureSystem, RowSystem
from heads.training import TrainingSet, fold_targets, label_patterns


class _Part:
    """Trained labels that are known on the same training images."""

    def __init__(
        self,
        data: TrainingSet,
        labels: np.ndarray,
        images: np.ndarray,
        l2: float,
        test: np.ndarray | None,
        moments: Moments | None,
    ) -> None:
        self.data, self.labels, self.images, self.l2, self.test = data, labels, images, l2, test
        self.by_rows = len(images) * data.n_views < data.n_features
        self.system: RowSystem | FeatureSystem
        if self.by_rows:
            X, weight = data.rows(images), data.row_weight(images)
            self.system = RowSystem(X, residual_targets(data, images, labels), weight, l2, test)
        else:
            moments = moments or image_moments(data, images, labels, data.dtype)
            self.system = FeatureSystem(moments, l2, data.dtype)

    def _safe(self, rho: float) -> RowSystem | FeatureSystem:
        """The system, its moments made again in float64 if float32 is too coarse."""
        system = self.system
        if (
            isinstance(system, FeatureSystem)
            and system.dtype == np.float32
            and system.rounds_badly(rho)
        ):
            double = np.dtype(np.float64)
            moments = image_moments(self.data, self.images, self.labels, double)
            self.system = system = FeatureSystem(moments, self.l2, double)
        return system

    def coefficients(self, rho: float) -> tuple[np.ndarray, np.ndarray]:
        D, b = self._safe(rho).coefficients(rho)
        return D.astype(self.data.dtype), b.astype(self.data.dtype)

    def predict(self, rho: float) -> np.ndarray:
        """(r, k) scores of the test images, W0 apart."""
        assert self.test is not None
        if isinstance(self.system, RowSystem):
            return self.system.predict(rho)
        D, b = self.coefficients(rho)
        return self.test @ D.T + b

    def held_out(self, rho: float, blocks: list[np.ndarray]) -> np.ndarray:
        """(m v, k) scores of training rows without their block, W0 apart."""
        system = self._safe(rho)
        if isinstance(system, RowSystem):
            return system.held_out(rho, blocks)
        X, weight = self.data.rows(self.images), self.data.row_weight(self.images)
        T = residual_targets(self.data, self.images, self.labels)
        return system.held_out(rho, X, T, weight, blocks)


def residual_targets(data: TrainingSet, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(m v, k) what W0, b0 leave of the targets."""
    T = data.row_targets(images, labels)
    base = data.row_base(images, labels)
    return T if base is None else T - base


def image_moments(
    data: TrainingSet, images: np.ndarray, labels: np.ndarray, dtype: np.dtype[Any]
) -> Moments:
    """Moments of the rows of `images`, chunk by chunk, with products in `dtype`."""
    total = Moments.zero(_origin(data), len(labels))
    for run in data.chunks(images):
        X = data.rows(run).astype(dtype, copy=False)
        T = residual_targets(data, run, labels).astype(dtype, copy=False)
        total = total + Moments.of(X, T, data.row_weight(run), total.origin)
    return total


def _origin(data: TrainingSet) -> np.ndarray:
    """The mean row of a few hundred images, near enough to the mean of any fold."""
    sample = np.arange(0, data.n_images, max(1, data.n_images // 512))
    return data.view_means(sample).mean(axis=0, dtype=np.float64)


def fold_moments(data: TrainingSet, folds: list[Fold], labels: np.ndarray) -> list[Moments | None]:
    """Moments of each fold's training rows as sums over the other folds' test rows.

    None for each fold if some fold trains among rows, on other rows than all but
    its test rows, or if labels are known on different rows.
    """
    whole = all(
        len(train) + len(test) == data.n_images and len(train) * data.n_views >= data.n_features
        for train, test in folds
    )
    if not whole or len(folds) < 2 or data.known is not None:
        return [None] * len(folds)
    parts = [image_moments(data, test, labels, data.dtype) for _, test in folds]
    sums: list[Moments | None] = []
    for left_out in range(len(parts)):
        total = Moments.zero(parts[0].origin, len(labels))
        for index, part in enumerate(parts):
            total = total if index == left_out else total + part
        sums.append(total)
    return sums


class RidgeFit:
    """All labels fitted on some images, at any rate.

    Parameters
    ----------
    data : TrainingSet
    images : (m,) int
        Training images.
    l2 : float
    min_positives : int
    test : (r,) int, optional
        Images that `predict` scores.
    moments : (labels, Moments of the training rows and these labels), optional
    """

    def __init__(
        self,
        data: TrainingSet,
        images: np.ndarray,
        l2: float,
        min_positives: int,
        test: np.ndarray | None = None,
        moments: tuple[np.ndarray, Moments] | None = None,
    ) -> None:
        self.data, self.test = data, test
        trained = trainable(data, images, min_positives)
        self.rare = np.flatnonzero(~trained)
        self.rare_bias = squared_rare_bias(data, images, self.rare)
        rows = None if test is None else data.view_means(test)
        self.parts = []
        for labels, known in label_patterns(data.known, images, np.flatnonzero(trained)):
            shared = None
            if moments is not None:
                shared = moments[1].targets(np.searchsorted(moments[0], labels))
            self.parts.append(_Part(data, labels, known, l2, rows, shared))

    def predict(self, rho: float) -> np.ndarray:
        """(r, K) scores of the test images."""
        assert self.test is not None
        base = self.data.base_means(self.test)
        scores = np.zeros((len(self.test), self.data.n_labels), self.data.dtype)
        for part in self.parts:
            scores[:, part.labels] = part.predict(rho)
        if base is not None:
            scores += base
        self._score_rare(scores, base)
        return scores

    def _score_rare(self, scores: np.ndarray, base: np.ndarray | None) -> None:
        scores[:, self.rare] = self.rare_bias
        if base is not None:
            assert self.data.intercept_init is not None
            scores[:, self.rare] += base[:, self.rare] - self.data.intercept_init[self.rare]

    def held_out(self, rho: float) -> np.ndarray:
        """(n, K) scores of every image without its group, m held fixed.

        An image that a label did not train on has the score of the whole fit.
        """
        data = self.data
        every = np.arange(data.n_images)
        base = data.base_means(every)
        scores = np.zeros((data.n_images, data.n_labels), data.dtype)
        for part in self.parts:
            if len(part.images) < data.n_images:
                D, b = part.coefficients(rho)
                scores[:, part.labels] = data.view_means(every) @ D.T + b
            rows = part.held_out(rho, _blocks(data, part.images))
            means = rows.reshape(len(part.images), data.n_views, -1).mean(axis=1)
            scores[np.ix_(part.images, part.labels)] = means
        if base is not None:
            scores += base
        self._score_rare(scores, base)
        return scores

    def coefficients(self, rho: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """W (K, d) and b (K,) at one rate, or at one a label."""
        data = self.data
        rates = np.broadcast_to(rho, data.n_labels)
        W = np.zeros((data.n_labels, data.n_features), data.dtype)
        b = np.zeros(data.n_labels, data.dtype)
        for part in self.parts:
            for rate in np.unique(rates[part.labels]):
                D, bias = part.coefficients(float(rate))
                here = rates[part.labels] == rate
                W[part.labels[here]], b[part.labels[here]] = D[here], bias[here]
        if data.coef_init is not None and data.intercept_init is not None:
            W += data.coef_init
            b += data.intercept_init
        b[self.rare] = self.rare_bias
        return W, b


def _blocks(data: TrainingSet, images: np.ndarray) -> list[np.ndarray]:
    """Rows of the training set `images` that are held out together."""
    rows = np.arange(len(images) * data.n_views).reshape(len(images), data.n_views)
    if data.groups is None:
        return list(rows)
    _, code = np.unique(data.groups[images], return_inverse=True)
    order = np.argsort(code, kind="stable")
    ends = np.flatnonzero(np.diff(code[order])) + 1
    return [rows[some].ravel() for some in np.split(order, ends)]


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
        W0 its bias is its mean target.

    Attributes
    ----------
    coef_ : (K, d), intercept_ : (K,)
        float64 if X is, else float32.
    classes_ : (K,) label numbers, or the two values of a binary target
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

    def __init__(self, dropout: float = 0.5, l2: float = 0.0, min_positives: int = 1) -> None:
        self.dropout = dropout
        self.l2 = l2
        self.min_positives = min_positives

    def _fit(self, data: TrainingSet) -> None:
        rho = rho_from_dropout(check_dropout(self.dropout))
        images = np.flatnonzero(data.weight > 0)
        model = RidgeFit(data, images, check_l2(self.l2), self.min_positives)
        self.coef_, self.intercept_ = model.coefficients(rho)

    def _zero_margin(self) -> float:
        return 0.5

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
    scoring : "fbeta", "log_loss" or "mse"
        "fbeta" is the mean F-beta per image at the best global threshold over
        all out-of-fold scores, the other two are means over known targets;
        "mse" judges scores, "log_loss" Platt-scaled ones.
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
        In the sign of `scoring`: larger is better for "fbeta" alone.
    cv_results_ : dict of arrays, a row a rate in ascending order
        "dropout", "rho", "score" (all rows together; what decides),
        "fold_scores" (rates, folds), "mean_score", "std_score"; "threshold" for
        "fbeta", else "label_scores" (rates, K).
    oof_decision_function_, oof_predict_proba_ : (n, K)
        Held-out scores at the chosen rate, on the scale of `decision_function`
        (before 1/2 is taken off for a binary target) and `predict_proba`.
    calibration_ : PlattScaling
        The map from scores to probabilities, fitted on the held-out scores.

    Notes
    -----
    Exact: each fold has its own second moments and a factorisation a rate.
    """

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
        folds, evaluate = self._plan(data)

        def calibrate(scores: np.ndarray) -> np.ndarray:
            return fit_platt(scores, data.Y, data.known, data.weight).transform(scores)

        chosen = select_dropout(evaluate, data, folds, search, calibrate)
        self.dropout_ = chosen.dropout if self.per_label else float(chosen.dropout)
        self.best_score_, self.cv_results_ = chosen.score, chosen.results
        scores = chosen.out_of_fold.margin
        self.calibration_: PlattScaling = fit_platt(scores, data.Y, data.known, data.weight)
        self.oof_decision_function_ = scores
        self.oof_predict_proba_ = self.calibration_.transform(scores)
        whole = RidgeFit(data, np.flatnonzero(data.weight > 0), self.l2, self.min_positives)
        self.coef_, self.intercept_ = whole.coefficients(rho_from_dropout(chosen.dropout))

    def _plan(self, data: TrainingSet) -> tuple[list[Fold], Callable[[float], OutOfFold]]:
        """The folds, and a function of the rate that gives held-out scores."""
        l2, every = check_l2(self.l2), np.arange(data.n_images)
        if isinstance(self.cv, str) and self.cv == "loo":
            images = np.flatnonzero(data.weight > 0)
            whole = RidgeFit(data, images, l2, self.min_positives)
            return [(every, every)], lambda dropout: OutOfFold(
                whole.held_out(float(rho_from_dropout(dropout))), None
            )
        folds = check_folds(self.cv, every, fold_targets(data), data.groups, self.random_state)
        labels = np.flatnonzero(trainable(data, every, self.min_positives))
        shared = fold_moments(data, folds, labels)
        models = [
            RidgeFit(
                data,
                train,
                l2,
                self.min_positives,
                test,
                None if moments is None else (labels, moments),
            )
            for (train, test), moments in zip(folds, shared, strict=True)
        ]

        def evaluate(dropout: float) -> OutOfFold:
            scores = np.empty((data.n_images, data.n_labels), data.dtype)
            for (_, test), model in zip(folds, models, strict=True):
                scores[test] = model.predict(float(rho_from_dropout(dropout)))
            return OutOfFold(scores, None)

        return folds, evaluate

    def _zero_margin(self) -> float:
        slope, intercept = self.calibration_.slope, self.calibration_.intercept
        return -intercept / slope if slope > 0 else 0.0

    def _probability(self, X: np.ndarray) -> np.ndarray:
        return self.calibration_.transform(self._margin(X))


def check_l2(l2: float) -> float:
    """`l2` if it is a finite number >= 0."""
    if not 0 <= l2 < np.inf:
        raise ValueError(f"l2 is {l2}; expected a finite number >= 0")
    return float(l2)
