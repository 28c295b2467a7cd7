"""Which models can be blended, and which of their scores belong to one image?"""

from __future__ import annotations

from collections.abc import Sequence

import h5py
import numpy as np

from featcache.disk import hash_file
from heads.given import GivenScores, ScoreFile
from heads.storage import Head, OutOfFold, load


def open_members(paths: Sequence[str]) -> list[Head]:
    """Heads, adapted models, and files of other people's scores, all with out-of-fold scores.

    What is true of an image, only heads know: scores take it from them. See :mod:`heads.given`
    for what the files of scores hold.

    Raises
    ------
    ValueError
        Naming the file, and what in it is wrong.
    """
    members = [None if _holds_scores(path) else _load_head(path) for path in paths]
    heads = [member for member in members if member is not None]
    if not heads:
        raise ValueError(
            f"{paths[0]}: holds scores alone; blend them with at least one head, which knows labels"
        )
    names: dict[str, str] = {}
    found = []
    for path, member in zip(paths, members, strict=True):
        if member is None:
            member = _given(path, heads)
            other = names.setdefault(member.estimator.name, path)
            if other != path:
                raise ValueError(
                    f"{path} and {other} are both called {member.estimator.name!r}, by which their "
                    "scores are found at prediction; rename one"
                )
        found.append(member)
    return found


def _holds_scores(path: str) -> bool:
    """Whether a file is one of scores, not of a head; a file that is neither is no scores."""
    if not h5py.is_hdf5(path):
        return path.lower().endswith(".csv")
    with h5py.File(path, "r") as file:
        return "kind" not in file.attrs and "scores" in file


def _load_head(path: str) -> Head:
    content = load(path)
    if not isinstance(content, Head):
        raise ValueError(f"{path}: is a blend; give heads")
    if "target" not in content.oof:
        raise ValueError(f"{path}: has no out-of-fold scores; make it with `heads fit` or `adapt`")
    return content


def _given(path: str, heads: Sequence[Head]) -> Head:
    """A file of scores as a member beside the heads."""
    file, first = ScoreFile(path), heads[0]
    columns = file.columns(first.classes)
    known = np.unique(np.concatenate([part.ids for head in heads for part in head.oof.values()]))
    strange = np.setdiff1d(file.ids, known)
    if len(strange):
        raise ValueError(
            f"{path}: has scores of image {str(strange[0])!r}, which no head was fitted on; give "
            "out-of-fold scores of the heads' images only"
        )
    oof = {}
    for domain, truth in first.oof.items():
        if domain == "target" or np.isin(truth.ids, file.ids).any():
            P = file.scores(file.rows(truth.ids), columns)
            oof[domain] = OutOfFold(truth.ids, P, truth.Y, truth.missed, truth.mask)
    return Head(
        estimator=GivenScores(file.name, hash_file(path)),
        classes=first.classes,
        names=first.names,
        oof=oof,
        provenance={"method": "scores", "scores": path},
    )


def order(path: str, own: np.ndarray, ids: np.ndarray, first: str) -> np.ndarray:
    """Rows of a member's images in the order of another's.

    Raises
    ------
    ValueError
        Naming an image that only one of them has scored.
    """
    if np.array_equal(own, ids):
        return np.arange(len(ids))
    for have, lack, there, here in ((ids, own, first, path), (own, ids, path, first)):
        missing = np.setdiff1d(have, lack)
        if len(missing):
            raise ValueError(
                f"{here}: has no out-of-fold score of {str(missing[0])!r}, which {there} has; "
                "fit all heads on the same images"
            )
    row = {image_id: r for r, image_id in enumerate(own.tolist())}
    return np.array([row[i] for i in ids.tolist()])
