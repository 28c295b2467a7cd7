"""What do unadapted networks, ours and oracles predict for `transfer`?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import expit

from benchmarks.transfer_domains import Case, Domain, Pools
from benchmarks.transfer_peers import Method, plain
from heads import Adaptation, DropoutLogistic
from heads.domain_heads import AdaptedModel
from heads.experts import ExpertConfig
from heads.gate import GateConfig

LABELLED_ROWS = 30
OPEN = GateConfig(fixed=1.0)
OURS = "ours (+ number of labels)"
SIDE_BY_SIDE = "ours, networks side by side"
ORACLE = "oracle (labels of that domain)"
PLAIN: dict[str, Any] = {"aligned": 0.0, "counted": 0.0}


def unadapted(case: Case, pools: Pools) -> Iterator[tuple[str, Method]]:
    def proba(domain: Domain) -> np.ndarray:
        P: np.ndarray = expit(plain(domain) @ pools.weight.T + pools.bias)
        return P

    tests = {name: proba(domain) for name, domain in case.tests.items()}
    yield "unadapted, source cut", Method("source cut", proba(case.source), tests)
    yield "unadapted, cut tuned on Stage 1", Method("cut", proba(case.stage_1), tests)


def ours(case: Case, pools: Pools) -> Iterator[tuple[str, Method]]:
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
    uncapped = GateConfig(cap=1.0, drop=0.0, doubt=0.0)
    yield "+ gate without a cap", _adapted(case, _with(chain, gate=uncapped, **PLAIN))
    yield "+ cap and doubt", _adapted(case, _with(chain, **PLAIN))
    yield "+ aligned source head", _adapted(case, _with(chain, counted=0.0))
    ours.seconds = seconds
    yield OURS, ours
    yield "ours, logits of networks averaged", replace(ours, average="logit")
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


def whole_chain(case: Case, pools: Pools) -> Method:
    """What ours is in the end."""
    start = time.perf_counter()
    ours = _adapted(case, _fitted(case, pools, Adaptation()).model_)
    ours.seconds = time.perf_counter() - start
    return ours


def ours_side_by_side(case: Case, pools: Pools) -> Iterator[tuple[str, Method]]:
    """The whole chain on the features of all networks at once."""
    yield SIDE_BY_SIDE, whole_chain(case, pools)


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


def oracle(case: Case, pools: Pools, title: str = ORACLE) -> Iterator[tuple[str, Method]]:
    """A head for each domain, fitted on all its characters that are not scored."""
    tests = {}
    for name, domain in case.tests.items():
        X, Y = case.oracles[name]
        head = DropoutLogistic(0.05, tol=1e-4).fit(
            X.astype(np.float32), Y, coef_init=pools.weight, intercept_init=pools.bias
        )
        tests[name] = head.predict_proba(plain(domain))
    yield title, Method("expected", None, tests)


def oracle_side_by_side(case: Case, pools: Pools) -> Iterator[tuple[str, Method]]:
    """The same on the features of all networks at once; gaps are not measured by it."""
    yield from oracle(case, pools, "oracle, networks side by side")
