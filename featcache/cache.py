"""What is in a cache, and which rows of it train a head?

>>> cache = FeatureCache("stage1/resnet101.h5")      # doctest: +SKIP
>>> head.fit(**cache.training(min_positives=2))      # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from featcache import layout
from featcache.annotations import Labels
from featcache.contents import CacheContents, decoded, labels_from
from featcache.disk import hash_ranges
from featcache.errors import InputError
from featcache.summary import summary


class FeatureCache:
    """The cached features of one network on one image set, or some rows of them.

    Opening maps the file and reads only its table of contents, so it takes
    milliseconds at any size; parts are read when they are asked for.

    Parameters
    ----------
    path : path
        A file made by ``featcache extract`` or :meth:`write`. Layout:
        :mod:`featcache.layout`.

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
    weight, bias : (K, d) and (K,) float32, or None
        The network's own last layer.
    provenance : dict
    network_id : str or None
        Caches of one network on several image sets have it in common.

    Raises
    ------
    InputError
        If the file is missing, unfinished, damaged, of a newer format or no cache.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = layout.read(path)
        self._rows: np.ndarray | None = None  # all

    # -------------------------------------------------------------- the parts

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self._file.provenance

    @property
    def network_id(self) -> str | None:
        return self._file.provenance.get("network_id")

    @cached_property
    def views(self) -> np.ndarray:
        return decoded(self._file.arrays["views"])

    @cached_property
    def classes(self) -> np.ndarray:
        return self._texts("classes/id", np.zeros(0, np.str_))

    @cached_property
    def class_names(self) -> np.ndarray:
        return self._texts("classes/name", self.classes)

    def _texts(self, name: str, default: np.ndarray) -> np.ndarray:
        arrays = self._file.arrays
        return decoded(arrays[name]) if name in arrays else default

    @property
    def weight(self) -> np.ndarray | None:
        return self._file.arrays.get("head/weight")

    @property
    def bias(self) -> np.ndarray | None:
        return self._file.arrays.get("head/bias")

    @cached_property
    def ids(self) -> np.ndarray:
        return decoded(self._of_rows(self._file.arrays["ids"]))

    @cached_property
    def valid(self) -> np.ndarray:
        return self._of_rows(self._file.arrays["valid"])

    @cached_property
    def skipped(self) -> dict[str, str]:
        every = self._file.arrays["valid"]
        # One reason for each invalid row of the file, in their order.
        position = np.cumsum(~every) - 1
        rows = np.arange(len(every)) if self._rows is None else self._rows
        reasons = decoded(self._file.arrays["skipped/reason"])[position[rows[~self.valid]]]
        return dict(zip(self.ids[~self.valid].tolist(), reasons.tolist(), strict=True))

    @property
    def features(self) -> np.ndarray:
        return self._of_rows(self._file.features)

    @cached_property
    def labels(self) -> Labels | None:
        file = self._file
        labels = self._all_labels
        if labels is None or self._rows is None:
            return labels
        return replace(
            labels,
            ids=self.ids,
            positives=labels.positives[self._rows],
            negatives=None if labels.negatives is None else labels.negatives[self._rows],
            known=labels.known[self._rows],
            outside=labels.outside[self._rows],
        )
