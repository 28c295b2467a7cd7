"""How is an adapted model kept in a group of an HDF5 file, and read back to the same bits?

A model for any domain:

==================================  ================================================
attribute ``facts``                 numbers, the test for label shift, the constants (JSON)
``network/W``, ``network/b``        the network's own last layer
``targets/MOMENTS/W``, ``b``        the head on features that were mapped by these moments
``DOMAIN_moments/every``, ``first``  (2, d) mean and standard deviation over all views, the first
``rates``                           (K,) of the labels in the known domains, NaN unknown
``DOMAIN_calibration``              (2, K) slope and intercept; DOMAIN is source or target
==================================  ================================================

The decision is kept by the head that the model is part of.

Its head for one domain, which decides by itself:

==================================  ================================================
attribute ``frozen``                gate, share, weights of the first views, signs and steps (JSON)
``adapted/W``, ``b``; ``source``    the two linear heads
``bias``                            (K,), where labelled rows moved the logits
``decision``                        see :mod:`heads.stored_decisions`
==================================  ================================================
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import h5py
import numpy as np

from heads.alignment import MOMENTS, Moments
from heads.decisions import Decision, ExpectedFBeta
from heads.domain_heads import AdaptedModel, DomainConfig, DomainHead, DomainMoments
from heads.experts import Linear
from heads.gate import Gate, GateConfig
from heads.labelshift import LabelShiftTest
from heads.steps import Step
from heads.stored_decisions import read_decision, write_decision
from heads.viewed import ViewedHead

ADAPTED = (AdaptedModel, DomainHead)

_NUMBERS = (
    "source_first",
    "target_first",
    "share",
    "sure_home",
    "sure_target",
    "labels_per_image",
)


def write_adapted(group: h5py.Group, model: AdaptedModel | DomainHead) -> None:
    """Write a model into an empty group.

    Raises
    ------
    ValueError
        If the head of a domain decides by a rule of a class that cannot be stored.
    """
    if isinstance(model, DomainHead):
        _write_frozen(group, model)
    else:
        _write_model(group, model)


def read_adapted(
    group: h5py.Group, n_labels: int, decision: Decision | None
) -> AdaptedModel | DomainHead:
    """A model that gives the same predictions as the one that was written.

    Raises
    ------
    ValueError, KeyError, TypeError
        If the group is damaged.
    """
    if is_frozen(group):
        return _read_frozen(group, n_labels)
    return _read_model(group, n_labels, decision)


def is_frozen(group: h5py.Group) -> bool:
    """Whether the group holds the head of one domain, not a model for any."""
    return "frozen" in group.attrs


def steps_of(group: h5py.Group) -> tuple[Step, ...]:
    """What was done to the one domain, and why."""
    return tuple(Step(*texts) for texts in json.loads(group.attrs["frozen"])["steps"])


# ------------------------------------------------------------------ for one domain


def _write_frozen(group: h5py.Group, head: DomainHead) -> None:
    facts: dict[str, Any] = {"gate": float(head.gate_), "share": float(head.share)}
    facts["signs"] = {name: float(value) for name, value in asdict(head.signs).items()}
    facts["steps"] = [[step.step, step.effect, step.reason] for step in head.steps]
    for name, part in (("adapted", head.adapted), ("source", head.source)):
        group[f"{name}/W"], group[f"{name}/b"] = part.head.W, part.head.b
        facts[f"{name}_first"] = float(part.first)
    if head.bias is not None:
        group["bias"] = head.bias
    write_decision(group.create_group("decision"), head.decision)
    group.attrs["frozen"] = json.dumps(facts)


def _read_frozen(group: h5py.Group, n_labels: int) -> DomainHead:
    facts = json.loads(group.attrs["frozen"])
    bias = group["bias"][()] if "bias" in group else None
    if bias is not None and bias.shape != (n_labels,):
        raise ValueError(f"bias has shape {bias.shape}; expected ({n_labels},)")
    adapted, source = (
        ViewedHead(_head(group, name, n_labels), facts[f"{name}_first"])
        for name in ("adapted", "source")
    )
    if adapted.head.W.shape != source.head.W.shape:
        raise ValueError("the two heads do not have the same features")
    return DomainHead(
        adapted=adapted,
        source=source,
        gate_=facts["gate"],
        share=facts["share"],
        bias=bias,
        decision=read_decision(group["decision"], n_labels),
        signs=Gate(**facts["signs"]),
        steps=steps_of(group),
    )


# ------------------------------------------------------------------- for any domain


def _write_model(group: h5py.Group, model: AdaptedModel) -> None:
    facts: dict[str, Any] = {name: float(getattr(model, name)) for name in _NUMBERS}
    facts |= {"config": asdict(model.config), "label_shift": asdict(model.label_shift)}
    facts["moments"] = list(model.targets)
    for name, head in {"network": model.network, **_named(model.targets)}.items():
        group[f"{name}/W"], group[f"{name}/b"] = head.W, head.b
    for domain in ("source", "target"):
        known: DomainMoments = getattr(model, f"{domain}_moments")
        for name in ("every", "first"):
            moments: Moments = getattr(known, name)
            group[f"{domain}_moments/{name}"] = np.stack([moments.mean, moments.std])
        facts[f"{domain}_images"], facts[f"{domain}_views"] = known.every.images, known.views
        group[f"{domain}_calibration"] = np.stack(getattr(model, f"{domain}_calibration"))
    group["rates"] = model.rates
    group.attrs["facts"] = json.dumps(facts)


def _read_model(group: h5py.Group, n_labels: int, decision: Decision | None) -> AdaptedModel:
    facts = json.loads(group.attrs["facts"])
    facts.setdefault("labels_per_image", 0.0)  # older files predict as they did
    config = {"counted": 0.0} | facts["config"]
    gate = {"doubt": 0.0} | config.pop("gate")
    gate["familiar"] = tuple(gate["familiar"])
    network = _head(group, "network", n_labels)
    if not facts["moments"] or not set(facts["moments"]) <= set(MOMENTS):
        raise ValueError(f"the moments are {facts['moments']}")
    targets = {name: _head(group, f"targets/{name}", n_labels) for name in facts["moments"]}
    d = network.W.shape[1]
    if any(head.W.shape[1] != d for head in targets.values()):
        raise ValueError(f"the heads do not all have {d} features")
    if decision is None:  # within a blend, which decides
        decision = ExpectedFBeta(config["beta"])
        decision.n_features_in_ = n_labels
    return AdaptedModel(
        network=network,
        targets=targets,
        source_moments=_moments(group, "source", facts, d),
        target_moments=_moments(group, "target", facts, d),
        source_calibration=_calibration(group, "source", n_labels),
        target_calibration=_calibration(group, "target", n_labels),
        rates=_rates(group, n_labels),
        label_shift=LabelShiftTest(**facts["label_shift"]),
        decision=decision,
        config=DomainConfig(gate=GateConfig(**gate), **config),
        **{name: facts[name] for name in _NUMBERS},
    )


def _named(targets: dict[str, Linear]) -> dict[str, Linear]:
    return {f"targets/{moments}": head for moments, head in targets.items()}


def _head(group: h5py.Group, name: str, n_labels: int) -> Linear:
    W, b = group[f"{name}/W"][()], group[f"{name}/b"][()]
    if W.ndim != 2 or len(W) != n_labels or b.shape != (n_labels,):
        raise ValueError(f"{name} has shapes {W.shape} and {b.shape}; expected {n_labels} labels")
    return Linear(W, b)


def _moments(group: h5py.Group, domain: str, facts: dict[str, Any], d: int) -> DomainMoments:
    found = []
    for name in ("every", "first"):
        mean, std = _pair(group, f"{domain}_moments/{name}", d)
        found.append(Moments(mean, std, facts[f"{domain}_images"]))
    return DomainMoments(found[0], found[1], facts[f"{domain}_views"])


def _calibration(group: h5py.Group, domain: str, n_labels: int) -> tuple[np.ndarray, np.ndarray]:
    slope, intercept = _pair(group, f"{domain}_calibration", n_labels)
    return slope, intercept


def _rates(group: h5py.Group, n_labels: int) -> np.ndarray:
    rates: np.ndarray = group["rates"][()]
    if rates.shape != (n_labels,):
        raise ValueError(f"rates has shape {rates.shape}; expected ({n_labels},)")
    return rates


def _pair(group: h5py.Group, name: str, length: int) -> np.ndarray:
    values: np.ndarray = group[name][()]
    if values.shape != (2, length):
        raise ValueError(f"{name} has shape {values.shape}; expected (2, {length})")
    return values
