"""Logistic heads with dropout marginalised, all labels at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from sklearn.model_selection import BaseCrossValidator

from heads.base import LinearHead
from heads.calibration import PlattScaling, fit_platt
from heads.dropout import (
    check_dropout,
    default_dropouts,
    margin_variance,
    noise_averaged_probability,
    rho_from_dropout,
)
from heads.folds import Fold, check_folds
from heads.logistic_fit import fit_logistic, warn_unconverged
from heads.logistic_folds import Paths
from heads.logistic_rows import Objective
from heads.parallel import worker_threads
from heads.selection import OutOfFold, Search, select_dropout
from heads.training import TrainingSet, fold_targets

PROBABILITIES = ("noise", "platt")
_WEAKEST_RHO = {"quadratic": 0.125, "gaussian": 1.0}


class DropoutLogistic(LinearHead):
    """Logistic regression with dropout on the features, marginalised.

    Minimises, for each label k, with W = W0 + D and mu_i = b + W x_i,

        "quadratic":  sum_i a_i loss(y_i, mu_i) + rho/2 pi (1 - pi) sum_j m_j D_j^2
        "gaussian":   sum_i a_i E loss(y_i, Normal(mu_i, rho sum_j x_ij^2 D_j^2))

    plus l2/2 |D|^2, where loss(y, t) = log(1 + exp t) - y t, rho = p / (1 - p),
    m_j = sum_i a_i x_ij^2 and pi is the base rate sum_i a_i y_i / sum_i a_i. W0, b0
    are the `coef_init`, `intercept_init` of `fit`, or zero: an offset of the
    margin. Both are convex.

    Parameters
    ----------
    dropout : float
        Rate p in [0, 1). At 0 with l2 = 0 separable labels have no minimum.
    l2 : float
        Ridge penalty on D; with dropout 0 and no W0 this is scikit-learn's
        ``LogisticRegression(C=1/l2)`` of each label.
    noise : "quadratic" or "gaussian"
        The first is the expansion of Wager, Wang and Liang (2013) with the
        curvature s (1 - s) frozen at the base rate: ridge-penalised in rescaled
        features, and quick. The second is the normal approximation of Wang and
        Manning (2013): nearer to dropout for frequent labels, and far slower for
        rare ones, on which it hardly acts once they are separated.
    min_positives : int
        A label with fewer positive training images, or of one class, keeps W0
        and takes one bias shift shared by all such labels, which matches their
        number of positives (plus 1/2); without W0 and b0 its bias is
        logit((n_pos + 1/2) / (n + 1)).
    tol : float
        A label stops where g' H g / 2, an estimate of what is left to gain (H that
        of the inverse Hessian), is below `tol` times its loss at the base rate.
    max_iter : int
        Most gradients a label may take.

    Attributes
    ----------
    coef_ : (K, d), intercept_ : (K,)
        float64 if X is, else float32.
    classes_ : (K,) label numbers (0 and 1 of one column), or the two values of a binary target
    coef_init_ : (K, d) or None
        W0 of the fit.
    dropout_ : float
        The rate of the fit.
    n_iter_ : (K,) int
        Gradients each label took; 1 for rare labels, which have a formula.
    n_features_in_ : int

    Notes
    -----
    `predict_proba` averages the noise: sigma(mu / sqrt(1 + pi v / 8)), pi the circle's
    here and v = rho sum_j x_j^2 D_j^2; the plain sigma(mu) is overconfident. It is
    no monotone function of `decision_function` over images.

    A feature that is zero in all training rows keeps D = 0. Unknown targets are
    left out label by label, at the cost of one set of coordinates for each
    pattern of known images.
    """

    def __init__(
        self,
        dropout: float = 0.5,
        l2: float = 0.0,
        noise: str = "quadratic",
        min_positives: int = 1,
        tol: float = 1e-6,
        max_iter: int = 500,
    ) -> None:
        self.dropout = dropout
        self.l2 = l2
        self.noise = noise
        self.min_positives = min_positives
        self.tol = tol
        self.max_iter = max_iter

    def _fit(self, data: TrainingSet) -> None:
        objective = Objective.checked(
            self.noise, self.l2, self.min_positives, self.tol, self.max_iter
        )
        self.dropout_ = check_dropout(self.dropout)
        self.coef_, self.intercept_, self.n_iter_ = fit_logistic(
            data, objective, np.asarray(self.dropout_)
        )

    def _probability(self, X: np.ndarray) -> np.ndarray:
        return _probability(self, X)


class DropoutLogisticCV(LinearHead):
    """`DropoutLogistic` at the rate that is best out of fold.

    Parameters
    ----------
    dropouts : rates in [0, 1), optional
        Solved from the largest down, each from the last. A grid of several rates
        grows by up to four where the best is at an end. Default: ten rates with
        rho from 1/8 on, and from 1 on for "gaussian" noise, whose penalty fades
        with the loss so that weak rates are slow and fit too closely.
    l2, noise, min_positives, max_iter
        See `DropoutLogistic`; `min_positives` counts the training images of each
        fold anew.
    tol : float
        As of `DropoutLogistic`, in the folds; the fit on all rows, which starts
        from the mean of theirs, goes on to tol / 10. At the default, 1,000 images
        had out-of-fold log-losses within 2e-5 of the optimum's for quadratic noise,
        five frequent labels within 1.2e-4. Weak Gaussian noise leaves
        labels that are nearly separated all but unpenalised: there their losses
        depend on where the solver stops, by up to 1e-3.
    cv : int, splitter or iterable of (train, test)
        An int stands for that many folds of `MultilabelGroupKFold`.
    scoring : "fbeta", "average_precision", "log_loss" or "mse"
        Of the noise-averaged probabilities: the mean F-beta per image at the best
        global threshold over all out-of-fold rows; the average precision of each
        label in each fold, a mean over folds, then labels, with positives; or a
        mean over known targets.
    beta : float
    per_label : bool
        Each label takes the rate that is best for it; not with "fbeta".
    random_state : int
        Seed of the folds if `cv` is an int.
    probability : "noise" or "platt"
        "noise": averaged over the noise, as of `DropoutLogistic`. "platt": Platt-scaled margins,
        the map fitted on held-out ones, as of `DropoutRidgeCV`. Their logits are affine in the
        features, so that many heads whose logits are averaged are one matrix at prediction.

    Attributes
    ----------
    coef_, intercept_, classes_, coef_init_, n_iter_, n_features_in_
        Of the fit on all rows; see `DropoutLogistic`.
    dropout_ : float, or (K,) with `per_label`
    best_score_ : float
        In the sign of `scoring`: larger is better for "fbeta", "average_precision".
    cv_results_ : dict of arrays, a row a rate in ascending order
        "dropout", "rho", "score" (what decides, but in TwoDomainCV: of all rows together, but for
        average precision),
        "fold_scores" (rates, folds), "mean_score", "std_score"; "threshold" for
        "fbeta", else "label_scores" (rates, K).
    oof_decision_function_, oof_predict_proba_ : (n, K)
        Held-out scores at the chosen rate, on the scales of `decision_function`
        (before a binary target's is set to 0 where both values are as likely, with
        "platt" probabilities) and `predict_proba`.
    calibration_ : PlattScaling
        With "platt" probabilities only; of slope >= 0, as of `DropoutRidgeCV`. Where it is 0,
        a binary target's `decision_function` is the plain margin.

    Examples
    --------
    From a network's last layer W0, b0, which the new place has changed a little:

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> W0, b0 = rng.normal(size=(3, 20)), np.zeros(3)
    >>> X = rng.normal(size=(200, 20))
    >>> Y = X @ (W0 + rng.normal(size=(3, 20))).T + 2 * rng.normal(size=(200, 3)) > 0
    >>> head = DropoutLogisticCV(dropouts=(0.05, 0.2, 0.4, 0.6, 0.8), scoring="log_loss")
    >>> head = head.fit(X, Y, coef_init=W0, intercept_init=b0)
    >>> float(round(head.dropout_, 2))
    0.05
    >>> head.oof_predict_proba_.shape
    (200, 3)
    """

    _single = DropoutLogistic

    def __init__(
        self,
        dropouts: Iterable[float] | None = None,
        l2: float = 0.0,
        noise: str = "quadratic",
        cv: int | BaseCrossValidator | Iterable[Fold] = 5,
        scoring: str = "fbeta",
        beta: float = 2,
        min_positives: int = 1,
        per_label: bool = False,
        tol: float = 2e-5,
        max_iter: int = 500,
        random_state: int = 0,
        probability: str = "noise",
    ) -> None:
        self.dropouts = dropouts
        self.l2 = l2
        self.noise = noise
        self.cv = cv
        self.scoring = scoring
        self.beta = beta
        self.min_positives = min_positives
        self.per_label = per_label
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state
        self.probability = probability

    def _fit(self, data: TrainingSet) -> None:
        objective = Objective.checked(
            self.noise, self.l2, self.min_positives, self.tol, self.max_iter
        )
        if self.probability not in PROBABILITIES:
            raise ValueError(f"probability is {self.probability!r}; expected noise or platt")
        dropouts = self.dropouts
        if dropouts is None:
            dropouts = default_dropouts(_WEAKEST_RHO[objective.noise])
        search = Search.checked(dropouts, self.scoring, self.beta, self.per_label)
        if isinstance(self.cv, str):
            raise ValueError(
                f"cv is {self.cv!r}; a logistic head has no closed form for one image left out: "
                "give a number of folds, a splitter or (train, test) pairs"
            )
        every = np.arange(data.n_images)
        folds = check_folds(
            self.cv, every, fold_targets(data, self._binary), data.groups, self.random_state
        )

        def scaling(margin: np.ndarray) -> PlattScaling:
            return fit_platt(margin, data.Y, data.known, data.weight, rising=True)

        def probability(oof: OutOfFold) -> np.ndarray:
            if self.probability == "platt" or oof.probability is None:
                return scaling(oof.margin).transform(oof.margin)
            return oof.probability

        with worker_threads() as run:
            paths = Paths(data, folds, objective, run)
            paths.follow(search.dropouts[::-1])
            chosen = select_dropout(
                paths.take, data, folds, search, judge=self._judged(probability)
            )
        self.dropout_ = chosen.dropout if self.per_label else float(chosen.dropout)
        self.best_score_, self.cv_results_ = chosen.score, chosen.results
        self.oof_decision_function_ = chosen.out_of_fold.margin
        self.oof_predict_proba_ = probability(chosen.out_of_fold)
        if hasattr(self, "calibration_"):  # of a fit with other parameters
            del self.calibration_
        if self.probability == "platt":
            self.calibration_: PlattScaling = scaling(self.oof_decision_function_)
        warn_unconverged(paths.failed, objective, stacklevel=4, where=" at some rate of a fold")
        self.coef_, self.intercept_, self.n_iter_ = fit_logistic(
            data,
            replace(objective, tol=self.tol / 10),
            chosen.dropout,
            chosen.out_of_fold.start,
            paths.axes,
        )

    def _probability(self, X: np.ndarray) -> np.ndarray:
        if self.probability == "platt":
            return self.calibration_.transform(self._margin(X))
        return _probability(self, X)


def _probability(head: DropoutLogistic | DropoutLogisticCV, X: np.ndarray) -> np.ndarray:
    """Noise-averaged probabilities (n, K); the noise acts on what was trained."""
    change = head.coef_ if head.coef_init_ is None else head.coef_ - head.coef_init_
    variance = margin_variance(X, change, rho_from_dropout(head.dropout_))
    return noise_averaged_probability(X @ head.coef_.T + head.intercept_, variance)
