"""How do arrays from anywhere become the parts of a cache?"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, issparse, spmatrix

from featcache.annotations import Labels
from featcache.contents import CacheContents
from featcache.errors import InputError, reason_of
from featcache.frames import by_row, by_row_and_class, is_frame, numbers
from featcache.layout import FEATURE_DTYPE
from featcache.names import Names, is_none, texts_of

_SMALL_BYTES = 2**24  # what is done before threads have begun
_BLOCK_BYTES = 2**22
_MOST_THREADS = 8  # more wait for memory


@dataclass(frozen=True, eq=False)
class Given:
    """What a caller says of features; see :meth:`featcache.cache.FeatureCache.write`."""

    ids: Names
    labels: Labels | spmatrix | np.ndarray | None = None
    classes: Names | None = None
    weight: Any = None
    bias: Any = None
    views: Sequence[str] | None = None
    class_names: Names | None = None
    valid: np.ndarray | None = None
    reasons: Sequence[str | None] | None = None
    provenance: Mapping[str, Any] | None = None

    def around(self, features: Any) -> tuple[Any, CacheContents, list[str | None]]:
        """Something that gives features row by row, all that is beside them, and reasons.

        Raises
        ------
        InputError
            If parts disagree.
        """
        ids = texts_of("ids", self.ids)
        classes = None if self.classes is None else texts_of("classes", self.classes)
        labels, classes = by_row_and_class("labels", self.labels, ids, classes)

        def of_classes(what: str, values: Any) -> Any:
            return by_row(what, values, classes, "a class")

        source, (_, v, d) = as_features(by_row("features", features, ids), len(ids))
        weight = as_array(of_classes("weight", self.weight))
        bias = as_array(of_classes("bias", self.bias))
        contents = CacheContents(
            ids=ids,
            views=as_views(self.views, v),
            dim=d,
            labels=as_labels(labels, ids, classes),
            classes=classes,
            class_names=of_classes("class_names", self.class_names),
            weight=weight,
            bias=bias,
            provenance=with_network_id(self.provenance or {}, weight, bias, d),
        )
        valid, reasons = by_row("valid", self.valid, ids), by_row("reasons", self.reasons, ids)
        return source, contents, as_reasons(len(ids), valid, reasons)


def as_array(values: Any) -> Any:
    """A tensor of torch as an array, wherever it lies; all else as it is. Imports no torch."""
    if not hasattr(values, "detach"):
        return values
    tensor = values.detach().cpu()
    # NumPy has no bfloat16.
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()


def as_float32(values: np.ndarray) -> np.ndarray:
    """A new array of the same numbers; of many, blocks of rows on several cores at a time."""
    x = np.empty(values.shape, np.float32)
    threads = min(_cores(), _MOST_THREADS) if x.nbytes >= _SMALL_BYTES else 1
    if threads == 1:
        x[...] = values
        return x
    rows = max(1, _BLOCK_BYTES * len(x) // x.nbytes)

    def convert(start: int) -> None:  # without the interpreter's lock
        x[start : start + rows] = values[start : start + rows]

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(convert, range(0, len(x), rows)))
    return x


def _cores() -> int:
    """Of the machine, or those that this process may use where that is known."""
    known = getattr(os, "sched_getaffinity", None)
    return len(known(0)) if known is not None else os.cpu_count() or 1


def as_features(features: Any, n: int) -> tuple[Any, tuple[int, int, int]]:
    """Features with a shape, and what that is as (n, v, d): two dimensions are one view.

    Raises
    ------
    InputError
        If there is not a row for each of `n` ids, or some are masked.
    """
    _refuse_masked("features", features, "fill them, and mark such rows by valid=")
    if issparse(features):
        raise InputError("features are sparse; give features.toarray()")
    source = as_array(features)
    try:
        np.dtype(source.dtype)  # of what can be read a block at a time
    except (AttributeError, TypeError):
        source = np.asarray(source)
    shape = tuple(source.shape)
    if np.dtype(source.dtype).kind not in "fiub":
        raise InputError(f"features of type {source.dtype}; give real numbers")
    if len(shape) not in (2, 3) or shape[0] != n:
        raise InputError(
            f"features of shape {shape} for {n} ids; expected (n, d) or (n, v, d) with a row "
            "for each id"
        )
    return source, (n, shape[1] if len(shape) == 3 else 1, shape[-1])


def _refuse_masked(what: str, values: Any, remedy: str) -> None:
    """What lies under a mask would be taken for a value."""
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise InputError(f"{np.ma.count_masked(values):,} {what} are masked; {remedy}")


def as_views(views: Names | None, v: int) -> Names:
    """Names of `v` views, by default "eval", "view1", "view2", ..."""
    if views is None:
        return ["eval", *(f"view{j}" for j in range(1, v))]
    if len(views) != v:
        raise InputError(f"views {list(views)} for features of {v} views; name each of them")
    return views


def as_labels(labels: Any, ids: Names, classes: Names | None) -> Labels | None:
    """Labels of just these images and classes.

    Parameters
    ----------
    labels : Labels, sparse (n, K), dense (n, K) or (n,), frame of pandas, or None
        Entries of a matrix are confidences in [0, 1]; NaN (dense) is unknown. A
        row of NaN alone is an image without labels.
    ids : n str
    classes : K str, optional
        Default: those of the `Labels`, or "0", "1", ... for a matrix.

    Raises
    ------
    InputError
        If a matrix has another shape or other values.
    """
    if labels is None:
        return None
    if isinstance(labels, Labels):
        if not np.array_equal(labels.ids, np.asarray(ids, dtype=np.str_)):
            labels = labels.select(ids)
        same = classes is None or np.array_equal(labels.classes, np.asarray(classes, np.str_))
        return labels if same else labels.restrict(classes)
    _refuse_masked("labels", labels, "NaN says that one is unknown: labels.filled(np.nan)")
    try:
        if is_frame(labels):
            matrix: Any = numbers(labels)
        else:
            matrix = labels if issparse(labels) else np.asarray(as_array(labels), dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"labels are no matrix of numbers ({reason_of(error)}); give a column for each class, "
            "or a Labels value"
        ) from None
    if matrix.ndim == 1:
        matrix = matrix[:, None]
    if matrix.ndim != 2 or matrix.shape[0] != len(ids):
        raise InputError(
            f"labels of shape {matrix.shape} for {len(ids)} ids; expected a row for each id and "
            "a column for each class"
        )
    named = np.arange(matrix.shape[1]).astype(np.str_) if classes is None else classes
    unknown = None if issparse(matrix) else np.isnan(matrix)
    if unknown is None or not unknown.any():
        return Labels(ids, named, _positives(csr_matrix(matrix)))
    return Labels(
        ids,
        named,
        _positives(csr_matrix(np.where(unknown, 0, matrix))),
        csr_matrix(matrix == 0, dtype=np.float32),
        unlisted="unknown",
        known=~unknown.all(axis=1),
    )


def _positives(matrix: csr_matrix) -> csr_matrix:
    positives = csr_matrix(matrix, dtype=np.float32, copy=True)
    positives.eliminate_zeros()
    return positives


def as_rows(
    contents: CacheContents, start: int, features: np.ndarray, reasons: Sequence[str | None]
) -> np.ndarray:
    """Features of rows from `start` on, as a file has them: float16, zeros where there is a reason.

    Raises
    ------
    InputError
        If a feature is not a finite float16; names id, view and dimension.
    """
    good = np.array([reason is None for reason in reasons])
    rows = np.zeros(features.shape, FEATURE_DTYPE)
    with np.errstate(over="ignore"):
        rows[good] = features[good]
    if not np.isfinite(rows).all():
        i, j, k = np.argwhere(~np.isfinite(rows))[0]
        raise InputError(
            f"image {contents.ids[start + i]}, view {contents.views[j]}, dimension {k}: feature "
            f"{features[i, j, k]} is no float16 number (at most 65504); check the image and the "
            "network, or scale its features"
        )
    return rows


def as_reasons(
    n: int, valid: np.ndarray | None, reasons: Sequence[str | None] | None
) -> list[str | None]:
    """A reason for each row that is not valid, None for the others.

    Without flags the rows that have a reason are not valid; None, NaN and "" are none.
    """
    whys: list[str | None]
    if reasons is None:
        whys = [None] * n if valid is None else [None if ok else "not valid" for ok in valid]
    else:
        whys = [_as_reason(row, reason) for row, reason in enumerate(reasons)]
    flags = [why is None for why in whys] if valid is None else [bool(ok) for ok in valid]
    if len(whys) != n or len(flags) != n:
        raise InputError(f"{len(flags)} valid flags and {len(whys)} reasons for {n} ids")
    for row, (ok, why) in enumerate(zip(flags, whys, strict=True)):
        if ok and why is not None:
            raise InputError(f"row {row} is valid, yet has the reason {why!r}; drop one of them")
    return [None if ok else why or "not valid" for ok, why in zip(flags, whys, strict=True)]


def _as_reason(row: int, given: Any) -> str | None:
    if isinstance(given, str):
        return str(given) if given.strip() else None
    if is_none(given):
        return None
    raise InputError(f"reasons: number {row} is {given!r}; give a text, or None where all is well")


def with_network_id(
    provenance: Mapping[str, Any], weight: np.ndarray | None, bias: np.ndarray | None, dim: int
) -> dict[str, Any]:
    """`provenance` with a ``network_id``: SHA-256 of name, dim and last layer.

    One that is given stays; without a name or a last layer nothing tells the network,
    and there is none.
    """
    if not isinstance(provenance, Mapping):
        raise InputError(
            f"provenance is {type(provenance).__name__}; give a dict, such as {{'network': NAME}}"
        )
    name = provenance.get("network")
    if not name and weight is None:
        return dict(provenance)
    digest = hashlib.sha256(f"{name or ''} {dim}".encode())
    for part in (weight, bias):
        if part is not None:
            digest.update(np.ascontiguousarray(part, dtype="<f4").tobytes())
    return {"network_id": digest.hexdigest(), **provenance}
