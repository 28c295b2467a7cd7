"""What do heads fit on?  Rows, targets, weights and starting weights, checked once.

Whatever a caller may hand to ``fit`` is refused here with one line, or becomes
a :class:`TrainingSet`; no module below checks input again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, issparse
from sklearn.utils import check_array, column_or_1d
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import assert_all_finite

from heads.inputs import Matrix, check_groups, check_missed, check_weights, split_masked

_CHUNK_BYTES = 1 << 25  # converted features that are held at once


@dataclass(frozen=True)
class TrainingSet:
    """Checked data of one fit: n images, v views, d features, K labels.

    Attributes
    ----------
    X : (n, v, d) float16, float32 or float64, possibly memory-mapped
    Y : (n, K) `dtype`
        Targets in [0, 1]; zero where unknown.
    known : (n, K) bool or None
        Which targets are known; None: all.
    weight : (n,) float64
        Weight a_i of an image; each of its v rows trains with a_i / v.
    groups : (n,) or None
        Images of equal value stay on one side of a fold.
    coef_init, intercept_init : (K, d) and (K,) `dtype`, or None and None
        W0 and b0.
    base : (n, v, K) `dtype` or None
        X W0' + b0 of every row; None without W0 and b0.
    missed : (n,)
        True labels outside the K.
    """

    X: np.ndarray
    Y: np.ndarray
    known: np.ndarray | None
    weight: np.ndarray
    groups: np.ndarray | None
    coef_init: np.ndarray | None
    intercept_init: np.ndarray | None
    base: np.ndarray | None
    missed: np.ndarray

    @property
    def dtype(self) -> np.dtype[Any]:
        """float64 where X is float64, else float32: the type of all that is computed."""
        return self.Y.dtype

    @property
    def n_images(self) -> int:
        return self.X.shape[0]

    @property
    def n_views(self) -> int:
        return self.X.shape[1]

    @property
    def n_features(self) -> int:
        return self.X.shape[2]

    @property
    def n_labels(self) -> int:
        return self.Y.shape[1]

    def rows(self, images: np.ndarray) -> np.ndarray:
        """(m v, d) features of all views of `images`, image by image, as `dtype`."""
        return self.X[images].astype(self.dtype, copy=False).reshape(-1, self.n_features)

    def row_weight(self, images: np.ndarray) -> np.ndarray:
        """(m v,) weights of these rows, float64."""
        return np.repeat(self.weight[images] / self.n_views, self.n_views)

    def row_base(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
        """(m v, k) base margins of these rows, or None without W0 and b0."""
        if self.base is None:
            return None
        return self.base[images][:, :, labels].reshape(-1, len(labels))

    def row_targets(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """(m v, k) targets of these rows."""
        whole = len(labels) == self.n_labels
        Y = self.Y[images] if whole else self.Y[np.ix_(images, labels)]
        return Y if self.n_views == 1 else np.repeat(Y, self.n_views, axis=0)

    def chunks(self, images: np.ndarray) -> Iterator[np.ndarray]:
        """`images` in runs whose converted rows take little memory."""
        row = self.n_views * self.n_features * self.dtype.itemsize
        return _runs(images, row)

    def view_means(self, images: np.ndarray) -> np.ndarray:
        """(m, d) mean features over the views, whose margin is the mean margin."""
        return view_means(self.X, images, self.dtype)

    def base_means(self, images: np.ndarray) -> np.ndarray | None:
        """(m, K) mean base margin over the views, or None without W0 and b0."""
        return None if self.base is None else self.base[images].mean(axis=1)


def _runs(images: np.ndarray, image_bytes: int) -> Iterator[np.ndarray]:
    step = max(1, _CHUNK_BYTES // max(1, image_bytes))
    for start in range(0, len(images), step):
        yield images[start : start + step]


def view_means(X: np.ndarray, images: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """(m, d) mean over the views of `images` of X (n, v, d), computed as `dtype`."""
    if X.shape[1] == 1:
        return X[images, 0].astype(dtype, copy=False)
    means = np.empty((len(images), X.shape[2]), dtype)
    done = 0
    for run in _runs(images, X.shape[1] * X.shape[2] * dtype.itemsize):
        means[done : done + len(run)] = X[run].astype(dtype, copy=False).mean(axis=1)
        done += len(run)
    return means


def label_patterns(
    known: np.ndarray | None, images: np.ndarray, labels: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split `labels` by which of `images` they are known on.

    Returns
    -------
    list of (labels, images)
        Labels that share their known images, and these images.
    """
    if not len(labels):
        return []
    if known is None:
        return [(labels, images)]
    block = known[np.ix_(images, labels)]
    packed = np.ascontiguousarray(np.packbits(block, axis=0).T)
    _, first, code = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    code = code.ravel()
    return [(labels[code == c], images[block[:, first[c]]]) for c in range(len(first))]


def fold_targets(data: TrainingSet, binary: bool) -> Matrix:
    """(n, K) known positives, or (n,) of a binary target, by which folds are balanced."""
    positive = data.Y > 0
    return positive[:, 0] if binary else csr_matrix(positive)


# ------------------------------------------------------------------ checking


def check_training_set(
    X: Any,
    Y: np.ndarray,
    known: np.ndarray | None,
    sample_weight: Any,
    groups: Any,
    coef_init: Any,
    intercept_init: Any,
    missed: Any = None,
) -> TrainingSet:
    """Put checked features and targets together with weights, groups and W0, b0.

    Parameters
    ----------
    X : (n, d) or (n, v, d) from :func:`check_features`
    Y, known : (n, K) from :func:`check_targets`
    sample_weight, groups : (n,) or None
    coef_init : (K, d) or None; (d,) for one label
    intercept_init : (K,) or None; a number for one label
    missed : (n,) or None
    """
    n, d, n_labels = X.shape[0], X.shape[-1], Y.shape[1]
    dtype = np.dtype(np.float64 if X.dtype == np.float64 else np.float32)
    views = X if X.ndim == 3 else X[:, None, :]
    if Y.shape[0] != n:
        raise ValueError(f"Y has {Y.shape[0]} rows, but X has {n}")
    W0, b0 = _check_start(coef_init, intercept_init, (n_labels, d), dtype)
    return TrainingSet(
        X=views,
        Y=Y.astype(dtype, copy=False),
        known=known,
        weight=check_weights(sample_weight, n),
        groups=check_groups(groups, n),
        coef_init=W0,
        intercept_init=b0,
        base=None if W0 is None or b0 is None else _base_margins(views, W0, b0),
        missed=check_missed(missed, n),
    )


def _check_start(
    coef_init: Any, intercept_init: Any, shape: tuple[int, int], dtype: np.dtype[Any]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """W0 and b0, either of them zero where only the other is given; None twice for none."""
    n_labels = shape[0]
    b0 = np.zeros(n_labels) if intercept_init is None else np.atleast_1d(intercept_init)
    if b0.shape != (n_labels,) or not np.all(np.isfinite(b0)):
        raise ValueError(
            f"intercept_init has shape {b0.shape}; expected ({n_labels},) finite numbers"
        )
    if coef_init is None and intercept_init is None:
        return None, None
    W0 = np.zeros(shape, dtype) if coef_init is None else np.asarray(coef_init)
    W0 = W0.reshape(1, -1) if W0.ndim == 1 else W0
    if W0.shape != shape or not np.all(np.isfinite(W0)):
        raise ValueError(f"coef_init has shape {W0.shape}; expected {shape} finite numbers")
    return W0.astype(dtype, copy=False), b0.astype(dtype)


def _base_margins(X: np.ndarray, W0: np.ndarray, b0: np.ndarray) -> np.ndarray:
    base = np.empty((*X.shape[:2], len(W0)), W0.dtype)
    for run in _runs(np.arange(len(X)), X.shape[1] * X.shape[2] * W0.dtype.itemsize):
        rows = X[run[0] : run[-1] + 1].astype(W0.dtype, copy=False).reshape(-1, X.shape[2])
        base[run[0] : run[-1] + 1] = (rows @ W0.T).reshape(len(run), X.shape[1], -1)
    base += b0
    return base


def check_features(X: Any, estimator: Any) -> np.ndarray:
    """X as a finite floating array (n, d) or (n, v, d), never copied if it is one already.

    Raises
    ------
    TypeError
        If X is sparse.
    ValueError
        If X has another number of axes, no rows, no features or a value that is not finite.
    """
    X = check_array(
        X,
        dtype="numeric",
        allow_nd=getattr(X, "ndim", 2) == 3,
        ensure_all_finite=False,
        estimator=estimator,
        input_name="X",
    )
    if X.dtype.kind != "f":
        X = X.astype(np.float64)
    elif X.dtype.itemsize > 8:
        raise ValueError(f"X has dtype {X.dtype}; give float16, float32 or float64")
    if X.ndim == 3 and 0 in X.shape:
        raise ValueError(f"Found array X with shape {X.shape}; expected at least one view, feature")
    for run in _runs(np.arange(len(X)), X[0].nbytes):
        part = X[run[0] : run[-1] + 1]
        if not np.isfinite(part).all():
            assert_all_finite(part, input_name="X", estimator_name=type(estimator).__name__)
    return X


def check_targets(Y: Any, mask: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Targets of several labels as an array with zero where unknown, and what is known.

    Parameters
    ----------
    Y : (n, K) dense or sparse, in [0, 1]; NaN (dense) or masked (numpy.ma) is unknown
    mask : (n, K) bool, dense or sparse, or None
        True marks an *unknown* target, as in numpy.ma.

    Returns
    -------
    Y : (n, K) float32 or float64
    known : (n, K) bool, or None if all are
    """
    Y, hidden = split_masked(Y.toarray() if issparse(Y) else Y)
    if Y.ndim != 2 or Y.dtype.kind not in "biuf":
        raise ValueError(
            f"Y has shape {Y.shape}, dtype {Y.dtype}; expected (n, K) numbers in [0, 1]"
        )
    if not Y.shape[1]:
        raise ValueError(f"Y has shape {Y.shape}; expected a column for every label, at least one")
    if Y.dtype.kind != "f" or Y.dtype.itemsize < 4:
        Y = Y.astype(np.float32)
    unknown = np.isnan(Y)
    if hidden is not None:
        unknown |= hidden
    if mask is not None:
        unknown |= _check_mask(mask, Y.shape)
    some = bool(unknown.any())
    if some:
        Y = np.where(unknown, 0, Y).astype(Y.dtype, copy=False)
    wrong = (Y < 0) | (Y > 1)
    if wrong.any():
        row, label = np.argwhere(wrong)[0]
        raise ValueError(
            f"Y is {Y[row, label]} at row {row}, label {label}; targets must lie in [0, 1]"
        )
    return Y, ~unknown if some else None


def _check_mask(mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A mask, dense or sparse, as a bool array of this shape."""
    mask = np.asarray(mask.toarray() if issparse(mask) else mask)
    if mask.dtype != bool or mask.shape != shape:
        raise ValueError(f"mask has shape {mask.shape}, dtype {mask.dtype}; expected {shape} bool")
    return mask


def check_binary_target(y: Any, mask: Any) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """A 1-D target of two classes as (n, 1) of zeros and ones.

    Parameters
    ----------
    y : (n,)
    mask : (n,) or (n, 1) bool, the latter dense or sparse, or None
        True marks an *unknown* target.

    Returns
    -------
    Y : (n, 1) float32
        Zero where unknown.
    known : (n, 1) bool, or None if all are
    classes : (2,)

    Raises
    ------
    ValueError
        If y is not one of two classes, in the words that scikit-learn uses.
    """
    y, hidden = split_masked(y)
    y = column_or_1d(y)
    unknown = np.zeros(y.shape, bool) if hidden is None else hidden
    if mask is not None:
        column = np.ndim(mask) == 2  # of a sparse matrix, too
        unknown = unknown | _check_mask(mask, (len(y), 1) if column else y.shape).reshape(-1)
    known = ~unknown if unknown.any() else None
    seen = y
    if known is not None and len(np.unique(y[known])) > 1:
        seen = y[known]  # what is unknown need not be one of the classes
    assert_all_finite(seen, input_name="y")
    check_classification_targets(seen)
    kind = type_of_target(seen, input_name="y", raise_unknown=True)
    if kind != "binary":
        raise ValueError(
            f"Only binary classification is supported. The type of the target is {kind}."
        )
    classes = np.unique(seen)
    if len(classes) < 2:
        raise ValueError(
            "A binary target needs samples of at least 2 classes in the data, but the data "
            f"contains only one class: {classes[0]}"
        )
    positive = y == classes[1]
    if known is not None:
        positive &= known
    column_known = None if known is None else known[:, None]
    return positive[:, None].astype(np.float32), column_known, classes
