"""Which rows test which model?  Folds balanced over labels, with groups kept whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from numbers import Integral
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, issparse
from sklearn.model_selection import BaseCrossValidator

from heads.inputs import Matrix, check_groups

Fold = tuple[np.ndarray, np.ndarray]

_FEW = 16  # labels of a group, up to which they are quicker one by one than as an array


class MultilabelGroupKFold(BaseCrossValidator):
    """K folds that share out every label evenly and never split a group.

    Iterative stratification [1]_: the label with the fewest positives left is
    dealt out first, each of its groups to the fold that still lacks most of
    that label. Unlike in the paper, ties go to the fold that lacks most of all
    labels of the group (the sum of each lack relative to the label's total),
    which keeps frequent labels from drifting while rare ones are dealt; then
    to the fold with most room. Folds never outgrow n / n_splits rows (rounded
    up) unless a group fits nowhere, so that without groups their sizes differ
    by at most one row.

    Parameters
    ----------
    n_splits : int
        Number of folds, at least 2.
    random_state : int
        Seed of the order among groups and folds that are otherwise equal.

    Notes
    -----
    With `groups` the folds do not depend on the order of rows. The time is
    O(nnz(Y) log K + groups * n_splits), the memory O(nnz(Y) + (K + groups) * n_splits).

    References
    ----------
    .. [1] Sechidis, Tsoumakas, Vlahavas (2011), "On the stratification of
       multi-label data", ECML PKDD.

    Examples
    --------
    >>> import numpy as np
    >>> Y = np.repeat([[1, 0], [0, 1], [1, 1], [0, 0]], 3, axis=0)
    >>> groups = np.repeat(np.arange(6), 2)  # two views of each of six images
    >>> for train, test in MultilabelGroupKFold(n_splits=3, random_state=0).split(Y, Y, groups):
    ...     print(np.unique(groups[test]), Y[test].sum(axis=0))
    [1 4] [2 2]
    [0 2] [2 2]
    [3 5] [2 2]
    """

    # Tells scikit-learn's metadata routing to hand groups over.
    __metadata_request__split = {"groups": True}  # noqa: RUF012

    n_splits: int
    random_state: int

    def __init__(self, n_splits: int = 5, random_state: int = 0) -> None:
        if isinstance(n_splits, bool) or not isinstance(n_splits, Integral) or n_splits < 2:
            raise ValueError(f"n_splits is {n_splits!r}; expected an integer of at least 2")
        self.n_splits = int(n_splits)
        self.random_state = random_state

    def get_n_splits(self, X: Any = None, Y: Any = None, groups: Any = None) -> int:
        """`n_splits`, whatever the data."""
        return self.n_splits

    def split(self, X: Any, Y: Any = None, groups: Any = None) -> Iterator[Fold]:
        """Yield (train, test) row indices, both ascending.

        Parameters
        ----------
        X : sequence or array of n rows
            Only its length is used.
        Y : (n, K) dense or sparse, or (n,)
            Labels; what is neither zero nor NaN (unknown) is positive. With one
            dimension, the values are the labels.
        groups : (n,), optional
            Rows of equal value stay together. Default: each row by itself.

        Raises
        ------
        ValueError
            If lengths disagree, or there are fewer groups than folds.
        """
        n = _n_rows(X)
        positives = _positives(Y)
        if positives.shape[0] != n:
            raise ValueError(f"Y has {positives.shape[0]} rows, but X has {n}")
        codes, n_groups = _group_codes(groups, n)
        if n_groups < self.n_splits:
            what = "rows" if groups is None else "groups"
            raise ValueError(
                f"n_splits is {self.n_splits}, but there are only {n_groups} {what}; lower n_splits"
            )
        member = csr_matrix((np.ones(n, np.int64), (codes, np.arange(n))), shape=(n_groups, n))
        counts = csr_matrix(member @ positives)
        counts.sort_indices()
        deal = _Deal(counts, np.bincount(codes), self.n_splits, self.random_state)
        fold_of = deal.folds()[codes]
        for fold in range(self.n_splits):
            yield np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)


class _Deal:
    """Deals groups out to folds.

    Parameters
    ----------
    counts : csr_matrix of shape (G, K), int64
        Positives of each label in each group.
    sizes : (G,) int array
        Rows of each group.
    """

    def __init__(self, counts: csr_matrix, sizes: np.ndarray, n_splits: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        n_groups, n = len(sizes), int(sizes.sum())
        self.counts, self.sizes, self.n_splits = counts, sizes, n_splits
        self.by_label = counts.tocsc()
        self.rank = rng.permutation(n_groups)
        self.noise = rng.random((n_groups, n_splits))
        self.room = [n // n_splits] * n_splits
        for fold in rng.permutation(n_splits)[: n % n_splits].tolist():
            self.room[fold] += 1
        self.total = np.asarray(counts.sum(axis=0), dtype=np.int64).ravel()
        self.left = self.total.copy()
        # What a fold lacks of a label, times n_splits: integers, so that ties are exact.
        self.lack = np.repeat(self.left[:, None], n_splits, axis=1)
        # Numbers one by one are read several times faster through these.
        self.lacks, self.totals = self.lack.reshape(-1).data, self.total.data
        self.indices, self.data = counts.indices.data, counts.data.data
        self.ends, self.size_of = counts.indptr.data, sizes.data
        self.fold_of = np.full(n_groups, -1)
        self.undealt = n_groups
        self.empty = set(range(n_splits))

    def folds(self) -> np.ndarray:
        """(G,) fold of each group."""
        heap = [(count, label) for label, count in enumerate(self.left.tolist()) if count]
        heapify(heap)
        while heap:
            count, label = heappop(heap)
            if count != self.left[label]:
                continue  # stale: the label was pushed again when its count fell
            touched = self._deal_label(label)
            for other, rest in zip(touched.tolist(), self.left[touched].tolist(), strict=True):
                if rest:
                    heappush(heap, (rest, other))
        nothing = [0] * self.n_splits
        rest_groups = np.flatnonzero(self.fold_of < 0)
        order = np.lexsort((self.rank[rest_groups], -self.sizes[rest_groups]))
        for group in rest_groups[order].tolist():
            self._put(group, self._choose(group, nothing))
        return self.fold_of

    def _deal_label(self, label: int) -> np.ndarray:
        """Deal all groups with `label`, the fullest first; return the labels they touched."""
        at = slice(self.by_label.indptr[label], self.by_label.indptr[label + 1])
        groups, counts = self.by_label.indices[at], self.by_label.data[at]
        new = self.fold_of[groups] < 0
        groups, counts = groups[new], counts[new]
        order = np.lexsort((self.rank[groups], -self.sizes[groups], -counts))
        at_label = slice(label * self.n_splits, (label + 1) * self.n_splits)
        for group in groups[order].tolist():
            self._put(group, self._choose(group, self.lacks[at_label].tolist()))
        dealt = self.counts[groups]
        np.subtract.at(self.left, dealt.indices, dealt.data)
        return np.unique(dealt.indices)

    def _choose(self, group: int, lack: list[int]) -> int:
        """The fold that lacks most of the label; of all its labels; with most room; by lot."""
        size, room = self.size_of[group], self.room
        folds = list(self.empty if self.undealt <= len(self.empty) else range(self.n_splits))
        fitting = [fold for fold in folds if room[fold] >= size]
        if not fitting:
            most_room = max([room[fold] for fold in folds])
            fitting = [fold for fold in folds if room[fold] == most_room]
        most = max([lack[fold] for fold in fitting])
        lacking = [fold for fold in fitting if lack[fold] == most]
        if len(lacking) == 1:
            return lacking[0]
        share = self._share(group, lacking)
        keys = [(share[fold], room[fold]) for fold in lacking]
        best = max(keys)
        if keys.count(best) == 1:
            return lacking[keys.index(best)]
        noise = self.noise[group].tolist()
        equal = [fold for fold, key in zip(lacking, keys, strict=True) if key == best]
        return max(equal, key=noise.__getitem__)

    def _share(self, group: int, folds: list[int]) -> list[float]:
        """What these folds lack of the group's labels, in shares of all of them."""
        at = self._at(group)
        if at.stop - at.start > _FEW:
            labels, counts = self.counts.indices[at], self.counts.data[at]
            shares: list[float] = (counts @ (self.lack[labels] / self.total[labels, None])).tolist()
            return shares
        share = [0.0] * self.n_splits
        for label, count in zip(self.indices[at].tolist(), self.data[at].tolist(), strict=True):
            part, start = count / self.totals[label], label * self.n_splits
            for fold in folds:
                share[fold] += part * self.lacks[start + fold]
        return share

    def _at(self, group: int) -> slice:
        return slice(self.ends[group], self.ends[group + 1])

    def _put(self, group: int, fold: int) -> None:
        at = self._at(group)
        if at.stop - at.start > _FEW:
            self.lack[self.counts.indices[at], fold] -= self.n_splits * self.counts.data[at]
        else:
            for label, count in zip(self.indices[at].tolist(), self.data[at].tolist(), strict=True):
                self.lacks[label * self.n_splits + fold] -= self.n_splits * count
        self.room[fold] -= self.size_of[group]
        self.fold_of[group] = fold
        self.undealt -= 1
        self.empty.discard(fold)


def check_folds(
    cv: int | BaseCrossValidator | Iterable[Fold],
    X: Any,
    Y: Matrix,
    groups: np.ndarray | None = None,
    random_state: int = 0,
) -> list[Fold]:
    """Resolve `cv` into (train, test) index arrays that give each row one held-out score.

    Parameters
    ----------
    cv : int, splitter or iterable of (train, test)
        An int stands for ``MultilabelGroupKFold(cv, random_state)``; indices may
        also be boolean masks over the rows.
    X, Y, groups
        What is to be split; of X only the length is used here.

    Raises
    ------
    ValueError
        If a row is tested twice or never, stands on both sides of a fold or
        does not exist; if a fold trains or tests on nothing; or if a group is
        on both sides of a fold.
    """
    n = _n_rows(X)
    codes, n_groups = _group_codes(groups, n)
    if isinstance(cv, Integral) and not isinstance(cv, bool):
        cv = MultilabelGroupKFold(int(cv), random_state)
    if hasattr(cv, "split") and not isinstance(cv, str):
        cv = cv.split(X, Y, groups)
    elif isinstance(cv, (str, bool)) or not isinstance(cv, Iterable):
        raise ValueError(f"cv is {cv!r}; expected an int, a splitter or (train, test) pairs")
    folds = [_fold(fold, n, f"fold {k} of cv") for k, fold in enumerate(cv)]
    tested = np.zeros(n, dtype=np.int64)
    for k, (train, test) in enumerate(folds):
        np.add.at(tested, test, 1)
        trained = np.zeros(n_groups, dtype=bool)
        trained[codes[train]] = True
        shared = test[trained[codes[test]]]
        if len(shared):
            # Without groups, a row is its own group.
            what = f"row {shared[0]}" if groups is None else f"group {groups[shared[0]]!r}"
            raise ValueError(f"fold {k} of cv has {what} in both train and test; keep it whole")
    if np.any(tested != 1):
        row = np.flatnonzero(tested != 1)[0]
        raise ValueError(
            f"cv tests row {row} {tested[row]} times; each row must be tested exactly once, "
            "since out-of-fold scores need one prediction a row"
        )
    return folds


def _n_rows(X: Any) -> int:
    return int(X.shape[0]) if hasattr(X, "shape") else len(X)


def _fold(fold: Any, n: int, what: str) -> Fold:
    if not isinstance(fold, Sequence) or len(fold) != 2:
        raise ValueError(f"{what} is {fold!r:.60}; expected a pair (train, test)")
    return _indices(fold[0], n, f"train of {what}"), _indices(fold[1], n, f"test of {what}")


def _indices(rows: Any, n: int, what: str) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.dtype == bool and rows.shape == (n,):
        rows = np.flatnonzero(rows)
    if rows.ndim != 1 or not len(rows) or rows.dtype.kind not in "iu":
        raise ValueError(f"{what} must be row indices, at least one; got {rows!r:.60}")
    if rows.min() < 0 or rows.max() >= n:
        raise ValueError(f"{what} has row {rows.max()}, but there are only {n} rows")
    return rows.astype(np.intp)


def _group_codes(groups: Any, n: int) -> tuple[np.ndarray, int]:
    """Groups as 0..G-1 in sorted order, and G; each row by itself if None."""
    groups = check_groups(groups, n)
    if groups is None:
        return np.arange(n), n
    unique, codes = np.unique(groups, return_inverse=True)
    return codes, len(unique)


def _positives(Y: Any) -> csr_matrix:
    """(n, K) CSR of ones, int64, where Y is neither zero nor NaN; one column a value if 1-D."""
    if Y is None:
        raise ValueError("Y is None; stratified folds need the labels")
    if issparse(Y):
        Y = csr_matrix(Y, copy=True)
        Y.sum_duplicates()
        Y.data = ((Y.data != 0) & (Y.data == Y.data)).astype(np.int64)
        Y.eliminate_zeros()
        return Y
    Y = np.asarray(Y)
    if Y.ndim == 1:
        rows = np.flatnonzero(Y == Y)  # NaN differs from itself
        values, codes = np.unique(Y[rows], return_inverse=True)
        return csr_matrix(
            (np.ones(len(rows), np.int64), (rows, codes)), shape=(len(Y), len(values))
        )
    if Y.ndim != 2:
        raise ValueError(f"Y has shape {Y.shape}; expected (n, K) or (n,)")
    return csr_matrix((Y != 0) & (Y == Y), dtype=np.int64)
