"""Which network are several networks side by side?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import combinations
from math import comb

from featcache.cache import FeatureCache

_MOST = 5000  # combinations of one size that are looked at: some milliseconds


def in_order(caches: Iterable[FeatureCache]) -> list[FeatureCache]:
    """By the ids of their networks: an order that all image sets share."""
    return sorted(caches, key=lambda cache: cache.network_id or "")


def parts(cache: FeatureCache) -> list[str]:
    """The ids of the networks whose features are side by side in a cache; empty of one network."""
    return [part.get("network_id") for part in cache.provenance.get("concatenated", [])]


def combined_id(caches: Sequence[FeatureCache]) -> str:
    """The `network_id` of features of these networks side by side, in this order."""
    ids = [cache.network_id for cache in caches]
    return hashlib.sha256(json.dumps({"concatenated": ids}).encode()).hexdigest()


def combination(network_id: str | None, caches: Iterable[FeatureCache]) -> list[FeatureCache]:
    """Those of the caches whose features make that network side by side; empty: none do."""
    ordered = in_order(caches)
    sizes = [m for m in range(2, len(ordered) + 1) if comb(len(ordered), m) <= _MOST]
    for number in sizes:
        for some in combinations(ordered, number):
            if combined_id(some) == network_id:
                return list(some)
    return []
