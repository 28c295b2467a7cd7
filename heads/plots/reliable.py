"""Do probabilities hold what they promise?"""

from __future__ import annotations

from typing import Any

import numpy as np

from heads.calibration import Reliability, reliability
from heads.inputs import Matrix
from heads.plots.canvas import BLUE, GREY, Display, shortened


class ReliabilityDisplay(Display):
    """How often labels are true, against the probability that was given to them.

    Parameters
    ----------
    bins : Reliability
        See :func:`heads.reliability`.
    name : str, optional
        For the legend.

    Attributes
    ----------
    line_, ideal_
        The line with its 95 % intervals (an ``ErrorbarContainer``), and the diagonal.
    """

    line_: Any
    ideal_: Any

    def __init__(self, bins: Reliability, *, name: str | None = None) -> None:
        self.bins = bins
        self.name = name

    @classmethod
    def from_predictions(
        cls,
        Y: Matrix,
        P: np.ndarray,
        *,
        n_bins: int = 10,
        mask: Matrix | None = None,
        ax: Any = None,
        name: str | None = None,
        **line: Any,
    ) -> ReliabilityDisplay:
        """Of probabilities P (n, K) and what is true."""
        return cls(reliability(P, Y, n_bins, mask), name=name).plot(ax, **line)

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any, Y: Matrix, *, ax: Any = None, **more: Any
    ) -> ReliabilityDisplay:
        """Of what a fitted head says of X; `more` goes to :meth:`from_predictions`."""
        return cls.from_predictions(Y, estimator.predict_proba(X), ax=ax, **more)

    def plot(self, ax: Any = None, *, name: str | None = None, **line: Any) -> ReliabilityDisplay:
        """Draw it; `line` goes to ``Axes.errorbar``."""
        ax = self._on(ax)
        name = self.name if name is None else name
        bins = self.bins
        # Wilson's interval holds the share itself; rounding may put it a hair outside.
        arms = np.maximum([bins.observed - bins.low, bins.high - bins.observed], 0)
        style = {
            "color": BLUE,
            "marker": "o",
            "label": shortened(name or "bins, 95 % interval"),
        } | line
        self.line_ = ax.errorbar(bins.predicted, bins.observed, yerr=arms, **style)
        ideal = "as frequent as said"
        named = ideal not in ax.get_legend_handles_labels()[1]  # another display may be here
        (self.ideal_,) = ax.plot(
            [0, 1], [0, 1], color=GREY, linestyle=":", label=ideal if named else "_", zorder=0
        )
        ax.set(xlabel="mean probability", ylabel="share that is true")
        ax.set(xlim=(0, 1), ylim=(0, 1))
        ax.legend()
        return self
