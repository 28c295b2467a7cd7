"""What is won on which domain, and what is lost?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from heads.plots.canvas import BLUE, GREY, ORANGE, Display, named_rows, shortened


class ParetoDisplay(Display):
    """Score on the target against score on the source, one point a setting.

    Parameters
    ----------
    source_score, target_score : (S,) arrays
    efficient : (S,) bool
        Settings that no other one beats on both domains; a line joins them.
    chosen : int, optional
        Number of the setting that was taken.
    labels : (S,) sequence, optional
        Written beside the points.
    measure : str

    Attributes
    ----------
    points_, front_, marker_
        All settings (a ``PathCollection``), the line, and the one taken (or None).
    """

    points_: Any
    front_: Any
    marker_: Any

    def __init__(
        self,
        source_score: np.ndarray,
        target_score: np.ndarray,
        efficient: np.ndarray,
        *,
        chosen: int | None = None,
        labels: Sequence[object] | None = None,
        measure: str = "score",
    ) -> None:
        self.source_score = source_score
        self.target_score = target_score
        self.efficient = efficient
        self.chosen = chosen
        self.labels = labels
        self.measure = measure

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None) -> ParetoDisplay:
        """Of a fitted ``TwoDomainCV``, with the weights of the source beside, or ``Blend``."""
        cls._check_shown(estimator, "pareto_", "TwoDomainCV, or a Blend of two domains")
        table, weights = estimator.pareto_, estimator.pareto_.get("source_weight")
        beta = getattr(estimator, "estimator", estimator).beta
        return cls.from_table(
            table,
            chosen=int(np.argmax(table["chosen"])),
            labels=None if weights is None else source_weight_labels(table),
            measure=f"mean F{beta:g} per image",
            ax=ax,
        )

    @classmethod
    def from_table(
        cls,
        table: Mapping[str, Any],
        *,
        chosen: int | None = None,
        labels: Sequence[object] | None = None,
        measure: str = "score",
        ax: Any = None,
    ) -> ParetoDisplay:
        """Of a table with the columns of ``TwoDomainCV.pareto_``."""
        columns = (np.asarray(table[key]) for key in ("source_score", "target_score", "efficient"))
        return cls(*columns, chosen=chosen, labels=labels, measure=measure).plot(ax)

    def plot(self, ax: Any = None) -> ParetoDisplay:
        """Draw it."""
        ax = self._on(ax)
        x, y = self.source_score, self.target_score
        self.points_ = ax.scatter(x, y, color=GREY, zorder=2)
        front = np.flatnonzero(self.efficient)
        front = front[np.lexsort((-y[front], x[front]))]
        (self.front_,) = ax.plot(
            x[front], y[front], color=BLUE, marker="o", label="beaten by no other", zorder=3
        )
        self.marker_ = None
        if self.chosen is not None:
            (self.marker_,) = ax.plot(
                x[[self.chosen]],
                y[[self.chosen]],
                linestyle="",
                marker="*",
                markersize=15,
                color=ORANGE,
                label="chosen",
                zorder=4,
            )
        for label, *place in zip(self.labels or [], x, y, strict=bool(self.labels)):
            ax.annotate(
                shortened(label),
                tuple(place),
                xytext=(6, 6),
                textcoords="offset points",
                fontsize=9,
            )
        ax.margins(0.12)
        ax.set(xlabel=f"source: {self.measure}", ylabel=f"target: {self.measure}")
        ax.legend()
        return self


def source_weight_labels(table: Mapping[str, Any]) -> list[str]:
    """Labels of a ``TwoDomainCV.pareto_``: the weights of settings that no other beats."""
    shown = np.asarray(table["efficient"]) | np.asarray(table["chosen"])
    told = zip(table["source_weight"], shown, strict=True)
    return [f"{weight:g}" if is_shown else "" for weight, is_shown in told]


class GapDisplay(Display):
    """Share of the gap between two models that others recover, domain by domain.

    Parameters
    ----------
    gap : (M, D) array
        1 is all of it, 0 nothing; NaN is left out.
    models, domains : (M,) and (D,) sequences of names

    Attributes
    ----------
    bars_ : list of BarContainer
        One a domain; their order is that of the models.
    """

    bars_: list[Any]

    def __init__(self, gap: np.ndarray, models: Sequence[str], domains: Sequence[str]) -> None:
        self.gap = gap
        self.models = models
        self.domains = domains

    @classmethod
    def from_scores(
        cls,
        scores: Mapping[str, Mapping[str, Any]],
        *,
        lower: str,
        upper: str,
        ax: Any = None,
    ) -> GapDisplay:
        """Of mean scores: (score - lower) / (upper - lower) in each domain.

        Parameters
        ----------
        scores : mapping of model to mapping of domain to score
            A score is a number, or an array of which the mean is taken (F-beta of images).
        lower, upper : str
            The models between which the gap lies: the unadapted one and an oracle, say.

        Raises
        ------
        ValueError
            If `lower` or `upper` is no model, or they have the same score in a domain.
        """
        for name in (lower, upper):
            if name not in scores:
                raise ValueError(f"no model {name!r} in scores; there are {list(scores)}")
        domains = [domain for domain in scores[lower] if domain in scores[upper]]

        def mean(model: str, domain: str) -> float:
            values = np.asarray(scores[model].get(domain, np.nan), np.float64)
            return float(values.mean())

        for domain in domains:
            if mean(lower, domain) == mean(upper, domain):
                raise ValueError(
                    f"{lower!r} and {upper!r} have the same score in {domain!r}: no gap there"
                )
        others = [model for model in scores if model not in (lower, upper)]
        gap = [
            [(mean(m, d) - mean(lower, d)) / (mean(upper, d) - mean(lower, d)) for d in domains]
            for m in others
        ]
        return cls(np.reshape(gap, (len(others), len(domains))), others, domains).plot(ax)

    def plot(self, ax: Any = None) -> GapDisplay:
        """Draw it."""
        ax = self._on(ax, 1.4 + 0.25 * self.gap.size)
        rows = np.arange(len(self.models))
        height = 0.8 / max(len(self.domains), 1)
        self.bars_ = [
            ax.barh(
                rows - 0.4 + (j + 0.5) * height, self.gap[:, j], 0.9 * height, label=shortened(d)
            )
            for j, d in enumerate(self.domains)
        ]
        named_rows(ax, self.models)
        ax.axvline(0, color=GREY, linewidth=1)
        ax.axvline(1, color=GREY, linewidth=1, linestyle=":")
        ax.set(xlabel="share of the gap recovered")
        ax.legend()
        return self
