"""The test for label shift against brute force, and on data whose answer is known."""

from __future__ import annotations

from itertools import combinations
from math import log

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from heads.labelshift import jensen_shannon, label_shift_test


def divergence(first: list[float], second: list[float]) -> float:
    """Jensen-Shannon by its definition, term by term."""
    total = 0.0
    p, q = [x / sum(first) for x in first], [x / sum(second) for x in second]
    for a, b in zip(p, q, strict=True):
        m = (a + b) / 2
        total += (a * log(a / m) if a else 0) / 2 + (b * log(b / m) if b else 0) / 2
    return total


def drawn(rates: np.ndarray, n: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random((n, len(rates))) < rates).astype(float)


def test_statistic_and_its_mean_by_chance_are_those_of_all_permutations() -> None:
    Y = np.array([[1, 0, 1], [1, 1, 0], [0, 0, 1], [1, 0, 0]])
    Y_source = np.array([[0, 1, 0], [0, 1, 1], [1, 1, 0]])
    found = label_shift_test(Y, Y_source, n_permutations=20_000)
    everything = np.concatenate([Y, Y_source])
    assert found.divergence == pytest.approx(
        divergence(Y.sum(0).tolist(), Y_source.sum(0).tolist())
    )
    values = []
    for mine in combinations(range(7), 4):
        others = [i for i in range(7) if i not in mine]
        first, second = everything[list(mine)].sum(0), everything[others].sum(0)
        values.append(divergence(first.tolist(), second.tolist()))
    assert found.by_chance == pytest.approx(np.mean(values), rel=0.02)
    assert found.ratio == pytest.approx(found.divergence / found.by_chance)


def test_jensen_shannon_is_symmetric_and_at_most_log_2() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6), 2)
    assert jensen_shannon(p, q) == pytest.approx(jensen_shannon(q, p))
    assert jensen_shannon(p, p) == pytest.approx(0, abs=1e-15)
    assert jensen_shannon(np.array([1.0, 0]), np.array([0, 1.0])) == pytest.approx(log(2))


def test_the_same_rates_give_about_1_and_other_rates_more() -> None:
    rates = np.random.default_rng(1).uniform(0.02, 0.3, 40)
    same = [label_shift_test(drawn(rates, 300, s), drawn(rates, 400, 50 + s)) for s in range(5)]
    assert np.mean([t.ratio for t in same]) == pytest.approx(1, abs=0.15)
    assert all(t.strength == 0 for t in same)
    other = label_shift_test(drawn(rates, 300, 0), drawn(rates[::-1], 400, 50))
    assert other.ratio > 4
    assert other.strength == 1
    assert "differently" in other.words


def test_renderings_of_one_thing_count_once() -> None:
    """Six copies of every image are no six times as certain."""
    rates = np.random.default_rng(1).uniform(0.02, 0.3, 40)
    Y, source = drawn(rates, 300, 0), drawn(rates, 100, 1)
    copies, groups = np.repeat(source, 6, axis=0), np.repeat(np.arange(100), 6)
    plain = label_shift_test(Y, source)
    grouped = label_shift_test(Y, copies, source_groups=groups)
    assert grouped.divergence == pytest.approx(plain.divergence)
    assert grouped.by_chance == pytest.approx(plain.by_chance)
    assert label_shift_test(Y, copies).ratio > 1.5 * grouped.ratio


def test_neither_the_order_of_labels_nor_the_format_matters() -> None:
    rates = np.random.default_rng(1).uniform(0.02, 0.3, 12)
    Y, source = drawn(rates, 60, 0), drawn(rates, 50, 1)
    order = np.random.default_rng(2).permutation(12)
    plain = label_shift_test(Y, source)
    for found in (
        label_shift_test(Y[:, order], source[:, order]),
        label_shift_test(csr_matrix(Y), csr_matrix(source)),
    ):
        assert found.ratio == pytest.approx(plain.ratio)


def test_nothing_labelled_is_no_sign() -> None:
    found = label_shift_test(np.zeros((5, 3)), drawn(np.full(3, 0.5), 20, 0))
    assert (found.ratio, found.strength) == (1.0, 0.0)


def test_groups_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"groups has shape \(3,\)"):
        label_shift_test(np.ones((5, 2)), np.ones((4, 2)), groups=np.arange(3))
