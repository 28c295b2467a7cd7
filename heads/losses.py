"""What is the logistic loss of many labels on the same rows, and how does it change?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np

from heads.curvature import LEAST, Curvature, rows_apart
from heads.newton import Batch, dot

_TRUST = 8.0  # times the greatest margin: how far it may be tried
_FEW = 128  # rows that BLAS hardly packs
_LONG = 512  # terms of a sum
_RENEWED = 4  # gradients, after which the rows that count are looked for again
_CACHED = 1 << 16  # entries that are worked on at once: they stay in the processor's cache

Part: TypeAlias = "slice | np.ndarray"


def times_transposed(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """A B' for many rows in B: with few in A, BLAS packs them in half the time of ``A @ B.T``.

    Turning the product round costs more than that where its sums are short.
    """
    if len(A) >= _FEW or A.shape[1] < _LONG:
        return A @ B.T
    return np.ascontiguousarray((B @ A.T).T)


@dataclass(frozen=True)
class WeightedRows:
    """Rows that labels are fitted on, and what is needed of them again and again.

    Attributes
    ----------
    Z : (n, r)
        Centred about the weighted mean, so that the intercept stands nearly apart.
    weight : (n,)
        a, in the type of Z.
    diagonal : (r,)
        e_j = sum_i a_i z_ij^2.
    views : int
        Rows side by side that are of one image.
    """

    Z: np.ndarray
    weight: np.ndarray
    diagonal: np.ndarray
    views: int = 1

    @classmethod
    def of(cls, Z: np.ndarray, weight: np.ndarray, views: int) -> WeightedRows:
        weight = weight.astype(Z.dtype)
        return cls(Z, weight, np.einsum("ij,ij,i->j", Z, Z, weight), views)

    def without_features(self) -> WeightedRows:
        return WeightedRows(self.Z[:, :0], self.weight, self.diagonal[:0])

    @cached_property
    def images(self) -> np.ndarray:
        """(n / views, r) mean rows."""
        if self.views == 1:
            return self.Z
        return self.Z.reshape(-1, self.views, self.Z.shape[1]).mean(axis=1)

    @property
    def apart(self) -> int:
        """How many images a label's curvature tells from all others; see `Curvature`."""
        return rows_apart(len(self.Z), self.views, self.Z.shape[1])


class RowBatch(Batch):
    """What batches of logistic losses share: rows, targets, margins.

    Parameters
    ----------
    rows : WeightedRows
    Y : (k, n)
    offset : (k, n) or None
        Added to the margins.
    W : (k, r), b : (k,)
        Where the search starts.
    margin : (k, n), optional
        There, if known.
    """

    penalty: np.ndarray  # (k, 1) or (k, r)
    q: np.ndarray  # what a step of 1 adds to the margins

    def __init__(
        self,
        rows: WeightedRows,
        Y: np.ndarray,
        offset: np.ndarray | None,
        W: np.ndarray,
        b: np.ndarray,
        margin: np.ndarray | None = None,
    ) -> None:
        self.rows = rows
        self.Z, self.weight, self.diagonal = rows.Z, rows.weight, rows.diagonal
        self.total = rows.weight.sum()
        self.Y = Y
        self.W, self.b = W.copy(), b.copy()
        if margin is None:
            self.margin = self._margins(W, b)
            if offset is not None:
                self.margin += offset
        else:
            self.margin = margin.copy()
        self.r = np.empty_like(self.margin)  # a (expected sigma(mu) - y)
        self.c = np.empty_like(self.b)
        self.reach = np.empty_like(self.b)
        self.by_label = ["Y", "margin", "W", "b", "r", "c", "reach"]

    def _margins(self, W: np.ndarray, b: np.ndarray) -> np.ndarray:
        margin = times_transposed(W, self.Z)
        margin += b[:, None]
        return margin

    def blocks(self, number: int) -> Iterator[slice]:
        """Some of a number of labels at a time: their rows stay in the processor's cache."""
        step = max(1, _CACHED // self.Y.shape[1])
        for start in range(0, number, step):
            yield slice(start, min(start + step, number))

    def _some(self, part: np.ndarray, some: slice) -> Part:
        """Some labels of a part; views where that is all of them."""
        return some if len(part) == len(self.b) else part[some]

    def _note(self, labels: Part, margin: np.ndarray, tail: np.ndarray, h: np.ndarray) -> None:
        """Set r, reach and c of labels (m) at margins (m, n), h the sums (m,) of a_i h_i.

        c is h, or what leads over the greatest margin if that is more: a row far on the
        wrong side has no curvature, but a residual of 1, and steps by h alone would know
        no bounds.
        """
        r = residual(margin, tail, self.Y[labels])
        r *= self.weight
        self.r[labels] = r
        reach = 1 + np.maximum(margin.max(axis=1), -margin.min(axis=1))
        self.reach[labels] = reach
        bound = np.abs(r, out=r).sum(axis=1) / reach
        self.c[labels] = np.maximum(np.maximum(h, bound), np.finfo(h.dtype).tiny)

    def aim(self, direction: np.ndarray, direction_b: np.ndarray) -> None:
        self.direction, self.direction_b = direction, direction_b
        self.q = self._margins(direction, direction_b)
        penalised = self.penalty * direction
        self.square = dot(penalised, direction)
        self.linear = dot(penalised, self.W)

    def furthest(self) -> np.ndarray:
        """Where margins have gone several times as far as any is now.

        Far rows have a loss without curvature, along which a trial would go to infinity.
        """
        far = np.maximum(self.q.max(axis=1), -self.q.min(axis=1))
        return _TRUST * self.reach / np.maximum(far, np.finfo(far.dtype).tiny)

    def keep(self, kept: np.ndarray) -> None:
        for name in self.by_label:
            setattr(self, name, getattr(self, name)[kept])


def base_rate_loss(Y: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(k,) least log-loss without features: sum_i a_i times the entropy of the base rate."""
    total = float(weight.sum())
    rate = np.clip((Y @ weight).astype(np.float64) / total, 1e-12, 1 - 1e-12)
    return -total * (rate * np.log(rate) + (1 - rate) * np.log1p(-rate))


def tail(margin: np.ndarray) -> np.ndarray:
    """sigma(-|mu|), in the type of mu: what keeps its digits where sigma(mu) is near 1."""
    p = np.abs(margin)
    np.negative(p, out=p)
    np.exp(p, out=p)
    return np.divide(p, 1 + p, out=p)


def residual(margin: np.ndarray, tail: np.ndarray, Y: np.ndarray) -> np.ndarray:
    """sigma(mu) - y, exact also where y is 1 and sigma(mu) nearly so."""
    r = ~np.signbit(margin) - Y  # of a zero as well the sign that copysign takes
    r -= np.copysign(tail, margin)
    return r


class LogisticBatch(RowBatch):
    """sum_i a_i (log(1 + exp mu_i) - y_i mu_i) + 1/2 sum_j penalty_kj w_j^2.

    M is the Hessian's diagonal at an even row weight, c_k e_j + penalty_kj with
    c_k = mean of s (1 - s) and e_j = sum_i a_i z_ij^2: near the whole Hessian
    where Z lies along principal axes. Of many rows some are set apart, see
    :class:`Curvature`, as they count at the start and every few iterations.

    Parameters
    ----------
    penalty : (k, 1) or (k, r)
    """

    def __init__(
        self,
        rows: WeightedRows,
        Y: np.ndarray,
        offset: np.ndarray | None,
        W: np.ndarray,
        b: np.ndarray,
        penalty: np.ndarray,
        margin: np.ndarray | None = None,
    ) -> None:
        super().__init__(rows, Y, offset, W, b, margin)
        self.penalty = penalty
        self.by_label.append("penalty")
        self.curvature: Curvature | None = None
        self.gradients = 0
        for labels in self.blocks(len(self.b)):
            self._look(labels, self.margin[labels])

    def _look(self, labels: Part, margin: np.ndarray) -> None:
        p = tail(margin)
        h = p * (1 - p)
        self._note(labels, margin, p, h @ self.weight)

    def gradient(self) -> tuple[np.ndarray, np.ndarray]:
        self.gradients += 1
        renew = self.gradients % _RENEWED == 0 or (self.gradients == 1 and bool(self.W.any()))
        if renew and self.rows.apart:
            self.curvature = self._curvature(self.rows.apart)
        return self.r @ self.Z + self.penalty * self.W, self.r.sum(axis=1)

    def _diagonal(self, c: np.ndarray) -> np.ndarray:
        return (c / self.total)[:, None] * self.diagonal + self.penalty

    def _curvature(self, number: int) -> Curvature:
        """With the images of most curvature set apart."""
        k, views = len(self.b), self.rows.views
        at, h = np.empty((k, number), np.int64), np.empty((k, number), self.Z.dtype)
        for labels in self.blocks(k):
            each = self._h(self.margin[labels])
            if views > 1:
                each = each.reshape(len(each), -1, views).sum(axis=2)
            at[labels] = np.argpartition(each, -number, axis=1)[:, -number:]
            h[labels] = np.take_along_axis(each, at[labels], axis=1)
        c = np.maximum(self.c - h.sum(axis=1), LEAST * self.c)
        np.maximum(c, np.finfo(c.dtype).tiny, out=c)
        return Curvature(self._diagonal(c), c, self.rows.images, at, h)

    def _h(self, margin: np.ndarray) -> np.ndarray:
        """a s (1 - s), the curvature of each row."""
        h = tail(margin)
        h *= 1 - h
        h *= self.weight
        return h

    def precondition(self, g: np.ndarray, g_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.curvature is not None:
            return self.curvature.solve(g, g_b)
        return self.scale(g, g_b)

    def scale(self, g: np.ndarray, g_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return g / self._diagonal(self.c), g_b / self.c

    def keep(self, kept: np.ndarray) -> None:
        super().keep(kept)
        if self.curvature is not None:
            self.curvature.keep(kept)

    def second(self) -> np.ndarray:
        second = self.square.copy()
        for labels in self.blocks(len(self.b)):
            q = self.q[labels]
            second[labels] += np.einsum("kn,kn,kn->k", self._h(self.margin[labels]), q, q)
        return second

    def slope(self, t: np.ndarray, part: np.ndarray) -> np.ndarray:
        slope = self.linear[part] + t * self.square[part]
        for some in self.blocks(len(part)):
            labels, step = self._some(part, some), t[some, None]
            q = self.q[labels]
            margin = step * q
            margin += self.margin[labels]
            self._look(labels, margin)
            slope[some] += dot(q, self.r[labels])
        return slope

    def move(self, t: np.ndarray) -> None:
        self.W += t[:, None] * self.direction
        self.b += t * self.direction_b
        for labels in self.blocks(len(self.b)):
            self.margin[labels] += t[labels, None] * self.q[labels]
