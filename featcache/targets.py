"""What should a network answer for some images?  Labels as tensors on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix

from featcache.annotations import Labels


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

    @classmethod
    def of(cls, labels: Labels) -> TargetSource:
        """Targets of the rows of some labels."""
        return cls(
            labels.positives, labels.negatives, labels.unlisted == "negative", labels.outside
        )

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
