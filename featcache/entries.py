"""Which labels do several files name, and with what confidence, when the earlier file counts?"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from zipfile import BadZipFile

import numpy as np

from featcache.errors import InputError
from featcache.labelfiles import Codes, Doubtful, read_entries


class Entries:
    """Labels of all files read so far: sorted, different keys with their confidences.

    Attributes
    ----------
    ids, classes : Codes
        Numbers of images and classes, in the order in which they first appeared.
    keys : ndarray of int64
        Image << 32 | class of each entry, sorted.
    confidences : ndarray of float32
        Of each entry; 0 is a verified negative.
    doubtful : dict of str to str
        Class ids that end in what may have been meant to separate them, and where they are.
    """

    def __init__(self) -> None:
        self.ids = Codes("an image id")
        self.classes = Codes("a class id", spaces=False)
        self.keys = np.zeros(0, np.int64)
        self.confidences = np.zeros(0, np.float32)
        self.doubtful: Doubtful = {}

    @classmethod
    def read(cls, paths: Sequence[str | os.PathLike[str]]) -> Entries:
        """Label files of any mix of formats, the most trusted first.

        Raises
        ------
        InputError
            In one line with file, line number and what was expected.
        """
        entries = cls()
        for path in paths:
            entries.merge(*read_entries(path, entries.ids, entries.classes, entries.doubtful))
        return entries

    def refuse_separators(self, listed: np.ndarray | None) -> None:
        """``/m/a, /m/b``: the comma would become part of a class id, and the label be lost.

        Raises
        ------
        InputError
            If a doubtful class id is not among those `listed`.
        """
        known = set() if listed is None else set(listed.tolist())
        for name, place in self.doubtful.items():
            if name not in known:
                raise InputError(
                    f"{place}: expected class ids separated by spaces alone, got {name!r}; take "
                    f"the {name[-1]!r} away (it may stay where a list of classes has just this id)"
                )

    def merge(self, images: array, labels: array, confidences: array) -> None:
        """Add a file; what is there already stays, repeats within it keep the maximum."""
        keys = np.frombuffer(images, np.int32).astype(np.int64)
        keys <<= 32
        keys |= np.frombuffer(labels, np.int32)
        order = np.argsort(keys)
        keys = keys[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        if not len(starts):
            return
        values = np.maximum.reduceat(np.frombuffer(confidences, np.float32)[order], starts)
        keys = np.concatenate([self.keys, keys[starts]])
        values = np.concatenate([self.confidences, values])
        order = np.argsort(keys, kind="stable")  # stable: the earlier file comes first
        keys = keys[order]
        first = np.diff(keys, prepend=-1) != 0
        self.keys, self.confidences = keys[first], values[order[first]]

    @property
    def rows(self) -> np.ndarray:
        """Number of the image of each entry, int64."""
        return self.keys >> 32

    @property
    def columns(self) -> np.ndarray:
        """Number of the class of each entry, int32."""
        return self.keys.astype(np.int32)  # the low 32 bits

    def strange(self, classes: np.ndarray, ids: np.ndarray) -> list[str]:
        """Positive labels of some images that are none of `classes`, as they first appeared."""
        names = np.array(list(self.classes), dtype=np.str_)
        others = ~np.isin(names, classes)
        chosen = np.isin(np.array(list(self.ids), dtype=np.str_), ids)
        found = (self.confidences > 0) & others[self.columns] & chosen[self.rows]
        strangers: list[str] = names[np.unique(self.columns[found])].tolist()
        return strangers

    def pack(self) -> dict[str, np.ndarray]:
        """Arrays that hold all of it, about 5 bytes an entry and 17 an image.

        Confidences are numbers of the few values that there are, where they are few.
        """
        values, codes = np.unique(self.confidences, return_inverse=True)
        few = len(values) <= 256
        wide = np.uint16 if len(self.classes) <= 65536 else np.uint32
        counts = np.bincount(self.rows, minlength=len(self.ids))
        return {
            "ids": _joined(self.ids),
            "classes": _joined(self.classes),
            "counts": counts.astype(np.uint32),
            "columns": self.columns.astype(wide),
            "values": values if few else np.zeros(0, np.float32),
            "confidences": codes.astype(np.uint8) if few else self.confidences,
        }

    @classmethod
    def unpack(cls, path: str | os.PathLike[str]) -> Entries | None:
        """What :meth:`pack` made, from a ``.npz`` file; None if the file is not whole."""
        try:
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                parts = {name: file[name] for name in file.files}
            entries = cls()
            for codes, name in ((entries.ids, "ids"), (entries.classes, "classes")):
                text = parts[name].tobytes().decode("utf-8")
                codes.update((word, code) for code, word in enumerate(text.split("\n")) if word)
            rows = np.repeat(np.arange(len(parts["counts"]), dtype=np.int64), parts["counts"])
            entries.keys = rows << 32 | parts["columns"].astype(np.int64)
            few, confidences = parts["values"], parts["confidences"]
            entries.confidences = few[confidences] if len(few) else confidences
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, InputError):
            return None
        return entries


def _joined(words: Codes) -> np.ndarray:
    """Words, none of which can hold a line break, as bytes."""
    return np.frombuffer("\n".join(words).encode("utf-8"), np.uint8)
