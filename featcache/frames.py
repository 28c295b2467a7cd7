"""Which rows and columns of a table of pandas belong to which ids and classes?

A table that names its rows or columns is taken by these names, never by place: it may be sorted or
filtered. The numbers that pandas gives by itself, and others of which none is an id, say nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from featcache.errors import InputError
from featcache.names import texts_of


def is_frame(values: Any) -> bool:
    """Whether this is a DataFrame or a Series of pandas, or acts like one. Imports no pandas."""
    return all(hasattr(values, name) for name in ("index", "iloc", "to_numpy"))


def by_row(what: str, values: Any, wanted: np.ndarray | None, kind: str = "an id") -> Any:
    """An array of the rows of a frame in the order that is `wanted`; all else as it is.

    Raises
    ------
    InputError
        If its rows have names, and one that is wanted is not among them or twice.
    """
    return _rows(what, values, wanted, kind).to_numpy() if is_frame(values) else values


def by_row_and_class(
    what: str, values: Any, ids: np.ndarray, classes: np.ndarray | None
) -> tuple[Any, np.ndarray | None]:
    """A frame in the order of ids and classes, and the classes: by default those of its columns.

    Raises
    ------
    InputError
        If its columns have names, and a class is not among them or twice; so for rows.
    """
    if not is_frame(values):
        return values, classes
    frame = _rows(what, values, ids, "an id")
    columns = getattr(frame, "columns", None)
    if columns is None:  # a Series
        named = classes is None and isinstance(frame.name, str)
        return frame, texts_of("classes", [frame.name]) if named else classes
    if classes is None:
        return frame, None if _is_default(columns) else texts_of(f"columns of {what}", columns)
    at = _places(what, "column", columns, classes, "a class")
    return (frame if at is None else frame.iloc[:, at]), classes


def numbers(frame: Any) -> np.ndarray:
    """float32, NaN where the table has nothing.

    Raises
    ------
    TypeError, ValueError
        If there is anything but numbers.
    """
    values: np.ndarray = frame.to_numpy(dtype=np.float32, na_value=np.nan)
    return values


def _rows(what: str, frame: Any, wanted: np.ndarray | None, kind: str) -> Any:
    at = None if wanted is None else _places(what, "row", frame.index, wanted, kind)
    return frame if at is None else frame.iloc[at]


def _is_default(index: Any) -> bool:
    """Whether pandas has counted: 0, 1, ..., which a file or a caller does not give as a range."""
    counted = type(index).__name__ == "RangeIndex"
    return counted and np.array_equal(index, np.arange(len(index)))


def _places(what: str, axis: str, index: Any, wanted: np.ndarray, kind: str) -> list[int] | None:
    """Where the names that are wanted are; None: all in place, or not named."""
    names = [str(name) for name in index]
    if _is_default(index) or names == wanted.tolist():
        return None
    place = {name: at for at, name in enumerate(names)}
    missing = [name for name in wanted.tolist() if name not in place]
    numbered = np.asarray(index).dtype.kind in "iu"
    if numbered and len(missing) == len(names) == len(wanted):
        return None
    remedy = f"name its {axis}s as these are, or give {what}.to_numpy() in their order"
    if missing:
        raise InputError(
            f"{what}: no {axis} is named {missing[0]!r}, as {kind} is (the first {axis} is "
            f"{names[0] if names else None!r}); {remedy}"
        )
    if len(place) < len(names):
        twice = next(name for at, name in enumerate(names) if place[name] != at)
        raise InputError(f"{what}: two {axis}s are named {twice!r}; {remedy}")
    return [place[name] for name in wanted.tolist()]
