"""What scores, truth, masks and weights must look like; they are refused or made uniform here.

Truth Y is (n, K), dense or sparse, {0, 1}. An entry is unknown where `mask` is
True (as in numpy.ma), a dense Y is NaN, or a masked array of numpy.ma is masked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, TypeAlias, TypeVar

import numpy as np
from scipy.sparse import csr_matrix, issparse

from featcache.names import is_none

Matrix: TypeAlias = "np.ndarray | csr_matrix"
SomeRows = TypeVar("SomeRows", bound="LabelledRows")

_BLOCK = 1 << 20  # scores that are looked at at once
_MOST_BETA = 1e100  # its square is finite


def check_scores(P: np.ndarray, name: str = "P") -> np.ndarray:
    """P as a dense, finite, floating (n, K) array; never copied if it is one already.

    Raises
    ------
    ValueError
        Naming row and label of the first score that is NaN or infinite.
    """
    P = _floating(P, name)
    step = max(1, _BLOCK // max(1, P.shape[1]))
    for start in range(0, len(P), step):
        finite = _finite(P[start : start + step])
        if not finite.all():
            row, label = np.argwhere(~finite)[0]
            row += start
            raise ValueError(
                f"{name} is {P[row, label]} at row {row}, label {label}; scores must be finite"
            )
    return P


def check_probabilities(P: np.ndarray, name: str = "P") -> np.ndarray:
    """:func:`check_scores` of scores that must be in [0, 1].

    Raises
    ------
    ValueError
        Naming row and label of the first score that is not.
    """
    P = _floating(P, name)
    step = max(1, _BLOCK // max(1, P.shape[1]))
    for start in range(0, len(P), step):
        if not _within_0_1(P[start : start + step]):
            check_scores(P, name)
            row, label = np.argwhere((P < 0) | (P > 1))[0]
            raise ValueError(
                f"{name} is {P[row, label]} at row {row}, label {label}; "
                "expected probabilities in [0, 1]"
            )
    return P


def _within_0_1(P: np.ndarray) -> bool:
    """Whether all scores are in [0, 1]; false where one is NaN."""
    if not P.size:
        return True
    if P.dtype == np.float16:  # bits of positive floats ascend with them; quicker by far
        bits = P.view(np.int16)
        if bits.min() >= 0 and bits.max() <= np.float16(1).view(np.int16):
            return True
    return bool(P.min() >= 0 and P.max() <= 1)


def _floating(P: np.ndarray, name: str) -> np.ndarray:
    if issparse(P):
        raise ValueError(f"{name} is sparse; give dense scores of shape (n, K)")
    P = np.asarray(P)
    if P.dtype not in (np.float16, np.float32, np.float64):
        P = P.astype(np.float64)
    if P.ndim != 2:
        raise ValueError(f"{name} has shape {P.shape}; expected (n, K)")
    return P


def _finite(P: np.ndarray) -> np.ndarray:
    if P.dtype == np.float16:  # all bits of the exponent set; numpy's own test is slow
        exponent: np.ndarray = (P.view(np.uint16) & np.uint16(0x7C00)) != 0x7C00
        return exponent
    return np.isfinite(P)


def check_truth(
    Y: Matrix | None,
    mask: Matrix | None,
    shape: tuple[int, int] | None = None,
    soft: bool = False,
    learns: bool = False,
) -> tuple[csr_matrix, Matrix | None]:
    """Known positives as CSR, and which entries are unknown (None: none).

    Parameters
    ----------
    Y : (n, K), dense or sparse
        Truth in {0, 1}, or in [0, 1] if `soft`; NaN (dense) or masked (numpy.ma) is unknown.
    mask : (n, K), dense or sparse, or None
        True where the entry is unknown.
    shape : (int, int), optional
        What the shape of Y must be.
    soft : bool
        Whether targets between 0 and 1 are allowed.
    learns : bool
        Whether something is learnt, from one known entry at least.

    Returns
    -------
    Y : csr_matrix of shape (n, K), float64
        Without explicit zeros and unknown entries; sorted indices.
    unknown : ndarray or csr_matrix of shape (n, K), bool, or None
    """
    if Y is None:
        raise ValueError("Y is None; give the true labels, (n, K)")
    unknown = None if mask is None else check_boolean(mask, "mask")
    if not issparse(Y):
        Y, missing = split_masked(Y)
        if Y.ndim != 2:
            raise ValueError(f"Y has shape {Y.shape}; expected (n, K)")
        if Y.dtype.kind == "f" and (nan := np.isnan(Y)).any():
            missing = nan if missing is None else missing | nan
        if missing is not None:
            unknown = _either(missing, unknown)
            Y = np.where(missing, 0, Y)
    if shape is not None and Y.shape != shape:
        raise ValueError(f"Y has shape {Y.shape}, but the scores have shape {shape}")
    if unknown is not None and unknown.shape != Y.shape:
        raise ValueError(f"mask has shape {unknown.shape}, but Y has shape {Y.shape}")
    if learns:
        refuse_all_unknown(unknown, Y.shape)
    truth = csr_matrix(Y, dtype=np.float64)
    if not truth.has_canonical_format or np.any(truth.data == 0):
        truth = truth.copy()
        truth.sum_duplicates()
        truth.eliminate_zeros()
    wrong = ~((truth.data > 0) & (truth.data <= 1)) if soft else truth.data != 1
    if wrong.any():
        row, label = (axis[wrong.argmax()] for axis in truth.nonzero())
        expected = "[0, 1]" if soft else "{0, 1}"
        raise ValueError(
            f"Y is {truth.data[wrong.argmax()]} at row {row}, label {label}; expected {expected}"
        )
    return without(truth, unknown), unknown


def split_masked(Y: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Y as an array, and where it is masked if it is a masked array of numpy.ma; None: nowhere.

    Its masked entries are as unknown as those of `mask`; numpy's own conversion drops them.
    """
    return np.asarray(Y), np.ma.getmaskarray(Y) if np.ma.is_masked(Y) else None


def without(matrix: csr_matrix, unknown: Matrix | None) -> csr_matrix:
    """The matrix with unknown entries taken out of its pattern; sorted indices."""
    if unknown is None:
        return matrix
    if isinstance(unknown, np.ndarray):
        kept = csr_matrix(matrix.multiply(~unknown))
    else:
        kept = csr_matrix(matrix - matrix.multiply(unknown))
    kept.eliminate_zeros()
    kept.sort_indices()
    return kept


def refuse_all_unknown(unknown: Matrix | None, shape: tuple[int, int]) -> None:
    """Nothing is learnt from no truth, though every score of it is perfect.

    Raises
    ------
    ValueError
        If each entry is unknown.
    """
    if unknown is not None and unknown.sum() == shape[0] * shape[1]:
        raise ValueError(
            "no entry of Y is known; give at least one label (mask is True where one is unknown)"
        )


def check_boolean(matrix: Matrix, name: str) -> Matrix:
    """A matrix (n, K) as bool: CSR if it is sparse, else an array.

    Raises
    ------
    ValueError
        Naming row and label of the first entry that is neither 0 nor 1, as scores would be.
    """
    if issparse(matrix):
        csr = csr_matrix(matrix)
        if (wrong := (csr.data != 0) & (csr.data != 1)).any():
            at = wrong.argmax()
            row, label = (axis[at] for axis in _places(csr))
            raise ValueError(_neither(name, csr.data[at], row, label))
        csr = csr_matrix(csr, dtype=bool, copy=True)
        csr.sum_duplicates()
        csr.eliminate_zeros()
        return csr
    matrix = np.asarray(matrix)
    if matrix.ndim != 2:
        raise ValueError(f"{name} has shape {matrix.shape}; expected (n, K)")
    if matrix.dtype != bool and (wrong := (matrix != 0) & (matrix != 1)).any():
        row, label = np.argwhere(wrong)[0]
        raise ValueError(_neither(name, matrix[row, label], row, label))
    return matrix.astype(bool, copy=False)


def _neither(name: str, value: object, row: int, label: int) -> str:
    return f"{name} is {value} at row {row}, label {label}; expected True or False"


def _places(csr: csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the stored entries, in their order."""
    return np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr)), csr.indices


def _either(missing: np.ndarray, mask: Matrix | None) -> np.ndarray:
    if mask is None:
        return missing
    if mask.shape != missing.shape:
        raise ValueError(f"mask has shape {mask.shape}, but Y has shape {missing.shape}")
    return missing | (mask if isinstance(mask, np.ndarray) else mask.toarray())


def check_weights(sample_weight: np.ndarray | None, n: int) -> np.ndarray:
    """Sample weights as (n,) float64, ones if None; negative, NaN or all zero is refused."""
    if sample_weight is None:
        return np.ones(n)
    weights = np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != (n,):
        raise ValueError(f"sample_weight has shape {weights.shape}; expected ({n},)")
    bad = ~(np.isfinite(weights) & (weights >= 0))
    if bad.any():
        row = bad.argmax()
        raise ValueError(f"sample_weight is {weights[row]} at row {row}; expected finite, >= 0")
    if n and not weights.any():
        raise ValueError("sample_weight is zero everywhere; give at least one row a weight")
    return weights


def check_missed(missed: np.ndarray | None, n: int) -> np.ndarray:
    """Counts of true labels outside the classes as (n,) float64, zeros if None."""
    if missed is None:
        return np.zeros(n)
    counts = np.asarray(missed, dtype=np.float64)
    if counts.shape != (n,):
        raise ValueError(f"missed has shape {counts.shape}; expected ({n},)")
    bad = ~(np.isfinite(counts) & (counts >= 0))
    if bad.any():
        row = bad.argmax()
        raise ValueError(f"missed is {counts[row]} at row {row}; expected a count >= 0")
    return counts


def check_beta(beta: float) -> float:
    """`beta` if it is a positive number, of a finite square."""
    if not isinstance(beta, Real) or not 0 < float(beta) < _MOST_BETA:
        raise ValueError(f"beta is {beta!r}; expected a positive number")
    return float(beta)


def check_groups(groups: Any, n: int, name: str = "groups") -> np.ndarray | None:
    """Groups of n rows as (n,), or None where each row is one by itself; none may be missing."""
    if groups is None:
        return None
    listed = groups if isinstance(groups, list | tuple) else None  # where NaN is not text yet
    groups = np.asarray(groups)
    if groups.shape != (n,):
        raise ValueError(f"{name} has shape {groups.shape}; expected ({n},)")
    if listed is not None or groups.dtype.kind in "fOM":
        for row, group in enumerate(groups.tolist() if listed is None else listed):
            if is_none(group):
                raise ValueError(
                    f"{name} is {group} at row {row}; give every row a group, one of its own where "
                    "it is alone"
                )
    return groups


def check_source(source: Any) -> tuple[Any, Any]:
    """`source` if it is features and labels of the source domain."""
    if not isinstance(source, tuple | list) or len(source) != 2:
        what = "None" if source is None else f"a {type(source).__name__}"
        raise ValueError(f"source is {what}; give a pair (X_val, Y_val)")
    return source[0], source[1]


def refuse_no_list(values: object, name: str) -> None:
    """Refuse a parameter that is no list of numbers, or can be read only once.

    The next fit would find an iterator empty.
    """
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise ValueError(f"{name} is {values!r}; give a list of numbers")
    if isinstance(values, Iterator):
        raise ValueError(f"{name} is a {type(values).__name__}, read only once; give a list")


def check_labels(P: np.ndarray, n_labels: int, what: str) -> None:
    """Refuse scores (n, K) of another number of labels than `what` was fitted on."""
    if np.ndim(P) == 2 and np.shape(P)[1] != n_labels:
        raise ValueError(f"P has {np.shape(P)[1]} labels, but {what} was fitted on {n_labels}")


@dataclass(frozen=True)
class LabelledRows:
    """Checked scores of images and what is true of them.

    Attributes
    ----------
    P : (n, K) floating
    truth : (n, K) CSR
        Known positives.
    unknown : (n, K) bool, dense or CSR, or None
    weight, missed : (n,) float64
    """

    P: np.ndarray
    truth: csr_matrix
    unknown: Matrix | None
    weight: np.ndarray
    missed: np.ndarray

    def take(self: SomeRows, rows: np.ndarray) -> SomeRows:
        """Some of the images, by their numbers or a bool array."""
        return replace(
            self,
            P=self.P[rows],
            truth=self.truth[rows],
            unknown=None if self.unknown is None else self.unknown[rows],
            weight=self.weight[rows],
            missed=self.missed[rows],
        )

    def known(self, at: slice = slice(None)) -> np.ndarray | None:
        """(rows, K) bool of some rows, or None if everything is known."""
        if self.unknown is None:
            return None
        unknown = self.unknown[at]
        return ~(unknown if isinstance(unknown, np.ndarray) else unknown.toarray())


def check_rows(
    P: np.ndarray,
    Y: Matrix | None,
    mask: Matrix | None = None,
    sample_weight: np.ndarray | None = None,
    missed: np.ndarray | None = None,
    *,
    probabilities: bool = False,
    soft: bool = False,
    unlabelled: bool = False,
    learns: bool = False,
) -> LabelledRows:
    """What every rule and every score of scores takes, checked.

    Parameters
    ----------
    P : (n, K) array
        Finite scores, or `probabilities`.
    Y : (n, K), dense or sparse, or None
        Truth in {0, 1}, or in [0, 1] if `soft`; NaN (dense) is unknown; None, where it may be
        `unlabelled`: nothing is true.
    mask : (n, K), optional
        True where the label is unknown.
    sample_weight, missed : (n,), optional
        Weights of rows; true labels outside the K classes.

    Raises
    ------
    ValueError
        Naming the argument, and row and label where there is one.
    """
    P = check_probabilities(P) if probabilities else check_scores(P)
    if Y is None and unlabelled:
        Y = csr_matrix(P.shape)
    truth, unknown = check_truth(Y, mask, P.shape, soft, learns)
    n = len(P)
    return LabelledRows(P, truth, unknown, check_weights(sample_weight, n), check_missed(missed, n))
