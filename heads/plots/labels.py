"""Which labels changed: in their scores by the adaptation, in frequency between domains?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from heads.inputs import Matrix, check_truth
from heads.labeltable import LabelTable, label_table
from heads.plots.canvas import BLUE, GREEN, GREY, ORANGE, Display, named_rows, shortened

_NAME_WIDTH, _NAME_HEIGHT = 0.12, 0.05  # of the axes
_MEASURES = {"AP": "average precision", "F": "contribution to mean F{beta:g}"}


class LabelChangeDisplay(Display):
    """Each label before and after adaptation, the greatest changes both ways.

    Parameters
    ----------
    table : LabelTable
        With scores before and after; see :func:`heads.label_table`.
    measure : "AP" or "F"
        Average precision, or the contribution to the mean F-beta per image.
    max_labels : int
        That many at most: half of them from either end.
    min_count : int
        Labels with fewer images are left out: theirs change most, by chance.

    Attributes
    ----------
    shown_ : LabelTable
        The labels drawn, from the top: the greatest gain first.
    before_, after_
        Points (``Line2D``), whose x is the measure.
    """

    shown_: LabelTable
    before_: Any
    after_: Any

    def __init__(
        self, table: LabelTable, *, measure: str = "AP", max_labels: int = 30, min_count: int = 1
    ) -> None:
        self.table = table
        self.measure = measure
        self.max_labels = max_labels
        self.min_count = min_count

    @classmethod
    def from_predictions(
        cls,
        Y: Matrix,
        P_before: np.ndarray,
        P_after: np.ndarray,
        *,
        measure: str = "AP",
        max_labels: int = 30,
        min_count: int = 1,
        ax: Any = None,
        **more: Any,
    ) -> LabelChangeDisplay:
        """Of scores without and with adaptation; `more` goes to :func:`heads.label_table`."""
        table = label_table(Y, P_before, P_after, **more)
        return cls(table, measure=measure, max_labels=max_labels, min_count=min_count).plot(ax)

    def plot(self, ax: Any = None) -> LabelChangeDisplay:
        """Draw it.

        Raises
        ------
        ValueError
            If the measure is unknown, or the table has none of it before and after.
        """
        if self.measure not in _MEASURES or f"{self.measure} change" not in self.table.columns:
            raise ValueError(
                f"measure is {self.measure!r}, of a table with {', '.join(self.table.columns)}; "
                "expected 'AP' or 'F', and scores before and after"
            )
        self.shown_ = self._extremes()
        columns = self.shown_.columns
        ax = self._on(ax, 1.2 + 0.24 * len(self.shown_))
        rows = np.arange(len(self.shown_))
        before, after = columns[f"{self.measure} before"], columns[f"{self.measure} after"]
        colours = np.where(after >= before, GREEN, ORANGE)
        ax.hlines(rows, before, after, colors=colours.tolist(), linewidth=2)
        (self.before_,) = ax.plot(before, rows, "o", color=GREY, markersize=5, label="before")
        (self.after_,) = ax.plot(after, rows, "o", color=BLUE, markersize=6, label="after")
        names = columns.get("name", columns["label"])
        counts = columns["target"]
        named_rows(ax, [f"{name} ({n})" for name, n in zip(names, counts, strict=True)])
        ax.set(xlabel=_MEASURES[self.measure].format(beta=self.table.beta))
        ax.legend()
        return self

    def _extremes(self) -> LabelTable:
        """Labels with a change, sorted by it; the middle left out if there are too many."""
        table = self.table.sort(f"{self.measure} change")
        change = table.columns[f"{self.measure} change"]
        kept = np.flatnonzero(~np.isnan(change) & (table.columns["target"] >= self.min_count))
        if len(kept) > self.max_labels:
            top = (self.max_labels + 1) // 2
            kept = np.r_[kept[:top], kept[len(kept) - (self.max_labels - top) :]]
        return LabelTable({k: v[kept] for k, v in table.columns.items()}, table.beta)


class LabelShiftDisplay(Display):
    """How frequent each label is in the target, against the source.

    Parameters
    ----------
    source, target : (K,) arrays
        Share of the images with the label.
    names : (K,) sequence, optional
        Those of the greatest shifts are written beside their points, unless they would lie on
        another name.
    max_names : int

    Attributes
    ----------
    points_ : PathCollection
        A label that is in one domain only lies at half the smallest share of that domain.
    named_ : (<= max_names,) array
        Labels whose names were written.
    """

    points_: Any
    named_: np.ndarray

    def __init__(
        self,
        source: np.ndarray,
        target: np.ndarray,
        names: Sequence[str] | np.ndarray | None = None,
        *,
        max_names: int = 8,
    ) -> None:
        self.source = source
        self.target = target
        self.names = names
        self.max_names = max_names

    @classmethod
    def from_labels(
        cls,
        Y_source: Matrix,
        Y_target: Matrix,
        names: Sequence[str] | np.ndarray | None = None,
        *,
        max_names: int = 8,
        ax: Any = None,
    ) -> LabelShiftDisplay:
        """Of the true labels (m, K) and (n, K) of two domains; NaN (dense) is unknown.

        Raises
        ------
        ValueError
            If they have not the same labels.
        """
        if Y_source.shape[1] != Y_target.shape[1]:
            raise ValueError(
                f"Y_source has {Y_source.shape[1]} labels, Y_target {Y_target.shape[1]}"
            )
        shares = [_shares(Y) for Y in (Y_source, Y_target)]
        return cls(shares[0], shares[1], names, max_names=max_names).plot(ax)

    def plot(self, ax: Any = None) -> LabelShiftDisplay:
        """Draw it; labels that are in neither domain are left out."""
        ax = self._on(ax, 5.0)
        seen = np.flatnonzero((self.source > 0) | (self.target > 0))
        x, y = _lifted(self.source)[seen], _lifted(self.target)[seen]
        self.points_ = ax.scatter(x, y, color=BLUE, alpha=0.5, s=18, rasterized=len(seen) > 2000)
        # By how many standard errors frequencies differ, roughly: what is rare differs by chance.
        distance = np.abs(np.sqrt(self.source[seen]) - np.sqrt(self.target[seen]))
        order = np.argsort(-distance, kind="stable")
        count = 0 if self.names is None else self.max_names
        self.named_ = seen[_apart(np.log(np.c_[x, y]), order, count)]
        place = dict(zip(seen.tolist(), zip(x, y, strict=True), strict=True))
        for label in self.named_.tolist():
            assert self.names is not None
            ax.annotate(
                shortened(self.names[label]),
                place[label],
                xytext=(5, 3),
                textcoords="offset points",
                fontsize=9,
            )
        if len(seen):
            ends = [min(x.min(), y.min()), max(x.max(), y.max())]
            ax.plot(ends, ends, color=GREY, linestyle=":", label="as frequent in both", zorder=0)
            ax.set(xscale="log", yscale="log")
            ax.legend()
        ax.set(xlabel="share of the source's images", ylabel="share of the target's images")
        return self


def _shares(Y: Matrix) -> np.ndarray:
    """Share of the images with each label, of those where it is known."""
    truth, unknown = check_truth(Y, None)
    known = np.full(truth.shape[1], float(truth.shape[0]))
    if unknown is not None:
        known -= np.asarray(unknown.sum(axis=0)).ravel()
    return np.asarray(truth.sum(axis=0)).ravel() / np.maximum(known, 1)


def _apart(places: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """The first `count` points in that order whose names would not lie on each other."""
    span = np.ptp(places, axis=0) if len(places) else np.ones(2)
    scaled = places / np.where(span > 0, span, 1)
    kept: list[int] = []
    for point in order.tolist():
        if len(kept) == count:
            break
        away = np.abs(scaled[kept] - scaled[point])
        if not (away < (_NAME_WIDTH, _NAME_HEIGHT)).all(axis=1).any():
            kept.append(point)
    return np.array(kept, dtype=np.intp)


def _lifted(share: np.ndarray) -> np.ndarray:
    """Zeros at half the smallest share, so that they are on a logarithmic axis."""
    smallest = share[share > 0].min(initial=1.0)
    return np.where(share > 0, share, smallest / 2)
