"""How is an adapted model kept in a group of an HDF5 file, and read back to the same bits?

==================================  ================================================
attribute ``facts``                 numbers, the test for label shift, the constants (JSON)
``network/W``, ``network/b``        the network's own last layer
``targets/MOMENTS/W``, ``b``        the head on features that were mapped by these moments
``DOMAIN_moments/every``, ``first``  (2, d) mean and standard deviation over all views, the first
``rates``                           (K,) of the labels in the known domains, NaN unknown
``DOMAIN_calibration``              (2, K) slope and intercept; DOMAIN is source or target
==================================  ================================================

The decision is kept by the head that the model is part of.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import h5py
import numpy as np

from heads.alignment import MOMENTS, Moments
from heads.decisions import Decision, ExpectedFBeta
from heads.domain_heads import AdaptedModel, DomainConfig, DomainMoments
from heads.experts import Linear
from heads.gate import GateConfig
from heads.labelshift import LabelShiftTest

_NUMBERS = (
    "source_first",
    "target_first",
    "share",
    "sure_home",
    "sure_target",
    "labels_per_image",
)


def write_adapted(group: h5py.Group, model: AdaptedModel) -> None:
    """Write a model into an empty group."""
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


def read_adapted(group: h5py.Group, n_labels: int, decision: Decision | None) -> AdaptedModel:
    """A model that gives the same predictions as the one that was written.

    Raises
    ------
    ValueError, KeyError, TypeError
        If the group is damaged.
    """
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
