"""How are all labels of a logistic head fitted, alone and fold by fold?

Labels known on the same images share rows and coordinates (:class:`Rows`); some
hundred of them at a time move together (:class:`Chunk`), and keep their solution
as the start for the next rate. Chunks of all folds run side by side.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from heads.dropout import (
    check_l2,
    margin_variance,
    noise_averaged_probability,
    rho_from_dropout,
    second_moments,
)
from heads.features import Coordinates, PrincipalAxes, scaled_coordinates
from heads.gaussian import GaussianBatch
from heads.losses import LogisticBatch, base_rate_loss
from heads.newton import Batch, Solution, minimise
from heads.parallel import Map, worker_threads
from heads.rare import label_counts, logistic_rare_bias, trainable
from heads.selection import OutOfFold, Start
from heads.training import TrainingSet, label_patterns

_LABELS = 256  # of one product
_WEAK = 0.01  # rho below which coordinates must be precise
_POINTS = 3  # of a path of rates that foretell the next
_AHEAD = 2.5  # steps, at most, that they foretell


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


class Rows:
    """Training rows of labels that are known on the same images, in good coordinates."""

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
        self.m = second_moments(data.rows(images), self.weight)
        self.key = "", False

    def prepare(self, rho: np.ndarray) -> None:
        """Choose coordinates: principal axes where the penalties of all labels are alike."""
        l2, noisy = self.objective.l2, bool(rho.any())
        name = "l2" if l2 > 0 else "dropout"
        if noisy and (l2 > 0 or self.objective.noise == "gaussian"):
            name = "scaled"
        precise = name == "l2" or (name == "dropout" and float(rho.min()) < _WEAK)
        if self.key == (name, precise):
            return
        self.key = name, precise
        X = self.data.rows(self.images)  # not kept: folds hold Z alone
        if name == "scaled":
            self.at: Coordinates = scaled_coordinates(X, self.weight, self.m)
            self.Z = self.at.features(X)
        else:
            m = self.m if name == "dropout" else None
            self.at, self.Z = self.axes.coordinates(X, self.weight, m, precise)
        self.squares = None
        if noisy and self.objective.noise == "gaussian":
            self.squares = (X * self.at.basis) ** 2
        self.held = None if self.test is None else self.at.features(self.test)

    def penalty(self, strength: np.ndarray) -> np.ndarray:
        """(k, 1) or (k, r) penalty strength_k m_j + l2 in these coordinates."""
        dtype, l2 = self.Z.dtype, self.objective.l2
        if self.key[0] == "dropout":
            return strength[:, None].astype(dtype)
        if self.key[0] == "l2":
            return np.full((len(strength), 1), l2, dtype)
        scale = self.at.basis.astype(np.float64) ** 2
        # A feature that is always 0 has no gradient; any penalty keeps it there.
        l2_part = np.where(scale > 0, l2 * scale, 1.0)
        return (strength[:, None] * (self.m * scale) + l2_part).astype(dtype)


@dataclass(frozen=True)
class _Point:
    """The solution where a path has come to `at`, which grows as rates fall."""

    at: float
    W: np.ndarray
    b: np.ndarray
    origin: bool = False  # infinite rho


def _place(rho: float, noise: str) -> float:
    """Where a rate stands on its path: so that solutions are nearly polynomials of it.

    Weights under Gaussian noise grow from 0, at infinite rho, about as rho^-1/2.
    """
    rho = max(rho, 1e-300)
    return float(rho**-0.5) if noise == "gaussian" else float(-np.log(rho))


def _extrapolate(path: list[_Point], at: float, moved: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """W and b at `at`, by the polynomial through the last points of the path.

    That takes a third off the iterations; but it is done one step ahead only, and
    not for labels that have not `moved` at the last rate: they would run away.
    """
    near = path if path[0].origin else path[-_POINTS:]
    if at - near[-1].at > _AHEAD * (near[-1].at - near[-2].at):
        return path[-1].W, path[-1].b
    W, b = np.zeros_like(near[0].W), np.zeros_like(near[0].b)
    for point in near:
        others = [other.at for other in near if other is not point]
        share = W.dtype.type(np.prod([(at - x) / (point.at - x) for x in others]))
        W += share * point.W
        b += share * point.b
    W[~moved], b[~moved] = path[-1].W[~moved], path[-1].b[~moved]
    return W, b


@dataclass(frozen=True)
class HeldOut:
    """Margins of the test images, W0 apart, their variances (r, k), and what they rest on."""

    margin: np.ndarray
    variance: np.ndarray
    D: np.ndarray
    b: np.ndarray


class Chunk:
    """Some labels on the same rows, and their solution at the last rate."""

    def __init__(self, data: TrainingSet, rows: Rows, labels: np.ndarray) -> None:
        self.rows, self.labels = rows, labels
        self.data = data
        positives, total = label_counts(data, rows.images, labels)
        self.rate = positives / total
        self.Y = np.ascontiguousarray(data.row_targets(rows.images, labels).T)
        base = data.row_base(rows.images, labels)
        self.offset = None if base is None else np.ascontiguousarray(base.T)
        self.path: list[_Point] = []
        self.moved = np.ones(len(labels), bool)
        self.solution: Solution | None = None
        self.made = "", False

    def start_from(self, start: Start) -> None:
        """Start the path from coefficients of fits on some of the rows."""
        at, labels = self.rows.at, self.labels
        D = start.D[labels]
        W, b = self._without_weights()
        known = start.folds[labels] > 0
        W[known], b[known] = at.weights(D)[known], (start.b[labels] + D @ at.mean)[known]
        self.made, self.path = self.rows.key, [_Point(-np.inf, W, b)]

    def solve(self, rho: np.ndarray) -> Solution:
        """Solution at rates rho (k,), started from those at the rates before."""
        rows, noise = self.rows, self.rows.objective.noise
        at = _place(float(rho.max()), noise)
        if self.made != rows.key or (self.path and at <= self.path[-1].at):
            self.made, self.path = rows.key, []
        if not self.path:
            W, b = self._without_weights()
            # Infinite rho, where the weights are zero, has no place on a logarithm's path.
            self.path = [_Point(0.0, W, b, origin=True)] if noise == "gaussian" else []
            self.moved[:] = True
        if len(self.path) > 1:
            W, b = _extrapolate(self.path, at, self.moved)
        elif self.path:
            W, b = self.path[0].W, self.path[0].b
        weight = rows.weight.astype(W.dtype)
        tolerance = rows.objective.tol * base_rate_loss(self.Y, weight)
        self.solution = minimise(self._batch(W, b, weight, rho), tolerance, rows.objective.max_iter)
        self.path.append(_Point(at, self.solution.W, self.solution.b))
        if len(self.path) > _POINTS + 1:
            del self.path[:-_POINTS]
        self.moved = self.solution.n_iter > 1
        return self.solution

    def _without_weights(self) -> tuple[np.ndarray, np.ndarray]:
        """The solution at infinite rho: no weights, and the best intercepts."""
        k, rows = len(self.labels), self.rows
        W = np.zeros((k, rows.Z.shape[1]), self.data.dtype)
        b = np.log(self.rate / (1 - self.rate)).astype(W.dtype)
        if self.offset is None:
            return W, b
        weight, none = rows.weight.astype(W.dtype), W[:, :0]
        plain = LogisticBatch(rows.Z[:, :0], self.Y, weight, self.offset, none, 0 * b, none)
        tolerance = rows.objective.tol * base_rate_loss(self.Y, weight)
        return W, minimise(plain, tolerance, rows.objective.max_iter).b

    def _batch(self, W: np.ndarray, b: np.ndarray, weight: np.ndarray, rho: np.ndarray) -> Batch:
        rows = self.rows
        if rows.squares is None:
            penalty = rows.penalty(rho * self.rate * (1 - self.rate))
            return LogisticBatch(rows.Z, self.Y, weight, self.offset, W, b, penalty)
        penalty = rows.penalty(np.zeros_like(rho))
        strength = rho.astype(W.dtype)
        return GaussianBatch(
            rows.Z, self.Y, weight, self.offset, W, b, rows.squares, strength, penalty
        )

    def coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """D (k, d) and b (k,), W0 and b0 apart."""
        assert self.solution is not None
        D = self.rows.at.coefficients(self.solution.W)
        return D, self.solution.b - D @ self.rows.at.mean

    def unconverged(self) -> np.ndarray:
        """Labels that the last solution left before their minimum."""
        assert self.solution is not None
        return self.labels[~self.solution.converged]

    def held_out(self, rho: np.ndarray) -> HeldOut:
        """What the last solution says of the test images."""
        rows, solution = self.rows, self.solution
        assert solution is not None
        assert rows.held is not None
        assert rows.test is not None
        D, b = self.coefficients()
        margin = rows.held @ solution.W.T + solution.b
        return HeldOut(margin, margin_variance(rows.test, D, rho), D, b)


class LogisticFit:
    """All labels fitted on some images.

    Parameters
    ----------
    data : TrainingSet
    images : (m,) int
        Training images.
    objective : Objective
    axes : PrincipalAxes
        Of the training set.
    test : (r,) int, optional
        Images that `out_of_fold` scores.
    """

    def __init__(
        self,
        data: TrainingSet,
        images: np.ndarray,
        objective: Objective,
        axes: PrincipalAxes,
        test: np.ndarray | None = None,
    ) -> None:
        self.data, self.test = data, test
        images = images[data.weight[images] > 0]
        trained = trainable(data, images, objective.min_positives)
        self.rare = np.flatnonzero(~trained)
        self.rare_bias = logistic_rare_bias(data, images, self.rare)
        held = None if test is None else data.view_means(test)
        self.chunks = []
        self.rows = []
        for labels, known in label_patterns(data.known, images, np.flatnonzero(trained)):
            rows = Rows(data, known, objective, axes, held)
            self.rows.append(rows)
            for start in range(0, len(labels), _LABELS):
                self.chunks.append(Chunk(data, rows, labels[start : start + _LABELS]))

    def coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """W (K, d) and b (K,) of the last rates that all chunks solved."""
        data = self.data
        W = np.zeros((data.n_labels, data.n_features), data.dtype)
        b = np.zeros(data.n_labels, data.dtype)
        for chunk in self.chunks:
            W[chunk.labels], b[chunk.labels] = chunk.coefficients()
        if data.coef_init is not None and data.intercept_init is not None:
            W += data.coef_init
            b += data.intercept_init
        b[self.rare] = self.rare_bias
        return W, b

    def scores(self, held: list[HeldOut]) -> tuple[np.ndarray, np.ndarray]:
        """Margins and probabilities (r, K) of the test images from those of the chunks."""
        data = self.data
        assert self.test is not None
        base = data.base_means(self.test)
        margin = np.zeros((len(self.test), data.n_labels), data.dtype)
        variance = np.zeros_like(margin)
        for chunk, part in zip(self.chunks, held, strict=True):
            margin[:, chunk.labels], variance[:, chunk.labels] = part.margin, part.variance
        margin[:, self.rare] = self.rare_bias
        if base is not None and data.intercept_init is not None:
            margin += base
            margin[:, self.rare] -= data.intercept_init[self.rare]
        return margin, noise_averaged_probability(margin, variance)


def fit_logistic(
    data: TrainingSet, objective: Objective, dropout: np.ndarray, start: Start | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """W, b and the iterations (K,) of a fit on all rows, at one rate or at one a label."""
    rho = np.broadcast_to(rho_from_dropout(dropout), data.n_labels)
    with worker_threads() as run:
        fit = LogisticFit(data, np.arange(data.n_images), objective, PrincipalAxes(data))
        for rows in fit.rows:
            rows.prepare(rho)

        def task(chunk: Chunk) -> Solution:
            if start is not None:
                chunk.start_from(start)
            return chunk.solve(rho[chunk.labels])

        solutions = run(task, fit.chunks)
    n_iter = np.ones(data.n_labels, int)
    for chunk, solution in zip(fit.chunks, solutions, strict=True):
        n_iter[chunk.labels] = solution.n_iter
    warn_unconverged([chunk.unconverged() for chunk in fit.chunks], objective, stacklevel=5)
    return *fit.coefficients(), n_iter


def warn_unconverged(failed: list[np.ndarray], objective: Objective, stacklevel: int) -> None:
    """Warn of labels that have not converged, by name."""
    labels = np.unique(np.concatenate(failed)) if failed else np.empty(0, int)
    if not len(labels):
        return
    named = ", ".join(map(str, labels[:10])) + (", ..." if len(labels) > 10 else "")
    warnings.warn(
        f"{len(labels)} label{'s' if len(labels) > 1 else ''} ({named}) did not converge in "
        f"{objective.max_iter} iterations; raise max_iter or tol, or leave out the weakest rates",
        ConvergenceWarning,
        stacklevel=stacklevel,
    )


def out_of_fold(
    data: TrainingSet,
    fits: list[LogisticFit],
    rho: float,
    run: Map,
    failed: list[np.ndarray],
) -> OutOfFold:
    """Held-out scores at one rate, each chunk of labels of each fold a task."""
    run(lambda rows: rows.prepare(np.asarray([rho])), [rows for fit in fits for rows in fit.rows])

    def task(chunk: Chunk) -> HeldOut:
        rates = np.full(len(chunk.labels), rho)
        chunk.solve(rates)
        return chunk.held_out(rates)

    held = run(task, [chunk for fit in fits for chunk in fit.chunks])
    margin = np.empty((data.n_images, data.n_labels), data.dtype)
    probability = np.empty_like(margin)
    start = Start.zero(data)
    for fit in fits:
        own, held = held[: len(fit.chunks)], held[len(fit.chunks) :]
        margin[fit.test], probability[fit.test] = fit.scores(own)
        failed += [chunk.unconverged() for chunk in fit.chunks]
        for chunk, part in zip(fit.chunks, own, strict=True):
            start.add(chunk.labels, part.D, part.b)
    return OutOfFold(margin, probability, start.mean())
