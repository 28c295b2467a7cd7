"""How are the features of one domain brought to the statistics of another?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from heads.training import check_features

MOMENTS = ("none", "mean", "mean_std")
_ROWS_AT_ONCE = 1 << 22  # numbers that are converted at once


@dataclass(frozen=True)
class FeatureMap:
    """x -> scale * x + shift, feature by feature.

    Attributes
    ----------
    scale, shift : (d,) float64
    """

    scale: np.ndarray
    shift: np.ndarray

    def transform(self, X: np.ndarray) -> np.ndarray:
        """Mapped features (n, d) or (n, v, d): float64 of float64, else float32."""
        dtype = np.promote_types(X.dtype, np.float32)
        mapped: np.ndarray = X.astype(dtype) * self.scale.astype(dtype)
        mapped += self.shift.astype(dtype)
        return mapped

    def head(self, W: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The head on x whose margins are those of W (K, d), b (K,) on the mapped x."""
        return W * self.scale, b + W @ self.shift


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of each feature over images and views.

    Attributes
    ----------
    mean, std : (d,) float64
    images : int
    """

    mean: np.ndarray
    std: np.ndarray
    images: int

    @classmethod
    def of(cls, X: np.ndarray) -> Moments:
        """Of X (n, d) or (n, v, d), two passes in float64, some rows at a time."""
        n, d = len(X), X.shape[-1]
        step = max(1, _ROWS_AT_ONCE // max(1, X[:1].size))
        starts = range(0, n, step)
        rows = X.size // d
        mean = sum(
            (X[s : s + step].reshape(-1, d).sum(axis=0, dtype=np.float64) for s in starts),
            np.zeros(d),
        )
        mean /= rows
        square = np.zeros(d)
        for start in starts:
            part = X[start : start + step].reshape(-1, d).astype(np.float64) - mean
            square += np.einsum("ij,ij->j", part, part)
        return cls(mean, np.sqrt(square / rows), n)

    def shrunk(self, towards: Moments, pseudo_count: float) -> Moments:
        """What these are after `pseudo_count` more images with the moments `towards`.

        Means and variances are averaged, with the images as weights.
        """
        if not pseudo_count:
            return self
        w = self.images / (self.images + pseudo_count)
        mean = w * self.mean + (1 - w) * towards.mean
        variance = w * self.std**2 + (1 - w) * towards.std**2
        return Moments(mean, np.sqrt(variance), self.images)

    def map_to(self, reference: Moments, moments: str, max_scale: float) -> FeatureMap:
        """The map that gives features with these moments those of the reference."""
        scale = np.ones_like(self.mean)
        if moments == "none":
            return FeatureMap(scale, np.zeros_like(self.mean))
        if moments == "mean_std":
            moving = (self.std > 0) & (reference.std > 0)
            np.divide(reference.std, self.std, out=scale, where=moving)
            scale = np.clip(scale, 1 / max_scale, max_scale)
        return FeatureMap(scale, reference.mean - scale * self.mean)


@dataclass(frozen=True)
class DomainMoments:
    """Moments of a domain over all its views, and over the first view.

    Attributes
    ----------
    every, first : Moments
    views : int
    """

    every: Moments
    first: Moments
    views: int

    @classmethod
    def of(cls, X: np.ndarray) -> DomainMoments:
        """Of X (n, d) or (n, v, d)."""
        if X.ndim == 2 or X.shape[1] == 1:
            moments = Moments.of(X)
            return cls(moments, moments, 1)
        return cls(Moments.of(X), Moments.of(X[:, 0]), X.shape[1])

    def like(self, other: DomainMoments) -> Moments:
        """Those that compare with `other`: of all views if both have as many."""
        return self.every if self.views == other.views else self.first


class DomainAlignment(TransformerMixin, BaseEstimator):
    """Maps a domain's features so that their mean (and spread) is that of a reference domain.

        x' = m_ref + (s_ref / s_dom) (x - m_dom),

    feature by feature, with the moments over all images and views of the domain; the factor is
    1 for ``moments="mean"``, and "none" leaves everything as it is. No labels are used:
    a domain is whatever rows are given at once.

    Parameters
    ----------
    moments : "none", "mean" or "mean_std"
    pseudo_count : float
        Images of the reference that are added to a domain, as it were; 0 matches the moments
        exactly, 10 or so keeps a domain of few images from being matched to its noise.
    max_scale : float
        A factor stays within 1 / max_scale and max_scale: a feature that hardly ever fires in
        one of the domains must not drown the others. A feature that is constant in either
        domain is only moved.

    Attributes
    ----------
    moments_ : Moments
        Of the reference.
    n_features_in_ : int

    Notes
    -----
    O(n v d). Correlation alignment (Sun, Feng, Saenko 2016) matches whole covariances; with a few
    hundred images that was worse on every domain it was tried on.
    """

    moments_: Moments
    n_features_in_: int

    def __init__(
        self, moments: str = "mean", pseudo_count: float = 0.0, max_scale: float = 10.0
    ) -> None:
        self.moments = moments
        self.pseudo_count = pseudo_count
        self.max_scale = max_scale

    def fit(self, X_reference: Any, y: Any = None) -> DomainAlignment:
        """Note the moments of the reference, X (n, d) or (n, v, d).

        Raises
        ------
        ValueError
            If a parameter is out of range or a feature is not finite.
        """
        check_moments(self.moments)
        if not 0 <= self.pseudo_count < np.inf:
            raise ValueError(f"pseudo_count is {self.pseudo_count}; expected a number >= 0")
        if not self.max_scale >= 1:
            raise ValueError(f"max_scale is {self.max_scale}; expected a number >= 1")
        X = check_features(X_reference, self)
        self.moments_ = Moments.of(X)
        self.n_features_in_ = X.shape[-1]
        return self

    def feature_map(self, X_domain: Any) -> FeatureMap:
        """The map of a domain, to be used on other rows of it.

        Raises
        ------
        ValueError
            If there are fewer than 2 rows, which have no spread.
        """
        check_is_fitted(self, "moments_")
        X = check_features(X_domain, self)
        if X.shape[-1] != self.n_features_in_:
            raise ValueError(
                f"X has {X.shape[-1]} features, but DomainAlignment is expecting "
                f"{self.n_features_in_} features as input"
            )
        check_domain_rows(len(X))
        own = Moments.of(X).shrunk(self.moments_, self.pseudo_count)
        return own.map_to(self.moments_, self.moments, self.max_scale)

    def transform(self, X_domain: Any) -> np.ndarray:
        """Mapped rows of a domain, whose moments are those of these very rows."""
        return self.feature_map(X_domain).transform(np.asarray(X_domain))


def check_moments(moments: str) -> None:
    """Refuse what is no name of moments."""
    if moments not in MOMENTS:
        raise ValueError(f"moments is {moments!r}; expected one of {', '.join(MOMENTS)}")


def check_domain_rows(n: int) -> None:
    """Refuse a domain of too few rows."""
    if n < 2:
        raise ValueError(
            f"the domain has {n} unlabelled row{'s' * (n != 1)}; its statistics need 2 at least "
            "(30 or more are better)"
        )
