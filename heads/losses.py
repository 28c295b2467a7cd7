"""What is the logistic loss of many labels on the same rows, and how does it change?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heads.newton import Batch, dot

_TRUST = 8.0  # times the greatest margin: how far it may be tried
_FEW = 128  # rows that BLAS hardly packs


def times_transposed(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """A B' for many rows in B: with few in A, BLAS packs them in half the time of ``A @ B.T``."""
    if len(A) >= _FEW:
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
    """

    Z: np.ndarray
    weight: np.ndarray
    diagonal: np.ndarray

    @classmethod
    def of(cls, Z: np.ndarray, weight: np.ndarray) -> WeightedRows:
        weight = weight.astype(Z.dtype)
        return cls(Z, weight, np.einsum("ij,ij,i->j", Z, Z, weight))

    def without_features(self) -> WeightedRows:
        return WeightedRows(self.Z[:, :0], self.weight, self.diagonal[:0])


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

    r: np.ndarray  # expected sigma(mu) - y
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
        self.Z, self.weight, self.diagonal = rows.Z, rows.weight, rows.diagonal
        self.total = rows.weight.sum()
        self.Y, self.offset = Y, offset
        self.W, self.b = W.copy(), b.copy()
        if margin is None:
            self.margin = self._margins(W, b)
            if offset is not None:
                self.margin += offset
        else:
            self.margin = margin.copy()
        self.by_label = ["Y", "offset", "margin", "W", "b", "M", "c", "reach"]

    def _margins(self, W: np.ndarray, b: np.ndarray) -> np.ndarray:
        margin = times_transposed(W, self.Z)
        margin += b[:, None]
        return margin

    def _curvature(self, h: np.ndarray) -> np.ndarray:
        """(k,) sum of a_i h_i, or what leads over the greatest margin if that is more.

        A row far on the wrong side has no curvature, but a residual of 1: steps by h
        alone would know no bounds.
        """
        self.reach = 1 + np.maximum(self.margin.max(axis=1), -self.margin.min(axis=1))
        bound = np.abs(self.r) @ self.weight / self.reach
        c: np.ndarray = np.maximum(h @ self.weight, bound)
        return np.maximum(c, np.finfo(c.dtype).tiny)

    def furthest(self) -> np.ndarray:
        """Where margins have gone several times as far as any is now.

        Far rows have a loss without curvature, along which a trial would go to infinity.
        """
        far = np.maximum(self.q.max(axis=1), -self.q.min(axis=1))
        return _TRUST * self.reach / np.maximum(far, np.finfo(far.dtype).tiny)

    def keep(self, kept: np.ndarray) -> None:
        for name in self.by_label:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[kept])


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
    where Z lies along principal axes.

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
        self.p = tail(self.margin)
        self.r = residual(self.margin, self.p, Y)
        self.by_label += ["penalty", "r", "p", "h"]

    def gradient(self) -> tuple[np.ndarray, np.ndarray]:
        weighted = self.r * self.weight
        self.h = self.p * (1 - self.p)
        self.c = self._curvature(self.h)
        self.M = (self.c / self.total)[:, None] * self.diagonal + self.penalty
        return weighted @ self.Z + self.penalty * self.W, weighted.sum(axis=1)

    def precondition(self, g: np.ndarray, g_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return g / self.M, g_b / self.c

    def aim(self, direction: np.ndarray, direction_b: np.ndarray) -> None:
        self.direction, self.direction_b = direction, direction_b
        self.q = self._margins(direction, direction_b)
        self.aq = self.q * self.weight
        penalised = self.penalty * direction
        self.square = dot(penalised, direction)
        self.linear = dot(penalised, self.W)

    def second(self) -> np.ndarray:
        return np.einsum("kn,kn,kn->k", self.aq, self.q, self.h) + self.square

    def slope(self, t: np.ndarray, part: np.ndarray) -> np.ndarray:
        some = slice(None) if len(part) == len(self.b) else part
        margin = t[:, None] * self.q[some]
        margin += self.margin[some]
        p = tail(margin)
        r = residual(margin, p, self.Y[some])
        self.r[some], self.p[some] = r, p
        return dot(self.aq[some], r) + self.linear[some] + t * self.square[some]

    def move(self, t: np.ndarray) -> None:
        self.W += t[:, None] * self.direction
        self.b += t * self.direction_b
        self.q *= t[:, None]
        self.margin += self.q
