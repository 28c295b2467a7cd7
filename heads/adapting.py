"""What does ``heads adapt`` do, on files?"""

from __future__ import annotations

from dataclasses import dataclass, replace

from featcache import FeatureCache, layout
from featcache.console import command_line, option, required
from featcache.disk import hash_file
from heads.adaptation import Adaptation
from heads.cacherows import open_rows, refuse_mismatch, sampled
from heads.domain_heads import DomainConfig
from heads.experts import ExpertConfig
from heads.fitting import GROUPS, check_folds, parse_numbers, refuse_negative, versions
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
        GateConfig.cap,
        "how far a domain may go that is neither Stage 1's (or much nearer to it) nor the source's",
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
    refuse_existing(config.out, config.overwrite, [config.cache, config.source, config.groups])
    refuse_negative(seed=config.seed)
    cache, source = FeatureCache(config.cache), FeatureCache(config.source)
    if cache.weight is None:
        raise ValueError(
            f"{cache.path}: has no last layer; `heads adapt` starts from the network's"
        )
    refuse_mismatch(cache, source)
    caches = [cache, sampled(source, config.source_rows, config.seed)]
    rows, home = open_rows(caches, groups=config.groups)
    check_folds(config.cv, rows, config.groups)
    if not rows.fit["Y"].max() > 0:
        raise ValueError(f"{cache.path}: no label is positive; there is nothing to adapt to")
    experts = ExpertConfig(source_weight=config.source_weight, cv=config.cv)
    if config.dropout:
        experts = replace(experts, dropouts=parse_numbers(config.dropout, "--dropout"))
    chain = Adaptation(
        beta=config.beta,
        experts=experts,
        domain=DomainConfig(gate=GateConfig(cap=config.cap)),
        random_state=config.seed,
    ).fit(
        **rows.fit,
        source=(home.fit["X"], home.fit["Y"]),
        source_groups=home.groups,
        source_mask=home.fit["mask"],
        shared_groups=rows.grouped,
        missed=rows.missed,
        source_missed=home.missed,
    )
    target = rows.held_out(chain.oof_predict_proba_)
    chosen = chain.model_.decision.predict(target.proba)
    values = fbeta_per_image(target.Y, chosen, config.beta, target.mask, missed=target.missed)
    head = Head(
        estimator=chain.model_,
        classes=cache.classes,
        names=cache.class_names,
        network_id=cache.network_id,
        oof={"target": target, "source": home.held_out(chain.source_predict_proba_)},
        decision=chain.model_.decision,
        provenance={
            "command": command_line("heads adapt", config, config.cache),
            "versions": versions(),
            "cache": str(config.cache),
            "cache_hash": layout.read(cache.path).content_hash,
            "source": config.source,
            "groups_hash": hash_file(config.groups) if config.groups else "",
            "source_hash": layout.read(source.path).content_hash,
            "method": "adaptation",
            "beta": config.beta,
            "score": float(values.mean()),
            "explanation": chain.explain(),
        },
    )
    save(config.out, head, config.overwrite)
    return head
