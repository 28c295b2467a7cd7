"""Hashes of ids are numpy's own Philox, one id at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.hashing import id_hashes
from featcache.views import generator


@settings(derandomize=True, deadline=None, database=None, max_examples=80)
@given(ids=st.lists(st.text(max_size=20), max_size=8), purpose=st.sampled_from(["hold-out", ""]))
def test_hashes_are_the_first_numbers_of_generators(ids: list[str], purpose: str) -> None:
    ids = [i for i in ids if i.isprintable()]
    expected = [generator(purpose, i).bit_generator.random_raw() for i in ids]
    found = id_hashes(purpose, ids)
    assert found.dtype == np.uint64
    assert found.tolist() == expected


def test_hashes_spread_evenly() -> None:
    hashes = id_hashes("hold-out", [f"{k:016x}" for k in range(20_000)])
    assert len(set(hashes.tolist())) == 20_000
    counts = np.bincount(hashes >> np.uint64(60), minlength=16)
    assert abs(counts - 1250).max() < 5 * np.sqrt(1250)
