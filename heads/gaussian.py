"""What is the logistic loss expected to be when its margin is normal?

With s^2 = v, two rules, each a sum of convex functions of (mu, s) with positive
weights, so that each is jointly convex like the integral; E sigma is the derivative
by mu, h twice that by v, and h = E sigma' up to the error of the rule, 1e-6. E sigma
is given at -|mu|, the tail, which keeps its digits where E sigma is near 1.

v <= 16: nodes x_j > 0, weights w_j of a symmetric rule of the normal distribution,

    E sigma = sum_j w_j (exp(mu) + cosh s x_j) / (cosh mu + cosh s x_j),    mu <= 0,
    h       = sum_j w_j x_j (sinh(s x_j) / s) / (cosh mu + cosh s x_j).

The nodes are equally spaced, which for a smooth, decaying integrand beats
Gauss-Hermite, and cosh, sinh follow from node to node by the addition theorem.

v > 16: sigma is the distribution function of the logistic law. With nodes l_j and
weights q_j of its Gauss rule, F and f the normal distribution and density,

    E sigma = sum_j q_j F((mu + l_j) / s),    h = sum_j q_j f((mu + l_j) / s) / s.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from scipy.linalg import eigh_tridiagonal
from scipy.special import ndtr

from heads.newton import RowBatch, dot, residual

_REACH = 5.2  # of the normal nodes, in standard deviations
_STEP = 1.3  # between normal nodes, in margins
_WIDEST = 0.7  # between normal nodes, in standard deviations
_PAIRS = (8, 12, 16)
_LARGE = 16.0  # variance from which on the logistic rule is used
_LOGISTIC_NODES = 8
_CLIP = 85.0  # of the margin, so that cosh is finite in float32
_REFRESH = 10  # gradients
_BLOCK = 1 << 13  # entries that are worked on at once: they stay in the processor's cache


@cache
def normal_rule(pairs: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Spacing, nodes x_j > 0 and weights w_j of a rule with mass 1 and variance 1."""
    nodes = np.arange(pairs) + 0.5
    step = _REACH / nodes[-1]
    weights = np.exp(-0.5 * (step * nodes) ** 2)
    weights /= 2 * weights.sum()
    step = 1 / np.sqrt(2 * weights @ nodes**2)
    return step, step * nodes, weights


@cache
def logistic_rule() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the Gauss rule of the logistic law.

    Its orthogonal polynomials have the recurrence coefficients pi^2 n^4 / (4 n^2 - 1).
    """
    n = np.arange(1, _LOGISTIC_NODES)
    nodes, vectors = eigh_tridiagonal(
        np.zeros(_LOGISTIC_NODES), np.pi * n**2 / np.sqrt(4.0 * n**2 - 1)
    )
    return nodes, vectors[0] ** 2


def expected_tail(margin: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E sigma at -|margin|, and h, in the type of the margins.

    Parameters
    ----------
    margin, variance : (k, n)
    """
    mean, curvature = np.empty_like(margin), np.empty_like(margin)
    rows = max(1, _BLOCK // max(1, margin.shape[1]))
    for start in range(0, len(margin), rows):
        at = slice(start, start + rows)
        distance = np.abs(margin[at])
        _by_normal_rule(distance, variance[at], mean[at], curvature[at])
        large = variance[at] > _LARGE
        if large.any():
            mean[at][large], curvature[at][large] = _by_logistic_rule(
                distance[large], variance[at][large]
            )
    return mean, curvature


def _by_logistic_rule(distance: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    real = distance.dtype.type
    s = np.sqrt(variance)
    mean, density = np.zeros_like(distance), np.zeros_like(distance)
    for node, weight in zip(*logistic_rule(), strict=True):
        z = (real(node) - distance) / s
        mean += real(weight) * ndtr(z)
        z *= z
        z *= real(-0.5)
        density += real(weight) * np.exp(z)
    density /= s * real(np.sqrt(2 * np.pi))
    return mean, density


def _by_normal_rule(
    distance: np.ndarray, variance: np.ndarray, mean: np.ndarray, curvature: np.ndarray
) -> None:
    """Fill `mean` and `curvature`; variances beyond the rule's reach count as its largest."""
    real = distance.dtype.type
    largest = min(float(variance.max(initial=0)), _LARGE)
    step = min(_WIDEST, _STEP / np.sqrt(max(largest, 1.0)))
    pairs = next((pairs for pairs in _PAIRS if pairs * step >= _REACH), _PAIRS[-1])
    step, nodes, weights = normal_rule(pairs)
    s = np.sqrt(np.clip(variance, np.finfo(real).eps, _LARGE))
    mu = np.minimum(distance, _CLIP)
    cosh_mu, decay = np.cosh(mu), np.exp(-mu)
    half = s * real(step / 2)
    cosh, sinh = np.cosh(half), np.sinh(half)
    before, sinh_before = cosh.copy(), -sinh
    twice = 2 + 4 * sinh * sinh  # 2 cosh(s step)
    share, term, odd = np.empty_like(mu), np.empty_like(mu), np.zeros_like(mu)
    mean[...] = 0
    for j in range(pairs):
        np.add(cosh_mu, cosh, out=share)
        np.divide(real(weights[j]), share, out=share)
        np.add(decay, cosh, out=term)
        term *= share
        mean += term
        share *= sinh
        share *= real(nodes[j])
        odd += share
        # cosh (j + 1) = 2 cosh(step) cosh j - cosh (j - 1), and sinh alike.
        np.subtract(np.multiply(twice, cosh, out=share), before, out=before)
        cosh, before = before, cosh
        np.subtract(np.multiply(twice, sinh, out=share), sinh_before, out=sinh_before)
        sinh, sinh_before = sinh_before, sinh
    np.divide(odd, s, out=curvature)


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
        Z: np.ndarray,
        Y: np.ndarray,
        weight: np.ndarray,
        offset: np.ndarray | None,
        W: np.ndarray,
        b: np.ndarray,
        squares: np.ndarray,
        rho: np.ndarray,
        penalty: np.ndarray,
    ) -> None:
        super().__init__(Z, Y, weight, offset, W, b)
        self.squares, self.rho, self.penalty = squares, rho, penalty
        self.total = weight.sum()
        self.diagonal = np.einsum("ij,ij,i->j", Z, Z, weight)
        self.variance = self._spread(W * W)
        self.age = 0
        self._expect()
        self.by_label += ["rho", "penalty", "variance", "r", "h"]

    def _expect(self) -> None:
        mean, self.h = expected_tail(self.margin, self.variance)
        self.r = residual(self.margin, mean, self.Y)

    def _spread(self, products: np.ndarray) -> np.ndarray:
        spread = products @ self.squares.T
        spread *= self.rho[:, None]
        return spread

    def gradient(self) -> tuple[np.ndarray, np.ndarray]:
        self.age += 1
        if self.age % _REFRESH == 0:
            # Variances that have come down from far larger ones keep their rounding errors.
            self.variance = self._spread(self.W * self.W)
            self._expect()
        weighted = self.r * self.weight
        self.shrink = (self.h * self.weight) @ self.squares
        self.shrink *= self.rho[:, None]
        self.shrink += self.penalty
        return weighted @ self.Z + self.shrink * self.W, weighted.sum(axis=1)

    def precondition(self, g: np.ndarray, g_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        c = self.h @ self.weight
        M = (c / self.total)[:, None] * self.diagonal + self.shrink
        return np.divide(g, M, out=np.zeros_like(g), where=M > 0), g_b / c

    def aim(self, direction: np.ndarray, direction_b: np.ndarray) -> np.ndarray:
        self.direction, self.direction_b = direction, direction_b
        self.q = self._margins(direction, direction_b)
        self.aq = self.q * self.weight
        # v at t: variance + 2 t tilt + t^2 bend.
        self.tilt = self._spread(self.W * direction)
        self.bend = self._spread(direction * direction)
        penalised = self.penalty * direction
        self.square = dot(penalised, direction)
        self.linear = dot(penalised, self.W)
        return dot(self.weight * self.h, self.q * self.q + self.bend) + self.square

    def slope(self, t: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        some = slice(None) if len(part) == len(t) else part
        t = t[some]
        step = t[:, None]
        q, bend, tilt = self.q[some], self.bend[some], self.tilt[some]
        margin = self.margin[some] + step * q
        mean, h = expected_tail(margin, self.variance[some] + step * (2 * tilt + step * bend))
        r = residual(margin, mean, self.Y[some])
        self.r[some], self.h[some] = r, h
        square = self.square[some]
        ah = h * self.weight
        first = dot(self.aq[some], r) + dot(ah, tilt + step * bend)
        first += self.linear[some] + t * square
        return first, dot(ah, q * q + bend) + square

    def move(self, t: np.ndarray) -> None:
        step = t[:, None]
        self.W += step * self.direction
        self.b += t * self.direction_b
        self.margin += step * self.q
        self.variance += step * (2 * self.tilt + step * self.bend)
        np.maximum(self.variance, 0, out=self.variance)
