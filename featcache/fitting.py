"""Which rows and columns of a cache train a head, and on what targets?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from featcache.annotations import Labels
from featcache.errors import InputError


def trainable_rows(
    path: Path, valid: np.ndarray, labels: Labels | None
) -> tuple[Labels, np.ndarray]:
    """The labels, and the rows that are both readable and labelled.

    Raises
    ------
    InputError
        If there are no labels or no such rows.
    """
    if labels is None:
        raise InputError(
            f"{path}: has no labels; extract it with --labels, or give labels= to "
            "FeatureCache.write"
        )
    rows = np.flatnonzero(valid & labels.known)
    if len(rows) == 0:
        raise InputError(
            f"{path}: none of its {len(valid)} rows is both readable and labelled; "
            "check that the label files are about these images"
        )
    return labels, rows


def columns_of(path: Path, classes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(K',) intp: columns of the wanted class ids, in their order.

    Raises
    ------
    InputError
        If one is not there.
    """
    if wanted.ndim != 1:
        raise InputError(f"{path}: classes={str(wanted)!r}: give a list of class ids")
    column_of = {name: column for column, name in enumerate(classes.tolist())}
    unknown = [name for name in wanted.tolist() if name not in column_of]
    if unknown:
        raise InputError(
            f"{path}: class {unknown[0]!r} is not among its {len(column_of)} classes; "
            "they are in .classes"
        )
    return np.array([column_of[name] for name in wanted.tolist()], dtype=np.intp)


def positives(labels: Labels, rows: np.ndarray) -> np.ndarray:
    """(K,) int: how many of the rows are positive for each class."""
    return np.bincount(labels.positives[rows].indices, minlength=len(labels.classes))


def targets(labels: Labels, rows: np.ndarray, columns: np.ndarray) -> dict[str, Any]:
    """``Y``, CSR of confidences, and ``mask``, dense: True where unknown; None if nowhere."""
    Y = labels.positives[rows][:, columns]
    Y.sort_indices()
    mask = None
    if labels.unlisted == "unknown":
        mask = np.ones(Y.shape, bool)
        mask[Y.nonzero()] = False
        if labels.negatives is not None:
            mask[labels.negatives[rows][:, columns].nonzero()] = False
    return {"Y": Y, "mask": mask}
