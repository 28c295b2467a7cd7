"""Which network are several networks side by side?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import combinations

from featcache.cache import FeatureCache

_MOST = 12  # networks, of which 4,083 combinations are looked at in some milliseconds


def in_order(caches: Iterable[FeatureCache]) -> list[FeatureCache]:
    """By the names and ids of their networks: an order that all image sets share."""
    return sorted(caches, key=lambda cache: (cache.network_name, cache.network_id or ""))


def combined_id(caches: Sequence[FeatureCache]) -> str:
    """The `network_id` of features of these networks side by side, in this order."""
    ids = [cache.network_id for cache in caches]
    return hashlib.sha256(json.dumps({"concatenated": ids}).encode()).hexdigest()


def combination(network_id: str | None, caches: Iterable[FeatureCache]) -> list[FeatureCache]:
    """Those of the caches whose features make that network side by side; empty: none do."""
    ordered = in_order(caches)[:_MOST]
    for number in range(2, len(ordered) + 1):
        for some in combinations(ordered, number):
            if combined_id(some) == network_id:
                return list(some)
    return []
