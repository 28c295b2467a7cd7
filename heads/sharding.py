"""How is a ridge head fitted on rows that lie on many machines?

All that squared loss needs to know of rows are sums (:class:`heads.moments.Moments`), which add up.
Every shard is summed where it can be read, sums are added in a tree, and one machine solves.
joblib gives the work out: to processes here, or inside ``joblib.parallel_config("dask")`` to a
cluster::

    from functools import partial

    def rows(path, ids):  # a module of yours that all workers can import
        data = FeatureCache(path).select(ids).training()
        return data["X"], data["Y"], None

    shards = [partial(rows, path, ids) for path, ids in ...]
    with Client("tcp://scheduler:8786"), parallel_config("dask"):
        W, b = sharded_ridge(shards, dropout=0.5)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any, TypeAlias

import joblib
import numpy as np
from scipy.sparse import issparse

from heads.dropout import check_dropout, check_l2, rho_from_dropout
from heads.inputs import check_weights, split_masked
from heads.moments import Moments
from heads.systems import FeatureSystem

Shard: TypeAlias = "Callable[[], tuple[Any, Any, Any]]"
FAN_IN = 8  # shards, or sums, that a worker adds up at a time


def sharded_moments(
    shards: Sequence[Shard], origin: np.ndarray | None = None, n_jobs: int | None = None
) -> Moments:
    """Moments of the rows of all shards, by a tree of sums.

    Parameters
    ----------
    shards : sequence of functions
        Each returns X (n, d) or (n, v, d), Y (n, K), dense or sparse, of known targets, and
        weights (n,) or None: all 1. Functions travel to workers by pickle, rows do not
        travel. Each view of an image counts a_i / v.
    origin : (d,), optional
        That rows are centred by before they are summed. Default: the mean of the first shard,
        which is read here.
    n_jobs : int, optional
        Of joblib; default: 1, or as ``joblib.parallel_config`` says.

    Returns
    -------
    Moments
        The same bits for any number of workers: the tree depends on the number of shards alone.

    Raises
    ------
    ValueError
        If there is no shard, or one is of other shapes; shards are named by their number.

    Notes
    -----
    O(d (d + K)) numbers travel for every sum: S shards take S / 8 + S / 64 + ... of them.
    """
    if not shards:
        raise ValueError("there are no shards; give at least one")
    if origin is None:
        X, _, _ = _rows(0, shards[0])
        origin = X.mean(axis=0, dtype=np.float64)
    origin = np.asarray(origin, np.float64)
    work = joblib.Parallel(n_jobs=n_jobs)
    numbered = list(enumerate(shards))
    sums = work(joblib.delayed(_sum_of_shards)(some, origin) for some in _groups(numbered))
    for number, some in enumerate(sums[1:], 1):
        if some.xt.shape != sums[0].xt.shape:
            raise ValueError(
                f"shards {number * FAN_IN} and on have {some.xt.shape[1]} labels, but shard 0 has "
                f"{sums[0].xt.shape[1]}; give the same labels everywhere"
            )
    while len(sums) > 1:
        sums = work(joblib.delayed(_sum)(some) for some in _groups(sums))
    total: Moments = sums[0]
    return total


def sharded_ridge(
    shards: Sequence[Shard], dropout: float, l2: float = 0.0, n_jobs: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (K, d) and biases (K,) of a :class:`heads.DropoutRidge` on the rows of all shards.

    The same but for rare labels, which are trained as all others are. Parameters as of
    :func:`sharded_moments` and :class:`heads.DropoutRidge`; O(d^3 + d^2 K) for the one that solves.
    """
    rho, l2 = float(rho_from_dropout(check_dropout(dropout))), check_l2(l2)
    moments = sharded_moments(shards, n_jobs=n_jobs)
    return FeatureSystem(moments, l2, np.dtype(np.float64)).coefficients(rho)


def _groups(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + FAN_IN] for start in range(0, len(items), FAN_IN)]


def _sum_of_shards(shards: Sequence[tuple[int, Shard]], origin: np.ndarray) -> Moments:
    total: Moments | None = None
    for number, shard in shards:
        X, T, weight = _rows(number, shard)
        if X.shape[1] != len(origin):
            raise ValueError(f"shard {number} has {X.shape[1]} features, but others {len(origin)}")
        if total is not None and T.shape[1] != len(total.t):
            raise ValueError(f"shard {number} has {T.shape[1]} labels, but others {len(total.t)}")
        moments = Moments.of(X, T, weight, origin)
        total = moments if total is None else total + moments
    assert total is not None
    return total


def _sum(moments: Sequence[Moments]) -> Moments:
    return reduce(add, moments)


def _rows(number: int, shard: Shard) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of all views, their targets and weights, checked."""
    X, Y, weight = shard()
    X = np.asarray(X)
    T, hidden = split_masked(Y.toarray() if issparse(Y) else Y)
    if X.ndim not in (2, 3) or T.ndim != 2 or len(X) != len(T):
        raise ValueError(
            f"shard {number} gives X {X.shape} and Y {T.shape}; expected (n, d) or (n, v, d) and "
            "(n, K)"
        )
    if hidden is not None:
        raise ValueError(f"shard {number}: Y is masked; give rows whose targets are all known")
    dtype = np.float64 if X.dtype == np.float64 else np.float32
    views = 1 if X.ndim == 2 else X.shape[1]
    a = check_weights(weight, len(X)) / views
    X, T = X.reshape(-1, X.shape[-1]).astype(dtype), T.astype(dtype)
    for name, values in (("X", X), ("Y", T)):
        if not np.isfinite(values).all():
            raise ValueError(f"shard {number}: {name} holds a value that is not finite")
    return X, np.repeat(T, views, axis=0), np.repeat(a, views)
