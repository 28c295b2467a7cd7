"""What do the peers of `transfer` predict, for one network and one case?"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import expit

from benchmarks.transfer_domains import Case, Domain, Pools
from heads import Adaptation, DropoutLogistic, DropoutLogisticCV, MultilabelGroupKFold
from heads.domain_heads import AdaptedModel
from heads.experts import ExpertConfig
from heads.gate import GateConfig

LABELLED_ROWS = 30
FOLDS = 3
DROPOUTS = (0.1, 0.25, 0.5)
OPEN = GateConfig(fixed=1.0)
PLAIN: dict[str, Any] = {"aligned": 0.0}


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
    """

    rule: str
    known: np.ndarray | None
    tests: dict[str, np.ndarray]
    seconds: float = 0.0


def methods(case: Case, pools: Pools) -> dict[str, Method]:
    """All rows of the table for one network."""
    found: dict[str, Method] = {}
    steps: tuple[Callable[[Case, Pools], Iterator[tuple[str, Method]]], ...]
    steps = (_unadapted, _scikit_learn, _fine_tuned, _ours, _oracle)
    for step in steps:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found |= dict(step(case, pools))
    return found


def _plain(domain: Domain) -> np.ndarray:
    """The first view."""
    return domain.X[:, 0].astype(np.float32)


def _unadapted(case: Case, pools: Pools) -> Iterator[tuple[str, Method]]:
    def proba(domain: Domain) -> np.ndarray:
        P: np.ndarray = expit(_plain(domain) @ pools.weight.T + pools.bias)
        return P

    tests = {name: proba(domain) for name, domain in case.tests.items()}
    yield "unadapted, source cut", Method("source cut", proba(case.source), tests)
    yield "unadapted, cut tuned on Stage 1", Method("cut", proba(case.stage_1), tests)


def _folds(domain: Domain) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(MultilabelGroupKFold(FOLDS, 0).split(domain.X, domain.Y, domain.character))


def _scikit_learn(case: Case, pools: Pools) -> Iterator[tuple[str, Method]]:
    """One LogisticRegression a label on standardised features; C by label is left at a choice."""
    from sklearn.linear_model import LogisticRegression

    start = time.perf_counter()
    X, Y = _plain(case.stage_1), case.stage_1.Y
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
    for train, test in _folds(case.stage_1):
        known[test] = proba(X[test], fit(train))
    head = fit(np.arange(len(X)))
    tests = {name: proba(_plain(domain), head) for name, domain in case.tests.items()}
    yield "scikit-learn logistic", Method("cut", known, tests, time.perf_counter() - start)


def _fine_tuned(case: Case, pools: Pools) -> Iterator[tuple[str, Method]]:
    """Heads on Stage 1 alone (and WiSE's half way back), and DFR's on both domains alike."""
    start = time.perf_counter()
    X, Y = _plain(case.stage_1), case.stage_1.Y.astype(np.float32)
    cv = DropoutLogisticCV(DROPOUTS, cv=FOLDS, tol=1e-4)
    head = cv.fit(
        X, Y, groups=case.stage_1.character, coef_init=pools.weight, intercept_init=pools.bias
    )
    tests = {name: head.predict_proba(_plain(domain)) for name, domain in case.tests.items()}
    took = time.perf_counter() - start
    yield "logistic towards W0", Method("cut", head.oof_predict_proba_, tests, took)

    def half(margins: np.ndarray, X: np.ndarray) -> np.ndarray:
        P: np.ndarray = expit((margins + X @ pools.weight.T + pools.bias) / 2)
        return P

    tests = {
        name: half(head.decision_function(_plain(domain)), _plain(domain))
        for name, domain in case.tests.items()
    }
    yield "WiSE, alpha 1/2", Method("cut", half(head.oof_decision_function_, X), tests, took)

    start = time.perf_counter()
    home = case.source.take(np.random.default_rng(0).permutation(len(case.source))[: len(X)])
    both = cv.fit(
        np.concatenate([X, _plain(home)]),
        np.concatenate([Y, home.Y.astype(np.float32)]),
        groups=np.concatenate([case.stage_1.character, home.character]),
    )
    tests = {name: both.predict_proba(_plain(domain)) for name, domain in case.tests.items()}
    known = both.oof_predict_proba_[: len(X)]
    yield "DFR", Method("cut", known, tests, time.perf_counter() - start)


def _ours(case: Case, pools: Pools) -> Iterator[tuple[str, Method]]:
    """The whole chain, and before it what it is without its last steps."""
    start = time.perf_counter()
    chain = _fitted(case, pools, Adaptation())
    ours = _adapted(case, chain.model_)
    seconds = time.perf_counter() - start
    unadapted = chain.model_.source
    source = {name: expit(unadapted.margins(d.X)) for name, d in case.tests.items()}
    yield "unadapted, calibrated, expected F", Method("expected", None, source)
    for title, part in _partial_fits(chain).items():
        other = _fitted(case, pools, Adaptation(experts=part, share=1.0))
        yield title, _adapted(case, _with(other, gate=OPEN, **PLAIN))
    yield "+ shared map", _adapted(case, _with(chain, share=1.0, gate=OPEN, **PLAIN))
    yield "+ share of the source head", _adapted(case, _with(chain, gate=OPEN, **PLAIN))
    uncapped = GateConfig(cap=1.0, drop=0.0)
    yield "+ gate without a cap", _adapted(case, _with(chain, gate=uncapped, **PLAIN))
    yield "+ cap", _adapted(case, _with(chain, **PLAIN))
    ours.seconds = seconds
    yield "ours (+ aligned source head)", ours
    yield "ours, known label rates", _adapted(case, _with(chain, matched=0.5))
    yield "ours, strict", _adapted(case, chain.model_, strict=True)
    few = {name: d.take(np.arange(LABELLED_ROWS)) for name, d in case.few.items()}
    yield (
        f"ours, {LABELLED_ROWS} labelled rows",
        Method(
            "expected",
            None,
            {
                name: chain.for_domain(d.X, (few[name].X, few[name].Y)).predict_proba(d.X)
                for name, d in case.tests.items()
            },
        ),
    )


def _fitted(case: Case, pools: Pools, chain: Adaptation) -> Adaptation:
    return chain.fit(
        case.stage_1.X,
        case.stage_1.Y,
        source=(case.source.X, case.source.Y),
        coef_init=pools.weight,
        intercept_init=pools.bias,
        groups=case.stage_1.character,
        source_groups=case.source.character,
    )


def _partial_fits(chain: Adaptation) -> dict[str, ExpertConfig]:
    """Experts of the first rows of ours, at the dropout rates of the whole chain."""
    rates = {expert.pull: (expert.dropout,) for expert in chain.experts_}
    network = ExpertConfig(pulls=("network",), dropouts=rates["network"])
    return {
        "ours: heads towards W0 on both domains": replace(network, moments=("none",)),
        "+ alignment": network,
        "+ heads towards zero": replace(network, pulls=("network", "zero")),
    }


def _with(chain: Adaptation, share: float | None = None, **domain: Any) -> AdaptedModel:
    """The fitted model with another share or other constants of what is done for a domain."""
    model = chain.model_
    return replace(
        model,
        share=model.share if share is None else share,
        config=replace(model.config, **domain),
    )


def _adapted(case: Case, model: AdaptedModel, strict: bool = False) -> Method:
    start = time.perf_counter()
    tests = {
        name: model.for_domain(None if strict else domain.X).predict_proba(domain.X)
        for name, domain in case.tests.items()
    }
    return Method("expected", None, tests, time.perf_counter() - start)


def _oracle(case: Case, pools: Pools) -> Iterator[tuple[str, Method]]:
    """A head for each domain, fitted on all its characters that are not scored."""
    tests = {}
    for name, domain in case.tests.items():
        X, Y = case.oracles[name]
        head = DropoutLogistic(0.05, tol=1e-4).fit(
            X.astype(np.float32), Y, coef_init=pools.weight, intercept_init=pools.bias
        )
        tests[name] = head.predict_proba(_plain(domain))
    yield "oracle (labels of that domain)", Method("expected", None, tests)
