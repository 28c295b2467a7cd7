"""Names of images, classes and views: texts, however they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from featcache.errors import InputError

Names = Sequence[str] | np.ndarray


def is_none(value: Any) -> bool:
    """None, or what tables have where nothing is: NaN of any kind, NA."""
    return value is None or (not isinstance(value, str) and str(value) in ("nan", "<NA>", "NaT"))


def texts_of(what: str, values: Names) -> np.ndarray:
    """(m,) str of texts, of their UTF-8 bytes or of numbers.

    Raises
    ------
    InputError
        If it is no list, or an entry is nothing that could be a name.
    """
    if hasattr(values, "__array__"):  # a tensor, a column, a dataset of HDF5 in one reading
        values = np.asarray(values)
    no_list = isinstance(values, str | bytes | Set | Mapping) or not hasattr(values, "__iter__")
    if no_list or getattr(values, "ndim", 1) != 1:
        raise InputError(f"{what} has shape {np.shape(values)}; give a list of names")
    if isinstance(values, np.ndarray) and values.dtype.kind not in "SOf":
        return values.astype(np.str_, copy=False)
    listed = values.tolist() if isinstance(values, np.ndarray) else list(values)
    if not all(isinstance(value, str) for value in listed):
        listed = [_text(what, row, value) for row, value in enumerate(listed)]
    if any("\0" in text for text in listed):  # NumPy drops it at the end
        row = next(row for row, text in enumerate(listed) if "\0" in text)
        raise InputError(f"{what}: number {row} is {listed[row]!r}; take the NUL out of it")
    return np.array(listed, dtype=np.str_)


def _text(what: str, row: int, value: Any) -> str:
    if is_none(value) or np.ndim(value):
        raise InputError(f"{what}: number {row} is {value}, no name")
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        raise InputError(f"{what}: number {row} is {value!r}, no UTF-8; decode it") from None
