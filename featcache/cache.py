"""What is in a cache?"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import spmatrix

from featcache import layout
from featcache.annotations import Labels
from featcache.arrays import Given, as_float32
from featcache.errors import InputError
from featcache.fitting import columns_of, positives, targets, trainable_rows
from featcache.lookup import SEVERAL, Rows
from featcache.names import Names
from featcache.tables import as_html


class FeatureCache:
    """The cached features of one network on one image set, or of some of its rows.

    Opening maps the file and reads only its table of contents, so that it takes
    milliseconds at any size; parts are read when they are first asked for. A file that is
    replaced by a rename, as all of featcache does, stays open as it was; never copy over it.

    Parameters
    ----------
    path : path
        A file made by ``featcache extract`` or :meth:`write`; what is in it is
        said in :mod:`featcache.layout`.

    Attributes
    ----------
    path : Path
    ids : (n,) str
    views : (v,) str
    classes, class_names : (K,) str
        Ids, and names for people (the ids where there are no names).
    valid : (n,) bool
        False where the image could not be read; its features are zeros.
    skipped : dict
        Reason by id, of the rows that are not valid.
    features : (n, v, d) float16, read-only
        Memory-mapped, no copy; of a selection, a copy of its rows at each access.
    labels : Labels or None
        Rows as in `ids`.
    weight, bias : (K, d) and (K,) float32, read-only, or None
        The network's own last layer.
    provenance : dict
        Where the features come from.
    network_id : str or None
        Common to the caches of one network on several image sets; None of features
        from elsewhere that were written without a name or a last layer.
    network_name : str
        What people call it; two networks may have one name.
    shape : (n, v, d)

    Raises
    ------
    InputError
        If the file is missing, unfinished, damaged, of a newer format or no cache.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = layout.read(path)
        self._rows: np.ndarray | None = None  # None: all, in their order

    @classmethod
    def _of(cls, file: layout.CacheFile, rows: np.ndarray) -> FeatureCache:
        part = cls.__new__(cls)
        part._file, part._rows = file, rows
        return part

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the file itself; gigabytes never travel.
        return _reopen, (self.path.absolute(), self._rows, self._file.identity)

    # ----------------------------------------------------- of the whole file

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def views(self) -> np.ndarray:
        return self._file.views

    @property
    def classes(self) -> np.ndarray:
        return self._file.classes

    @property
    def class_names(self) -> np.ndarray:
        return self._file.class_names

    @property
    def weight(self) -> np.ndarray | None:
        return self._file.arrays.get("head/weight")

    @property
    def bias(self) -> np.ndarray | None:
        return self._file.arrays.get("head/bias")

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self._file.provenance

    @property
    def network_id(self) -> str | None:
        return self.provenance.get("network_id")

    @property
    def network_name(self) -> str:
        network = self.provenance.get("network") or "without a name"
        if not isinstance(network, dict) or "arch" not in network:
            return str(network)
        more = [f"{key}={value}" for key, value in network.get("kwargs", {}).items()]
        if share := self.provenance.get("domain_statistics"):
            more.append(f"domain_statistics={share}")
        return " ".join([str(network["arch"]), *more])

    # --------------------------------------------------------------- of rows

    def __len__(self) -> int:
        return len(self._file.features) if self._rows is None else len(self._rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        _, v, d = self._file.features.shape
        return len(self), v, d

    @cached_property
    def ids(self) -> np.ndarray:
        return self._some(self._file.ids)

    @cached_property
    def valid(self) -> np.ndarray:
        return self._some(self._file.arrays["valid"])

    @cached_property
    def skipped(self) -> dict[str, str]:
        rows = np.arange(len(self)) if self._rows is None else self._rows
        bad = rows[~self.valid]
        reasons = [self._file.reasons[row] for row in bad.tolist()]
        return dict(zip(self._file.ids[bad].tolist(), reasons, strict=True))

    @property
    def features(self) -> np.ndarray:
        return self._some(self._file.features)

    @cached_property
    def labels(self) -> Labels | None:
        every = self._file.labels
        if every is None or self._rows is None:
            return every
        return replace(
            every,
            ids=self.ids,
            positives=every.positives[self._rows],
            negatives=None if every.negatives is None else every.negatives[self._rows],
            known=every.known[self._rows],
            outside=every.outside[self._rows],
        )

    def x(self, view: str | None = None) -> np.ndarray:
        """Features as float32, a copy.

        Parameters
        ----------
        view : str, optional
            Name of a view.

        Returns
        -------
        x : (n, d) of one view, or (n, v, d) of all
        """
        features = self._file.features
        if view is not None:
            names = self.views.tolist()
            if view not in names:
                raise InputError(f"{self.path}: has no view {view!r}; choose from {names}")
            features = features[:, names.index(view)]
        return as_float32(self._some(features))

    def _some(self, values: np.ndarray) -> np.ndarray:
        if self._rows is None:
            return values
        return np.asarray(values).take(self._rows, axis=0)  # quicker than indexing a memmap

    def has_images_of(self, other: FeatureCache) -> bool:
        """Whether the rows of both are of the same ids in the same order; decodes none of them."""
        if self._rows is None and other._rows is None:
            return np.array_equal(self._file.arrays["ids"], other._file.arrays["ids"])
        return np.array_equal(self.ids, other.ids)

    def select(self, ids: Names) -> FeatureCache:
        """Some rows, in the order of `ids`, which may repeat; no feature is read.

        O(m) for m ids, and O(n log n) once a cache.

        Raises
        ------
        InputError
            If an id is not here, or names several rows.
        """
        if isinstance(ids, str):
            raise InputError(f"{self.path}: select({ids!r}): give a list of ids, [{ids!r}]")
        names = ids if isinstance(ids, np.ndarray) else list(ids)
        lookup, rows = self._lookup
        found = lookup.find(names)
        if np.any(found < 0):
            at = int(np.argmax(found < 0))
            trouble = "names several rows here" if found[at] == SEVERAL else "is not here"
            raise InputError(
                f"{self.path}: id {str(names[at])!r} {trouble}; the ids of this cache are in .ids"
            )
        return self._of(self._file, found if rows is None else rows[found])

    @cached_property
    def _lookup(self) -> tuple[Rows, np.ndarray | None]:
        """Of the rows of the file that are here, which may be here several times; None: all."""
        ids = self._file.arrays["ids"]
        if self._rows is None:
            return Rows(ids), None
        rows = np.unique(self._rows)
        return Rows(ids[rows]), rows

    def _some_rows(self, positions: np.ndarray) -> np.ndarray:
        """Rows of the file, of positions here."""
        return positions if self._rows is None else self._rows[positions]

    # -------------------------------------------------------------- training

    def training(self, classes: Names | None = None, min_positives: int = 0) -> dict[str, Any]:
        """Keyword arguments for the ``fit`` of a head: aligned rows that are valid and labelled.

        Parameters
        ----------
        classes : sequence of str, optional
            Class ids, in the order wanted. Default: all.
        min_positives : int
            Leave out classes with fewer positive rows; :meth:`frequent` says which stay.

        Returns
        -------
        kwargs : dict
            X : (n', v, d) float16
                The map itself if all rows are used, else their copy.
            Y : (n', K') CSR float32
                Confidence of the positives.
            mask : (n', K') bool or None
                True: unknown. Dense; None if what is not listed is negative.
            groups : (n',) int
                Equal for equal ids.
            coef_init, intercept_init : (K', d), (K',) float32, or None
                The classes' rows of `weight` and `bias`.

        Raises
        ------
        InputError
            If there are no labels, no usable rows, or a class is not in the cache.
        """
        labels, rows = trainable_rows(self.path, self.valid, self.labels)
        columns = self._columns(self.frequent(min_positives, classes))
        used = self if len(rows) == len(self) else self._of(self._file, self._some_rows(rows))
        return {
            "X": used.features,
            **targets(labels, rows, columns),
            "groups": np.unique(used.ids, return_inverse=True)[1].reshape(-1),
            "coef_init": None if self.weight is None else self.weight[columns],
            "intercept_init": None if self.bias is None else self.bias[columns],
        }

    def frequent(self, min_positives: int, classes: Names | None = None) -> np.ndarray:
        """Those of `classes` (default: all) with at least so many positive rows for training."""
        labels, rows = trainable_rows(self.path, self.valid, self.labels)
        wanted = self.classes if classes is None else np.asarray(classes, dtype=np.str_)
        return wanted[positives(labels, rows)[self._columns(wanted)] >= min_positives]

    def _columns(self, classes: np.ndarray) -> np.ndarray:
        return columns_of(self.path, self.classes, classes)

    # ------------------------------------------------------------- the file

    def verify(self) -> list[tuple[int, int]]:
        """Hash the whole file again; O(1) memory.

        Returns
        -------
        bad : list of (start, stop)
            Runs of rows that are not what was written; empty if all is well, and all rows
            if :meth:`damaged` names something beside the features.

        Raises
        ------
        InputError
            If the file was replaced since it was opened.
        """
        now = layout.read(self.path)
        _refuse_replaced(now, self._file.identity)
        return [(0, len(now.features))] if now.damaged() else now.bad_blocks()

    def damaged(self) -> list[str]:
        """Parts of the file beside the features that are not what was written; `verify` asks."""
        return self._file.damaged()

    @staticmethod
    def write(
        path: str | os.PathLike[str],
        features: Any,
        ids: Names,
        labels: Labels | spmatrix | np.ndarray | None = None,
        classes: Names | None = None,
        weight: np.ndarray | None = None,
        bias: np.ndarray | None = None,
        *,
        views: Sequence[str] | None = None,
        class_names: Names | None = None,
        valid: np.ndarray | None = None,
        reasons: Sequence[str | None] | None = None,
        provenance: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> FeatureCache:
        """Make a cache of features from anywhere.

        Parameters
        ----------
        features : (n, d) or (n, v, d) array, memmap, HDF5 dataset, tensor or table
            Rounded to float16; read a block at a time. Two dimensions are one view.
        ids : n str
        labels : Labels, sparse (n, K) or dense (n, K), optional
            A matrix has confidences in [0, 1]; NaN (dense) is unknown, and a row
            of nothing else has no labels. `Labels` and tables of pandas, here and
            elsewhere, are taken by names, of which they may have more.
        classes, class_names : K str, optional
            Default: those of the `Labels` or the table, or "0", "1", ...
        weight, bias : (K, d), (K,), optional
            A last layer.
        views : v str, optional
            Default: "eval", "view1", "view2", ...
        valid : (n,) bool, optional
            False: the row is kept as zeros and never used.
        reasons : n str or None, optional
            Why a row is not valid; None or "" where it is.
        provenance : dict, optional
            ``"network"``, the name of what made the features, becomes the `network_id`
            together with the last layer; heads are matched with caches by it.
        overwrite : bool
            Replace an existing file, and give up an unfinished one.

        Raises
        ------
        InputError
            If parts disagree, a feature is not a finite float16 or the file exists.
        """
        # Not at the top: only writing needs POSIX.
        from featcache.writing import CacheWriter

        parts = (ids, labels, classes, weight, bias, views, class_names, valid, reasons, provenance)
        source, contents, whys = Given(*parts).around(features)
        with CacheWriter(path, contents, fingerprint={}, overwrite=overwrite, resume=False) as out:
            for start, stop in out.pending():
                block = np.asarray(source[start:stop]).reshape(-1, *contents.shape[1:])
                out.write(start, block, whys[start:stop])
            return FeatureCache(out.finish())

    def __repr__(self) -> str:
        facts = self._facts()
        return f"<FeatureCache {str(self.path)!r}: {', '.join(facts.values())}>"

    def _repr_html_(self) -> str:
        facts = {"network": self.network_name} | self._facts()
        return as_html(f"FeatureCache {self.path}", [], list(facts.items()))

    def _facts(self) -> dict[str, str]:
        n, v, d = self.shape
        skipped = n - int(np.count_nonzero(self.valid))
        facts = {
            "images": f"{n:,} images" + f", {skipped:,} skipped" * (skipped > 0),
            "features": f"{v} view{'s' * (v > 1)} of {d:,} features",
            "classes": f"{len(self.classes):,} classes" if len(self.classes) else "",
            "labels": "" if "labels/indptr" in self._file.arrays else "no labels",
        }
        return {name: text for name, text in facts.items() if text}


def _reopen(path: Path, rows: np.ndarray | None, identity: str) -> FeatureCache:
    cache = FeatureCache(path)
    _refuse_replaced(cache._file, identity)
    return cache if rows is None else FeatureCache._of(cache._file, rows)


def _refuse_replaced(now: layout.CacheFile, identity: str) -> None:
    """Its rows are those of other images by now, or of other features."""
    if now.identity != identity:
        raise InputError(f"{now.path}: was replaced since it was opened; open it again")
