"""Folds: label balance, whole groups, coverage, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csc_array, csr_matrix
from sklearn.base import clone
from sklearn.dummy import DummyClassifier
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    KFold,
    LeaveOneOut,
    ShuffleSplit,
    StratifiedKFold,
    cross_val_predict,
)

from heads.folds import MultilabelGroupKFold, check_folds

SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=100)


def skewed(seed: int, n: int, K: int, labels_per_row: float = 3) -> csr_matrix:
    """Labels with frequencies like 1 / rank; some rows are empty."""
    rng = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, K + 1)
    counts = rng.poisson(labels_per_row, size=n)
    columns = rng.choice(K, size=counts.sum(), p=frequency / frequency.sum())
    Y = csr_matrix((np.ones(len(columns)), (np.repeat(np.arange(n), counts), columns)), (n, K))
    Y.sum_duplicates()
    Y.data[:] = 1
    return Y


def shares(folds, Y) -> np.ndarray:
    """(folds, K) positives of each label in each test set."""
    return np.array([np.asarray(csr_matrix(Y)[test].sum(axis=0)).ravel() for _, test in folds])


def imbalance(folds, Y) -> np.ndarray:
    """Largest distance from an even share in rows, above what whole rows make inevitable."""
    counts = shares(folds, Y)
    even = counts.sum(axis=0) / len(counts)
    inevitable = np.maximum(np.ceil(even) - even, even - np.floor(even))
    return (np.abs(counts - even).max(axis=0) - inevitable)[even > 0]


def fold_of(folds, n: int) -> np.ndarray:
    out = np.full(n, -1)
    for k, (_, test) in enumerate(folds):
        assert np.all(out[test] == -1)
        out[test] = k
    assert np.all(out >= 0)
    return out


def same(first, second) -> bool:
    return all(
        np.array_equal(a, b)
        for one, two in zip(first, second, strict=True)
        for a, b in zip(one, two, strict=True)
    )


# -------------------------------------------------------------------- balance


@pytest.mark.parametrize("n_splits", [2, 5, 10])
@pytest.mark.parametrize(("n", "K"), [(300, 5), (1000, 60), (1000, 484), (2000, 2000)])
def test_labels_are_shared_out_better_than_at_random(n, K, n_splits):
    Y = skewed(K, n, K)
    folds = list(MultilabelGroupKFold(n_splits).split(Y, Y))
    ours = imbalance(folds, Y)
    random = np.array(
        [imbalance(KFold(n_splits, shuffle=True, random_state=s).split(Y), Y) for s in range(5)]
    )
    assert ours.mean() < 0.1 * random.mean()
    assert ours.max() < 0.3 * random.max()
    # The frequent labels, which are dealt out last, are not left over.
    frequent = slice(0, 3)
    assert ours[frequent].mean() < 0.25 * random[:, frequent].mean()


def test_rare_labels_reach_as_many_folds_as_they_can():
    Y = skewed(0, 500, 300)
    counts = shares(MultilabelGroupKFold(5).split(Y, Y), Y)
    total = counts.sum(axis=0)
    reached = (counts > 0).sum(axis=0)
    possible = np.minimum(total, 5)
    assert np.mean(reached == possible) > 0.9
    assert np.all(reached[total == 2] == 2)


def test_few_labels_come_out_even():
    rng = np.random.default_rng(0)
    Y = (rng.random((503, 4)) < [0.5, 0.2, 0.1, 0.02]).astype(int)
    counts = shares(MultilabelGroupKFold(5).split(Y, Y), Y)
    assert np.ptp(counts, axis=0).max() <= 1


@pytest.mark.parametrize("n", [2, 3, 17, 100])
@pytest.mark.parametrize("n_splits", [2, 3, 7])
def test_sizes_differ_by_at_most_one_row(n, n_splits):
    if n < n_splits:
        return
    for Y in (skewed(1, n, 10), np.zeros((n, 3)), np.ones((n, 1)), np.arange(n)):
        sizes = [len(test) for _, test in MultilabelGroupKFold(n_splits).split(np.zeros(n), Y)]
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) == n


def test_groups_are_balanced_too():
    rng = np.random.default_rng(1)
    Y = skewed(2, 2000, 30)
    groups = rng.integers(400, size=2000)
    folds = check_folds(MultilabelGroupKFold(5), Y, Y, groups)
    random = [
        imbalance(GroupKFold(5, shuffle=True, random_state=s).split(Y, None, groups), Y).mean()
        for s in range(5)
    ]
    assert imbalance(folds, Y).mean() < 0.5 * np.mean(random)
    sizes = [len(test) for _, test in folds]
    assert max(sizes) - min(sizes) <= 10


# ------------------------------------------------------------------ invariants


@st.composite
def problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10**9)))
    n, K = draw(st.integers(2, 30)), draw(st.integers(1, 6))
    Y = (rng.random((n, K)) < draw(st.sampled_from([0, 0.1, 0.5, 1]))).astype(float)
    groups = rng.integers(draw(st.integers(2, 30)), size=n)
    return Y, groups, draw(st.integers(0, 5))


@SETTINGS
@given(problem=problems())
def test_every_row_is_tested_once_and_groups_stay_whole(problem):
    Y, groups, seed = problem
    n_groups = len(np.unique(groups))
    for n_splits in range(2, n_groups + 1):
        folds = list(MultilabelGroupKFold(n_splits, seed).split(Y, Y, groups))
        assert len(folds) == n_splits
        fold = fold_of(folds, len(Y))
        for train, test in folds:
            assert len(test) > 0
            np.testing.assert_array_equal(np.sort(np.append(train, test)), np.arange(len(Y)))
        for group in np.unique(groups):
            assert len(set(fold[groups == group])) == 1
        assert check_folds(n_splits, Y, Y, groups, seed) is not None


@SETTINGS
@given(problem=problems(), order_seed=st.integers(0, 100))
def test_with_groups_the_order_of_rows_does_not_matter(problem, order_seed):
    Y, groups, seed = problem
    n_splits = min(3, len(np.unique(groups)))
    if n_splits < 2:
        return
    order = np.random.default_rng(order_seed).permutation(len(Y))
    splitter = MultilabelGroupKFold(n_splits, seed)
    fold = fold_of(splitter.split(Y, Y, groups), len(Y))
    turned = fold_of(splitter.split(Y[order], Y[order], groups[order]), len(Y))
    np.testing.assert_array_equal(fold[order], turned)


def test_the_seed_decides():
    Y = skewed(3, 200, 20)
    splits = [list(MultilabelGroupKFold(4, seed).split(Y, Y)) for seed in (0, 0, 1)]
    assert same(splits[0], splits[1])
    assert not same(splits[0], splits[2])


def test_names_of_groups_only_matter_through_their_order():
    Y = skewed(4, 60, 8)
    groups = np.arange(60) // 3
    names = np.array([f"site {g:03d}" for g in groups])
    splitter = MultilabelGroupKFold(3)
    assert same(splitter.split(Y, Y, groups), splitter.split(Y, Y, names))


def test_kinds_of_y_and_unknown_entries():
    Y = skewed(5, 80, 9)
    splitter = MultilabelGroupKFold(4)
    expected = list(splitter.split(Y, Y))
    missing = np.where(Y.toarray() == 0, np.nan, 1)
    stored = Y.copy()
    stored.data[3] = np.nan
    unknown = Y.toarray()
    unknown[Y.nonzero()[0][3], Y.nonzero()[1][3]] = np.nan
    for kind in (Y.toarray(), Y.astype(bool), Y * 0.5, csc_array(Y), Y.tocoo(), missing):
        assert same(splitter.split(Y, kind), expected)
    assert same(splitter.split(Y, stored), splitter.split(Y, unknown))


def test_one_dimension_is_stratified_by_value():
    rng = np.random.default_rng(6)
    for y in (rng.integers(2, size=101), rng.choice(["a", "b", "c"], size=101)):
        for _, test in MultilabelGroupKFold(5).split(np.zeros(101), y):
            for value in np.unique(y):
                assert abs(np.sum(y[test] == value) - np.sum(y == value) / 5) < 2


def test_a_group_larger_than_a_fold():
    groups = np.array([0] * 50 + list(range(1, 11)))
    Y = np.ones((60, 1))
    sizes = sorted(len(test) for _, test in MultilabelGroupKFold(3).split(Y, Y, groups))
    assert sizes == [5, 5, 50]


def test_as_many_groups_as_folds():
    for sizes in ([1, 2], [9, 1, 1], [1, 1, 1, 20]):
        groups = np.repeat(np.arange(len(sizes)), sizes)
        for seed in range(10):
            Y = skewed(seed, len(groups), 3, 1)
            folds = list(MultilabelGroupKFold(len(sizes), seed).split(Y, Y, groups))
            assert sorted(len(test) for _, test in folds) == sorted(sizes)


# ---------------------------------------------------------------- scikit-learn


def test_it_works_where_scikit_learn_takes_a_splitter():
    Y = skewed(7, 60, 4).toarray()
    X = np.random.default_rng(0).random((60, 3))
    groups = np.arange(60) // 2
    splitter = MultilabelGroupKFold(3)
    assert splitter.get_n_splits() == splitter.get_n_splits(X, Y, groups) == 3
    assert repr(splitter) == "MultilabelGroupKFold(n_splits=3, random_state=0)"
    model = DummyClassifier(strategy="stratified", random_state=0)
    assert cross_val_predict(model, X, Y, cv=splitter, groups=groups).shape == Y.shape
    search = GridSearchCV(model, {"random_state": [0, 1]}, cv=splitter)
    assert clone(search).fit(X, Y, groups=groups).n_splits_ == 3


# ----------------------------------------------------------------- check_folds


def test_a_number_a_splitter_and_pairs_are_the_same_to_it():
    Y = skewed(8, 40, 5)
    splitter = MultilabelGroupKFold(4, random_state=3)
    expected = list(splitter.split(Y, Y))
    masks = [(np.isin(np.arange(40), a), np.isin(np.arange(40), b)) for a, b in expected]
    lists = [(a.tolist(), b.tolist()) for a, b in expected]
    for cv in (4, np.int64(4), splitter, expected, iter(expected), masks, lists):
        assert same(check_folds(cv, Y, Y, random_state=3), expected)


def test_other_splitters_are_taken():
    X = np.zeros((12, 2, 3))
    y = np.arange(12) % 2
    groups = np.arange(12) // 4
    for cv, count in [(KFold(3), 3), (LeaveOneOut(), 12), (StratifiedKFold(2), 2)]:
        assert len(check_folds(cv, X, y)) == count
    assert len(check_folds(GroupKFold(3), X, y, groups)) == 3


def test_training_on_a_part_of_the_other_rows_is_allowed():
    folds = check_folds([([2], [0, 1]), ([0], [2, 3])], np.zeros(4), np.zeros(4))
    assert [train.tolist() for train, _ in folds] == [[2], [0]]


FOLDS = {
    "tests row 3 2 times": [([0, 1], [2, 3]), ([2], [0, 1, 3])],
    "tests row 2 0 times": [([0, 2], [1, 3]), ([1, 2], [0])],
    "fold 1 of cv has row 0 in both": [([0, 1], [2, 3]), ([0, 2, 3], [0, 1])],
    "test of fold 0 of cv has row 4, but there are only 4": [([0], [4])],
    "train of fold 0 of cv has row": [([-1], [0, 1])],
    "train of fold 0 of cv must be row indices, at least one": [([], [0, 1, 2, 3])],
    "test of fold 0 of cv must be row indices": [([0, 1], [0.5])],
    "fold 0 of cv is": [([0, 1], [2], [3])],
    "fold 1 of cv is": [([0, 1], [2, 3]), 7],
}


@pytest.mark.parametrize("expected", FOLDS)
def test_pairs_that_give_no_held_out_score_are_refused(expected):
    with pytest.raises(ValueError, match=expected):
        check_folds(FOLDS[expected], np.zeros((4, 1)), np.zeros((4, 1)))


def test_a_group_on_both_sides_is_named():
    groups = np.array(["rome", "rome", "oslo", "oslo", "kyiv", "kyiv"])
    X = np.zeros((6, 1))
    with pytest.raises(ValueError, match=r"fold 0 of cv has group .*rome.* in both"):
        check_folds(KFold(6).split(X), X, X, groups)
    with pytest.raises(ValueError, match=r"fold 1 of cv has group .*oslo"):
        check_folds([([2, 3, 4, 5], [0, 1]), ([0, 1, 2], [3, 4, 5])], X, X, groups)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda Y: MultilabelGroupKFold(1), "n_splits is 1"),
        (lambda Y: MultilabelGroupKFold(2.5), "n_splits is 2.5"),
        (lambda Y: MultilabelGroupKFold(True), "n_splits is True"),
        (lambda Y: check_folds(1, Y, Y), "n_splits is 1"),
        (lambda Y: check_folds(9, Y, Y), "n_splits is 9, but there are only 8 rows"),
        (
            lambda Y: check_folds(4, Y, Y, np.arange(8) // 3),
            "n_splits is 4, but there are only 3 groups",
        ),
        (lambda Y: check_folds("loo", Y, Y), "cv is 'loo'"),
        (lambda Y: check_folds(None, Y, Y), "cv is None"),
        (lambda Y: check_folds(True, Y, Y), "cv is True"),
        (lambda Y: check_folds(2, Y, Y[1:]), "Y has 7 rows, but X has 8"),
        (lambda Y: check_folds(2, Y, None), "Y is None"),
        (lambda Y: check_folds(2, Y, Y[:, :, None]), r"Y has shape \(8, 2, 1\)"),
        (lambda Y: check_folds(2, Y, Y, np.arange(5)), r"groups has shape \(5,\)"),
        (lambda Y: check_folds(ShuffleSplit(3, random_state=0), Y, Y), "each row must be tested"),
    ],
)
def test_wrong_arguments_are_named(call, expected):
    with pytest.raises(ValueError, match=expected):
        list(call(np.eye(8)[:, :2]))
