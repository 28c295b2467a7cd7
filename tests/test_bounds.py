"""What is said of cuts that nobody looks at, against all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heads.blending import Blend
from heads.bounds import SLACK, Bounds, Grid
from heads.decisions import best_global_threshold
from heads.screening import Labels, Truth
from heads.windows import Window, groups_of

SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=40)


def drawn(seed: int, beta: float, n: int = 30, K: int = 40) -> tuple[np.ndarray, np.ndarray, Truth]:
    """Scores of two decimals, so that many are equal; truth with empty images and missed labels."""
    rng = np.random.default_rng(seed)
    Y = rng.random((n, K)) < rng.uniform(0, 0.2, (n, 1))
    scores = np.round(np.clip(0.3 * Y + rng.normal(0.3, 0.15, Y.shape), 0, 1), 2)
    positive = Y.sum(1).astype(float)
    share = rng.random(n)
    truth = Truth(positive, positive + rng.integers(0, 3, n), share / share.sum(), beta)
    return scores.astype(np.float32), Y, truth


def entries(Y: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Order of all entries with true ones first, their images, and how many are true."""
    order = np.argsort(~Y.ravel(), kind="stable")
    return order, order // Y.shape[1], int(Y.sum())


def value(scores: np.ndarray, Y: np.ndarray, truth: Truth, cut: float) -> float:
    """Mean F-beta at one cut."""
    chosen = scores >= cut
    return truth.score((chosen & Y).sum(1), chosen.sum(1))


@SETTINGS
@given(
    seed=st.integers(0, 10**6),
    beta=st.sampled_from([0.3, 0.9, 1.0, 2.0, 4.0]),
    floor=st.sampled_from([-np.inf, 0.1, 0.3]),
    least=st.sampled_from([-np.inf, 0.0, 0.2]),
)
def test_no_cut_is_above_its_bound(seed: int, beta: float, floor: float, least: float) -> None:
    scores, Y, truth = drawn(seed, beta)
    order, image, right = entries(Y)
    bounds = Bounds.alone(scores.ravel()[order], Labels(image, right), floor, truth, 40.0)
    grid = Grid.of(scores.ravel()[order], floor, 40.0)
    cuts = np.unique(scores)
    own = grid.bins[grid.steps(cuts.astype(np.float32))] - 1
    coarse = bounds.inside.copy()
    top = bounds.upper
    assert bounds.sharpen(least) <= top + SLACK
    for cut, j in zip(cuts, own, strict=True):
        reached = value(scores, Y, truth, cut)
        if j < len(coarse):
            assert reached <= coarse[j] + SLACK
            assert reached <= bounds.inside[j] + SLACK
        else:
            assert reached <= bounds.outside + SLACK
    assert max(value(scores, Y, truth, cut) for cut in (*cuts, 2)) <= bounds.upper


@SETTINGS
@given(
    seed=st.integers(0, 10**6),
    beta=st.sampled_from([0.5, 2.0]),
    spread=st.sampled_from([0.0, 0.02, 0.3]),
    below=st.sampled_from([0.0, 0.01, 1.0]),
)
def test_a_window_leaves_out_only_what_is_beaten(
    seed: int, beta: float, spread: float, below: float
) -> None:
    scores, Y, truth = drawn(seed, beta)
    order, image, right = entries(Y)
    total = (3 * scores).ravel()[order]
    rng = np.random.default_rng(seed)
    models = [np.round(0.5 + spread * rng.random(total.shape), 2).astype(np.float32) for _ in "abc"]
    grid = Grid.of(total + models[0], 0.2, 40.0)
    cuts = np.unique(np.concatenate([total + m for m in models]))
    back = np.empty(len(order), np.intp)
    back[order] = np.arange(len(order))
    reached = [
        [value((total + m)[back].reshape(Y.shape), Y, truth, cut) for cut in cuts] for m in models
    ]
    least = np.max(reached) - below
    low, high = np.min(models, axis=0), np.max(models, axis=0)
    window = Window(total, Labels(image, right), low, high, grid, True, least, truth)
    for m, values in zip(models, reached, strict=True):
        bounds = window.bounds(m)
        assert max(values) <= bounds.upper
        assert bounds.sharpen(least) >= min(max(values), least) - SLACK
        best = bounds.best(least)
        if max(values) > max(bounds.outside + SLACK, least):
            assert best is not None
            assert best.score == pytest.approx(max(values), abs=1e-12)
            at_cut = value((total + m)[back].reshape(Y.shape), Y, truth, best.cut)
            assert at_cut == pytest.approx(best.score, abs=1e-12)


def test_models_that_are_alike_are_in_one_group() -> None:
    rng = np.random.default_rng(0)
    families = rng.random((3, 500))
    score = np.concatenate([family + 0.02 * rng.random((30, 500)) for family in families])
    groups = groups_of([score[:, :200], score[:, 200:]])
    assert [len(set(groups[first : first + 30])) for first in (0, 30, 60)] == [1, 1, 1]
    assert len(set(groups)) == 3
    assert groups_of([score[:20]]).tolist() == [0] * 20


@pytest.mark.parametrize("beta", [0.5, 2])
@pytest.mark.parametrize("parts", [1, 2])
def test_many_models_are_selected_as_if_all_were_scored(beta: float, parts: int) -> None:
    """Several groups of models, among them a useless one and one of another scale."""
    rng = np.random.default_rng(7)
    n, K, M = 50, 40, 75
    signal = 3 * rng.normal(size=(n, K)) - 4
    Y = (rng.random((n, K)) < 1 / (1 + np.exp(-signal))).astype(float)
    families = rng.normal(size=(3, n, K))
    margin = signal + families[np.arange(M) % 3] + 0.5 * rng.normal(size=(M, n, K))
    P = (1 / (1 + np.exp(-margin))).astype(np.float32)
    P[5] = 1
    P[6] *= np.float32(0.1)
    rows = np.array_split(np.arange(n), parts)
    domains = np.repeat(np.arange(parts), [len(own) for own in rows])
    blend = Blend(beta=beta, max_steps=10, patience=10).fit(P, Y, domains)
    total = np.zeros((n, K))
    for model, reached in zip(blend.path_["model"], blend.path_["score"], strict=True):
        values = [
            np.mean([best_global_threshold((total + p)[own], Y[own], beta)[1] for own in rows])
            for p in P
        ]
        assert reached == pytest.approx(values[model], abs=1e-12)
        assert model == int(np.argmax(np.array(values) >= max(values) - 1e-12))
        total += P[model]
