"""Rows are found by their ids as a search from the start finds them."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache import FeatureCache, InputError
from featcache.contents import encoded
from featcache.lookup import MISSING, SEVERAL, Rows

# No NUL: NumPy's texts of a fixed length end there.
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


def searched(ids: list[str], names: list[str]) -> list[int]:
    return [
        MISSING if name not in ids else SEVERAL if ids.count(name) > 1 else ids.index(name)
        for name in names
    ]


@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(ids=st.lists(NAMES, min_size=1, max_size=30), others=st.lists(NAMES, max_size=5))
def test_rows_are_those_of_a_search(ids: list[str], others: list[str]) -> None:
    names = [*ids, *others, *(name + "x" for name in ids), ids[0]]
    found = Rows(encoded("image id", ids)).find(names)
    assert found.tolist() == searched(ids, names)
    assert found.tolist() == Rows(encoded("image id", ids)).find(np.array(names)).tolist()


def test_many_ids_with_a_few_that_are_several() -> None:
    rng = np.random.default_rng(0)
    ids = [f"{number:016x}" for number in rng.permutation(5000)]
    ids[7], ids[4000], ids[4999] = ids[3], ids[3], ids[10]
    names = [*ids[::3], ids[3], ids[10], "nowhere"]
    assert Rows(encoded("image id", ids)).find(names).tolist() == searched(ids, names)


class Crowded(Rows):
    """Of so many hashes that most ids share theirs with others."""

    hashes = 1

    def _hashes(self, words: np.ndarray) -> np.ndarray:
        hashed = super()._hashes(words) >> np.uint64(32)
        return (hashed % np.uint64(self.hashes)) << np.uint64(40)


@pytest.mark.parametrize("hashes", [1, 2, 3, 50])
@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(ids=st.lists(NAMES, min_size=1, max_size=30), again=st.lists(st.integers(0, 29), max_size=9))
def test_ids_that_share_a_hash_are_told_apart(
    ids: list[str], again: list[int], hashes: int
) -> None:
    ids = ids + [ids[k % len(ids)] for k in again]
    names = [*ids, *(name + "x" for name in ids), "nowhere"]
    kind = type("Some", (Crowded,), {"hashes": hashes})
    assert kind(encoded("image id", ids)).find(names).tolist() == searched(ids, names)


def test_many_ids_of_few_hashes() -> None:
    """Ten million ids of any hash are such: none without two that share theirs."""
    rng = np.random.default_rng(0)
    ids = [f"{number:016x}" for number in rng.permutation(3000)]
    ids[7], ids[2000], ids[2999] = ids[3], ids[3], ids[10]
    names = [*ids[::3], ids[3], ids[10], "nowhere"]
    kind = type("Some", (Crowded,), {"hashes": 200})
    assert kind(encoded("image id", ids)).find(names).tolist() == searched(ids, names)


@pytest.mark.parametrize("length", [7, 8, 9, 15, 16, 17])
def test_a_longer_name_is_never_taken_for_its_beginning(length: int) -> None:
    name = "é" + "a" * (length - 2)
    rows = Rows(encoded("image id", [name, "z"]))
    assert rows.find([name, name + "a", name[:-1], name + "a" * 50]).tolist() == [0, -1, -1, -1]


def test_texts_that_are_no_unicode_are_not_there() -> None:
    assert Rows(encoded("image id", ["a"])).find(["\udcff", "a"]).tolist() == [MISSING, 0]


def test_ids_may_be_numbers_or_come_one_by_one(tmp_path: Path) -> None:
    cache = FeatureCache.write(tmp_path / "x.h5", np.eye(4), [10, 11, 12, 13])
    assert cache.select([12, 10]).ids.tolist() == ["12", "10"]
    assert cache.select(name for name in ["11"]).ids.tolist() == ["11"]


def test_one_id_that_is_no_list_is_refused(tmp_path: Path) -> None:
    cache = FeatureCache.write(tmp_path / "x.h5", np.eye(2), ["a", "b"])
    with pytest.raises(InputError, match=r"x\.h5: select\('ab'\): give a list of ids, \['ab'\]"):
        cache.select("ab")


def test_rows_take_little_memory() -> None:
    ids = encoded("image id", [f"{number:024x}" for number in range(20_000)])
    tracemalloc.start()
    rows = Rows(ids)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert rows.find(["0" * 23 + "5"]).tolist() == [5]
    assert held < 12 * len(ids)
