"""Watch validation while training: loss and mean per-image F2 at the best of a grid of cuts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch.nn import functional

from featcache.errors import InputError

BETA_SQUARED = 4.0
CUTS = tuple(np.round(np.geomspace(0.02, 0.8, 48), 6).tolist())


@dataclass
class Targets:
    """Labels of a batch on the device.

    Attributes
    ----------
    values : tensor of float32, shape (b, K)
        Confidence of each label.
    known : tensor of bool, shape (b, K), or None
        Where a label counts; None: everywhere.
    outside : tensor of float32, shape (b,)
        True labels that the network has no class for.
    """

    values: torch.Tensor
    known: torch.Tensor | None
    outside: torch.Tensor


class TargetSource:
    """Targets of rows, sent to the device as label indices and scattered there.

    Parameters
    ----------
    positives : csr_matrix of shape (n, K)
        Confidences.
    negatives : csr_matrix or None
        Verified negatives; used when unlisted labels are unknown.
    unlisted_known : bool
        Whether a label in neither matrix is a negative.
    outside : ndarray of shape (n,)
        True labels outside the classes.
    """

    def __init__(
        self,
        positives: csr_matrix,
        negatives: csr_matrix | None,
        unlisted_known: bool,
        outside: np.ndarray,
    ) -> None:
        self.positives = positives
        self.negatives = negatives
        self.unlisted_known = unlisted_known
        self.outside = outside

    def _scatter(self, matrix: csr_matrix, rows: np.ndarray, device: torch.device) -> torch.Tensor:
        chosen = matrix[rows]
        flat = np.repeat(np.arange(len(rows)), np.diff(chosen.indptr)) * matrix.shape[1]
        index = torch.from_numpy(flat + chosen.indices).to(device, non_blocking=True)
        data = torch.from_numpy(chosen.data.astype(np.float32)).to(device, non_blocking=True)
        dense = torch.zeros(len(rows) * matrix.shape[1], device=device)
        return dense.index_copy_(0, index, data).view(len(rows), matrix.shape[1])

    def __call__(self, rows: np.ndarray, device: torch.device) -> Targets:
        """Targets of some rows."""
        values = self._scatter(self.positives, rows, device)
        known = None
        if not self.unlisted_known:
            known = values > 0
            if self.negatives is not None:
                known |= self._scatter(self.negatives, rows, device) > 0
        outside = torch.from_numpy(self.outside[rows].astype(np.float32)).to(device)
        return Targets(values, known, outside)


def summed_loss(logits: torch.Tensor, targets: Targets, smoothing: float = 0.0) -> torch.Tensor:
    """Binary cross-entropy summed over known classes, shape (b,).

    The mean over thousands of classes would divide the gradient away.
    """
    values = targets.values
    if smoothing:
        values = values * (1 - smoothing) + smoothing / 2
    loss = functional.binary_cross_entropy_with_logits(logits, values, reduction="none")
    if targets.known is not None:
        loss = loss * targets.known
    return loss.sum(1)


class Score:
    """Running sums of loss and per-image F2 at every cut of the grid.

    sum_i (1 + b^2) TP_i / (b^2 |y_i| + |yhat_i|) for each cut: sums add over
    batches and over processes. An image without true and predicted labels counts as 1.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuts = torch.tensor(CUTS, device=device)
        # Rounding in long sums of float32 would depend on the order; float64 is cheap here.
        self.f_sums = torch.zeros(len(CUTS), dtype=torch.float64, device=device)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.count = 0

    def update(self, logits: torch.Tensor, targets: Targets) -> None:
        """Add a batch."""
        truth = targets.values >= 0.5
        probabilities = torch.sigmoid(logits)
        if targets.known is not None:
            probabilities = probabilities.masked_fill(~targets.known, -1.0)
        n_true = truth.sum(1) + targets.outside
        for c, cut in enumerate(self.cuts):
            predicted = probabilities >= cut
            tp = (predicted & truth).sum(1)
            denominator = BETA_SQUARED * n_true + predicted.sum(1)
            f = torch.where(denominator > 0, (1 + BETA_SQUARED) * tp / denominator, 1.0)
            self.f_sums[c] += f.sum(dtype=torch.float64)
        self.loss_sum += summed_loss(logits, targets).sum(dtype=torch.float64)
        self.count += len(logits)

    def result(self) -> dict[str, float]:
        """Mean loss, the best F2 of the grid, and its cut.

        Raises
        ------
        InputError
            If no image was scored.
        """
        if not self.count:
            raise InputError("none of the held-out images can be read; check the files in --images")
        best = int(torch.argmax(self.f_sums))
        return {
            "loss": self.loss_sum.item() / self.count,
            "f2": self.f_sums[best].item() / self.count,
            "threshold": CUTS[best],
        }
