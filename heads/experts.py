"""Which linear heads know the target domain, in coordinates that all domains share?

Stage 1 rows are mapped to the moments of the validation rows, once by means and once by means
and spreads; both kinds of rows are then standardised by the mapped Stage 1 rows. There, a
head towards the network's own last layer, one towards zero, and the network's after a linear map
of features that all labels share (:mod:`heads.adapter`) are fitted on all of Stage 1 and on
validation rows that count little. An image trains as it is read later: as the mean over its views,
and as its first view. Margins are averaged, with the weights of the pulls that have the least
out-of-fold log-loss. For a domain with a map of its own everything is affine: one head (W, b) on
its raw features.

Tried on typefaces and no better in the average: heads towards the shared map's, penalties in the
metric of the network's weights, Gaussian noise, validation rows at 0.3 or 1, more views as rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from heads.adapter import fit_adapter
from heads.alignment import FeatureMap, Moments, check_moments
from heads.folds import check_folds
from heads.grouping import numbered
from heads.inputs import check_groups
from heads.logistic import DropoutLogistic, DropoutLogisticCV
from heads.platt import fit_platt
from heads.stacking import stacked_weights
from heads.training import check_features, check_targets

PULLS = ("network", "zero", "shared")


@dataclass(frozen=True)
class Linear:
    """Margins x -> W x + b.

    Attributes
    ----------
    W : (K, d), b : (K,)
    """

    W: np.ndarray
    b: np.ndarray

    def margins(self, X: np.ndarray) -> np.ndarray:
        """(n, K) of X (n, d) or, averaged over the views, (n, v, d)."""
        dtype = np.float64 if X.dtype == np.float64 else np.float32
        means = X.astype(dtype) if X.ndim == 2 else X.mean(axis=1, dtype=dtype)
        return means @ self.W.T.astype(dtype) + self.b.astype(dtype)

    def after(self, feature_map: FeatureMap) -> Linear:
        """The head on raw features whose margins are this one's on mapped features."""
        return Linear(*feature_map.head(self.W, self.b))

    def calibrated(self, slope: np.ndarray, intercept: np.ndarray) -> Linear:
        """Margins slope_k (W x + b)_k + intercept_k."""
        slope = np.broadcast_to(slope, len(self.b))
        return Linear(self.W * slope[:, None], self.b * slope + intercept)


def average(heads: Sequence[Linear], weights: Sequence[float] | None = None) -> Linear:
    """The head whose margins are the (weighted) average of the heads' margins."""
    w = np.full(len(heads), 1 / len(heads)) if weights is None else np.asarray(weights)
    W = sum((a * h.W for a, h in zip(w, heads, strict=True)), np.zeros(heads[0].W.shape))
    b = sum((a * h.b for a, h in zip(w, heads, strict=True)), np.zeros(heads[0].b.shape))
    return Linear(W, b)


@dataclass(frozen=True)
class ExpertConfig:
    """How the heads of the target domain are fitted.

    Attributes
    ----------
    moments : tuple of "none", "mean", "mean_std"
        Maps to the validation rows' moments; a head for each.
    pulls : tuple of "network", "zero", "shared"
        What heads shrink towards; a head for each. shared: the network's, all labels
        moving by one map of the features.
    source_weight : float
        What all validation rows together count, in units of all of Stage 1.
    source_rows : int
        Validation rows at most, drawn by the seed.
    dropouts : rates to compare out of fold
    l2 : float
        Beside dropout, for each unit of the rows' weight: dropout alone hardly holds rare labels.
    weights : "chosen" or "equal"
        Of the pulls' margins in the average.
    shared_strength : float
        Of the shared map's pull to none.
    cv : int
        Folds.
    max_scale : float
        See :class:`heads.DomainAlignment`.
    """

    moments: tuple[str, ...] = ("mean", "mean_std")
    pulls: tuple[str, ...] = ("network", "zero", "shared")
    source_weight: float = 0.1
    source_rows: int = 1000
    dropouts: tuple[float, ...] = (0.05, 0.2, 0.4)
    l2: float = 0.01
    weights: str = "chosen"
    shared_strength: float = 0.1
    cv: int = 5
    max_scale: float = 10.0


@dataclass(frozen=True)
class Expert:
    """A head of the target domain, on features that were mapped to the validation rows' moments.

    Attributes
    ----------
    moments : str
        Of the map.
    pull : str
        What it was shrunk towards.
    dropout : float
        0 for a shared map.
    head : Linear
    oof : (2, n, K)
        Out-of-fold margins of the Stage 1 rows: of the mean over their views, and of the first.
    weight : float
        In the average; all add up to 1.
    """

    moments: str
    pull: str
    dropout: float
    head: Linear
    oof: np.ndarray
    weight: float = 1.0


@dataclass(frozen=True)
class Rows:
    """Labelled rows of one domain.

    Attributes
    ----------
    X : (n, v, d)
    Y : (n, K) float, NaN unknown
    groups : (n,)
        Equal ones stay together, in both domains if they are `beside` each other.
    """

    X: np.ndarray
    Y: np.ndarray
    groups: np.ndarray

    @classmethod
    def of(
        cls, X: Any, Y: Any, groups: Any, mask: Any, estimator: Any, name: str = "groups"
    ) -> Rows:
        """What the arguments of a fit say, checked; `name` is that of the groups."""
        X = check_features(X, estimator)
        X = X if X.ndim == 3 else X[:, None]
        dtype = np.float64 if X.dtype == np.float64 else np.float32
        targets, known = check_targets(Y, mask)
        if len(targets) != len(X):
            raise ValueError(f"Y has {len(targets)} rows, but X has {len(X)}")
        dense = np.array(targets, dtype)
        if known is not None:
            dense[~known] = np.nan
        given = check_groups(groups, len(X), name)
        own = np.arange(len(X)) if given is None else given
        return cls(X.astype(dtype, copy=False), dense, own)

    def beside(self, other: Rows, shared_groups: bool) -> tuple[Rows, Rows]:
        """Both, with groups of which none is in both unless equal ones are shared."""
        n, m = len(self.X), len(other.X)
        first, second = numbered(self.groups, other.groups, n, m, shared_groups)
        return replace(self, groups=first), replace(other, groups=second)

    def take(self, rows: np.ndarray) -> Rows:
        """Some of the rows."""
        return Rows(self.X[rows], self.Y[rows], self.groups[rows])


def fit_experts(
    target: Rows, source: Rows, start: Linear, config: ExpertConfig, seed: int
) -> list[Expert]:
    """One head for each map and each pull.

    Labels without a positive in Stage 1 are not trained: they keep the network's weights and
    share a shift of their biases (:class:`heads.DropoutLogistic` on rare labels).
    """
    _check(config)
    seen = np.flatnonzero((target.Y > 0).any(axis=0))
    if not len(seen):
        raise ValueError("Stage 1 has no positive label; there is nothing to adapt to")
    of_target, of_source = Moments.of(target.X), Moments.of(source.X)
    read = as_read(target.X)
    if config.source_weight and len(source.X) > config.source_rows:
        drawn = np.random.default_rng(seed).permutation(len(source.X))[: config.source_rows]
        source = source.take(np.sort(drawn))
    experts: list[Expert] = []
    dropouts: dict[str, Sequence[float]] = {}
    for moments in config.moments:
        to_source = of_target.map_to(of_source, moments, config.max_scale)
        spread = to_source.scale * of_target.std
        spread = np.where(spread > 0, spread, 1.0)
        centre = to_source.scale * of_target.mean + to_source.shift
        standard = FeatureMap(1 / spread, -centre / spread)
        network = start.after(FeatureMap(spread, centre))
        Z = standard.transform(to_source.transform(read))
        rest = _unseen(Z, target.Y, network, seen)
        Z_source = standard.transform(source.X[:, 0])
        both = _both(Z, Z_source, target, source, config.source_weight)
        both["Y"] = both["Y"][:, seen]
        if "shared" in config.pulls:
            mapped = Rows(Z, target.Y, target.groups), Rows(Z_source, source.Y, source.groups)
            head, oof = _shared(*mapped, network, rest, seen, config, seed)
            experts.append(Expert(moments, "shared", 0.0, head.after(standard), oof))
        for pull in config.pulls:
            if pull == "shared":
                continue
            init = Linear(network.W[seen], network.b[seen]) if pull == "network" else None
            fitted = _fit(both, init, dropouts.get(pull, config.dropouts), config, seed)
            dropouts[pull] = [float(fitted.dropout_)]  # the other map differs little
            head = Linear(rest.W.copy(), rest.b.copy())
            head.W[seen], head.b[seen] = fitted.coef_, fitted.intercept_
            oof = head.margins(Z.reshape(-1, Z.shape[-1]))
            oof[:, seen] = fitted.oof_decision_function_[: len(oof)]
            oof = _both_readings(oof.reshape(*Z.shape[:2], -1))
            experts.append(Expert(moments, pull, dropouts[pull][0], head.after(standard), oof))
    return _weighted(experts, target.Y[:, seen], seen, config)


def as_read(X: np.ndarray) -> np.ndarray:
    """(n, r, d) of X (n, v, d): the mean over the views and, if there are several, the first."""
    means = X.mean(axis=1, keepdims=True)
    return means if X.shape[1] == 1 else np.concatenate([means, X[:, :1]], axis=1)


def _both_readings(margins: np.ndarray) -> np.ndarray:
    """(2, n, K) of (n, r, K)."""
    return np.stack([margins[:, 0], margins[:, -1]])


def _weighted(
    experts: list[Expert], Y: np.ndarray, seen: np.ndarray, config: ExpertConfig
) -> list[Expert]:
    """With the weights of their pulls, which all maps share."""
    pulls = tuple(dict.fromkeys(e.pull for e in experts))
    weights = np.full(len(pulls), 1 / len(pulls))
    if config.weights == "chosen" and len(pulls) > 1:
        margins = [
            np.mean([e.oof.mean(axis=0)[:, seen] for e in experts if e.pull == pull], axis=0)
            for pull in pulls
        ]
        weights = stacked_weights(np.stack(margins), Y)
    share = dict(zip(pulls, weights * len(pulls) / len(experts), strict=True))
    return [replace(e, weight=float(share[e.pull])) for e in experts]


def _check(config: ExpertConfig) -> None:
    for moments in config.moments:
        check_moments(moments)
    if config.weights not in ("chosen", "equal"):
        raise ValueError(f"weights is {config.weights!r}; expected chosen or equal")
    if not config.moments or not config.pulls or not set(config.pulls) <= set(PULLS):
        raise ValueError(
            f"moments {config.moments}, pulls {config.pulls}: give at least one of each; pulls are "
            f"{', '.join(PULLS)}"
        )


def _unseen(Z: np.ndarray, Y: np.ndarray, network: Linear, seen: np.ndarray) -> Linear:
    """The network's head, its labels without positives at the rate that Stage 1 has of them."""
    b = network.b.copy()
    rest = np.setdiff1d(np.flatnonzero(~np.isnan(Y).all(axis=0)), seen)
    if len(rest):
        rare = DropoutLogistic(min_positives=len(Z) + 1).fit(
            Z, Y[:, rest], coef_init=network.W[rest], intercept_init=b[rest]
        )
        b[rest] = rare.intercept_
    return Linear(network.W, b)


def _both(
    Z: np.ndarray, Z_source: np.ndarray, target: Rows, source: Rows, weight: float
) -> dict[str, Any]:
    """Every reading (n, r, d) is a row of its own, so that each has an out-of-fold margin."""
    n, r, d = Z.shape
    rows = {
        "X": Z.reshape(-1, d),
        "Y": np.repeat(target.Y, r, axis=0),
        "sample_weight": np.full(n * r, 1 / r),
        "groups": np.repeat(target.groups, r),
    }
    if weight:
        m = len(Z_source)
        rows["X"] = np.concatenate([rows["X"], Z_source])
        rows["Y"] = np.concatenate([rows["Y"], source.Y])
        rows["sample_weight"] = np.r_[rows["sample_weight"], np.full(m, weight * n / m)]
        rows["groups"] = np.r_[rows["groups"], source.groups]
    return rows


def _shared(
    target: Rows,
    source: Rows,
    network: Linear,
    rest: Linear,
    seen: np.ndarray,
    config: ExpertConfig,
    seed: int,
) -> tuple[Linear, np.ndarray]:
    """The head with a shared map, and out-of-fold margins (2, n, K) of Stage 1."""
    (n, r), Y = target.X.shape[:2], target.Y
    # The map is measured in features, so it matters what the network's margins are worth.
    margins = target.X[:, 0] @ network.W.T + network.b
    known = ~np.isnan(Y)
    platt = fit_platt(margins, np.where(known, Y, 0), known, np.ones(n), rising=True)
    start = network.calibrated(np.array(platt.slope), np.array(platt.intercept))

    def fit(train: np.ndarray) -> Linear:
        mine, home = train[train < n], train[train >= n] - n
        rows = [target.X[mine, reading] for reading in range(r)]
        weights, labels = [np.full(len(mine), 1 / r)] * r, [Y[mine]] * r
        if config.source_weight and len(home):
            rows.append(source.X[home])
            weights.append(np.full(len(home), config.source_weight * max(1, len(mine)) / len(home)))
            labels.append(source.Y[home])
        head = Linear(rest.W.copy(), rest.b.copy())
        head.W[seen], head.b[seen] = fit_adapter(
            np.concatenate(rows),
            np.concatenate(labels)[:, seen],
            np.concatenate(weights),
            start.W[seen],
            start.b[seen],
            config.shared_strength,
        )
        return head

    groups = np.r_[target.groups, source.groups]
    labels = np.concatenate([Y, source.Y])
    oof = np.zeros((n, r, Y.shape[1]), target.X.dtype)
    for train, test in check_folds(config.cv, labels, labels, groups, seed):
        held = test[test < n]
        if len(held):
            flat = target.X[held].reshape(-1, target.X.shape[-1])
            oof[held] = fit(train).margins(flat).reshape(len(held), r, -1)
    return fit(np.arange(len(labels))), _both_readings(oof)


def _fit(
    rows: dict[str, Any],
    init: Linear | None,
    rates: Sequence[float],
    config: ExpertConfig,
    seed: int,
) -> DropoutLogisticCV:
    l2 = config.l2 * float(rows["sample_weight"].sum())
    head = DropoutLogisticCV(rates, l2=l2, cv=config.cv, random_state=seed, tol=1e-4)
    start = {} if init is None else {"coef_init": init.W, "intercept_init": init.b}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the best dropout", UserWarning)
        fitted: DropoutLogisticCV = head.fit(**rows, **start)
    return fitted
