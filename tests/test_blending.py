"""The blend against selectors that try everything, and against grids of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.special import expit, logit
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from heads.blending import Blend
from heads.decisions import GlobalThreshold, best_global_threshold
from heads.folds import MultilabelGroupKFold
from heads.metrics import fbeta_per_image, mean_fbeta
from heads.stacks import Chained

SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=60)
METHODS = ("greedy", "simplex", "uniform")
AVERAGES = ("probability", "logit")


def models(
    seed: int, noise: tuple[float, ...] = (1.0, 1.5, 2.0), n: int = 60, K: int = 5
) -> tuple[list[np.ndarray], np.ndarray]:
    """Probabilities of a model for each strength of noise, and the truth they are about."""
    rng = np.random.default_rng(seed)
    Y = (rng.random((n, K)) < 0.3).astype(float)
    return [expit(3 * Y - 2 + s * rng.normal(size=Y.shape)) for s in noise], Y


def averaged(P: list[np.ndarray], weights: np.ndarray, average: str) -> np.ndarray:
    """The blend from its definition."""
    if average == "probability":
        return sum(w * p for w, p in zip(weights, P, strict=True))
    return expit(sum(w * logit(p) for w, p in zip(weights, P, strict=True)))


def best_cut(
    P: np.ndarray,
    Y: np.ndarray,
    mask: np.ndarray | None = None,
    missed: np.ndarray | float = 0,
    beta: float = 2,
) -> float:
    """The best mean F-beta over all thresholds, each tried on its own."""
    known = np.ones(Y.shape, bool) if mask is None else ~mask
    best = 0.0
    for threshold in (np.inf, *np.unique(P)):
        chosen = (threshold <= P) & known
        right = (chosen & (Y == 1)).sum(1)
        below = beta**2 * ((Y * known).sum(1) + missed) + chosen.sum(1)
        values = np.where(below > 0, (1 + beta**2) * right / np.maximum(below, 1e-300), 1)
        best = max(best, float(values.mean()))
    return best


def log_loss(P: np.ndarray, Y: np.ndarray) -> float:
    P = np.clip(np.asarray(P, float), 1e-6, 1 - 1e-6)
    return -float(np.mean(np.where(Y > 0, np.log(P), np.log(1 - P))))


# ------------------------------------------------------------------- greedy


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_every_step_adds_the_model_that_helps_most(seed: int, partly: bool, average: str) -> None:
    P, Y = models(seed, (1.3, 1.5, 1.7, 2.0), n=40, K=4)
    rng = np.random.default_rng(50 + seed)
    mask = rng.random(Y.shape) < 0.2 if partly else None
    missed = rng.integers(0, 2, len(Y)) if partly else np.zeros(len(Y))
    blend = Blend(average=average, max_steps=8, patience=4)
    blend.fit(P, Y, mask=mask, missed=missed if partly else None)

    def value(chosen: list[int]) -> float:
        weights = np.bincount(chosen, minlength=len(P)) / len(chosen)
        return best_cut(averaged(P, weights, average), Y, mask, missed)

    steps, reached = blend.path_["model"].tolist(), blend.path_["score"]
    for step, model in enumerate(steps):
        candidates = [value([*steps[:step], m]) for m in range(len(P))]
        assert reached[step] == pytest.approx(candidates[model], abs=1e-12)
        assert candidates[model] >= max(candidates) - 1e-12
    best = int(np.argmax(reached)) + 1
    np.testing.assert_array_equal(
        blend.weights_, np.bincount(steps[:best], minlength=len(P)) / best
    )
    assert blend.score_ == pytest.approx(max(reached), abs=1e-12)
    # It goes on until it has found nothing better for `patience` steps.
    assert len(steps) == min(8, best + 4)


def test_the_order_of_models_does_not_matter() -> None:
    P, Y = models(0, (1.0, 1.4, 1.6, 2.0), n=150)
    order = np.array([2, 0, 3, 1])
    for method in METHODS:
        one = Blend(method=method).fit(P, Y)
        other = Blend(method=method).fit([P[m] for m in order], Y)
        assert other.score_ == pytest.approx(one.score_, abs=1e-9)
        np.testing.assert_allclose(other.weights_, one.weights_[order], atol=1e-6)


@pytest.mark.parametrize("method", ["greedy", "simplex"])
def test_a_model_given_twice_changes_nothing(method: str) -> None:
    P, Y = models(1, n=150)
    once = Blend(method=method).fit(P, Y)
    twice = Blend(method=method).fit([*P, P[0]], Y)
    assert twice.score_ == pytest.approx(once.score_, abs=2e-3)
    folded = twice.weights_[:3].copy()
    folded[0] += twice.weights_[3]
    np.testing.assert_allclose(folded, once.weights_, atol=1e-9 if method == "greedy" else 1e-2)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("method", ["greedy", "simplex"])
def test_a_useless_model_does_no_harm(method: str, average: str) -> None:
    P, Y = models(2, n=400)
    guesses = np.random.default_rng(9).random(Y.shape)
    train, test = slice(0, 200), slice(200, 400)
    without = Blend(method=method, average=average).fit([p[train] for p in P], Y[train])
    with_it = Blend(method=method, average=average).fit([p[train] for p in [guesses, *P]], Y[train])
    assert with_it.weights_[0] < 0.1
    unseen = mean_fbeta(Y[test], without.predict([p[test] for p in P]))
    assert mean_fbeta(Y[test], with_it.predict([p[test] for p in [guesses, *P]])) > unseen - 0.01


def test_a_blend_beats_its_models() -> None:
    P, Y = models(3, (1.5, 1.5, 1.5), n=300)
    single = max(best_cut(p, Y) for p in P)
    for method in METHODS:
        assert Blend(method=method).fit(P, Y).score_ > single + 0.03


# ------------------------------------------------------------------ simplex


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("likeness", [1.0, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("seed", range(4))
def test_of_two_models_simplex_finds_the_bottom_of_a_grid(
    seed: int, likeness: float, average: str
) -> None:
    # Models that are nearly one, too: what they have in common hides what to do.
    rng = np.random.default_rng(seed)
    Y = (rng.random((100, 6)) < 0.2).astype(float)
    common = 2 * rng.normal(size=Y.shape) + 3 * Y - 2
    P = [expit(common + likeness * s * rng.normal(size=Y.shape)) for s in (1.0, 1.5)]
    blend = Blend(method="simplex", average=average).fit(P, Y)
    grid = [log_loss(averaged(P, np.array([w, 1 - w]), average), Y) for w in np.linspace(0, 1, 201)]
    assert log_loss(averaged(P, blend.weights_, average), Y) <= min(grid) * (1 + 2e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_simplex_is_no_worse_than_the_mean_and_the_best_model(dtype: type) -> None:
    for seed, noise in enumerate([(0.5, 2.0, 3.0), (1.0, 1.0, 1.1), (0.2, 4.0, 4.0)]):
        P, Y = models(seed, noise, n=100)
        P = [p.astype(dtype) for p in P]
        for average in AVERAGES:
            blend = Blend(method="simplex", average=average).fit(P, Y)
            loss = log_loss(blend.predict_proba(P), Y)
            uniform = Blend(method="uniform", average=average).fit(P, Y)
            assert loss <= log_loss(uniform.predict_proba(P), Y) + 1e-5
            assert loss <= min(log_loss(p, Y) for p in P) + 1e-5


def test_simplex_stands_still_where_no_exchange_helps() -> None:
    P, Y = models(4, (1.0, 1.2, 1.5, 3.0), n=200)
    weights = Blend(method="simplex").fit(P, Y).weights_
    loss = log_loss(averaged(P, weights, "probability"), Y)
    for gives in np.flatnonzero(weights > 0.02):
        for takes in range(4):
            moved = weights.copy()
            moved[gives] -= 0.02
            moved[takes] += 0.02
            assert log_loss(averaged(P, moved, "probability"), Y) >= loss - 1e-9


def test_unknown_entries_do_not_move_simplex() -> None:
    P, Y = models(5)
    rng = np.random.default_rng(0)
    mask = rng.random(Y.shape) < 0.4
    noisy = [np.where(mask, rng.random(Y.shape), p) for p in P]
    one = Blend(method="simplex").fit(P, Y, mask=mask)
    other = Blend(method="simplex").fit(noisy, np.where(mask, 1 - Y, Y), mask=csr_matrix(mask))
    np.testing.assert_allclose(other.weights_, one.weights_, atol=1e-9)
    assert other.score_ == one.score_
    missing = Blend(method="simplex").fit(P, np.where(mask, np.nan, Y))
    np.testing.assert_array_equal(missing.weights_, one.weights_)


# -------------------------------------------------------------- all methods


@SETTINGS
@given(
    seed=st.integers(0, 10**6),
    M=st.integers(1, 5),
    method=st.sampled_from(METHODS),
    average=st.sampled_from(AVERAGES),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    certain=st.booleans(),
)
def test_weights_threshold_and_score_belong_together(
    seed: int, M: int, method: str, average: str, dtype: type, certain: bool
) -> None:
    P, Y = models(seed, tuple(np.linspace(0.5, 2, M)), n=12, K=4)
    rng = np.random.default_rng(seed)
    if certain:  # zeros and ones, of which a logit would be infinite
        P = [np.where(rng.random(p.shape) < 0.3, np.round(p), p) for p in P]
    P = [p.astype(dtype) for p in P]
    mask = rng.random(Y.shape) < 0.2
    missed = rng.integers(0, 3, len(Y))
    blend = Blend(method=method, average=average, max_steps=6).fit(P, Y, mask=mask, missed=missed)
    assert blend.weights_.shape == (M,)
    assert np.all(blend.weights_ >= 0)
    assert blend.weights_.sum() == pytest.approx(1, abs=1e-12)
    proba = blend.predict_proba(P)
    assert np.all((proba >= 0) & (proba <= 1))
    chosen = blend.predict(P)
    assert chosen.dtype == bool
    np.testing.assert_array_equal(chosen.toarray(), proba >= blend.threshold_)
    assert mean_fbeta(Y, chosen, mask=mask, missed=missed) == pytest.approx(blend.score_, abs=1e-12)
    assert blend.score_ == pytest.approx(best_cut(proba, Y, mask, missed), abs=1e-12)


def test_rounded_weights_never_leave_the_probabilities() -> None:
    ones = np.ones((4, 2), np.float32)
    for M in (3, 6, 7, 11):
        blend = Blend(method="uniform").fit([ones] * M, ones)
        np.testing.assert_array_equal(blend.predict_proba([ones] * M), ones)


def test_uniform_is_the_mean() -> None:
    P, Y = models(6)
    blend = Blend(method="uniform").fit(np.array(P), Y)
    np.testing.assert_array_equal(blend.weights_, [1 / 3] * 3)
    np.testing.assert_allclose(blend.predict_proba(np.array(P)), np.mean(P, axis=0), rtol=1e-12)


def test_logits_average_to_known_probabilities() -> None:
    P = np.array([[[0.2, 0.5]], [[0.8, 0.9]]])
    blend = Blend(method="uniform", average="logit").fit(P, np.array([[0, 1]]))
    # Odds 1/4 and 4 have the geometric mean 1, odds 1 and 9 have 3.
    np.testing.assert_allclose(blend.predict_proba(P), [[0.5, 0.75]], rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("average", AVERAGES)
def test_one_model_keeps_its_probabilities_and_its_cut(method: str, average: str) -> None:
    P, Y = models(7)
    blend = Blend(method=method, average=average).fit(P[:1], Y)
    rule = GlobalThreshold().fit(P[0], Y)
    np.testing.assert_array_equal(blend.weights_, [1.0])
    np.testing.assert_allclose(blend.predict_proba(P[:1]), P[0], rtol=1e-12)
    assert blend.score_ == rule.score_
    np.testing.assert_array_equal(blend.predict(P[:1]).toarray(), rule.predict(P[0]).toarray())


def test_what_is_given_stays_as_it_was() -> None:
    P, Y = models(8)
    before = [p.copy() for p in P]
    for method in METHODS:
        blend = Blend(method=method).fit(P, csr_matrix(Y))
        blend.predict_proba(P)
    np.testing.assert_array_equal(P, before)


def test_clone_forgets_what_was_fitted() -> None:
    P, Y = models(9)
    params: dict[str, Any] = {
        "beta": 1,
        "method": "simplex",
        "average": "logit",
        "max_steps": 7,
        "patience": 3,
    }
    blend = Blend(**params).fit(P, Y)
    copy = clone(blend)
    assert copy.get_params() == blend.get_params()
    assert params.items() <= copy.get_params().items()
    with pytest.raises(NotFittedError):
        copy.predict_proba(P)
    assert copy.fit(P, Y).score_ == blend.score_


def test_beta_decides_what_the_cut_favours() -> None:
    P, Y = models(10, (1.5, 1.6))
    careful = Blend(beta=0.3).fit(P, Y).predict(P).sum()
    assert careful < Blend(beta=4).fit(P, Y).predict(P).sum()


# ------------------------------------------------------------------- faults


def test_a_score_that_is_no_number_is_named() -> None:
    P, Y = models(11)
    P[1][3, 2] = np.nan
    with pytest.raises(ValueError, match=r"P\[1\] is nan at row 3, label 2"):
        Blend().fit(P, Y)
    P[1][3, 2] = 1.5
    with pytest.raises(ValueError, match=r"P\[1\] reaches .* 1\.5; give probabilities"):
        Blend().fit(P, Y)


@pytest.mark.parametrize(
    ("options", "P", "message"),
    [
        ({"method": "best"}, np.full((2, 3, 2), 0.5), "method is 'best'; expected greedy"),
        ({"average": "rank"}, np.full((2, 3, 2), 0.5), "average is 'rank'; expected probability"),
        ({}, [], "P holds no models"),
        ({}, [np.full((3, 2), 0.5), np.full((3, 1), 0.5)], r"P\[1\] has shape \(3, 1\)"),
        ({}, np.full((2, 4, 2), 0.5), r"Y has shape \(3, 2\)"),
        ({"beta": 0}, np.full((2, 3, 2), 0.5), "beta is 0"),
    ],
)
def test_wrong_use_is_refused(options: dict[str, Any], P: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Blend(**options).fit(P, np.eye(3)[:, :2])


def test_other_models_than_fitted_are_refused() -> None:
    P, Y = models(12)
    blend = Blend().fit(P, Y)
    with pytest.raises(ValueError, match="P has 2 models, the blend was fitted on 3"):
        blend.predict(P[:2])
    with pytest.raises(ValueError, match="P has 4 labels"):
        blend.predict([p[:, :4] for p in P])


@pytest.mark.parametrize("method", ["greedy", "simplex", "uniform"])
def test_every_domain_counts_alike_whatever_its_rows(method: str) -> None:
    """Rows of one domain twice over change nothing, while without domains they do."""
    rng = np.random.default_rng(5)
    Y = (rng.random((60, 6)) < 0.3).astype(float)
    noise = np.where(np.arange(60) < 40, 0.8, 1.5)[:, None]  # models differ between domains
    P = [expit(3 * Y - 1.5 + noise * (m + 1) ** 0.5 * rng.normal(size=Y.shape)) for m in range(3)]
    domains = np.repeat(["home", "away"], [40, 20])
    twice = np.r_[np.arange(60), np.arange(40)]
    one = Blend(method=method).fit(P, Y, domains)
    other = Blend(method=method).fit([p[twice] for p in P], Y[twice], domains[twice])
    np.testing.assert_allclose(one.weights_, other.weights_, atol=1e-4)
    assert one.score_ == pytest.approx(other.score_, abs=1e-9)
    pooled = Blend(method=method).fit(P, Y)
    assert pooled.score_ != pytest.approx(one.score_, abs=1e-6)


def test_domains_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="domains has length 2, but the models score 3 rows"):
        Blend().fit([np.full((3, 2), 0.5)], np.zeros((3, 2)), domains=["a", "b"])


# ------------------------------------------- against a selector that scores everything


def naive(
    parts: list[tuple[np.ndarray, np.ndarray]], steps: int, weights: list[float]
) -> tuple[list[int], list[list[float]]]:
    """Models that are added, and the score of each domain, by `best_global_threshold` alone."""
    totals = [np.zeros(P.shape[1:], np.float64) for P, _ in parts]
    added: list[int] = []
    scores: list[list[float]] = []
    for _ in range(steps):
        found = [
            [
                best_global_threshold(total + P[m], Y)[1]
                for total, (P, Y) in zip(totals, parts, strict=True)
            ]
            for m in range(len(parts[0][0]))
        ]
        values = np.array(found) @ weights
        best = int(np.argmax(values >= values.max() - 1e-12))
        added.append(best)
        scores.append(found[best])
        for total, (P, _) in zip(totals, parts, strict=True):
            total += P[best]
    return added, scores


def rare(seed: int, M: int, n: int, K: int, dtype: type = np.float64) -> Any:
    """Scores (M, n, K) of unlike scales, of which most can never pass a cut, and sparse truth."""
    rng = np.random.default_rng(seed)
    signal = 3 * rng.normal(size=(n, K)) - 6
    Y = rng.random((n, K)) < expit(signal)
    scale = rng.uniform(0.2, 1, (M, 1, 1))
    noise = rng.uniform(0.5, 2, (M, 1, 1)) * rng.normal(size=(M, n, K))
    return (scale * expit(signal + noise)).astype(dtype), Y.astype(float)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("n", "K"), [(40, 300), (150, 120), (80, 20)])
def test_bounds_never_change_what_is_selected(n: int, K: int, dtype: type) -> None:
    P, Y = rare(n, 7, n, K, dtype)
    blend = Blend(max_steps=12, patience=12).fit(P, Y)
    wide = P.astype(np.promote_types(dtype, np.float32))
    added, scores = naive([(wide, Y)], 12, [1.0])
    assert blend.path_["model"].tolist() == added
    np.testing.assert_allclose(blend.path_["score"], np.ravel(scores), atol=1e-12)
    np.testing.assert_array_equal(blend.path_["domain_score"], blend.path_["score"][:, None])


@pytest.mark.parametrize("useless", [0.0, 0.5, 1.0])
def test_a_model_of_equal_scores_does_no_harm(useless: float) -> None:
    P, Y = rare(9, 4, 60, 400, np.float16)
    P = np.concatenate([np.full_like(P[:1], useless), P])
    P[4][P[4] < 0.3] = 0  # hardly any score is left of this one
    blend = Blend(max_steps=8, patience=8).fit(P, Y)
    added, scores = naive([(P.astype(np.float32), Y)], 8, [1.0])
    assert blend.path_["model"].tolist() == added
    np.testing.assert_allclose(blend.path_["score"], np.ravel(scores), atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 1), (2, 5, 1), (2, 1, 5)])
@pytest.mark.parametrize("value", [0, 1])
def test_labels_that_are_all_alike(shape: tuple[int, int, int], value: int) -> None:
    P = np.random.default_rng(0).random(shape)
    Y = np.full(shape[1:], value)
    for method in METHODS:
        blend = Blend(method=method).fit(P, Y)
        assert blend.score_ == 1
        np.testing.assert_array_equal(blend.predict(P).toarray(), Y)


def test_each_domain_has_its_own_cut_while_weights_are_chosen() -> None:
    P, Y = rare(0, 6, 60, 80)
    Q, Z = rare(1, 6, 100, 80)
    Q *= 0.3  # of another scale, so that no one cut fits both
    blend = Blend(max_steps=8, patience=8, domain_weights={"near": 0.7, "far": 0.3})
    domains = np.repeat(["near", "far"], [60, 100])
    blend.fit(np.concatenate([P, Q], axis=1), np.concatenate([Y, Z]), domains)
    added, scores = naive([(P, Y), (Q, Z)], 8, [0.7, 0.3])
    assert blend.domains_ == ["near", "far"]
    assert blend.path_["model"].tolist() == added
    np.testing.assert_allclose(blend.path_["domain_score"], scores, atol=1e-12)
    np.testing.assert_allclose(blend.path_["score"], np.array(scores) @ [0.7, 0.3], atol=1e-12)


@pytest.mark.parametrize("allowed", [0.0, 0.02, 1.0])
def test_the_source_loses_no_more_than_allowed(allowed: float) -> None:
    P, Y = rare(2, 6, 70, 40)
    Q, Z = rare(3, 6, 90, 40)
    P[:3], Q[3:] = P[:3] ** 0.5, 0.5 * Q[3:] + 0.5 * np.random.default_rng(0).random(Q[3:].shape)
    both, truth = np.concatenate([P, Q], axis=1), np.concatenate([Y, Z])
    domains = np.repeat(["target", "source"], [70, 90])
    blend = Blend(max_source_loss=allowed, max_steps=10).fit(both, truth, domains)
    alone = max(best_global_threshold(q, Z)[1] for q in Q)
    assert (blend.path_["domain_score"][:, 1] >= alone - allowed).all()
    np.testing.assert_array_equal(blend.path_["score"], blend.path_["domain_score"][:, 0])
    average = np.tensordot(blend.weights_, P, 1)
    threshold, score = best_global_threshold(average, Y)
    assert blend.score_ == pytest.approx(score, abs=1e-12)
    assert blend.threshold_ == pytest.approx(threshold, abs=1e-9)
    if allowed == 1.0:
        free = Blend(max_steps=10).fit(P, Y)
        np.testing.assert_array_equal(blend.weights_, free.weights_)


def test_the_front_holds_what_nothing_else_beats() -> None:
    P, Y = rare(4, 6, 80, 30)
    domains = np.repeat(["a", "b"], 40)
    halves = [domains == "a", domains == "b"]
    blend = Blend(max_steps=6, trade_offs=(0, 0.5, 1)).fit(P, Y, domains)
    front = blend.pareto_
    steps = len(blend.path_["model"])
    assert len(front["score"]) == 6 + steps + 3
    np.testing.assert_array_equal(front["score"][6 : 6 + steps], blend.path_["domain_score"])
    np.testing.assert_array_equal(front["weights"][front["chosen"]], [blend.weights_])
    for weights, score in zip(front["weights"], front["score"], strict=True):
        mean = np.tensordot(weights, P, 1)
        cuts = [best_global_threshold(mean[rows], Y[rows])[1] for rows in halves]
        np.testing.assert_allclose(score, cuts, atol=1e-12)
    for share, row in zip((0.0, 0.5, 1.0), front["weights"][-3:], strict=True):
        other = Blend(max_steps=6, domain_weights={"a": share, "b": 1 - share})
        np.testing.assert_array_equal(other.fit(P, Y, domains).weights_, row)
    for row, score in enumerate(front["score"]):
        better = (front["score"] >= score).all(1) & (front["score"] > score).any(1)
        assert front["efficient"][row] == (not better.any())
    with pytest.raises(ValueError, match="trade_offs has 2; expected numbers from 0 to 1"):
        Blend(max_steps=2, trade_offs=(2,)).fit(P, Y, domains)


def test_a_sorted_start_takes_the_best_models_first() -> None:
    P, Y = rare(5, 8, 60, 60)
    alone = np.array([best_global_threshold(p, Y)[1] for p in P])
    order = np.argsort(-alone, kind="stable")
    means = [best_global_threshold(P[order[:size]].mean(0), Y)[1] for size in (1, 2, 3, 4, 5)]
    length = int(np.argmax(means)) + 1
    blend = Blend(start=5, max_steps=12).fit(P, Y)
    assert blend.path_["model"][:length].tolist() == order[:length].tolist()
    np.testing.assert_allclose(blend.path_["score"][:length], means[:length], atol=1e-12)


def test_scores_are_read_from_files(tmp_path: Path) -> None:
    P, Y = rare(6, 5, 50, 200, np.float16)
    files = []
    for m, p in enumerate(P):
        files.append(tmp_path / f"model{m}.npy")
        np.save(files[-1], p)
    kept, mapped = Blend(max_steps=5).fit(P, Y), Blend(max_steps=5).fit(files, Y)
    np.testing.assert_array_equal(mapped.weights_, kept.weights_)
    assert mapped.score_ == kept.score_
    np.testing.assert_array_equal(mapped.predict_proba(files), kept.predict_proba(P))


def test_chained_rows_are_those_of_one_array() -> None:
    P, Y = rare(16, 4, 70, 30, np.float16)
    domains = np.repeat(["a", "b"], [30, 40])
    chained = [Chained([p[:30], p[30:]]) for p in P]
    some = np.array([0, 29, 30, 69])
    for rows in (slice(0, 70), slice(5, 20), slice(25, 40), slice(3, 3), some, some[:0], some[2:]):
        np.testing.assert_array_equal(chained[0][rows], P[0][rows])
    one = Blend(max_steps=5).fit(P, Y, domains)
    other = Blend(max_steps=5).fit(chained, Y, domains)
    np.testing.assert_array_equal(other.weights_, one.weights_)
    assert (other.threshold_, other.score_) == (one.threshold_, one.score_)
    P[2, 33, 4] = np.nan
    with pytest.raises(ValueError, match=r"P\[2\] is nan at row 33, label 4"):
        Blend().fit([Chained([p[:30], p[30:]]) for p in P], Y, domains)


def test_a_broken_model_is_refused_by_its_name() -> None:
    P, Y = rare(7, 3, 30, 20, np.float16)
    P[1, 4, 2] = np.nan
    names = ["good.h5", "broken.h5", "fine.h5"]
    with pytest.raises(ValueError, match=r"broken\.h5 is nan at row 4, label 2; scores must be"):
        Blend().fit(P, Y, names=names)
    P[1, 4, 2] = -0.5
    with pytest.raises(ValueError, match=r"broken\.h5 reaches from -0\.5"):
        Blend().fit(P, Y, names=names)
    with pytest.raises(ValueError, match="there are 2 names, but 3 models"):
        Blend().fit(P, Y, names=names[:2])


# ------------------------------------------------------------------ honest scores


@pytest.mark.parametrize("method", ["greedy", "simplex"])
def test_on_noise_the_nested_score_is_below_the_score(method: str) -> None:
    rng = np.random.default_rng(0)
    Y = (rng.random((60, 10)) < 0.2).astype(float)
    blend = Blend(method=method, cv=3).fit(rng.random((20, 60, 10)), Y)
    assert blend.optimism_ == pytest.approx(blend.score_ - blend.nested_score_)
    assert blend.optimism_ > 0.005
    assert blend.nested_["low"] <= blend.nested_score_ <= blend.nested_["high"]


def test_the_nested_score_is_that_of_whole_selections() -> None:
    P, Y = rare(8, 5, 60, 50)
    groups = np.repeat(np.arange(20), 3)
    folds = list(MultilabelGroupKFold(4, 0).split(Y, Y, groups))
    blend = Blend(cv=4, max_steps=6).fit(P, Y, groups=groups)
    values = np.zeros(len(Y))
    for train, test in folds:
        inner = Blend(max_steps=6).fit(P[:, train], Y[train])
        values[test] = fbeta_per_image(Y[test], inner.predict(P[:, test]), 2)
    assert blend.nested_score_ == pytest.approx(values.mean(), abs=1e-12)


def test_steps_end_where_images_left_out_are_best() -> None:
    P, Y = rare(15, 6, 60, 50)
    groups = np.repeat(np.arange(20), 3)
    blend = Blend(stop_cv=3, max_steps=7, patience=7).fit(P, Y, groups=groups)
    expected = np.zeros(7)
    for train, test in MultilabelGroupKFold(3, 1).split(Y, Y, groups):
        inner = Blend(max_steps=7, patience=7).fit(P[:, train], Y[train])
        for step in range(7):
            models = inner.path_["model"][: step + 1]
            threshold, _ = best_global_threshold(P[models][:, train].mean(0), Y[train])
            chosen = P[models][:, test].mean(0) >= threshold
            expected[step] += fbeta_per_image(Y[test], chosen, 2).sum() / len(Y)
    np.testing.assert_allclose(blend.path_["held_out"], expected, atol=1e-12)
    steps = int(np.argmax(expected)) + 1
    counts = np.bincount(blend.path_["model"][:steps], minlength=6)
    np.testing.assert_array_equal(blend.weights_, counts / steps)
    free = Blend(max_steps=7, patience=7).fit(P, Y)
    np.testing.assert_array_equal(blend.path_["model"], free.path_["model"])


def test_stopping_by_images_left_out_goes_with_domains_and_honest_scores() -> None:
    rng = np.random.default_rng(1)
    P, Y = rng.random((15, 60, 8)), (rng.random((60, 8)) < 0.2).astype(float)
    domains = np.repeat(["a", "b"], 30)
    for options in ({}, {"max_source_loss": 0.05}):
        blend = Blend(stop_cv=3, cv=3, max_steps=8, **options).fit(P, Y, domains)
        assert len(blend.path_["held_out"]) == len(blend.path_["model"])
        np.testing.assert_array_equal(
            blend.pareto_["weights"][blend.pareto_["chosen"]], [blend.weights_]
        )
        assert np.isfinite(blend.nested_score_)
    assert np.isfinite(Blend(stop_cv=2, cv=2, max_steps=3).fit(P, Y).nested_score_)
    with pytest.raises(ValueError, match="stop_cv needs method='greedy'"):
        Blend(method="simplex", stop_cv=3).fit(P, Y)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("noise", [0, 1e-7])
def test_many_models_that_are_all_but_the_same(noise: float) -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        P, Y = rare(seed, 3, 40, 10)
        scores = P[rng.integers(0, 3, 100)].astype(np.float32)
        scores += noise * rng.random(scores.shape, np.float32)
        scores = np.minimum(scores, 1)
        blend = Blend(max_steps=5).fit(scores, Y)
        best = max(best_global_threshold(p, Y)[1] for p in scores)
        assert blend.path_["score"][0] == pytest.approx(best, abs=1e-12)


def test_a_source_loss_that_no_model_keeps_to_is_named() -> None:
    rng = np.random.default_rng(0)
    Y = (rng.random((90, 6)) < 0.3).astype(float)
    domains = np.repeat(["a", "b", "c"], 30)
    P = 0.3 * rng.random((3, 90, 6))
    for m, domain in enumerate("abc"):  # each model knows one domain only
        P[m] += 0.6 * Y * (domains == domain)[:, None]
    with pytest.raises(ValueError, match=r"no model is within max_source_loss=0\.01"):
        Blend(max_source_loss=0.01).fit(P, Y, domains)


def test_a_blend_admits_that_the_mean_is_as_good() -> None:
    P, Y = models(13, (1.5,) * 12, n=80)  # all alike: weights can only fit chance
    blend = Blend(cv=4).fit(P, Y)
    found = blend.nested_
    assert found["gain"] == pytest.approx(found["score"] - found["uniform"])
    assert found["gain_low"] < 0
    assert "no better than the mean of all models" in blend._repr_html_()


@pytest.mark.parametrize("loss", ["log", "squared"])
def test_simplex_reaches_the_least_loss(loss: str) -> None:
    P, Y = models(14, (1.0, 1.3, 2.5))
    blend = Blend(method="simplex", loss=loss).fit(P, Y)

    def value(weights: np.ndarray) -> float:
        mean = averaged(P, weights, "probability")
        return log_loss(mean, Y) if loss == "log" else float(np.mean((mean - Y) ** 2))

    rng = np.random.default_rng(0)
    best = min(value(w) for w in rng.dirichlet(np.ones(3), 2000))
    assert value(blend.weights_) <= best * (1 + 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "loss is 'hinge'; expected log or squared"),
        ({"loss": "squared", "average": "logit"}, "where it is convex"),
        ({"max_steps": 0}, "max_steps is 0; expected 1 or more"),
        ({"max_source_loss": 0.1}, "needs method='greedy', at least two domains"),
        ({"domain_weights": {"x": 1}}, "domain_weights has"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Blend(**options).fit(np.full((2, 3, 2), 0.5), np.eye(3)[:, :2])


def test_many_models_of_which_no_score_can_matter() -> None:
    """All alike, so that none is above its floor; there is nothing to group models by."""
    Y = np.zeros((4, 60), bool)
    Y[0, 0] = True
    P = np.full((31, 4, 60), 0.5)
    blend = Blend().fit(P, Y)
    assert blend.score_ == pytest.approx(best_global_threshold(P[0], Y)[1])
    assert blend.weights_.sum() == pytest.approx(1)
