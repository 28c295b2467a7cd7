"""How are matrices factorised side by side?

Wrappers in scipy.linalg hold the interpreter's lock while LAPACK works, so that threads wait
for each other, and numpy's ``eigh`` takes twice as long in float32. The same routines are called
here without the lock, at the addresses that scipy gives to Cython. Where they would take other
integers than C's ``int``, the wrappers serve.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from scipy import LowLevelCallable, linalg
from scipy.linalg import cython_lapack

_KINDS = {"f": "s", "d": "d"}  # numpy's letters and LAPACK's
_LARGE = 30_000  # rows, from which the room for eigenvectors is no `int`

_address = ctypes.pythonapi.PyCapsule_GetPointer
_address.restype, _address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def cholesky(a: np.ndarray) -> np.ndarray:
    """Lower triangle L of a = L L', whose upper triangle keeps what was there.

    Parameters
    ----------
    a : (n, n) float32 or float64
        Its lower triangle counts; overwritten if it is in Fortran's order.

    Raises
    ------
    numpy.linalg.LinAlgError
        If `a` is not positive definite.
    """
    a = np.require(a, requirements=["F", "W"])
    _refuse_oblong(a)
    if not len(a) or not _is_plain("potrf", a.dtype):
        factor: np.ndarray = linalg.cho_factor(a, lower=True, overwrite_a=True, check_finite=False)[
            0
        ]
        return factor
    _call("potrf", a.dtype, "L", len(a), a, len(a))
    return a


def cholesky_solve(factor: np.ndarray, B: np.ndarray) -> np.ndarray:
    """(L L')^-1 B, of the type of a `factor` by :func:`cholesky`; B (n, k) is left as it was."""
    factor, B = np.asfortranarray(factor), np.array(B, factor.dtype, order="F", ndmin=2)
    _refuse_oblong(factor)
    if len(B) != len(factor):
        raise ValueError(f"a system of {len(factor)} unknowns has {len(B)} right-hand rows")
    if not B.size or not _is_plain("potrs", factor.dtype):
        solved: np.ndarray = linalg.cho_solve((factor, True), B, True, check_finite=False)
        return solved
    n = len(factor)
    _call("potrs", factor.dtype, "L", n, B.shape[1], factor, n, B, n)
    return B


def eigh(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, ascending, and eigenvectors in columns of a symmetric matrix.

    Raises
    ------
    numpy.linalg.LinAlgError
        If they are not found.
    """
    vectors = np.array(a, order="F")
    _refuse_oblong(vectors)
    if not 0 < len(a) < _LARGE or not _is_plain("syevd", a.dtype):
        found: tuple[np.ndarray, np.ndarray] = np.linalg.eigh(a)
        return found
    n, values = len(a), np.empty(len(a), a.dtype)
    room, integers = np.empty(1, a.dtype), np.empty(1, np.intc)

    def call(size: int, count: int) -> None:
        job = "V", "L", n, vectors, n, values, room, size, integers, count
        _call("syevd", a.dtype, *job)

    call(-1, -1)  # asks for the room
    size, count = 1 + int(room[0] * 1.001), int(integers[0])  # float32 may have rounded it down
    room, integers = np.empty(size, a.dtype), np.empty(count, np.intc)
    call(size, count)
    return values, vectors


def _refuse_oblong(a: np.ndarray) -> None:
    if a.ndim != 2 or a.shape[0] != a.shape[1]:
        raise ValueError(f"matrix of shape {a.shape}; expected a square one")


@cache
def _is_plain(name: str, dtype: np.dtype[Any]) -> bool:
    """Whether all numbers that a routine takes are `int` and of the type."""
    if dtype.char not in _KINDS or not dtype.isnative:
        return False
    signature = _found(_KINDS[dtype.char] + name).signature
    kinds = {part.split()[0] for part in signature.partition("(")[2].split(",")}
    return len(kinds) <= 3 and {"char", "int"} <= kinds


@cache
def _found(name: str) -> Any:
    return LowLevelCallable.from_cython(cython_lapack, name)


@cache
def _routine(name: str) -> Callable[..., None]:
    """A routine of LAPACK, all of whose arguments are pointers."""
    found = _found(name)
    number = found.signature.count(",") + 1
    address = _address(found.function, found.signature.encode())
    # Of this kind ctypes releases the lock.
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * number)(address)


def _call(name: str, dtype: np.dtype[Any], *arguments: str | int | np.ndarray) -> None:
    """Call a routine of a type, with `info` as its last argument; texts are of one letter."""
    pointers: list[int] = []
    held: list[Any] = []  # until the call is over
    for value in (*arguments, 0):
        if isinstance(value, np.ndarray):
            pointers.append(value.ctypes.data)
            continue
        held.append(
            ctypes.c_char(value.encode()) if isinstance(value, str) else ctypes.c_int(value)
        )
        pointers.append(ctypes.addressof(held[-1]))
    _routine(_KINDS[dtype.char] + name)(*pointers)
    if held[-1].value:
        raise np.linalg.LinAlgError(f"LAPACK's {name} returned {held[-1].value}")
