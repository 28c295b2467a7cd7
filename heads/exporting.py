"""How does a stored head go back into its network?

What the head says as arrays is known here; the network and torch are ``featcache.exporting``'s,
which is imported when it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache import FeatureCache
from featcache.cacheset import short
from featcache.console import command_line, option, required, with_torch
from heads.calibration import PlattScaling
from heads.chain import described
from heads.decisions import GlobalThreshold, PerClassThreshold, best_global_threshold
from heads.domain_heads import AdaptedModel, DomainHead
from heads.dropout import rho_from_dropout
from heads.logistic import DropoutLogistic, DropoutLogisticCV
from heads.prediction import own_rule
from heads.storage import Head, load, refuse_existing

if TYPE_CHECKING:
    from featcache.exporting import TunedHead


@dataclass(frozen=True)
class ExportConfig:
    """What is put where; every field is an option of ``heads export``."""

    content: str
    run: str = required("folder of the network that the head was fitted on", metavar="RUN")
    out: str = required("torch program (.pt) or ONNX (.onnx)", metavar="model.pt|model.onnx")
    domain: str = option(
        "",
        "of an adapted model: cache of the images that it is for (default: Stage 1's own map)",
        metavar="CACHE.h5",
    )
    overwrite: bool = option(False, "replace an existing file")


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes
    ----------
    path : Path
    threshold : float or (K,)
        That labels are chosen by.
    decision : str
        The head's own rule.
    exact : bool
        Whether the threshold is that rule. Label sets of the highest expected F-beta are no
        cut; then the file chooses by the best cut, which the head keeps as well.
    """

    path: Path
    threshold: float | np.ndarray
    decision: str
    exact: bool


def export(config: ExportConfig) -> Export:
    """Write the network with the tuned head as its last layer.

    Its probabilities are those of the head on the plain view of an image (view 0 of a cache), whose
    features a cache rounds to float16. An adapted model is frozen for one domain before, unless
    the file holds such a head: two linear heads, a mixing weight, and maybe a bias.

    Raises
    ------
    ValueError
        If the file is no head, or not of that run's network, or `domain` is given to a head that
        is the same everywhere.
    MissingExtra
        If torch, or for ONNX what writes it, is not installed.
    """
    refuse_existing(config.out, config.overwrite, [config.content, config.domain])
    head = load(config.content)
    if not isinstance(head, Head):
        raise ValueError(f"{config.content}: is a blend; export its heads one by one")
    threshold, exact = cut_of(head)
    with_torch()
    from featcache.exporting import own_layer, put_back, write_program
    from featcache.runs import Run

    run = Run.open(config.run)
    network = run.load_network()
    own = own_layer(run, network)
    if head.network_id != own.network_id:
        fitted_on = f"{config.content} was fitted on network {short(head.network_id)}"
        if name := head.provenance.get("network"):
            fitted_on += f" ({name})"
        raise ValueError(
            f"{config.run}: is network {short(own.network_id)}, but {fitted_on}; give the run that "
            "its caches were extracted with (a head on several networks side by side, or on "
            "features with --domain-statistics, cannot be exported)"
        )
    if isinstance(head.estimator, AdaptedModel):
        head = replace(head, estimator=frozen(head.estimator, config.domain, own.network_id))
    elif config.domain:
        raise ValueError(f"--domain {config.domain}: {config.content} is the same in all domains")
    else:
        head.complete(own.weight)
    exported = put_back(run, network, tuned(head, threshold))
    rule = own_rule(head)
    decision = "by the threshold" if rule is None else described(rule)
    about = {
        "classes": head.classes.tolist(),
        "network_id": own.network_id,
        "decision of the head": decision,
        "chosen as the head does": exact,
        "command": command_line("heads export", config, config.content),
    }
    path = write_program(exported, config.out, about, head.names)
    return Export(path, threshold, decision, exact)


def cut_of(head: Head) -> tuple[float | np.ndarray, bool]:
    """The threshold (one, or one a class) to choose labels by, and whether the head does so, too.

    Raises
    ------
    ValueError
        If the head has none.
    """
    rule = own_rule(head)
    if isinstance(rule, (GlobalThreshold, PerClassThreshold)):
        free = rule.min_labels == 0 and rule.max_labels is None
        if isinstance(rule, PerClassThreshold):
            return rule.thresholds_, free
        return rule.threshold_, free
    if "threshold" in head.provenance:
        return float(head.provenance["threshold"]), rule is None
    if rule is None or "target" not in head.oof:
        raise ValueError(
            "the head has no threshold to cut at; make it with `heads fit`, or keep out-of-fold "
            "scores or a threshold with it"
        )
    scores, beta = head.oof["target"], float(head.provenance.get("beta", 2))
    best = best_global_threshold(scores.proba, scores.Y, beta, scores.mask, missed=scores.missed)
    return best[0], False


def frozen(model: AdaptedModel, domain: str, network_id: str) -> DomainHead:
    """An adapted model for the images of a cache, or with Stage 1's own map for none."""
    if not domain:
        return model.for_domain(None)
    cache = FeatureCache(domain)
    if cache.network_id != network_id:
        raise ValueError(
            f"{domain}: is of network {short(str(cache.network_id))}, but the model was "
            f"adapted for network {short(network_id)}; give a cache that this run extracted"
        )
    return model.for_domain(cache.features[cache.valid])


def tuned(head: Head, threshold: float | np.ndarray) -> TunedHead:
    """The arrays that make a head's probabilities; see :class:`featcache.exporting.TunedHead`."""
    from featcache.exporting import TunedHead

    estimator: Any = head.estimator
    if isinstance(estimator, DomainHead):
        adapted, source = (
            TunedHead(part.head.W, part.head.b, threshold, head.classes)
            for part in (estimator.adapted, estimator.source)
        )
        share = estimator.gate_ * estimator.share
        return replace(adapted, other=source, share=share, moved=estimator.bias)
    extra: dict[str, Any] = {}
    scaling: PlattScaling | None = getattr(estimator, "calibration_", None)
    if scaling is not None:
        extra |= {"slope": scaling.slope, "intercept": scaling.intercept}
    elif isinstance(estimator, (DropoutLogistic, DropoutLogisticCV)):
        change = estimator.coef_
        if estimator.coef_init_ is not None:
            change = change - estimator.coef_init_
        rho = np.broadcast_to(rho_from_dropout(estimator.dropout_), len(change))
        extra["variance"] = change**2 * rho[:, None]
    else:
        extra["clipped"] = True
    return TunedHead(estimator.coef_, estimator.intercept_, threshold, head.classes, **extra)
