"""What is in a blend, and how did it get there?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from heads.plots.canvas import BLUE, ORANGE, Display, named_rows

_ROWS = 30  # models that are shown


class BlendPathDisplay(Display):
    """Score after each addition of the greedy blend; the best step is the one that is kept.

    Parameters
    ----------
    score : (S,) array
        After 1, 2, ... additions.
    measure : str

    Attributes
    ----------
    line_, marker_
        What was drawn.
    """

    line_: Any
    marker_: Any

    def __init__(self, score: np.ndarray, *, measure: str = "score") -> None:
        self.score = score
        self.measure = measure

    @classmethod
    def from_estimator(cls, blend: Any, *, ax: Any = None, **line: Any) -> BlendPathDisplay:
        """Of a fitted :class:`heads.Blend`."""
        cls._check_shown(blend, "path_", "Blend")
        measure = f"mean F{blend.beta:g} per image"
        return cls(blend.path_["score"], measure=measure).plot(ax, **line)

    def plot(self, ax: Any = None, **line: Any) -> BlendPathDisplay:
        """Draw it; `line` goes to ``Axes.plot``."""
        ax = self._on(ax)
        steps = np.arange(1, len(self.score) + 1)
        (self.line_,) = ax.plot(steps, self.score, **({"color": BLUE, "marker": "."} | line))
        best = int(np.argmax(self.score))
        (self.marker_,) = ax.plot(
            steps[[best]],
            self.score[[best]],
            linestyle="",
            marker="*",
            markersize=14,
            color=ORANGE,
            label=f"kept: {self.score[best]:.3f} after {steps[best]}",
        )
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set(xlabel="models added", ylabel=self.measure)
        ax.legend()
        return self


class BlendWeightsDisplay(Display):
    """Weights of the models, the heaviest on top; 30 at most.

    Parameters
    ----------
    weights : (M,) array
    names : (M,) sequence, optional

    Attributes
    ----------
    bars_ : BarContainer
    order_ : (<= 30,) array
        Models that were drawn, from the top.
    """

    bars_: Any
    order_: np.ndarray

    def __init__(self, weights: np.ndarray, names: Sequence[str] | None = None) -> None:
        self.weights = weights
        self.names = names

    @classmethod
    def from_estimator(
        cls, blend: Any, names: Sequence[str] | None = None, *, ax: Any = None, **bars: Any
    ) -> BlendWeightsDisplay:
        """Of a fitted :class:`heads.Blend`; `names` of all its models."""
        cls._check_shown(blend, "weights_", "Blend")
        if names is not None and len(names) != len(blend.weights_):
            raise ValueError(f"{len(names)} names, but the blend has {len(blend.weights_)} models")
        return cls(blend.weights_, names).plot(ax, **bars)

    def plot(self, ax: Any = None, **bars: Any) -> BlendWeightsDisplay:
        """Draw it; `bars` goes to ``Axes.barh``."""
        self.order_ = np.argsort(-self.weights, kind="stable")[:_ROWS]
        ax = self._on(ax, 1.0 + 0.28 * len(self.order_))
        rows = np.arange(len(self.order_))
        self.bars_ = ax.barh(rows, self.weights[self.order_], **({"color": BLUE} | bars))
        names = [f"model {m}" if self.names is None else self.names[m] for m in self.order_]
        named_rows(ax, names)
        ax.set(xlabel="weight in the blend")
        return self
