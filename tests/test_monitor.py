"""Loss and F2 while training, against sums written out and scikit-learn's F-beta."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from sklearn.metrics import fbeta_score

from featcache.errors import InputError
from featcache.losses import summed_loss
from featcache.monitor import CUTS, Score
from featcache.targets import Targets, TargetSource

CPU = torch.device("cpu")
SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=60)


def make_targets(
    seed: int, n: int = 12, K: int = 6, unknown: bool = True, outside: bool = True
) -> tuple[torch.Tensor, Targets]:
    """Logits and targets, with images that have no label at all."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 2, (n, K))
    values = (rng.random((n, K)) < 0.4) * rng.choice([0.3, 0.5, 0.7, 1.0], (n, K))
    values[0] = 0
    known = (rng.random((n, K)) < 0.7) | (values > 0) if unknown else None
    counts = rng.integers(0, 3, n) * (np.arange(n) > 1) if outside else np.zeros(n)
    return torch.tensor(logits, dtype=torch.float32), Targets(
        torch.tensor(values, dtype=torch.float32),
        None if known is None else torch.tensor(known),
        torch.tensor(counts, dtype=torch.float32),
    )


def part(targets: Targets, rows: slice) -> Targets:
    known = None if targets.known is None else targets.known[rows]
    return Targets(targets.values[rows], known, targets.outside[rows])


# ------------------------------------------------------------------------ loss


@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_the_sum_over_known_classes(unknown: bool, smoothing: float) -> None:
    logits, targets = make_targets(0, unknown=unknown)
    result = summed_loss(logits, targets, smoothing)
    for i in range(len(logits)):
        expected = 0.0
        for k in range(logits.shape[1]):
            if targets.known is not None and not targets.known[i, k]:
                continue
            y = float(targets.values[i, k])
            y = y + smoothing * (0.5 - y)
            p = 1 / (1 + math.exp(-float(logits[i, k])))
            expected -= y * math.log(p) + (1 - y) * math.log(1 - p)
        assert float(result[i]) == pytest.approx(expected, rel=1e-5)


def test_gradient_of_the_loss() -> None:
    logits, targets = make_targets(1)
    logits.requires_grad_()
    summed_loss(logits, targets).sum().backward()
    assert targets.known is not None
    expected = (torch.sigmoid(logits) - targets.values) * targets.known
    torch.testing.assert_close(logits.grad, expected.detach())


def test_an_image_of_which_nothing_is_known_costs_nothing() -> None:
    logits, targets = make_targets(2)
    assert targets.known is not None
    targets.known[3], targets.values[3] = False, 0
    assert summed_loss(logits, targets)[3] == 0


def test_extreme_logits_have_finite_losses() -> None:
    logits = torch.tensor([[1e4, -1e4], [1e4, -1e4]])
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = summed_loss(logits, Targets(values, None, torch.zeros(2)))
    assert loss.tolist() == [0, 2e4]


# -------------------------------------------------------------------------- F2


def brute_force(logits: torch.Tensor, targets: Targets, cut: float) -> float:
    """Mean F2 by scikit-learn; a label outside the classes is a column never predicted."""
    proba = torch.sigmoid(logits).numpy()
    known = np.ones(proba.shape, bool) if targets.known is None else targets.known.numpy()
    predicted = (proba >= np.float32(cut)) & known
    truth = targets.values.numpy() >= 0.5
    missed = targets.outside.numpy()[:, None] > np.arange(3)
    truth, predicted = np.hstack([truth, missed]), np.hstack([predicted, np.zeros_like(missed)])
    return float(fbeta_score(truth, predicted, beta=2, average="samples", zero_division=1.0))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("outside", [False, True])
def test_score_at_every_cut(seed: int, unknown: bool, outside: bool) -> None:
    logits, targets = make_targets(seed, unknown=unknown, outside=outside)
    score = Score(CPU)
    score.update(logits, targets)
    expected = np.array([brute_force(logits, targets, cut) for cut in CUTS])
    np.testing.assert_allclose(score.f_sums.numpy() / len(logits), expected, rtol=1e-6)
    result = score.result()
    assert result["f2"] == pytest.approx(expected.max(), rel=1e-6)
    assert expected[CUTS.index(result["threshold"])] == pytest.approx(expected.max(), rel=1e-6)
    assert result["loss"] == pytest.approx(float(summed_loss(logits, targets).mean()), rel=1e-5)


def test_known_scores() -> None:
    # One of two labels found and one wrong guess: F2 = 5 * 1 / (4 * 2 + 2) at every cut.
    sure = 20.0
    logits = torch.tensor([[sure, -sure, sure], [-sure, -sure, -sure]])
    targets = Targets(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), None, torch.zeros(2))
    score = Score(CPU)
    score.update(logits, targets)
    assert score.result()["f2"] == pytest.approx((0.5 + 1) / 2)  # nothing true nor guessed: 1
    missed = Score(CPU)
    missed.update(logits, Targets(targets.values, None, torch.tensor([1.0, 1.0])))
    assert missed.result()["f2"] == pytest.approx((5 / 14 + 0) / 2)


def test_unknown_labels_are_no_false_guesses() -> None:
    logits = torch.full((1, 3), 20.0)
    values = torch.tensor([[1.0, 0.0, 0.0]])
    known = torch.tensor([[True, False, False]])
    score = Score(CPU)
    score.update(logits, Targets(values, known, torch.zeros(1)))
    assert score.result()["f2"] == pytest.approx(1)


@SETTINGS
@given(
    seed=st.integers(0, 1000), edges=st.lists(st.integers(0, 40), max_size=5), unknown=st.booleans()
)
def test_scores_add_over_batches(seed: int, edges: list[int], unknown: bool) -> None:
    logits, targets = make_targets(seed, n=40, unknown=unknown)
    whole, parts = Score(CPU), Score(CPU)
    whole.update(logits, targets)
    borders = sorted({0, 40, *edges})
    for start, stop in pairwise(borders):
        parts.update(logits[start:stop], part(targets, slice(start, stop)))
    assert parts.count == whole.count == 40
    np.testing.assert_allclose(parts.f_sums, whole.f_sums, rtol=1e-12)
    assert parts.loss_sum.item() == pytest.approx(whole.loss_sum.item(), rel=1e-6)


def test_nothing_scored_is_said() -> None:
    with pytest.raises(InputError, match="none of the held-out images can be read"):
        Score(CPU).result()


# --------------------------------------------------------------------- targets


@SETTINGS
@given(
    seed=st.integers(0, 1000),
    rows=st.lists(st.integers(0, 7), min_size=1, max_size=12),
    unlisted_known=st.booleans(),
    has_negatives=st.booleans(),
)
def test_targets_are_the_dense_rows(
    seed: int, rows: list[int], unlisted_known: bool, has_negatives: bool
) -> None:
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, (8, 5), p=[0.5, 0.3, 0.2])  # unlisted, positive, negative
    kind[rng.integers(8)] = 0
    confidence = rng.choice([0.25, 0.5, 1.0], (8, 5)).astype(np.float32)
    positives = np.where(kind == 1, confidence, 0)
    negatives = (kind == 2).astype(np.float32)
    outside = rng.integers(0, 4, 8).astype(np.int32)
    source = TargetSource(
        csr_matrix(positives),
        csr_matrix(negatives) if has_negatives else None,
        unlisted_known,
        outside,
    )
    targets = source(np.array(rows), CPU)
    np.testing.assert_array_equal(targets.values.numpy(), positives[rows])
    np.testing.assert_array_equal(targets.outside.numpy(), outside[rows])
    assert targets.values.dtype == targets.outside.dtype == torch.float32
    if unlisted_known:
        assert targets.known is None
    else:
        assert targets.known is not None
        known = (kind == 1) | ((kind == 2) & has_negatives)
        np.testing.assert_array_equal(targets.known.numpy(), known[rows])
