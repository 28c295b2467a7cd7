"""How are many smooth convex problems on the same rows minimised at once?

The unknowns of label k are weights w (r,) and an intercept b. All labels move
together, so that an iteration is a few matrix products for all of them: the
quasi-Newton method L-BFGS about an estimate M of each Hessian, and a line search of
its own for each label. Margins are linear along a direction, so the search costs no
product: secants of the derivative, kept inside a bracket. A label whose decrement
g' H g / 2 is small, H the inverse Hessian's estimate, leaves the products.

Source: Liu, Nocedal (1989), "On the limited memory BFGS method for large scale
optimization".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

_MEMORY = 8  # steps that the curvature is estimated from
_LINE_STEPS = 20
_LINE_GROWTH = 4.0  # of the step, while the derivative still falls
_LINE_TOL = 0.3  # of the slope at the start: how flat the search ends


@dataclass
class Solution:
    """Minimisers, and how they were reached.

    Attributes
    ----------
    W : (K, r), b : (K,)
    at_W, at_b : the same
        Where the last gradient was looked at: W and b may lie one step further on.
    margin : (K, n)
        There.
    n_iter : (K,) int
        Gradients that were looked at.
    converged : (K,) bool
    """

    W: np.ndarray
    b: np.ndarray
    at_W: np.ndarray
    at_b: np.ndarray
    margin: np.ndarray
    n_iter: np.ndarray
    converged: np.ndarray

    def leave(self, labels: np.ndarray, batch: Batch, memory: _Memory, which: np.ndarray) -> None:
        """Note where labels are that stop, and take their last step, which costs no product.

        It is of length 1, which is nearly right at the end, and takes off most of the
        excess by which the label was judged; not along M^-1 g, which no step has tried.
        """
        W, b = batch.W[which], batch.b[which]
        self.at_W[labels], self.at_b[labels] = W, b
        self.margin[labels] = batch.margin[which]
        if memory.steps:
            W, b = W + memory.direction[which], b + memory.direction_b[which]
        self.W[labels], self.b[labels] = W, b


class Batch(ABC):
    """Objectives of k labels where they stand; the leading axis of each array is the label.

    Attributes
    ----------
    W : (k, r), b : (k,)
    margin : (k, n)
    """

    W: np.ndarray
    b: np.ndarray
    margin: np.ndarray

    @abstractmethod
    def gradient(self) -> tuple[np.ndarray, np.ndarray]:
        """Gradient by W (k, r) and by b (k,)."""

    @abstractmethod
    def precondition(self, g: np.ndarray, g_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """M^-1 applied to what is shaped like a gradient."""

    def scale(self, g: np.ndarray, g_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same for a diagonal M, which no rounding makes indefinite."""
        return self.precondition(g, g_b)

    @abstractmethod
    def aim(self, direction: np.ndarray, direction_b: np.ndarray) -> None:
        """Make all products along a direction."""

    @abstractmethod
    def second(self) -> np.ndarray:
        """An estimate of the second derivative along the direction."""

    @abstractmethod
    def furthest(self) -> np.ndarray:
        """Step beyond which no first trial along the direction goes."""

    @abstractmethod
    def slope(self, t: np.ndarray, part: np.ndarray) -> np.ndarray:
        """Derivative of the labels `part` at steps t; the last call of each label counts."""

    @abstractmethod
    def move(self, t: np.ndarray) -> None:
        """Go t along the direction, where `slope` was called last for each label."""

    @abstractmethod
    def keep(self, kept: np.ndarray) -> None:
        """Go on with the labels where `kept` (k,) is True."""


def minimise(batch: Batch, tolerance: np.ndarray, max_iter: int) -> Solution:
    """Move all labels of a batch to their minima.

    Parameters
    ----------
    batch : Batch
        Used up.
    tolerance : (K,)
        Estimated excess over the minimum at which a label stops.
    max_iter : int
    """
    labels = np.arange(len(batch.b))
    result = Solution(
        W=batch.W.copy(),
        b=batch.b.copy(),
        at_W=batch.W.copy(),
        at_b=batch.b.copy(),
        margin=batch.margin.copy(),
        n_iter=np.zeros(len(labels), int),
        converged=np.zeros(len(labels), bool),
    )
    memory = _Memory()
    t = np.ones_like(batch.b)
    for iteration in range(1, max_iter + 1):
        g, g_b = batch.gradient()
        memory.learn(t, g, g_b)
        slope = memory.turn(batch)
        done = -slope <= 2 * tolerance[labels]
        lost = ~np.isfinite(slope)  # beyond the range of the type: the start is kept
        stop = done | lost | (iteration == max_iter)
        if stop.any():
            kept, at = stop & ~lost, labels[stop]
            result.leave(labels[kept], batch, memory, kept)
            result.n_iter[at], result.converged[at] = iteration, done[stop]
            if stop.all():
                break
            left = ~stop
            labels, slope = labels[left], slope[left]
            batch.keep(left)
            memory.keep(left)
        batch.aim(memory.direction, memory.direction_b)
        far = batch.furthest()
        if iteration == 1:
            trial = -slope / np.maximum(batch.second(), -slope / far)
        else:
            trial = np.minimum(1, far)
        t = _search(batch, slope, trial)
        batch.move(t)
    return result


@dataclass
class _Step:
    """A step and how it changed the gradient; `share` is 1 / (s' y), or 0 if that is not > 0."""

    s: np.ndarray
    s_b: np.ndarray
    y: np.ndarray
    y_b: np.ndarray
    share: np.ndarray

    def along(self, v: np.ndarray, v_b: np.ndarray) -> np.ndarray:
        return self.share * (dot(self.s, v) + self.s_b * v_b)

    def across(self, v: np.ndarray, v_b: np.ndarray) -> np.ndarray:
        return self.share * (dot(self.y, v) + self.y_b * v_b)


class _Memory:
    """The last steps of each label, the last gradient and the direction from there."""

    g: np.ndarray
    g_b: np.ndarray
    direction: np.ndarray
    direction_b: np.ndarray

    def __init__(self) -> None:
        self.steps: list[_Step] = []
        self.begun = False

    def learn(self, t: np.ndarray, g: np.ndarray, g_b: np.ndarray) -> None:
        """Note the gradient where a step t along the direction has led."""
        if self.begun:
            s, s_b = t[:, None] * self.direction, t * self.direction_b
            y, y_b = g - self.g, g_b - self.g_b
            product = dot(s, y) + s_b * y_b
            share = np.divide(1, product, out=np.zeros_like(product), where=product > 0)
            self.steps = [*self.steps[1 - _MEMORY :], _Step(s, s_b, y, y_b, share)]
        self.begun = True
        self.g, self.g_b = g, g_b

    def turn(self, batch: Batch) -> np.ndarray:
        """Take the direction -H g, or along a diagonal where it would climb; its slope -g' H g."""
        v, v_b = self.g.copy(), self.g_b.copy()
        amounts = []
        for step in reversed(self.steps):
            amount = step.along(v, v_b)
            amounts.append(amount)
            v -= amount[:, None] * step.y
            v_b -= amount * step.y_b
        v, v_b = batch.precondition(v, v_b)
        for step, amount in zip(self.steps, reversed(amounts), strict=True):
            change = amount - step.across(v, v_b)
            v += change[:, None] * step.s
            v_b += change * step.s_b
        slope = -dot(v, self.g) - v_b * self.g_b
        climbs = slope > 0
        if climbs.any():
            plain, plain_b = batch.scale(self.g, self.g_b)
            v[climbs], v_b[climbs] = plain[climbs], plain_b[climbs]
            slope[climbs] = (-dot(plain, self.g) - plain_b * self.g_b)[climbs]
        self.direction, self.direction_b = -v, -v_b
        return slope

    def keep(self, kept: np.ndarray) -> None:
        """Go on with the labels where `kept` is True."""
        for name in ("g", "g_b", "direction", "direction_b"):
            setattr(self, name, getattr(self, name)[kept])
        for step in self.steps:
            for name, value in vars(step).items():
                setattr(step, name, value[kept])


def _search(batch: Batch, slope: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Step of each label, tried from `t` on, at which its derivative has nearly vanished.

    Secants of the derivative, kept inside a bracket by the Illinois rule; where
    that fails to rounding, the longest step that still descends.
    """
    low, high = np.zeros_like(t), np.full_like(t, np.inf)
    f_low, f_high = slope.copy(), np.zeros_like(t)
    before = np.zeros_like(t)  # the derivative's sign at the last step
    part = np.arange(len(t))
    for _ in range(_LINE_STEPS):
        derivative = batch.slope(t[part], part)
        open_ = np.abs(derivative) > -_LINE_TOL * slope[part]
        if not open_.any():
            return t
        part, f = part[open_], derivative[open_]
        x, rises = t[part], f > 0
        # Beyond the bracket's end so far, as far as the last two derivatives foretell.
        reach = x - f * (x - low[part]) / np.where(f > f_low[part], f - f_low[part], np.inf)
        reach = np.where(reach > x, np.minimum(reach, _LINE_GROWTH * x), _LINE_GROWTH * x)
        # An end that stays twice counts half, or it would stay for ever.
        same = np.sign(f) == before[part]
        f_high[part] = np.where(rises, f, np.where(same, f_high[part] / 2, f_high[part]))
        f_low[part] = np.where(rises, np.where(same, f_low[part] / 2, f_low[part]), f)
        high[part], low[part] = np.where(rises, x, high[part]), np.where(rises, low[part], x)
        before[part] = np.sign(f)
        closed = np.isfinite(high[part])
        width = np.where(closed, high[part] - low[part], 0)
        share = -f_low[part] / (f_high[part] - f_low[part])
        t[part] = np.where(closed, low[part] + share * width, reach)
    t[part] = low[part]
    batch.slope(t[part], part)
    return t


def dot(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """Row by row inner products."""
    return np.einsum("kj,kj->k", A, B)
