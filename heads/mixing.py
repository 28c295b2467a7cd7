"""What does ``heads blend`` do, on files?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, vstack

from featcache.console import command_line, option, required
from featcache.disk import hash_file
from heads.blending import AVERAGES, METHODS, Blend
from heads.chain import NAMED, least_labels, named_decision, refuse_many
from heads.decisions import best_global_threshold
from heads.fitting import DECISIONS, LEAST, decide, parse_numbers, versions
from heads.members import Joined, join, open_members
from heads.stacks import Chained
from heads.storage import Head, OutOfFold, StoredBlend, refuse_existing, save

MAX_SOURCE_LOSS = 0.01
ENOUGH = 100  # images of the source, on fewer of which such a loss is noise


@dataclass(frozen=True)
class BlendConfig:
    """What is blended and how; every field is an option of ``heads blend``."""

    heads: list[str]
    out: str = required("file of the blend", metavar="BLEND.h5")
    beta: float = option(2.0, "of F-beta")
    method: str = option("greedy", "how the weights are chosen", choices=METHODS)
    average: str = option("probability", "what is averaged", choices=AVERAGES)
    max_source_loss: float | None = option(
        None,
        "choose on the validation images as well: the best score on the target among blends that "
        "lose there at most this much against the best single head (default: "
        f"{MAX_SOURCE_LOSS:g} by the greedy method if all heads have scored {ENOUGH} of the same "
        "validation images; inf: the target alone)",
    )
    source_weight: float = option(
        0.0, "choose on the validation images as well: what their score counts (the target's: 1)"
    )
    trade_offs: str = option(
        "", "with either of these: weights of the target, such as 0,0.5, to add to the Pareto table"
    )
    cv: int = option(5, "folds in which the whole choice is repeated for an honest score; 0: none")
    stop_folds: int = option(
        0, "folds in which the number of steps of the greedy method is tried on images left out"
    )
    decision: str = option("expected", DECISIONS, choices=NAMED)
    min_labels: int | None = option(None, LEAST)
    max_labels: int | None = option(None, "labels that an image gets at most (default: any number)")
    overwrite: bool = option(False, "replace an existing file")


def blend(config: BlendConfig) -> StoredBlend:
    """Choose the weights of stored heads on their out-of-fold scores, and store the blend.

    Heads are joined by image id; images of the target and classes that not all of them scored are
    refused, of the source those are used that all have scored. If these are half of what each has
    scored, and enough, the greedy method takes no blend that loses much there, in three times the
    time. On typefaces, to lose nothing there cost 0.002 of F2 on Stage 1 and on one typeface
    further on, won 0.009 on another, all within their intervals, and 0.15 on validation.
    Out-of-fold scores of other people's models take part as files (:mod:`heads.given`). However
    weights are chosen, the decision is fitted on the target.

    Raises
    ------
    ValueError
        If the heads disagree, naming the file.
    """
    refuse_existing(config.out, config.overwrite, config.heads)
    _check_options(config)
    models = open_members(config.heads)
    domains = join(config.heads, models)
    target = domains[0].truth
    refuse_many(config.min_labels, len(models[0].classes), config.heads[0])
    folds = min(5, target.units)
    decision = named_decision(
        config.decision,
        config.beta,
        least_labels(config.min_labels, config.decision, target.Y, target.missed),
        config.max_labels,
        cv=folds,
    )
    meant = _with_source_loss(config, _much_in_common(domains, models))
    chosen_on = domains if _wants_source(meant) else domains[:1]
    if _wants_source(meant) and len(domains) == 1:
        lacking = [p for p, m in zip(config.heads, models, strict=True) if "source" not in m.oof]
        raise ValueError(
            f"{(lacking or config.heads)[0]}: has no scores of validation images that all heads "
            "have scored; fit all with --source, one --seed and the same --source-rows, or leave "
            "out --max-source-loss, --source-weight, --trade-offs"
        )
    fitted = _fitted(meant, chosen_on)
    oof = {d.name: replace(d.truth, proba=fitted.predict_proba(d.scores)) for d in domains}
    used = np.flatnonzero(fitted.weights_ > 0)
    weights = fitted.weights_.tolist()
    scores = {d.name: _best_score(oof[d.name], config.beta) for d in domains}
    # Models of weight 0 are not needed at prediction, nor are their caches.
    fitted.weights_ = fitted.weights_[used]
    for m in used:
        models[m].oof, models[m].decision = {}, None
    stored = StoredBlend(
        blend=fitted,
        models=[models[m] for m in used],
        model_names=[str(config.heads[m]) for m in used],
        oof=oof,
        decision=decision,
        provenance={
            "command": command_line("heads blend", config, *config.heads),
            "versions": versions(),
            "heads": [str(path) for path in config.heads],
            "sha256": [hash_file(path) for path in config.heads],
            "weights": weights,
            "chosen_on": {domain.name: len(domain.truth.ids) for domain in chosen_on},
            "beta": config.beta,
            "score": scores.pop("target"),
            **{f"{domain}_score": score for domain, score in scores.items()},
            "nested": fitted.nested_ | {"optimism": fitted.optimism_} if fitted.cv else None,
            "decision": decide(decision, oof["target"], folds),
        },
    )
    save(config.out, stored, config.overwrite)
    return stored


def _best_score(scores: OutOfFold, beta: float) -> float:
    """F-beta at the best cut for these images."""
    P, Y, missed = scores.proba, scores.Y, scores.missed
    return best_global_threshold(P, Y, beta, scores.mask, missed=missed)[1]


def _check_options(config: BlendConfig) -> None:
    """Say what cannot work, or has no effect, in the words of the command line."""
    for flag, folds in (("--stop-folds", config.stop_folds), ("--cv", config.cv)):
        if folds < 0 or folds == 1:
            raise ValueError(f"{flag} {folds}: expected 0, or 2 and more")
    if not 0 <= config.source_weight < np.inf:
        raise ValueError(f"--source-weight {config.source_weight:g}: expected a number >= 0")
    if config.source_weight and config.max_source_loss is not None:
        raise ValueError(
            "--source-weight has no effect beside --max-source-loss, with which the target "
            "decides; give one of them"
        )
    alone = config.max_source_loss == np.inf
    if config.trade_offs and (alone or config.method != "greedy"):
        raise ValueError(
            "--trade-offs has no effect with --max-source-loss inf, nor without the greedy method; "
            "leave it out"
        )


def _much_in_common(domains: Sequence[Joined], models: Sequence[Head]) -> bool:
    """Whether most of the source that heads have scored is the same, and enough of it."""
    if len(domains) < 2:
        return False
    most = max(len(model.oof["source"].ids) for model in models)
    return domains[1].truth.units >= max(ENOUGH, most / 2)


def _with_source_loss(config: BlendConfig, common: bool) -> BlendConfig:
    """With the loss on the source that is meant; `common`: by most of what heads have scored."""
    loss = config.max_source_loss
    if loss == np.inf:
        return replace(config, max_source_loss=None)
    chooses = config.method == "greedy" and not config.source_weight
    if loss is None and chooses and (common or config.trade_offs):
        return replace(config, max_source_loss=MAX_SOURCE_LOSS)
    return config


def _wants_source(config: BlendConfig) -> bool:
    return config.max_source_loss is not None or config.source_weight > 0


def _fitted(config: BlendConfig, domains: Sequence[Joined]) -> Blend:
    """Weights chosen on the rows of all domains, the target's first."""
    options: dict[str, Any] = {}
    folds = min(config.cv, domains[0].truth.units)
    if folds > 1 and config.method != "uniform":  # which chooses nothing
        options["cv"] = folds
    if config.stop_folds:
        options["stop_cv"] = min(config.stop_folds, domains[0].truth.units)
    if len(domains) > 1:
        options["max_source_loss"] = config.max_source_loss
        if config.max_source_loss is None:
            options["domain_weights"] = {"target": 1.0, "source": config.source_weight}
        if config.trade_offs:
            options["trade_offs"] = parse_numbers(config.trade_offs, "--trade-offs")
    fitted = Blend(beta=config.beta, method=config.method, average=config.average, **options)
    truths = [domain.truth for domain in domains]
    groups = [truth.groups for truth in truths if truth.groups is not None]  # of all or of none
    masks = [
        np.zeros(truth.proba.shape, bool) if truth.mask is None else truth.mask for truth in truths
    ]
    # Mapped from the heads' files, where all are in one order.
    scores: list[Any] = domains[0].scores
    if len(domains) > 1:
        scores = [Chained(parts) for parts in zip(*(d.scores for d in domains), strict=True)]
    return fitted.fit(
        scores,
        csr_matrix(vstack([truth.Y for truth in truths])),
        domains=np.repeat([d.name for d in domains], [len(t.ids) for t in truths])
        if len(domains) > 1
        else None,
        mask=None if all(truth.mask is None for truth in truths) else np.concatenate(masks),
        missed=np.concatenate([truth.missed for truth in truths]),
        groups=np.concatenate(groups) if groups else None,
        names=config.heads,
    )
