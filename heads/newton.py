"""How are many penalised logistic regressions on the same rows solved at once?

For each label k, with margins mu = offset + b + Z w,

    f_k(w, b) = sum_i a_i (log(1 + exp mu_i) - y_i mu_i) + 1/2 sum_j penalty_kj w_j^2.

All labels move together, so that each iteration is two matrix products for all:
conjugate gradients, preconditioned by the Hessian's diagonal at an even row
weight, c_k e_j + penalty_kj (c_k = mean of s (1 - s), e_j = sum_i a_i z_ij^2:
near exact where Z is rotated to principal axes). Margins are linear along a
direction, so the line search of each label costs no product: Newton steps on
the derivative, kept inside a bracket. A label whose decrement g' M^-1 g / 2 is
below `tol` of its loss at the base rate leaves the product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_LINE_STEPS = 8
_LINE_TOL = 0.1  # of the slope at the start: how flat the line search ends


@dataclass(frozen=True)
class LogisticProblem:
    """K logistic regressions on n rows of r features; labels are the leading axis.

    Attributes
    ----------
    Z : (n, r)
        Centred about the weighted mean, so that the intercept stands apart.
    Y : (K, n)
    weight : (n,)
    offset : (K, n) or None
    penalty : (K, 1) or (K, r)
    """

    Z: np.ndarray
    Y: np.ndarray
    weight: np.ndarray
    offset: np.ndarray | None
    penalty: np.ndarray


@dataclass
class Solution:
    """Minimisers, and how they were reached.

    Attributes
    ----------
    W : (K, r), b : (K,)
    n_iter : (K,) int
    converged : (K,) bool
    """

    W: np.ndarray
    b: np.ndarray
    n_iter: np.ndarray
    converged: np.ndarray


class _State:
    """Labels still moving: rows of these arrays, in step."""

    def __init__(self, problem: LogisticProblem, W: np.ndarray, b: np.ndarray) -> None:
        self.labels = np.arange(len(W))
        self.Y, self.offset, self.penalty = problem.Y, problem.offset, problem.penalty
        self.W, self.b = W, b
        self.margin = W @ problem.Z.T
        self.margin += b[:, None]
        if self.offset is not None:
            self.margin += self.offset
        self.s = sigmoid(self.margin)
        self.direction = np.zeros_like(W)
        self.direction_b = np.zeros_like(b)
        self.decrement = np.zeros_like(b)
        self.gradient = np.zeros_like(W)
        self.gradient_b = np.zeros_like(b)

    def keep(self, kept: np.ndarray) -> None:
        for name, value in vars(self).items():
            if value is not None:
                setattr(self, name, value[kept])


def sigmoid(margin: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-mu)), in the type of mu, without overflow."""
    s = np.abs(margin)
    np.negative(s, out=s)
    np.exp(s, out=s)
    low = s / (1 + s)
    return np.where(margin >= 0, 1 - low, low)


def solve(
    problem: LogisticProblem, W: np.ndarray, b: np.ndarray, tol: float, max_iter: int
) -> Solution:
    """Minimise all f_k from (W, b).

    Parameters
    ----------
    W : (K, r), b : (K,)
        Where to start; not changed.
    tol : float
        Bound on the estimated excess f - f*, relative to the loss of the base rate.
    max_iter : int
    """
    state = _State(problem, W.copy(), b.copy())
    weight = problem.weight
    total = float(weight.sum())
    squares = np.einsum("ij,ij,i->j", problem.Z, problem.Z, weight)
    scale = tol * base_rate_loss(problem)
    result = Solution(W.copy(), b.copy(), np.zeros(len(W), int), np.zeros(len(W), bool))
    for iteration in range(max_iter + 1):
        residual = (state.s - state.Y) * weight
        gradient = residual @ problem.Z + state.penalty * state.W
        gradient_b = residual.sum(axis=1)
        c = ((state.s * (1 - state.s)) @ weight)[:, None]
        inverse = 1 / (c / total * squares + state.penalty)
        step, step_b = gradient * inverse, gradient_b / c[:, 0]
        decrement = _dot(gradient, step) + gradient_b * step_b
        done = decrement <= 2 * scale[state.labels]
        if done.any() or iteration == max_iter:
            at = state.labels if iteration == max_iter else state.labels[done]
            some = slice(None) if iteration == max_iter else done
            result.W[at], result.b[at] = state.W[some], state.b[some]
            result.n_iter[at] = iteration
            result.converged[at] = done[some]
            if done.all() or iteration == max_iter:
                break
            left = ~done
            state.keep(left)
            gradient, gradient_b = gradient[left], gradient_b[left]
            step, step_b, decrement = step[left], step_b[left], decrement[left]
        _turn(state, gradient, gradient_b, step, step_b, decrement)
        _advance(state, problem.Z, weight, gradient, gradient_b)
    return result


def base_rate_loss(problem: LogisticProblem) -> np.ndarray:
    """(K,) smallest loss without features: sum_i a_i times the entropy of the base rate."""
    total = problem.weight.sum()
    rate = np.clip(problem.Y @ problem.weight / total, 1e-12, 1 - 1e-7)
    return -total * (rate * np.log(rate) + (1 - rate) * np.log1p(-rate))


def _dot(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    return np.einsum("kj,kj->k", A, B)


def _turn(
    state: _State,
    gradient: np.ndarray,
    gradient_b: np.ndarray,
    step: np.ndarray,
    step_b: np.ndarray,
    decrement: np.ndarray,
) -> None:
    """Set the new conjugate directions (Polak-Ribiere, reset where they would not descend)."""
    change = _dot(gradient - state.gradient, step) + (gradient_b - state.gradient_b) * step_b
    with np.errstate(divide="ignore", invalid="ignore"):
        beta = np.where(state.decrement > 0, np.maximum(change / state.decrement, 0), 0)
    beta = beta.astype(step.dtype)
    direction = beta[:, None] * state.direction - step
    direction_b = beta * state.direction_b - step_b
    uphill = _dot(direction, gradient) + direction_b * gradient_b >= 0
    if uphill.any():
        direction[uphill], direction_b[uphill] = -step[uphill], -step_b[uphill]
    state.direction, state.direction_b = direction, direction_b
    state.gradient, state.gradient_b, state.decrement = gradient, gradient_b, decrement


def _advance(
    state: _State,
    Z: np.ndarray,
    weight: np.ndarray,
    gradient: np.ndarray,
    gradient_b: np.ndarray,
) -> None:
    """Move each label along its direction to where its derivative nearly vanishes."""
    q = state.direction @ Z.T
    q += state.direction_b[:, None]
    linear = _dot(state.penalty * state.direction, state.W)
    square = _dot(state.penalty * state.direction, state.direction)
    slope = _dot(state.direction, gradient) + state.direction_b * gradient_b
    aq = q * weight
    known = _dot(aq, state.Y) - linear  # the derivative is sum a q s - known + t square
    curvature = np.einsum("ki,ki,ki->k", aq, q, state.s * (1 - state.s)) + square
    low, high = np.zeros_like(slope), np.full_like(slope, np.inf)
    t = -slope / curvature
    todo = np.arange(len(t))
    s = np.empty_like(state.s)
    for _ in range(_LINE_STEPS):
        part = slice(None) if len(todo) == len(t) else todo
        at = sigmoid(state.margin[part] + t[part, None] * q[part])
        s[part] = at
        derivative = _dot(aq[part], at) - known[part] + t[part] * square[part]
        flat = np.abs(derivative) <= -_LINE_TOL * slope[part]
        if flat.all():
            break
        rising = derivative > 0
        high[todo] = np.where(rising, t[part], high[todo])
        low[todo] = np.where(rising, low[todo], t[part])
        second = np.einsum("ki,ki,ki->k", aq[part], q[part], at * (1 - at)) + square[part]
        following = t[part] - derivative / second
        outside = ~((following > low[todo]) & (following < high[todo]))
        middle = np.where(np.isinf(high[todo]), 2 * t[part] + 1e-30, (low[todo] + high[todo]) / 2)
        following = np.where(outside, middle, following)
        todo = todo[~flat]
        t[todo] = following[~flat]
    else:
        t[todo] = low[todo]
        s[todo] = sigmoid(state.margin[todo] + t[todo, None] * q[todo])
    state.W += t[:, None] * state.direction
    state.b += t * state.direction_b
    state.margin += t[:, None] * q
    state.s = s
