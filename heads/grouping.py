"""Which images belong together, so that no fold trains on one and scores another?

A file says it: CSV with a header ``image_id,group`` and a line an image. Pictures of one scene,
one patient or one drawing share what they show, and mostly their labels: scores held out of a
fold that trained on the others would be too good. An image that is not listed is a group by itself.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

HEADER = ["image_id", "group"]


def read_groups(path: str | os.PathLike[str]) -> dict[str, str]:
    """Group of each image that a file lists.

    Raises
    ------
    ValueError
        Naming the file and the line that is wrong.
    """
    group: dict[str, str] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            header = next(lines, [])
            if header != HEADER:
                raise ValueError(
                    f"{path}: line 1 is {','.join(header)!r}; expected {','.join(HEADER)}"
                )
            for fields in lines:
                where = f"{path}: line {lines.line_num}"
                if len(fields) != len(HEADER) or not all(fields):
                    raise ValueError(f"{where} is {','.join(fields)!r}; expected an id and a group")
                name, its = fields
                if group.setdefault(name, its) != its:
                    raise ValueError(
                        f"{where}: image {name!r} is in group {its!r} and, above, in "
                        f"{group[name]!r}; an image has one group"
                    )
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give a CSV file of {','.join(HEADER)}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: is not a CSV file in UTF-8 ({error})") from None
    return group


def group_codes(path: str | os.PathLike[str], ids: np.ndarray) -> np.ndarray:
    """(n,) int group of each image, by a file.

    Raises
    ------
    ValueError
        If it lists none of these images: its ids are other ones, surely.
    """
    listed = read_groups(path)
    names = ids.tolist()
    if names and not any(name in listed for name in names):
        raise ValueError(f"{path}: lists none of the {len(names):,} images, such as {names[0]!r}")
    code: dict[tuple[str, str], int] = {}
    keys = [("group", listed[name]) if name in listed else ("image", name) for name in names]
    return np.array([code.setdefault(key, len(code)) for key in keys], dtype=np.intp)


def united(codes: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """(n,) int groups of the same images by several codings: one of them is enough to join two.

    None stands for images that are groups by themselves; so does the answer. O(n) for each coding.
    """
    given = [
        np.unique(code, return_inverse=True)[1].reshape(-1) for code in codes if code is not None
    ]
    if not given:
        return None
    n, at, rows, nodes = len(given[0]), len(given[0]), [], []
    for code in given:  # a graph of images and, for each coding, groups
        rows.append(np.arange(n))
        nodes.append(at + code)
        at += int(code.max(initial=-1)) + 1
    edges = np.concatenate(rows), np.concatenate(nodes)
    graph = coo_array((np.ones(len(edges[0]), bool), edges), shape=(at, at))
    joined: np.ndarray = connected_components(graph, directed=False)[1][:n]
    return joined.astype(np.intp)


def numbered(
    groups: np.ndarray | None, others: np.ndarray | None, n: int, m: int, shared: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (n,) and (m,) of two domains: equal values are one group only if `shared` says so."""
    if shared and groups is not None and others is not None:
        codes = _ranks(np.concatenate([groups, others]))
        return codes[:n], codes[n:]
    first = np.arange(n) if groups is None else _ranks(groups)
    second = np.arange(m) if others is None else _ranks(others)
    return first, second + int(first.max(initial=-1)) + 1


def _ranks(values: np.ndarray) -> np.ndarray:
    """(n,) int: 0 for the least value, and so on."""
    return np.unique(values, return_inverse=True)[1].reshape(-1)
