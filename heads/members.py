"""Which models can be blended, and which of their scores belong to one image?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np

from featcache.disk import hash_file
from heads.given import GivenScores, ScoreFile
from heads.grouping import united
from heads.storage import Head, OutOfFold, load


def open_members(paths: Sequence[str]) -> list[Head]:
    """Heads, adapted models, and files of other people's scores, all with out-of-fold scores.

    What is true of an image, only heads know: scores take it from them. See :mod:`heads.given`
    for what the files of scores hold.

    Raises
    ------
    ValueError
        Naming the file, and what in it is wrong; or one that is given twice.
    """
    _refuse_twice(paths)
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


def _refuse_twice(paths: Sequence[str]) -> None:
    """A file that is given twice would count twice."""
    seen: dict[Path, str] = {}
    for path in paths:
        real = Path(path).resolve()
        if real in seen:
            also = "" if seen[real] == path else f", also as {seen[real]}"
            raise ValueError(f"{path}: is given twice{also}; give each file once")
        seen[real] = path


def _holds_scores(path: str) -> bool:
    """Whether a file is one of scores, not of a head; a file that is neither is no scores."""
    if not h5py.is_hdf5(path):
        return path.lower().endswith(".csv")
    with h5py.File(path, "r") as file:
        return "kind" not in file.attrs and "scores" in file


def _load_head(path: str) -> Head:
    content = load(path, mapped=True)
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
            oof[domain] = replace(truth, proba=P)
    return Head(
        estimator=GivenScores(file.name, hash_file(path)),
        classes=first.classes,
        names=first.names,
        oof=oof,
        provenance={"method": "scores", "scores": path},
    )


@dataclass(frozen=True)
class Joined:
    """Scores of all members on the same images of one domain.

    Attributes
    ----------
    name : str
    truth : OutOfFold
        Of the first member: ids, and what is true of them; groups that any member keeps together,
        numbered alike in all domains.
    scores : list of M arrays (n, K)
    """

    name: str
    truth: OutOfFold
    scores: list[np.ndarray]


def join(paths: Sequence[str], members: Sequence[Head]) -> list[Joined]:
    """Bring members together by image id: the target, and the source if all have scored it.

    Target images must be the same for all; of the source, images are used that all have scored.

    Raises
    ------
    ValueError
        Naming the file that has other classes, images or labels.
    """
    for path, member in zip(paths, members, strict=True):
        if not np.array_equal(member.classes, members[0].classes):
            same = set(member.classes.tolist()) == set(members[0].classes.tolist())
            raise ValueError(
                f"{path}: its classes are not those of {paths[0]}"
                + (": the same ones in another order" if same else "")
                + "; fit both on caches of the same classes in the same order"
            )
    first = members[0].oof["target"].ids
    for path, member in zip(paths, members, strict=True):
        _refuse_other_images(path, member.oof["target"].ids, first, paths[0])
    images = {"target": first}
    if all("source" in member.oof for member in members):
        common = members[0].oof["source"].ids
        for member in members[1:]:
            common = common[np.isin(common, member.oof["source"].ids)]
        if len(common) > 1:
            images["source"] = common
    parts = {n: [_rows_of(m.oof[n], ids) for m in members] for n, ids in images.items()}
    for of_domain in parts.values():
        _refuse_other_labels(paths, of_domain)
    groups = iter(_groups(list(parts.values())))
    return [
        Joined(name, replace(some[0], groups=next(groups)), [part.proba for part in some])
        for name, some in parts.items()
    ]


def _refuse_other_labels(paths: Sequence[str], parts: Sequence[OutOfFold]) -> None:
    for path, part in zip(paths, parts, strict=True):
        if part.differs(parts[0]):
            raise ValueError(
                f"{path}: was fitted on other labels of these images than {paths[0]}; "
                "fit all heads on the same labels"
            )


def _groups(parts: Sequence[Sequence[OutOfFold]]) -> list[np.ndarray | None]:
    """Of the images of each domain, from what each member (the second index) says of them."""
    ends = np.cumsum([len(some[0].ids) for some in parts])
    codes: list[np.ndarray | None] = []
    for own in zip(*parts, strict=True):
        if all(part.groups is None for part in own):
            codes.append(None)
            continue
        own_codes, free = [], 0
        for part in own:  # an image of a domain without groups is one by itself
            alone = -1 - free - np.arange(len(part.ids))
            own_codes.append(alone if part.groups is None else part.groups)
            free += len(part.ids)
        codes.append(np.concatenate(own_codes))
    joined = united(codes)
    if joined is None:
        return [None] * len(parts)
    return list(np.split(joined, ends[:-1]))


def _rows_of(scores: OutOfFold, ids: np.ndarray) -> OutOfFold:
    """The rows of some images, in their order."""
    if np.array_equal(scores.ids, ids):
        return scores
    row = {image_id: r for r, image_id in enumerate(scores.ids.tolist())}
    return scores.take(np.array([row[i] for i in ids.tolist()]))


def _refuse_other_images(path: str, own: np.ndarray, ids: np.ndarray, first: str) -> None:
    if np.array_equal(own, ids):
        return
    for have, lack, there, here in ((ids, own, first, path), (own, ids, path, first)):
        missing = np.setdiff1d(have, lack)
        if len(missing):
            raise ValueError(
                f"{here}: has no out-of-fold score of {str(missing[0])!r}, which {there} has; "
                "fit all heads on the same images"
            )
