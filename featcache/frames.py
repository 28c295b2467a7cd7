"""Which rows and columns of a table of pandas belong to which ids and classes?

A table that names its rows or columns is taken by these names, never by place: it may be sorted or
filtered. Numbers that are no ids are what pandas gives rows by itself, and say nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from featcache.errors import InputError
from featcache.names import texts_of


def is_frame(values: Any) -> bool:
    """Whether this is a DataFrame or a Series of pandas, or acts like one. Imports no pandas."""
    return all(hasattr(values, name) for name in ("index", "iloc", "to_numpy"))


def by_id(what: str, frame: Any, ids: np.ndarray) -> Any:
    """The rows of a frame in the order of the ids.

    Raises
    ------
    InputError
        If its rows have names, and an id is not among them or twice.
    """
    at = _places(what, "row", frame.index, ids)
    return frame if at is None else frame.iloc[at]


def by_class(what: str, frame: Any, classes: np.ndarray | None) -> tuple[Any, np.ndarray | None]:
    """The columns of a frame in the order of the classes, and the classes: by default its own.

    Raises
    ------
    InputError
        If its columns have names, and a class is not among them or twice.
    """
    columns = getattr(frame, "columns", None)
    if columns is None or (classes is None and _is_default(columns)):
        return frame, classes
    if classes is None:
        return frame, texts_of(f"columns of {what}", columns)
    at = _places(what, "column", columns, classes)
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


def _is_default(index: Any) -> bool:
    return np.asarray(index).dtype.kind in "iu" and np.array_equal(index, np.arange(len(index)))


def _places(what: str, axis: str, index: Any, wanted: np.ndarray) -> list[int] | None:
    """Where the names that are wanted are; None: all in place, or not named."""
    names = [str(name) for name in index]
    if _is_default(index) or names == wanted.tolist():
        return None
    place = {name: at for at, name in enumerate(names)}
    missing = [name for name in wanted.tolist() if name not in place]
    if missing and np.asarray(index).dtype.kind in "iu" and len(names) == len(wanted):
        return None
    remedy = f"name its {axis}s as these are, or give {what}.to_numpy() in their order"
    kind = "id" if axis == "row" else "class"
    if missing:
        raise InputError(
            f"{what}: no {axis} is named {missing[0]!r}, as a {kind} is (the first {axis} is "
            f"{names[0] if names else None!r}); {remedy}"
        )
    if len(place) < len(names):
        twice = next(name for at, name in enumerate(names) if place[name] != at)
        raise InputError(f"{what}: two {axis}s are named {twice!r}; {remedy}")
    return [place[name] for name in wanted.tolist()]
