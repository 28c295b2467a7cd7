"""Which classes does each image show?  Label files, read into one compact value.

Each (image, class) is *positive* (with a confidence in (0, 1]), *negative*
(verified) or *unlisted*; :attr:`Labels.unlisted` says what the last one means.
The formats are told by their header:

=========================================  ==========================================
``image_id,labels``                        class ids separated by spaces, maybe none
no header, ``id,/m/a /m/b``                the same
``ImageID,Source,LabelName,Confidence``    one label a row; confidence 0 = negative
the same with ``XMin`` ...                 one box a row; a box is a positive label
``label_code``                             a list of classes
``label_code,description``                 classes and their names
=========================================  ==========================================
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.sparse import csr_matrix

from featcache.atomic import replacing
from featcache.entries import Entries
from featcache.errors import InputError
from featcache.labelfiles import (
    LIST_HEADER,
    Codes,
    Malformed,
    first_row,
    read_class_table,
    read_lists,
    read_rows,
    shown,
)
from featcache.names import texts_of

Unlisted = Literal["negative", "unknown"]


@dataclass(frozen=True, eq=False, init=False)
class Labels:
    """Labels of n images over K classes.

    Parameters
    ----------
    ids : array-like of shape (n,), str
        Image ids.
    classes : array-like of shape (K,), str
        Class ids, all different.
    positives : sparse matrix of shape (n, K)
        Confidence in (0, 1] of each positive label; kept as CSR, float32.
    negatives : sparse matrix of shape (n, K), optional
        Its pattern marks verified negatives; disjoint from `positives`.
    unlisted : {"negative", "unknown"}
        What a class stands for that is in neither matrix.
    names : array-like of shape (K,), str, optional
        Names of the classes for people.
    known : array-like of shape (n,), bool, optional
        False where no label file had an entry for the image. Default: all True.
    outside : array-like of shape (n,), int32, optional
        Number of true labels outside `classes`. They cannot be predicted and
        count as misses wherever a score is made. Default: zeros.

    Raises
    ------
    InputError
        If shapes disagree, classes repeat, a confidence is not in (0, 1] or a
        label is both positive and negative.
    """

    ids: np.ndarray
    classes: np.ndarray
    positives: csr_matrix
    negatives: csr_matrix | None
    unlisted: Unlisted
    names: np.ndarray | None
    known: np.ndarray
    outside: np.ndarray

    def __init__(
        self,
        ids: Sequence[str] | np.ndarray,
        classes: Sequence[str] | np.ndarray,
        positives: csr_matrix,
        negatives: csr_matrix | None = None,
        unlisted: Unlisted = "negative",
        names: Sequence[str] | np.ndarray | None = None,
        known: np.ndarray | None = None,
        outside: np.ndarray | None = None,
    ) -> None:
        n, K = len(ids), len(classes)
        values = {
            "ids": texts_of("Labels: ids", ids),
            "classes": texts_of("Labels: classes", classes),
            "positives": _canonical(positives),
            "negatives": None if negatives is None else _pattern(negatives),
            "unlisted": unlisted,
            "names": None if names is None else np.asarray(names, dtype=np.str_),
            "known": np.ones(n, bool) if known is None else np.asarray(known, dtype=bool),
            "outside": np.zeros(n, np.int32) if outside is None else np.asarray(outside, np.int32),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check(n, K)

    def _check(self, n: int, K: int) -> None:
        shapes = {"ids": (n,), "classes": (K,), "positives": (n, K), "negatives": (n, K)}
        shapes |= {"names": (K,), "known": (n,), "outside": (n,)}
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise InputError(
                    f"Labels: {name} has shape {value.shape}, expected {shape} "
                    f"for {n} ids and {K} classes"
                )
        if self.unlisted not in ("negative", "unknown"):
            raise InputError(
                f"Labels: unlisted is {self.unlisted!r}, expected 'negative' or 'unknown'"
            )
        _refuse_repeats(self.classes, "Labels: class")
        data = self.positives.data
        if not np.all((data > 0) & (data <= 1)):
            worst = data[~((data > 0) & (data <= 1))][0]
            raise InputError(f"Labels: a positive has confidence {worst}, expected (0, 1]")
        if np.any(self.outside < 0):
            raise InputError(f"Labels: outside has {self.outside.min()}, expected counts >= 0")
        if self.negatives is not None:
            both = self.positives.multiply(self.negatives).tocoo()
            if both.nnz:
                row, col = both.row[0], both.col[0]
                raise InputError(
                    f"Labels: {self.classes[col]} of image {self.ids[row]} "
                    "is both positive and negative; keep one"
                )

    def select(self, ids: Sequence[str] | np.ndarray) -> Labels:
        """Rows of `ids`, in that order; ids without an entry get an empty row, `known` False.

        Raises
        ------
        InputError
            If one of `ids` has several rows that differ.
        """
        wanted = texts_of("select: ids", ids)
        row_of = {name: row for row, name in enumerate(self.ids.tolist())}
        rows = np.array([row_of.get(name, -1) for name in wanted.tolist()], dtype=np.int64)
        if len(row_of) < len(self.ids):
            _refuse_two_answers(self, rows[rows >= 0], row_of)
        # Row -1 is the extra, empty one that is appended here.
        return replace(
            self,
            ids=wanted,
            positives=_with_empty_row(self.positives)[rows],
            negatives=None if self.negatives is None else _with_empty_row(self.negatives)[rows],
            known=np.append(self.known, False)[rows],
            outside=np.append(self.outside, np.int32(0))[rows],
        )

    def restrict(self, classes: Sequence[str] | np.ndarray) -> Labels:
        """The same images over other classes (any set, any order).

        Positives of dropped classes are added to `outside`. A class that was
        not there gets an empty column: labels counted in `outside` before stay
        there, since nobody knows any more which classes they were.
        """
        wanted = texts_of("restrict: classes", classes)
        _refuse_repeats(wanted, "restrict: class")
        position = {name: col for col, name in enumerate(wanted.tolist())}
        columns = np.array([position.get(name, -1) for name in self.classes.tolist()], np.int64)
        positives = _recode(self.positives, columns, len(wanted))
        dropped = np.diff(self.positives.indptr) - np.diff(positives.indptr)
        names = None
        if self.names is not None:
            name_of = dict(zip(self.classes.tolist(), self.names.tolist(), strict=True))
            names = np.array([name_of.get(c, c) for c in wanted.tolist()], dtype=np.str_)
        return replace(
            self,
            classes=wanted,
            positives=positives,
            negatives=None
            if self.negatives is None
            else _recode(self.negatives, columns, len(wanted)),
            names=names,
            outside=self.outside + dropped.astype(np.int32),
        )


def _refuse_two_answers(labels: Labels, used: np.ndarray, row_of: dict[str, int]) -> None:
    """Of rows of one id only those in `row_of` are `used`: are the others equal to them?"""
    taken = np.array([row_of[name] for name in labels.ids.tolist()])
    others = np.flatnonzero(np.isin(taken, used) & (taken != np.arange(len(taken))))
    parts = (labels.positives, labels.negatives, labels.known, labels.outside)
    for part in [part for part in parts if part is not None]:
        ours, theirs = part[others], part[taken[others]]
        differs = ours != theirs if part.ndim == 1 else (ours != theirs).getnnz(axis=1) > 0
        if differs.any():
            name = str(labels.ids[others[np.argmax(differs)]])
            raise InputError(f"Labels: image {name} has several rows that differ; keep one")


def _canonical(matrix: csr_matrix) -> csr_matrix:
    csr = csr_matrix(matrix, dtype=np.float32)
    if not csr.has_canonical_format:
        csr = csr.copy()
        csr.sum_duplicates()
    return csr


def _pattern(matrix: csr_matrix) -> csr_matrix:
    csr = _canonical(matrix)
    return csr_matrix((np.ones_like(csr.data), csr.indices, csr.indptr), shape=csr.shape)


def _with_empty_row(matrix: csr_matrix) -> csr_matrix:
    indptr = np.append(matrix.indptr, matrix.indptr[-1])
    return csr_matrix(
        (matrix.data, matrix.indices, indptr), shape=(matrix.shape[0] + 1, matrix.shape[1])
    )


def _recode(matrix: csr_matrix, columns: np.ndarray, K: int) -> csr_matrix:
    """Move column j to ``columns[j]``; drop it where that is -1."""
    kept = np.flatnonzero(columns >= 0)
    move = csr_matrix(
        (np.ones(len(kept), np.float32), (kept, columns[kept])), shape=(len(columns), K)
    )
    return matrix @ move


def _refuse_repeats(values: np.ndarray, what: str) -> None:
    unique, counts = np.unique(values, return_counts=True)
    if len(unique) < len(values):
        raise InputError(f"{what} {unique[counts > 1][0]} is listed twice; keep one")


# ------------------------------------------------------------------- readers


def read_labels(
    paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    classes: str | os.PathLike[str] | None = None,
    descriptions: str | os.PathLike[str] | None = None,
    unlisted: Unlisted = "negative",
) -> Labels:
    """Read label files of any mix of formats into one :class:`Labels`.

    Where several files speak about the same (image, class), the earlier file
    counts; within one file the highest confidence counts. Rows are in the order
    in which images first appear.

    Parameters
    ----------
    paths : path or sequence of paths
        Label files, the most trusted first (human, machine, boxes).
    classes : path, optional
        Class list, which sets the columns; true labels of other classes are
        counted in `Labels.outside`. Without it the columns are the sorted
        classes that are positive anywhere.
    descriptions : path, optional
        Names of the classes. A class without one is named by its id.
    unlisted : {"negative", "unknown"}
        What a class stands for that no file mentions for an image.

    Raises
    ------
    InputError
        In one line with file, line number and what was expected.

    Notes
    -----
    Files are streamed. An entry takes 12 bytes while its file is read and again
    12 once merged; ids and classes are kept once. O(rows log rows) time.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not paths:
        raise InputError("no label file was given; name at least one")
    return labels_of(Entries.read(paths), classes, descriptions, unlisted)


def read_submission(path: str | os.PathLike[str]) -> Labels:
    """Read predictions, ``image_id,labels`` with a header; any other format is refused.

    The classes are those that are predicted anywhere, sorted.
    """
    rows = read_rows(path)
    line, header = first_row(path, rows)
    if header != LIST_HEADER:
        raise InputError(
            f"{path}, line {line}: expected the header 'image_id,labels' of a submission, "
            f"got {shown(header)}"
        )
    entries = Entries()
    entries.merge(*read_lists(path, rows, entries.ids, entries.classes))
    return _matrices(entries, None, "negative")


def read_classes(path: str | os.PathLike[str]) -> np.ndarray:
    """Class ids, in the order of a file with a column ``label_code``; (K,) str."""
    return np.array(list(read_class_table(path, described=False)), dtype=np.str_)


def read_descriptions(path: str | os.PathLike[str]) -> dict[str, str]:
    """Names of classes, from a file ``label_code,description``."""
    return read_class_table(path, described=True)


def write_labels(
    path: str | os.PathLike[str],
    ids: Sequence[str] | np.ndarray,
    label_sets: Sequence[Iterable[str]],
) -> None:
    """Write ``image_id,labels``, one row an image, class ids separated by spaces.

    The file appears whole or not at all: it is written beside `path`, synced
    and renamed over it.

    Raises
    ------
    InputError
        If an id repeats, an id cannot be read back, or the lengths differ.
    """
    if len(ids) != len(label_sets):
        raise InputError(f"{path}: {len(ids)} ids but {len(label_sets)} label sets; give one each")
    try:
        with replacing(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(LIST_HEADER)
            writer.writerows(_list_rows(ids, label_sets))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    except Malformed as fault:
        raise InputError(f"{path}: not written: {fault}") from None


def _list_rows(
    ids: Sequence[str] | np.ndarray, label_sets: Sequence[Iterable[str]]
) -> Iterator[tuple[str, str]]:
    id_codes, class_codes = Codes("an image id"), Codes("a class id", spaces=False)
    for row, (name, labels) in enumerate(zip(ids, label_sets, strict=True)):
        if id_codes[name] < row:
            raise Malformed(f"image id {name!r} is given twice; keep one")
        known = [label for label in labels if class_codes[label] >= 0]
        yield name, " ".join(known)


# ------------------------------------------------------------- entries to labels


def labels_of(
    entries: Entries,
    classes: str | os.PathLike[str] | None = None,
    descriptions: str | os.PathLike[str] | None = None,
    unlisted: Unlisted = "negative",
) -> Labels:
    """Entries over the classes of a list, or the sorted positive ones; see :func:`read_labels`."""
    wanted = None if classes is None else read_classes(classes)
    entries.refuse_separators(wanted)
    labels = _matrices(entries, wanted, unlisted)
    if descriptions is None:
        return labels
    name_of = read_descriptions(descriptions)
    return replace(
        labels, names=np.array([name_of.get(c, c) for c in labels.classes.tolist()], dtype=np.str_)
    )


def _matrices(entries: Entries, wanted: np.ndarray | None, unlisted: Unlisted) -> Labels:
    columns, rows = entries.columns, entries.rows
    positive = entries.confidences > 0
    names = list(entries.classes)
    if wanted is None:
        used = np.unique(columns[positive]).tolist()
        wanted = np.array(sorted(names[code] for code in used), dtype=np.str_)
    position = {name: column for column, name in enumerate(wanted.tolist())}
    column_of = np.array([position.get(name, -1) for name in names], np.int32)
    columns = column_of[columns]
    n, inside = len(entries.ids), columns >= 0

    def matrix(chosen: np.ndarray, data: np.ndarray) -> csr_matrix:
        counts = np.bincount(rows[chosen], minlength=n)
        indptr = np.concatenate([[0], np.cumsum(counts)])
        csr = csr_matrix((data[chosen], columns[chosen], indptr), shape=(n, len(wanted)))
        csr.sort_indices()
        return csr

    refuted = inside & ~positive
    return Labels(
        ids=list(entries.ids),
        classes=wanted,
        positives=matrix(inside & positive, entries.confidences),
        negatives=matrix(refuted, np.ones_like(entries.confidences)) if refuted.any() else None,
        unlisted=unlisted,
        outside=np.bincount(rows[~inside & positive], minlength=n),
    )
