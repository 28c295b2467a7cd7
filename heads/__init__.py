"""Fit, blend and cut dropout-regularised linear and logistic heads on image embeddings."""

from heads.blending import Blend
from heads.decisions import GlobalThreshold
from heads.domains import TwoDomainCV
from heads.folds import MultilabelGroupKFold
from heads.logistic import DropoutLogistic, DropoutLogisticCV
from heads.metrics import bootstrap_interval, fbeta_per_image, mean_fbeta
from heads.ridge import DropoutRidge, DropoutRidgeCV

__all__ = [
    "Blend",
    "DropoutLogistic",
    "DropoutLogisticCV",
    "DropoutRidge",
    "DropoutRidgeCV",
    "GlobalThreshold",
    "MultilabelGroupKFold",
    "TwoDomainCV",
    "bootstrap_interval",
    "fbeta_per_image",
    "mean_fbeta",
]
