"""What does ``heads adapt`` do, on files?"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from featcache import FeatureCache, layout
from featcache.console import command_line, option, required
from heads.adaptation import Adaptation
from heads.domain_heads import DomainConfig
from heads.experts import ExpertConfig
from heads.fitting import (
    GROUPS,
    check_folds,
    held_out,
    parse_numbers,
    refuse_mismatch,
    refuse_negative,
    sampled,
    training_rows,
    versions,
)
from heads.gate import GateConfig
from heads.metrics import fbeta_per_image
from heads.storage import Head, refuse_existing, save


@dataclass(frozen=True)
class AdaptConfig:
    """What a model is adapted on and how; every field is an option of ``heads adapt``."""

    cache: str
    source: str = required("cache of the validation images", metavar="VALIDATION.h5")
    out: str = required("file of the adapted model", metavar="ADAPTED.h5")
    beta: float = option(2.0, "of F-beta")
    dropout: str = option("", "rates to compare, such as 0.1,0.5 (default: three)")
    cv: int = option(5, "folds; the views of an image stay together")
    groups: str = option("", GROUPS, metavar="CSV")
    source_rows: int = option(5000, "source images at most, chosen by --seed")
    source_weight: float = option(
        0.1, "what all source images count in the adapted heads, in units of all of Stage 1"
    )
    cap: float = option(
        GateConfig.cap, "how far a domain that is neither Stage 1's nor the source's may go"
    )
    seed: int = option(0, "of the folds and of the choice of source images")
    overwrite: bool = option(False, "replace an existing file")


def adapt(config: AdaptConfig) -> Head:
    """Adapt a network's last layer for Stage 1 and for domains without labels, and store it.

    See :class:`heads.Adaptation`. The out-of-fold scores of Stage 1, which a blend is chosen on,
    are those of its gate, 1; the validation images have the source head's.

    Raises
    ------
    ValueError
        If the caches do not fit together, or have no labels or no last layer.
    """
    refuse_existing(config.out, config.overwrite, [config.cache, config.source])
    refuse_negative(seed=config.seed)
    cache, source = FeatureCache(config.cache), FeatureCache(config.source)
    rows = training_rows(cache, groups=config.groups)
    check_folds(config.cv, cache, len(np.unique(rows["groups"])))
    if rows["coef_init"] is None:
        raise ValueError(
            f"{cache.path}: has no last layer; `heads adapt` starts from the network's"
        )
    if not rows["Y"].max() > 0:
        raise ValueError(f"{cache.path}: no label is positive; there is nothing to adapt to")
    refuse_mismatch(cache, source)
    source = sampled(source, config.source_rows, config.seed)
    home = training_rows(source, groups=config.groups)
    experts = ExpertConfig(source_weight=config.source_weight, cv=config.cv)
    if config.dropout:
        experts = replace(experts, dropouts=parse_numbers(config.dropout, "--dropout"))
    chain = Adaptation(
        beta=config.beta,
        experts=experts,
        domain=DomainConfig(gate=GateConfig(cap=config.cap)),
        random_state=config.seed,
    ).fit(
        **rows,
        source=(home["X"], home["Y"]),
        source_groups=home["groups"],
        source_mask=home["mask"],
    )
    target = held_out(cache, chain.oof_predict_proba_, rows)
    chosen = chain.model_.decision.predict(target.proba)
    values = fbeta_per_image(target.Y, chosen, config.beta, target.mask, missed=target.missed)
    head = Head(
        estimator=chain.model_,
        classes=cache.classes,
        names=cache.class_names,
        network_id=cache.network_id,
        oof={
            "target": target,
            "source": held_out(source, chain.source_predict_proba_, home),
        },
        decision=chain.model_.decision,
        provenance={
            "command": command_line("heads adapt", config, config.cache),
            "versions": versions(),
            "cache": str(config.cache),
            "cache_hash": layout.read(cache.path).content_hash,
            "source": config.source,
            "source_hash": layout.read(source.path).content_hash,
            "method": "adaptation",
            "beta": config.beta,
            "score": float(values.mean()),
            "explanation": chain.explain(),
        },
    )
    save(config.out, head, config.overwrite)
    return head
