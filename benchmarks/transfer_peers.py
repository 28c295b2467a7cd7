"""What do others' heads predict for `transfer`, for one network and one case?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit

from benchmarks.measure import peer
from benchmarks.transfer_domains import Case, Domain, Pools
from heads import DropoutLogisticCV, MultilabelGroupKFold
from heads.metrics import log_loss

FOLDS = 3
DROPOUTS = (0.1, 0.25, 0.5)
ALPHAS = 10.0 ** np.arange(-1, 6)
EPOCHS, BATCH, RATE = 80, 100, 2e-3  # of Adam; the best number of epochs is below the most


@dataclass
class Method:
    """Probabilities of one network, or averages over networks.

    Attributes
    ----------
    rule : "source cut", "cut" or "expected"
        One cut, tuned on `known`, or label sets of the highest expected F-beta.
    known : (n, K) or None
        Of the rows that the cut is tuned on: validation, or Stage 1 out of fold.
    tests : dict of (n, K)
    seconds : float
        Fitting, and deciding on all test domains.
    average : "probability" or "logit"
        How networks are averaged.
    """

    rule: str
    known: np.ndarray | None
    tests: dict[str, np.ndarray]
    seconds: float = 0.0
    average: str = "probability"


def plain(domain: Domain) -> np.ndarray:
    """The first view."""
    return domain.X[:, 0].astype(np.float32)


def folds(domain: Domain) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(MultilabelGroupKFold(FOLDS, 0).split(domain.X, domain.Y, domain.character))


def scikit_learn(case: Case, pools: Pools) -> Iterator[tuple[str, Method]]:
    """One LogisticRegression a label on standardised features; C by label is left at a choice."""
    from sklearn.linear_model import LogisticRegression

    start = time.perf_counter()
    X, Y = plain(case.stage_1), case.stage_1.Y
    mean, std = X.mean(0), np.maximum(X.std(0), 1e-6)

    def fit(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        Z = (X[rows] - mean) / std
        W = np.zeros((Y.shape[1], X.shape[1]))
        b = np.full(Y.shape[1], -12.0)
        for k in range(Y.shape[1]):
            if Y[rows, k].any() and not Y[rows, k].all():
                head = LogisticRegression(C=0.01, tol=1e-3, max_iter=200).fit(Z, Y[rows, k])
                W[k], b[k] = head.coef_[0], head.intercept_[0]
        return W, b

    def proba(X: np.ndarray, head: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        P: np.ndarray = expit((X - mean) / std @ head[0].T + head[1]).astype(np.float32)
        return P

    known = np.zeros(Y.shape, np.float32)
    for train, test in folds(case.stage_1):
        known[test] = proba(X[test], fit(train))
    head = fit(np.arange(len(X)))
    tests = {name: proba(plain(domain), head) for name, domain in case.tests.items()}
    yield "scikit-learn logistic", Method("cut", known, tests, time.perf_counter() - start)


def fine_tuned(case: Case, pools: Pools) -> Iterator[tuple[str, Method]]:
    """Heads on Stage 1 alone (and WiSE's half way back), and DFR's on both domains alike."""
    X, Y = plain(case.stage_1), case.stage_1.Y.astype(np.float32)
    start = time.perf_counter()
    cv = DropoutLogisticCV(DROPOUTS, cv=FOLDS, tol=1e-4)
    head = _towards_network(cv, case, pools)
    tests = {name: head.predict_proba(plain(domain)) for name, domain in case.tests.items()}
    took = time.perf_counter() - start
    yield "logistic towards W0", Method("cut", head.oof_predict_proba_, tests, took)

    def half(margins: np.ndarray, X: np.ndarray) -> np.ndarray:
        P: np.ndarray = expit((margins + X @ pools.weight.T + pools.bias) / 2)
        return P

    tests = {
        name: half(head.decision_function(plain(domain)), plain(domain))
        for name, domain in case.tests.items()
    }
    yield "WiSE, alpha 1/2", Method("cut", half(head.oof_decision_function_, X), tests, took)

    start = time.perf_counter()
    home = case.source.take(np.random.default_rng(0).permutation(len(case.source))[: len(X)])
    both = cv.fit(
        np.concatenate([X, plain(home)]),
        np.concatenate([Y, home.Y.astype(np.float32)]),
        groups=np.concatenate([case.stage_1.character, home.character]),
    )
    tests = {name: both.predict_proba(plain(domain)) for name, domain in case.tests.items()}
    known = both.oof_predict_proba_[: len(X)]
    yield "DFR", Method("cut", known, tests, time.perf_counter() - start)


def fine_tuned_side_by_side(case: Case, pools: Pools) -> Iterator[tuple[str, Method]]:
    """A head on Stage 1 alone, on the features of all networks at once."""
    start = time.perf_counter()
    head = _towards_network(DropoutLogisticCV(DROPOUTS, cv=FOLDS, tol=1e-4), case, pools)
    tests = {name: head.predict_proba(plain(domain)) for name, domain in case.tests.items()}
    seconds = time.perf_counter() - start
    known = head.oof_predict_proba_
    yield "logistic towards W0, networks side by side", Method("cut", known, tests, seconds)


def _towards_network(cv: DropoutLogisticCV, case: Case, pools: Pools) -> DropoutLogisticCV:
    return cv.fit(
        plain(case.stage_1),
        case.stage_1.Y.astype(np.float32),
        groups=case.stage_1.character,
        coef_init=pools.weight,
        intercept_init=pools.bias,
    )


def himalaya(case: Case, pools: Pools) -> Iterator[tuple[str, Method]]:
    """Its RidgeCV, which chooses alpha by label, on standardised features."""
    module = peer("himalaya.ridge")
    if module is None:
        return
    start = time.perf_counter()
    X, Y = plain(case.stage_1), case.stage_1.Y.astype(np.float32)
    mean, std = X.mean(0), np.maximum(X.std(0), 1e-6)

    def fit(rows: np.ndarray) -> Any:
        cv = folds(case.stage_1.take(rows))
        model = module.RidgeCV(alphas=ALPHAS, fit_intercept=True, cv=cv)
        return model.fit((X[rows] - mean) / std, Y[rows])

    known = np.zeros(Y.shape, np.float32)
    for train, test in folds(case.stage_1):
        known[test] = fit(train).predict((X[test] - mean) / std)
    head = fit(np.arange(len(X)))
    tests = {name: head.predict((plain(d) - mean) / std) for name, d in case.tests.items()}
    yield "himalaya ridge", Method("cut", known, tests, time.perf_counter() - start)


def torch_adam(case: Case, pools: Pools) -> Iterator[tuple[str, Method]]:
    """The network's last layer trained on by Adam with dropout; rate and epochs out of fold."""
    if peer("torch") is None:
        return
    start = time.perf_counter()
    X, Y = plain(case.stage_1), case.stage_1.Y.astype(np.float32)
    best, known, chosen = np.inf, np.zeros(Y.shape, np.float32), (0.0, 0)
    for dropout in DROPOUTS:
        P = np.empty((EPOCHS, *Y.shape), np.float32)
        for train, test in folds(case.stage_1):
            for epoch, (W, b) in enumerate(_epochs(X[train], Y[train], pools, dropout, EPOCHS)):
                P[epoch, test] = expit(X[test] @ W.T + b)
        losses = [log_loss(Y, p) for p in P]
        if min(losses) < best:
            at = int(np.argmin(losses))
            best, known, chosen = losses[at], P[at].copy(), (dropout, at + 1)
    *_, (W, b) = _epochs(X, Y, pools, *chosen)
    tests = {name: expit(plain(domain) @ W.T + b) for name, domain in case.tests.items()}
    yield "torch dropout head, Adam", Method("cut", known, tests, time.perf_counter() - start)


def _epochs(
    X: np.ndarray, Y: np.ndarray, pools: Pools, dropout: float, epochs: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Weights and bias after each epoch, the same in every run."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = torch.nn.Linear(X.shape[1], Y.shape[1])
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(np.array(pools.weight, np.float32)))
            head.bias.copy_(torch.from_numpy(np.array(pools.bias, np.float32)))
        adam = torch.optim.Adam(head.parameters(), lr=RATE)
        features, targets = torch.from_numpy(X), torch.from_numpy(Y)
        for _ in range(epochs):
            for rows in torch.randperm(len(X)).split(BATCH):
                margins = head(torch.nn.functional.dropout(features[rows], dropout))
                loss = torch.nn.functional.binary_cross_entropy_with_logits(
                    margins, targets[rows], reduction="sum"
                )
                adam.zero_grad()
                (loss / len(rows)).backward()
                adam.step()
            yield head.weight.detach().numpy().copy(), head.bias.detach().numpy().copy()
    torch.set_num_threads(threads)
