"""Why that dropout rate, and why that cut?"""

from __future__ import annotations

from typing import Any

import numpy as np

from heads.cuts import threshold_curve
from heads.inputs import Matrix
from heads.plots.canvas import BLUE, ORANGE, Display, shortened

_POINTS = 1000  # of a curve; more are not seen
_LEAST = 1e-3  # of the cut, where the axis begins
_MEASURES = {
    "fbeta": "mean F{beta:g} per image",
    "average_precision": "mean average precision",
    "log_loss": "log-loss (less is better)",
    "mse": "squared error (less is better)",
}


class DropoutDisplay(Display):
    """Out-of-fold score against the dropout rate, with the spread of the folds.

    Parameters
    ----------
    dropout : (R,) array
        Rates, ascending.
    score : (R,) array
        Of all out-of-fold rows together.
    fold_scores : (R, F) array
        Of each fold; the band reaches one standard deviation to either side of the folds' mean.
    chosen : float, optional
        The rate that was taken; None if each label has its own.
    measure : str
        What the score is; the label of the y axis.
    name : str, optional
        For the legend.

    Attributes
    ----------
    line_, band_, marker_
        What was drawn; ``marker_`` is None without a chosen rate.
    """

    line_: Any
    band_: Any
    marker_: Any

    def __init__(
        self,
        dropout: np.ndarray,
        score: np.ndarray,
        fold_scores: np.ndarray,
        *,
        chosen: float | None = None,
        measure: str = "score",
        name: str | None = None,
    ) -> None:
        self.dropout = dropout
        self.score = score
        self.fold_scores = fold_scores
        self.chosen = chosen
        self.measure = measure
        self.name = name

    @classmethod
    def from_estimator(
        cls, estimator: Any, *, ax: Any = None, name: str | None = None, **line: Any
    ) -> DropoutDisplay:
        """Of a fitted ``DropoutLogisticCV``, ``DropoutRidgeCV`` or ``TwoDomainCV``."""
        estimator = getattr(estimator, "estimator_", estimator)
        cls._check_shown(
            estimator, "cv_results_", "DropoutLogisticCV, DropoutRidgeCV or TwoDomainCV"
        )
        table, rate = estimator.cv_results_, estimator.dropout_
        display = cls(
            table["dropout"],
            table["score"],
            table["fold_scores"],
            chosen=float(rate) if np.ndim(rate) == 0 else None,
            measure=_MEASURES[estimator.scoring].format(beta=estimator.beta),
            name=name,
        )
        return display.plot(ax, **line)

    def plot(self, ax: Any = None, *, name: str | None = None, **line: Any) -> DropoutDisplay:
        """Draw it; `line` goes to ``Axes.plot``."""
        ax = self._on(ax)
        name = self.name if name is None else name
        style = {
            "color": BLUE,
            "marker": "o",
            "label": shortened(name or "all images together"),
        } | line
        (self.line_,) = ax.plot(self.dropout, self.score, **style)
        mean, spread = np.nanmean(self.fold_scores, 1), np.nanstd(self.fold_scores, 1)
        self.band_ = ax.fill_between(
            self.dropout,
            mean - spread,
            mean + spread,
            color=self.line_.get_color(),
            alpha=0.18,
            linewidth=0,
            label="folds, mean ± standard deviation",
        )
        self.marker_ = None
        if self.chosen is not None:
            at = int(np.argmin(np.abs(self.dropout - self.chosen)))
            (self.marker_,) = ax.plot(
                self.dropout[at : at + 1],
                self.score[at : at + 1],
                linestyle="",
                marker="*",
                markersize=14,
                color=ORANGE,
                label=f"chosen: {self.chosen:.3g}",
            )
        ax.set(xlabel="dropout rate", ylabel=f"out-of-fold {self.measure}")
        ax.legend()
        return self


class ThresholdDisplay(Display):
    """Mean F-beta per image against the cut, with the best one.

    Parameters
    ----------
    threshold : (C,) array
        Cuts, ascending.
    score : (C,) array
        Where labels with score >= threshold are taken.
    chosen : float
        The cut that is used.
    chosen_score : float
        The score there.
    beta : float
    name : str, optional
        For the legend.

    Attributes
    ----------
    line_, marker_
        What was drawn.
    """

    line_: Any
    marker_: Any

    def __init__(
        self,
        threshold: np.ndarray,
        score: np.ndarray,
        *,
        chosen: float,
        chosen_score: float,
        beta: float = 2,
        name: str | None = None,
    ) -> None:
        self.threshold = threshold
        self.score = score
        self.chosen = chosen
        self.chosen_score = chosen_score
        self.beta = beta
        self.name = name

    @classmethod
    def from_predictions(
        cls,
        Y: Matrix,
        P: np.ndarray,
        *,
        beta: float = 2,
        threshold: float | None = None,
        mask: Matrix | None = None,
        missed: np.ndarray | None = None,
        ax: Any = None,
        name: str | None = None,
        **line: Any,
    ) -> ThresholdDisplay:
        """Of scores P (n, K) and what is true; `threshold` None: the best cut.

        Of more than 1,000 cuts those are drawn that lie about evenly on the axis; the best is
        always one of them.
        """
        cuts, scores = threshold_curve(P, Y, beta, mask, missed=missed)
        cuts, scores = cuts[::-1].astype(np.float64), scores[::-1]  # ascending, infinity last
        best = int(np.argmax(scores))
        # Labels above a threshold are those at the next cut or above.
        at = best if threshold is None else int(np.searchsorted(cuts, threshold))
        chosen = cuts[at] if threshold is None else threshold
        drawn = _evenly(cuts, best)
        display = cls(
            cuts[drawn],
            scores[drawn],
            chosen=float(chosen),
            chosen_score=float(scores[at]),
            beta=beta,
            name=name,
        )
        return display.plot(ax, **line)

    @classmethod
    def from_estimator(
        cls, rule: Any, P: Any, Y: Matrix, *, ax: Any = None, **more: Any
    ) -> ThresholdDisplay:
        """The cut of a fitted ``GlobalThreshold`` or ``Blend`` on scores P.

        P is what the rule predicts from: scores (n, K), of a blend those of all models.
        `more` goes to :meth:`from_predictions`.
        """
        cls._check_shown(rule, "threshold_", "GlobalThreshold or Blend")
        blended = rule.predict_proba(P) if hasattr(rule, "weights_") else P
        return cls.from_predictions(
            Y, blended, beta=rule.beta, threshold=rule.threshold_, ax=ax, **more
        )

    def plot(self, ax: Any = None, *, name: str | None = None, **line: Any) -> ThresholdDisplay:
        """Draw it; `line` goes to ``Axes.plot``."""
        ax = self._on(ax)
        name = self.name if name is None else name
        best = f"{self.chosen_score:.3f} at {self.chosen:.3g}"
        label = f"{shortened(name)}: {best}" if name else "each cut"
        style = {"color": BLUE, "drawstyle": "steps-pre", "label": label} | line
        shown = self.threshold >= self._least()
        (self.line_,) = ax.plot(self.threshold[shown], self.score[shown], **style)
        (self.marker_,) = ax.plot(
            [self.chosen],
            [self.chosen_score],
            linestyle="",
            marker="*",
            markersize=14,
            color=ORANGE,
            label="_" if name else best,
        )
        if self._logarithmic():
            ax.set_xscale("log")
        ax.set(xlabel="cut", ylabel=_MEASURES["fbeta"].format(beta=self.beta))
        ax.legend()
        return self

    def _logarithmic(self) -> bool:
        return len(self.threshold) > 0 and bool(self.threshold[0] > 0)

    def _least(self) -> float:
        """Where the axis begins: cuts far below the chosen one take nearly every label."""
        limited = self._logarithmic() and np.isfinite(self.chosen)
        return _LEAST * self.chosen if limited else -np.inf


def _evenly(cuts: np.ndarray, best: int) -> np.ndarray:
    """Which of ascending cuts are drawn: all finite ones, or some that lie evenly on the axis."""
    finite = cuts[np.isfinite(cuts)]
    if len(finite) <= _POINTS:
        return np.arange(len(finite))
    space = np.geomspace if finite[0] > 0 else np.linspace
    near = np.searchsorted(finite, space(finite[0], finite[-1], _POINTS))
    wanted = np.r_[0, near, len(finite) - 1, min(best, len(finite) - 1)]
    return np.unique(np.minimum(wanted, len(finite) - 1))
