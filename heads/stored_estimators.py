"""How is a fitted estimator kept in the group of its head, all but its coefficients?

==============================  ====================================================
attribute ``estimator``         class, its parameters, its scalar fitted values (JSON)
attribute ``calibration``       slope and intercept, where there are any (JSON)
``/fitted/...``                 other fitted arrays (``intercept_`` ...)
``/cv/...``                     the table of the cross-validation
==============================  ====================================================
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import h5py
import numpy as np

from heads.base import label_numbers
from heads.logistic import DropoutLogistic, DropoutLogisticCV
from heads.platt import PlattScaling
from heads.ridge import DropoutRidge, DropoutRidgeCV
from heads.stored_adaptation import ADAPTED
from heads.stored_decisions import plain_params, plain_value

ESTIMATORS = {
    cls.__name__: cls for cls in (DropoutRidge, DropoutRidgeCV, DropoutLogistic, DropoutLogisticCV)
}
# Kept in places of their own, or a function of others.
_APART = frozenset({"coef_", "coef_init_", "cv_results_", "calibration_", "classes_"})


def write_estimator(group: h5py.Group, estimator: Any) -> None:
    """Write all but the coefficients into the group of a head.

    Raises
    ------
    ValueError
        If the estimator is of a class unknown here, not fitted, or of a binary target.
    """
    name = type(estimator).__name__
    if name not in ESTIMATORS:
        known = [*ESTIMATORS, *(cls.__name__ for cls in ADAPTED)]
        raise ValueError(f"cannot store a {name}; only {', '.join(known)}")
    if not hasattr(estimator, "intercept_"):
        raise ValueError(f"the {name} is not fitted; fit it before it is stored")
    if estimator._binary:
        raise ValueError(f"cannot store a {name} of a 1-D target; fit it with Y[:, None]")
    fitted = {k: v for k, v in vars(estimator).items() if k.endswith("_") and k not in _APART}
    fitted = {k: v for k, v in fitted.items() if not k.startswith("oof_")}
    scalars = {k: plain_value(v) for k, v in fitted.items() if np.ndim(v) == 0}
    spec = {"class": name, "params": plain_params(estimator), "fitted": scalars}
    group.attrs["estimator"] = json.dumps(spec)
    for key, value in fitted.items():
        if np.ndim(value):
            group[f"fitted/{key}"] = value
    if getattr(estimator, "calibration_", None) is not None:
        group.attrs["calibration"] = json.dumps(asdict(estimator.calibration_))
    for key, value in getattr(estimator, "cv_results_", {}).items():
        group[f"cv/{key}"] = value


def read_estimator(group: h5py.Group, n_labels: int) -> Any:
    """The estimator that was written, without its coefficients."""
    spec = json.loads(group.attrs["estimator"])
    estimator = ESTIMATORS[spec["class"]](**spec["params"])
    for key, value in spec["fitted"].items():
        setattr(estimator, key, value)
    for key, value in group.get("fitted", {}).items():
        text = h5py.check_string_dtype(value.dtype) is not None  # names of features
        setattr(estimator, key, value.asstr()[()] if text else value[()])
    if "calibration" in group.attrs:
        estimator.calibration_ = PlattScaling(**json.loads(group.attrs["calibration"]))
    if "cv" in group:
        estimator.cv_results_ = {key: value[()] for key, value in group["cv"].items()}
    estimator.classes_ = label_numbers(n_labels)
    estimator._binary = False
    return estimator
