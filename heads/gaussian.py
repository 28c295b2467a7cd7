"""What is the logistic loss expected to be when its margin is normal?

With variance v, a rule gives E sigma(t), the derivative of the expected loss by mu,
and h = E sigma'(t), twice that by v. E sigma is given at -|mu|, the tail, which keeps
its digits where E sigma is near 1. The rules err by less than 3e-6.

v <= 25: nodes +-x_j, weights w_j of a symmetric rule of the normal distribution; with
u = |mu| and s = sqrt(v)

    E sigma(-u) = sum_j w_j (exp(-u) + cosh s x_j) / (cosh u + cosh s x_j),
    h           = sum_j w_j x_j (sinh(s x_j) / s) / (cosh u + cosh s x_j),

the gradient by u and v of one sum of convex functions of (u, s), which is jointly
convex like the integral. The more variance, the more nodes: by Gauss and Hermite at
first, then equally spaced, which is better for a smooth integrand that decays.

v > 25: sigma is the distribution function of the logistic law, so that E sigma(-u) is
the tail of a sum of both: Edgeworth's series about the normal law of variance
k = v + pi^2 / 3, up to the eighth derivative. Each term solves the heat equation, so
that h is again twice the derivative by v.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.polynomial.hermite_e import hermegauss
from scipy.special import ndtr

from heads.losses import Part, RowBatch, WeightedRows, times_transposed
from heads.newton import dot

# Largest variance, pairs of nodes, and for equally spaced ones their reach in standard deviations.
_RULES = ((0.25, 3, None), (1.0, 5, None), (4.0, 9, 5.2), (9.0, 12, 5.2), (25.0, 18, 5.2))
_LARGE = _RULES[-1][0]
_LOGISTIC_VARIANCE = np.pi**2 / 3
# Cumulants 4, 6 and 8 of the logistic law, 2 (n - 1)! zeta(n), over n!, and half the first squared.
_FOURTH = np.pi**4 / 180
_SIXTH = np.pi**6 / 2835
_EIGHTH = np.pi**8 / 37800 + _FOURTH**2 / 2
_FAR = 13.0  # standard deviations, from which on the series is 0 in float32
_CLIP = 85.0  # of the margin, so that cosh is finite in float32
_REFRESH = 10  # gradients
_SORTED = 1 << 18  # entries that are told apart by rule at once
_BLOCK = 1 << 15  # of a rule that are worked on at once: of fewer, threads would wait often


@cache
def normal_rule(pairs: int, reach: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Nodes x_j > 0 and weights w_j of a rule with mass 1 and variance 1."""
    if reach is None:
        both_sides, all_weights = hermegauss(2 * pairs)
        return both_sides[pairs:], all_weights[pairs:] / all_weights.sum()
    nodes = (np.arange(pairs) + 0.5) * reach / (pairs - 0.5)
    weights = np.exp(-0.5 * nodes**2)
    weights /= 2 * weights.sum()
    return nodes / np.sqrt(2 * weights @ nodes**2), weights


def expected_tail(margin: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E sigma at -|margin|, and h, in the type of the margins.

    Parameters
    ----------
    margin, variance : (k, n)
    """
    mean, curvature = np.empty(margin.size, margin.dtype), np.empty(margin.size, margin.dtype)
    distances, variances = np.abs(margin).ravel(), variance.ravel()
    for start in range(0, margin.size, _SORTED):
        at = slice(start, start + _SORTED)
        u, v = distances[at], variances[at]
        rule_of = np.zeros(len(v), np.uint8)
        for largest, _, _ in _RULES:
            rule_of += v > largest
        for rule in range(len(_RULES) + 1):
            entries = np.flatnonzero(rule_of == rule)
            for block in range(0, len(entries), _BLOCK):
                some = entries[block : block + _BLOCK]
                mean[at][some], curvature[at][some] = _by_rule(rule, u[some], v[some])
    return mean.reshape(margin.shape), curvature.reshape(margin.shape)


def _by_rule(rule: int, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if rule == len(_RULES):
        return _by_series(u, v)
    _, pairs, reach = _RULES[rule]
    return _by_normal_rule(u, v, *normal_rule(pairs, reach), even=reach is not None)


def _by_normal_rule(
    u: np.ndarray, v: np.ndarray, nodes: np.ndarray, weights: np.ndarray, even: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Both by a rule; all is doubled, which saves the halves of cosh and sinh.

    Nodes of an `even` rule are odd multiples of the first, and exp(s x_j) a product.
    """
    real = u.dtype.type
    # Below, sinh(s x) / s would lose its digits; the expectation is flat there.
    s = np.sqrt(np.maximum(v, 100 * np.finfo(real).eps))
    decay = np.exp(-np.minimum(u, real(_CLIP)))
    cosh_u = 1 / decay
    cosh_u += decay
    decay *= 2
    mean, odd = np.zeros_like(u), np.zeros_like(u)
    up, down, share, term = (np.empty_like(u) for _ in range(4))
    rise = np.exp(s * real(2 * nodes[0])) if even else None
    fall = None if rise is None else 1 / rise
    first = real(nodes[0])
    for x, w in zip(nodes.astype(real), weights.astype(real), strict=True):
        if rise is None or x == first:
            np.exp(np.multiply(s, x, out=up), out=up)
            np.divide(1, up, out=down)
        else:
            up *= rise
            down *= fall
        np.add(up, down, out=term)
        np.divide(w, np.add(cosh_u, term, out=share), out=share)
        term += decay
        term *= share
        mean += term
        np.subtract(up, down, out=term)
        share *= x
        term *= share
        odd += term
    return mean, np.divide(odd, s, out=odd)


def _by_series(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both by Edgeworth's series, z = u / sqrt(k)."""
    real = u.dtype.type
    k = v + real(_LOGISTIC_VARIANCE)
    root = np.sqrt(k)
    z = np.minimum(u / root, real(_FAR))
    y = z * z
    density = np.exp(real(-0.5) * y)
    density *= real(1 / np.sqrt(2 * np.pi))
    share = 1 / k
    share *= share
    a = real(_FOURTH) * share
    b = real(_SIXTH) * share / k
    c = real(_EIGHTH) * share * share
    # Hermite polynomials 3 to 8 in y = z^2, the odd ones over z.
    odd = a * (y - 3)
    odd += b * ((y - 10) * y + 15)
    odd += c * (((y - 21) * y + 105) * y - 105)
    even = a * ((y - 6) * y + 3)
    even += b * (((y - 15) * y + 45) * y - 15)
    even += c * ((((y - 28) * y + 210) * y - 420) * y + 105)
    odd *= z
    odd *= density
    odd += ndtr(-z)
    even += 1
    even *= density
    even /= root
    return odd, even


class GaussianBatch(RowBatch):
    """sum_i a_i E(log(1 + exp t_i) - y_i t_i) + 1/2 sum_j penalty_kj w_j^2.

    t_i is Normal(mu_i, v_i), v_i = rho_k sum_j u_ij w_j^2 with u the squares of the
    features that the noise multiplies. An iteration takes five products: mu and
    two for v along the direction, two for the gradient. M is the Hessian's
    diagonal, at an even row weight in its first part:
    c_k e_j + rho_k sum_i a_i h_i u_ij + penalty_kj.

    Parameters
    ----------
    squares : (n, r)
        u.
    rho : (k,)
    penalty : (k, r)
    """

    def __init__(
        self,
        rows: WeightedRows,
        Y: np.ndarray,
        offset: np.ndarray | None,
        W: np.ndarray,
        b: np.ndarray,
        squares: np.ndarray,
        rho: np.ndarray,
        penalty: np.ndarray,
        margin: np.ndarray | None = None,
    ) -> None:
        super().__init__(rows, Y, offset, W, b, margin)
        self.squares, self.rho, self.penalty = squares, rho, penalty
        self.variance = self._spread(W * W)
        self.age = 0
        self.h = np.empty_like(self.margin)  # times a
        self.by_label += ["rho", "penalty", "variance", "h", "M"]
        self._look_at_all()

    def _spread(self, products: np.ndarray) -> np.ndarray:
        return times_transposed(self.rho[:, None] * products, self.squares)

    def _look_at_all(self) -> None:
        for labels in self.blocks(len(self.b)):
            self._look(labels, self.margin[labels], self.variance[labels])

    def _look(self, labels: Part, margin: np.ndarray, variance: np.ndarray) -> None:
        mean, h = expected_tail(margin, variance)
        h *= self.weight
        self.h[labels] = h
        self._note(labels, margin, mean, h.sum(axis=1))

    def gradient(self) -> tuple[np.ndarray, np.ndarray]:
        self.age += 1
        if self.age % _REFRESH == 0:
            # Variances that have come down from far larger ones keep their rounding errors.
            self.variance = self._spread(self.W * self.W)
            self._look_at_all()
        shrink = self.h @ self.squares
        shrink *= self.rho[:, None]
        shrink += self.penalty
        self.M = (self.c / self.total)[:, None] * self.diagonal + shrink
        shrink *= self.W
        shrink += self.r @ self.Z
        return shrink, self.r.sum(axis=1)

    def precondition(self, g: np.ndarray, g_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.divide(g, self.M, out=np.zeros_like(g), where=self.M > 0), g_b / self.c

    def aim(self, direction: np.ndarray, direction_b: np.ndarray) -> None:
        super().aim(direction, direction_b)
        # v at t: variance + 2 t tilt + t^2 bend.
        scaled = self.rho[:, None] * direction
        both = times_transposed(np.concatenate([self.W * scaled, direction * scaled]), self.squares)
        self.tilt, self.bend = both[: len(direction)], both[len(direction) :]

    def second(self) -> np.ndarray:
        second = self.square.copy()
        for labels in self.blocks(len(self.b)):
            q = self.q[labels]
            second[labels] += dot(self.h[labels], q * q + self.bend[labels])
        return second

    def slope(self, t: np.ndarray, part: np.ndarray) -> np.ndarray:
        slope = self.linear[part] + t * self.square[part]
        for some in self.blocks(len(part)):
            labels, step = self._some(part, some), t[some, None]
            tilt = self.bend[labels] * step
            tilt += self.tilt[labels]  # half of dv / dt
            variance = tilt + self.tilt[labels]
            variance *= step
            variance += self.variance[labels]
            q = self.q[labels]
            margin = step * q
            margin += self.margin[labels]
            self._look(labels, margin, np.maximum(variance, 0, out=variance))
            slope[some] += dot(q, self.r[labels]) + dot(self.h[labels], tilt)
        return slope

    def move(self, t: np.ndarray) -> None:
        self.W += t[:, None] * self.direction
        self.b += t * self.direction_b
        for labels in self.blocks(len(self.b)):
            step = t[labels, None]
            self.margin[labels] += step * self.q[labels]
            variance = self.variance[labels]
            variance += step * (2 * self.tilt[labels] + step * self.bend[labels])
            np.maximum(variance, 0, out=variance)
