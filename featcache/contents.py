"""What does a cache say besides its features?  Ids, views, classes, labels, head, origin.

:class:`CacheContents` states it in memory; :meth:`CacheContents.arrays` is the
same as the file holds it, and :func:`labels_from` the way back for labels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import h5py
import numpy as np
from scipy.sparse import csr_matrix

from featcache.annotations import Labels, Unlisted
from featcache.errors import InputError, damage
from featcache.names import Names, texts_of

__all__ = ["CacheContents", "Names", "checksums", "decoded", "encoded", "labels_from", "plain"]


@dataclass(frozen=True, eq=False)
class CacheContents:
    """Everything in a cache but the features.

    Parameters
    ----------
    ids : (n,) str
        Image ids, the order of the rows. Equal ids are rows of one group.
    views : sequence of v str
        Names of the views, all different.
    dim : int
        Features of a view, d.
    labels : Labels, optional
        Rows as in `ids`, columns as in `classes`.
    classes : (K,) str, optional
        Class ids; by default those of `labels`, or "0", "1", ... for a `weight` alone.
    class_names : (K,) str, optional
        Names for people; by default those of `labels`, or the ids.
    weight, bias : (K, d) and (K,) float32, optional
        The network's own last layer.
    provenance : dict
        Where the features come from; anything that JSON can hold.
    """

    ids: np.ndarray
    views: Names
    dim: int
    labels: Labels | None = None
    classes: Names | None = None
    class_names: Names | None = None
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n, v, d) of the features."""
        return len(self.ids), len(self.views), self.dim

    def checked(self) -> CacheContents:
        """The same with every default filled in and types as in the file.

        Raises
        ------
        InputError
            If parts disagree with each other; names the part and both values.
        """
        ids = texts_of("ids", self.ids)
        if len(ids) == 0:
            raise InputError("no images: a cache needs at least one row; give at least one id")
        if np.any(ids == ""):
            raise InputError(f"ids: number {int(np.argmax(ids == ''))} is empty; give it a name")
        views = texts_of("views", self.views)
        if len(views) == 0 or len(set(views.tolist())) < len(views) or self.dim < 1:
            raise InputError(
                f"views {views.tolist()} of {self.dim} features: a cache needs at least one view "
                "and one feature, and names of views that differ"
            )
        classes = self._classes()
        labels, names = self.labels, self.class_names
        if labels is not None:
            _refuse_difference("ids", labels.ids, ids, "labels.select(ids)")
            _refuse_difference("classes", labels.classes, classes, "labels.restrict(classes)")
            names = labels.names if names is None else names
        if names is not None:
            names = texts_of("class_names", names)
            _refuse_shape("class_names", names, (len(classes),))
        weight, bias = self._head(len(classes))
        return replace(
            self,
            ids=ids,
            views=tuple(views.tolist()),
            dim=int(self.dim),
            classes=classes,
            class_names=names,
            weight=weight,
            bias=bias,
            provenance=plain(dict(self.provenance)),
        )

    def _classes(self) -> np.ndarray:
        if self.classes is not None:
            classes = texts_of("classes", self.classes)
        elif self.labels is not None:
            classes = self.labels.classes
        else:
            count = 0 if self.weight is None else len(self.weight)
            classes = np.arange(count).astype(np.str_)
        unique, counts = np.unique(classes, return_counts=True)
        if len(unique) < len(classes):
            raise InputError(f"class {str(unique[counts > 1][0])!r} is listed twice; keep one")
        return classes

    def _head(self, K: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        if self.weight is None:
            if self.bias is not None:
                raise InputError("a bias without a weight is no head; give both or neither")
            return None, None
        weight = np.ascontiguousarray(self.weight, dtype="<f4")
        bias = np.zeros(K, "<f4") if self.bias is None else np.ascontiguousarray(self.bias, "<f4")
        _refuse_shape("weight", weight, (K, self.dim))
        _refuse_shape("bias", bias, (K,))
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise InputError("weight or bias has a NaN or an infinity; check the network")
        return weight, bias

    def arrays(self) -> dict[str, np.ndarray]:
        """Datasets by their path in the file, with the types that they have there."""
        assert self.classes is not None  # filled in by checked()
        found: dict[str, np.ndarray | None] = {
            "ids": encoded("image id", self.ids),
            "views": encoded("view", self.views),
            "head/weight": self.weight,
            "head/bias": self.bias,
        }
        if len(self.classes):
            found["classes/id"] = encoded("class", self.classes)
            names = self.classes if self.class_names is None else self.class_names
            found["classes/name"] = encoded("class name", names)
        if self.labels is not None:
            found |= {f"labels/{name}": value for name, value in _label_arrays(self.labels)}
        return {name: value for name, value in found.items() if value is not None}

    def recorded(self, update: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Provenance as in the file, with what only it says of the labels."""
        known = {**self.provenance, **(update or {})}
        if self.labels is not None:
            known["unlisted"] = self.labels.unlisted
        return dict(plain(known))

    def fingerprint(self) -> dict[str, str]:
        """What the contents are, one short text for each part: equal texts, equal parts."""
        parts: dict[str, hashlib._Hash] = {}
        for name, value in self.arrays().items():
            digest = parts.setdefault(name.split("/")[0], hashlib.sha256())
            digest.update(f"{name} {value.dtype.str} {value.shape}".encode())
            digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        sizes = {
            "ids": f"{len(self.ids)} ids",
            "views": " ".join(self.views),
            "classes": f"{0 if self.classes is None else len(self.classes)} classes",
            "labels": "" if self.labels is None else f"unlisted {self.labels.unlisted}",
        }
        texts = {name: f"{sizes.get(name, '')} {d.hexdigest()}" for name, d in parts.items()}
        return {name: text.strip() for name, text in texts.items()} | {"dim": str(self.dim)}


def _label_arrays(labels: Labels) -> list[tuple[str, np.ndarray]]:
    positives, negatives = labels.positives, labels.negatives
    arrays = [
        ("indptr", positives.indptr.astype("<i8")),
        ("indices", positives.indices.astype("<i4")),
        ("known", labels.known),
    ]
    if np.any(positives.data < 1):
        # A confidence below float16's smallest number stays a positive.
        smallest = np.finfo(np.float16).smallest_subnormal
        arrays.append(("data", np.maximum(positives.data.astype("<f2"), smallest)))
    if negatives is not None:
        arrays.append(("negative/indptr", negatives.indptr.astype("<i8")))
        arrays.append(("negative/indices", negatives.indices.astype("<i4")))
    if labels.outside.any():
        arrays.append(("outside", labels.outside.astype("<i4")))
    return arrays


def labels_from(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    ids: np.ndarray,
    classes: np.ndarray,
    unlisted: Unlisted,
) -> Labels | None:
    """The inverse: labels out of the datasets of a file; None where there are none.

    Raises
    ------
    InputError
        If they are damaged; names the file and the part.
    """
    if "labels/indptr" not in arrays:
        return None
    shape = (len(ids), len(classes))
    negatives = None
    if "labels/negative/indptr" in arrays:
        negatives = _csr(path, arrays, "labels/negative/", shape)
    positives = _csr(path, arrays, "labels/", shape)
    try:
        return Labels(
            ids,
            classes,
            positives,
            negatives,
            unlisted=unlisted,
            names=decoded(arrays["classes/name"]) if "classes/name" in arrays else None,
            known=arrays.get("labels/known"),
            outside=arrays.get("labels/outside"),
        )
    except (InputError, UnicodeDecodeError) as error:
        raise damage(path, str(error)) from None


def _csr(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    group: str,
    shape: tuple[int, int],
) -> csr_matrix:
    """A matrix of the file, checked: SciPy would follow a wrong index out of its memory."""
    n, K = shape
    none = np.zeros(0, np.int32)
    indptr, indices = (arrays.get(group + part, none) for part in ("indptr", "indices"))
    data = arrays.get(group + "data", np.ones(len(indices)))
    rises = indptr.dtype.kind in "iu" and len(indptr) == n + 1 and np.all(indptr[:-1] <= indptr[1:])
    wrong = ""
    if not rises or indptr[0] != 0 or indptr[-1] != len(indices):
        wrong = f"indptr does not rise from 0 to the {len(indices):,} indices"
    elif len(indices) and not (
        indices.dtype.kind in "iu" and indices.min() >= 0 and indices.max() < K
    ):
        wrong = f"indices has others than the numbers of its {K:,} classes"
    if wrong:
        raise damage(path, f"/{group}{wrong}")
    return csr_matrix((data.astype(np.float32), indices, indptr), shape=shape)


def checksums(arrays: Mapping[str, np.ndarray], provenance: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of everything but the features, whose blocks have theirs, by its name."""
    parts: dict[str, Any] = {
        name: np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
        for name, value in arrays.items()
    }
    texts = {"provenance": json.dumps(provenance).encode()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in {**parts, **texts}.items()}


def plain(value: Any) -> Any:
    """`value` as JSON gives it back: lists for tuples and arrays, text for paths."""

    def other(item: Any) -> Any:
        return item.tolist() if hasattr(item, "tolist") else str(item)

    return json.loads(json.dumps(value, default=other))


def encoded(what: str, values: Names) -> np.ndarray:
    """Texts as fixed-length UTF-8, typed as HDF5 wants them."""
    try:
        raw = np.char.encode(np.asarray(values, dtype=np.str_), "utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} {str(error.object)!r} is not valid Unicode, which HDF5 needs; rename it"
        ) from None
    return raw.astype(h5py.string_dtype("utf-8", max(1, raw.dtype.itemsize)))


def decoded(raw: np.ndarray) -> np.ndarray:
    """The inverse of :func:`encoded`."""
    try:
        return raw.astype(np.str_)  # ASCII, and then much the faster
    except UnicodeDecodeError:
        return np.char.decode(raw, "utf-8")


def _refuse_shape(what: str, value: np.ndarray, expected: tuple[int, ...]) -> None:
    if value.shape != expected:
        raise InputError(f"{what} has shape {value.shape}, expected {expected}")


def _refuse_difference(what: str, ours: np.ndarray, theirs: np.ndarray, remedy: str) -> None:
    if np.array_equal(ours, theirs):
        return
    if len(ours) != len(theirs):
        detail = f"{len(ours)} of the labels, {len(theirs)} of the cache"
    else:
        at = int(np.flatnonzero(ours != theirs)[0])
        detail = f"number {at} is {str(ours[at])!r} of the labels, {str(theirs[at])!r} of the cache"
    raise InputError(f"{what} of the labels are not those of the cache ({detail}); use {remedy}")
