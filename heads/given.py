"""What do scores of other people's models look like in files, and when are they refused?

Probabilities of images (rows) and classes (columns), in any order of either, as

======  ==================================================================================
CSV     a header ``image_id,CLASS,CLASS,...`` and a line an image: ``0a1b...,0.02,0.9,...``
HDF5    ``/ids`` (n,) and ``/classes`` (K,) utf-8, ``/scores`` (n, K) of any floating type
======  ==================================================================================

To be blended a file holds *out-of-fold* probabilities, of every labelled image that the heads
were fitted on and of no other (those of the validation images may be in it as well), and of
every class of the heads. To predict, a second file of the same name holds the new images; it may
hold more. HDF5 is read some rows at a time; a CSV file is read into memory.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

FIRST = "image_id"


@dataclass(frozen=True)
class GivenScores:
    """A model that is known by its scores alone; it stands where a head has its estimator.

    Attributes
    ----------
    name : str
        Of its file, without ending.
    sha256 : str
        Of the file of its out-of-fold scores.
    """

    name: str
    sha256: str


class ScoreFile:
    """A file of scores, checked as far as can be without reading all of it.

    Parameters
    ----------
    path : path
        HDF5, or CSV.

    Attributes
    ----------
    path : Path
    ids : (n,) str
    classes : (K,) str

    Raises
    ------
    ValueError
        Naming the file, and the line, id or class that is wrong.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{path}: no such file; give scores as CSV or HDF5")
        self._values: np.ndarray | None = None
        if h5py.is_hdf5(self.path):
            self.ids, self.classes, shape = self._read_hdf5()
        else:
            self.ids, self.classes, self._values = _read_csv(self.path)
            shape = self._values.shape
        if shape != (len(self.ids), len(self.classes)):
            raise ValueError(
                f"{path}: scores have shape {shape}, but there are {len(self.ids):,} ids and "
                f"{len(self.classes):,} classes; give one score for each image and class"
            )
        for what, names in (("image", self.ids), ("class", self.classes)):
            once, count = np.unique(names, return_counts=True)
            if count.max(initial=1) > 1:
                raise ValueError(f"{path}: {what} {str(once[count > 1][0])!r} is given twice")
        self._row = {name: row for row, name in enumerate(self.ids.tolist())}

    def _read_hdf5(self) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
        with h5py.File(self.path, "r") as file:
            for name in ("ids", "classes", "scores"):
                if name not in file:
                    raise ValueError(
                        f"{self.path}: has no /{name}; expected /ids, /classes, /scores"
                    )
            if file["scores"].dtype.kind != "f":
                raise ValueError(
                    f"{self.path}: /scores has type {file['scores'].dtype}, not floats"
                )
            try:
                ids, classes = (
                    np.array(file[name].asstr()[()].tolist(), dtype=str).reshape(-1)
                    for name in ("ids", "classes")
                )
            except TypeError as error:
                raise ValueError(f"{self.path}: /ids and /classes must be texts") from error
            return ids, classes, file["scores"].shape

    @property
    def name(self) -> str:
        """Without folder and ending."""
        return self.path.stem

    def columns(self, classes: np.ndarray) -> np.ndarray:
        """Columns of `classes`, which must be all that there are.

        Raises
        ------
        ValueError
            Naming the first class that only one side has.
        """
        for these, others, lack in (
            (self.classes, classes, "the heads have not"),
            (classes, self.classes, "it must have, as the heads do (0 where nothing is predicted)"),
        ):
            extra = np.setdiff1d(these, others)
            if len(extra):
                verb = "has scores of" if these is self.classes else "has no scores of"
                raise ValueError(f"{self.path}: {verb} class {str(extra[0])!r}, which {lack}")
        column = {name: at for at, name in enumerate(self.classes.tolist())}
        return np.array([column[name] for name in classes.tolist()], dtype=np.intp)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows of images.

        Raises
        ------
        ValueError
            Naming the first image that is missing.
        """
        try:
            return np.array([self._row[name] for name in ids.tolist()], dtype=np.intp)
        except KeyError as error:
            raise ValueError(
                f"{self.path}: has no scores of image {error.args[0]!r}; give scores of every image"
            ) from None

    def scores(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """(len(rows), len(columns)) float32.

        Raises
        ------
        ValueError
            Naming image, class and value of a score that is no probability.
        """
        if self._values is not None:
            values = self._values[rows]
        else:
            order = np.argsort(rows)
            values = np.empty((len(rows), len(self.classes)), np.float32)
            with h5py.File(self.path, "r") as file:  # whose rows are read in ascending order
                values[order] = file["scores"][rows[order]]
        P = values[:, columns]
        wrong = ~((P >= 0) & (P <= 1))  # true of NaN
        if wrong.any():
            row, label = np.argwhere(wrong)[0]
            raise ValueError(
                f"{self.path}: image {str(self.ids[rows[row]])!r}, class "
                f"{str(self.classes[columns[label]])!r}: {P[row, label]} is no probability"
            )
        return P


def _read_csv(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids: list[str] = []
    lines: list[np.ndarray] = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            if header[:1] != [FIRST] or len(header) < 2:
                raise ValueError(
                    f"{path}, line 1: expected {FIRST},CLASS,CLASS,... but it begins with "
                    f"{','.join(header)[:40]!r}"
                )
            for line in reader:
                if not line:
                    continue
                if len(line) != len(header):
                    raise ValueError(
                        f"{path}, line {reader.line_num}: has {len(line)} fields, the header "
                        f"{len(header)}"
                    )
                ids.append(line[0])
                lines.append(_numbers(path, reader.line_num, header, line))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: is neither HDF5 nor CSV ({error})") from None
    values = np.array(lines, np.float32).reshape(len(ids), len(header) - 1)
    return np.array(ids, dtype=str), np.array(header[1:], dtype=str), values


def _numbers(path: Path, number: int, header: Sequence[str], line: Sequence[str]) -> np.ndarray:
    try:
        return np.array(line[1:], dtype=np.float32)
    except ValueError:
        for name, text in zip(header[1:], line[1:], strict=True):
            try:
                float(text)
            except ValueError:
                raise ValueError(
                    f"{path}, line {number}, class {name!r}: {text!r} is no number"
                ) from None
        raise


def named_files(files: Sequence[str]) -> dict[str, str]:
    """``NAME=FILE`` or ``.../NAME.csv`` -> files by name.

    Raises
    ------
    ValueError
        If two files have one name.
    """
    found: dict[str, str] = {}
    for text in files:
        name, is_named, path = text.partition("=")
        if not is_named or os.path.exists(text):
            name, path = Path(text).stem, text
        if name in found:
            raise ValueError(f"--scores: {found[name]} and {path} are both called {name!r}")
        found[name] = path
    return found
