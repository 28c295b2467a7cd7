"""How is a fitted decision rule kept in a group of an HDF5 file, and read back to the same bits?

Each part (the rule, its calibration, its shift) is a group:

======================  ===========================================================
attribute ``class``     one of :data:`PARTS`; nothing else is ever made of a file
attribute ``params``    plain parameters (JSON); a splitter is told by its name only
attribute ``fitted``    fitted numbers (JSON)
``params``, ``fitted``  groups of what is not plain: arrays (K,), tables and parts
======================  ===========================================================
"""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from numbers import Integral
from typing import Any

import h5py
import numpy as np
from sklearn.base import BaseEstimator

from heads.calibration import PlattCalibration
from heads.chain import CalibratedDecision
from heads.decisions import Decision, ExpectedFBeta, GlobalThreshold, PerClassThreshold
from heads.platt import PlattScaling
from heads.shift import PriorShift, ShiftDiagnosis

PARTS = {
    cls.__name__: cls
    for cls in (
        CalibratedDecision,
        ExpectedFBeta,
        GlobalThreshold,
        PerClassThreshold,
        PlattCalibration,
        PriorShift,
    )
}
_RECORDS = {"shared_": PlattScaling, "diagnosis_": ShiftDiagnosis}
_OF_LAST_IMAGES = frozenset({"expected_", "bound_"})


def write_decision(group: h5py.Group, rule: Decision) -> None:
    """Write a fitted rule into an empty group.

    Raises
    ------
    ValueError
        If the rule or a part of it is of a class unknown here, or the rule is not fitted.
    """
    if not hasattr(rule, "n_features_in_"):
        raise ValueError(f"the {type(rule).__name__} is not fitted; fit it on out-of-fold scores")
    _write_part(group, rule)


def _write_part(group: h5py.Group, part: BaseEstimator) -> None:
    name = type(part).__name__
    if PARTS.get(name) is not type(part):
        raise ValueError(f"cannot store a {name} in a decision; only {', '.join(PARTS)}")
    group.attrs["class"] = name
    fitted = {k: v for k, v in vars(part).items() if k.endswith("_") and k not in _OF_LAST_IMAGES}
    for where, values in (("params", plain_params(part)), ("fitted", fitted)):
        plain = {}
        for key, value in values.items():
            if isinstance(value, BaseEstimator):
                _write_part(group.create_group(f"{where}/{key}"), value)
            elif isinstance(value, np.ndarray):
                group[f"{where}/{key}"] = value
            elif isinstance(value, dict):
                for column, numbers in value.items():
                    group[f"{where}/{key}/{column}"] = numbers
            else:
                plain[key] = plain_value(value)
        group.attrs[where] = json.dumps(plain)


def read_decision(group: h5py.Group, n_labels: int) -> Decision:
    """A rule that gives the same label sets as the one that was written.

    Raises
    ------
    ValueError, KeyError, TypeError
        If the group is damaged, or the rule is one of another number of labels.
    """
    rule = _read_part(group, n_labels)
    if not isinstance(rule, Decision):
        raise ValueError(f"a {type(rule).__name__} is no decision")
    if getattr(rule, "n_features_in_", None) != n_labels:
        raise ValueError(f"the decision is not one of {n_labels} labels")
    return rule


def _read_part(group: h5py.Group, n_labels: int) -> Any:
    cls = PARTS[group.attrs["class"]]
    params, fitted = (_read_values(group, where, n_labels) for where in ("params", "fitted"))
    part = cls(**params)
    for key, value in fitted.items():
        record = _RECORDS.get(key)
        setattr(part, key, value if record is None or value is None else record(**value))
    if fitted:  # what predict needs is missed here already
        missing = {key for key in cls.__annotations__ if key.endswith("_")} - fitted.keys()
        if missing := missing - _OF_LAST_IMAGES:
            raise KeyError(f"{cls.__name__} lacks {', '.join(sorted(missing))}")
    return part


def _read_values(group: h5py.Group, where: str, n_labels: int) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(group.attrs[where])
    for key, item in group.get(where, {}).items():
        if isinstance(item, h5py.Group) and "class" in item.attrs:
            values[key] = _read_part(item, n_labels)
        elif isinstance(item, h5py.Group):
            values[key] = {column: numbers[()] for column, numbers in item.items()}
        else:
            values[key] = item[()]
            if values[key].shape != (n_labels,):
                raise ValueError(f"{key} has shape {values[key].shape}; expected ({n_labels},)")
    return values


def plain_params(estimator: BaseEstimator) -> dict[str, Any]:
    """Parameters as JSON and estimators; a splitter or given folds are told by their name only."""
    params = estimator.get_params(deep=False)
    if "cv" in params and not isinstance(params["cv"], (Integral, str, type(None))):
        params["cv"] = type(params["cv"]).__name__
    return {key: plain_value(value) for key, value in params.items()}


def plain_value(value: Any) -> Any:
    """Numbers, lists, texts and records as JSON has them; all else as it is."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        return [plain_value(v) for v in value]
    return value
