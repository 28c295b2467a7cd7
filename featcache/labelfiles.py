"""What does each row of a label file say?  Streamed, checked and coded as integers."""

from __future__ import annotations

import csv
import os
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain

from featcache.errors import InputError

LIST_HEADER = ["image_id", "labels"]
SEPARATORS = (",", ";")  # what people put between class ids in place of spaces
_CLASS_COLUMN = "label_code"
_LONGEST = 255  # characters of an id, which is also the name of a file

Rows = Iterator[tuple[int, list[str]]]
Entries = tuple[array, array, array]  # image codes, class codes (int32), confidences (float32)
Doubtful = dict[str, str]  # class ids, and where they were first met


class Malformed(Exception):
    """A fault in one row; who catches it knows the file and the line."""


class Codes(dict[str, int]):
    """Number strings in the order in which they first appear, refusing unusable ones."""

    def __init__(self, what: str, spaces: bool = True) -> None:
        super().__init__()
        self._what = what
        self._spaces = spaces

    def __missing__(self, key: str) -> int:
        if not key:
            raise Malformed(f"expected {self._what}, got an empty field")
        if not key.isprintable() or key != key.strip() or len(key) > _LONGEST:
            raise Malformed(
                f"expected {self._what} of at most {_LONGEST} printable characters "
                f"without blanks around it, got {shown([key])}"
            )
        if not self._spaces and " " in key:
            raise Malformed(f"expected {self._what} without spaces, got {shown([key])}")
        self[key] = code = len(self)
        return code


def refuse_unwritable_names(
    path: str | os.PathLike[str],
    what: str,
    names: Iterable[str],
    remedy: str,
    spaces: bool = True,
) -> None:
    """Refuse names in a file of which a label file could not be written.

    Raises
    ------
    InputError
        Naming the file, the first of them and the remedy.
    """
    codes = Codes(what, spaces)
    try:
        for name in names:
            codes[name]
    except Malformed as fault:
        raise InputError(f"{path}: {fault}; {remedy}") from None


class _Confidences(dict[str, float]):
    """Parse each distinct confidence once."""

    def __missing__(self, key: str) -> float:
        try:
            value = float(key)
        except ValueError:
            value = -1.0
        if not 0.0 <= value <= 1.0:
            raise Malformed(f"expected a Confidence in [0, 1], got {shown([key])}")
        if len(self) < 65536:  # files hold a handful of values; anything else need not pile up
            self[key] = value
        return value


def read_rows(path: str | os.PathLike[str]) -> Rows:
    """(line number, fields) of each row that is not blank."""
    reader = None
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                if row:
                    yield reader.line_num, row
    except UnicodeDecodeError:
        raise InputError(
            f"{path}, line {_first_undecodable(path)}: expected UTF-8 text; convert the file"
        ) from None
    except csv.Error as error:
        line = 1 if reader is None else reader.line_num
        raise InputError(f"{path}, line {line}: expected comma-separated fields: {error}") from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _first_undecodable(path: str | os.PathLike[str]) -> int:
    with open(path, "rb") as file:
        for line, text in enumerate(file, 1):
            try:
                text.decode("utf-8")
            except UnicodeDecodeError:
                return line
    return 1


def first_row(path: str | os.PathLike[str], rows: Rows) -> tuple[int, list[str]]:
    """Take the first row off `rows`; an empty file is refused."""
    for line, row in rows:
        return line, row
    raise InputError(f"{path}: the file is empty; expected a CSV file")


def shown(row: list[str]) -> str:
    """The start of a row, quoted and on one line, for messages."""
    text = ",".join(row)
    return repr(text if len(text) <= 80 else text[:77] + "...")


def read_entries(
    path: str | os.PathLike[str], ids: Codes, classes: Codes, doubtful: Doubtful | None = None
) -> Entries:
    """Entries of a label file of any format; new ids and classes are added to the codes."""
    rows = read_rows(path)
    line, first = first_row(path, rows)
    if first == LIST_HEADER:
        return read_lists(path, rows, ids, classes, doubtful)
    if "ImageID" in first or "LabelName" in first:
        return _read_table(path, first, rows, ids, classes)
    if len(first) == 2 and first[1].startswith("/"):
        return read_lists(path, chain([(line, first)], rows), ids, classes, doubtful)
    if first[0] == _CLASS_COLUMN:
        raise InputError(f"{path}, line {line}: expected labels of images, got a list of classes")
    raise InputError(
        f"{path}, line {line}: expected 'image_id,labels', 'ImageID,Source,LabelName,Confidence' "
        f"or, without a header, 'id,/m/a /m/b', got {shown(first)}"
    )


def read_lists(
    path: str | os.PathLike[str],
    rows: Rows,
    ids: Codes,
    classes: Codes,
    doubtful: Doubtful | None = None,
) -> Entries:
    """Entries of the rows ``id,class class ...``; an image without labels gets a code only.

    `doubtful` is told of class ids that end as if something else than spaces separated them.
    """
    images, labels = array("i"), array("i")
    seen = set()
    for line, row in rows:
        try:
            if len(row) != 2:
                raise Malformed(f"expected 2 fields (id, labels), got {len(row)}: {shown(row)}")
            image = ids[row[0]]
            if image in seen:
                raise Malformed(f"expected each image once, got {row[0]} again")
            names = row[1].split()
            codes = {classes[name] for name in names}
        except Malformed as fault:
            raise InputError(f"{path}, line {line}: {fault}") from None
        if doubtful is not None and ("," in row[1] or ";" in row[1]):
            for name in names:
                if name.endswith(SEPARATORS):
                    doubtful.setdefault(name, f"{path}, line {line}")
        seen.add(image)
        images.extend([image] * len(codes))
        labels.extend(codes)
    if not seen:
        raise InputError(f"{path}: no rows after the header; expected at least one image")
    return images, labels, array("f", [1.0]) * len(images)


def _read_table(
    path: str | os.PathLike[str], header: list[str], rows: Rows, ids: Codes, classes: Codes
) -> Entries:
    for column in ("ImageID", "LabelName", "Confidence"):
        if header.count(column) != 1:
            raise InputError(f"{path}, line 1: expected one column {column}, got {shown(header)}")
    i, k, c = (header.index(name) for name in ("ImageID", "LabelName", "Confidence"))
    width, boxes = len(header), "XMin" in header
    confidence_of = _Confidences()
    images, labels, confidences = array("i"), array("i"), array("f")
    for line, row in rows:
        try:
            if len(row) != width:
                raise Malformed(f"expected {width} fields, got {len(row)}: {shown(row)}")
            images.append(ids[row[i]])
            labels.append(classes[row[k]])
            confidences.append(confidence_of[row[c]])
            if boxes and not confidences[-1]:
                raise Malformed("expected a Confidence above 0, since a box is a positive label")
        except Malformed as fault:
            raise InputError(f"{path}, line {line}: {fault}") from None
    if not images:
        raise InputError(f"{path}: no rows after the header; expected at least one label")
    return images, labels, confidences


def read_class_table(path: str | os.PathLike[str], described: bool) -> dict[str, str]:
    """Class id -> description (or the id where the file has none), in the order of the file."""
    rows = read_rows(path)
    line, header = first_row(path, rows)
    expected = [_CLASS_COLUMN, "description"]
    if header != expected and (described or header != expected[:1]):
        wanted = "'label_code,description'" + ("" if described else " or 'label_code'")
        raise InputError(f"{path}, line {line}: expected {wanted}, got {shown(header)}")
    names: dict[str, str] = {}
    codes = Codes("a class id", spaces=False)
    for line, row in rows:
        try:
            if len(row) != len(header):
                raise Malformed(f"expected {len(header)} fields, got {len(row)}: {shown(row)}")
            if codes[row[0]] < len(names):
                raise Malformed(f"expected each class once, got {row[0]} again")
        except Malformed as fault:
            raise InputError(f"{path}, line {line}: {fault}") from None
        names[row[0]] = row[-1]
    if not names:
        raise InputError(f"{path}: no rows after the header; expected at least one class")
    return names
