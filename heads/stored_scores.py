"""How are out-of-fold scores, and what is true of their images, kept in a group of an HDF5 file?

``/oof/DOMAIN`` holds ``ids``, ``proba`` (n, K) float32, the labels that are true (``indptr``,
``indices``), the number of true labels outside the classes (``missed``), and maybe ``mask`` and
``groups``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from scipy.sparse import csr_matrix


@dataclass
class OutOfFold:
    """Held-out probabilities of the labelled images of one domain, and their labels.

    Attributes
    ----------
    ids : (n,) str
    proba : (n, K) float32
    Y : (n, K) CSR
        True labels.
    missed : (n,) int
        True labels outside the K classes.
    mask : (n, K) bool or None
        True where a label is unknown.
    groups : (n,) int or None
        Images that belong together, in all domains of a file; None: each is by itself.
    """

    ids: np.ndarray
    proba: np.ndarray
    Y: csr_matrix
    missed: np.ndarray
    mask: np.ndarray | None = None
    groups: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> OutOfFold:
        """Some of the images."""
        some = (self.ids[rows], self.proba[rows], self.Y[rows], self.missed[rows])
        maybe = [None if part is None else part[rows] for part in (self.mask, self.groups)]
        return OutOfFold(*some, *maybe)

    def known(self) -> dict[str, Any]:
        """What of its images a score must know beside their labels, as arguments."""
        return {"mask": self.mask, "missed": self.missed, "groups": self.groups}

    def differs(self, other: OutOfFold) -> bool:
        """Whether other labels are true, unknown or outside the classes for the same images."""
        if (self.Y != other.Y).nnz or not np.array_equal(self.missed, other.missed):
            return True
        masks = [np.zeros((), bool) if part.mask is None else part.mask for part in (self, other)]
        return bool((masks[0] != masks[1]).any())

    @property
    def units(self) -> int:
        """How many images or, where there are groups, groups can be told apart."""
        return len(self.ids) if self.groups is None else len(np.unique(self.groups))


def write_oof(group: h5py.Group, oof: Mapping[str, OutOfFold]) -> None:
    """Write the scores of every domain."""
    for domain, scores in oof.items():
        part = group.create_group(f"oof/{domain}")
        put_strings(part, "ids", scores.ids)
        part["proba"] = scores.proba.astype(np.float32, copy=False)
        part["indptr"] = scores.Y.indptr
        part["indices"] = scores.Y.indices
        part["missed"] = scores.missed
        if scores.mask is not None:
            part.create_dataset("mask", data=scores.mask, compression="gzip")
        if scores.groups is not None:
            part["groups"] = scores.groups


def read_oof(group: h5py.Group, mapped: bool = False) -> dict[str, OutOfFold]:
    """The scores by domain; empty where there are none. `mapped`: not read until they are used."""
    oof = {}
    for domain, part in group.get("oof", {}).items():
        proba = _mapped(part["proba"]) if mapped else part["proba"][()]
        indices = part["indices"][()]
        ones = np.ones(len(indices), np.float32)
        Y = csr_matrix((ones, indices, part["indptr"][()]), shape=proba.shape)
        mask = part["mask"][()] if "mask" in part else None
        groups = part["groups"][()] if "groups" in part else None
        oof[domain] = OutOfFold(strings(part, "ids"), proba, Y, part["missed"][()], mask, groups)
    return oof


def _mapped(values: h5py.Dataset) -> np.ndarray:
    """A dataset as part of its file, which stays readable when the HDF5 file is closed."""
    offset = values.id.get_offset()  # None of an empty one, or one in chunks
    if offset is None:
        return np.asarray(values[()])
    return np.memmap(values.file.filename, values.dtype, "r", offset, values.shape)


def put_strings(group: h5py.Group, name: str, values: np.ndarray) -> None:
    """Write texts as utf-8."""
    encoded = [str(value).encode("utf-8") for value in values]
    group.create_dataset(
        name, data=encoded, dtype=h5py.string_dtype("utf-8"), shape=(len(encoded),)
    )


def strings(group: h5py.Group, name: str) -> np.ndarray:
    """(n,) str."""
    values = group[name].asstr()[()]
    return np.array(values.tolist(), dtype=str)
