"""How are all labels of a logistic head fitted along a path of rates?

Labels known on the same images share rows and coordinates; some hundred of them
at a time move together (:class:`Chunk`) along the whole path. Chunks run side by side.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from heads.dropout import margin_variance, rho_from_dropout
from heads.features import PrincipalAxes
from heads.gaussian import GaussianBatch
from heads.logistic_path import Path, Point
from heads.logistic_rows import Objective, Rows, Space
from heads.losses import LogisticBatch, base_rate_loss
from heads.newton import minimise
from heads.parallel import worker_threads
from heads.rare import label_counts, logistic_rare_bias, trainable
from heads.selection import Start
from heads.training import TrainingSet, label_patterns

_LABELS = (64, 256)  # of one product, at least and at most
_ENTRIES = 1 << 22  # margins of a chunk, of which about ten copies are held


@dataclass(frozen=True)
class Fitted:
    """What a fit says of some labels, W0 and b0 apart.

    Attributes
    ----------
    D : (k, d), b : (k,)
    n_iter : (k,) int
    converged : (k,) bool
    margin, variance : (r, k) or None
        Of the test images, if there are any.
    """

    D: np.ndarray
    b: np.ndarray
    n_iter: np.ndarray
    converged: np.ndarray
    margin: np.ndarray | None = None
    variance: np.ndarray | None = None


class Chunk:
    """Some labels on the same rows."""

    def __init__(self, rows: Rows, labels: np.ndarray) -> None:
        self.rows, self.labels = rows, labels
        rows.users += 1

    def fit(self, rho: np.ndarray, start: Start | None) -> list[Fitted]:
        """Fits at falling rates rho (s, k), each started from those before."""
        course = _Course(self.rows, self.labels)
        fitted = [course.go_on(at, start) for at in rho]
        self.rows.done()
        return fitted


class _Course:
    """A chunk on its way along a path of rates."""

    def __init__(self, rows: Rows, labels: np.ndarray) -> None:
        data = rows.data
        self.rows, self.labels = rows, labels
        positives, total = label_counts(data, rows.images, labels)
        self.rate = positives / total
        self.Y = np.ascontiguousarray(data.row_targets(rows.images, labels).T)
        base = data.row_base(rows.images, labels)
        self.offset = None if base is None else np.ascontiguousarray(base.T)
        self.weight = rows.weight.astype(data.dtype)
        self.tolerance = rows.objective.tol * base_rate_loss(self.Y, self.weight)
        self.space: Space | None = None
        self.path: Path | None = None

    def go_on(self, rho: np.ndarray, start: Start | None) -> Fitted:
        """The fit at rates rho (k,); `start` is where the path begins, if anywhere."""
        rows, place = self.rows, float(rho.max())
        space = rows.space(rho, self.space)
        if self.path is None or space is not self.space or not self.path.follows(place):
            self.path = Path(rows.objective.noise, self._origin(space, start))
        self.space = space
        foretold = self.path.foretell(place)
        solution = minimise(
            self._batch(space, foretold, rho), self.tolerance, rows.objective.max_iter
        )
        reached = Point(place, solution.at_W, solution.at_b, solution.margin)
        self.path.add(reached, solution.n_iter > 1)
        D = space.at.coefficients(solution.W)
        b = solution.b - D @ space.at.mean
        fitted = Fitted(D, b, solution.n_iter, solution.converged)
        if space.held is None or rows.test is None:
            return fitted
        margin = space.held @ solution.W.T + solution.b
        variance = margin_variance(rows.data.view_means(rows.test), D, rho)
        return Fitted(D, b, solution.n_iter, solution.converged, margin, variance)

    def _origin(self, space: Space, start: Start | None) -> Point:
        W = np.zeros((len(self.labels), space.rows.Z.shape[1]), space.rows.Z.dtype)
        b = self._intercepts(space)
        if start is None:
            margin = np.repeat(b[:, None], len(space.rows.Z), axis=1)
            if self.offset is not None:
                margin += self.offset
            return Point(np.inf, W, b, margin)
        D, bias, known = start.mean(self.labels)
        W[known] = space.at.weights(D)[known]
        b[known] = (bias + D @ space.at.mean)[known]
        return Point(0.0, W, b, None)

    def _intercepts(self, space: Space) -> np.ndarray:
        """The best ones without weights, at infinite rho."""
        b = np.log(self.rate / (1 - self.rate)).astype(space.rows.Z.dtype)
        if self.offset is None:
            return b
        none = np.zeros((len(b), 0), b.dtype)
        rows = space.rows.without_features()
        plain = LogisticBatch(rows, self.Y, self.offset, none, 0 * b, none)
        return minimise(plain, self.tolerance, self.rows.objective.max_iter).b

    def _batch(self, space: Space, start: Point, rho: np.ndarray) -> LogisticBatch | GaussianBatch:
        l2 = self.rows.objective.l2
        problem = space.rows, self.Y, self.offset, start.W, start.b
        if space.squares is None:
            penalty = space.penalty(rho * self.rate * (1 - self.rate), l2)
            return LogisticBatch(*problem, penalty, start.margin)
        penalty = space.penalty(np.zeros_like(rho), l2)
        strength = rho.astype(space.rows.Z.dtype)
        return GaussianBatch(*problem, space.squares, strength, penalty, start.margin)


class LogisticFit:
    """All labels to be fitted on some images.

    Parameters
    ----------
    data : TrainingSet
    images : (m,) int
        Training images.
    objective : Objective
    axes : PrincipalAxes
        Of the training set.
    test : (r,) int, optional
        Images that are to be scored.
    """

    def __init__(
        self,
        data: TrainingSet,
        images: np.ndarray,
        objective: Objective,
        axes: PrincipalAxes,
        test: np.ndarray | None = None,
    ) -> None:
        images = images[data.weight[images] > 0]
        trained = trainable(data, images, objective.min_positives)
        self.rare = np.flatnonzero(~trained)
        self.rare_bias = logistic_rare_bias(data, images, self.rare)
        self.chunks = []
        for labels, known in label_patterns(data.known, images, np.flatnonzero(trained)):
            rows = Rows(data, known, objective, axes, test)
            most = int(np.clip(_ENTRIES // (len(known) * data.n_views), *_LABELS))
            # Two at least, so that a fit of all rows keeps two cores busy.
            number = max(-(-len(labels) // most), min(2, len(labels) // _LABELS[0]))
            # Labels that take long and labels that do not are side by side.
            self.chunks += [Chunk(rows, labels[first::number]) for first in range(number)]


def fit_logistic(
    data: TrainingSet,
    objective: Objective,
    dropout: np.ndarray,
    start: Start | None = None,
    axes: PrincipalAxes | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """W, b and the iterations (K,) of a fit on all rows, at one rate or at one a label."""
    rho = np.broadcast_to(rho_from_dropout(dropout), data.n_labels)
    fit = LogisticFit(data, np.arange(data.n_images), objective, axes or PrincipalAxes(data))
    W = np.zeros((data.n_labels, data.n_features), data.dtype)
    b = np.zeros(data.n_labels, data.dtype)
    n_iter = np.ones(data.n_labels, int)
    failed = []
    with worker_threads() as run:
        found = run(lambda chunk: chunk.fit(rho[None, chunk.labels], start)[0], fit.chunks)
        for chunk, fitted in zip(fit.chunks, found, strict=True):
            W[chunk.labels], b[chunk.labels] = fitted.D, fitted.b
            n_iter[chunk.labels] = fitted.n_iter
            failed.append(chunk.labels[~fitted.converged])
    warn_unconverged(failed, objective, stacklevel=5)
    if data.coef_init is not None and data.intercept_init is not None:
        W += data.coef_init
        b += data.intercept_init
    b[fit.rare] = fit.rare_bias
    return W, b, n_iter


def warn_unconverged(
    failed: list[np.ndarray], objective: Objective, stacklevel: int, where: str = ""
) -> None:
    """Warn of labels that have not converged, by name, and of `where`."""
    labels = np.unique(np.concatenate(failed)) if failed else np.empty(0, int)
    if not len(labels):
        return
    named = ", ".join(map(str, labels[:10])) + (", ..." if len(labels) > 10 else "")
    warnings.warn(
        f"{len(labels)} label{'s' if len(labels) > 1 else ''} ({named}) did not converge{where} "
        f"in {objective.max_iter} iterations; raise max_iter or tol, or leave out weak rates",
        ConvergenceWarning,
        stacklevel=stacklevel,
    )
