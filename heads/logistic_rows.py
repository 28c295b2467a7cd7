"""Where do labels that are known on the same images meet their rows, and under which penalty?"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock

import numpy as np

from heads.dropout import check_l2
from heads.features import (
    Coordinates,
    PrincipalAxes,
    feature_moments,
    features_of,
    scaled_coordinates,
)
from heads.losses import WeightedRows
from heads.training import TrainingSet

_WEAK = 0.01  # rho below which coordinates must be precise


@dataclass(frozen=True)
class Objective:
    """What is minimised, and how closely.

    Attributes
    ----------
    noise : "quadratic" or "gaussian"
    l2 : float
    min_positives : int
    tol : float
    max_iter : int
    """

    noise: str
    l2: float
    min_positives: int
    tol: float
    max_iter: int

    @classmethod
    def checked(
        cls, noise: str, l2: float, min_positives: int, tol: float, max_iter: int
    ) -> Objective:
        """Refuse what cannot be minimised."""
        if noise not in ("quadratic", "gaussian"):
            raise ValueError(f"noise is {noise!r}; expected 'quadratic' or 'gaussian'")
        if not tol > 0 or not max_iter >= 1:
            raise ValueError(f"tol is {tol}, max_iter {max_iter}; expected tol > 0, max_iter >= 1")
        return cls(noise, check_l2(l2), min_positives, tol, max_iter)


@dataclass(frozen=True)
class Space:
    """Coordinates in which the penalties of all labels are alike, and the rows there.

    Attributes
    ----------
    key : (str, bool)
        By which feature scales the coordinates were chosen, and whether precisely.
    at : Coordinates
    m : (d,)
        Raw second moments of the rows.
    rows : WeightedRows
        (n, r).
    squares : (n, r) or None
        Of the features that Gaussian noise multiplies.
    held : (t, r) or None
        Test images.
    """

    key: tuple[str, bool]
    at: Coordinates
    m: np.ndarray
    rows: WeightedRows
    squares: np.ndarray | None
    held: np.ndarray | None

    def penalty(self, strength: np.ndarray, l2: float) -> np.ndarray:
        """(k, 1) or (k, r) penalty strength_k m_j + l2 in these coordinates."""
        dtype = self.rows.Z.dtype
        if self.key[0] == "dropout":
            return strength[:, None].astype(dtype)
        if self.key[0] == "l2":
            return np.full((len(strength), 1), l2, dtype)
        scale = self.at.basis.astype(np.float64) ** 2
        # A feature that is always 0 has no gradient; any penalty keeps it there.
        l2_part = np.where(scale > 0, l2 * scale, 1.0)
        return (strength[:, None] * (self.m * scale) + l2_part).astype(dtype)


class Rows:
    """Training rows of labels that are known on the same images.

    They are put into coordinates when first asked for, and forgotten when all `users`
    are `done`: each of many folds would hold about as much as X.
    """

    def __init__(
        self,
        data: TrainingSet,
        images: np.ndarray,
        objective: Objective,
        axes: PrincipalAxes,
        test: np.ndarray | None,
    ) -> None:
        self.data, self.images, self.objective = data, images, objective
        self.axes, self.test = axes, test
        self.weight = data.row_weight(images)
        self.users = 0
        self._lock = Lock()
        self._latest: Space | None = None

    def space(self, rho: np.ndarray, current: Space | None) -> Space:
        """The space for these rates: the `current` one if it serves."""
        key = self._key(rho)
        if current is not None and current.key == key:
            return current
        with self._lock:
            if self._latest is None or self._latest.key != key:
                self._latest = None  # before the next is made
                self._latest = self._make(key, bool(rho.any()))
            return self._latest

    def done(self) -> None:
        """One user less."""
        with self._lock:
            self.users -= 1
            if not self.users:
                self._latest = None

    def _key(self, rho: np.ndarray) -> tuple[str, bool]:
        """Principal axes where the penalties of all labels are alike, else the features."""
        l2, noisy = self.objective.l2, bool(rho.any())
        name = "l2" if l2 > 0 else "dropout"
        if noisy and (l2 > 0 or self.objective.noise == "gaussian"):
            name = "scaled"
        precise = name == "l2" or (name == "dropout" and float(rho.min()) < _WEAK)
        return name, precise

    def _make(self, key: tuple[str, bool], noisy: bool) -> Space:
        name, precise = key
        data, images = self.data, self.images
        mean, m = feature_moments(data, images)
        at = scaled_coordinates(mean, np.ones_like(m) if name == "l2" else m, data.dtype)
        if name != "scaled":
            at = self.axes.turn(at, images, name == "dropout", precise)
        squares = None
        if noisy and self.objective.noise == "gaussian":
            squares = data.rows(images) * at.basis
            squares *= squares
        held = None if self.test is None else at.features(data.view_means(self.test))
        rows = WeightedRows.of(features_of(data, images, at), self.weight, data.n_views)
        return Space(key, at, m, rows, squares, held)
