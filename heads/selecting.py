"""How are a blend's weights and its cut chosen, once it is known which scores can matter?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from heads.bounds import Best, Bounds
from heads.greedy import Path, select
from heads.metrics import fbeta
from heads.objectives import Constrained, Objective, WeightedSum
from heads.screening import Entries, Truth
from heads.simplex import simplex_weights


@dataclass(frozen=True)
class Rule:
    """How weights are chosen.

    Attributes
    ----------
    method : "greedy", "simplex" or "uniform"
    logits : bool
        Whether the scores are logits.
    loss : "log" or "squared"
    max_steps, patience, start : int
        Of the greedy method.
    domain_weights : (D,) array
        They add up to 1.
    max_source_loss : float or None
        The first domain alone decides, where the others lose no more than that.
    """

    method: str
    logits: bool
    loss: str
    max_steps: int
    patience: int
    start: int
    domain_weights: np.ndarray
    max_source_loss: float | None


@dataclass(frozen=True)
class Choice:
    """Weights (M,) and how the greedy method has come to them.

    Attributes
    ----------
    weights : (M,) array
    path : Path or None
        Of the greedy method.
    steps : int
        Steps of the path that the weights are made of.
    held_out : (S,) array or None
        Score of images that were left out of the choice, after each step of the path.
    """

    weights: np.ndarray
    path: Path | None = None
    steps: int = 0
    held_out: np.ndarray | None = None


def choose(
    domains: Sequence[Entries], rule: Rule, parts: Sequence[np.ndarray] | None = None
) -> Choice:
    """Choose weights on the entries of some images of each domain.

    Parameters
    ----------
    parts : for each domain (n,), optional
        Part of each image. The greedy method then stops where it was best, on average over
        the parts, for images of a part when it was repeated on those of the others.

    Raises
    ------
    TooShallow
        If screening left out too much to be sure of the result.
    """
    M = len(domains[0].score)
    if rule.method == "uniform":
        return Choice(np.full(M, 1 / M))
    if rule.method == "simplex":
        return Choice(simplex_weights(domains, rule.domain_weights, rule.loss, rule.logits))
    path = _path(domains, rule)
    steps, held_out = path.best, None
    if parts is not None:
        held_out = _held_out(domains, parts, rule)[: len(path.model)]
        steps = int(np.argmax(held_out)) + 1
    counts = np.bincount(path.model[:steps], minlength=M)
    return Choice(counts / counts.sum(), path, steps, held_out)


def _path(domains: Sequence[Entries], rule: Rule) -> Path:
    objective = _objective(domains, rule)
    start = _sorted_start(domains, objective, rule.start) if rule.start > 1 else []
    path = select(domains, objective, rule.max_steps, rule.patience, start)
    if not len(path.model):
        raise ValueError(
            f"no model is within max_source_loss={rule.max_source_loss} of the best one on all "
            "domains but the first; allow more"
        )
    return path


def _held_out(domains: Sequence[Entries], parts: Sequence[np.ndarray], rule: Rule) -> np.ndarray:
    """(max_steps,) score of all images after each step, when their part did not choose."""
    whole, place = merged(domains, rule.domain_weights), np.concatenate(parts)
    values = np.zeros(rule.max_steps)
    for part in np.unique(place):
        left_out = np.flatnonzero(place == part)
        chosen = without(domains, [np.flatnonzero(own != part) for own in parts])
        seen, unseen = merged(chosen, rule.domain_weights), whole.of_images(left_out)
        models = _path(chosen, rule).model
        found = np.zeros(len(models))
        for step in range(len(models)):
            counts = np.bincount(models[: step + 1], minlength=len(seen.score))
            weights = counts / counts.sum()
            found[step] = whole.truth.share[left_out] @ scored(
                unseen, weights, best_cut(seen, weights).cut
            )
        values += np.append(found, np.full(rule.max_steps - len(found), found[-1]))
    return values


def without(domains: Sequence[Entries], rows: Sequence[np.ndarray]) -> list[Entries]:
    """Entries of some images of each domain.

    Raises
    ------
    ValueError
        If there are none of a domain.
    """
    for at in rows:
        if not len(at):
            raise ValueError("a fold of cv or stop_cv chooses on no image of one of the domains")
    return [entries.of_images(at) for entries, at in zip(domains, rows, strict=True)]


def _objective(domains: Sequence[Entries], rule: Rule) -> Objective:
    if rule.max_source_loss is None:
        return WeightedSum(rule.domain_weights)
    floors = np.full(len(domains), -np.inf)
    for d in range(1, len(domains)):  # what the best model has there
        single = select([domains[d]], WeightedSum(np.ones(1)), 1, 1)
        floors[d] = single.value[0] - rule.max_source_loss
    return Constrained(0, floors)


def single_scores(domains: Sequence[Entries]) -> np.ndarray:
    """(M, D) mean F-beta of every model alone, at its best cut of those above its floor."""
    M = len(domains[0].score)
    return np.array(
        [[best_cut(entries, np.eye(M)[m]).score for entries in domains] for m in range(M)]
    )


def _sorted_start(domains: Sequence[Entries], objective: Objective, most: int) -> list[int]:
    """The best models, as many of them (at most `most`) as make the best mean."""
    value = np.array([objective.value(scores) for scores in single_scores(domains)])
    order = np.argsort(-value, kind="stable")[:most]
    values = []
    for size in range(1, len(order) + 1):
        weights = np.bincount(order[:size], minlength=len(value)) / size
        scores = np.array([best_cut(entries, weights).score for entries in domains])
        values.append(objective.value(scores))
    return order[: int(np.argmax(values)) + 1].tolist()


# ------------------------------------------------------------------------ the cut


def averaged(entries: Entries, weights: np.ndarray) -> np.ndarray:
    """(E,) weighted mean of the models' scores."""
    used = np.flatnonzero(weights)
    total = np.zeros(len(entries.image), np.promote_types(entries.score.dtype, np.float32))
    for m in used:
        total += total.dtype.type(weights[m]) * entries.score[m]
    return total


def best_cut(entries: Entries, weights: np.ndarray) -> Best:
    """The best cut of a weighted mean among those above its floor."""
    used = np.flatnonzero(weights)
    floor = float(weights[used] @ entries.floor[used])
    truth = entries.truth
    near = 1.5 * float(truth.positive.sum()) + len(truth.true) / 2
    bounds = Bounds.alone(averaged(entries, weights), entries.labels, floor, truth, near)
    bounds.sharpen(-np.inf)
    found = bounds.best(-np.inf)
    assert found is not None
    return found


def scored(entries: Entries, weights: np.ndarray, cut: float) -> np.ndarray:
    """F-beta of each image at a cut above the floor."""
    passed = np.flatnonzero(averaged(entries, weights) >= cut)
    n, truth = len(entries.truth.true), entries.truth
    right = np.bincount(entries.image[passed[passed < entries.right]], minlength=n)
    predicted = np.bincount(entries.image[passed], minlength=n)
    return fbeta(right, truth.true, predicted, truth.beta)


def _none(model: int, some: np.ndarray) -> tuple[float, float]:
    # Entries of several domains together are only averaged; nobody asks for a model alone.
    raise NotImplementedError("models are selected on domains apart")


def merged(domains: Sequence[Entries], weights: np.ndarray) -> Entries:
    """All domains as one, each counting as its weight says."""
    if len(domains) == 1:
        return domains[0]
    truths = [e.truth for e in domains]
    first = np.cumsum([0, *(len(truth.true) for truth in truths)])
    true, false = (
        [(entries, at(entries), start) for entries, start in zip(domains, first, strict=False)]
        for at in (lambda e: slice(0, e.right), lambda e: slice(e.right, None))
    )
    parts = true + false
    return Entries(
        score=np.concatenate([entries.score[:, at] for entries, at, _ in parts], axis=1),
        image=np.concatenate([entries.image[at] + start for entries, at, start in parts]),
        right=sum(e.right for e in domains),
        floor=np.max([e.floor for e in domains], axis=0),
        truth=Truth(
            np.concatenate([t.positive for t in truths]),
            np.concatenate([t.true for t in truths]),
            np.concatenate([w * t.share for w, t in zip(weights, truths, strict=True)]),
            truths[0].beta,
        ),
        alone=_none,
    )
