"""Which linear map of the features, shared by all labels, fits a network's last layer to a domain?

A shift of images moves features, whatever their labels: so the head of label k becomes w_k (I + A)
with one A (d, d) for all K labels, and rare labels learn from frequent ones:

    sum_i a_i sum_k loss(y_ik, b_k + w_k (I + A) z_i)  +  strength d / 2 |A|^2  +  1/20 |b - b0|^2

on features z of unit spread, so that `strength` is a pure number. Convex in (A, b). The Hessian in
A is close to the Kronecker product of W' C W, C = diag(mean p_k (1 - p_k)), and Z' a Z: in the
eigenvectors of both, scaled by the eigenvalues, L-BFGS takes some tens of steps. Beyond 256
features A stays within the leading 256 eigenvectors on either side, r. O(n r (K + r)) a step; and
the eigenvectors of the smaller side of W and of Z.
A linear layer between frozen features and a frozen head: Rebuffi, Bilen, Vedaldi (2017).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh as scipy_eigh
from scipy.optimize import minimize
from scipy.special import expit

from heads.lapack import eigh

_STEPS = 100
_BIAS = 0.1  # strength of the biases' pull: a label with one positive hardly feels it
_RANK = 256
_TOL = 1e-6  # of the loss, relative, in one step


def fit_adapter(
    Z: np.ndarray,
    Y: np.ndarray,
    weight: np.ndarray,
    W: np.ndarray,
    b: np.ndarray,
    strength: float = 0.1,
) -> tuple[np.ndarray, np.ndarray]:
    """Weights W (I + A) (K, d) and biases (K,); see the module.

    Parameters
    ----------
    Z : (n, d)
        float32 or float64, of unit spread.
    Y : (n, K)
        In [0, 1]; NaN is unknown.
    weight : (n,)
    W, b : (K, d), (K,)
        Where it starts.
    strength : float
        > 0.

    Raises
    ------
    ValueError
        If the strength is not positive.
    """
    if not strength > 0:
        raise ValueError(f"shared_strength is {strength}; expected a number > 0")
    problem = _Problem.of(Z, Y, weight, W, b)
    scale = problem.scale(strength)
    result = minimize(
        problem.loss,
        np.zeros(len(scale)),
        args=(strength, scale),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": _STEPS, "maxcor": 10, "ftol": _TOL},
    )
    return problem.head(result.x * scale)


def leading_axes(M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (r,), ascending, and eigenvectors (d, r) of M' M, the leading ones of M (m, d).

    Of fewer rows than features all others are zero, and the small side is solved:
    O(min(m, d)^2 max(m, d)).
    """
    m, d = M.shape
    if m >= d:
        return _leading(M.T @ M)
    e, u = _leading(M @ M.T)
    kept = e > m * np.finfo(M.dtype).eps * e[-1]
    e, u = e[kept], u[:, kept]
    # Rounding leaves the axes of small eigenvalues a little oblique.
    return e, np.linalg.qr(M.T @ u / np.sqrt(e))[0]


def _leading(G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most _RANK eigenvalues and eigenvectors of a symmetric matrix."""
    if len(G) <= _RANK:
        e, vectors = eigh(G)
    else:
        e, vectors = scipy_eigh(G, subset_by_index=[len(G) - _RANK, len(G) - 1], driver="evr")
    return np.maximum(e, 0), vectors


@dataclass(frozen=True)
class _Problem:
    """In coordinates u' z, t_k = w_k' v: A = v B u', B (q, r).

    Attributes
    ----------
    Z, Y : (n, r), (n, K)
    a : (n, 1), or (n, K) where labels are unknown
    T : (K, q)
    base : (n, K)
        Margins before the map.
    W, b : (K, d), (K,)
    left, right : (d, q), (d, r)
        v and u, eigenvectors.
    curvature : (q, r)
        Of the loss in B, about.
    bias_curvature : (K,)
    """

    Z: np.ndarray
    Y: np.ndarray
    a: np.ndarray
    T: np.ndarray
    base: np.ndarray
    W: np.ndarray
    b: np.ndarray
    left: np.ndarray
    right: np.ndarray
    curvature: np.ndarray
    bias_curvature: np.ndarray

    @classmethod
    def of(
        cls, Z: np.ndarray, Y: np.ndarray, weight: np.ndarray, W: np.ndarray, b: np.ndarray
    ) -> _Problem:
        W, b = W.astype(Z.dtype), b.astype(Z.dtype)
        weight = weight.astype(Z.dtype)
        known = ~np.isnan(Y)
        a = weight[:, None]
        if not known.all():
            a, Y = a * known, np.where(known, Y, 0)
        base = Z @ W.T + b
        p = expit(base)
        h = (a * np.maximum(p * (1 - p), 1e-4)).sum(axis=0)
        s, left = leading_axes(np.sqrt(h / weight.sum())[:, None] * W)
        e, right = leading_axes(np.sqrt(weight)[:, None] * Z)
        curvature = s[:, None] * e
        return cls(Z @ right, Y.astype(Z.dtype), a, W @ left, base, W, b, left, right, curvature, h)

    @property
    def d(self) -> int:
        return len(self.left)

    def split(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """B and the change of the biases."""
        size = self.curvature.size
        return at[:size].reshape(self.curvature.shape), at[size:]

    def scale(self, strength: float) -> np.ndarray:
        """Of the coordinates, in which the Hessian is about the identity."""
        B = 1 / np.sqrt(self.curvature + strength * self.d)
        return np.r_[B.ravel(), 1 / np.sqrt(self.bias_curvature + _BIAS)]

    def loss(self, x: np.ndarray, strength: float, scale: np.ndarray) -> tuple[float, np.ndarray]:
        """Objective and gradient."""
        dtype = self.Z.dtype
        B, moved = self.split(x * scale)
        M = self.base + (self.Z @ B.T.astype(dtype)) @ self.T.T + moved.astype(dtype)
        R = self.a * (expit(M) - self.Y)
        loss = float((self.a * (np.logaddexp(0, M) - self.Y * M)).sum(dtype=np.float64))
        loss += strength * self.d / 2 * float((B * B).sum()) + _BIAS / 2 * float(moved @ moved)
        by_map = (R @ self.T).T @ self.Z + strength * self.d * B
        by_bias = R.sum(axis=0) + _BIAS * moved
        return loss, np.r_[by_map.ravel(), by_bias] * scale

    def head(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """W (I + A) and b."""
        B, moved = self.split(at)
        W = self.W + (self.T @ B.astype(self.Z.dtype)) @ self.right.T
        return W, self.b + moved.astype(self.b.dtype)
