"""Which set of labels has the highest expected F-beta, given probabilities?

Labels y_1 ... y_K of an image are independent, P(y_j = 1) = p_j, in descending
order. A set of k labels does best with the k most probable ones, for which

    f(k) = E[(1 + b^2) S_k / (b^2 S + k)],   S_k = y_1 + ... + y_k,   S = S_K,

and the empty set has f(0) = P(S = 0), as an image without labels counts 1 where
none is predicted. Ye, Chai, Lee and Chieu (2012) have tables over (S_k, S - S_k), in O(K^3)
for general b. The denominator holds S alone, so that one table suffices:

    f(k) = (1 + b^2) sum_s W_k(s) / (b^2 s + k),   W_k(s) = sum_{j <= k} p_j Q_j(s - 1),

with Q_j the distribution of S - y_j: p_j Q_j(s - 1) = P(y_j = 1, S = s) =: T_j(s). Q_j comes
from that of S by undoing one convolution, forwards where p_j <= 1/2, T_j(s) = p_j / (1 - p_j)
(P(S = s - 1) - T_j(s - 1)), and backwards else, which never magnifies errors. This is O(K) for
each s that can occur, for any b.

*Only the m highest labels are looked at one by one.* The others enter the
distribution of S through their power sums sigma_r = sum p^r:

    log prod_j (1 - p_j + p_j z) = - sum_r (1 - z)^r sigma_r / r.

Cut after R terms, it moves the distribution by at most exp(d) - 1 in sum of absolute
differences, d = sum_{r > R} 2^r sigma_r / r; as F is within [0, 1], f moves by half of that.
(R = 1 is the Poisson distribution and Le Cam's bound.) The smaller the probabilities the
fewer terms they need, so that the next some hundred and all the rest have an R and a d of
their own; d adds up. Larger S than occur
with a probability that Chernoff's bound makes negligible are left out.

*No set of more than m labels is better* if B = (1 + b^2) sum_s max(W_m(s) / (b^2 s + m),
p_{m+1} Q_{m+1}(s - 1)) is at most the best f(k) so far. For k = m + x, W_k(s) <= W_m(s) + x
p_{m+1} Q_{m+1}(s - 1) summed over s with decreasing weights, since S - y_j is
stochastically least for the largest p_j; and (A + c x) / (D + x) <= max(A / D, c). Otherwise, and
where the series converges too slowly, m grows, up to K.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np
from scipy.sparse import csr_matrix

from heads.cuts import Limits
from heads.inputs import check_beta, check_probabilities
from heads.ordering import single
from heads.parallel import worker_threads

_ROWS = 1024  # images whose tables are made side by side, at most
_ENTRIES = 1 << 16  # probabilities whose powers are held at once
_NEXT = 8  # times as many labels have power sums apart from the rest
_FIRST = 64  # labels that are looked at one by one, to begin with
_TABLE = 1 << 16  # numbers of a table that fits into a fast cache
_LARGEST = 1 / 32  # probability above which labels are looked at one by one
_MEAN = 500.0  # of the number of others: exp(-mean) must not vanish
_ROUNDING = 1e-15  # what counts as exact
_TIE = 1e-13  # values that are closer differ by rounding only


@dataclass(frozen=True)
class ExpectedSets:
    """Label sets and what they promise.

    Attributes
    ----------
    sets : csr_matrix of shape (n, K), bool
    expected : (n,) array
        Expected F-beta of each set.
    bound : (n,) array
        `expected`, and the same of every other set, is off by at most this.
    """

    sets: csr_matrix
    expected: np.ndarray
    bound: np.ndarray


@dataclass(frozen=True)
class _Search:
    b2: float
    lower: int
    upper: int | None
    tol: float


@dataclass
class _Best:
    """Of each image: size of the best set, its least probability, value, error; certain or not."""

    size: np.ndarray
    least: np.ndarray
    value: np.ndarray
    bound: np.ndarray
    certain: np.ndarray


def expected_fbeta_sets(
    P: np.ndarray,
    beta: float = 2,
    min_labels: int = 0,
    max_labels: int | None = None,
    tail_tol: float | None = None,
) -> ExpectedSets:
    """Label set of the highest expected F-beta of each image, labels being independent.

    Parameters
    ----------
    P : (n, K) array
        Probabilities; float16, float32 or float64, computed in float64.
    beta : float
    min_labels, max_labels : int
        Least and greatest number of labels of an image (None: any).
    tail_tol : float, optional
        Greatest error of an expected F-beta that is allowed for speed; None: 1e-15,
        what rounding does anyway.

    Returns
    -------
    ExpectedSets
        Of equally good sets the smallest; of equal probabilities the lower columns.

    Raises
    ------
    ValueError
        If a probability is outside [0, 1] or NaN (named by row and label).

    Notes
    -----
    Formulas and proofs at the head of the module. O(K) an image for the sums over
    all labels, and O(m s) with the m labels and s counts that matter.
    """
    P = check_probabilities(P)
    if tail_tol is not None and not 0 < tail_tol < 1:
        raise ValueError(f"tail_tol is {tail_tol}; expected None or a number between 0 and 1")
    n, K = P.shape
    lower, upper = Limits(min_labels, max_labels).within(K)
    search = _Search(check_beta(beta) ** 2, lower, upper, max(tail_tol or 0.0, _ROUNDING))

    step = min(_ROWS, max(64, n // 4))  # some blocks for each of a few threads

    def block(start: int) -> tuple[np.ndarray, np.ndarray, _Best]:
        rows = single(P[start : start + step])
        best = _best(rows, search)
        return *_columns(rows, best), best

    with worker_threads() as run:
        blocks = list(run(block, range(0, n, step)))
    columns = [np.zeros(0, np.intp), *(part[0] for part in blocks)]
    sizes = [np.zeros(1, np.intp), *(part[1] for part in blocks)]
    indices, indptr = np.concatenate(columns), np.cumsum(np.concatenate(sizes))
    sets = csr_matrix((np.ones(len(indices), bool), indices, indptr), shape=(n, K))
    empty = np.zeros(0)
    return ExpectedSets(
        sets,
        np.concatenate([empty, *(best.value for _, _, best in blocks)]),
        np.concatenate([empty, *(best.bound for _, _, best in blocks)]),
    )


def _columns(P: np.ndarray, best: _Best) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the best sets, row by row, and their number in each row."""
    chosen = best.least[:, None] <= P
    tied = np.flatnonzero(np.count_nonzero(chosen, axis=1) > best.size)
    if len(tied):
        at_least, equal = chosen[tied], best.least[tied, None] == P[tied]
        room = best.size[tied] - np.count_nonzero(at_least & ~equal, axis=1)
        chosen[tied] = at_least & (~equal | (np.cumsum(equal, axis=1) <= room[:, None]))
    return np.flatnonzero(chosen) % max(1, P.shape[1]), best.size


def _best(P: np.ndarray, search: _Search) -> _Best:
    """Look at more and more labels until the best set of every image is certain."""
    n, K = P.shape
    best = _Best(
        np.zeros(n, np.intp),
        np.full(n, np.inf, P.dtype),
        np.ones(n),
        np.zeros(n),
        np.zeros(n, bool),
    )
    if K == 0:
        return best
    likely = np.count_nonzero(P > _LARGEST, axis=1)
    m, pending = max(_FIRST, search.lower), np.arange(n)
    while len(pending):
        m = min(m, K)
        ready = pending[likely[pending] <= m]
        step = max(16, _TABLE // m)
        for start in range(0, len(ready), step):
            rows = ready[start : start + step]
            found = _best_among(P if len(rows) == n else P[rows], m, search)
            for name, values in vars(found).items():
                getattr(best, name)[rows] = values
        pending = pending[~best.certain[pending]]
        m *= 2
    return best


def _best_among(P: np.ndarray, m: int, search: _Search) -> _Best:
    """The best set of at most m labels; certain if no larger one can be better."""
    K = P.shape[1]
    head, largest, sums, bound = _split(P, m, search.tol / 2)
    usable = sums[0] <= _MEAN
    sums *= usable
    top, mass = _largest_count(sums[0] + head.sum(axis=0), K, search.tol / 2)
    values, beyond = _values(head, largest, _distribution(head, sums, top), search.b2)
    upper = m if search.upper is None else min(m, search.upper)
    allowed = values[search.lower : upper + 1]
    highest = allowed.max(axis=0)
    size = search.lower + np.argmax(allowed >= highest - _TIE, axis=0)
    everyone = np.arange(len(P))
    if upper == m < K:
        usable &= beyond <= highest
    least = np.where(size > 0, head[size - 1, everyone], np.inf)
    return _Best(size, least.astype(P.dtype), values[size, everyone], bound + mass, usable)


# ------------------------------------------------------------ the number of labels


def _split(
    P: np.ndarray, m: int, tol: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The m highest probabilities, and what is to be known of the others.

    Returns
    -------
    head : (m, n) array, descending
    largest : (n,) array
        The highest of the others.
    sums : (R, n) array
        Power sums of the others.
    bound : (n,) array
        By how much leaving out the higher ones moves an expectation.
    """
    n, K = P.shape
    head, largest, moved = np.empty((m, n)), np.zeros(n), np.zeros(n)
    top = min(K, (1 + _NEXT) * m)
    parts = []
    step = max(1, _ENTRIES // K)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        parted = P[rows] if top == K else np.partition(P[rows], K - top, axis=1)
        highest = -np.sort(-parted[:, K - top :], axis=1).astype(np.float64)
        head[:, rows] = highest[:, :m].T
        if m == K:
            continue
        largest[rows] = highest[:, m]
        rest = parted[:, : K - top].astype(np.float64)
        for others, limit in ((highest[:, m:], highest[:, m]), (rest, highest[:, -1])):
            sums, d = _power_sums(others, limit, np.log1p(2 * tol) / 2)
            moved[rows] += d
            parts.append((rows, sums))
    total = np.zeros((max((len(sums) for _, sums in parts), default=1), n))
    for rows, sums in parts:
        total[: len(sums), rows] += sums
    return head, largest, total, np.expm1(moved) / 2


def _power_sums(p: np.ndarray, largest: np.ndarray, tol: float) -> tuple[np.ndarray, np.ndarray]:
    """sigma_1 ... sigma_R of rows p (n, K), and d <= tol, which is left out; shape (R, n), (n,)."""
    sums, powers = [p.sum(axis=1)], [p]

    def left_out() -> np.ndarray:
        # sum_{r > R} 2^r sigma_r / r <= 2^(R+1) sigma_R q / ((R + 1) (1 - 2 q))
        R = len(sums)
        d: np.ndarray = 2 ** (R + 1) * sums[-1] * largest / ((R + 1) * (1 - 2 * largest))
        return d

    while (d := left_out()).max() > tol:
        R = len(sums) + 1
        if len(powers) < R - R // 2:
            powers.append(powers[-1] * p)
        a, b = powers[R // 2 - 1], powers[R - R // 2 - 1]
        sums.append((a[:, None, :] @ b[:, :, None])[:, 0, 0])  # a product of rows by BLAS
    return np.array(sums), d


def _largest_count(mean: np.ndarray, K: int, tol: float) -> tuple[int, np.ndarray]:
    """A count s that S hardly exceeds, and by how much what is above may move f.

    P(S > s) <= exp(t - mean - t log(t / mean)), t = s + 1 (Chernoff). Going backwards, an
    error of that size at the top may add up over the counts for each label above 1/2, of
    which there are at most twice the mean.
    """
    mean = np.maximum(mean, 1e-300)
    highest = float(mean.max())

    def moved(s: int, mean: np.ndarray) -> np.ndarray:
        t = s + 1
        tail: np.ndarray = np.exp(t - mean - t * np.log(t / mean)) * (1 + 2 * mean * t)
        return tail

    s = int(highest) + 1
    while s < K and moved(s, np.array([highest])) > tol:
        s += 1 + s // 64
    return (K, np.zeros(len(mean))) if s >= K else (s, moved(s, mean))


def _distribution(head: np.ndarray, sums: np.ndarray, top: int) -> np.ndarray:
    """(top + 1, n) probabilities of S = 0 ... top."""
    R, n = sums.shape
    total = np.zeros((top + 1, n))
    r = np.arange(1, R + 1)
    total[0] = np.exp(-(sums / r[:, None]).sum(axis=0))
    # a = exp(l): s a_s = sum_i i l_i a_{s-i}, i l_i = -(-1)^i sum_r C(r - 1, i - 1) sigma_r
    slopes = [
        (1 if i % 2 else -1) * np.array([comb(k - 1, i - 1) for k in r.tolist()], float) @ sums
        for i in r.tolist()
    ]
    if sums[0].any():
        for s in range(1, top + 1):
            for i in range(1, min(s, R) + 1):
                total[s] += slopes[i - 1] * total[s - i]
            total[s] /= s
    for p in head:
        moved = total[:-1] * p
        total *= 1 - p
        total[1:] += moved
    return total


# -------------------------------------------------------------- the value of a set


def _values(
    head: np.ndarray, largest: np.ndarray, total: np.ndarray, b2: float
) -> tuple[np.ndarray, np.ndarray]:
    """f(0) ... f(m), shape (m + 1, n), and B (n,), which no larger set exceeds."""
    m, n = head.shape
    p = np.concatenate([head, largest[None]])
    odds = np.where(p > 0.5, 0.0, p / (1 - np.minimum(p, 0.5)))
    backwards = _without_likely(p, total)
    likely = p[: backwards.shape[1]] > 0.5
    size = np.arange(1, m + 1)[:, None]
    values, beyond = np.zeros((m + 1, n)), np.zeros(n)
    true, inside = np.zeros_like(p), np.empty((m, n))  # T_j(s), W_k(s) / (b2 s + k)
    for s in range(1, len(total)):
        np.subtract(total[s - 1], true, out=true)
        true *= odds
        if len(likely):
            few = p[: len(likely)] * backwards[s - 1]
            np.copyto(true[: len(likely)], few, where=likely)
        np.cumsum(true[:m], axis=0, out=inside)
        inside /= b2 * s + size
        values[1:] += inside
        beyond += np.maximum(inside[m - 1], true[m])
    values *= 1 + b2
    values[0] = total[0]
    return values, (1 + b2) * beyond


def _without_likely(p: np.ndarray, total: np.ndarray) -> np.ndarray:
    """(top + 1, h, n) distributions of S - y_j of the first h labels, which hold all p_j > 1/2."""
    h = int((p > 0.5).sum(axis=0).max(initial=0))
    p = np.where(p[:h] > 0.5, p[:h], 1.0)
    without = np.zeros((len(total), h, p.shape[1]))
    for s in range(len(total) - 1, 0, -1):
        without[s - 1] = (total[s] - (1 - p) * without[s]) / p
    return without
