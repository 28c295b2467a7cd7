"""Fit, blend and cut dropout-regularised linear and logistic heads on image embeddings."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from heads.adaptation import Adaptation
    from heads.alignment import DomainAlignment
    from heads.blending import Blend
    from heads.calibration import PlattCalibration, reliability
    from heads.chain import CalibratedDecision
    from heads.decisions import ExpectedFBeta, GlobalThreshold, PerClassThreshold
    from heads.domains import TwoDomainCV
    from heads.folds import MultilabelGroupKFold
    from heads.galleries import gallery
    from heads.labeltable import label_table
    from heads.logistic import DropoutLogistic, DropoutLogisticCV
    from heads.metrics import bootstrap_interval, fbeta_per_image, mean_fbeta
    from heads.nested import cross_val_fbeta
    from heads.ridge import DropoutRidge, DropoutRidgeCV
    from heads.shift import PriorShift

# Names are imported when first used: scikit-learn alone takes most of a second to load.
_HOMES = {
    "Adaptation": "adaptation",
    "Blend": "blending",
    "CalibratedDecision": "chain",
    "DomainAlignment": "alignment",
    "DropoutLogistic": "logistic",
    "DropoutLogisticCV": "logistic",
    "DropoutRidge": "ridge",
    "DropoutRidgeCV": "ridge",
    "ExpectedFBeta": "decisions",
    "GlobalThreshold": "decisions",
    "MultilabelGroupKFold": "folds",
    "PerClassThreshold": "decisions",
    "PlattCalibration": "calibration",
    "PriorShift": "shift",
    "TwoDomainCV": "domains",
    "bootstrap_interval": "metrics",
    "cross_val_fbeta": "nested",
    "fbeta_per_image": "metrics",
    "gallery": "galleries",
    "label_table": "labeltable",
    "mean_fbeta": "metrics",
    "reliability": "calibration",
}

__all__ = [
    "Adaptation",
    "Blend",
    "CalibratedDecision",
    "DomainAlignment",
    "DropoutLogistic",
    "DropoutLogisticCV",
    "DropoutRidge",
    "DropoutRidgeCV",
    "ExpectedFBeta",
    "GlobalThreshold",
    "MultilabelGroupKFold",
    "PerClassThreshold",
    "PlattCalibration",
    "PriorShift",
    "TwoDomainCV",
    "bootstrap_interval",
    "cross_val_fbeta",
    "fbeta_per_image",
    "gallery",
    "label_table",
    "mean_fbeta",
    "reliability",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'heads' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"heads.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
