"""Results at a glance: bars, a group for each row of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

_GUESSES = ("ratio", "times", "seconds", "ms", "F2", "images/s")
_ROWS = 40
_WIDE = 30.0  # times between the least and the greatest, from where the axis is logarithmic


def draw_bars(
    path: Path, rows: Sequence[Mapping[str, object]], title: str, bars: Sequence[str] = ()
) -> bool:
    """Write a PNG; False where matplotlib is missing or no column has numbers.

    Parameters
    ----------
    bars : sequence of str
        Columns to show; without any the first that is there of ratio, times, seconds, ms, F2.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = list(rows)[:_ROWS]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    shown = list(bars) or [c for c in _GUESSES if c in columns][:1]
    values = {c: np.array([_number(row.get(c)) for row in rows]) for c in shown}
    values = {c: v for c, v in values.items() if np.isfinite(v).any()}
    if not values:
        return False
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(rows)), layout="constrained")
    ax = figure.subplots()
    places, height = np.arange(len(rows)), 0.8 / len(values)
    for at, (column, numbers) in enumerate(values.items()):
        ax.barh(places - 0.4 + (at + 0.5) * height, numbers, 0.9 * height, label=column)
    ax.set_yticks(places, [_name(row) for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    every = np.concatenate([v[np.isfinite(v)] for v in values.values()])
    if every.min() > 0 and every.max() > _WIDE * every.min():
        ax.set_xscale("log")
    if len(values) > 1:
        ax.legend()
    else:
        ax.set_xlabel(next(iter(values)))
    ax.set_title(title, fontsize=10, loc="left", wrap=True)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    return True


def _number(value: object) -> float:
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        return float(value)
    return np.nan


def _name(row: Mapping[str, object]) -> str:
    """Columns of text up to the first number."""
    words = []
    for value in row.values():
        if not isinstance(value, str):
            break
        words.append(value)
    name = ", ".join(words[:3])
    return name if len(name) <= 60 else name[:59] + "…"
