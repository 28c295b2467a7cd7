"""Results at a glance: bars, a group for each row of a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

_GUESSES = ("ratio", "times", "seconds", "ms", "F2", "images/s")
_NUMBER = r"([-+]?[0-9]+(?:\.[0-9]*)?(?:e[-+]?[0-9]+)?)"
_INTERVAL = re.compile(rf"{_NUMBER}(?: \[{_NUMBER}, {_NUMBER}\])?")
_ROWS = 40
_WIDE = 30.0  # times between the least and the greatest, from where the axis is logarithmic


def draw_bars(
    path: Path, rows: Sequence[Mapping[str, object]], title: str, bars: Sequence[str] = ()
) -> bool:
    """Write a PNG; False where matplotlib is missing or no column has numbers.

    Parameters
    ----------
    bars : sequence of str
        Columns to show; without any the first that is there of ratio, times, seconds, ms, F2,
        else the last one of numbers. Cells are numbers, also as text, and "value [low, high]".
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = list(rows)[:_ROWS]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = {c: np.array([_numbers(row.get(c)) for row in rows]) for c in columns}
    found = [c for c in columns if np.isfinite(cells[c][:, 0]).any()]
    shown = list(bars) or [c for c in _GUESSES if c in found][:1] or found[-1:]
    values = {c: cells[c][:, 0] for c in shown if c in found}
    if not values:
        return False
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(rows)), layout="constrained")
    ax = figure.subplots()
    places, height = np.arange(len(rows)), 0.8 / len(values)
    for at, (column, numbers) in enumerate(values.items()):
        spread = np.abs(cells[column][:, 1:].T - numbers)
        marks = {"xerr": spread, "ecolor": "0.3"} if np.isfinite(spread).any() else {}
        ax.barh(places - 0.4 + (at + 0.5) * height, numbers, 0.9 * height, label=column, **marks)
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


def _numbers(value: object) -> tuple[float, float, float]:
    """Value, low, high; NaN for what a cell does not say."""
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        return float(value), np.nan, np.nan
    found = _INTERVAL.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return np.nan, np.nan, np.nan
    number, low, high = (float(part) if part else np.nan for part in found.groups())
    return number, low, high


def _name(row: Mapping[str, object]) -> str:
    """Columns of text up to the first number."""
    words = []
    for value in row.values():
        if not isinstance(value, str) or np.isfinite(_numbers(value)[0]):
            break
        words.append(value)
    name = ", ".join(words[:3])
    return name if len(name) <= 60 else name[:59] + "…"
