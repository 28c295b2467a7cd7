"""Moments of shards add up to those of all rows, on any number of workers."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import distributed
import joblib
import numpy as np
import pytest
from scipy.sparse import csr_matrix

from heads import DropoutRidge
from heads.moments import Moments
from heads.sharding import FAN_IN, sharded_moments, sharded_ridge

N, V, D, K = 300, 2, 12, 5
_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(N, V, D)) + 3
Y = (_RNG.random((N, K)) < 0.3).astype(float)
A = _RNG.uniform(0, 2, N)


def part(start: int, stop: int, sparse: bool = False) -> tuple[Any, Any, Any]:
    at = slice(start, stop)
    return X[at], csr_matrix(Y[at]) if sparse else Y[at], A[at]


def shards(count: int, sparse: bool = False) -> list[Any]:
    cuts = np.linspace(0, N, count + 1).astype(int)
    return [partial(part, a, b, sparse) for a, b in pairwise(cuts)]


@pytest.mark.parametrize("count", [1, 2, FAN_IN, FAN_IN + 1, FAN_IN**2 + 3])
def test_any_partition_gives_the_moments_of_all_rows(count: int) -> None:
    origin = np.full(D, 2.5)
    rows, T, a = X.reshape(-1, D), np.repeat(Y, V, axis=0), np.repeat(A / V, V)
    expected = Moments.of(rows, T, a, origin)
    found = sharded_moments(shards(count, sparse=count == 2), origin)
    for name in ("origin", "weight", "x", "xx", "t", "xt", "tt"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-10)


@pytest.mark.parametrize(("dropout", "l2"), [(0.0, 1.0), (0.3, 0.0), (0.5, 2.0)])
def test_the_head_is_that_of_all_rows(dropout: float, l2: float) -> None:
    W, b = sharded_ridge(shards(11), dropout, l2)
    head = DropoutRidge(dropout=dropout, l2=l2).fit(X, Y, sample_weight=A)
    np.testing.assert_allclose(W, head.coef_, atol=1e-9)
    np.testing.assert_allclose(b, head.intercept_, atol=1e-9)


def test_half_precision_rows_are_summed_without_loss() -> None:
    def half(start: int, stop: int) -> tuple[Any, Any, Any]:
        return X[start:stop].astype(np.float16), Y[start:stop], None

    W, b = sharded_ridge([partial(half, 0, 100), partial(half, 100, N)], 0.3)
    head = DropoutRidge(dropout=0.3).fit(X.astype(np.float16).astype(float), Y)
    np.testing.assert_allclose(W, head.coef_, atol=1e-5)
    np.testing.assert_allclose(b, head.intercept_, atol=1e-4)


def test_the_number_of_workers_changes_no_bit() -> None:
    alone = sharded_moments(shards(20))
    threads = joblib.parallel_config("threading", n_jobs=3)
    with threads:
        several = sharded_moments(shards(20))
    for name in ("weight", "x", "xx", "xt", "tt"):
        np.testing.assert_array_equal(getattr(several, name), getattr(alone, name))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda: (X[:5], Y[:4], None), r"shard 1 gives X \(5, 2, 12\) and Y \(4, 5\)"),
        (lambda: (X[:5, :, :3], Y[:5], None), "shard 1 has 3 features, but others 12"),
        (lambda: (X[:5], Y[:5, :2], None), "shard 1 has 2 labels, but others 5"),
        (lambda: (X[:5], np.ma.masked_less(Y[:5], 1), None), "shard 1: Y is masked; give rows"),
        (lambda: (X[:5] * np.inf, Y[:5], None), "shard 1: X holds a value that is not finite"),
        (lambda: (X[:5], Y[:5] * np.nan, None), "shard 1: Y holds a value that is not finite"),
        (lambda: (X[:5], Y[:5], -A[:5]), "weight"),
    ],
)
def test_shards_that_do_not_fit_are_named(changed: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sharded_moments([partial(part, 0, 9), changed])


def test_no_shards_and_other_labels_far_away_are_refused() -> None:
    with pytest.raises(ValueError, match="there are no shards"):
        sharded_moments([])
    many = [*shards(FAN_IN), lambda: (X[:5], Y[:5, :2], None)]
    with pytest.raises(ValueError, match="shards 8 and on have 2 labels, but shard 0 has 5"):
        sharded_moments(many)


def _rows(path: str, ids: list[str]) -> tuple[Any, Any, Any]:
    from featcache import FeatureCache

    rows = FeatureCache(path).select(ids).training()
    return rows["X"], rows["Y"], None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of dask and what it brings
def test_a_dask_cluster_sums_the_shards_of_a_cache(tmp_path: Any) -> None:
    from tests import synthetic

    some = synthetic.images(200, 0)
    cache = synthetic.write(tmp_path / "big.h5", some, views=2)
    split = [some.ids[start : start + 12] for start in range(0, 200, 12)]
    pieces = [partial(_rows, str(cache.path), ids) for ids in split]
    alone = sharded_ridge(pieces, 0.2)
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    )
    with cluster, distributed.Client(cluster), joblib.parallel_config("dask"):
        found = sharded_ridge(pieces, 0.2)
    np.testing.assert_allclose(found[0], alone[0], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found[1], alone[1], rtol=1e-6, atol=1e-9)
    head = DropoutRidge(dropout=0.2).fit(**_unpulled(cache))
    np.testing.assert_allclose(found[0], head.coef_, atol=1e-5)


def _unpulled(cache: Any) -> dict[str, Any]:
    return cache.training() | {"coef_init": None, "intercept_init": None}
