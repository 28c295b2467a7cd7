"""Which model improves a blend most, again and again?

Caruana, Niculescu-Mizil, Crew, Ksikes (2004), with each candidate at its own best cut.
The result is that of scoring every candidate in full: bounds only tell which need not be.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

from heads.bounds import SLACK, TIE, Best, Bounds
from heads.objectives import Objective
from heads.parallel import Map
from heads.screening import Entries

_THINNER = 0.8  # scores of candidates are copied where so few of them still matter
_SPARE = 0.01  # of F-beta, by which the hint of a floor is more careful than needed


class TooShallow(Exception):
    """Entries that were left out by screening may hold a better cut."""


@dataclass(frozen=True)
class Path:
    """Steps of the greedy method.

    Attributes
    ----------
    model : (S,) int array
        Which model was added.
    value : (S,) array
        Of the objective after it.
    score : (S, D) array
        Mean F-beta of each domain at its own best cut.
    """

    model: np.ndarray
    value: np.ndarray
    score: np.ndarray

    @property
    def best(self) -> int:
        """Number of steps up to the first of the highest value."""
        return int(np.argmax(self.value)) + 1


class _Sum:
    """Sum of the models chosen so far on one domain."""

    def __init__(self, entries: Entries) -> None:
        self.entries = entries
        self.high = entries.score.max(axis=0, initial=-np.inf)
        dtype = np.promote_types(entries.score.dtype, np.float32)
        self.total = np.zeros(len(entries.image), dtype)
        self.floor = dtype.type(0)
        self.size = 0
        # Entries that some candidate may have above its floor, copied whenever they get few.
        self.at: np.ndarray = np.arange(len(entries.image))
        self.score, self.image, self.right = entries.score, entries.image, entries.right
        self.hint = -np.inf  # floor of a mean that was low enough one step before
        truth = entries.truth
        self.near = 1.5 * float(truth.positive.sum()) + len(truth.true) / 2
        self.prepare()

    def follow(self, model: int, best: Best) -> None:
        """Take one more model, whose best cut is known."""
        hint = self.bounds(model, whole=False).enough(best.score - _SPARE) / (self.size + 1)
        self.total += self.entries.score[model]
        self.floor += self.entries.floor[model]
        self.size += 1
        self.hint, self.near = hint, max(best.passed, len(self.entries.truth.true))
        self.prepare()

    def prepare(self) -> None:
        """Find what candidates of the next step have in common: entries above their floors."""
        floors = self.floor + self.entries.floor.astype(self.total.dtype)
        lifted = np.maximum(floors, self.total.dtype.type((self.size + 1) * self.hint))
        self.lifted, self.floors = lifted, floors
        matters = self.total + self.high > lifted.min(initial=np.inf)
        at = np.flatnonzero(matters)
        known = np.count_nonzero(matters[self.at]) == len(at)
        if not known or len(at) < _THINNER * len(self.at):
            self.score = self.entries.score.take(at, axis=1)
            self.at, self.image = at, self.entries.image[at]
            self.right = int(np.searchsorted(at, self.entries.right))
        self.some = self.total[self.at]

    def bounds(self, model: int, whole: bool) -> Bounds:
        """Of the candidate with one more model; `whole`: as far down as is known."""
        entries = self.entries
        if whole:
            score = self.total + entries.score[model]
            image, right, floor = entries.image, entries.right, self.floors[model]
        else:
            score = self.some + self.score[model]
            image, right, floor = self.image, self.right, self.lifted[model]
        above = score > floor
        if np.count_nonzero(above) < _THINNER * len(above):
            at = np.flatnonzero(above)
            score, image, right = score[at], image[at], int(np.searchsorted(at, right))
        return Bounds(score, image, right, floor, entries.truth, self.near)


@dataclass
class _Leader:
    """The best candidate of a step so far; equally good ones: the first of them."""

    model: int = -1
    value: float = -np.inf
    best: list[Best] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def challenge(self, model: int, value: float, best: list[Best]) -> None:
        with self.lock:
            tied = abs(value - self.value) <= TIE and model < self.model
            if value > self.value + TIE or tied:
                self.model, self.value, self.best = model, value, best


def select(
    domains: Sequence[Entries],
    objective: Objective,
    max_steps: int,
    patience: int,
    run: Map,
    start: Sequence[int] = (),
) -> Path:
    """Add models until `patience` additions in a row gave nothing better.

    Parameters
    ----------
    start : sequence of int
        Models that are in the blend from the start.
    run : callable
        The map of :func:`heads.parallel.worker_threads`.

    Raises
    ------
    TooShallow
        If screening left out too much to be sure of the result.
    """
    sums = [_Sum(entries) for entries in domains]
    M = len(domains[0].score)
    order = np.arange(M)
    models: list[int] = []
    values: list[float] = []
    scores: list[list[float]] = []
    while len(models) < max_steps:
        step = len(models)
        leader = _Leader()
        forced = start[step : step + 1]
        hopes = np.full(M, -np.inf)
        candidates: Iterable[int] = forced or order.tolist()

        def evaluate(model: int, leader: _Leader = leader, hopes: np.ndarray = hopes) -> None:
            hopes[model] = _challenge(sums, model, objective, leader)

        for _ in run(evaluate, candidates):
            pass
        if leader.model < 0:
            break  # nothing may be added
        models.append(leader.model)
        values.append(leader.value)
        scores.append([best.score for best in leader.best])
        order = np.argsort(-hopes, kind="stable")  # the best of this step come first in the next
        for total, best in zip(sums, leader.best, strict=True):
            total.follow(leader.model, best)
        waited = step - int(np.argmax(values))
        if M == 1 or (waited >= patience and len(models) >= len(start)):
            break
    return Path(np.array(models, dtype=np.intp), np.array(values), np.array(scores))


def _challenge(sums: list[_Sum], model: int, objective: Objective, leader: _Leader) -> float:
    """Score a candidate as far as it can beat the leader; return what it is worth at most."""
    for whole in (False, True):
        bounds = [total.bounds(model, whole) for total in sums]
        upper = np.array([b.upper for b in bounds])
        found: list[Best] = []
        certain = True
        for d, bound in enumerate(bounds):
            least = objective.least(d, upper, leader.value) - SLACK
            if upper[d] < least:
                return objective.value(upper)
            best = bound.best(least)
            score = -np.inf if best is None else best.score
            if bound.below + SLACK > max(score, least):
                certain = False
                break
            if best is None:
                return objective.value(upper)
            upper[d] = score
            found.append(best)
        if certain:
            value = objective.value(upper)
            leader.challenge(model, value, found)
            return value
    raise TooShallow
