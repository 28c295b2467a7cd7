"""Which rows of caches train a head, and which of them belong together?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from featcache import FeatureCache
from heads.folds import check_folds
from heads.grouping import group_codes
from heads.storage import OutOfFold

ALL_VIEWS = "all"


@dataclass(frozen=True)
class CacheRows:
    """The labelled, readable rows of a cache.

    Attributes
    ----------
    cache : FeatureCache
    ids : (n,) str
    fit : dict
        Arguments of a head's ``fit``, as ``cache.training()`` gives them.
    missed : (n,) int
        True labels outside the classes.
    grouped : bool
        Whether a file says which images belong together; groups are then numbered alike in
        all caches that were opened with it.
    """

    cache: FeatureCache
    ids: np.ndarray
    fit: dict[str, Any]
    missed: np.ndarray
    grouped: bool

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def groups(self) -> np.ndarray:
        """(n,) int: images of a group stay together."""
        groups: np.ndarray = self.fit["groups"]
        return groups

    def take(self, rows: np.ndarray) -> CacheRows:
        """Some of them."""
        per_row = ("X", "Y", "mask", "groups")
        some = {k: self.fit[k][rows] for k in per_row if self.fit[k] is not None}
        return replace(self, ids=self.ids[rows], fit=self.fit | some, missed=self.missed[rows])

    def held_out(self, proba: np.ndarray) -> OutOfFold:
        """Out-of-fold probabilities of these rows, with what is true of them."""
        groups = self.groups if self.grouped else None
        return OutOfFold(
            self.ids, proba, hard(self.fit["Y"]), self.missed, self.fit["mask"], groups
        )


def hard(Y: csr_matrix) -> csr_matrix:
    """Soft targets count as true from 1/2 on."""
    return csr_matrix(Y >= 0.5, dtype=np.float32)


def open_rows(
    caches: Sequence[FeatureCache], views: str = ALL_VIEWS, groups: str = ""
) -> list[CacheRows]:
    """Rows of several caches, of some views, with the groups of a file.

    Raises
    ------
    ValueError
        Naming the cache and a view that it has not, or the file of groups.
    """
    found = [_rows(cache, views) for cache in caches]
    if not groups:
        return found
    codes = group_codes(groups, np.concatenate([rows.ids for rows in found]))
    ends = np.cumsum([len(rows) for rows in found])[:-1]
    return [
        replace(rows, fit=rows.fit | {"groups": own}, grouped=True)
        for rows, own in zip(found, np.split(codes, ends), strict=True)
    ]


def _rows(cache: FeatureCache, views: str) -> CacheRows:
    fit = cache.training()
    if views != ALL_VIEWS:
        names, wanted = cache.views.tolist(), views.split(",")
        for view in wanted:
            if view not in names:
                raise ValueError(
                    f"{cache.path}: has no view {view!r} (--views {views}); choose from "
                    f"{', '.join(names)}, or {ALL_VIEWS}"
                )
        fit["X"] = fit["X"][:, [names.index(view) for view in wanted]]
    labels = cache.labels
    assert labels is not None  # or there were no rows for training
    used = cache.valid & labels.known
    return CacheRows(cache, cache.ids[used], fit, labels.outside[used], grouped=False)


def labelled_ids(cache: FeatureCache) -> np.ndarray:
    """Of the rows that ``cache.training()`` gives, and of all where there are no labels."""
    return cache.ids if cache.labels is None else cache.ids[cache.valid & cache.labels.known]


def sampled(cache: FeatureCache, rows: int, seed: int, but: Sequence[str] = ()) -> FeatureCache:
    """At most that many labelled, readable rows, in their order; none of `but`."""
    if rows < 1:
        raise ValueError(f"--source-rows {rows}: expected at least 1")
    ids = labelled_ids(cache)
    if len(but):
        ids = ids[~np.isin(ids, but)]
    if len(ids) > rows:
        chosen = np.random.default_rng(seed).choice(len(ids), rows, replace=False)
        ids = ids[np.sort(chosen)]
    return cache.select(ids)


def halves(rows: CacheRows, seed: int) -> tuple[CacheRows, CacheRows]:
    """Two halves with labels in balance and groups whole; of one group the first is empty."""
    if len(np.unique(rows.groups)) < 2:
        return rows.take(np.arange(0)), rows
    first, second = check_folds(2, rows.ids, rows.fit["Y"], rows.groups, seed)[0]
    return rows.take(first), rows.take(second)


def refuse_mismatch(cache: FeatureCache, source: FeatureCache, same_views: bool = True) -> None:
    """Refuse a source that is of other views, classes or networks, or of the same images."""
    if len(shared := np.intersect1d(cache.ids, source.ids)):
        raise ValueError(
            f"{source.path}: holds image {str(shared[0])!r}, which {cache.path} holds too; "
            "--source must be of other images, or the out-of-fold scores would know their labels"
        )
    if cache.network_id != source.network_id:
        raise ValueError(
            f"{source.path}: is of network {_named(source)}, but {cache.path} of "
            f"{_named(cache)}; both must be of one network"
        )
    if same_views and not np.array_equal(cache.views, source.views):
        raise ValueError(
            f"{source.path}: has the views {source.views.tolist()}, but {cache.path} has "
            f"{cache.views.tolist()}; extract both with the same --views"
        )
    if not np.array_equal(cache.classes, source.classes):
        raise ValueError(
            f"{source.path}: its {len(source.classes)} classes are not the "
            f"{len(cache.classes)} of {cache.path}, in their order; make both with the same classes"
        )


def _named(cache: FeatureCache) -> str:
    return f"{cache.network_name} ({str(cache.network_id)[:12]})"
