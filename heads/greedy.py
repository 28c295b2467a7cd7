"""Which model improves a blend most, again and again?

Caruana, Niculescu-Mizil, Crew, Ksikes (2004), with each candidate at its own best cut.
The result is that of scoring every candidate in full: bounds only tell which need not be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from threadpoolctl import ThreadpoolController

from heads.bounds import SLACK, TIE, Best, Bounds, Grid
from heads.objectives import Objective
from heads.screening import Entries, Labels
from heads.windows import Window, groups_of

_THINNER = 0.5  # scores of candidates are copied where so few of them still matter
_DEEPER = 0.25  # of the floor, by which what is copied reaches deeper, as the floor moves
_TRADE = 0.005  # of F-beta that a candidate may lose on one domain before it is looked at closer
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

    def __init__(self, entries: Entries, groups: np.ndarray) -> None:
        self.entries = entries
        members = [groups == g for g in range(groups.max() + 1)]
        # Least and highest scores of each group.
        self._low = np.stack([entries.score[own].min(axis=0) for own in members])
        self._high = np.stack([entries.score[own].max(axis=0) for own in members])
        self._highest = self._high.max(axis=0)
        self.low, self.high = self._low, self._high
        dtype = np.promote_types(entries.score.dtype, np.float32)
        self.total = np.zeros(len(entries.image), dtype)
        self.floor = dtype.type(0)
        self.size = 0
        # Entries that some candidate may have above its floor, copied whenever they get few.
        self.at: np.ndarray = np.arange(len(entries.image))
        self.score, self.labels = entries.score, entries.labels
        self._memory = np.empty(0, entries.score.dtype)
        self.hint = -np.inf  # floor of a mean that was low enough one step before
        truth = entries.truth
        self.near = 1.5 * float(truth.positive.sum()) + len(truth.true) / 2
        self.prepare()

    def follow(self, model: int, best: Best) -> None:
        """Take one more model, whose best cut is known."""
        bounds = self.bounds(model, whole=False)
        hint = bounds.enough(best.score - _SPARE) / (self.size + 1)
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
        reach, least = self.total + self._highest, lifted.min(initial=np.inf)
        matters = np.count_nonzero(reach > least)
        if matters != np.count_nonzero(reach[self.at] > least) or matters < _THINNER * len(self.at):
            at = np.flatnonzero(reach > (least - _DEEPER * abs(least)))
            # In the order of the sum, so that those about a cut are beside each other.
            at = at[np.lexsort((self.total[at], at >= self.entries.right))]
            self.score, self.at = self._copied(at), at
            right = int(np.count_nonzero(at < self.entries.right))
            self.labels = Labels(self.entries.image[at], right)
            self.low, self.high = self._low[:, at], self._high[:, at]
        self.some = self.total[self.at]

    def _copied(self, at: np.ndarray) -> np.ndarray:
        """Scores (M, e) of some entries, in memory that is used again: new pages are slow."""
        score = self.entries.score
        size = len(score) * len(at)
        if self._memory.size < size:
            self._memory = np.empty(size, score.dtype)
        out = self._memory[:size].reshape(len(score), len(at))
        # Any other mode would copy twice.
        return score.take(at, axis=1, out=out, mode="clip")

    def bounds(self, model: int, whole: bool) -> Bounds:
        """Of the candidate with one more model; `whole`: as far down as is known."""
        if whole:
            score, labels = self.total + self.entries.score[model], self.entries.labels
            floor = self.floors[model]
        else:
            score, labels, floor = self.some + self.score[model], self.labels, self.lifted[model]
        return Bounds.alone(score, labels, floor, self.entries.truth, self.near)

    def window(self, group: int, members: np.ndarray, like: int, least: float) -> Window:
        """Of the candidates with one more of some members of a group; bins are those of `like`."""
        floor = self.lifted[members].max()
        grid = Grid.of(self.some + self.score[like], floor, self.near)
        return Window(
            self.some,
            self.labels,
            self.low[group],
            self.high[group],
            grid,
            bool(np.isfinite(floor)),
            least,
            self.entries.truth,
        )


@dataclass
class _Leader:
    """The best candidate of a step so far; equally good ones: the first of them."""

    model: int = -1
    value: float = -np.inf
    best: list[Best] = field(default_factory=list)

    def challenge(self, model: int, value: float, best: list[Best]) -> None:
        tied = abs(value - self.value) <= TIE and model < self.model
        if value > self.value + TIE or tied:
            self.model, self.value, self.best = model, value, best


def select(
    domains: Sequence[Entries],
    objective: Objective,
    max_steps: int,
    patience: int,
    start: Sequence[int] = (),
) -> Path:
    """Add models until `patience` additions in a row gave nothing better.

    Parameters
    ----------
    start : sequence of int
        Models that are in the blend from the start.

    Raises
    ------
    TooShallow
        If screening left out too much to be sure of the result.
    """
    groups = groups_of([entries.score for entries in domains])
    sums = [_Sum(entries, groups) for entries in domains]
    M = len(domains[0].score)
    order = np.arange(M)
    models: list[int] = []
    values: list[float] = []
    scores: list[list[float]] = []
    with ThreadpoolController().limit(limits=1, user_api="blas"):  # products are too small
        while len(models) < max_steps:
            step = len(models)
            forced = np.array(start[step : step + 1], dtype=np.intp)
            leader, hopes = _addition(sums, groups, forced if len(forced) else order, objective)
            if leader.model < 0:
                break  # nothing may be added
            models.append(leader.model)
            values.append(leader.value)
            scores.append([best.score for best in leader.best])
            order = np.argsort(-hopes, kind="stable")  # the best of this step come first next
            for total, best in zip(sums, leader.best, strict=True):
                total.follow(leader.model, best)
            waited = step - int(np.argmax(values))
            if M == 1 or (waited >= patience and len(models) >= len(start)):
                break
    return Path(np.array(models, dtype=np.intp), np.array(values), np.array(scores))


def _addition(
    sums: list[_Sum], groups: np.ndarray, order: np.ndarray, objective: Objective
) -> tuple[_Leader, np.ndarray]:
    """The best of some candidates, and what each of all models (M,) is worth at most."""
    leader = _Leader()
    hopes = np.full(len(groups), -np.inf)
    first = int(order[0])
    hopes[first] = _challenge(sums, first, objective, leader, [])
    for group in dict.fromkeys(groups[order].tolist()):
        members = order[(groups[order] == group) & (order != first)]
        windows = _windows(sums, group, members, objective, leader) if len(members) else []
        for model in members.tolist():
            hopes[model] = _challenge(sums, model, objective, leader, windows)
    return leader, hopes


def _windows(
    sums: list[_Sum], group: int, members: np.ndarray, objective: Objective, leader: _Leader
) -> list[Window]:
    """Of each domain, the cuts at which some members may help to beat the leader."""
    if leader.model < 0:
        return []
    scores = np.array([best.score for best in leader.best])
    windows = []
    for d, total in enumerate(sums):
        least = objective.least(d, scores, leader.value) - SLACK
        if len(sums) > 1:  # what a candidate loses here it may gain elsewhere
            least -= _TRADE
        windows.append(total.window(group, members, leader.model, least))
    return windows


def _challenge(
    sums: list[_Sum],
    model: int,
    objective: Objective,
    leader: _Leader,
    windows: list[Window],
) -> float:
    """Score a candidate as far as it can beat the leader; return what it is worth at most."""
    for look in range(0 if windows else 1, 3):
        if look == 0:
            pairs = zip(windows, sums, strict=True)
            bounds = [window.bounds(total.score[model]) for window, total in pairs]
        else:
            bounds = [total.bounds(model, whole=look == 2) for total in sums]
        upper = np.array([b.upper for b in bounds])
        for d, bound in enumerate(bounds):
            least = objective.least(d, upper, leader.value) - SLACK
            if upper[d] >= least:
                upper[d] = bound.sharpen(least)
            if upper[d] < least:
                return objective.value(upper)
        found: list[Best] = []
        for d, bound in enumerate(bounds):
            least = objective.least(d, upper, leader.value) - SLACK
            best = bound.best(least)
            score = -np.inf if best is None else best.score
            if bound.outside + SLACK > max(score, least):
                if sums[d].size or look < 2:
                    break  # it is not certain that this is the best cut
                # A model alone may have nothing but equal scores below its floor.
                cut, score = sums[d].entries.single(model)
                best = Best(score, len(sums[d].entries.truth.true), cut)
            if best is None:
                return objective.value(upper)
            upper[d] = score
            found.append(best)
        else:
            value = objective.value(upper)
            leader.challenge(model, value, found)
            return value
    raise TooShallow
