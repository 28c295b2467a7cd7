"""Tables of pandas are taken by the names of their rows and columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_array_equal
from scipy.sparse import csr_matrix

from featcache import FeatureCache
from featcache.errors import InputError

IDS = ["c", "a", "d", "b"]
CLASSES = ["cat", "dog", "owl"]
X = np.arange(8.0).reshape(4, 2)
Y = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
TABLE = pd.DataFrame(Y, index=IDS, columns=CLASSES)


def write(folder: Path, features: Any = X, labels: Any = Y, **more: Any) -> FeatureCache:
    return FeatureCache.write(folder / "c.h5", features, more.pop("ids", IDS), labels, **more)


def truth(cache: FeatureCache) -> np.ndarray:
    assert cache.labels is not None
    return cache.labels.positives.toarray()


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (TABLE, None),
        (TABLE.iloc[[2, 0, 3, 1]], CLASSES),
        (TABLE[["owl", "cat", "dog"]], CLASSES),
        (TABLE.sort_index().sort_index(axis=1, ascending=False), CLASSES),
        (pd.concat([TABLE, pd.DataFrame([[1, 1, 1]], ["more"], CLASSES)]), None),
        (TABLE.assign(more=1), CLASSES),
        (TABLE.astype("Int64"), CLASSES),
        (TABLE.reset_index(drop=True), CLASSES),
        (TABLE.set_index(np.array([7, 3, 9, 5])), CLASSES),  # left over by a filter: by place
    ],
)
def test_labels_are_taken_by_name(tmp_path: Path, labels: pd.DataFrame, classes: Any) -> None:
    cache = write(tmp_path, labels=labels, classes=classes)
    assert_array_equal(cache.classes, CLASSES)
    assert_array_equal(truth(cache), Y)


def test_features_and_single_columns_are_taken_by_name(tmp_path: Path) -> None:
    features = pd.DataFrame(X, index=IDS, columns=["x", "y"]).sort_index()
    cache = write(tmp_path, features, TABLE["dog"].iloc[::-1], classes=["dog"])
    assert_array_equal(cache.features[:, 0], X)
    assert_array_equal(truth(cache)[:, 0], Y[:, 1])


def test_numbers_as_ids_are_names_unless_pandas_counted(tmp_path: Path) -> None:
    ids = [3, 1, 0, 2]
    named = TABLE.set_index(np.array(ids)).sort_index()
    counted = TABLE.reset_index(drop=True)
    assert named.index.tolist() == counted.index.tolist()
    for labels in (named, counted):
        assert_array_equal(truth(write(tmp_path, labels=labels, ids=ids, overwrite=True)), Y)


def test_what_is_beside_features_and_labels_is_taken_by_name_too(tmp_path: Path) -> None:
    flags = pd.Series([True, False, True, True], index=IDS).sort_index()
    why = pd.Series([None, "blurred", None, None], index=IDS, dtype=object).sort_index()
    W = pd.DataFrame(np.eye(3, 2), index=CLASSES).iloc[::-1]
    b = pd.Series([1.0, 2, 3], index=CLASSES).iloc[::-1]
    words = pd.Series(["Cat", "Dog", "Owl"], index=CLASSES).iloc[[1, 2, 0]]
    beside = {"weight": W, "bias": b, "class_names": words}
    cache = write(tmp_path, labels=TABLE, valid=flags, reasons=why, **beside)
    assert_array_equal(cache.valid, [True, False, True, True])
    assert_array_equal(cache.weight, np.eye(3, 2))
    assert_array_equal(cache.bias, [1, 2, 3])
    assert_array_equal(cache.class_names, ["Cat", "Dog", "Owl"])
    alone = FeatureCache.write(tmp_path / "alone.h5", X, IDS, TABLE["dog"])
    assert_array_equal(alone.classes, ["dog"])


def test_what_a_table_does_not_tell_is_unknown(tmp_path: Path) -> None:
    labels = TABLE.astype("Int64").mask(TABLE == 0)
    rows = write(tmp_path, labels=labels).training()
    assert_array_equal(rows["mask"], Y == 0)


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (TABLE.rename({"b": "B"}), None, "no row is named 'b'"),
        (pd.concat([TABLE, TABLE.iloc[:1]]), None, "two rows are named 'c'"),
        (TABLE, ["cat", "dog", "bee"], "no column is named 'bee'.*labels.to_numpy"),
        (TABLE.iloc[:2], None, "no row is named 'd'"),
        (TABLE.reset_index(drop=True).iloc[:2], CLASSES, "a row for each id"),
        (TABLE.set_index(np.array([7, 3, 9, 4])), None, "no row is named '5'"),
        (TABLE.astype(str).replace("1", "yes"), None, "no matrix of numbers"),
    ],
)
def test_names_that_do_not_fit_are_refused(
    tmp_path: Path, labels: Any, classes: Any, message: str
) -> None:
    ids = [7, 3, 9, 5] if 7 in labels.index else IDS
    with pytest.raises(InputError, match=message):
        write(tmp_path, labels=labels, classes=classes, ids=ids)


def test_sparse_features_and_ids_that_numpy_would_cut_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"features are sparse; give features.toarray\(\)"):
        write(tmp_path, csr_matrix(X))
    with pytest.raises(InputError, match=r"ids: number 1 is 'c\\x00'; take the NUL out of it"):
        write(tmp_path, ids=["c", "c\0", "d", "b"])
